"""DeepSpeed: the true weights are float32 partitions in the optimizer.

Written to the local partition, then brought to the 16-bit weights that the model computes with;
DeepSpeed's own setters leave those stale. What is used of its inside was read in release 0.19.8,
and every average is checked after it is written.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from stockpot.averaging.weights.masters import MasterCopies, unwrap_optimizer
from stockpot.averaging.weights.names import aliases, named_trainable
from stockpot.averaging.weights.plain import Piece, Span, Weights
from stockpot.errors import StockpotError

__all__ = ["Stage0Masters", "Zero3", "Zero12", "find", "recognises"]


def recognises(parameters: Mapping[str, nn.Parameter], optimizer: object | None) -> bool:
    """Whether DeepSpeed keeps the true weights of these parameters."""
    return _stage0_groups(unwrap_optimizer(optimizer)) is not None or any(
        hasattr(p, "ds_id") or hasattr(p, "_hp_mapping") for p in parameters.values()
    )


def find(model: nn.Module, optimizer: object | None) -> Weights:
    """The writer for a model that :func:`recognises` knows.

    Raises:
        StockpotError: without DeepSpeed's optimizer, or where states are offloaded to NVMe.
    """
    inner = unwrap_optimizer(optimizer)
    if _stage0_groups(inner) is not None:
        return Stage0Masters(model, inner)
    if any(hasattr(p, "ds_id") for p in named_trainable(model).values()):
        if getattr(inner, "swap_optimizer", False) or getattr(inner, "params_in_nvme_and_cpu", 0):
            raise StockpotError(
                "SFA cannot average weights that DeepSpeed offloads to NVMe: they are only in "
                "memory while they are stepped. Set offload_optimizer.device to 'cpu' or 'none'"
            )
        if not hasattr(inner, "fp32_partitioned_groups_flat"):
            raise _without_optimizer("ZeRO-3", inner)
        return Zero3(model, inner)
    if not hasattr(inner, "update_lp_params"):
        raise _without_optimizer("ZeRO", inner)
    return Zero12(model, inner)


def _without_optimizer(stage: str, optimizer: object | None) -> StockpotError:
    return StockpotError(
        f"under DeepSpeed {stage} the true weights are in DeepSpeed's optimizer, and attach() got "
        f"{'none' if optimizer is None else type(optimizer).__name__}: give it the engine's, "
        "sfa.attach(engine, engine.optimizer, total_steps=T)"
    )


def _stage0_groups(optimizer: Any) -> list[tuple[list[Any], Any, bool]] | None:
    """Groups of (16-bit parameters, float32 masters, whether those are one flat tensor)."""
    halves = getattr(optimizer, "fp16_groups", None)
    for name, flat in (("fp32_groups", False), ("fp32_groups_flat", True)):
        masters = getattr(optimizer, name, None)
        if isinstance(halves, list) and isinstance(masters, list):
            return [(h, m, flat) for h, m in zip(halves, masters, strict=True)]
    return None


class Stage0Masters(MasterCopies):
    """Stage 0 in bf16 or fp16: ``FP16_UnfusedOptimizer`` and the fused ``FP16_Optimizer``."""

    kind: ClassVar[str] = "DeepSpeed stage 0"

    def _masters(self) -> Mapping[nn.Parameter, Tensor]:
        found: dict[nn.Parameter, Tensor] = {}
        for halves, masters, flat in _stage0_groups(self.optimizer) or []:
            at = 0
            for index, half in enumerate(halves):
                found[half] = (
                    masters.detach()[at : at + half.numel()].view(half.shape)
                    if flat
                    else masters[index]
                )
                at += half.numel()
        return found

    def reset_moments(self, pieces: Mapping[str, Piece], factor: float) -> bool:
        """In the optimizer that DeepSpeed wraps."""
        _scale_states(self.optimizer, factor)
        return True


class _Zero(Weights):
    distributed: ClassVar[bool] = True
    optimizer: Any

    def reset_moments(self, pieces: Mapping[str, Piece], factor: float) -> bool:
        """In the optimizer that DeepSpeed wraps: its state belongs to whole partitions."""
        _scale_states(self.optimizer, factor)
        return True


class Zero12(_Zero):
    """ZeRO-1 and 2, and ``BF16_Optimizer``: each process owns a run of the flat masters."""

    kind: ClassVar[str] = "DeepSpeed ZeRO-1/2"

    def _find(self) -> Iterator[Piece]:
        for piece in super()._find():
            mapping: Any = getattr(piece.parameter, "_hp_mapping", None)
            if mapping is None:  # all of it belongs to other processes
                values, span = piece.values.new_empty(0, dtype=torch.float32), Span(0, 0)
            else:
                at = mapping.lp_fragment_address
                values = mapping.hp_fragment.detach().view(-1)
                span = Span(at.start, at.start + at.numel)
            yield Piece(
                piece.name, values, piece.shape, piece.parameter, region=span, also=piece.also
            )

    def publish(self, pieces: Mapping[str, Piece]) -> None:
        """Cast the partitions, and gather them on every process."""
        self.optimizer.update_lp_params()

    def live(self, piece: Piece) -> Tensor:
        """The same elements of the parameter."""
        assert isinstance(piece.region, Span)
        flat = piece.parameter.detach().reshape(-1)
        return flat[piece.region.start : piece.region.stop]


class Zero3(_Zero):
    """ZeRO-3: parameters are partitioned too, small ones also kept whole (persistent)."""

    kind: ClassVar[str] = "DeepSpeed ZeRO-3"

    def _find(self) -> Iterator[Piece]:
        import torch.distributed as dist

        names = aliases(self.model)
        for name, parameter in named_trainable(self.model).items():
            inner: Any = parameter
            values = self.optimizer._get_fp32_opt_state_partition(parameter, False)[0]
            rank = dist.get_rank(inner.ds_process_group)
            start = min(rank * inner.ds_tensor.numel(), inner.ds_numel)
            stop = min(start + inner.ds_tensor.numel(), inner.ds_numel)
            yield Piece(
                name,
                values.detach()[: stop - start],  # without the padding of an uneven partition
                torch.Size(inner.ds_shape),
                parameter,
                region=Span(start, stop),
                copies=dist.get_world_size() // dist.get_world_size(inner.ds_process_group),
                also=names[parameter],
            )

    def publish(self, pieces: Mapping[str, Piece]) -> None:
        """Cast into the shards, and gather anew what is kept whole."""
        for piece in pieces.values():
            self._shard(piece).copy_(piece.values)
        persistent = self.optimizer.persistent_parameters
        if persistent:
            persistent[0].partition(persistent)  # a gather of what is not partitioned does nothing
            persistent[0].all_gather(persistent)
        if hasattr(self.optimizer, "invalidate_secondary_tensor"):
            self.optimizer.invalidate_secondary_tensor()

    def _shard(self, piece: Piece) -> Tensor:
        inner: Any = piece.parameter
        shard: Tensor = inner.ds_tensor.detach()
        return shard.view(-1)[: piece.values.numel()]

    def live(self, piece: Piece) -> Tensor:
        """This process's shard."""
        return self._shard(piece)


@torch.no_grad()
def _scale_states(optimizer: Any, factor: float) -> None:
    states = getattr(optimizer, "optimizer", optimizer).state
    for state in states.values():
        for key, value in state.items():
            if factor == 0.0 and isinstance(value, Tensor):
                value.zero_()
            elif factor == 0.0 and key == "step":
                state[key] = 0
            elif key in ("exp_avg", "momentum_buffer"):
                value.mul_(factor)
