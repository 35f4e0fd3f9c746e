"""FedProx: a pull of every step back to what the round started from, on products of factors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from fedtune.lora.linear import Factors


@dataclass(frozen=True, slots=True)
class _Pair:
    """A trained pair and copies of what it started as."""

    now: Factors
    a: Float[Tensor, "rank in"]
    b: Float[Tensor, "out rank"]


class Proximal:
    """Adds the gradient of the proximal term to those of the loss:

        mu/2 sum_matrices ||s B A - s B0 A0||_F^2  +  mu/2 sum_dense ||w - w0||^2

    The distance is that of the products, which are what a device changes and what the coordinator
    joins. The distance of the factors, ||A - A0||^2 + ||B - B0||^2, is another one: it has no
    meaning of its own, because (B M, M^-1 A) is the same update at another distance, and it pulls
    at directions of A whose columns of B are zero, which add nothing. With D = B - B0 and
    C = A - A0 the gradients are

        in B:  mu s^2 (D (A A^T) + B0 (C A^T))        in A:  mu s^2 ((B^T D) A + (B^T B0) C)

    which takes products with the rank alone: about 8 rank^2 (out + in) operations a matrix, the
    (out, in) product is never formed. Differences come first, so that nothing cancels: in the
    first step the term is exactly zero. The term has no part in the loss that is reported.

    What the frozen tail adds is in both products and cancels. Values are copied when this is
    made, 4 bytes for each number that is trained.

    Args:
        factors: matrix -> what the device trains of it, as the round starts.
        dense: parameters that are trained whole.
        strength: mu, not negative.

    Source: Li et al., "Federated optimization in heterogeneous networks", MLSys 2020,
        https://arxiv.org/abs/1812.06127, equation 2; there on the parameters themselves. An
        adaptive local optimiser gets the term as part of the gradient, as in the paper's
        objective, and so divides it by the gradient's size too.
    """

    def __init__(
        self, factors: Mapping[str, Factors], dense: Mapping[str, Tensor], strength: float
    ) -> None:
        self._strength = strength
        self._pairs = [
            _Pair(pair, pair.a.detach().clone(), pair.b.detach().clone())
            for pair in factors.values()
            if pair.trains
        ]
        self._dense = [(now, now.detach().clone()) for now in dense.values()]

    @torch.no_grad()
    def add(self) -> None:
        """Add to the gradients that there are; what has none is not trained in this step."""
        for pair in self._pairs:
            self._pull(pair)
        for now, start in self._dense:
            if now.grad is not None:
                now.grad.add_(now - start, alpha=self._strength)

    def _pull(self, pair: _Pair) -> None:
        a, b, by_a, by_b = pair.now.a, pair.now.b, pair.now.a.grad, pair.now.b.grad
        strength = self._strength * pair.now.scale**2
        moved_a, moved_b = a - pair.a, b - pair.b
        if by_b is not None:
            by_b.addmm_(moved_b, a @ a.t(), alpha=strength)
            by_b.addmm_(pair.b, moved_a @ a.t(), alpha=strength)
        if by_a is not None:
            by_a.addmm_(b.t() @ moved_b, a, alpha=strength)
            by_a.addmm_(b.t() @ pair.b, moved_a, alpha=strength)


def make_proximal(
    factors: Mapping[str, Factors], dense: Mapping[str, Tensor], strength: float
) -> Proximal | None:
    """The term of a round that starts from these values; None for a strength of 0."""
    return Proximal(factors, dense, strength) if strength > 0 else None
