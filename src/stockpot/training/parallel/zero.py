"""DeepSpeed ZeRO: the optimizer, and at stage 3 the weights, are cut into equal flat parts.

What is used of DeepSpeed's inside was read in release 0.19.8; ``tests/training/test_parallel.py``
compares every step of the way with one process.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor

from stockpot.averaging.weights import Piece, find_weights
from stockpot.training.arguments import make_optimizer
from stockpot.training.parallel.spread import Sharded

__all__ = ["Zero"]

_BUCKET = 50_000_000
"""Gradients that are reduced at a time, unless one weight alone has more."""


class Zero(Sharded):
    """A DeepSpeed engine that steps PyTorch's own optimizer on float32 parts.

    ``Trainer`` knows nothing of it: it steps :class:`_Steps`. Between the backward pass and that
    step the averaged gradients lie in flat parts like the weights, where penalties and clipping
    reach them.
    """

    def _shard(self) -> None:
        import deepspeed

        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        # On CPUs it would first compile a faster way to add up what lies in host memory, which
        # takes minutes and a compiler; a process that is killed meanwhile leaves a lock that all
        # later ones wait for.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self.module.to("cpu")
        trained = [p for p in self.module.parameters() if p.requires_grad]
        base = make_optimizer(trained, self.settings)
        # DeepSpeed may make a step to fill the optimizer, in which no weight may decay.
        base.param_groups[0]["weight_decay"] = 0.0
        self.engine: Any = deepspeed.initialize(
            model=self.module,
            optimizer=base,
            config=self._config(trained),
            dist_init_required=False,
        )[0]
        self.called = self.engine
        self.inner = self.engine.optimizer
        self._base = base
        self._gradients: list[Tensor] | None = None
        self._reached: set[torch.nn.Parameter] = set()
        for parameter in trained:
            parameter.register_post_accumulate_grad_hook(self._reached.add)
        self.optimizer = _Steps(self, base)
        self._forget_first_step()

    def _config(self, trained: list[torch.nn.Parameter]) -> dict[str, Any]:
        sizes = [parameter.numel() for parameter in trained]
        bucket = max(*sizes, min(sum(sizes), _BUCKET)) if sizes else _BUCKET
        return {
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {
                "stage": 2 if self.settings.parallel == "zero2" else 3,
                "reduce_bucket_size": bucket,
            },
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "gradient_clipping": 0.0,  # by clip(); its own default would clip to norm 1
            "steps_per_print": 2**31,
        }

    def _forget_first_step(self) -> None:
        """Without gradients and decay it has changed no weight, but counted."""
        for state in self._base.state.values():
            for key, value in state.items():
                if isinstance(value, Tensor):
                    value.zero_()
                elif key == "step":
                    state[key] = 0
        for group in self._base.param_groups:
            group["weight_decay"] = self.settings.weight_decay

    def _flats(self) -> list[Tensor]:
        """The flat parts of the true weights."""
        if self.settings.parallel == "zero2":
            return list(self.inner.single_partition_of_fp32_groups)
        return list(self.inner.fp32_partitioned_groups_flat)

    @contextlib.contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        """Gradients are averaged after every micro-batch, and summed in parts."""
        self.engine.set_gradient_accumulation_boundary(last)
        yield

    def backward(self, loss: Tensor, accelerator: Accelerator) -> None:
        """By the engine, which averages the gradients."""
        self.engine.backward(loss, scale_wrt_gas=False)

    def _flat_gradients(self) -> list[Tensor]:
        """The averaged gradients, laid out like the flat weights; what is written there counts."""
        if self._gradients is None:
            self._gradients = []
            averaged = self.inner.averaged_gradients
            for number, weights in enumerate(self._flats()):
                flat = torch.zeros_like(weights, requires_grad=False)
                at = 0
                for part in averaged[number]:
                    flat[at : at + part.numel()] = part.reshape(-1)
                    at += part.numel()
                averaged[number] = [flat]
                self._gradients.append(flat)
        return self._gradients

    def step(self) -> None:
        """By the engine. Weights without a gradient stay as they are: they must not decay."""
        kept: dict[str, Tensor] = {}
        if self.settings.weight_decay:
            unreached = (p for p in self.pieces().values() if p.parameter not in self._reached)
            kept = {piece.name: piece.values.clone() for piece in unreached}
        self.engine.step()
        self._gradients = None
        self._reached.clear()
        if kept:
            writer = find_weights(self.module, self.inner)
            pieces = writer.pieces()
            for name, values in kept.items():
                pieces[name].values.copy_(values)
            writer.publish(pieces)

    def _place(self, piece: Piece) -> tuple[int, int]:
        """Which flat part a piece lies in, and where it begins there."""
        place = piece.values.untyped_storage().data_ptr()
        for number, flat in enumerate(self._flats()):
            at = int(piece.values.storage_offset()) - int(flat.storage_offset())
            if flat.untyped_storage().data_ptr() == place and 0 <= at <= flat.numel():
                return number, at
        return 0, 0  # an empty piece: all of the weight belongs to others

    def _part(self, flat: Tensor, at: int, piece: Piece) -> Tensor:
        return flat.detach().view(-1)[at : at + piece.values.numel()]

    def gradient(self, piece: Piece) -> Tensor:
        """A run of the flat gradients."""
        self._reached.add(piece.parameter)  # by whoever asks: to add to it
        return self._slice(piece)

    def _slice(self, piece: Piece) -> Tensor:
        number, at = self._place(piece)
        return self._part(self._flat_gradients()[number], at, piece)

    def clip(self, largest: float, accelerator: Accelerator) -> Tensor:
        """As ``torch.nn.utils.clip_grad_norm_`` does, with the sum taken over the processes."""
        gradients = [self._slice(piece) for piece in self.pieces().values()]
        square = torch.stack([gradient.square().sum() for gradient in gradients]).sum()
        dist.all_reduce(square)
        norm = square.sqrt()
        factor = torch.clamp(largest / (norm + 1e-6), max=1.0)
        for gradient in gradients:
            gradient.mul_(factor)
        return norm

    def states(self, piece: Piece) -> dict[str, Any]:
        """Runs of the flat moments."""
        number, at = self._place(piece)
        state = self._base.state[self._flats()[number]]
        # The weights of a flat part share their count of steps; written down, each has its own.
        return {
            key: value
            if not isinstance(value, Tensor)
            else value.clone()
            if key == "step"
            else self._part(value, at, piece)
            for key, value in state.items()
        }

    def set_states(self, piece: Piece, states: dict[str, Any]) -> None:
        """Write into the flat moments; before the first step there may be none."""
        number, at = self._place(piece)
        flat = self._flats()[number]
        state = self._base.state[flat]
        for key, value in states.items():
            if key == "step":
                state[key] = value.clone() if isinstance(value, Tensor) else value
            elif not isinstance(value, Tensor):
                state[key] = value
            else:
                if not isinstance(state.get(key), Tensor):
                    state[key] = torch.zeros_like(flat.detach())
                self._part(state[key], at, piece).copy_(value)

    def _forget_moments(self) -> None:
        self._base.state.clear()

    def end(self, trained: bool) -> None:
        """Let go of the engine, too."""
        super().end(trained)
        self.engine.destroy()
        # Hooks that autograd holds keep DeepSpeed's objects alive for good; not so their tensors.
        vars(self.inner).clear()
        for parameter in self.module.parameters():
            vars(parameter).clear()
            parameter.data = parameter.data.new_empty(0)


class _Steps(torch.optim.Optimizer):
    """The optimizer as ``Trainer`` sees it: its learning rate is the real one's."""

    # Said to accelerate, which would copy the state to where it is.
    _is_accelerate_prepared = True
    step_was_skipped = False

    def __init__(self, zero: Zero, base: torch.optim.Optimizer) -> None:
        super().__init__([torch.zeros(1)], base.defaults)
        self.param_groups = base.param_groups
        self._zero = zero

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step of all processes."""
        self._zero.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """The engine has done so."""
