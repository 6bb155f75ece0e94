"""``lora="merge-and-restart"``: the last task's adapter moves into the base, a fresh one trains.

With ``W' = W + s B0 A0`` and a fresh adapter (``B = 0``) the model is the same function, and the
average of the models is exact again without a copy of the anchor:
``beta W' + (1 - beta)(W' + s B A) = W' + s ((1 - beta) B) A``.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from stockpot.arithmetic import fingerprint, wide
from stockpot.averaging.anchor import Anchor
from stockpot.averaging.weights import Piece
from stockpot.errors import StockpotError

__all__ = ["Restart"]

_log = logging.getLogger("stockpot")


class Restart:
    """The continued adapters of one model on their way into its base.

    Attributes:
        pending: the model's adapter is not the anchor's, so this must be a resumed run: its base
            still lacks the anchor's adapter, which :meth:`resume` merges.
    """

    def __init__(
        self,
        layers: Mapping[tuple[str, str], nn.Module],
        pairs: Mapping[tuple[str, str], tuple[str, str]],
        pieces: Mapping[str, Piece],
        anchor: Anchor,
    ) -> None:
        self._layers = layers
        self._pairs = pairs
        self._pieces = pieces
        self._anchor = anchor
        for (module, adapter), layer in layers.items():
            _refuse(f"{module}.{adapter}", layer, [pieces[n] for n in pairs[module, adapter]])
        self._before = self._base()
        self.pending = any(
            not torch.equal(pieces[name].values, self._theirs(name))
            for pair in pairs.values()
            for name in pair
        )

    def start(self) -> None:
        """Merge the adapters into the base and begin fresh ones, by the same draw everywhere."""
        self._merge()
        for (module, adapter), (a, b) in self._pairs.items():
            zero, drawn = (a, b) if "lora_embedding_" in a else (b, a)
            self._pieces[zero].values.zero_()
            seed = int.from_bytes(hashlib.sha256(f"{module}.{adapter}".encode()).digest()[:6])
            _draw(self._pieces[drawn].values, seed, normal=zero == a)
        _log.warning(
            "lora='merge-and-restart': the adapter that the model came with is merged into its "
            "base, and a fresh one trains. Adapters saved from now on belong to that base: save "
            "the whole model at the end with model.merge_and_unload().save_pretrained(...)"
        )

    def done_before(self, other: Restart) -> bool:
        """Whether ``other``, of an earlier attempt in this process, has merged already."""
        return self._before == other._after

    def resume(self, state: Mapping[str, str]) -> None:
        """Merge the anchor's adapter into the base that a resumed run has loaded, if it lacks it.

        Raises:
            StockpotError: if this base is neither the one before the merge nor the one after it.
        """
        if self._before == state["before"]:
            self._merge()
        elif self._before != state["after"]:
            raise StockpotError(
                "cannot resume with lora='merge-and-restart': the base model is not the one that "
                "the run was started with. Load the same base under the adapter's checkpoint"
            )
        self._after, self.pending = state["after"], False

    def state(self) -> dict[str, str]:
        """SHA-256 of a base weight before and after, by which a resumed run knows its base."""
        return {"before": self._before, "after": self._after}

    def _theirs(self, name: str) -> Tensor:
        piece = self._pieces[name]
        return self._anchor.part(piece).to(piece.values.device, piece.values.dtype)

    @torch.no_grad()
    def _merge(self) -> None:
        lost = moved = 0.0
        for (module, adapter), pair in self._pairs.items():
            layer: Any = self._layers[module, adapter]
            values = {name: self._pieces[name].values for name in pair}
            ours = {name: value.clone() for name, value in values.items()}
            for name, value in values.items():
                value.copy_(self._theirs(name))
            delta = layer.get_delta_weight(adapter)
            for name, value in values.items():
                value.copy_(ours[name])
            base = layer.get_base_layer().weight
            exact = wide(base) + wide(delta)
            base.copy_(exact)
            lost += float((base - exact).square().sum())
            moved += float(delta.square().sum())
        if lost:
            error = math.sqrt(lost / moved)
            _log.info("lora='merge-and-restart': relative error of rounding the base %.3g", error)
        self._after, self.pending = self._base(), False

    def _base(self) -> str:
        layer: Any = next(iter(self._layers.values()))
        return fingerprint({"": layer.get_base_layer().weight.detach()})


def _draw(weight: Tensor, seed: int, *, normal: bool) -> None:
    """PEFT's first values of the factor that does not start at zero."""
    generator = torch.Generator(weight.device).manual_seed(seed)
    if normal:
        nn.init.normal_(weight, generator=generator)
    else:
        nn.init.kaiming_uniform_(weight, a=math.sqrt(5), generator=generator)


def _refuse(name: str, layer: Any, factors: list[Piece]) -> None:
    reason = None
    base = layer.get_base_layer().weight if hasattr(layer, "get_delta_weight") else None
    if any(piece.region is not None for piece in factors):
        reason = "its factors are sharded"
    elif not isinstance(base, Tensor):
        reason = f"{type(layer).__name__} cannot be merged into one weight"
    elif not base.is_floating_point() or hasattr(base, "quant_state"):
        reason = "its base is quantised, and merging would round it once more"
    elif base.numel() == 0 or type(base).__name__ == "DTensor":
        reason = "its base is sharded"
    elif base.requires_grad:
        reason = "its base trains as well"
    elif getattr(layer, "lora_bias", {}).get(name.rpartition(".")[2]):
        reason = "lora_bias also moves the bias"
    if reason:
        raise StockpotError(
            f"lora='merge-and-restart' cannot merge the adapter of {name!r}: {reason}. Merge it "
            "into a whole base yourself before training, or use lora='svd' or lora='factors'"
        )
