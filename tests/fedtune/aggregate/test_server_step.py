from __future__ import annotations

import numpy as np
import pytest

from fedtune.aggregate.low_rank import Pair, empty, recompress
from fedtune.aggregate.rules import make_rule
from fedtune.aggregate.server_step import apply_server_step
from fedtune.errors import ConfigError
from fedtune.records import GlobalAdapter, MatrixShape

SHAPE = (20, 16)


def adapter(seed: int, rank: int = 3, round_index: int = 1) -> GlobalAdapter:
    rng = np.random.default_rng(seed)
    pair = Pair(rng.standard_normal((SHAPE[0], rank)), rng.standard_normal((SHAPE[1], rank)))
    low_rank, _ = recompress([pair], rank)
    dense = {"head": rng.standard_normal((2, 3)).astype(np.float32)}
    return GlobalAdapter(round_index, {"w": low_rank}, dense, {"w": 0.25})


def zero() -> GlobalAdapter:
    return GlobalAdapter(0, {"w": empty(*SHAPE)}, {"head": np.zeros((2, 3), np.float32)})


def error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def test_a_plain_step_returns_the_joined_state_itself() -> None:
    joined = adapter(1)
    new, momentum = apply_server_step(zero(), joined, None, step=1.0, beta=0.0, rank_cap=2)
    assert new is joined
    assert momentum is None


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize(("step", "beta"), [(1.0, 0.9), (0.5, 0.0), (0.7, 0.5)])
def test_three_rounds_agree_with_the_dense_recursion(
    step: float, beta: float, nesterov: bool
) -> None:
    state, momentum = zero(), None
    products = {"w": np.zeros(SHAPE), "head": np.zeros((2, 3))}
    velocity = {"w": np.zeros(SHAPE), "head": np.zeros((2, 3))}
    for index in range(3):
        joined = adapter(10 + index, round_index=index + 1)
        targets = {"w": joined.matrices["w"].product(), "head": joined.dense["head"]}
        for name, target in targets.items():
            change = target - products[name]
            velocity[name] = beta * velocity[name] + change
            direction = beta * velocity[name] + change if nesterov else velocity[name]
            products[name] = products[name] + step * direction
        state, momentum = apply_server_step(
            state, joined, momentum, step=step, beta=beta, rank_cap=16, nesterov=nesterov
        )
        assert state.round == index + 1
    assert error(state.matrices["w"].product(), products["w"]) < 1e-5
    assert error(state.dense["head"], products["head"]) < 1e-5
    assert (momentum is None) == (beta == 0)


def test_state_and_velocity_are_cut_to_the_cap_and_the_loss_is_reported() -> None:
    new, momentum = apply_server_step(
        adapter(1, rank=6), adapter(2, rank=6), None, step=0.5, beta=0.9, rank_cap=4
    )
    assert momentum is not None
    assert new.matrices["w"].rank == momentum.matrices["w"].rank == 4
    assert new.dropped_energy["w"] >= 0.25
    kept, _ = apply_server_step(adapter(1), adapter(2), None, step=0.5, beta=0.0, rank_cap=16)
    assert kept.dropped_energy["w"] == 0.25  # that of the join; the step dropped nothing


@pytest.mark.parametrize(("step", "beta"), [(0.0, 0.0), (-1.0, 0.5), (1.0, 1.0), (1.0, -0.1)])
def test_settings_out_of_range_are_refused(step: float, beta: float) -> None:
    with pytest.raises(ConfigError, match=r"aggregate\.server_step must be positive"):
        apply_server_step(zero(), adapter(1), None, step=step, beta=beta, rank_cap=4)


def test_plain_factors_are_refused() -> None:
    state = make_rule("zero-pad", 4).start([MatrixShape("w", *SHAPE, 0)], {})
    with pytest.raises(ConfigError, match="under the rule zero-pad set them to 1 and 0"):
        apply_server_step(state, state, None, step=0.5, beta=0.0, rank_cap=4)
