"""Lengths of devices' updates and inner products between them, on products and not on factors.

Device k's difference on one matrix is D_k = s_k B_k A_k - P_k, where P_k is what it was sent. As
columns it is `left @ right.T`, and

    <D_i, D_j> = tr(D_i^T D_j) = sum((left_i^T left_j) * (right_i^T right_j))

which needs no product of full size, and compares devices of different ranks. Matrices and dense
tensors add up; a device that does not train a matrix has zero there. A and B alone have no fixed
gauge, (B M, M^-1 A) is the same update, so nothing here looks at them one by one.

All sums are in float64. With Q stacked columns of all devices, all pairs of one matrix take
Q^2 (out + in) multiplications: about a fifth of those of the QR that joins the same stack. Inner
products with one sum have a second way, through the sum as a dense matrix, 4 out in Q; and where
both take more than `_MOST_MULTIPLICATIONS`, a third, which sees each difference through random
probes of its inputs. So lengths and cosines of a thousand devices cost what reading them costs.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from fedtune.aggregate.low_rank import Pair
from fedtune.records import Contribution, FloatArray, LoraFactors

Vector = Float[np.ndarray, "devices"]

_MOST_COLUMNS = 1024
"""Columns of one matrix that are in memory at a time; twice as many where pairs are formed."""
_MOST_VALUES = 2**24
"""Values of one dense tensor that are in memory at a time: 128 MiB."""
_MOST_MULTIPLICATIONS = 1e11
"""Beyond, inner products with a sum are estimated; about 10 s of one core."""
_PROBES = 32
"""For estimates. One matrix alone has a cosine within about 0.1 of the true one; errors of
matrices are independent, so with 224 of them it is 0.01."""


class Geometry:
    """What lies between the updates of one round; everything is computed when it is asked for.

    Args:
        contributions: their order is that of every result. Weights and factors do not count.
    """

    def __init__(self, contributions: Sequence[Contribution]) -> None:
        self._devices = tuple(contributions)
        self._matrices = sorted({name for c in contributions for name in c.sent.trained})
        self._tensors = sorted({name for c in contributions for name in c.update.dense})
        self._pairs: FloatArray | None = None
        self._squares: FloatArray | None = None

    def lengths(self) -> Vector:
        """Frobenius norm of each device's difference."""
        if self._squares is None:
            self._squares = np.diag(self.products()) if self._pairs_are_cheap() else self._own()
        return np.sqrt(np.maximum(self._squares, 0.0))

    def products(self) -> Float[np.ndarray, "devices devices"]:
        """Inner products of all pairs, symmetric."""
        if self._pairs is None:
            found = np.zeros((len(self._devices), len(self._devices)))
            for name in self._matrices:
                self._add_matrix_pairs(name, found)
            for name in self._tensors:
                self._add_tensor_pairs(name, found)
            self._pairs = (found + found.T) / 2
        return self._pairs

    def with_sum(self, coefficients: Vector) -> Vector:
        """Inner product of each device's difference with `sum_j coefficients_j D_j`.

        Estimated where exact ones take more than `_MOST_MULTIPLICATIONS`; the same each time.
        """
        if self._pairs is not None or self._pairs_are_cheap():
            return np.asarray(self.products() @ coefficients)
        probed = self._multiplications()[1] > _MOST_MULTIPLICATIONS
        found = np.zeros(len(self._devices))
        for name in self._matrices:
            self._add_matrix_with_sum(name, coefficients, found, probed)
        for name in self._tensors:
            self._add_tensor_with_sum(name, coefficients, found)
        return found

    def with_device(self, place: int) -> Vector:
        """Inner product of each device's difference with that of one of them; always exact."""
        if self._pairs is not None or self._pairs_are_cheap():
            return np.array(self.products()[place])
        found, device = np.zeros(len(self._devices)), self._devices[place]
        for name, sent in device.sent.trained.items():
            one = difference(sent, device.update.factors[name])
            for group in self._groups(name):
                stack = self._stack(name, group)
                by_column = np.sum((one.left.T @ stack.left) * (one.right.T @ stack.right), axis=0)
                found[group] += np.add.reduceat(by_column, stack.starts)
        for name in device.update.dense:
            for group in self._holders(name):
                found[group] += self._rows(name, group) @ self._tensor(place, name)
        return found

    # ------------------------------------------------------------ matrices

    def _add_matrix_pairs(self, name: str, found: FloatArray) -> None:
        groups = self._groups(name)
        for place, rows in enumerate(groups):
            first = self._stack(name, rows)
            for columns in groups[place:]:
                second = first if columns is rows else self._stack(name, columns)
                block = (first.left.T @ second.left) * (first.right.T @ second.right)
                sums = np.add.reduceat(block, first.starts, axis=0)
                sums = np.add.reduceat(sums, second.starts, axis=1)
                found[np.ix_(rows, columns)] += sums
                if columns is not rows:
                    found[np.ix_(columns, rows)] += sums.T

    def _add_matrix_with_sum(
        self, name: str, coefficients: Vector, found: FloatArray, probed: bool
    ) -> None:
        groups = self._groups(name)
        total: FloatArray | float = 0.0  # (out, in), or (out, probes)
        for group in groups:
            stack = self._stack(name, group)
            weights = np.repeat(coefficients[group], stack.widths)
            total = total + (stack.left * weights) @ _seen(stack.right, name, probed).T
        for group in groups:
            stack = self._stack(name, group)
            by_column = np.sum(stack.left * (total @ _seen(stack.right, name, probed)), axis=0)
            found[group] += np.add.reduceat(by_column, stack.starts)

    def _own(self) -> Vector:
        """Squared length of each device."""
        found = np.zeros(len(self._devices))
        for place, device in enumerate(self._devices):
            for name in device.sent.trained:
                pair = difference(device.sent.trained[name], device.update.factors[name])
                squares = (pair.left.T @ pair.left) * (pair.right.T @ pair.right)
                found[place] += np.sum(squares)
            for name in device.update.dense:
                found[place] += np.sum(self._tensor(place, name) ** 2)
        return found

    def _groups(self, name: str) -> list[list[int]]:
        """Places of the devices that train a matrix, in groups of at most `_MOST_COLUMNS`."""
        widths = {
            place: 2 * device.sent.trained[name].rank
            for place, device in enumerate(self._devices)
            if name in device.sent.trained
        }
        return list(_grouped(widths, _MOST_COLUMNS))

    def _stack(self, name: str, places: Sequence[int]) -> _Stack:
        pairs = [
            difference(device.sent.trained[name], device.update.factors[name])
            for device in (self._devices[place] for place in places)
        ]
        return _Stack(
            left=np.concatenate([pair.left for pair in pairs], axis=1),
            right=np.concatenate([pair.right for pair in pairs], axis=1),
            widths=np.array([pair.left.shape[1] for pair in pairs]),
        )

    def _pairs_are_cheap(self) -> bool:
        pairs, dense = self._multiplications()
        return pairs <= min(dense, _MOST_MULTIPLICATIONS)

    def _multiplications(self) -> tuple[int, int]:
        """Of all pairs, and of a dense sum that every device is multiplied with."""
        pairs = dense = 0
        for name in self._matrices:
            sent = [d.sent.trained[name] for d in self._devices if name in d.sent.trained]
            columns = sum(2 * factors.rank for factors in sent)
            out_features, in_features = sent[0].b.shape[0], sent[0].a.shape[1]
            pairs += columns**2 * (out_features + in_features)
            dense += 4 * out_features * in_features * columns
        return pairs, dense

    # ------------------------------------------------------------ parameters trained whole

    def _add_tensor_pairs(self, name: str, found: FloatArray) -> None:
        groups = self._holders(name)
        for place, rows in enumerate(groups):
            first = self._rows(name, rows)
            for columns in groups[place:]:
                second = first if columns is rows else self._rows(name, columns)
                sums = first @ second.T
                found[np.ix_(rows, columns)] += sums
                if columns is not rows:
                    found[np.ix_(columns, rows)] += sums.T

    def _add_tensor_with_sum(self, name: str, coefficients: Vector, found: FloatArray) -> None:
        groups = self._holders(name)
        total = sum(coefficients[group] @ self._rows(name, group) for group in groups)
        for group in groups:
            found[group] += self._rows(name, group) @ total

    def _holders(self, name: str) -> list[list[int]]:
        sizes = {
            place: device.sent.dense[name].size
            for place, device in enumerate(self._devices)
            if name in device.update.dense
        }
        return list(_grouped(sizes, _MOST_VALUES))

    def _rows(self, name: str, places: Sequence[int]) -> Float[np.ndarray, "group values"]:
        return np.stack([self._tensor(place, name) for place in places])

    def _tensor(self, place: int, name: str) -> Float[np.ndarray, "values"]:
        device = self._devices[place]
        after, before = device.update.dense[name], device.sent.dense[name]
        return (after.astype(np.float64) - before.astype(np.float64)).ravel()


