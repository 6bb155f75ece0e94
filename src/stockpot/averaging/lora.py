"""Averaging low-rank adapters by their product, not by their factors.

The adapted weight is ``W + s B A``. The average of two products is not the product of the averaged
factors: it is off by ``beta (1 - beta) (B1 - B0)(A1 - A0)``. Where the anchor has no adapter yet
(``B0 = 0``, or for embeddings ``A0 = 0``), the exact average is ``B <- (1 - beta) B``.
"""

from __future__ import annotations

import logging
import re
import typing
from collections.abc import Mapping
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from stockpot.averaging.anchor import Anchor
from stockpot.averaging.blend import blend_
from stockpot.averaging.restart import Restart
from stockpot.averaging.weights import Piece, unwrap
from stockpot.errors import StockpotError

__all__ = ["LoraMode", "LowRank", "check_lora"]

LoraMode = Literal["auto", "merge-and-restart", "svd", "factors"]

_FACTOR = re.compile(r"(.*)\.lora_(?:embedding_)?(A|B)\.(.+?)(?:\.weight)?")
# Adapters whose effect is linear in what trains: the plain rule is exact for them.
_LINEAR = {"IA3", "LN_TUNING", "PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING", "TRAINABLE_TOKENS"}
_log = logging.getLogger("stockpot")


def check_lora(mode: str) -> None:
    """Refuse an unknown mode."""
    valid = typing.get_args(LoraMode)
    if mode not in valid:
        raise ValueError(f"lora = {mode!r} is not one of {', '.join(valid)}")


class LowRank:
    """The adapters of one model: pairs of factor names, and how they are averaged.

    Attributes:
        pairs: names of (A, B) for each adapted weight.
        names: all names that :meth:`blend_` takes care of.
    """

    def __init__(self, pairs: list[tuple[str, str]], mode: LoraMode) -> None:
        self.pairs = pairs
        self.mode = mode
        self.names = {name for pair in pairs for name in pair}
        self._scaled: list[str] = []

    @classmethod
    def find(cls, model: nn.Module, mode: LoraMode, pieces: Mapping[str, Piece]) -> Self:
        """The adapters among ``pieces``.

        Raises:
            StockpotError: if a kind of adapter cannot be averaged exactly and ``mode`` is "auto".
        """
        if mode in ("auto", "merge-and-restart"):
            _refuse_inexact(unwrap(model), pieces)
        factors: dict[tuple[str, str], dict[str, str]] = {}
        for name in pieces:
            if _FACTOR.fullmatch(name):
                module, factor, adapter = _split(name)
                if not adapter.endswith("bias"):  # a bias of B is linear: the plain rule is exact
                    factors.setdefault((module, adapter), {})[factor] = name
        pairs = [(found["A"], found["B"]) for found in factors.values() if len(found) == 2]
        if mode == "svd" and (parts := [n for p in pairs for n in p if pieces[n].region]):
            raise StockpotError(
                f"lora='svd' needs whole factors and {parts[0]!r} is sharded: use lora='factors', "
                "or train the adapter under DDP"
            )
        return cls(pairs, mode)

    def begin(
        self, model: nn.Module, anchor: Anchor, pieces: Mapping[str, Piece]
    ) -> Restart | None:
        """Refuse a continued adapter unless the user has chosen what to do with it.

        Returns:
            What is to be merged into the base, with "merge-and-restart" and a continued adapter.

        Raises:
            StockpotError: if the anchor's adapter is not fresh and ``lora`` is "auto".
        """
        self._scaled = []
        continued: dict[tuple[str, str], tuple[str, str]] = {}
        for a, b in self.pairs:
            trained = {
                name for name in (a, b) if name in pieces and bool(anchor.part(pieces[name]).any())
            }
            if trained == {a, b}:
                if self.mode == "auto":
                    raise _continued(b)
                module, _, adapter = _split(a)
                continued[module, adapter] = a, b
            # The factor that starts at zero: B of a linear layer, A of an embedding.
            embedding = trained == {b} or (trained == {a, b} and "lora_embedding_" in a)
            self._scaled.append(a if embedding else b)
        if self.mode != "merge-and-restart" or not continued:
            return None
        whole = unwrap(model)
        layers = {key: whole.get_submodule(key[0]) for key in continued}
        return Restart(layers, continued, pieces, anchor)

    def blend_(
        self, pieces: Mapping[str, Piece], anchor: Anchor, beta: float
    ) -> tuple[float, float]:
        """Average the adapters in place; squared distances, before and after.

        In the exact mode the distance is the norm of the factor that started at zero; with "svd"
        that of the products B A, without the layer's scaling; with "factors" that of B and A.
        """
        if self.mode == "factors":
            pairs = [(pieces[a], pieces[b]) for a, b in self.pairs]
            _log.info("lora='factors': relative error %.3g", _factor_error(pairs, anchor, beta))
            return blend_({name: pieces[name] for name in self.names}, anchor, beta)
        if self.mode == "svd":
            return self._blend_by_svd(pieces, anchor, beta)
        before = 0.0
        for name in self._scaled:
            factor = pieces[name]
            norm = torch.linalg.vector_norm(factor.values, dtype=torch.float64)
            before += float(norm) ** 2 / factor.copies
            factor.values.mul_(1.0 - beta)
        return before, (1.0 - beta) ** 2 * before

    def _blend_by_svd(
        self, pieces: Mapping[str, Piece], anchor: Anchor, beta: float
    ) -> tuple[float, float]:
        """The best adapter of the same rank for the average of the products (Eckart-Young)."""
        before = after = lost = kept = 0.0
        for a, b in ((pieces[a], pieces[b]) for a, b in self.pairs):
            rank = a.values.shape[0]
            a1, b1 = a.values.double().reshape(rank, -1), b.values.double().reshape(-1, rank)
            a0, b0 = (anchor.part(piece).to(a1.device, torch.float64) for piece in (a, b))
            a0, b0 = a0.reshape(rank, -1), b0.reshape(-1, rank)
            before += _squared_norm(torch.cat([b1, -b0], 1), torch.cat([a1, a0], 0))
            # The average has rank 2r at most: [beta B0, (1 - beta) B1] [A0; A1]
            left, core_left = torch.linalg.qr(torch.cat([beta * b0, (1.0 - beta) * b1], 1))
            right, core_right = torch.linalg.qr(torch.cat([a0, a1], 0).T)
            u, s, v = torch.linalg.svd(core_left @ core_right.T, full_matrices=False)
            root = s[:rank].sqrt()
            b2, a2 = left @ u[:, :rank] * root, root[:, None] * (v[:rank] @ right.T)
            b.values[...] = b2.reshape(b.values.shape)
            a.values[...] = a2.reshape(a.values.shape)
            lost += float(s[rank:].square().sum())
            kept += float(s.square().sum())
            after += _squared_norm(torch.cat([b2, -b0], 1), torch.cat([a2, a0], 0))
        error = (lost / kept) ** 0.5 if kept else 0.0
        _log.info("lora='svd': relative error of truncation to the adapters' rank %.3g", error)
        return before, after


