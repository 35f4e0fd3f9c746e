"""What the server makes of a joined round: its optimiser, and what the cap cut off.

    Delta = joined - before                       the round's change, taken as a gradient
    average   velocity = beta velocity + Delta              new = before + step velocity
    adam      m = beta m + (1 - beta) Delta, V of squares   new = before + step m^ / sqrt(V^)

all on the products of the factors (`adaptive` says what V is). With `keep_dropped`, what the cap
cut off the last state is added to the new one before that is cut: it had been learnt, and was never
applied. So with step 1 and without momentum the state and what it lacks add up to all changes so
far, and nothing is lost twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from fedtune.aggregate.adaptive import Squares, decayed, over_root, squares_of
from fedtune.aggregate.combination import combine, split
from fedtune.aggregate.low_rank import Pair, pair_of_low_rank, recompress
from fedtune.aggregate.modules import for_each
from fedtune.errors import ConfigError
from fedtune.records import FloatArray, GlobalAdapter, LowRank

MOMENTUM, SQUARES, DROPPED = "momentum", "squares", "dropped"
"""Names of the server's states. `squares` holds vectors alone: `rows.<matrix>`,
`columns.<matrix>`, `dense.<tensor>` and `rounds`, how many it has seen."""

States = Mapping[str, GlobalAdapter]


@dataclass(frozen=True, slots=True)
class ServerStep:
    """How the server steps.

    Attributes:
        rank_cap: directions of a matrix that the state keeps; its velocity keeps as many.
        step: `average`: factor of the change; `adam`: by how much a weight moves in a round.
        momentum: beta of the velocity or of the mean, 0 up to 1.
        beta2: `adam`: decay of the squares, 0 up to 1.
        adaptivity: `adam`: tau, positive: changes below it count as small.
        keep_dropped: add to the next round what the cap cut off this one's state: of each matrix
            the next `rank_cap` directions. What lies beyond twice the cap is lost.
        nesterov: `average`: look ahead by one step of momentum.

    Raises:
        ConfigError: a number is out of its range.

    Sources: Reddi et al., "Adaptive federated optimization", ICLR 2021,
        https://arxiv.org/abs/2003.00295, FedAvgM and FedAdam, here on products of factors;
        Karimireddy et al., "Error feedback fixes SignSGD", ICML 2019,
        https://arxiv.org/abs/1901.09847, algorithm 2, with the cap as the compressor.
    """

    rank_cap: int
    step: float = 1.0
    momentum: float = 0.0
    optimizer: Literal["average", "adam"] = "average"
    beta2: float = 0.99
    adaptivity: float = 1e-3
    keep_dropped: bool = False
    nesterov: bool = False

    def __post_init__(self) -> None:
        if self.step <= 0 or not 0 <= self.momentum < 1:
            raise ConfigError(
                "aggregate.server_step must be positive and aggregate.momentum in 0 up to 1, "
                f"got {self.step} and {self.momentum}"
            )
        if self.adaptivity <= 0 or not 0 <= self.beta2 < 1:
            raise ConfigError(
                "aggregate.adaptivity must be positive and aggregate.beta2 in 0 up to 1, "
                f"got {self.adaptivity} and {self.beta2}"
            )

    @property
    def join_cap(self) -> int:
        """Directions that a rule has to keep for what this step keeps of them."""
        return 2 * self.rank_cap if self.keep_dropped else self.rank_cap

    @property
    def plain(self) -> bool:
        """Whether the joined state is taken as it is."""
        return self.optimizer == "average" and self.step == 1 and self.momentum == 0


def apply_server_step(
    states: States, before: GlobalAdapter, joined: GlobalAdapter, settings: ServerStep
) -> tuple[GlobalAdapter, dict[str, GlobalAdapter]]:
    """Take the server's step from one round to the next.

    Args:
        states: what the last call returned; empty before the first.
        before: the state before the round.
        joined: what a rule, with a cap of `settings.join_cap`, made of the round.

    Returns:
        The new state, and the server's own states after it. The dropped energy of a matrix is the
        share of its squared norm that the new state lacks, by the join or by this step. Where the
        joined state is taken as it is, `joined` itself comes back, and no states.

    Raises:
        ConfigError: the state holds plain factors (`zero-pad`), for which a sum of products has
            no meaning as a state.
    """
    if settings.plain and not settings.keep_dropped:
        return joined, {}
    _refuse_plain_factors(joined)
    rounds = _rounds_seen(states) + 1

    def step(name: str) -> _SteppedMatrix:
        return _step_matrix(_moments(name, states, before, joined), rounds, settings)

    names = list(joined.matrices)
    stepped = dict(zip(names, for_each(names, step), strict=True))
    dense = {
        name: _step_dense(name, states, before, joined, rounds, settings) for name in joined.dense
    }
    adapter = GlobalAdapter(
        round=joined.round,
        matrices={name: matrix.new for name, matrix in stepped.items()},
        dense={name: np.asarray(t.new, np.float32) for name, t in dense.items()},
        dropped_energy={name: matrix.dropped_energy for name, matrix in stepped.items()},
    )
    return adapter, _states(joined.round, stepped, dense, rounds)


# ---------------------------------------------------------------- one matrix


@dataclass(frozen=True, slots=True)
class _Moments:
    """One matrix before and after a round's join, and the server's states of it.

    Attributes:
        terms: `before`, `joined`, and of `momentum` and `dropped` those that there are.
        lost: share of the energy that the join cut off.
    """

    terms: Mapping[str, LowRank]
    squares: Squares | None
    lost: float


@dataclass(frozen=True, slots=True)
class _SteppedMatrix:
    """One matrix after the step; a state is None where the settings have none."""

    new: LowRank
    dropped_energy: float
    momentum: LowRank | None = None
    squares: Squares | None = None
    dropped: LowRank | None = None


def _step_matrix(moments: _Moments, rounds: int, settings: ServerStep) -> _SteppedMatrix:
    cap = settings.join_cap
    momentum: LowRank | None = None
    squares: Squares | None = None
    if settings.optimizer == "adam":
        new, lost, momentum, squares = _adam(moments, rounds, settings)
    elif settings.plain and DROPPED not in moments.terms:
        new, lost = moments.terms["joined"], 0.0
    else:
        new, lost = combine(moments.terms, _average(settings), cap)
        if settings.momentum:
            velocity = {MOMENTUM: settings.momentum, "joined": 1.0, "before": -1.0}
            momentum, _ = combine(moments.terms, velocity, settings.rank_cap)
    lost = max(lost, moments.lost)
    if not settings.keep_dropped:
        return _SteppedMatrix(new, lost, momentum, squares)
    whole = _energy(new)
    new, dropped = split(new, settings.rank_cap)
    share = 1.0 - (1.0 - lost) * _energy(new) / whole if whole else lost
    return _SteppedMatrix(new, share, momentum, squares, dropped)


def _average(settings: ServerStep) -> dict[str, float]:
    """Coefficients of `before + step * direction + dropped`."""
    beta, step = settings.momentum, settings.step
    # Nesterov: beta * velocity + Delta, of the velocity that this round leads to.
    old, change = (beta * beta, beta + 1.0) if settings.nesterov else (beta, 1.0)
    return {
        MOMENTUM: step * old,
        "joined": step * change,
        "before": 1.0 - step * change,
        DROPPED: 1.0,
    }


def _adam(
    moments: _Moments, rounds: int, settings: ServerStep
) -> tuple[LowRank, float, LowRank | None, Squares]:
    """The new state up to the join's cap, the share lost, the mean (None without) and squares.

    The step is along the mean's first 2 `rank_cap` directions, of which the state keeps half: all
    of them would make the new state's stack, and so its cost, half as large again.
    """
    terms, beta = moments.terms, settings.momentum
    mean = change = _change(terms)
    momentum: LowRank | None = None
    if beta:
        sums = {MOMENTUM: beta, "joined": 1.0 - beta, "before": beta - 1.0}
        leading, _ = combine(terms, sums, 2 * settings.rank_cap)
        mean, momentum = pair_of_low_rank(leading), split(leading, settings.rank_cap)[0]
    squares = decayed(moments.squares, squares_of(change), settings.beta2)
    seen = 1.0 - settings.beta2**rounds
    unbiased = Squares(squares.rows / seen, squares.columns / seen)
    direction = over_root(mean, unbiased, settings.adaptivity)
    step = settings.step / (1.0 - beta**rounds)
    kept = [pair_of_low_rank(terms[name]) for name in ("before", DROPPED) if name in terms]
    scaled = Pair(step * direction.left, direction.right)
    new, lost = recompress([*kept, scaled], settings.join_cap)
    return new, lost, momentum, squares


def _change(terms: Mapping[str, LowRank]) -> Pair:
    """joined - before as columns; none where they are the same object."""
    joined, before = terms["joined"], terms["before"]
    if joined is before:
        return pair_of_low_rank(split(joined, 0)[0])
    new, old = pair_of_low_rank(joined), pair_of_low_rank(before, -1.0)
    return Pair(
        left=np.concatenate([new.left, old.left], axis=1),
        right=np.concatenate([new.right, old.right], axis=1),
    )


def _energy(low_rank: LowRank) -> float:
    return float(np.sum(low_rank.sigma.astype(np.float64) ** 2))


# ---------------------------------------------------------------- one tensor that is trained whole


@dataclass(frozen=True, slots=True)
class _SteppedDense:
    """A tensor after the step, in float64; a state is None where the settings have none."""

    new: FloatArray
    momentum: FloatArray | None = None
    squares: FloatArray | None = None


def _step_dense(
    name: str,
    states: States,
    before: GlobalAdapter,
    joined: GlobalAdapter,
    rounds: int,
    settings: ServerStep,
) -> _SteppedDense:
    """The same step on a tensor that no cap cuts; with `adam`, coordinate by coordinate."""
    start = before.dense[name].astype(np.float64)
    change = joined.dense[name].astype(np.float64) - start
    beta, step = settings.momentum, settings.step
    velocity = change if settings.optimizer == "average" else (1.0 - beta) * change
    if MOMENTUM in states:
        velocity = velocity + beta * states[MOMENTUM].dense[name]
    momentum = velocity if beta else None
    if settings.optimizer == "average":
        direction = beta * velocity + change if settings.nesterov else velocity
        return _SteppedDense(start + step * direction, momentum)
    squares = (1.0 - settings.beta2) * change**2
    if SQUARES in states:
        squares = squares + settings.beta2 * states[SQUARES].dense[f"dense.{name}"]
    unbiased = squares / (1.0 - settings.beta2**rounds)
    root = np.sqrt(unbiased + settings.adaptivity**2)
    return _SteppedDense(start + step / (1.0 - beta**rounds) * velocity / root, momentum, squares)


# ---------------------------------------------------------------- the states


def _moments(name: str, states: States, before: GlobalAdapter, joined: GlobalAdapter) -> _Moments:
    terms = {"before": before.matrices[name], "joined": joined.matrices[name]}
    terms |= {key: states[key].matrices[name] for key in (MOMENTUM, DROPPED) if key in states}
    squares: Squares | None = None
    if SQUARES in states:
        held = states[SQUARES].dense
        rows, columns = (held[f"{side}.{name}"].astype(np.float64) for side in ("rows", "columns"))
        squares = Squares(rows, columns)
    return _Moments(terms, squares, joined.dropped_energy.get(name, 0.0))


def _rounds_seen(states: States) -> int:
    return int(states[SQUARES].dense["rounds"][0]) if SQUARES in states else 0


def _states(
    round: int,
    matrices: Mapping[str, _SteppedMatrix],
    dense: Mapping[str, _SteppedDense],
    rounds: int,
) -> dict[str, GlobalAdapter]:
    """The server's states; those that no matrix and no tensor has are left out."""
    momenta = {n: m.momentum for n, m in matrices.items() if m.momentum is not None}
    means = {n: t.momentum for n, t in dense.items() if t.momentum is not None}
    found: dict[str, GlobalAdapter] = {}
    if momenta or means:
        found[MOMENTUM] = GlobalAdapter(round, momenta, _stored(means))
    vectors = {f"dense.{n}": t.squares for n, t in dense.items() if t.squares is not None}
    for name, matrix in matrices.items():
        if matrix.squares is not None:
            vectors[f"rows.{name}"] = matrix.squares.rows
            vectors[f"columns.{name}"] = matrix.squares.columns
    if vectors:
        vectors["rounds"] = np.array([rounds])
        found[SQUARES] = GlobalAdapter(round, {}, _stored(vectors))
    dropped = {n: m.dropped for n, m in matrices.items() if m.dropped is not None}
    if dropped:
        found[DROPPED] = GlobalAdapter(round, dropped, {})
    return found


def _stored(arrays: Mapping[str, FloatArray]) -> dict[str, FloatArray]:
    return {name: np.asarray(array, dtype=np.float32) for name, array in arrays.items()}


def _refuse_plain_factors(adapter: GlobalAdapter) -> None:
    for low_rank in adapter.matrices.values():
        norms = np.linalg.norm(low_rank.v.astype(np.float64), axis=0)
        if np.any(np.abs(norms - 1.0) > 1e-3):
            raise ConfigError(
                "the server's optimiser works on a state of orthonormal directions; under the "
                "rule zero-pad leave aggregate.server_step at 1, aggregate.momentum at 0, "
                "aggregate.optimizer at 'average' and aggregate.keep_dropped off, or use the "
                "rule delta"
            )
