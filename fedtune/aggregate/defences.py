"""Whose updates count in a round, and how much: defences against devices that send bad ones.

Every method looks at products only (`fedtune.aggregate.geometry`) and gives each update three
things: a weight (0: left out), a factor of its difference, and what it was judged by. With the
weights and factors that come in, p_k and f_k, the join then adds

    sum_k w_k / (sum_j w_j) * factor_k * f_k * D_k

A method keeps nothing from one round to the next. `docs/defences.md` says what each one stops.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from jaxtyping import Float

from fedtune.aggregate.geometry import Geometry, Vector
from fedtune.errors import RoundError
from fedtune.records import Contribution

DefenceName = Literal["none", "clip", "multi-krum", "geometric-median", "root-cosine"]

_WEISZFELD_STEPS = 1000
_WEISZFELD_TOLERANCE = 1e-9
"""Largest change of a weight at which the median has settled; a step is K^2 multiplications."""
_SMOOTHING = 1e-6
"""Shortest distance in the median, as a share of the median length: at an update itself the
weight would be infinite (nu in RFA)."""
_OUTLYING = 0.5
"""`multi-krum` leaves out an update whose cosines are less than this share of the median one. On
e2e_nlg those of honest sites lie between 0.5 and 1.5 of it, those of flipped updates below 0."""
_ROUNDING = 1e-9
"""Added before a share of devices is rounded down: 0.29 * 100 is 28.999999999999996."""


@dataclass(frozen=True, slots=True)
class Defence:
    """A method and its settings; the run file's section `defence`.

    Attributes:
        assumed_share: for `multi-krum`, of devices that may be hostile, 0..0.5.
        clip_factor: longest update as a multiple of the median length, or of the root site's.
        root_site: for `root-cosine`, the device that is trusted.
    """

    method: DefenceName = "none"
    assumed_share: float = 0.2
    clip_factor: float = 1.0
    root_site: str = ""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of one update.

    Attributes:
        length: Frobenius norm of its difference, over all matrices and dense tensors.
        cosine: of its difference and the joined one; None where one of them is zero. Estimated
            where `Geometry.with_sum` is.
        share: of the weights of the round, 0..1; 0: it is left out.
        factor: what its difference is multiplied by beside its share.
        trust: for `root-cosine`, its cosine with the root site's difference, at least 0; of the
            root site itself that of the most trusted other.
        reason: why it is left out; empty: it counts.
    """

    device: str
    length: float
    cosine: float | None
    share: float
    factor: float
    trust: float | None = None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Judgement:
    """What a defence made of a round.

    Attributes:
        kept: what is joined, with its new weights and factors, in the order that came in.
        verdicts: one per update, in that order.
        note: what a person should know of the round; empty: nothing.
    """

    kept: tuple[Contribution, ...]
    verdicts: tuple[Verdict, ...]
    note: str = ""


@dataclass(frozen=True, slots=True)
class _Choice:
    """What a method decides: one number per update, and why those of weight 0 are left out."""

    weights: Vector
    factors: Vector
    trusts: Vector | None = None
    reasons: Mapping[int, str] | None = None
    note: str = ""


@dataclass(frozen=True, slots=True)
class _Round:
    """What a method knows: the updates' geometry, their devices, and weights that add up to 1."""

    geometry: Geometry
    devices: tuple[str, ...]
    weights: Vector
    defence: Defence


def judge(contributions: Sequence[Contribution], defence: Defence) -> Judgement:
    """Decide what counts. Without a method nothing changes, and the verdicts only tell.

    Raises:
        RoundError: `root-cosine` lacks the update of its root site.
    """
    geometry = Geometry(contributions)
    given = np.array([c.weight for c in contributions], np.float64)
    devices = tuple(c.update.device for c in contributions)
    choice = METHODS[defence.method](_Round(geometry, devices, given / given.sum(), defence))
    shares = choice.weights / choice.weights.sum()
    factors = choice.factors * np.array([c.factor for c in contributions])
    cosines = _cosines(geometry, shares * factors)
    reasons = choice.reasons or {}
    verdicts = tuple(
        Verdict(
            device=device,
            length=float(geometry.lengths()[place]),
            cosine=cosines[place],
            share=float(shares[place]),
            factor=float(factors[place]),
            trust=None if choice.trusts is None else float(choice.trusts[place]),
            reason=reasons.get(place, ""),
        )
        for place, device in enumerate(devices)
    )
    if defence.method == "none":
        return Judgement(tuple(contributions), verdicts)
    kept = tuple(
        replace(contribution, weight=verdict.share, factor=verdict.factor)
        for contribution, verdict in zip(contributions, verdicts, strict=True)
        if verdict.share > 0
    )
    return Judgement(kept, verdicts, choice.note)