def _factor_error(pairs: list[tuple[Piece, Piece]], anchor: Anchor, beta: float) -> float:
    """``beta (1 - beta) ||(B1 - B0)(A1 - A0)|| / ||B1 A1 - B0 A0||``, over whole factors."""
    error = moved = 0.0
    for a, b in pairs:
        if a.region is not None or b.region is not None or a.values.ndim != 2:
            continue  # parts of factors have no product
        a1, b1 = a.values.double(), b.values.double()
        a0, b0 = (anchor.part(piece).to(a1.device, torch.float64) for piece in (a, b))
        error += _squared_norm(b1 - b0, a1 - a0)
        moved += _squared_norm(torch.cat([b1, -b0], 1), torch.cat([a1, a0], 0))
    return beta * (1.0 - beta) * (error / moved) ** 0.5 if moved else 0.0


def _squared_norm(left: Tensor, right: Tensor) -> float:
    """``||left @ right||^2`` without the product: its trace, through rank x rank matrices."""
    return float(torch.sum((left.T @ left) * (right @ right.T)))


def _split(name: str) -> tuple[str, str, str]:
    """Module, factor (A or B) and adapter of a factor's name."""
    match = _FACTOR.fullmatch(name)
    assert match
    module, factor, adapter = match.groups()
    return module, factor, adapter


def _continued(name: str) -> StockpotError:
    return StockpotError(
        f"the adapter {name!r} was trained before: averaging its factors is not averaging the "
        "model. Choose: lora='merge-and-restart' merges it into the base and trains a fresh one "
        "(exact); lora='svd' averages the products and truncates to the same rank; lora='factors' "
        "averages B and A apart. The last two log the size of their error at each merge event"
    )


def _refuse_inexact(model: nn.Module, pieces: Mapping[str, Piece]) -> None:
    configs: Mapping[str, Any] = getattr(model, "peft_config", {}) or {}
    for adapter, config in configs.items():
        kind = str(getattr(config, "peft_type", "LORA")).rpartition(".")[2]
        init = str(getattr(config, "init_lora_weights", True)).lower()
        reason = None
        if kind not in {"LORA", *_LINEAR}:
            reason = f"{kind} is not linear in what it trains"
        elif getattr(config, "use_dora", False):
            reason = "DoRA normalises each column, so it is not linear in B A"
        elif any(name in init for name in ("pissa", "olora", "corda", "loftq", "orthogonal")):
            reason = f"init_lora_weights={init!r} moves a part of the base into the adapter"
        if reason and pieces:
            raise StockpotError(
                f"adapter {adapter!r} cannot be averaged exactly: {reason}. Train a plain LoRA "
                "adapter, or accept the error with lora='factors'"
            )
