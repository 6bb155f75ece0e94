"""What can go wrong while merging: nothing is half written, and the message says why."""

from __future__ import annotations

import json
import os
import random
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.merging.conftest import load
from tests.support.merging import tensors_of, write_file, write_model

from stockpot.errors import DiskFullError, NonFiniteError, StockpotError
from stockpot.merging import merge
from stockpot.merging.checkpoint import CheckpointError, open_checkpoint
from stockpot.merging.on_disk import Settings

Models = Callable[..., tuple[Path, list[Path]]]


def snapshot(*folders: Path) -> dict[Path, bytes]:
    return {
        path: path.read_bytes() for each in folders for path in each.rglob("*") if path.is_file()
    }


def leftovers(folder: Path, known: set[str]) -> set[str]:
    """Names in a folder, but for the hidden staging folder that a stopped merge goes on from."""
    return {path.name for path in folder.iterdir() if not path.name.startswith(".")} - known


def refused(tmp_path: Path, match: str, *models: Path, **arguments: object) -> None:
    before = snapshot(*models)
    with pytest.raises(StockpotError, match=match):
        merge("linear", list(map(str, models)), tmp_path / "out", **arguments)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()
    assert snapshot(*models) == before


def test_truncated_shard(models: Models, tmp_path: Path) -> None:
    _, tuned = models()
    path = tuned[1] / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-7])
    refused(tmp_path, r"tuned1/model.safetensors is damaged.*cut short", *tuned)


def test_missing_shard(models: Models, tmp_path: Path) -> None:
    _, tuned = models(shards=2)
    (tuned[0] / "model-00002-of-00002.safetensors").unlink()
    refused(tmp_path, r"model-00002-of-00002.safetensors is missing", *tuned)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda h: h["a"].update(shape=[3, 2]), "8 bytes for F32 of shape"),
        (lambda h: h["a"].update(data_offsets=[0, 12]), "12 bytes for F32"),
        (lambda h: h["b"].update(data_offsets=[4, 12]), "overlaps"),
        (lambda h: h["b"].update(data_offsets=[16, 24]), "hole"),
        (lambda h: h["a"].update(dtype="F31"), "unknown dtype 'F31'"),
        (lambda h: h["a"].update(shape=[-2, -1]), "shape"),
        (lambda h: h["a"].pop("dtype"), "needs dtype"),
        (lambda h: h.pop("b"), "longer than its header says"),
    ],
)
def test_header_that_lies(
    change: Callable[[dict[str, dict[str, object]]], object], reason: str, tmp_path: Path
) -> None:
    header = {
        "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
        "b": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]},
    }
    change(header)
    text = json.dumps(header).encode()
    path = tmp_path / "lying.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(16))
    with pytest.raises(CheckpointError, match=reason):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"", "0 bytes"),
        (struct.pack("<Q", 1 << 62) + b"{}", "claims"),
        (struct.pack("<Q", 4) + b"[1, ", "no JSON"),
        (struct.pack("<Q", 2) + b"[]", "mapping"),
        (struct.pack("<Q", 2) + b"\xff\xfe", "no JSON"),
    ],
)
def test_file_that_is_none(raw: bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(raw)
    with pytest.raises(CheckpointError, match=reason):
        open_checkpoint(tmp_path / "x.safetensors")


def test_name_given_twice(tmp_path: Path) -> None:
    entry = '{"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}'
    text = f'{{"a": {entry}, "a": {entry}}}'.encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(4))
    with pytest.raises(CheckpointError, match="'a' is given twice"):
        open_checkpoint(path)


