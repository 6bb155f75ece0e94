"""The settings of each merging method, checked before anything is read. No torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from stockpot.merging.shares import Shares

if TYPE_CHECKING:
    from stockpot.merging.formulas import Rule

__all__ = ["METHODS", "Context", "MergeMethod"]

Share = Annotated[float, Field(ge=0.0, le=1.0)]
Factor = Annotated[float, Field(ge=-1e6, le=1e6, allow_inf_nan=False)]
Scale = Annotated[Factor, Field(description="factor of the merged task vector (lambda)")]


class Context(BaseModel):
    """What a rule takes from the recipe beside its own settings."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    shares: Shares
    names: tuple[str, ...] = ()
    """Of all tensors."""
    labels: tuple[str, ...] = ()
    """Per model, the name that keys random draws."""
    factors: tuple[Any, Any, Any] | None = None
    """Of adapters: see `stockpot.merging.adapters.AdapterPlan`."""


class MergeMethod(BaseModel):
    """Settings of one method; subclasses say which models it takes."""

    model_config = ConfigDict(extra="forbid")

    name: ClassVar[str]
    reference: ClassVar[str]
    needs_base: ClassVar[bool] = False
    takes_base: ClassVar[bool] = True
    needs_fishers: ClassVar[bool] = False
    fewest: ClassVar[int] = 1
    most: ClassVar[int | None] = None
    weighted: ClassVar[bool] = True

    def check(self, shares: Shares) -> None:
        """Refuse weights that this method cannot use (`ValueError`)."""

    def rule(self, context: Context) -> Rule:
        """The formula; loads torch."""
        raise NotImplementedError


class Linear(MergeMethod):
    """Weighted mean of models: the uniform soup, unless weights are given."""

    name = "linear"
    reference = "Wortsman et al. 2022, arXiv 2203.05482"
    takes_base = False

    normalize: bool = Field(True, description="divide by the sum of the weights")

    def check(self, shares: Shares) -> None:
        if self.normalize:
            shares.check_totals()

    def rule(self, context: Context) -> Rule:
        from stockpot.merging.formulas import Linear

        return Linear(context.shares, self.normalize)


class WiseFT(MergeMethod):
    """beta * base + (1 - beta) * model."""

    name = "wise-ft"
    reference = "Wortsman et al. 2022, arXiv 2109.01903"
    needs_base = True
    most = 1
    weighted = False

    beta: Share = Field(0.5, description="share of the base; 1 - alpha of the paper")

    def rule(self, context: Context) -> Rule:
        from stockpot.merging.formulas import WiseFT

        return WiseFT(self.beta)


class Slerp(MergeMethod):
    """Along the arc between two models, tensor by tensor."""

    name = "slerp"
    reference = "Shoemake 1985"
    fewest = 2
    most = 2
    weighted = False

    t: Share = Field(0.5, description="place on the arc: 0 the first model, 1 the second")

    def rule(self, context: Context) -> Rule:
        from stockpot.merging.formulas import Slerp

        return Slerp(self.t)


class TaskArithmetic(MergeMethod):
    """base + scale * weighted sum of task vectors; a negative weight forgets a task."""

    name = "task-arithmetic"
    reference = "Ilharco et al. 2023, arXiv 2212.04089"
    needs_base = True

    scale: Scale = 1.0
    normalize: bool = Field(False, description="divide by the sum of the weights")

    def check(self, shares: Shares) -> None:
        if self.normalize:
            shares.check_one_sign()

    def rule(self, context: Context) -> Rule:
        from stockpot.merging.formulas import TaskArithmetic

        return TaskArithmetic(context.shares, self.scale, self.normalize)


class Ties(MergeMethod):
    """Trim small changes, elect a sign, average what agrees with it."""

    name = "ties"
    reference = "Yadav et al. 2023, arXiv 2306.01708"
    needs_base = True

    density: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        0.2, description="share of each task vector that the trim keeps"
    )
    scale: Scale = 1.0
    trim: Literal["global", "per-tensor"] = Field(
        "global", description="over the whole model, as in the original, or within each tensor"
    )

    def check(self, shares: Shares) -> None:
        shares.check_positive()

    def rule(self, context: Context) -> Rule:
        from stockpot.merging.formulas import Ties

        return Ties(context.shares, self.density, self.scale, self.trim == "global")


class _Dare(MergeMethod):
    reference = "Yu et al. 2024, arXiv 2311.03099"
    needs_base = True

    drop_rate: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        0.9, description="probability of each entry of a task vector to be dropped (p)"
    )
    scale: Scale = 1.0
    seed: int = Field(0, ge=0, description="of the draws")


