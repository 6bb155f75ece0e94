"""SFA: sequential fine-tuning with averaging, as the object that a training script holds."""

from __future__ import annotations

import fnmatch
import hashlib
import math
import tempfile
import time
import typing
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from stockpot.arithmetic import lerp
from stockpot.averaging.anchor import Anchor, Store, check_store, find_files
from stockpot.averaging.blend import blend_, check_beta, check_finite
from stockpot.averaging.lora import LoraMode, LowRank, check_lora
from stockpot.averaging.moments import OptimizerState, check_optimizer_state, update_moments
from stockpot.averaging.restart import Restart
from stockpot.averaging.schedule import check_p, merge_steps, merge_steps_every
from stockpot.averaging.verify import Watch
from stockpot.averaging.weights import Piece, Weights, find_weights, unwrap
from stockpot.errors import StockpotError, nearest

__all__ = ["SFA", "MergeEvent", "ParameterChoice"]

Buffers = Literal["keep", "average"]
ParameterChoice = str | Sequence[str] | Callable[[str, nn.Parameter], bool]


@dataclass(frozen=True)
class MergeEvent:
    """One averaging: at which optimizer step, how far from the anchor, and how long it took."""

    step: int
    beta: float
    distance_before: float
    """L2 distance to the anchor before the average, over all processes."""
    distance_after: float
    """L2 distance after it: (1 - beta) times the one before, but for rounding in bf16 and fp16."""
    seconds: float


# One SFA a model: two would average twice.
_ATTACHED: weakref.WeakKeyDictionary[nn.Module, weakref.ref[SFA]] = weakref.WeakKeyDictionary()