def _cosines(geometry: Geometry, steps: Vector) -> list[float | None]:
    """Of each update with the joined one, `sum_k steps_k D_k`."""
    inner, lengths = geometry.with_sum(steps), geometry.lengths()
    scale = lengths * math.sqrt(max(float(steps @ inner), 0.0))
    return [
        float(np.clip(product / size, -1.0, 1.0)) if size > 0 else None
        for product, size in zip(inner, scale, strict=True)
    ]


# ---------------------------------------------------------------- the methods


def keep_all(known: _Round) -> _Choice:
    """Everyone counts as given."""
    return _Choice(known.weights, np.ones_like(known.weights))


def clip(known: _Round) -> _Choice:
    """Shorten updates to at most `clip_factor` times the median length; the median has no weights.

    Source: Sun et al., "Can you really backdoor federated learning?", 2019,
        https://arxiv.org/abs/1911.07963, section 3 (norm thresholding); the threshold here is not
        fixed but follows the round's median.
    """
    lengths = known.geometry.lengths()
    most = known.defence.clip_factor * float(np.median(lengths))
    return _Choice(known.weights, _shortened(lengths, most))


def multi_krum(known: _Round) -> _Choice:
    """Leave out up to f updates whose directions lie farthest from their nearest neighbours'.

    f is `assumed_share` of the K updates, rounded down. An update's score is the sum of its
    squared distances to the K - f - 2 nearest others, without the f - 1 nearest of these; the
    K - f of least score count, with the weights that they came with. The theorem needs
    K >= 2 f + 3, so in a small round f is lowered to (K - 3) / 2, rounded down, and the note says
    so.

    The paper always leaves out f. Here one of them stays if its cosines are not much below the
    median ones (`_OUTLYING`): without a hostile device the same three honest sites of ten were
    left out in every round, which cost 10 % of loss.

    The paper has no `without`. Hostile devices that all send one update have f - 1 neighbours at
    distance zero, and their sum stays below that of honest ones whose cosines are small. The
    others that are looked at here cannot all be friends of theirs: at least two are left.

    Distances are those of updates scaled to unit length, 2 - 2 cos. The paper's devices are all
    alike; here a device of rank 8 makes longer updates than one of rank 4, and would be left out
    for its rank (measured: a flipped update of rank 4 was kept before an honest one of rank 8).
    So that lengths do no harm, those that count are cut to `clip_factor` times their median.

    Source: Blanchard et al., "Machine learning with adversaries: Byzantine tolerant gradient
        descent", 2017, https://arxiv.org/abs/1703.02757, sections 4 and 7 (m = K - f).
    """
    count = len(known.devices)
    wanted = math.floor(known.defence.assumed_share * count + _ROUNDING)
    hostile = max(min(wanted, (count - 3) // 2), 0)
    note = ""
    if hostile < wanted:
        note = (
            f"multi-krum needs {2 * wanted + 3} updates to leave out {wanted}, got {count}; "
            f"it leaves out {hostile}"
        )
    if hostile == 0:
        return replace(clip(known), note=note)
    squares = 2 - 2 * _cosines_of_pairs(known.geometry)
    nearest = count - hostile - 2
    looked_at = nearest - (hostile - 1)
    np.fill_diagonal(squares, np.inf)  # no update is its own neighbour
    scores = np.sort(squares, axis=1)[:, hostile - 1 : nearest].sum(axis=1)
    order = np.argsort(scores, kind="stable")
    cosines = 1 - scores / (2 * looked_at)
    middle = float(np.median(cosines))
    left_out = [p for p in order[count - hostile :] if cosines[p] < _OUTLYING * middle]
    reasons = {
        int(place): f"left out by multi-krum: its mean cosine with {looked_at} near updates is "
        f"{cosines[place]:.2f}, the median one is {middle:.2f}"
        for place in left_out
    }
    weights = known.weights.copy()
    weights[left_out] = 0.0
    lengths = known.geometry.lengths()
    most = known.defence.clip_factor * float(np.median(lengths[weights > 0]))
    return _Choice(weights, _shortened(lengths, most), reasons=reasons, note=note)


def geometric_median(known: _Round) -> _Choice:
    """Weigh updates so that their mean has the least weighted sum of distances to all of them.

    The point lies in the span of the updates, z = sum_k w_k D_k, and Weiszfeld's step

        w_k <- p_k / max(nu, |z - D_k|), normalised

    needs inner products only. No update is left out; one that is far away counts little, however
    far that is.

    Source: Pillutla, Kakade, Harchaoui, "Robust aggregation for federated learning", 2019,
        https://arxiv.org/abs/1912.13445, algorithm 2; iterated here until it settles.
    """
    products, given = known.geometry.products(), known.weights
    smallest = _SMOOTHING * float(np.median(known.geometry.lengths()))
    if smallest == 0.0:
        return keep_all(known)
    weights = given
    for _ in range(_WEISZFELD_STEPS):
        toward = products @ weights
        squares = weights @ toward - 2 * toward + np.diag(products)
        distances = np.sqrt(np.maximum(squares, smallest**2))
        after = given / distances
        after = after / after.sum()
        change = float(np.abs(after - weights).max())
        weights = after
        if change < _WEISZFELD_TOLERANCE:
            break
    return _Choice(weights, np.ones_like(weights))


def root_cosine(known: _Round) -> _Choice:
    """Weigh updates by their cosine with that of a trusted site, and cut them to its length.

    The weight is p_k max(0, cos(D_k, D_root)); those of cosine 0 or less are left out, and none
    is longer than `clip_factor` times the root site's. The root site counts as the most trusted of
    the others.

    Source: Cao et al., "FLTrust: Byzantine-robust federated learning via trust bootstrapping",
        2020, https://arxiv.org/abs/2012.13995, section 4. There the server trains the reference
        itself and leaves it out of the mean, and all devices weigh the same before the cosine. A
        root site with the weight of a cosine of 1 would own the round: between honest sites
        cosines of 0.1 to 0.3 were measured. There short updates are lengthened to the root's, too.
        Here they stay as they are: a device that trains few matrices would be multiplied up, and
        one that changed nothing would send noise.

    Raises:
        RoundError: the root site's update is not there.
    """
    name = known.defence.root_site
    if name not in known.devices:
        raise RoundError(
            f"root-cosine needs the update of defence.root_site {name} in every round, got "
            f"{', '.join(known.devices)}"
        )
    root, lengths = known.devices.index(name), known.geometry.lengths()
    scale = lengths * lengths[root]
    cosines = np.zeros(len(lengths))
    np.divide(known.geometry.with_device(root), scale, out=cosines, where=scale > 0)
    trusts = np.clip(cosines, 0.0, 1.0)
    trusts[root] = 0.0
    trusts[root] = trusts.max() or 1.0
    reasons = {
        int(place): f"left out by root-cosine: its cosine with the update of {name} is "
        f"{cosines[place]:.2f}, expected above 0"
        for place in np.flatnonzero(trusts == 0.0)
    }
    most = known.defence.clip_factor * float(lengths[root])
    return _Choice(known.weights * trusts, _shortened(lengths, most), trusts, reasons)


METHODS: Mapping[DefenceName, Callable[[_Round], _Choice]] = {
    "none": keep_all,
    "clip": clip,
    "multi-krum": multi_krum,
    "geometric-median": geometric_median,
    "root-cosine": root_cosine,
}


def _shortened(lengths: Vector, most: float) -> Vector:
    """Factors of at most 1 that leave no update longer than `most`."""
    factors = np.ones_like(lengths)
    np.divide(most, lengths, out=factors, where=lengths > most)
    return factors


def _cosines_of_pairs(geometry: Geometry) -> Float[np.ndarray, "devices devices"]:
    """Of all pairs; 0 where an update is zero."""
    lengths, products = geometry.lengths(), geometry.products()
    scale = np.outer(lengths, lengths)
    found = np.zeros_like(products)
    np.divide(products, scale, out=found, where=scale > 0)
    return np.asarray(np.clip(found, -1.0, 1.0))
