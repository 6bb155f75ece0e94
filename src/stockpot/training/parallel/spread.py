"""Where the weights and the optimizer of a shared training are: what all ways have in common."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn

from stockpot.averaging.anchor import Anchor
from stockpot.averaging.weights import Piece, Span, find_weights
from stockpot.methods.base import Method, TaskRun
from stockpot.models.learner import Learner, copy_weights, load_weights_, named_weights
from stockpot.training.arguments import make_optimizer
from stockpot.training.settings import TrainingSettings

__all__ = ["Ddp", "Sharded", "Spread", "spread_over"]


class Spread(ABC):
    """One way for processes to share a training.

    Attributes:
        module: the model that trains; methods see it as ``run.model``.
        called: what is called for its logits: ``module`` or a wrapper around it.
        optimizer: what ``Trainer`` steps.
        whole: whether each process has whole weights, and whole gradients after the last
            micro-batch of a step.
    """

    module: nn.Module
    called: nn.Module
    optimizer: torch.optim.Optimizer
    whole: bool

    @abstractmethod
    def micro_batch(self, last: bool) -> contextlib.AbstractContextManager[None]:
        """Around forward and backward; gradients meet after the ``last`` of a step."""

    def backward(self, loss: Tensor, accelerator: Accelerator) -> None:
        """The gradient of the mean of ``loss`` over the processes."""
        accelerator.backward(loss)

    def clip(self, largest: float, accelerator: Accelerator) -> Any:
        """Clip the gradients to this norm, which is that of all of them; returns what it was."""
        return accelerator.clip_grad_norm_(self.module.parameters(), largest)

    @contextlib.contextmanager
    def gathered(self) -> Iterator[None]:
        """Meanwhile ``run.model`` is the ordinary module, with the weights as they are now."""
        yield

    @abstractmethod
    def weights(self) -> dict[str, Tensor] | None:
        """All weights, in the main process's host memory; None in the others."""

    @abstractmethod
    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Go on from these weights."""

    @abstractmethod
    def optimizer_state(self) -> dict[str, Any] | None:
        """What one process's optimizer would have as its state; None but in the main process."""

    @abstractmethod
    def load_optimizer_state(self, state: dict[str, Any]) -> None:
        """Go on from the state of one process's optimizer."""

    @abstractmethod
    def end(self, trained: bool) -> None:
        """Give ``run`` its ordinary module back, with the trained weights if it came to that."""


