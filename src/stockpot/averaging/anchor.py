"""theta_o, the weights that averaging pulls towards: on the device, in host memory or on disk."""

from __future__ import annotations

import json
import os
import re
import typing
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal, Self

import torch
from torch import Tensor, nn

from stockpot.arithmetic import fingerprint, is_finite
from stockpot.averaging.disk import TensorsOnDisk
from stockpot.averaging.weights import Box, Piece, Span, find_weights
from stockpot.errors import NonFiniteError, StockpotError, first_line
from stockpot.files import write_tensors

__all__ = ["Anchor", "Store", "check_store", "find_files"]

Store = Literal["device", "cpu", "disk"]
# Elements that are read from disk at a time.
_STREAM = 1 << 20


class Anchor(Mapping[str, Tensor]):
    """Named weights that stay as they are while training goes on.

    An anchor is a read-only mapping from parameter names to tensors. One that was opened with
    ``store="disk"`` reads each tensor when it is asked for and keeps none. One that was captured
    from a sharded model holds this process's part of each (``local``).
    """

    def __init__(
        self, tensors: Mapping[str, Tensor], *, local: bool = False, borrowed: bool = False
    ) -> None:
        self._tensors = tensors
        self.local = local
        self.borrowed = borrowed
        """Whether somebody else keeps the tensors, whole, as long as they are needed: what is in
        host memory, or in a file mapped to it, is then read there and not copied."""

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors  # Mapping's own would read the tensor

    @classmethod
    def capture(
        cls,
        model: nn.Module,
        store: Literal["device", "cpu"] = "cpu",
        *,
        optimizer: object | None = None,
    ) -> Self:
        """Copy the trainable weights of ``model`` as they are now; sharded: this process's part.

        Args:
            model: wrapped (DDP, FSDP, DeepSpeed) or not.
            store: where the copies are kept.
            optimizer: what trains the model; needed under DeepSpeed.

        Raises:
            NonFiniteError: if a weight is NaN or infinite; such an anchor would spoil every merge.
            StockpotError: if no writer knows where the true weights are.
        """
        weights = find_weights(model, optimizer)
        return cls.of(weights.pieces(), store, local=weights.distributed)

    @classmethod
    def of(
        cls, pieces: Mapping[str, Piece], store: Literal["device", "cpu"], *, local: bool
    ) -> Self:
        """Copy the values of ``pieces``."""
        copies: dict[str, Tensor] = {}
        for name, piece in pieces.items():
            _check_finite(name, piece.values)
            copies[name] = _copy(piece.values, store)
        return cls(copies, local=local)

    @classmethod
    def load(cls, path: str | Path, store: Store = "cpu") -> Self:
        """Open a safetensors file, a folder of them, or a model on the hub.

        With ``store="disk"`` nothing is read yet. A path that :meth:`save` wrote from a sharded
        model opens this process's part.

        Raises:
            FileNotFoundError: if there is no such file.
            StockpotError: if a file is damaged, or the hub has no such model.
            ValueError: if ``store`` is not one of the three.
        """
        check_store(store)
        files, local = find_files(path)
        on_disk = TensorsOnDisk(files)
        if store == "disk":
            return cls(on_disk, local=local)
        device = "cuda" if store == "device" and torch.cuda.is_available() else "cpu"
        # A copy: what safetensors returns is a view of the file, which may change.
        tensors = {name: on_disk[name].to(device, copy=True) for name in on_disk}
        return cls(tensors, local=local)

    @property
    def on_disk(self) -> bool:
        """Whether its tensors are read when they are asked for."""
        return isinstance(self._tensors, TensorsOnDisk)

    def save(self, path: str | Path) -> None:
        """Write the anchor as one safetensors file, atomically.

        A local part is written beside those of the other processes, as
        ``<stem>-<rank>-of-<processes>.safetensors``; :meth:`load` takes the same ``path``.

        Raises:
            NonFiniteError: if a weight is NaN or infinite; nothing is written then.
        """
        for name in self:
            _check_finite(name, self[name])
        # Copies, because safetensors refuses tensors that share memory.
        plain = {name: self[name].detach().cpu().contiguous().clone() for name in self}
        path = Path(path)
        write_tensors(_part_path(path) if self.local else path, plain)

    def fingerprint(self) -> str:
        """SHA-256 over names, dtypes, shapes and bytes: equal if and only if the weights are."""
        return fingerprint(self)

    def name_of(self, piece: Piece) -> str | None:
        """The name under which the anchor has this parameter, or None."""
        return next((name for name in (piece.name, *piece.also) if name in self), None)

    def part(self, piece: Piece) -> Tensor:
        """What the anchor has for ``piece``, in the shape of ``piece.values``.

        Raises:
            StockpotError: if the shapes differ: the anchor belongs to another model.
        """
        name = self.name_of(piece)
        if name is None:
            raise KeyError(piece.name)
        if self.local:
            part = self[name]
            _check_shape(piece.name, piece.values.shape, part.shape)
            return part
        if piece.region is None:
            part = self[name]
            _check_shape(piece.name, piece.shape, part.shape)
            return part
        if isinstance(self._tensors, TensorsOnDisk):
            _check_shape(piece.name, piece.shape, self._tensors.shape(name))
            return _read_part(self._tensors, name, piece)
        _check_shape(piece.name, piece.shape, self[name].shape)
        return _cut(self[name], piece)

    def _run(self, piece: Piece) -> tuple[str, int, int] | None:
        """Where ``piece`` is one run of elements on disk: its name there, the first and the last.

        None if it is not on disk, or not in one run; then :meth:`part` is the way.
        """
        name = self.name_of(piece)
        if name is None or not isinstance(self._tensors, TensorsOnDisk):
            return None
        whole = self._tensors.shape(name)
        if self.local or piece.region is None:
            _check_shape(piece.name, piece.values.shape, whole)
            return name, 0, whole.numel()
        _check_shape(piece.name, piece.shape, whole)
        if isinstance(piece.region, Span):
            return name, piece.region.start, piece.region.stop
        if piece.region.shape[1:] != tuple(whole[1:]):
            return None
        row, first = whole[1:].numel(), piece.region.offset[:1]
        return name, first[0] * row, first[0] * row + piece.values.numel()

    def parts(self, piece: Piece) -> Iterator[tuple[int, int, Tensor]]:
        """First and last element of ``piece.values`` (flattened), and what the anchor has there.

        In memory that is one part, in the shape of ``piece.values``. On disk it is many flat ones,
        each in memory that the next one uses again: no whole tensor is ever read.
        """
        run = self._run(piece) if piece.values.is_contiguous() else None
        if run is None:
            yield 0, piece.values.numel(), self.part(piece)
            return
        assert isinstance(self._tensors, TensorsOnDisk)
        name, start, stop = run
        for at in range(0, stop - start, _STREAM):
            end = min(at + _STREAM, stop - start)
            yield at, end, self._tensors.stream(name, start + at, start + end)

    def keep(self, pieces: Mapping[str, Piece], store: Store) -> Anchor:
        """Only what ``pieces`` need, each checked; in memory unless ``store`` is ``"disk"``.

        Raises:
            NonFiniteError: if a value is NaN or infinite, or is so in the weight's precision.
            StockpotError: if a shape differs.
        """
        kept: dict[str, Tensor] = {}
        for name, piece in pieces.items():
            if self.name_of(piece) is None:
                continue
            if store == "disk":
                for _, _, part in self.parts(piece):
                    _check_finite(name, part, piece.values.dtype)
                continue
            part = self.part(piece)
            _check_finite(name, part, piece.values.dtype)
            if store == "cpu":
                kept[name] = part if part.device.type == "cpu" else part.cpu()
                if self.borrowed and part.device.type == "cpu":
                    continue
                if self.on_disk or piece.region is not None:
                    kept[name] = kept[name].clone()  # not a view of the file or of the whole
                if piece.values.is_cuda:
                    kept[name] = kept[name].pin_memory()
            else:
                kept[name] = part.to(piece.values.device, copy=piece.region is not None)
        return self if store == "disk" else Anchor(kept, local=True)


