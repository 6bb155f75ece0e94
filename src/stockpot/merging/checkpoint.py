"""Checkpoints on disk, read by their headers: no tensor data, no architecture list, no torch.

Everything that a merge has to know before it starts stands in the headers, so that a checkpoint of
any size is checked in milliseconds.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

from stockpot.errors import CheckpointError, nearest
from stockpot.safetensors_header import TensorInfo, read_header

__all__ = ["Checkpoint", "CheckpointError", "TensorInfo", "open_checkpoint"]

_INDEX = "model.safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of one model, and the small files that lie beside them."""

    source: str
    """As the user named it."""
    folder: Path
    """Where config and tokenizer are looked for."""
    files: tuple[Path, ...]
    tensors: dict[str, TensorInfo] = field(repr=False)
    """In the order of the files, and within a file in the order of the data."""
    single_file: bool = False
    """Given as one file: its neighbours belong to nobody in particular."""

    @cached_property
    def config(self) -> dict[str, Any]:
        """``config.json``; empty if there is none.

        Raises:
            CheckpointError: if it is no JSON mapping.
        """
        return self._json("config.json")

    @cached_property
    def adapter_config(self) -> dict[str, Any]:
        """``adapter_config.json`` of PEFT; empty if this is no adapter."""
        return self._json("adapter_config.json")

    @property
    def is_adapter(self) -> bool:
        """Whether these are adapters to another model's weights."""
        return bool(self.adapter_config)

    def _json(self, name: str) -> dict[str, Any]:
        path = self.folder / name
        if self.single_file or not path.is_file():
            return {}
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error
        if not isinstance(value, dict):
            raise CheckpointError(f"{path} must hold a JSON mapping")
        return value

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for info in self.tensors.values())


def open_checkpoint(source: str | os.PathLike[str]) -> Checkpoint:
    """Read the headers of a model: a safetensors file, a folder of them, or a hub id.

    A hub id is resolved through the local cache and, if it is not there, downloaded.

    Raises:
        CheckpointError: if there is no such model, it is pickled, or a header does not fit its
            file.
    """
    text = os.fspath(source)
    path = Path(os.path.expanduser(text))
    if path.is_file():
        if path.suffix in _PICKLES:
            _refuse_pickle(path)
        return _assemble(text, path.parent, [path], single_file=True)
    if not path.is_dir():
        path = _from_hub(text, path)
    return _assemble(text, path, _files_of(path))


def _from_hub(text: str, path: Path) -> Path:
    looks_local = text.startswith((".", "/", "~")) or text.count("/") != 1 or path.parent.is_dir()
    if looks_local:
        parent = path.parent
        siblings = [each.name for each in parent.iterdir()] if parent.is_dir() else []
        hint = nearest(path.name, siblings)
        hint = hint if "did you mean" in hint else ""
        raise CheckpointError(
            f"{text} does not exist{hint}; give a folder with safetensors files, one such file, or "
            "a hub id such as org/name"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]
    try:
        try:
            return Path(snapshot_download(text, allow_patterns=patterns, local_files_only=True))
        except LocalEntryNotFoundError:
            return Path(snapshot_download(text, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{text} is neither a local path nor a model that can be had from the hub: {reason}"
        ) from error


def _files_of(folder: Path) -> list[Path]:
    index = folder / _INDEX
    if not index.is_file():
        others = sorted(folder.glob("*.safetensors.index.json"))
        index = others[0] if len(others) == 1 else index
    if index.is_file():
        return _indexed(index)
    for name in ("model.safetensors", "adapter_model.safetensors"):
        if (folder / name).is_file():
            return [folder / name]
    files = sorted(folder.glob("*.safetensors"))
    if len(files) == 1:
        return files
    if files:
        listed = ", ".join(path.name for path in files[:4])
        raise CheckpointError(
            f"{folder} holds {len(files)} safetensors files ({listed}) and no {_INDEX} that says "
            "which make up the model; name one file"
        )
    for path in sorted(folder.iterdir()):
        if path.suffix in _PICKLES and path.name.startswith(("pytorch_model", "model", "adapter")):
            _refuse_pickle(path)
    raise CheckpointError(f"{folder} holds no safetensors file")


def _refuse_pickle(path: Path) -> NoReturn:
    target = path.with_suffix(".safetensors").name
    raise CheckpointError(
        f"{path} is a pickle, which can run code when it is read, so it is not opened. Convert it "
        "once, if you trust it: python -c 'import sys, torch; from safetensors.torch import "
        'save_file; s = torch.load(sys.argv[1], map_location="cpu", weights_only=True); '
        's = s.get("state_dict", s); save_file({k: v.clone().contiguous() for k, v in s.items()}, '
        f"sys.argv[2])' {path} {path.with_name(target)}"
    )


def _indexed(index: Path) -> list[Path]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = list(dict.fromkeys(weight_map.values()))
        files = [index.parent / name for name in names]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is damaged: {error!r}") from error
    for path in files:
        if not path.is_file():
            raise CheckpointError(f"{path} is missing; {index.name} lists it")
        if path.parent.resolve() != index.parent.resolve() and ".." in path.parts:
            raise CheckpointError(f"{index}: {path} lies outside the folder")
    return sorted(files)


def _assemble(
    source: str, folder: Path, files: list[Path], single_file: bool = False
) -> Checkpoint:
    tensors: dict[str, TensorInfo] = {}
    for path in files:
        for info in read_header(path):
            if info.name in tensors:
                raise CheckpointError(
                    f"{path}: tensor {info.name!r} stands in {tensors[info.name].path.name} too"
                )
            tensors[info.name] = info
    if not tensors:
        raise CheckpointError(f"{source} holds no tensors")
    checkpoint = Checkpoint(source, folder, tuple(files), tensors, single_file)
    _check_index(checkpoint)
    return checkpoint


def _check_index(checkpoint: Checkpoint) -> None:
    """An index that lists tensors which no file holds tells of a lost or a foreign shard."""
    index = checkpoint.folder / _INDEX
    if checkpoint.single_file or not index.is_file():
        return
    weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    for name, file in weight_map.items():
        info = checkpoint.tensors.get(name)
        if info is None or info.path.name != file:
            where = "in no file" if info is None else f"in {info.path.name}"
            raise CheckpointError(f"{index} says that {name!r} is in {file}, but it is {where}")
    for name, info in checkpoint.tensors.items():
        if name not in weight_map:
            raise CheckpointError(f"{info.path}: {index.name} does not list tensor {name!r}")
