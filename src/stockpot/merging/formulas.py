"""The merging rules as formulas on parts: the same elements of every input at once.

A rule never sees a whole model. It is given a `Part`, some thousand consecutive elements of one
tensor of every input, and returns the merged elements; what it must know of a whole tensor or a
whole model first (a threshold, an angle, a norm) it asks for as a *survey*. So one formula serves
tensors in memory (`stockpot.merging.rules`) and files of any size (`stockpot.merging.engine`), and
both give the same bits.

Symbols: theta_0 the base, theta_i the models, delta_i = theta_i - theta_0 the task vectors, w_i
the weights, scale the lambda of the papers, n the elements of a tensor.
"""

from __future__ import annotations

import functools
import hashlib
import math
import re
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np

from stockpot.merging.arrays import Array, lerp, not_finite, ops_for, weighted_sum
from stockpot.merging.shares import Shares

__all__ = [
    "Breadcrumbs",
    "Dare",
    "Facts",
    "Fisher",
    "Linear",
    "Lines",
    "MagMax",
    "ModelStock",
    "Notes",
    "Part",
    "Rule",
    "Slerp",
    "TaskArithmetic",
    "Ties",
    "WiseFT",
]


@dataclass
class Part:
    """Elements ``start`` to ``start + len`` of one tensor of every input, in float32 or float64.

    The arrays are 1-D, of one dtype, all numpy's or all torch's on one device, and belong to
    somebody else: formulas write to none of them.
    """

    name: str
    start: int
    base: Array | None
    models: Sequence[Array]
    fishers: Sequence[Array] = ()

    def deltas(self) -> list[Array]:
        """Task vectors theta_i - theta_0."""
        assert self.base is not None
        return [model - self.base for model in self.models]


@dataclass
class Facts:
    """What the surveys found, by tensor name; a key "" stands for the whole model."""

    thresholds: list[dict[str, list[float]]] = field(default_factory=list)
    """Per model: magnitudes of its task vector at the ranks that the rule asked for."""
    products: dict[str, list[list[float]]] = field(default_factory=dict)
    """Inner products of the vectors that the rule asked for, as a matrix."""
    looked: bool = False
    """Every element of the inputs was read, and found to be finite."""
    majority: int = 1
    """The sign that most coordinates elected: 1, or anything else for the other."""


@dataclass
class Notes:
    """What a rule learns while it merges."""

    balance: int = 0
    """Positive minus negative elected signs."""
    undecided: Array | None = None
    """Not 0 where a coordinate took the majority's sign, which is known only at the end."""
    problem: str | None = None
    """Why this part cannot be merged."""


_ANY_LENGTH = 1 << 53  # ranks among so many differ where the rules' settings do


class Rule:
    """A formula; see the subclasses."""

    products_of: ClassVar[Literal["models", "deltas", "fishers"] | None] = None
    """Vectors whose inner products the formula needs."""
    passes_over_whole_model: bool = False
    """The survey's result is one for the whole model, so that it is taken before any merging."""
    elects: bool = False
    """Coordinates may have to wait for the majority's sign."""
    positional: bool = False
    """The result depends on where in the tensor an element is."""
    temporaries: ClassVar[int] = 2
    """Arrays of the part's size that `blend` holds at once beside its inputs."""

    @property
    def survey(self) -> Hashable:
        """What it asks for; equal for rules that one survey serves, None if there is nothing."""
        asked = (self.products_of, self.ranks(_ANY_LENGTH))
        return (*asked, self.passes_over_whole_model) if any(asked) else None

    def ranks(self, elements: int) -> tuple[int, ...]:
        """Ranks (from 1, ascending) among a task vector's magnitudes that the formula needs."""
        return ()

    def blend(self, part: Part, facts: Facts, notes: Notes) -> Array:
        """The merged elements, in the part's dtype; a new tensor."""
        raise NotImplementedError


@dataclass
class Linear(Rule):
    """theta = sum_i w_i theta_i, w_i divided by their sum if `normalize` (Wortsman et al. 2022)."""

    shares: Shares
    normalize: bool = True
    temporaries: ClassVar[int] = 1

    def blend(self, part: Part, facts: Facts, notes: Notes) -> Array:
        """The formula of the class."""
        shares = self.shares.of(part.name, normalize=False)
        total = weighted_sum(part.models, shares)
        if self.normalize:
            total /= math.fsum(shares)
            # A sum may overflow where the mean does not.
            if (places := not_finite(total)) is not None:
                few = [model[places] for model in part.models]
                total[places] = weighted_sum(few, self.shares.of(part.name, normalize=True))
        return total