def check_store(store: str) -> None:
    """Refuse a place where no anchor can be kept."""
    if store not in typing.get_args(Store):
        raise ValueError(f"store = {store!r} is not one of {', '.join(typing.get_args(Store))}")


def find_files(path: str | Path) -> tuple[list[Path], bool]:
    """The safetensors files behind ``path``, and whether they are this process's part.

    Raises:
        FileNotFoundError: if there are none.
        StockpotError: if the path names something else than safetensors.
    """
    place = Path(path)
    if place.is_file():
        if place.suffix in {".bin", ".pt", ".pth", ".ckpt"}:
            raise StockpotError(
                f"anchor {path} is a pickle, which may run code when it is read: convert it to "
                "safetensors (model.save_pretrained writes it)"
            )
        return [place], False
    if (part := _part_path(place)).is_file():
        return [part], True
    if others := sorted(place.parent.glob(f"{place.stem}-*-of-*{place.suffix}")):
        raise StockpotError(
            f"anchor {path} was saved in parts by other processes ({others[0].name}, ...): this "
            f"run has {_world()[1]}. Go on with as many processes, or give a whole checkpoint"
        )
    if place.is_dir():
        return _files_of(place), False
    return _files_of(_from_hub(path)), False


def _files_of(folder: Path) -> list[Path]:
    indices = sorted(folder.glob("*.safetensors.index.json"))
    if indices:
        shards = set(json.loads(indices[0].read_text())["weight_map"].values())
        files = [folder / shard for shard in sorted(shards)]
    else:
        preferred = [folder / "model.safetensors", folder / "adapter_model.safetensors"]
        files = [file for file in preferred if file.is_file()][:1]
        files = files or sorted(folder.glob("*.safetensors"))
    missing = [file for file in files if not file.is_file()]
    if missing or not files:
        what = missing[0] if missing else folder / "model.safetensors"
        raise FileNotFoundError(f"no anchor at {folder}: {what.name} is missing")
    return files


