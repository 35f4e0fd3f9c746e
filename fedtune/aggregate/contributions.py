"""The checks and the bookkeeping that every rule shares: order, weights, keys, dense tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from fedtune.aggregate.modules import for_each
from fedtune.devices.processor import usable_cores
from fedtune.errors import RefusedUpdateError, RoundError
from fedtune.records import (
    Contribution,
    Dispatch,
    FloatArray,
    GlobalAdapter,
    LoraFactors,
    LowRank,
)


@dataclass(frozen=True, slots=True)
class Share:
    """One device's part of a join.

    Attributes:
        weight: normalised over all devices that reported; the shares add up to 1.
        sent: what the device started from.
        factors: what it returned, by matrix.
        dense: what it returned, by tensor.
        factor: what its difference is multiplied by beside its weight.
    """

    device: str
    weight: float
    sent: Dispatch
    factors: Mapping[str, LoraFactors]
    dense: Mapping[str, FloatArray]
    factor: float = 1.0

    @property
    def step(self) -> float:
        """What the device's difference is multiplied by in the sum."""
        return self.weight * self.factor


_AT_ONCE_BYTES = 2**30
"""Of factors that are joined at the same time. Chosen: a machine of many cores would otherwise hold
the factors of as many matrices, and a join takes up to about three times what they take."""

JoinMatrix = Callable[[str, LowRank, Sequence[Share]], tuple[LowRank, float]]
"""(matrix name, its state, all shares) -> (its new state, share of energy dropped)."""


def join_matrices(
    adapter: GlobalAdapter,
    contributions: Sequence[Contribution],
    join_matrix: JoinMatrix,
    workers: int | None = None,
) -> GlobalAdapter:
    """Check the contributions, then join matrix by matrix, and the dense tensors by differences.

    Factors are read when their matrix is joined, and let go after it.

    Args:
        workers: matrices that are joined at the same time; None: the usable cores, but no more
            than hold a gibibyte of factors. The result is the same to the last bit for any number.

    Raises:
        RoundError: there is no contribution.
        RefusedUpdateError: an update does not return exactly what was sent.
    """
    shares = ordered_shares(adapter, contributions)
    workers = bounded_workers(adapter, shares) if workers is None else workers

    def joined(name: str) -> tuple[LowRank, float]:
        return join_matrix(name, adapter.matrices[name], shares)

    results = dict(zip(adapter.matrices, for_each(adapter.matrices, joined, workers), strict=True))
    return GlobalAdapter(
        round=adapter.round + 1,
        matrices={name: low_rank for name, (low_rank, _) in results.items()},
        dense=join_dense(adapter.dense, shares),
        dropped_energy={name: dropped for name, (_, dropped) in results.items()},
    )