class Ddp(Spread):
    """``DistributedDataParallel``: all is whole in every process; gradients are averaged."""

    whole = True

    def __init__(self, method: Method, run: TaskRun, settings: TrainingSettings) -> None:
        self.module = run.model
        parameters = [p for p in self.module.parameters() if p.requires_grad]
        self.optimizer = make_optimizer(parameters, settings)
        # Parts that the loss does not reach are looked for at every step, except where activations
        # are computed twice (as in Trainer): then the search would find parts of another pass.
        checkpointing = any(
            bool(getattr(part, "gradient_checkpointing", False)) for part in self.module.modules()
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # renamed in torch 2.13
            self._ddp = nn.parallel.DistributedDataParallel(
                self.module,
                device_ids=[run.device] if run.device.type == "cuda" else None,
                broadcast_buffers=False,
                find_unused_parameters=not checkpointing,
            )
        self.called = self._ddp
        self._main = run.processes.main

    @contextlib.contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        """Gradients are summed where they are until the last."""
        with contextlib.nullcontext() if last else self._ddp.no_sync():
            yield

    def weights(self) -> dict[str, Tensor] | None:
        """The main process's: all have the same."""
        return copy_weights(self.module) if self._main else None

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """The same in every process."""
        load_weights_(self.module, weights)

    def optimizer_state(self) -> dict[str, Any] | None:
        """The main process's: all have the same."""
        return self.optimizer.state_dict() if self._main else None

    def load_optimizer_state(self, state: dict[str, Any]) -> None:
        """The same in every process."""
        self.optimizer.load_state_dict(state)

    def end(self, trained: bool) -> None:
        """The module itself was trained."""


class Sharded(Spread):
    """Each process holds parts of a twin of the model, which takes its weights along.

    The model itself has none that train until they are gathered in it: between scores a process
    holds its parts and nothing more. A way of sharding says what its pieces are (``find_weights``)
    and where their gradients and the optimizer's state are; from these follows the rest.
    """

    whole = False
    inner: Any
    """The optimizer that holds the true weights, or steps them."""

    def __init__(self, method: Method, run: TaskRun, settings: TrainingSettings) -> None:
        self.run, self.settings = run, settings
        self._ordinary: Learner = run.learner
        own = list(run.model.parameters())
        self._shapes = {p: p.shape for p in own if p.requires_grad}
        # Not copied: the same numbers under another name, of which parts are then made.
        taken: dict[int, Any] = {
            id(p): nn.Parameter(p.data, p.requires_grad) for p in own if type(p) is nn.Parameter
        }
        self.module = copy.deepcopy(run.model, taken)
        taken.clear()
        self._release()
        try:
            self._shard()
            run.learner = _with_module(run.learner, self.module)
            method.take_parts(run, _Parts(self))
        except BaseException:
            self._give_back(trained=False)
            raise

    @abstractmethod
    def _shard(self) -> None:
        """Shard ``module``; make ``called``, ``optimizer`` and ``inner``."""

    @abstractmethod
    def gradient(self, piece: Piece) -> Tensor:
        """The gradient of a piece, of the shape of its values, to look at and to write."""

    @abstractmethod
    def states(self, piece: Piece) -> dict[str, Any]:
        """The optimizer's state of a piece: tensors of the shape of its values, and others."""

    @abstractmethod
    def set_states(self, piece: Piece, states: dict[str, Any]) -> None:
        """Write what :meth:`states` gives."""

    def pieces(self) -> dict[str, Piece]:
        """This process's parts of the trainable weights."""
        return find_weights(self.module, self.inner).pieces()

    def _release(self) -> None:
        """Leave the model without its trainable weights, and what is frozen in host memory."""
        for parameter in self._shapes:
            parameter.data = parameter.data.new_empty(0)
        self._ordinary.module.to("cpu")

    def _refill(self, device: torch.device) -> None:
        """Give the model room for its weights: numbers to be written, none to be read."""
        for parameter, shape in self._shapes.items():
            if parameter.shape != shape:
                room = torch.full(shape, torch.nan, dtype=parameter.dtype, device=device)
                parameter.data = room
        self._ordinary.module.to(device)

    def _gather(self) -> None:
        self._refill(self.run.device)
        own = self._ordinary.module
        parameters = dict(own.named_parameters())
        with torch.no_grad():
            for name, piece in self.pieces().items():
                parameters[name].copy_(_assembled(piece.values, piece))
            buffers = dict(own.named_buffers())
            for name, buffer in self.module.named_buffers():
                buffers[name].copy_(buffer)

    @contextlib.contextmanager
    def gathered(self) -> Iterator[None]:
        """Meanwhile ``run.model`` is the ordinary module, with the weights as they are now."""
        self._gather()
        twin, self.run.learner = self.run.learner, self._ordinary
        try:
            yield
        finally:
            self.run.learner = twin
            self._release()

    def weights(self) -> dict[str, Tensor] | None:
        """Put together tensor by tensor, of which only the main process keeps the last."""
        main = self.run.processes.main
        whole: dict[str, Tensor] = dict(self.module.named_buffers())
        for name, piece in self.pieces().items():
            tensor = _assembled(piece.values, piece)
            if main:
                whole[name] = tensor.to("cpu", copy=True)
        own = named_weights(self._ordinary.module)  # what is frozen is there
        return {n: whole.get(n, w).detach().cpu() for n, w in own.items()} if main else None

    @torch.no_grad()
    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Each process takes its parts."""
        whole = Anchor(weights)
        writer = find_weights(self.module, self.inner)
        pieces = writer.pieces()
        for piece in pieces.values():
            piece.values.copy_(whole.part(piece))
        writer.publish(pieces)
        for name, buffer in self.module.named_buffers():
            if name in weights:
                buffer.copy_(weights[name])

    def optimizer_state(self) -> dict[str, Any] | None:
        """Put together from all processes, in the main one's host memory."""
        main = self.run.processes.main
        state: dict[int, dict[str, Any]] = {}
        pieces = list(self.pieces().values())
        for number, piece in enumerate(pieces):
            whole = {}
            for key, value in self.states(piece).items():
                if key != "step" and isinstance(value, Tensor):
                    value = _assembled(value, piece)
                    value = value.cpu() if main else None
                whole[key] = value
            if whole:
                state[number] = whole
        if not main:
            return None
        numbers = list(range(len(pieces)))
        group = {**self.optimizer.param_groups[0], "fused": True, "params": numbers}
        return {"state": state, "param_groups": [group]}

    def load_optimizer_state(self, state: dict[str, Any]) -> None:
        """Each process takes its parts."""
        for number, piece in enumerate(self.pieces().values()):
            if number in state["state"]:
                own = {
                    key: Anchor({piece.name: value}).part(piece)
                    if key != "step" and isinstance(value, Tensor)
                    else value
                    for key, value in state["state"][number].items()
                }
                self.set_states(piece, own)
        group = state["param_groups"][0]
        for mine in self.optimizer.param_groups:
            mine.update({k: value for k, value in group.items() if k not in ("params", "fused")})

    def end(self, trained: bool) -> None:
        """The ordinary module takes the weights, and its place on the device."""
        self._forget_moments()  # where the whole model is to go, there may be no room for both
        self._give_back(trained)

    def _forget_moments(self) -> None:
        self.optimizer.state.clear()

    def _give_back(self, trained: bool) -> None:
        if trained:
            self._gather()
        else:
            self._refill(self.run.device)
        self.run.learner = self._ordinary


class _Parts:
    """What a method sees of a sharded training."""

    def __init__(self, spread: Sharded) -> None:
        self.optimizer: object = spread.inner
        self.pieces = spread.pieces
        self.gradient = spread.gradient


def _with_module(learner: Learner, module: nn.Module) -> Learner:
    """The learner, with another module of the same kind."""
    if dataclasses.is_dataclass(learner):
        return dataclasses.replace(learner, module=module)
    twin = copy.copy(learner)
    twin.module = module
    return twin


def _assembled(values: Tensor, piece: Piece) -> Tensor:
    """The whole tensor of which each process has a part like ``values``; all must call this."""
    if piece.region is None:
        return values
    # A sum in which each element is one process's and 0 elsewhere is exact.
    wide = torch.promote_types(values.dtype, torch.float32)
    whole = torch.zeros(piece.shape, dtype=wide, device=values.device)
    if isinstance(piece.region, Span):
        start, stop = piece.region.start, piece.region.stop
        whole.view(-1)[start:stop] = values[: stop - start]
    else:
        ranges = zip(piece.region.offset, piece.region.shape, strict=True)
        whole[tuple(slice(at, at + size) for at, size in ranges)] = values
    dist.all_reduce(whole)
    return whole.to(values.dtype)


def spread_over(method: Method, run: TaskRun, settings: TrainingSettings) -> Spread:
    """The way that ``training.parallel`` says."""
    if settings.parallel == "fsdp2":
        from stockpot.training.parallel.fsdp2 import Fsdp2

        return Fsdp2(method, run, settings)
    if settings.parallel in ("zero2", "zero3"):
        from stockpot.training.parallel.zero import Zero

        return Zero(method, run, settings)
    return Ddp(method, run, settings)
