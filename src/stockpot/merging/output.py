"""Writing a merged model: laid out from the headers, filled in place, published in one step.

The sizes of all tensors are known before the first is computed, so that output files get their
final size at once (a full disk is noticed before any work) and parts are written where they belong,
in any order. Everything happens in a staging folder beside the output's place, which takes its name
when all of it is on the disk.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stockpot.errors import StockpotError
from stockpot.files import exclusive, space_errors, write_json, write_text
from stockpot.merging.checkpoint import Checkpoint, open_checkpoint
from stockpot.merging.plan import Entry
from stockpot.safetensors_header import BYTES

__all__ = [
    "ModelFolder",
    "absolute",
    "clear",
    "header_of",
    "refuse_existing",
    "refuse_inputs_in",
    "staged",
    "staging_of",
]

_COPIED = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
)


@dataclass(frozen=True)
class _Shard:
    path: Path
    entries: tuple[int, ...]
    offsets: dict[int, int]
    """Of each entry's first byte, from the end of the header."""
    nbytes: int


class ModelFolder:
    """One merged model in the making."""

    def __init__(
        self, folder: Path, entries: Sequence[Entry], shard_bytes: int, metadata: Mapping[str, str]
    ) -> None:
        self.folder = folder
        self._entries = entries
        self._metadata = metadata
        self._shards = _layout(folder, entries, shard_bytes)
        self._shard_of = {i: shard for shard in self._shards for i in shard.entries}
        self._headers = {shard.path: self._header(shard, metadata) for shard in self._shards}
        self._files: dict[Path, int] = {}

    @property
    def nbytes(self) -> int:
        """Of all files with weights."""
        return sum(shard.nbytes + len(self._headers[shard.path]) for shard in self._shards)

    @property
    def files(self) -> list[str]:
        """Names of the files with weights."""
        return [shard.path.name for shard in self._shards]

    def _header(self, shard: _Shard, metadata: Mapping[str, str]) -> bytes:
        entries = [self._entries[i] for i in shard.entries]
        return header_of({each.name: (each.dtype, each.shape) for each in entries}, metadata)

    def open(self) -> None:
        """Create the files at their final sizes, or open those of a stopped merge.

        Raises:
            DiskFullError: if they do not fit.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        _allow_many_files()
        for shard in self._shards:
            header = self._headers[shard.path]
            with space_errors(shard.path):
                descriptor = os.open(shard.path, os.O_RDWR | os.O_CREAT, 0o644)
                self._files[shard.path] = descriptor
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(descriptor, 0, max(1, len(header) + shard.nbytes))
                os.truncate(descriptor, len(header) + shard.nbytes)
                os.pwrite(descriptor, header, 0)

    def write(self, index: int, offset: int, data: memoryview) -> None:
        """Write bytes of a tensor, ``offset`` bytes from its start; any thread, any order."""
        shard = self._shard_of[index]
        place = len(self._headers[shard.path]) + shard.offsets[index] + offset
        with space_errors(shard.path):
            done = 0
            while done < len(data):
                done += os.pwrite(self._files[shard.path], data[done:], place + done)

    def patch(
        self, index: int, start: int, stop: int, places: np.ndarray, values: np.ndarray
    ) -> None:
        """Replace elements of a tensor: ``places`` counts from element ``start``."""
        shard = self._shard_of[index]
        offset = len(self._headers[shard.path]) + shard.offsets[index] + start * values.itemsize
        current = bytearray(
            os.pread(self._files[shard.path], (stop - start) * values.itemsize, offset)
        )
        np.frombuffer(current, dtype=values.dtype)[places] = values
        self.write(index, start * values.itemsize, memoryview(current))

    def flush(self) -> None:
        """Bring what was written onto the disk."""
        for path, descriptor in list(self._files.items()):
            with space_errors(path):
                os.fdatasync(descriptor)

    def close(self) -> None:
        """Close the files."""
        for descriptor in self._files.values():
            with contextlib.suppress(OSError):
                os.close(descriptor)
        self._files.clear()

    def finish(self, metadata: Mapping[str, str]) -> None:
        """Write the final metadata, of the length of the provisional, and the index; verify.

        Raises:
            StockpotError: if what is on the disk is not what was to be written.
        """
        for shard in self._shards:
            header = self._header(shard, metadata)
            assert len(header) == len(self._headers[shard.path])
            with space_errors(shard.path):
                os.pwrite(self._files[shard.path], header, 0)
                os.fsync(self._files[shard.path])
        self.close()
        if len(self._shards) > 1:
            weight_map = {
                self._entries[i].name: shard.path.name
                for shard in self._shards
                for i in shard.entries
            }
            total = {"total_size": sum(shard.nbytes for shard in self._shards)}
            write_json(
                self.folder / "model.safetensors.index.json",
                {"metadata": total, "weight_map": weight_map},
            )
        written = open_checkpoint(self.folder).tensors
        expected = {entry.name: (entry.dtype, entry.shape) for entry in self._entries}
        if {name: (info.dtype, info.shape) for name, info in written.items()} != expected:
            raise StockpotError(f"{self.folder} does not hold what was written; nothing was kept")

    def copy_companions(
        self, donor: Checkpoint, changes: Mapping[str, Any], dtype: str | None
    ) -> None:
        """config, generation config and tokenizer, from the one input that gives them."""
        if donor.single_file:
            return
        if donor.config:
            config = {**donor.config, **changes}
            if dtype is not None:
                config.pop("torch_dtype", None)
                config["dtype"] = dtype
            write_json(self.folder / "config.json", config)
        for name in _COPIED:
            if (donor.folder / name).is_file():
                with space_errors(self.folder / name):
                    shutil.copyfile(donor.folder / name, self.folder / name)

    def write_text(self, name: str, text: str) -> None:
        """Add a small file."""
        write_text(self.folder / name, text)


def _allow_many_files() -> None:
    """A sweep holds all files of all its points open at once."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def header_of(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]
) -> bytes:
    """The start of a safetensors file: dtype and shape of tensors that follow each other."""
    described: dict[str, Any] = {"__metadata__": dict(metadata)}
    begin = 0
    for name, (dtype, shape) in tensors.items():
        end = begin + math.prod(shape) * BYTES[dtype]
        described[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _layout(folder: Path, entries: Sequence[Entry], shard_bytes: int) -> list[_Shard]:
    """Entries in their order, a new file where the next would exceed ``shard_bytes``."""
    groups: list[list[int]] = [[]]
    size = 0
    for i, entry in enumerate(entries):
        nbytes = entry.numel * BYTES[entry.dtype]
        if groups[-1] and size + nbytes > shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(i)
        size += nbytes
    shards = []
    for number, group in enumerate(groups, start=1):
        name = (
            "model.safetensors"
            if len(groups) == 1
            else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        )
        # Wider numbers first, so that each tensor starts at a multiple of its own width.
        ordered = sorted(group, key=lambda i: -BYTES[entries[i].dtype])
        offsets: dict[int, int] = {}
        end = 0
        for i in ordered:
            offsets[i] = end
            end += entries[i].numel * BYTES[entries[i].dtype]
        shards.append(_Shard(folder / name, tuple(ordered), offsets, end))
    return shards


def staging_of(output: Path) -> Path:
    """Where an output is made: beside it, so that it can take its name in one step."""
    return output.with_name(f".{output.name}.partial")


def refuse_existing(output: Path, overwrite: bool) -> None:
    """Refuse to touch what exists, unless told.

    Raises:
        StockpotError: if the output exists and ``overwrite`` is False, or it is a file.
    """
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        raise StockpotError(f"{output} is no folder; give one, or a new name, with -o")
    if not output.exists() or overwrite or not any(output.iterdir()):
        return
    raise StockpotError(f"{output} exists and was not touched; --overwrite replaces it")


def absolute(output: Path) -> Path:
    """Without ``.`` and ``..``, since a folder is made beside it.

    Raises:
        StockpotError: if it has no name to be given.
    """
    found = Path(os.path.abspath(output))
    if not found.name:
        raise StockpotError(f"{output} cannot be an output; name a folder with -o")
    return found


def refuse_inputs_in(output: Path, inputs: Sequence[Checkpoint]) -> None:
    """Refuse an output that would replace what it is made from.

    Raises:
        StockpotError: if an input, or a folder that leads to it, is the output or lies in it.
    """
    place = output.resolve()
    for checkpoint in inputs:
        # The neighbours of a file given by itself are not read.
        folder = () if checkpoint.single_file else (checkpoint.folder,)
        for path in (*folder, *checkpoint.files):
            # As it is named, and where links lead: replacing either would lose it.
            named = Path(os.path.abspath(path))
            for way in (named, named.parent.resolve() / named.name, named.resolve()):
                if {output, place} & {way, *way.parents}:
                    raise StockpotError(
                        f"{path} is an input; write to another folder than {output}"
                    )


def clear(staging: Path) -> None:
    """Remove what another merge left, but for the lock that is held."""
    for path in staging.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != ".lock":
            path.unlink()


@contextlib.contextmanager
def staged(output: Path) -> Iterator[Path]:
    """A folder to fill, held for this process, that becomes ``output`` when the block ends well.

    Otherwise it stays, for the same merge to go on with.

    Raises:
        StockpotError: if another process holds it.
    """
    staging = staging_of(output)
    staging.mkdir(parents=True, exist_ok=True)
    with exclusive(staging):
        yield staging
        (staging / ".lock").unlink()
        _publish(staging, output)


def _publish(staging: Path, output: Path) -> None:
    """Give the finished folder its name; what was there before goes last."""
    _sync_folder(staging)
    old = output.with_name(f".{output.name}.replaced")
    shutil.rmtree(old, ignore_errors=True)
    if output.exists():
        output.rename(old)
    try:
        staging.rename(output)
    except OSError:
        if old.exists():
            old.rename(output)
        raise
    _sync_folder(output.parent)
    shutil.rmtree(old, ignore_errors=True)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