class SFA:
    """Average a model with its own past a few times while it trains (arXiv 2501.05559, Alg. 1).

    At each merge step, after the optimizer's step: ``theta <- beta * theta_o + (1 - beta) *
    theta``; training goes on from there. The last optimizer step is always a merge step::

        with SFA(p=0.25, beta=0.5).attach(model, optimizer, total_steps=T) as sfa:
            for batch in data:
                ...
                optimizer.step()
                sfa.step()

    Args:
        p: averaging frequency as a fraction of the task's T optimizer steps, in (0, 1].
        beta: the anchor's share in each average, in [0, 1].
        every: average every N optimizer steps instead of by ``p``.
        anchor: theta_o: the weights when ``attach`` is called (default), an :class:`Anchor`, or a
            safetensors file, a folder of them, or a hub id.
        store: where the anchor is kept: ``"device"``, ``"cpu"`` or ``"disk"`` (then read tensor by
            tensor at each merge step).
        optimizer_state: what happens to the moments of averaged weights: ``"keep"``, ``"scale"``
            (first moments by 1 - beta) or ``"reset"``.
        buffers: float buffers, such as BatchNorm's statistics: ``"keep"`` or ``"average"``.
        lora: how low-rank adapters are averaged: ``"auto"`` is exact by the product B A for a fresh
            adapter and refuses a continued one; ``"merge-and-restart"`` merges a continued one
            into the base when SFA is attached and trains a fresh one, which is exact; ``"svd"``
            averages products and truncates to the adapter's rank; ``"factors"`` averages B and A.
            The last two log the size of their error.
        parameters: which of the trainable weights: glob patterns of names, or a function of name
            and parameter (default: all).

    Raises:
        ValueError: if an argument is out of range.
        FileNotFoundError: if there is no anchor at the path given.
    """

    def __init__(
        self,
        p: float = 0.25,
        beta: float = 0.5,
        every: int | None = None,
        anchor: Anchor | str | Path | None = None,
        store: Store = "cpu",
        optimizer_state: OptimizerState = "keep",
        buffers: Buffers = "keep",
        lora: LoraMode = "auto",
        parameters: ParameterChoice | None = None,
    ) -> None:
        self.p = check_p(p)
        self.beta = check_beta(beta)
        self.every = every
        self.store: Store = store
        self.optimizer_state: OptimizerState = optimizer_state
        self.buffers: Buffers = buffers
        self.lora: LoraMode = lora
        self.parameters = parameters
        if every is not None:
            merge_steps_every(1, every)  # refuses a bad value here and not when training starts
        check_store(store)
        check_optimizer_state(optimizer_state)
        check_lora(lora)
        if buffers not in typing.get_args(Buffers):
            raise ValueError(f"buffers = {buffers!r} is not one of keep, average")
        if store == "disk" and isinstance(anchor, Anchor) and not anchor.on_disk:
            raise ValueError(
                "store='disk' reads the anchor from a file, and this one is in memory: save it "
                "with anchor.save(path) and give anchor='path'"
            )
        self.anchor_given = anchor
        if isinstance(anchor, str | Path) and (Path(anchor).exists() or Path(anchor).is_absolute()):
            find_files(anchor)
        self.events: list[MergeEvent] = []
        self.left_alone: list[str] = []
        self.total_steps = 0
        self.anchor: Anchor | None = None
        self._weights: Weights | None = None
        self._watch: Watch | None = None
        self._low_rank: LowRank | None = None
        self._buffers: dict[str, Tensor] = {}
        self._merge_steps: frozenset[int] = frozenset()
        self._step = 0
        self._fingerprint: str | None = None
        self._restart: Restart | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def attach(
        self,
        model: nn.Module,
        optimizer: object | None = None,
        *,
        total_steps: int,
        anchor: Anchor | None = None,
        anchor_path: Path | None = None,
    ) -> Self:
        """Take the anchor and fix the merge steps; call it once, before the first step.

        Args:
            model: the model that trains, wrapped or not; averages are written into it.
            optimizer: the optimizer that trains it (several: a list). It may hold the true weights
                (DeepSpeed), and its moments are treated as ``optimizer_state`` says.
            total_steps: T, the number of optimizer steps of this task.
            anchor: instead of the one that SFA was made with (a resumed run's).
            anchor_path: where a captured anchor is written, so that a resumed run can read it; by
                default it is kept in memory, or with ``store="disk"`` in a temporary file.

        Raises:
            StockpotError: if the anchor belongs to another model, the true weights are where no
                writer knows them, or another SFA is attached to this model.
            NonFiniteError: if the anchor holds NaN or infinity.
            ValueError: if ``total_steps`` is no whole number of steps.
        """
        if isinstance(total_steps, float) and not math.isfinite(total_steps):
            raise ValueError(
                f"total_steps = {total_steps!r}: SFA must know how many optimizer steps there are; "
                "give the trainer a number of steps or of epochs"
            )
        steps = (
            merge_steps(total_steps, self.p)
            if self.every is None
            else merge_steps_every(total_steps, self.every)
        )
        self._claim(model)
        weights = find_weights(model, optimizer)
        pieces = self._chosen(weights.pieces())
        low_rank = LowRank.find(model, self.lora, pieces)
        anchor = anchor or self._take_anchor(pieces, weights, anchor_path)
        shared = self._shared(pieces, anchor)
        self.anchor = anchor.keep(shared, self.store)
        restart = low_rank.begin(model, self.anchor, shared)
        if not (shared or low_rank.names):
            raise StockpotError(
                "the anchor holds none of the model's trainable weights (it has "
                f"{', '.join(list(anchor)[:3]) or 'nothing'}; the model has "
                f"{', '.join(list(pieces)[:3]) or 'nothing that trains'}): nothing to average"
            )
        self._weights, self._low_rank = weights, low_rank
        self._watch = Watch(weights, {n: p for n, p in shared.items() if n not in low_rank.names})
        self._buffers = self._float_buffers(model) if self.buffers == "average" else {}
        self._merge_steps = frozenset(steps)
        self.total_steps, self._step, self._fingerprint = total_steps, 0, None
        self.left_alone = [n for n in pieces if n not in shared and n not in low_rank.names]
        self._begin_restart(restart, weights, {n: pieces[n] for n in low_rank.names})
        _ATTACHED[unwrap(model)] = weakref.ref(self)
        return self

    def _begin_restart(
        self, restart: Restart | None, weights: Weights, adapter: Mapping[str, Piece]
    ) -> None:
        earlier, self._restart = self._restart, restart
        if restart is None:
            return
        if earlier is not None and restart.done_before(earlier):
            self._restart = earlier  # a second attempt in this process: its base is merged
        elif not restart.pending:
            restart.start()
            update_moments(weights, adapter, "reset", self.beta)

    def _claim(self, model: nn.Module) -> None:
        reference = _ATTACHED.get(unwrap(model))
        other = reference() if reference is not None else None
        if other is not None and other is not self and other.attached and not other.finished:
            raise StockpotError(
                "another SFA is attached to this model, and both would average: keep one, or end "
                "the first with detach() (a `with` block does so)"
            )

    @property
    def attached(self) -> bool:
        """Whether there is a model to average."""
        return self._weights is not None

    @property
    def finished(self) -> bool:
        """Whether the task's last step has been taken."""
        return self._step >= self.total_steps

    @property
    def last_merge_step(self) -> int:
        """The step of the last merge event of this task; 0 before the first."""
        return self.events[-1].step if self.events else 0

    def averages_at(self, step: int) -> bool:
        """Whether the schedule averages at optimizer step ``step`` (1-based)."""
        return step in self._merge_steps

    def _chosen(self, pieces: dict[str, Piece]) -> dict[str, Piece]:
        choice = self.parameters
        if choice is None:
            return pieces
        if callable(choice):
            return {n: p for n, p in pieces.items() if choice(n, p.parameter)}
        patterns = [choice] if isinstance(choice, str) else list(choice)
        for pattern in patterns:
            if not fnmatch.filter(pieces, pattern):
                raise StockpotError(
                    f"parameters: {pattern!r} matches no trainable weight{nearest(pattern, pieces)}"
                )
        return {n: p for n, p in pieces.items() if any(fnmatch.fnmatch(n, one) for one in patterns)}

    def _shared(self, pieces: Mapping[str, Piece], anchor: Anchor) -> dict[str, Piece]:
        return {n: piece for n, piece in pieces.items() if anchor.name_of(piece) is not None}

    def _take_anchor(
        self, pieces: Mapping[str, Piece], weights: Weights, path: Path | None
    ) -> Anchor:
        if isinstance(self.anchor_given, Anchor):
            return self.anchor_given
        if self.anchor_given is not None:
            return Anchor.load(self.anchor_given, store="disk")
        place: Literal["device", "cpu"] = "device" if self.store == "device" else "cpu"
        anchor = Anchor.of(pieces, place, local=weights.distributed)
        if path is None and self.store == "disk":
            self._folder = tempfile.TemporaryDirectory(prefix="stockpot-anchor-")
            path = Path(self._folder.name) / "anchor.safetensors"
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            anchor.save(path)
        return Anchor.load(path, store="disk") if path and self.store == "disk" else anchor

    def _float_buffers(self, model: nn.Module) -> dict[str, Tensor]:
        return {
            name: buffer.detach().clone()
            for name, buffer in unwrap(model).named_buffers()
            if buffer.is_floating_point()
        }

    def step(self, global_step: int | None = None) -> MergeEvent | None:
        """Tell SFA that the optimizer has stepped; averages if this is a merge step.

        Args:
            global_step: the number of optimizer steps done, 1-based. By default SFA counts its own
                calls; a resumed run should give it.

        Returns:
            The merge event, or None when this step is no merge step.

        Raises:
            NonFiniteError: if the model has diverged; no weight was changed.
            StockpotError: if an average did not stay written.
        """
        if self._weights is None or self._watch is None:
            raise RuntimeError("SFA.step() before SFA.attach(model, optimizer, total_steps=T)")
        if self._restart is not None and self._restart.pending:
            raise StockpotError(
                "lora='merge-and-restart': the model's adapter is not the anchor's. In a resumed "
                "run call load_state_dict() first; else load the adapter that the anchor holds"
            )
        self._step = self._step + 1 if global_step is None else global_step
        if self._watch.waiting:
            self._watch.next_step()
        if self._step in self._merge_steps:
            return self.merge(self._step)
        if self._step + 1 in self._merge_steps:
            self._watch.look()
        return None

    @torch.no_grad()
    def merge(self, step: int) -> MergeEvent:
        """Average now, whatever the schedule says; ``step`` is only written down."""
        weights, anchor, watch = self._weights, self.anchor, self._watch
        if weights is None or anchor is None or watch is None or self._low_rank is None:
            raise RuntimeError("SFA.merge() before SFA.attach(model, optimizer, total_steps=T)")
        begin = time.perf_counter()
        pieces = self._chosen(weights.pieces())
        low_rank = {n: p for n, p in pieces.items() if n in self._low_rank.names}
        shared = {n: p for n, p in self._shared(pieces, anchor).items() if n not in low_rank}
        check_finite({**shared, **low_rank}, weights)
        watch.before(pieces)
        before, after = blend_(shared, anchor, self.beta)
        if low_rank:
            first, second = self._low_rank.blend_(pieces, anchor, self.beta)
            before, after = before + first, after + second
        written = {**shared, **low_rank}
        weights.publish(written)
        watch.after(pieces, step)
        update_moments(weights, written, self.optimizer_state, self.beta)
        if self.lora == "svd":  # the factors have another basis now, in which moments mean nothing
            update_moments(weights, low_rank, "reset", self.beta)
        self._blend_buffers(weights.model)
        before, after = weights.total([before, after])
        event = MergeEvent(
            step=step,
            beta=self.beta,
            distance_before=math.sqrt(before),
            distance_after=math.sqrt(after),
            seconds=time.perf_counter() - begin,
        )
        self.events.append(event)
        return event

    def _blend_buffers(self, model: nn.Module) -> None:
        buffers = dict(unwrap(model).named_buffers())
        for name, old in self._buffers.items():
            buffers[name].copy_(lerp(buffers[name], old.to(buffers[name].device), self.beta))

    def fingerprint(self) -> str:
        """The anchor's SHA-256, over all processes."""
        if self._fingerprint is not None:
            return self._fingerprint
        if self.anchor is None or self._weights is None:
            raise RuntimeError("SFA has no anchor before attach() and after detach()")
        self._fingerprint = self.anchor.fingerprint()
        if self._weights.distributed:
            import torch.distributed as dist

            every: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(every, self._fingerprint)
            self._fingerprint = hashlib.sha256("".join(every).encode()).hexdigest()
        return self._fingerprint

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs besides the anchor, as JSON."""
        return {
            "step": self._step,
            "total_steps": self.total_steps,
            "p": self.p,
            "beta": self.beta,
            "every": self.every,
            "fingerprint": self.fingerprint(),
            "events": [asdict(event) for event in self.events],
            **({"base": self._restart.state()} if self._restart is not None else {}),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`; call it after :meth:`attach` with the same anchor.

        Raises:
            StockpotError: if the anchor, ``p``, ``beta`` or ``every`` is not the one of that run.
        """
        for key in ("p", "beta", "every"):
            if state[key] != getattr(self, key):
                raise StockpotError(
                    f"cannot resume: {key} was {state[key]!r} and is {getattr(self, key)!r} now. "
                    "Give the old value, or start a new run"
                )
        if state["fingerprint"] != self.fingerprint():
            raise StockpotError(
                "cannot resume: this is not the anchor that the run was started with (its "
                "fingerprint differs). Give the same anchor, or start a new run"
            )
        if self._restart is not None and self._restart.pending and "base" in state:
            self._restart.resume(state["base"])
        self._step = int(state["step"])
        self.events = [MergeEvent(**event) for event in state["events"]]

    def detach(self) -> None:
        """Let go of the model and the anchor; ``events`` stay."""
        self._weights = self._watch = self._low_rank = self.anchor = None
        self._buffers = {}
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """:meth:`detach`."""
        self.detach()
