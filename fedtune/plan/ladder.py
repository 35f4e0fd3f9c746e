"""The one global order in which ranks are granted; a device takes a prefix of it.

Because every device takes a prefix of the same order, or of its rungs from some layer up, ranks
nest: of two devices with the same rank limit, the one whose prefix ends later and begins no higher
has at least the other's rank in every matrix.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import accumulate

import numpy as np

from fedtune.errors import PlanError
from fedtune.plan.settings import PlanSettings
from fedtune.records import ImportanceReport, MatrixShape, ModelShapes


@dataclass(frozen=True, slots=True)
class Rung:
    """One further rank of one matrix."""

    matrix: MatrixShape
    rank: int
    gain: float

    @property
    def elements(self) -> int:
        """Numbers that this rank adds to the adapter."""
        return self.matrix.out_features + self.matrix.in_features


@dataclass(frozen=True, slots=True)
class Ladder:
    """Rungs in the order of granting, with running sums; entry i is that of the first i rungs.

    Attributes:
        elements: sum of rank * (out + in).
        gain: sum of gains.
        first_layer: lowest layer that has a rank; the number of layers before the first rung.
        positions: place of the rung i in the fleet's order; for the last entry, the order's length.
    """

    rungs: tuple[Rung, ...]
    elements: tuple[int, ...]
    gain: tuple[float, ...]
    first_layer: tuple[int, ...]
    positions: tuple[int, ...]
    _ranks: dict[int, dict[str, int]] = field(default_factory=dict, compare=False, repr=False)

    def __len__(self) -> int:
        return len(self.rungs)

    def ranks(self, length: int) -> dict[str, int]:
        """Rank of every matrix after the first `length` rungs; matrices at rank 0 are absent."""
        if length not in self._ranks:
            self._ranks[length] = {r.matrix.name: r.rank for r in self.rungs[:length]}
        return self._ranks[length]

    def coverage(self, length: int) -> float:
        """Share of the whole ladder's gain that the first `length` rungs have, 0..1."""
        return self.gain[length] / self.gain[-1]


@dataclass(frozen=True, slots=True)
class Ladders:
    """The ladders of one rank limit, by the layer below which nothing is trained.

    Attributes:
        rungs: the fleet's order.
        whole_gain: sum of the gains of the fleet's order; coverages are shares of it.
    """

    rungs: tuple[Rung, ...]
    layers: int
    rank_max: int
    whole_gain: float
    _made: dict[int, Ladder] = field(default_factory=dict, compare=False, repr=False)

    def above(self, layer: int) -> Ladder:
        """The rungs at or above a layer; made once."""
        if layer not in self._made:
            self._made[layer] = make_ladder(self.rungs, self.layers, self.rank_max, layer)
        return self._made[layer]

    def depths(self, count: int = 8) -> tuple[int, ...]:
        """Layers to begin at: 0, about `count` more evenly apart, and the last that has a rung.

        A layer at which no fewer rungs are left than above the one before is not named twice.
        """
        last = max(rung.matrix.layer for rung in self.rungs)
        wanted = sorted({*(self.layers * step // count for step in range(count)), last})
        sizes = {len(self.above(layer)): layer for layer in wanted if layer <= last}
        return tuple(sorted(sizes.values()))


def make_ladders(rungs: tuple[Rung, ...], layers: int, rank_max: int) -> Ladders:
    """The ladders of a rank limit."""
    return Ladders(rungs, layers, rank_max, sum(rung.gain for rung in rungs))


def global_rungs(
    shapes: ModelShapes,
    settings: PlanSettings,
    rank_max: int,
    importance: ImportanceReport | None = None,
) -> tuple[Rung, ...]:
    """Every rank that any device may get, best gain per byte first.

    Equal ratios are ordered by rank, then from the last layer down (a short prefix then lets the
    backward pass stop early), then by name. Ranks without gain are left out.

    Args:
        rank_max: highest rank on any device.
        importance: gains; None takes the prior that rank i of any matrix gains 1/i, so that
            smaller matrices get more rank.

    Raises:
        PlanError: no matrix may be trained, a name is unknown, or the report lacks a matrix.
    """
    rungs = [
        Rung(matrix, rank, gain)
        for matrix in _trainable(shapes, settings)
        for rank, gain in enumerate(_gains(matrix, rank_max, importance), start=1)
    ]
    if not rungs:
        raise PlanError(
            "no matrix has a rank that gains anything; check lora.targets and the importance report"
        )
    order = sorted(
        rungs,
        key=lambda r: (-r.gain / r.elements, r.rank, -r.matrix.layer, r.matrix.name),
    )
    return tuple(order)


def make_ladder(
    rungs: tuple[Rung, ...], layers: int, rank_max: int, first_layer: int = 0
) -> Ladder:
    """The rungs that a device with this rank limit can take, with running sums.

    Args:
        first_layer: rungs of layers below it are left out.
    """
    places = [
        place
        for place, rung in enumerate(rungs)
        if rung.rank <= rank_max and rung.matrix.layer >= first_layer
    ]
    kept = tuple(rungs[place] for place in places)
    return Ladder(
        rungs=kept,
        elements=tuple(accumulate((r.elements for r in kept), initial=0)),
        gain=tuple(accumulate((r.gain for r in kept), initial=0.0)),
        first_layer=tuple(accumulate((r.matrix.layer for r in kept), min, initial=layers)),
        positions=(*places, len(rungs)),
    )


def _trainable(shapes: ModelShapes, settings: PlanSettings) -> list[MatrixShape]:
    by_name: Mapping[str, MatrixShape] = shapes.by_name()
    for name in settings.trainable:
        if name not in by_name:
            raise PlanError(f"matrix {name} is to be trained, but the model has none of that name")
    wanted = settings.trainable or tuple(by_name)
    return [by_name[name] for name in dict.fromkeys(wanted)]


def _gains(matrix: MatrixShape, rank_max: int, importance: ImportanceReport | None) -> list[float]:
    """Gains of rank 1, 2, ..., made non-increasing so that ranks come in their order."""
    highest = min(rank_max, matrix.out_features, matrix.in_features)
    if importance is None:
        return [1.0 / rank for rank in range(1, highest + 1)]
    if matrix.name not in importance.gain_per_rank:
        raise PlanError(
            f"the importance report has no gains for matrix {matrix.name}; measure it again "
            "for this model and these lora.targets"
        )
    gains = np.asarray(importance.gain_per_rank[matrix.name][:highest], dtype=np.float64)
    if not np.isfinite(gains).all():
        raise PlanError(f"the gains of matrix {matrix.name} must be finite numbers")
    return [float(gain) for gain in np.minimum.accumulate(gains) if gain > 0]