@dataclass(frozen=True, slots=True)
class _Stack:
    """Columns of several devices, side by side; `widths` says how many each has, at least one."""

    left: FloatArray
    right: FloatArray
    widths: Int[np.ndarray, "group"]

    @property
    def starts(self) -> Int[np.ndarray, "group"]:
        return np.asarray(np.cumsum(self.widths) - self.widths)


def difference(sent: LoraFactors, returned: LoraFactors) -> Pair:
    """What a device changed: `s B A - s0 B0 A0 = (s B - s0 B0) A + s0 B0 (A - A0)`, as columns.

    In this form a small change of a large update loses no digit; stacked as `[s B, -s0 B0]` the
    two terms would cancel in every inner product.
    """
    after = returned.b.astype(np.float64) * returned.scale
    before = sent.b.astype(np.float64) * sent.scale
    a, a_before = returned.a.astype(np.float64), sent.a.astype(np.float64)
    return Pair(
        left=np.concatenate([after - before, before], axis=1),
        right=np.concatenate([a, a - a_before], axis=0).T,
    )


def _seen(right: FloatArray, name: str, probed: bool) -> FloatArray:
    """The columns over a matrix's inputs (in, q), or what random probes see of them (probes, q).

    The probes are signs, and the expected product of what they see of two columns is that of the
    columns (Hutchinson's estimator of a trace).
    """
    if not probed:
        return right
    rng = np.random.default_rng(zlib.crc32(name.encode("utf-8")))
    signs = rng.choice(np.array([-1.0, 1.0]), (_PROBES, right.shape[0]))
    return np.asarray(signs @ right / np.sqrt(_PROBES))


def _grouped(sizes: dict[int, int], most: int) -> Iterator[list[int]]:
    """Neighbours whose sizes add up to at most `most`; a larger one is alone."""
    group: list[int] = []
    total = 0
    for place, size in sizes.items():
        if group and total + size > most:
            yield group
            group, total = [], 0
        group.append(place)
        total += size
    if group:
        yield group