def test_flipped_byte_under_a_stated_hash(models: Models, tmp_path: Path) -> None:
    import hashlib

    _, tuned = models()
    path = tuned[0] / "model.safetensors"
    stated = hashlib.sha256(path.read_bytes()).hexdigest()
    inputs = [{"model": str(tuned[0]), "sha256": stated}, {"model": str(tuned[1])}]
    merge("linear", inputs, tmp_path / "good")  # type: ignore[arg-type]
    damaged = bytearray(path.read_bytes())
    damaged[-5] ^= 1
    path.write_bytes(damaged)
    for hashing in ("xxh3", "sha256", "none"):
        with pytest.raises(CheckpointError, match="not the file that was stated"):
            merge(
                "linear",
                inputs,  # type: ignore[arg-type]
                tmp_path / "out",
                settings=Settings(hashes=hashing),
            )
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64"])
def test_non_finite_input_is_named(dtype: str, value: float, tmp_path: Path) -> None:
    shapes = {"fine": (10,), "broken": (3, 5000)}
    good, bad = tensors_of(0, shapes, dtype), tensors_of(1, shapes, dtype)
    bad["broken"].view(-1)[9000] = value
    folders = [write_model(tmp_path / name, each) for name, each in (("g", good), ("b", bad))]
    with pytest.raises(NonFiniteError, match=r"b/model.*'broken'.*element 9,000"):
        merge("linear", list(map(str, folders)), tmp_path / "out", weights=[1.0, 0.0])
    assert not (tmp_path / "out").exists()


def test_result_that_overflows_is_named(tmp_path: Path) -> None:
    folders = [
        write_model(tmp_path / name, {"w": torch.full((5,), 6e4, dtype=torch.float16)})
        for name in "ab"
    ]
    inputs = list(map(str, folders))
    with pytest.raises(NonFiniteError, match=r"'w'.*overflow F16.*--dtype"):
        merge("linear", inputs, tmp_path / "out", normalize=False)  # type: ignore[arg-type]
    merge("linear", inputs, tmp_path / "out", normalize=False, dtype="float32")  # type: ignore[arg-type]
    assert load(tmp_path / "out")["w"].tolist() == [120000.0] * 5


def test_existing_output_is_not_touched_unless_told(models: Models, tmp_path: Path) -> None:
    _, tuned = models()
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("precious")
    with pytest.raises(StockpotError, match="--overwrite"):
        merge("linear", list(map(str, tuned)), out)
    assert snapshot(out) == {out / "mine.txt": b"precious"}
    merge("linear", list(map(str, tuned)), out, settings=Settings(overwrite=True))
    assert not (out / "mine.txt").exists()
    assert load(out)
    with pytest.raises(StockpotError, match="is an input"):
        merge("linear", [str(out)], out, settings=Settings(overwrite=True))


def test_full_disk(models: Models, tmp_path: Path) -> None:
    """A file system of 40 kB: noticed before anything is merged; the same command works later."""
    _, tuned = models(dtype="F32", count=2)
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=40k", "tmpfs", str(disk)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("this user may not mount")
    try:
        with pytest.raises(DiskFullError, match="no space left"):
            merge("linear", list(map(str, tuned)), disk / "out")
        assert not (disk / "out").exists()
        subprocess.run(["mount", "-o", "remount,size=10m", str(disk)], check=True)
        merge("linear", list(map(str, tuned)), disk / "out")
        assert load(disk / "out")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


SHAPES = {f"model.layers.{i}.w": (512, 1024) for i in range(12)}


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    folder = tmp_path_factory.mktemp("large")
    base = tensors_of(0, SHAPES, "BF16")
    tuned = [
        write_model(folder / f"tuned{i}", tensors_of(i + 1, SHAPES, "BF16", base)) for i in range(3)
    ]
    return write_model(folder / "base", base), tuned


def command(large: tuple[Path, list[Path]], out: Path, *options: str) -> list[str]:
    base, tuned = large
    models = [str(each) for each in tuned]
    method = ["ties", "--base", str(base), *models, "-o", str(out), "--chunk", "4096", *options]
    return [sys.executable, "-m", "stockpot", "merge", *method]


