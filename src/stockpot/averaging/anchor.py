"""theta_o, the weights that averaging pulls towards: on the device, in host memory or on disk."""

from __future__ import annotations

import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal, Self

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from stockpot.arithmetic import fingerprint, is_finite
from stockpot.averaging.weights import trainable_weights
from stockpot.errors import NonFiniteError

__all__ = ["Anchor", "Store", "check_store"]

Store = Literal["device", "cpu", "disk"]


class Anchor(Mapping[str, Tensor]):
    """Named weights that stay as they are while training goes on.

    An anchor is a read-only mapping from parameter names to tensors. One that was opened from a
    file with ``store="disk"`` reads each tensor when it is asked for and keeps none.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    @classmethod
    def capture(cls, model: nn.Module, store: Literal["device", "cpu"] = "cpu") -> Self:
        """Copy the trainable weights of ``model`` as they are now.

        Raises:
            NonFiniteError: if a weight is NaN or infinite; such an anchor would spoil every merge.
        """
        copies: dict[str, Tensor] = {}
        for name, parameter in trainable_weights(model).items():
            _check_finite(name, parameter)
            copy = parameter.detach().clone()
            copies[name] = copy if store == "device" else copy.cpu()
        return cls(copies)

    @classmethod
    def load(cls, path: str | Path, store: Store = "cpu") -> Self:
        """Open a safetensors file; with ``store="disk"`` nothing is read yet.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if ``store`` is not one of the three.
        """
        check_store(store)
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no anchor at {path}: give a safetensors file")
        on_disk = _TensorsOnDisk(path)
        if store == "disk":
            return cls(on_disk)
        device = "cuda" if store == "device" and torch.cuda.is_available() else "cpu"
        # A copy: what safetensors returns is a view of the file, which may change.
        return cls({name: on_disk[name].to(device, copy=True) for name in on_disk})

    def save(self, path: str | Path) -> None:
        """Write the anchor as one safetensors file.

        Raises:
            NonFiniteError: if a weight is NaN or infinite; nothing is written then.
        """
        for name in self:
            _check_finite(name, self[name])
        # Copies, because safetensors refuses tensors that share memory.
        plain = {name: self[name].detach().cpu().contiguous().clone() for name in self}
        save_file(plain, str(path))

    def fingerprint(self) -> str:
        """SHA-256 over names, dtypes, shapes and bytes: equal if and only if the weights are."""
        return fingerprint(self)


def check_store(store: str) -> None:
    """Refuse a place where no anchor can be kept."""
    if store not in typing.get_args(Store):
        raise ValueError(f"store = {store!r} is not one of {', '.join(typing.get_args(Store))}")


def _check_finite(name: str, weight: Tensor) -> None:
    if weight.is_floating_point() and not is_finite(weight):
        raise NonFiniteError(
            f"weight {name!r} is not finite: it cannot be an anchor. Capture the anchor before "
            "training diverges, or give a path to a good checkpoint."
        )


class _TensorsOnDisk(Mapping[str, Tensor]):
    """The tensors of a safetensors file, each read when it is asked for."""

    def __init__(self, path: Path) -> None:
        self._file = safe_open(str(path), framework="pt")
        self._names = list(self._file.keys())

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        tensor: Tensor = self._file.get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
