"""What a hostile device sends instead of what it has learnt.

With dA and dB what its training changed, and D = s B A - s B0 A0:

    sign-flip   A0 - dA, B0 - dB: minus D, but for the term of second order
    scaled      A0 + dA, B0 + 100 dB: about 100 D, within the norms that the checks allow
    noise       a random change of B of the length of D
    colluding   all send one and the same update: that of the first of them, flipped and doubled
    little      all send one and the same update: half of the first one's, flipped; it hides among
                honest ones (inner product manipulation, Xie et al., https://arxiv.org/abs/1903.03936)
    poisoned    an honest training on bad data: every response has its words in reverse order
    nan, inf    one value that is not finite
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from fedtune.records import Dispatch, LoraFactors
from fedtune.wire.check import product_norm

ATTACKS = ("sign-flip", "scaled", "noise", "colluding", "little", "poisoned", "nan", "inf")
ON_DATA = "poisoned"
SCALE = 100.0

Factors = Mapping[str, LoraFactors]


@dataclass
class Gang:
    """What hostile devices tell each other: by round, the change that all of them send."""

    told: dict[int, Mapping[str, tuple[np.ndarray, np.ndarray]]] = field(default_factory=dict)

    def change(self, round: int, sent: Dispatch, trained: Factors, factor: float) -> Factors:
        """`factor` times the change of the first that asks, cut or filled up to one's own rank."""
        if round not in self.told:
            self.told[round] = {
                name: (pair.a - sent.trained[name].a, pair.b - sent.trained[name].b)
                for name, pair in trained.items()
            }
        told = self.told[round]
        return {name: _shifted(pair, *told[name], factor) for name, pair in sent.trained.items()}


def tamper(
    attack: str, gang: Gang, round: int, sent: Dispatch, trained: Factors, rng: np.random.Generator
) -> Factors:
    """The factors that leave the device; those of attacks on data and of nan stay as trained."""
    by_name: Mapping[str, Callable[[], Factors]] = {
        "sign-flip": lambda: _each(sent, trained, lambda d: -d, lambda d: -d),
        "scaled": lambda: _each(sent, trained, lambda d: d, lambda d: SCALE * d),
        "noise": lambda: _noise(sent, trained, rng),
        "colluding": lambda: gang.change(round, sent, trained, -2.0),
        "little": lambda: gang.change(round, sent, trained, -0.5),
    }
    return by_name[attack]() if attack in by_name else trained


def spoil(attack: str, packed: bytes) -> bytes:
    """The packed tensors that leave the device: the last value may be none."""
    if attack not in ("nan", "inf"):
        return packed
    return packed[:-4] + np.float32(attack).tobytes()


def reversed_words(text: str) -> str:
    return " ".join(reversed(text.split()))


def _each(
    sent: Dispatch,
    trained: Factors,
    of_a: Callable[[np.ndarray], np.ndarray],
    of_b: Callable[[np.ndarray], np.ndarray],
) -> Factors:
    return {
        name: LoraFactors(
            a=start.a + of_a(trained[name].a - start.a),
            b=start.b + of_b(trained[name].b - start.b),
            scale=start.scale,
        )
        for name, start in sent.trained.items()
    }


def _shifted(start: LoraFactors, a: np.ndarray, b: np.ndarray, factor: float) -> LoraFactors:
    """The start with a change on its leading directions: dA as it was, dB times the factor."""
    rank = min(start.rank, a.shape[0])
    new_a, new_b = start.a.copy(), start.b.copy()
    new_a[:rank] += a[:rank]
    new_b[:, :rank] += np.float32(factor) * b[:, :rank]
    return LoraFactors(new_a, new_b, start.scale)


def _noise(sent: Dispatch, trained: Factors, rng: np.random.Generator) -> Factors:
    found = {}
    for name, start in sent.trained.items():
        honest = LoraFactors(trained[name].a, trained[name].b - start.b, start.scale)
        random = rng.standard_normal(start.b.shape).astype(np.float32)
        own = LoraFactors(start.a, random, start.scale)
        factor = np.float32(product_norm(honest) / max(product_norm(own), 1e-12))
        found[name] = LoraFactors(start.a, start.b + factor * random, start.scale)
    return found
