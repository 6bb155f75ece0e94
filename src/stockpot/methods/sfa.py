"""SFA: average with the previous task's model a few times while training."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import Field, PrivateAttr, model_validator

from stockpot.methods.base import Method, Parts, Stored, TaskRun, anchor_bytes

if TYPE_CHECKING:
    from stockpot.averaging.sfa import SFA as SFAverager  # noqa: N811

__all__ = ["SFA"]


class SFA(Method):
    """Every p*T steps: theta <- beta * theta_o + (1 - beta) * theta (Algorithm 1).

    theta_o is the model deployed after the previous task. On the first task nothing is averaged
    unless ``protect_base`` asks for it: then theta_o is the starting model.
    """

    name: ClassVar[str] = "sfa"
    reference: ClassVar[str] = "Kleiman et al. 2025, arXiv 2501.05559"
    curve: ClassVar[str | None] = "p"
    headline: ClassVar[tuple[str, ...]] = ("p", "every", "beta")

    p: float | None = Field(
        None,
        gt=0,
        le=1,
        description="averaging frequency: average every p*T of a task's T optimizer steps "
        "(default 0.25, unless every is given)",
    )
    every: int | None = Field(
        None, ge=1, description="average every so many optimizer steps, instead of p"
    )
    beta: float = Field(0.5, ge=0, le=1, description="the anchor's share in each average")
    earlier_p: float | None = Field(
        None,
        gt=0,
        le=1,
        description="p of the tasks before the stream's last, where it is to be another (as in the "
        "paper's Fig. 6); null: the same",
    )
    protect_base: bool = Field(
        False, description="average on the first task too, with the starting model"
    )

    _averager: SFAverager | None = PrivateAttr(None)

    @model_validator(mode="after")
    def _p_or_every(self) -> Self:
        if self.p is not None and self.every is not None:
            raise ValueError(f"p = {self.p} and every = {self.every}: give one of the two")
        if self.p is None and self.every is None:
            self.p = 0.25
        return self

    def start_task(self, run: TaskRun) -> None:
        """Go on from the previous task's weights, which become the anchor."""
        super().start_task(run)
        self._averager = None
        if not run.in_parts:
            self._attach(run)

    def take_parts(self, run: TaskRun, parts: Parts) -> None:
        """Average, of the weights, what this process has of them."""
        self._attach(run, parts.optimizer)

    def _attach(self, run: TaskRun, optimizer: object | None = None) -> None:
        from stockpot import averaging

        if not (run.stage or self.protect_base):
            return
        # Fresh adapters change nothing: the anchor is the base that they stand on.
        held = {} if run.learner.adapted else run.previous
        # It stays where it is, in host memory or in a file that processes share: merges are few.
        anchor = averaging.Anchor(held, borrowed=True)
        p, every = self.p, self.every
        if self.earlier_p is not None and not run.last:
            p, every = self.earlier_p, None
        averager = averaging.SFA(p=p or 1.0, beta=self.beta, every=every, anchor=anchor)
        self._averager = averager.attach(run.model, optimizer, total_steps=run.total_steps)

    def averages_at(self, step: int) -> bool:
        """Whether ``step`` is a merge step."""
        return self._averager is not None and self._averager.averages_at(step)

    def after_step(self, run: TaskRun, step: int) -> None:
        """Average if ``step`` is a merge step."""
        if self._averager is not None:
            event = self._averager.step(step)
            if event is not None:
                run.merges.append(asdict(event))

    def stored(self, run: TaskRun) -> Stored:
        """theta_o; of adapters nothing, for it is the base that they stand on."""
        return Stored() if run.learner.adapted else Stored(weights=anchor_bytes(run))

    def training_identity(self, stage: int) -> dict[str, Any]:
        """The first task is plain fine-tuning unless the base is protected."""
        averages = stage or self.protect_base
        return {"method": self.name, **self.settings()} if averages else {}