class DareLinear(_Dare):
    """Drop entries of task vectors at random, divide the rest by 1 - p, take the mean."""

    name = "dare-linear"

    normalize: bool = Field(True, description="divide by the sum of the weights")

    def check(self, shares: Shares) -> None:
        if self.normalize:
            shares.check_one_sign()

    def rule(self, context: Context) -> Rule:
        from stockpot.merging.formulas import Dare

        return Dare(
            context.shares,
            self.drop_rate,
            self.scale,
            "linear",
            self.normalize,
            self.seed,
            context.labels,
        )


class DareTies(_Dare):
    """Drop entries at random, divide the rest by 1 - p, elect signs and average as TIES does."""

    name = "dare-ties"

    def check(self, shares: Shares) -> None:
        shares.check_positive()

    def rule(self, context: Context) -> Rule:
        from stockpot.merging.formulas import Dare

        return Dare(
            context.shares, self.drop_rate, self.scale, "ties", True, self.seed, context.labels
        )


class Fisher(MergeMethod):
    """Mean of models weighted, coordinate by coordinate, by their Fisher information."""

    name = "fisher"
    reference = "Matena & Raffel 2022, arXiv 2111.09832"
    needs_fishers = True
    takes_base = False

    floor: Annotated[float, Field(ge=0.0, le=1e30)] = Field(
        1e-6, description="smallest Fisher value; decides where a value is 0"
    )
    normalize: bool = Field(
        False, description="weigh models as if their Fisher values had one L2 norm"
    )

    def check(self, shares: Shares) -> None:
        for row in shares.rows():
            if min(row) < 0.0 or max(row) == 0.0:
                raise ValueError(f"weights: {list(row)} must be at least 0, and one above it")

    def rule(self, context: Context) -> Rule:
        from stockpot.merging.formulas import Fisher

        return Fisher(context.shares, self.floor, self.normalize)


class MagMax(MergeMethod):
    """Per coordinate, the task vector's entry of largest magnitude."""

    name = "magmax"
    reference = "Marczak et al. 2024, arXiv 2407.06322"
    needs_base = True

    scale: Scale = 1.0

    def rule(self, context: Context) -> Rule:
        from stockpot.merging.formulas import MagMax

        return MagMax(context.shares, self.scale)


class ModelStock(MergeMethod):
    """Between the base and the models' mean, per tensor, by the angles of the task vectors."""

    name = "model-stock"
    reference = "Jang et al. 2024, arXiv 2403.19522"
    needs_base = True
    fewest = 2
    weighted = False

    def rule(self, context: Context) -> Rule:
        from stockpot.merging.formulas import ModelStock

        return ModelStock()


class Breadcrumbs(MergeMethod):
    """Task arithmetic without each tensor's largest and smallest changes."""

    name = "breadcrumbs"
    reference = "Davari & Belilovsky 2024, arXiv 2312.06795"
    needs_base = True

    density: Share = Field(0.9, description="share of each task vector that is kept")
    gamma: Share = Field(0.01, description="share of largest changes that are dropped")
    scale: Scale = 1.0

    def check(self, shares: Shares) -> None:
        if self.density + self.gamma > 1.0:
            raise ValueError(f"density {self.density} and gamma {self.gamma} exceed 1")

    def rule(self, context: Context) -> Rule:
        from stockpot.merging.formulas import Breadcrumbs

        return Breadcrumbs(context.shares, self.density, self.gamma, self.scale)


class Lines(MergeMethod):
    """Task arithmetic whose scale grows with depth: alpha + beta * l / (L - 1)."""

    name = "lines"
    reference = "Wang et al. 2024, arXiv 2410.17146"
    needs_base = True

    alpha: Factor = Field(0.5, description="scale of the first layer")
    beta: Factor = Field(0.5, description="how much more the last layer has")

    def rule(self, context: Context) -> Rule:
        from stockpot.merging.formulas import Lines

        return Lines(context.shares, alpha=self.alpha, beta=self.beta, names=context.names)


class Lora(MergeMethod):
    """Low-rank adapters into their base, or, without a base, averaged by their products."""

    name = "lora"
    reference = "Hu et al. 2021, arXiv 2106.09685"

    scale: Scale = 1.0
    normalize: bool = Field(
        False, description="divide by the sum of the weights (always, without a base)"
    )
    rank: int | None = Field(
        None,
        ge=1,
        description="without a base: rank of the result; default the sum of ranks, exact",
    )

    def check(self, shares: Shares) -> None:
        if self.normalize:
            shares.check_one_sign()

    def rule(self, context: Context) -> Rule:
        from stockpot.merging.adapters import LoraInto

        assert context.factors is not None
        products, wholes, columns = context.factors
        return LoraInto(context.shares, self.scale, self.normalize, products, wholes, columns)


METHODS: dict[str, type[MergeMethod]] = {
    each.name: each
    for each in (
        Linear,
        WiseFT,
        Slerp,
        TaskArithmetic,
        Ties,
        DareLinear,
        DareTies,
        Fisher,
        MagMax,
        ModelStock,
        Breadcrumbs,
        Lines,
        Lora,
    )
}
