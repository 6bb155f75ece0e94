"""What processes of one run split among themselves is what one process gets."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from stockpot.processes import ALONE, Processes, _backends, meeting_place, said_by_main
from support.launch import launch
from support.text import write_model, write_tasks


def results(folder: Path, count: int) -> list[dict[str, Any]]:
    out = folder / f"by {count}"
    done = launch(count, "support.shared_work", [folder, out])
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads((out / f"{rank}.json").read_text()) for rank in range(count)]
    assert all(result == found[0] for result in found), "the processes disagree"
    return found


def close(ours: Any, right: Any, where: str) -> None:
    if isinstance(right, dict):
        assert ours.keys() == right.keys(), where
        for key in right:
            close(ours[key], right[key], f"{where} / {key}")
    elif isinstance(right, list):
        assert len(ours) == len(right), where
        for place, (one, other) in enumerate(zip(ours, right, strict=True)):
            close(one, other, f"{where}[{place}]")
    elif isinstance(right, float):
        assert ours == pytest.approx(right, rel=2e-4, abs=1e-7), where
    else:
        assert ours == right, where


@pytest.mark.parametrize("count", [2, 3])
def test_scores_and_fisher_values_are_those_of_one_process(tmp_path: Path, count: int) -> None:
    write_model(tmp_path / "model", "gpt2")
    write_tasks(tmp_path, ["tea"], rows=30)
    alone = results(tmp_path, 1)[0]
    assert alone["NaN"] == "NonFiniteError"
    assert 0 < alone["images"]["accuracy on 230"]["value"] < 1
    assert len(set(alone["texts"]["written at 1.0"])) > 1
    assert alone["images"]["fisher exact"]["passes"] == 23 * 7
    close(results(tmp_path, count)[0], alone, f"{count} processes")


def test_shares_cover_everything_once() -> None:
    for world in (1, 2, 3, 8):
        for items in (0, 1, 5, 16):
            shares = [list(Processes(r, world).mine(range(items))) for r in range(world)]
            assert sorted(itertools.chain(*shares)) == list(range(items))
            size = Processes(0, world).share_size(items, 4)
            assert 1 <= size <= 4
            assert items < world or -(-items // size) >= world


def test_alone_nothing_is_communicated_and_errors_are_ones_own() -> None:
    def fails() -> None:
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine") as caught:
        ALONE.from_main(fails)
    assert not said_by_main(caught.value)
    assert ALONE.gather(3) == [3]
    with ALONE.main_first():
        ALONE.wait()


def test_on_gpus_numbers_meet_in_host_memory_and_each_process_has_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A group made without names has NCCL alone, which cannot add up numbers in host memory."""
    taken: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    for rank in ("1", "2"):  # the third trains on the CPU, or is refused later
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert _backends() == "cpu:gloo,cuda:nccl"
    assert taken == [1]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert _backends() == "gloo"


@pytest.mark.parametrize(
    ("backends", "place"), [("cuda:nccl", "cuda"), ("cpu:gloo,cuda:nccl", "cpu")]
)
def test_where_numbers_meet(monkeypatch: pytest.MonkeyPatch, backends: str, place: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.distributed, "get_backend_config", lambda: backends)
    assert meeting_place().type == place
