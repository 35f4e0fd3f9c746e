"""A device's update in few bits, and what rounding left out of it, kept for the next update.

What travels is the change of A and of B since they were sent, because the coordinator knows the
rest. A is rounded first; then B is fitted anew to the A that will arrive, so that rounding A costs
only what lies outside its rows; then B is rounded.

Between two rounds the factors change their basis, so an error of A or of B means nothing in the
next round. The error of their product does. A device keeps that as a pair of factors (E_b, E_a) of
the rank that it trains, and fits A and B to `B A + E`. Rounds then add up:

    sum of products that arrived + E = sum of products that were trained - cut

up to rounding in float32, where `cut` is what did not fit into the pair's rank. Numpy only.

Source: error feedback as in Seide et al. (2014) and EF21 (arXiv 2106.05203), on products.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from fedtune.coding import CodecName
from fedtune.records import Dispatch, FloatArray, LoraFactors
from fedtune.wire.allotment import Weighted, allot
from fedtune.wire.codecs import rounded
from fedtune.wire.packing import pack_tensors
from fedtune.wire.tensors import column_norms, update_tensors, weighted_pair

_DAMPING = 1e-3
"""Of the largest squared singular value of B. Chosen: between 1e-2 and 1e-4 the error that is left
after twelve rounds changes by a tenth, at 1e-1 it is a quarter larger."""
Doubles = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Lost:
    """What has not arrived so far.

    Attributes:
        factors: matrix -> pair whose product, with its scale, is missing from the global update.
        dense: parameter -> what is missing from it.
    """

    factors: Mapping[str, LoraFactors] = field(default_factory=dict)
    dense: Mapping[str, FloatArray] = field(default_factory=dict)


@dataclass(slots=True)
class ErrorFeedback:
    """What one device's updates of one run left out, after its last round and before it.

    A round that is played again starts from what there was before it; after any other jump back
    nothing is known, and nothing is added.

    Attributes:
        round: the last one whose update was encoded; 0: none yet.
        before: what was lost before that round.
        after: what was lost when its update had been encoded.
    """

    round: int = 0
    before: Lost = field(default_factory=Lost)
    after: Lost = field(default_factory=Lost)

    def at(self, round: int) -> Lost:
        """What the update of a round has to make up for."""
        if round > self.round:
            return self.after
        return self.before if round == self.round else Lost()

    def keep(self, round: int, lost: Lost) -> None:
        """Take over what the update of a round has left out, beside that of other matrices."""
        before = self.at(round)
        self.before, self.round = before, round
        self.after = Lost(
            {**before.factors, **lost.factors},
            {**before.dense, **lost.dense},
        )

    def tensors(self) -> dict[str, FloatArray]:
        """Everything as arrays, for a file."""
        found: dict[str, FloatArray] = {"round": np.array(self.round, np.int64)}
        for when, lost in (("before", self.before), ("after", self.after)):
            for name, pair in lost.factors.items():
                found[f"{when}.a.{name}"], found[f"{when}.b.{name}"] = pair.a, pair.b
                found[f"{when}.scale.{name}"] = np.array(pair.scale, np.float64)
            found |= {f"{when}.dense.{name}": value for name, value in lost.dense.items()}
        return found

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, FloatArray]) -> ErrorFeedback:
        """The way back from `tensors`."""
        return cls(int(tensors["round"]), _lost_of(tensors, "before."), _lost_of(tensors, "after."))


def _lost_of(tensors: Mapping[str, FloatArray], start: str) -> Lost:
    parts = {name.removeprefix(start): value for name, value in tensors.items()}
    matrices = [name.removeprefix("scale.") for name in parts if name.startswith("scale.")]
    return Lost(
        {
            name: LoraFactors(parts[f"a.{name}"], parts[f"b.{name}"], float(parts[f"scale.{name}"]))
            for name in matrices
        },
        {
            name.removeprefix("dense."): value
            for name, value in parts.items()
            if name.startswith("dense.")
        },
    )


def encode_update(
    sent: Dispatch,
    factors: Mapping[str, LoraFactors],
    dense: Mapping[str, FloatArray],
    codec: CodecName,
    lost: Lost | None = None,
) -> tuple[bytes, Lost]:
    """The packed update of a device, and what it leaves out.

    Args:
        sent: as it was decoded, by device and coordinator alike.
        factors, dense: what the device ends its round with.
        lost: what earlier updates left out, to be made up for; None: nothing is, and nothing
            is kept.

    Raises:
        ProtocolError: a value is not finite, or does not fit the codec.
    """
    if codec == "fp32":
        return pack_tensors(update_tensors(factors, dense), codec), Lost()
    bits = _bits(sent, factors, codec)
    changes: dict[str, FloatArray] = {}
    left: dict[str, LoraFactors] = {}
    for name, pair in factors.items():
        before = sent.trained[name]
        owed = None if lost is None else lost.factors.get(name)
        form_a, form_b = (Form(codec, bits.get(f"{name}.{half}")) for half in "ab")
        change_a, change_b = _changes(before, pair, owed, form_a)
        changes[f"{name}.a"], changes[f"{name}.b"] = change_a, change_b
        if lost is not None:
            arrives = LoraFactors(
                before.a + form_a.rounded(change_a),
                before.b + form_b.rounded(change_b),
                pair.scale,
            )
            left[name] = _left_out(pair, arrives, owed)
    missing: dict[str, FloatArray] = {}
    for name, value in dense.items():
        change = value - sent.dense[name]
        if lost is not None:
            change = change + lost.dense.get(name, np.float32(0))
            missing[name] = change - rounded(change, codec)
        changes[f"dense.{name}"] = change
    return pack_tensors(changes, codec, bits), Lost(left, missing)


@dataclass(frozen=True, slots=True)
class Form:
    """How one tensor travels."""

    codec: CodecName
    bits: tuple[int, ...] | None

    def rounded(self, array: FloatArray) -> NDArray[np.float32]:
        return rounded(array, self.codec, self.bits)


def _bits(
    sent: Dispatch, factors: Mapping[str, LoraFactors], codec: CodecName
) -> dict[str, tuple[int, ...]]:
    """More bits for what changes the product more: a row of A times its column of B."""
    weighted: dict[str, Weighted] = {}
    for name, pair in factors.items():
        before = sent.trained[name]
        rows, columns = column_norms(pair.a.T), column_norms(pair.b)
        of_a = pair.scale * columns * column_norms((pair.a - before.a).T)
        of_b = pair.scale * rows * column_norms(pair.b - before.b)
        weighted |= weighted_pair(name, pair, np.square(of_a), np.square(of_b), needed=False)
    return allot(weighted, codec)


def _changes(
    sent: LoraFactors, trained: LoraFactors, owed: LoraFactors | None, form: Form
) -> tuple[FloatArray, FloatArray]:
    """Changes of A and of B that come close to `B_trained A_trained + E`.

    One turn of alternating least squares. First A, so that rows come in which lie outside the
    trained ones; damped, because a weak column of B could make up for E by a huge row only. Then,
    with what arrives as A, the best B, which makes up for the rounding of A as well.
    """
    change_a = trained.a - sent.a
    if owed is not None:
        change_a = change_a + _rows_owed(trained, owed)
    arrives = sent.a + form.rounded(change_a)
    wide_b, wide_a = _gap(trained, owed, arrives)
    solved = np.linalg.lstsq(arrives.T.astype(np.float64), wide_a.T, rcond=1e-4)[0].T
    b = trained.b + (wide_b @ solved).astype(np.float32)
    return change_a, b - sent.b


def _rows_owed(trained: LoraFactors, owed: LoraFactors) -> NDArray[np.float32]:
    """What A has to gain for `B_trained A` to gain E: `(B^T B + damping I)^-1 B^T E`."""
    b = trained.b.astype(np.float64)
    gram = b.T @ b
    damping = max(_DAMPING * np.linalg.norm(gram, 2), np.finfo(np.float64).tiny)
    right = b.T @ (owed.b * (owed.scale / trained.scale))
    return (np.linalg.solve(gram + damping * np.eye(len(gram)), right) @ owed.a).astype(np.float32)


def _gap(
    trained: LoraFactors, owed: LoraFactors | None, arrives: FloatArray
) -> tuple[Float[Doubles, "out wide"], Float[Doubles, "wide in"]]:
    """Factors of `B_trained (A_trained - A_arrives) + E`, in the scale of the trained pair."""
    b: list[FloatArray] = [trained.b]
    a: list[FloatArray] = [trained.a - arrives]
    if owed is not None:
        b.append(owed.b * np.float32(owed.scale / trained.scale))
        a.append(owed.a)
    return np.concatenate(b, axis=1, dtype=np.float64), np.concatenate(a, axis=0, dtype=np.float64)


def _left_out(trained: LoraFactors, arrives: LoraFactors, owed: LoraFactors | None) -> LoraFactors:
    """`B_trained A_trained + E - B_arrives A_arrives`, cut to the trained rank."""
    wide_b, wide_a = _gap(trained, owed, arrives.a)
    wide_b = np.concatenate([wide_b, trained.b - arrives.b], axis=1, dtype=np.float64)
    wide_a = np.concatenate([wide_a, arrives.a], axis=0, dtype=np.float64)
    q_b, r_b = np.linalg.qr(wide_b)
    q_a, r_a = np.linalg.qr(wide_a.T)
    u, sigma, v = np.linalg.svd(r_b @ r_a.T)
    rank = min(trained.a.shape[0], len(sigma))
    root = np.sqrt(sigma[:rank])
    return LoraFactors(
        a=((v[:rank] * root[:, None]) @ q_a.T).astype(np.float32),
        b=((q_b @ u[:, :rank]) * root).astype(np.float32),
        scale=trained.scale,
    )
