"""FSDP: each process writes its own shards; no weights are gathered."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, ClassVar

import torch.distributed as dist
from torch import Tensor, nn

from stockpot.averaging.weights.names import aliases, plain_name
from stockpot.averaging.weights.plain import Box, Piece, Span, Weights
from stockpot.errors import StockpotError

__all__ = ["FSDP1", "FSDP2", "find", "recognises"]


def recognises(model: nn.Module) -> bool:
    """Whether the model is sharded by FSDP1 or FSDP2, or its parameters are DTensors."""
    return dist.is_available() and (_has_fsdp1(model) or _has_dtensors(model))


def find(model: nn.Module, optimizer: object | None) -> Weights:
    """The writer for a model that :func:`recognises` knows."""
    return FSDP1(model, optimizer) if _has_fsdp1(model) else FSDP2(model, optimizer)


def _has_fsdp1(model: nn.Module) -> bool:
    from torch.distributed.fsdp import FullyShardedDataParallel

    return any(isinstance(module, FullyShardedDataParallel) for module in model.modules())


def _has_dtensors(model: nn.Module) -> bool:
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    return any(isinstance(module, FSDPModule) for module in model.modules()) or any(
        isinstance(parameter, DTensor) for parameter in model.parameters()
    )


class _Sharded(Weights):
    """Processes hold different parts, under parameters that come and go."""

    distributed: ClassVar[bool] = True

    def live(self, piece: Piece) -> Tensor:
        """The part as it is found anew."""
        return self.pieces()[piece.name].values


class FSDP2(_Sharded):
    """``fully_shard`` and tensor parallelism: the local part of each DTensor is the truth."""

    kind: ClassVar[str] = "FSDP2"

    def _find(self) -> Iterator[Piece]:
        self._reshard()
        for piece in super()._find():
            yield self._local(piece)

    def _reshard(self) -> None:
        # After an evaluation the outermost group stays gathered: its parameters are then plain
        # tensors, and what is written to them is lost when they are sharded again.
        from torch.distributed.fsdp import FSDPModule

        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def _local(self, piece: Piece) -> Piece:
        from torch.distributed.tensor import DTensor
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        parameter: Any = piece.parameter
        world = dist.get_world_size()
        if not isinstance(parameter, DTensor):  # not managed by FSDP: every process has it whole
            return Piece(**{**vars(piece), "copies": world})
        mesh, placements = parameter.device_mesh, parameter.placements
        if any(placement.is_partial() for placement in placements):
            raise StockpotError(
                f"parameter {piece.name!r} is a partial sum over processes ({placements}), which "
                "has no value to average: use Shard or Replicate placements"
            )
        shape, offset = compute_local_shape_and_global_offset(parameter.shape, mesh, placements)
        parts = math.prod(
            mesh.size(dim) for dim, placement in enumerate(placements) if placement.is_shard()
        )
        local: Tensor = parameter.detach().to_local()  # type: ignore[attr-defined]
        return Piece(
            piece.name,
            local,
            parameter.shape,
            piece.parameter,
            region=Box(tuple(offset), tuple(shape)),
            copies=world // parts,
            also=piece.also,
            key=parameter,
        )


class FSDP1(_Sharded):
    """``FullyShardedDataParallel``: the shard of each flat parameter is the truth.

    Original parameters are found in it by FSDP's own table, so ``use_orig_params`` makes no
    difference, and neither does mixed precision: the shard is what the optimizer steps, and the
    gathered copy is made from it.
    """

    kind: ClassVar[str] = "FSDP1"

    def _find(self) -> Iterator[Piece]:
        from torch.distributed.fsdp import FullyShardedDataParallel
        from torch.distributed.fsdp._runtime_utils import _reshard

        names = aliases(self.model)
        managed: set[int] = set()
        for path, module in self.model.named_modules():
            if not isinstance(module, FullyShardedDataParallel) or module._handle is None:
                continue
            handle: Any = module._handle
            if handle.uses_sharded_strategy and not (
                handle.is_sharded(handle.flat_param) and handle.needs_unshard()
            ):
                _reshard(module, handle, True)  # else the next forward reads the gathered copy
            flat = handle.flat_param
            managed.add(id(flat))
            managed.update(id(p) for p in flat._params or ())
            yield from self._pieces_of(plain_name(self.model, path), handle)
        world = dist.get_world_size()
        for piece in super()._find():
            if id(piece.parameter) not in managed:
                also = names[piece.parameter]
                yield Piece(**{**vars(piece), "copies": world, "also": also})

    def _pieces_of(self, path: str, handle: Any) -> Iterator[Piece]:
        flat = handle.flat_param
        shard: Tensor = flat._local_shard if handle.uses_sharded_strategy else flat.data
        copies = dist.get_world_size() // (handle.world_size if handle.uses_sharded_strategy else 1)
        originals = flat._params or [flat] * len(flat._fqns)
        for name, shape, original, info in zip(
            flat._fqns, flat._shapes, originals, flat._shard_param_infos, strict=True
        ):
            if not (original.requires_grad and flat.is_floating_point()):
                continue
            if info.in_shard:
                begin, count = info.offset_in_shard, info.numel_in_shard
                span = Span(info.intra_param_start_idx, info.intra_param_end_idx + 1)
            else:
                begin, count, span = 0, 0, Span(0, 0)
            full = f"{path}.{name}" if path else name
            yield Piece(
                plain_name(self.model, full),
                shard.detach()[begin : begin + count],
                shape,
                original,
                region=span,
                copies=copies,
                key=original,
            )