def bounded_workers(adapter: GlobalAdapter, shares: Sequence[Share]) -> int:
    """How many matrices can be joined at the same time, by cores and by their factors' memory."""
    largest = max((_factor_bytes(name, shares) for name in adapter.matrices), default=0)
    return min(usable_cores(), max(1, _AT_ONCE_BYTES // max(1, largest)))


def _factor_bytes(name: str, shares: Sequence[Share]) -> int:
    """Bytes of what all devices return of a matrix; they return the shapes that they were sent."""
    sent = (share.sent.trained[name] for share in shares if name in share.sent.trained)
    return sum(pair.a.nbytes + pair.b.nbytes for pair in sent)


def refuse_factors(shares: Sequence[Share], rule: str) -> None:
    """For the rules that join what devices hold, and not what they changed.

    Raises:
        RoundError: a device's difference is to count by less than its weight.
    """
    for share in shares:
        if share.factor != 1.0:
            raise RoundError(
                f"the rule {rule} joins whole factors, so the difference of {share.device} cannot "
                f'be multiplied by {share.factor:g}; use aggregate.rule = "delta"'
            )


def ordered_shares(
    adapter: GlobalAdapter, contributions: Sequence[Contribution]
) -> tuple[Share, ...]:
    """Contributions in the order of device names, with weights that add up to 1.

    The order makes every later sum the same to the last bit, whoever reported first.

    Raises:
        RoundError: there is no contribution.
        RefusedUpdateError: two come from one device, a weight is not positive, or an update
            does not return the names that were sent. Shapes and values are checked by `returned`
            and `join_dense`, where they are read.
    """
    if not contributions:
        raise RoundError("no device reported, so there is nothing to join; run the round again")
    ordered = sorted(contributions, key=lambda contribution: contribution.update.device)
    names = [contribution.update.device for contribution in ordered]
    for first, second in pairwise(names):
        if first == second:
            raise RefusedUpdateError(f"device {first} reported twice in one round")
    for contribution in ordered:
        _check(adapter, contribution)
    total = math.fsum(contribution.weight for contribution in ordered)
    return tuple(
        Share(
            device=contribution.update.device,
            weight=contribution.weight / total,
            sent=contribution.sent,
            factors=contribution.update.factors,
            dense=contribution.update.dense,
            factor=contribution.factor,
        )
        for contribution in ordered
    )


def holders(name: str, shares: Sequence[Share]) -> Iterator[tuple[Share, LoraFactors, LoraFactors]]:
    """Each device that trained the matrix: its share, what it was sent, what it returned."""
    for share in shares:
        if name in share.factors:
            yield share, share.sent.trained[name], returned(name, share)


def returned(name: str, share: Share) -> LoraFactors:
    """Read what a device returned of a matrix that it trained.

    Raises:
        RefusedUpdateError: a shape is not that which was sent, or a value is not finite.
    """
    before, after = share.sent.trained[name], share.factors[name]
    _check_array(share.device, f"{name}.a", before.a, after.a)
    _check_array(share.device, f"{name}.b", before.b, after.b)
    return after


def join_dense(dense: Mapping[str, FloatArray], shares: Sequence[Share]) -> dict[str, FloatArray]:
    """Add the weighted mean of differences to each tensor that is trained whole.

    Raises:
        RefusedUpdateError: a shape is not that which was sent, or a value is not finite.
    """
    joined: dict[str, FloatArray] = {}
    for name, value in dense.items():
        total = value.astype(np.float64)
        for share in shares:
            if name in share.dense:
                before, after = share.sent.dense[name], share.dense[name]
                _check_array(share.device, name, before, after)
                total += share.step * (after.astype(np.float64) - before.astype(np.float64))
        joined[name] = total.astype(np.float32)
    return joined


def _check(adapter: GlobalAdapter, contribution: Contribution) -> None:
    update, sent = contribution.update, contribution.sent
    device = update.device
    if not (contribution.weight > 0 and math.isfinite(contribution.weight)):
        raise RefusedUpdateError(
            f"the weight of {device} must be positive, got {contribution.weight}"
        )
    _check_keys(device, "matrix", adapter.matrices, sent.trained, update.factors)
    _check_keys(device, "dense tensor", adapter.dense, sent.dense, update.dense)


def _check_keys(
    device: str,
    kind: str,
    known: Mapping[str, object],
    sent: Mapping[str, object],
    returned: Mapping[str, object],
) -> None:
    """Every name that was sent comes back, no other does, and the state holds each of them."""
    for name in sorted(sent.keys() - returned.keys()):
        raise RefusedUpdateError(f"the update of {device} lacks the {kind} {name} that it was sent")
    for name in sorted(returned.keys() - sent.keys()):
        raise RefusedUpdateError(
            f"the update of {device} holds the {kind} {name}, which it was not sent"
        )
    for name in sorted(sent.keys() - known.keys()):
        raise RefusedUpdateError(
            f"{device} was sent the {kind} {name}, which the global adapter does not hold"
        )


def _check_array(device: str, name: str, sent: FloatArray, returned: FloatArray) -> None:
    if returned.shape != sent.shape:
        raise RefusedUpdateError(
            f"{name} of {device} must have the shape {sent.shape} that was sent, "
            f"got {returned.shape}"
        )
    if not np.isfinite(returned).all():
        raise RefusedUpdateError(f"{name} of {device} holds values that are not finite")
