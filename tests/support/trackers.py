"""What trackers hold, read back by their own means or from their files."""

from __future__ import annotations

import json
import struct
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Series = dict[str, list[tuple[int, float]]]
"""(step, value) by name, in the order of logging."""


def events(folder: Path) -> Series:
    """All scalars of TensorBoard's files under a folder, as TensorBoard shows them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found: Series = defaultdict(list)
    for place in {file.parent for file in folder.rglob("events.out.tfevents.*")}:
        accumulator = EventAccumulator(str(place), size_guidance={"scalars": 0}).Reload()
        for tag in accumulator.Tags()["scalars"]:
            found[tag] += [(event.step, event.value) for event in accumulator.Scalars(tag)]
    return found


def wandb_records(file: Path) -> list[Any]:
    """W&B's offline file: LevelDB's log format with protocol buffers in it."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, found, whole, at = file.read_bytes(), [], b"", 7
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, size, kind = struct.unpack_from("<IHB", data, at)
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # all, or the last part
            found.append(Record.FromString(whole))
            whole = b""
    return found


def wandb_series(records: Iterable[Any]) -> Series:
    """What was logged, by Trainer's step axis."""
    series: Series = defaultdict(list)
    for record in records:
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            row = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items}
            step = row.pop("train/global_step")
            for name, value in row.items():
                if not name.startswith("_"):
                    series[name].append((step, value))
    return series


def mlflow_series(client: Any, run: str) -> Series:
    """Every metric's history."""
    return {
        name: [(metric.step, metric.value) for metric in client.get_metric_history(run, name)]
        for name in client.get_run(run).data.metrics
    }
