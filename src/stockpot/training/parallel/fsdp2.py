"""FSDP2 (``fully_shard``): each process keeps rows of every weight, and of its moments."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from stockpot.averaging.weights import Piece
from stockpot.training.arguments import make_optimizer
from stockpot.training.parallel.spread import Sharded

__all__ = ["Fsdp2"]


class Fsdp2(Sharded):
    """A block's weights are gathered while it computes, and its gradients summed into the parts.

    Weights travel in the precision that they have, and autocast rounds them where one process
    rounds them: the numbers are one process's.
    """

    def _shard(self) -> None:
        kind, world = self.run.device.type, self.run.processes.world
        mesh = init_device_mesh(kind, (world,))
        for block in _blocks(self.module):
            fully_shard(block, mesh=mesh)
        self._root: Any = fully_shard(self.module, mesh=mesh)
        self.called = self.module
        trained = [p for p in self.module.parameters() if p.requires_grad]
        # SGD's fused kernel does not take sharded weights.
        fused = self.settings.optimizer != "sgd"
        self.inner = self.optimizer = make_optimizer(trained, self.settings, fused)
        for buffer in self.module.buffers():
            buffer.data = buffer.data.to(self.run.device)

    @contextlib.contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        """Gradients stay whole and where they are until the last."""
        self._root.set_requires_gradient_sync(last)
        yield

    def gradient(self, piece: Piece) -> Tensor:
        """The local part of the parameter's gradient."""
        parameter: Any = piece.parameter
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        local: Tensor = parameter.grad.to_local()
        return local

    def states(self, piece: Piece) -> dict[str, Any]:
        """The local parts of its moments."""
        return {
            key: value.to_local() if isinstance(value, DTensor) else value
            for key, value in self.optimizer.state[piece.parameter].items()
        }

    def set_states(self, piece: Piece, states: dict[str, Any]) -> None:
        """Put them where the optimizer will find them."""
        own: dict[str, Any] = {}
        for key, value in states.items():
            if key == "step" or not isinstance(value, Tensor):
                own[key] = value
                continue
            moment: Any = torch.zeros_like(piece.parameter.detach())
            moment.to_local().copy_(value)
            own[key] = moment
        self.optimizer.state[piece.parameter] = own


def _blocks(module: nn.Module) -> list[nn.Module]:
    """What is gathered at a time: a Transformers model's layers, or a ``Sequential``'s parts.

    In another module a part may be read without being called, and would then not be gathered: such
    a module is gathered whole.
    """
    names = set(getattr(module, "_no_split_modules", None) or ())
    if not names:
        for part in module.modules():
            names |= set(getattr(part, "_no_split_modules", None) or ())
    if names:
        blocks = [part for part in module.modules() if type(part).__name__ in names]
    else:
        blocks = list(module.children()) if type(module) is nn.Sequential else []
    uses: dict[nn.Parameter, int] = {}
    for _, parameter in module.named_parameters(remove_duplicate=False):
        uses[parameter] = uses.get(parameter, 0) + 1
    # A weight that two places share belongs to the whole.
    return [
        block
        for block in blocks
        if (own := list(block.parameters())) and all(uses[parameter] == 1 for parameter in own)
    ]