@dataclass
class WiseFT(Rule):
    """theta = beta theta_0 + (1 - beta) theta_1 (Wortsman et al. 2022; `beta` is the base's share).

    0 gives the model and 1 the base, bit for bit.
    """

    beta: float

    def blend(self, part: Part, facts: Facts, notes: Notes) -> Array:
        """The formula of the class."""
        assert part.base is not None
        return lerp(part.models[0], part.base, self.beta)


@dataclass
class Slerp(Rule):
    """Along the arc between two models, each tensor taken as one vector (Shoemake 1985).

    theta = sin((1-t) W)/sin(W) theta_0 + sin(t W)/sin(W) theta_1, cos(W) the cosine of the two.
    Norms are not equalised first. Vectors that are parallel within `_PARALLEL`, or one of them 0,
    are interpolated linearly, where the formula is 0/0.
    """

    t: float
    products_of: ClassVar[Literal["models"]] = "models"
    _PARALLEL: ClassVar[float] = 0.9995

    def shares(self, products: Sequence[Sequence[float]]) -> tuple[float, float]:
        """The two factors, from the matrix of inner products."""
        norms = math.sqrt(products[0][0] * products[1][1])
        cosine = max(-1.0, min(1.0, products[0][1] / norms)) if norms > 0.0 else 1.0
        if abs(cosine) > self._PARALLEL:
            return 1.0 - self.t, self.t
        angle = math.acos(cosine)
        return (
            math.sin((1.0 - self.t) * angle) / math.sin(angle),
            math.sin(self.t * angle) / math.sin(angle),
        )

    def blend(self, part: Part, facts: Facts, notes: Notes) -> Array:
        """The formula of the class."""
        return weighted_sum(part.models, self.shares(facts.products[part.name]))


@dataclass
class TaskArithmetic(Rule):
    """theta = theta_0 + scale sum_i w_i delta_i (Ilharco et al. 2023); w_i < 0 forgets a task."""

    shares: Shares
    scale: float = 1.0
    normalize: bool = False

    def scale_of(self, name: str) -> float:
        """The factor of the sum for one tensor."""
        return self.scale

    def blend(self, part: Part, facts: Facts, notes: Notes) -> Array:
        """The formula of the class."""
        assert part.base is not None
        shares = self.shares.of(part.name, self.normalize)
        total = part.models[0] - part.base
        if shares[0] != 1.0:
            total *= shares[0]
        for model, share in zip(part.models[1:], shares[1:], strict=True):
            delta = model - part.base
            if share != 1.0:
                delta *= share
            total += delta
        total *= self.scale_of(part.name)
        total += part.base
        return total


_FIRST_LAYER = re.compile(r"embed|wte|wpe|shared\.|patch|cls_token|class_token|stem|conv1\b|tok_")
_NUMBERED = re.compile(r"^(.*?)\.(\d+)(?:\.|$)")


@dataclass
class Lines(TaskArithmetic):
    """Task arithmetic whose scale grows with depth (Wang et al. 2024).

    theta = theta_0 + (alpha + beta l/(L-1)) sum_i w_i delta_i, l = 0 .. L-1 the layer. The number
    in a tensor's name is its layer, counted within its prefix (an encoder and a decoder each from
    0). Without one, embeddings belong to the first layer and everything else to the last.
    """

    alpha: float = 0.5
    beta: float = 0.5
    names: tuple[str, ...] = ()
    """Of all tensors of the model."""

    def __post_init__(self) -> None:
        self._depths: dict[str, int] = {}
        for name in self.names:
            if found := _NUMBERED.match(name):
                prefix, layer = found[1], int(found[2])
                self._depths[prefix] = max(self._depths.get(prefix, 1), layer + 1)

    def depth(self, name: str) -> float:
        """l/(L-1) of a tensor: 0 first, 1 last."""
        if found := _NUMBERED.match(name):
            return int(found[2]) / max(1, self._depths[found[1]] - 1)
        return 0.0 if _FIRST_LAYER.search(name) else 1.0

    def scale_of(self, name: str) -> float:
        """Alpha + beta l/(L-1)."""
        return self.alpha + self.beta * self.depth(name)


