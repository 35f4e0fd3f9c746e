"""A server optimiser on whole rounds: heavy-ball or Nesterov momentum in factored form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from fedtune.aggregate.low_rank import pair_of_low_rank, recompress
from fedtune.errors import ConfigError
from fedtune.records import FloatArray, GlobalAdapter, LowRank

Term = tuple[float, GlobalAdapter]
"""A coefficient and what it multiplies."""


def apply_server_step(
    before: GlobalAdapter,
    joined: GlobalAdapter,
    momentum: GlobalAdapter | None,
    *,
    step: float,
    beta: float,
    rank_cap: int,
    nesterov: bool = False,
) -> tuple[GlobalAdapter, GlobalAdapter | None]:
    """Take the round's change as a gradient and step along its running sum:

        velocity = beta * velocity + (joined - before)
        new      = before + step * velocity                              heavy ball
        new      = before + step * (beta * velocity + joined - before)   Nesterov

    on the products, with the low-rank results cut to `rank_cap`. With step 1 and beta 0 this is
    the identity, and `joined` itself comes back.

    Args:
        before: the state before the round.
        joined: the state that a rule made of the round.
        momentum: the velocity that the last call returned; None before the first.
        step: server learning rate, positive.
        beta: momentum, 0 up to 1.
        rank_cap: directions kept, in the state and in the velocity.
        nesterov: look ahead by one step of momentum.

    Returns:
        The new state, whose dropped energy is the larger of the join's and of this step's, and
        the new velocity (None without momentum).

    Raises:
        ConfigError: step or beta is out of range, or the state holds plain factors (`zero-pad`),
            for which a sum of products has no meaning as a state.

    Source: Reddi et al., "Adaptive federated optimization", 2020,
        https://arxiv.org/abs/2003.00295, FedAvgM; here on products of LoRA factors.
    """
    if step <= 0 or not 0 <= beta < 1:
        raise ConfigError(
            "aggregate.server_step must be positive and aggregate.momentum in 0 up to 1, "
            f"got {step} and {beta}"
        )
    if step == 1 and beta == 0:
        return joined, None
    _refuse_plain_factors(joined)
    change: list[Term] = [(1.0, joined), (-1.0, before)]
    if beta == 0:
        return _combine([(1.0, before), *_scaled(step, change)], joined, rank_cap), None
    carried: list[Term] = [] if momentum is None else [(beta, momentum)]
    velocity = _combine([*carried, *change], joined, rank_cap)
    direction: list[Term] = [(1.0, velocity)]
    if nesterov:
        direction = [(beta, velocity), *change]
    new = _combine([(1.0, before), *_scaled(step, direction)], joined, rank_cap)
    return new, velocity


def _scaled(factor: float, terms: Sequence[Term]) -> list[Term]:
    return [(factor * coefficient, adapter) for coefficient, adapter in terms]


def _merged(terms: Sequence[Term]) -> list[Term]:
    """Terms of one adapter as one term, so that the stack has each adapter's columns once."""
    sums: dict[int, Term] = {}
    for coefficient, adapter in terms:
        total = sums[id(adapter)][0] if id(adapter) in sums else 0.0
        sums[id(adapter)] = (total + coefficient, adapter)
    return list(sums.values())


def _combine(terms: Sequence[Term], joined: GlobalAdapter, rank_cap: int) -> GlobalAdapter:
    """A linear combination of adapters, cut to the cap."""
    terms = _merged(terms)
    matrices: dict[str, LowRank] = {}
    dropped: dict[str, float] = {}
    for name in joined.matrices:
        pairs = [pair_of_low_rank(adapter.matrices[name], c) for c, adapter in terms]
        matrices[name], energy = recompress(pairs, rank_cap)
        dropped[name] = max(energy, joined.dropped_energy.get(name, 0.0))
    dense = {
        name: _combine_dense([(c, adapter.dense) for c, adapter in terms], name)
        for name in joined.dense
    }
    return GlobalAdapter(round=joined.round, matrices=matrices, dense=dense, dropped_energy=dropped)


def _combine_dense(
    terms: Sequence[tuple[float, Mapping[str, FloatArray]]], name: str
) -> FloatArray:
    total = sum(c * dense[name].astype(np.float64) for c, dense in terms)
    return np.asarray(total, dtype=np.float32)


def _refuse_plain_factors(adapter: GlobalAdapter) -> None:
    for low_rank in adapter.matrices.values():
        norms = np.linalg.norm(low_rank.v.astype(np.float64), axis=0)
        if np.any(np.abs(norms - 1.0) > 1e-3):
            raise ConfigError(
                "aggregate.server_step and aggregate.momentum work on a state of orthonormal "
                "directions; under the rule zero-pad set them to 1 and 0, or use the rule delta"
            )
