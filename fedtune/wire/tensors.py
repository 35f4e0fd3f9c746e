"""Which tensors a dispatch and an update are made of: their names, their shapes, and the way back.

`<matrix>.a` (rank, in) and `<matrix>.b` (out, rank) are trained factors, `<matrix>.tail_a` and
`<matrix>.tail_b` frozen directions of the global adapter, `dense.<name>` a parameter that is
trained whole.

An update in `fp32` holds the values that a device ends with; in any other codec it holds what they
changed by since they were sent, so that what rounding takes is a share of the change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

import numpy as np
from jaxtyping import Float

from fedtune.coding import CodecName
from fedtune.errors import ProtocolError
from fedtune.records import (
    DevicePlan,
    Dispatch,
    FloatArray,
    LoraFactors,
    MatrixShape,
    Scale,
    scale_of,
)
from fedtune.wire.allotment import Weighted, allot
from fedtune.wire.packing import (
    Packed,
    Shape,
    pack_tensors,
    packed_shapes,
    tensors_digest,
    unpack_tensors,
)

__all__ = [
    "Shape",
    "as_received",
    "column_norms",
    "direction_norms",
    "dispatch_from_tensors",
    "dispatch_shapes",
    "dispatch_tensors",
    "pack_dispatch",
    "pack_tensors",
    "packed_shapes",
    "tensors_digest",
    "unpack_dispatch",
    "unpack_tensors",
    "update_from_tensors",
    "update_shapes",
    "update_tensors",
    "weighted_pair",
]


_Value = TypeVar("_Value")


def dispatch_tensors(dispatch: Dispatch) -> dict[str, FloatArray]:
    """Name -> array of everything that a dispatch holds."""
    return update_tensors(dispatch.trained, dispatch.dense) | _named(
        dispatch.tail, "tail_a", "tail_b"
    )


def update_tensors(
    factors: Mapping[str, LoraFactors], dense: Mapping[str, FloatArray]
) -> dict[str, FloatArray]:
    """Name -> array of everything that a device sends back."""
    return _named(factors, "a", "b") | {f"dense.{name}": dense[name] for name in dense}


def _named(factors: Mapping[str, LoraFactors], a: str, b: str) -> dict[str, FloatArray]:
    tensors = {}
    for matrix, pair in factors.items():
        tensors[f"{matrix}.{a}"] = pair.a
        tensors[f"{matrix}.{b}"] = pair.b
    return tensors


def pack_dispatch(dispatch: Dispatch, codec: CodecName) -> bytes:
    """A dispatch as it travels; its larger directions get more bits, where the codec has few.

    Raises:
        ProtocolError: a value is not finite, or does not fit the codec.
    """
    weighted: dict[str, Weighted] = {}
    for pairs, kind in ((dispatch.trained, ""), (dispatch.tail, "tail_")):
        for name, pair in pairs.items():
            size = np.square(pair.scale * direction_norms(pair))
            weighted |= weighted_pair(name, pair, size, size, kind, needed=not kind)
    return pack_tensors(dispatch_tensors(dispatch), codec, allot(weighted, codec))


def direction_norms(pair: LoraFactors) -> Float[np.ndarray, " rank"]:
    """Norm of each direction's product of a column of B with a row of A."""
    return np.asarray(column_norms(pair.b) * column_norms(pair.a.T))


def column_norms(array: FloatArray) -> Float[np.ndarray, " columns"]:
    """In float64, which no float32 number overflows when it is squared."""
    return np.asarray(np.linalg.norm(array.astype(np.float64), axis=0))


def weighted_pair(
    name: str,
    pair: LoraFactors,
    weights_a: Float[np.ndarray, " rank"],
    weights_b: Float[np.ndarray, " rank"],
    kind: str = "",
    *,
    needed: bool,
) -> dict[str, Weighted]:
    """What the directions of one matrix count; without a square factor, which has no longer side.

    Args:
        kind: of the tensors' names: empty or `tail_`.
        needed: no row of A may go.
    """
    found = {}
    if pair.a.shape[0] < pair.a.shape[1]:
        found[f"{name}.{kind}a"] = Weighted(weights_a, pair.a.shape[1], needed)
    if pair.b.shape[1] < pair.b.shape[0]:
        found[f"{name}.{kind}b"] = Weighted(weights_b, pair.b.shape[0])
    return found


def as_received(
    packed: Packed, dispatch: Dispatch, plan: DevicePlan, scale: Scale = 1.0
) -> Dispatch:
    """A dispatch as the device will read it out of its bytes, rounded by their codec.

    Args:
        packed: what `pack_dispatch` wrote.
        scale: as it is told to the device.

    Raises:
        ProtocolError: the bytes are not those of the dispatch.
    """
    shapes = {name: value.shape for name, value in dispatch_tensors(dispatch).items()}
    return dispatch_from_tensors(unpack_tensors(packed, shapes), plan, scale)


# ---------------------------------------------------------------- shapes