class _Electing(Rule):
    """The last two steps of TIES: elect a sign per coordinate, average what agrees with it."""

    shares: Shares
    scale: float
    elects: bool = True

    def _elect_and_average(
        self,
        part: Part,
        deltas: Sequence[Array],
        thresholds: Sequence[float],
        facts: Facts,
        notes: Notes,
    ) -> Array:
        """Consumes `deltas`."""
        assert part.base is not None
        shares = self.shares.of(part.name, normalize=False)
        # Only ratios matter; a largest weight of 1 keeps products of the others in range.
        shares = [share / max(shares) for share in shares]
        # Coordinates that sum to 0 take the majority's sign. Without a majority, negative entries
        # are averaged, as in the authors' implementation.
        ops = ops_for(deltas[0])
        elected = ops.elect(deltas, thresholds, shares, facts.majority)
        notes.balance += elected.balance
        notes.undecided = elected.undecided
        # Where nothing agrees, the total is 0, and so is its quotient by anything.
        result = elected.total
        result /= elected.count
        if self.scale != 1.0:
            result *= self.scale
        result += part.base
        return result


@dataclass
class Ties(_Electing):
    """Trim, elect, disjoint mean (Yadav et al. 2023); `rules.ties` has the details."""

    shares: Shares
    density: float = 0.2
    scale: float = 1.0
    passes_over_whole_model: bool = True
    """Trim over the whole model, as in the original; False: within each tensor."""
    temporaries: ClassVar[int] = 8

    def ranks(self, elements: int) -> tuple[int, ...]:
        """K = n - int(n density), the smallest magnitude kept; none if all are."""
        rank = elements - int(elements * self.density)
        return (rank,) if rank else ()

    def blend(self, part: Part, facts: Facts, notes: Notes) -> Array:
        """The formula of the class."""
        scope = "" if self.passes_over_whole_model else part.name
        lowest = [(known[scope] or [0.0])[0] for known in facts.thresholds]
        return self._elect_and_average(part, part.deltas(), lowest, facts, notes)