def _from_hub(path: str | Path) -> Path:
    mirror = os.environ.get("STOCKPOT_DATA")
    if mirror and (Path(mirror) / path).is_dir():
        return Path(mirror) / path
    missing = f"no anchor at {path}: give a safetensors file, a folder of them or a hub id"
    if isinstance(path, Path) or not re.fullmatch(r"[\w.-]+/[\w.-]+", path):
        raise FileNotFoundError(missing)
    try:
        from huggingface_hub import snapshot_download

        patterns = ["*.safetensors", "*.safetensors.index.json"]
        return Path(snapshot_download(path, allow_patterns=patterns))
    except Exception as error:  # the hub client raises many kinds
        line = first_line(error)
        raise FileNotFoundError(f"{missing}. The hub says: {line}") from error


def _world() -> tuple[int, int]:
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def _part_path(path: Path) -> Path:
    rank, world = _world()
    return path.with_name(f"{path.stem}-{rank + 1:05d}-of-{world:05d}{path.suffix}")


def _copy(values: Tensor, store: str) -> Tensor:
    if store == "device" or not values.is_cuda:
        return values.detach().clone()
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    return host.copy_(values.detach())


def _check_finite(name: str, weight: Tensor, dtype: torch.dtype | None = None) -> None:
    # 1e6 is infinite in the float16 of a model.
    if weight.is_floating_point() and not is_finite(weight.to(dtype or weight.dtype)):
        raise NonFiniteError(
            f"weight {name!r} is not finite: it cannot be an anchor. Capture the anchor before "
            "training diverges, or give a path to a good checkpoint."
        )


def _check_shape(name: str, weight: torch.Size, anchor: torch.Size) -> None:
    if weight != anchor:
        raise StockpotError(
            f"weight {name!r} has shape {tuple(weight)} in the model and {tuple(anchor)} in the "
            "anchor: the anchor belongs to another model"
        )


def _cut(whole: Tensor, piece: Piece) -> Tensor:
    """The piece's region of a whole tensor."""
    if isinstance(piece.region, Box):
        for dim, (start, size) in enumerate(
            zip(piece.region.offset, piece.region.shape, strict=True)
        ):
            whole = whole.narrow(dim, start if size else 0, size)
        return whole
    assert isinstance(piece.region, Span)
    return _padded(whole.reshape(-1)[piece.region.start : piece.region.stop], piece)


def _read_part(tensors: TensorsOnDisk, name: str, piece: Piece) -> Tensor:
    """The piece's region, of which only the rows or elements are read."""
    if isinstance(piece.region, Span):
        part = tensors.elements(name, piece.region.start, piece.region.stop)
        return _padded(part, piece)
    assert isinstance(piece.region, Box)
    if not piece.region.shape:
        return tensors[name]
    start, size = piece.region.offset[0], piece.region.shape[0]
    rows = tensors.rows(name, start, start + size) if size else tensors.rows(name, 0, 0)
    inner = Box((0, *piece.region.offset[1:]), piece.region.shape)
    return _cut(rows, replace(piece, region=inner))


def _padded(part: Tensor, piece: Piece) -> Tensor:
    if part.numel() == piece.values.numel():
        return part.view(piece.values.shape)
    whole = part.new_zeros(piece.values.numel())  # ZeRO pads its partitions
    whole[: part.numel()] = part
    return whole