def update_shapes(
    plan: DevicePlan,
    shapes: Mapping[str, MatrixShape],
    dense_shapes: Mapping[str, Shape],
) -> dict[str, Shape]:
    """Name -> shape of every tensor that the device of `plan` sends back.

    Raises:
        ProtocolError: the plan trains a matrix that the model does not have.
    """
    expected: dict[str, Shape] = {}
    for matrix, rank in plan.ranks().items():
        expected |= _pair_shapes(_known(shapes, matrix), rank, "a", "b")
    return expected | {f"dense.{name}": tuple(shape) for name, shape in dense_shapes.items()}


def dispatch_shapes(
    plan: DevicePlan,
    shapes: Mapping[str, MatrixShape],
    dense_shapes: Mapping[str, Shape],
    found: Mapping[str, Shape],
) -> dict[str, Shape]:
    """Name -> shape of every tensor that the device of `plan` is sent.

    Trained ranks are exact. A tail holds fewer directions than planned, or none, as long as the
    global adapter has fewer; so its rank is taken from what was found, bounded by the plan.

    Args:
        found: name -> shape in the header of the packed tensors.

    Raises:
        ProtocolError: the plan names a matrix that the model does not have, or a tail is larger
            than planned.
    """
    expected = update_shapes(plan, shapes, dense_shapes)
    for matrix in plan.matrices:
        tail = found.get(f"{matrix.name}.tail_a")
        if tail is None or matrix.tail_rank == 0:
            continue
        rank = tail[0] if tail else 0
        if not 1 <= rank <= matrix.tail_rank:
            raise ProtocolError(
                f"tensor {matrix.name}.tail_a: expected 1..{matrix.tail_rank} directions, "
                f"got {rank}"
            )
        expected |= _pair_shapes(_known(shapes, matrix.name), rank, "tail_a", "tail_b")
    return expected


def _pair_shapes(shape: MatrixShape, rank: int, a: str, b: str) -> dict[str, Shape]:
    return {
        f"{shape.name}.{a}": (rank, shape.in_features),
        f"{shape.name}.{b}": (shape.out_features, rank),
    }


def _known(shapes: Mapping[str, MatrixShape], matrix: str) -> MatrixShape:
    if matrix not in shapes:
        raise ProtocolError(f"plan: matrix {matrix} is not in the base model")
    return shapes[matrix]


# ---------------------------------------------------------------- reading


def unpack_dispatch(
    data: Packed,
    plan: DevicePlan,
    shapes: Mapping[str, MatrixShape],
    dense_shapes: Mapping[str, Shape],
    scale: Scale = 1.0,
) -> Dispatch:
    """Read what a device was sent.

    Args:
        scale: of the LoRA pairs; the instruction beside the tensors holds it.

    Raises:
        ProtocolError: the tensors are not those of the plan; the message names the first.
    """
    expected = dispatch_shapes(plan, shapes, dense_shapes, packed_shapes(data))
    return dispatch_from_tensors(unpack_tensors(data, expected), plan, scale)


def dispatch_from_tensors(
    tensors: Mapping[str, FloatArray], plan: DevicePlan, scale: Scale = 1.0
) -> Dispatch:
    """The dispatch that named arrays make; their shapes are already checked."""
    trained, dense = update_from_tensors(tensors, plan, scale)  # of a dict, so nothing is read
    tail = {
        matrix.name: LoraFactors(
            tensors[f"{matrix.name}.tail_a"],
            tensors[f"{matrix.name}.tail_b"],
            scale_of(scale, matrix.rank),
        )
        for matrix in plan.matrices
        if f"{matrix.name}.tail_a" in tensors
    }
    return Dispatch(trained=trained, tail=tail, dense=dense)


def update_from_tensors(
    tensors: Mapping[str, FloatArray],
    plan: DevicePlan,
    scale: Scale = 1.0,
    since: Dispatch | None = None,
) -> tuple[Mapping[str, LoraFactors], Mapping[str, FloatArray]]:
    """Trained factors by matrix, and dense parameters by name; shapes are already checked.

    Both are read from `tensors` when they are asked for.

    Args:
        since: what the tensors are the change of; None: they are the values themselves.
    """
    ranks = plan.ranks()

    def pair(name: str) -> LoraFactors:
        a, b = tensors[f"{name}.a"], tensors[f"{name}.b"]
        if since is not None:
            a, b = since.trained[name].a + a, since.trained[name].b + b
        return LoraFactors(a, b, scale_of(scale, ranks[name]))

    def parameter(name: str) -> FloatArray:
        value = np.asarray(tensors[f"dense.{name}"])
        return value if since is None else since.dense[name] + value

    names = [name.removeprefix("dense.") for name in tensors if name.startswith("dense.")]
    return ReadOnAsking(list(ranks), pair), ReadOnAsking(names, parameter)


class ReadOnAsking(Mapping[str, _Value]):
    """A mapping whose values are made anew each time that they are asked for."""

    def __init__(self, names: Sequence[str], read: Callable[[str], _Value]) -> None:
        self._names, self._read = dict.fromkeys(names), read

    def __getitem__(self, name: str) -> _Value:
        if name not in self._names:
            raise KeyError(name)
        return self._read(name)

    def __contains__(self, name: object) -> bool:
        return name in self._names  # Mapping's own would read the value

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