@dataclass
class Dare(_Electing):
    """Drop entries of task vectors at random, divide the rest by 1 - p, merge (Yu et al. 2024).

    ``linear``: theta = theta_0 + scale sum_i w_i delta_i (mean if `normalize`); ``ties``: elect and
    average as TIES does, the drop in place of its trim.

    The draws are a function of (seed, model, tensor, element) alone: Philox in counter mode, keyed
    by a hash of the three. Whatever the order, the threads or the chunks, they are the same.
    """

    shares: Shares
    drop_rate: float = 0.9
    scale: float = 1.0
    combine: Literal["linear", "ties"] = "linear"
    normalize: bool = True
    seed: int = 0
    labels: tuple[str, ...] = ()
    """Per model the name that keys its draws."""
    temporaries: ClassVar[int] = 8

    def __post_init__(self) -> None:
        self.elects = self.combine == "ties"
        self.positional = True

    def kept(self, model: int, part: Part, size: int) -> np.ndarray:
        """Which elements of a part survive, as booleans."""
        text = f"{self.seed}\0{self.labels[model]}\0{part.name}"
        key = int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "little")
        # Four numbers of 64 bits a counter, two draws of 32 bits a number: parts begin at
        # multiples of 8 elements.
        generator = np.random.Philox(key=key)
        generator.advance(part.start // 8)
        draws = generator.random_raw((size + 1) // 2).view(np.uint32)[:size]
        return draws >= np.uint32(min(round(self.drop_rate * 2**32), 2**32 - 1))

    def blend(self, part: Part, facts: Facts, notes: Notes) -> Array:
        """The formula of the class."""
        assert part.base is not None
        deltas = part.deltas()
        for number, delta in enumerate(deltas):
            kept = self.kept(number, part, len(delta))
            deltas[number] = ops_for(delta).masked(delta, kept) / (1.0 - self.drop_rate)
        if self.combine == "ties":
            return self._elect_and_average(part, deltas, [0.0] * len(deltas), facts, notes)
        total = weighted_sum(deltas, self.shares.of(part.name, self.normalize))
        total *= self.scale
        total += part.base
        return total


@dataclass
class MagMax(Rule):
    """theta = theta_0 + scale * the task vectors' entry of largest magnitude (Marczak et al. 2024).

    Of entries of equal magnitude the positive is taken, so that the order of models is nothing.
    """

    shares: Shares
    scale: float = 1.0
    temporaries: ClassVar[int] = 4

    def blend(self, part: Part, facts: Facts, notes: Notes) -> Array:
        """The formula of the class."""
        assert part.base is not None
        shares = self.shares.of(part.name, normalize=False)
        deltas = [delta * share for delta, share in zip(part.deltas(), shares, strict=True)]
        best = functools.reduce(ops_for(deltas[0]).larger, deltas)
        best *= self.scale
        best += part.base
        return best


@dataclass
class ModelStock(Rule):
    """theta = t mean_i theta_i + (1-t) theta_0, t from each tensor's angles (Jang et al. 2024).

    t = N cos / (1 + (N-1) cos), cos the mean cosine of all pairs of task vectors. Where the cosine
    is negative, t would be too: it is then 0, the base.
    """

    products_of: ClassVar[Literal["deltas"]] = "deltas"

    @staticmethod
    def ratio(products: Sequence[Sequence[float]]) -> float:
        """t, from the matrix of the task vectors' inner products; pairs with a 0 have cosine 0."""
        count = len(products)
        cosines = []
        for i in range(count):
            for j in range(i):
                norms = math.sqrt(products[i][i] * products[j][j])
                cosines.append(products[i][j] / norms if norms > 0.0 else 0.0)
        cosine = max(0.0, min(1.0, math.fsum(cosines) / len(cosines)))
        return count * cosine / (1.0 + (count - 1) * cosine)

    def blend(self, part: Part, facts: Facts, notes: Notes) -> Array:
        """The formula of the class."""
        assert part.base is not None
        deltas = part.deltas()
        share = self.ratio(facts.products[part.name]) / len(deltas)
        total = weighted_sum(deltas, [share] * len(deltas))
        total += part.base
        return total


@dataclass
class Breadcrumbs(Rule):
    """Task arithmetic without each tensor's largest and smallest changes (Davari et al. 2024).

    Per model and tensor, the `gamma` n entries of largest magnitude are outliers and become 0; of
    the rest the `density` n largest are kept, with all that equal the smallest or the largest of
    them.
    """

    shares: Shares
    density: float = 0.9
    gamma: float = 0.01
    scale: float = 1.0
    temporaries: ClassVar[int] = 6

    def ranks(self, elements: int) -> tuple[int, ...]:
        """Ranks of the smallest and of the largest magnitude kept."""
        if not elements:
            return ()
        highest = elements - int(self.gamma * elements)
        lowest = max(1, highest - round(self.density * elements) + 1)
        return (min(lowest, highest), highest)

    def blend(self, part: Part, facts: Facts, notes: Notes) -> Array:
        """The formula of the class."""
        assert part.base is not None
        deltas = [
            ops_for(delta).keep(delta, *(thresholds[part.name] or (0.0, math.inf)))
            for delta, thresholds in zip(part.deltas(), facts.thresholds, strict=True)
        ]
        total = weighted_sum(deltas, self.shares.of(part.name, normalize=False))
        total *= self.scale
        total += part.base
        return total


@dataclass
class Fisher(Rule):
    """theta = sum_i w_i max(F_i, floor) theta_i / sum_i w_i max(F_i, floor) (Matena & Raffel 2022).

    `normalize` divides w_i by the L2 norm of F_i over the whole model.
    """

    shares: Shares
    floor: float = 1e-6
    normalize: bool = False
    temporaries: ClassVar[int] = 4

    def __post_init__(self) -> None:
        self.passes_over_whole_model = self.normalize

    @property
    def products_of(self) -> Literal["fishers"] | None:  # type: ignore[override]
        """The norms, if they are needed."""
        return "fishers" if self.normalize else None

    def blend(self, part: Part, facts: Facts, notes: Notes) -> Array:
        """The formula of the class."""
        shares = self.shares.of(part.name, normalize=False)
        if self.normalize:
            norms = [math.sqrt(row[i]) for i, row in enumerate(facts.products[""])]
            shares = [share / norm for share, norm in zip(shares, norms, strict=True)]
            shares = [share / max(shares) for share in shares]  # only ratios matter
        ops = ops_for(part.models[0])
        numerator = denominator = part.models[0] * 0.0
        for model, values, share in zip(part.models, part.fishers, shares, strict=True):
            if len(values) and float(values.min()) < 0.0:
                notes.problem = "a Fisher value is negative; it is a mean of squares"
                return numerator
            weight = ops.floored(values, self.floor) * share
            numerator = numerator + weight * model
            denominator = denominator + weight
        if not bool((denominator != 0).all()):
            notes.problem = "all Fisher values of a coordinate are 0; raise floor"
            return numerator
        return numerator / denominator