@pytest.mark.parametrize("trim", ["global", "per-tensor"])
def test_killed_at_random_points_and_run_again(
    trim: str, large: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    """The bytes of a merge that was never stopped; what was done is not done again."""
    subprocess.run(command(large, tmp_path / "whole", "--trim", trim), check=True)
    before = snapshot(*large[1])
    rng = random.Random(3)
    kills = 0
    out = tmp_path / "out"
    environment = {**os.environ, "STOCKPOT_MERGE_KEEP_SECONDS": "0.05"}
    while not out.exists():
        process = subprocess.Popen(command(large, out, "--trim", trim), env=environment)
        if kills < 4:
            while process.poll() is None and not (tmp_path / ".out.partial" / ".lock").exists():
                time.sleep(0.01)
            time.sleep(rng.random() * 0.5)
            process.send_signal(signal.SIGKILL)
            kills += process.wait() == -signal.SIGKILL
            if not out.exists():
                assert leftovers(tmp_path, {"whole"}) == set()
        assert process.wait() in (0, -signal.SIGKILL)
    assert kills >= 1
    assert snapshot(*large[1]) == before
    expected = (tmp_path / "whole" / "model.safetensors").read_bytes()
    assert (out / "model.safetensors").read_bytes() == expected
    assert {path.name for path in out.iterdir()} == {
        path.name for path in (tmp_path / "whole").iterdir()
    }
    assert not (tmp_path / ".out.partial").exists()


def test_stopped_merge_does_not_begin_again(
    large: tuple[Path, list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stockpot.merging import engine

    base, tuned = large
    seen = 0

    def stop(phase: str, count: int) -> None:
        nonlocal seen
        seen += phase == "merge" and count > 0
        if seen == 700:
            raise KeyboardInterrupt

    inputs = list(map(str, tuned))
    small = Settings(chunk=4096, threads=2)
    with pytest.raises(KeyboardInterrupt):
        merge("ties", inputs, tmp_path / "o", base=str(base), settings=small, progress=stop)  # type: ignore[arg-type]
    units = 0

    def count(phase: str, size: int) -> None:
        nonlocal units
        units += phase == "merge" and size > 0

    merge("ties", inputs, tmp_path / "o", base=str(base), settings=small, progress=count)  # type: ignore[arg-type]
    assert 700 < units + 700 <= 12 * 128 + 700
    assert units <= 12 * 128 - 600
    del engine, monkeypatch


def test_another_merge_into_the_same_folder_is_refused(models: Models, tmp_path: Path) -> None:
    from stockpot.files import exclusive
    from stockpot.merging.output import staging_of

    _, tuned = models()
    staging = staging_of(tmp_path / "out")
    staging.mkdir()
    with exclusive(staging), pytest.raises(StockpotError, match="another stockpot process"):
        merge("linear", list(map(str, tuned)), tmp_path / "out")


def test_input_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    """An error with the file's name; a mapped file would end the process."""
    shapes = {f"w{i}": (64, 4096) for i in range(4)}
    folders = [write_model(tmp_path / n, tensors_of(i, shapes, "F32")) for i, n in enumerate("ab")]
    cut = folders[0] / "model.safetensors"

    def shorten(phase: str, count: int) -> None:
        if phase == "merge" and count > 0:
            os.truncate(cut, 5000)

    with pytest.raises(StockpotError, match="cut short"):
        merge(
            "linear",
            list(map(str, folders)),
            tmp_path / "out",
            settings=Settings(chunk=4096, threads=1, hashes="none"),
            progress=shorten,
        )
    assert not (tmp_path / "out").exists()


def test_pickles_are_refused_with_the_command_that_converts(tmp_path: Path) -> None:
    model = {"w": torch.arange(6.0).view(2, 3)}
    torch.save({"state_dict": model}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="python -c") as caught:
        open_checkpoint(tmp_path)
    message = str(caught.value)
    program = message[message.index("'") + 1 : message.rindex("'")]
    converted = tmp_path / "pytorch_model.safetensors"
    subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "pytorch_model.bin"), str(converted)],
        check=True,
    )
    assert torch.equal(load(tmp_path)["w"], model["w"])
    write_file(tmp_path / "b.safetensors", model)
