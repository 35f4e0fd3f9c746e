"""The server's step against dense recursions, and what it keeps from round to round."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from numpy.typing import NDArray

from fedtune.aggregate.low_rank import Pair, empty, pair_of_low_rank, recompress
from fedtune.aggregate.rules import make_rule
from fedtune.aggregate.server_step import DROPPED, MOMENTUM, SQUARES, ServerStep, apply_server_step
from fedtune.errors import ConfigError
from fedtune.records import GlobalAdapter, MatrixShape
from fedtune.wire.checkpoint import read_checkpoint, write_checkpoint

SHAPE = (20, 16)
Dense = dict[str, NDArray[np.float64]]


def pair(seed: int, rank: int, scale: float = 1.0) -> Pair:
    rng = np.random.default_rng(seed)
    left = scale * rng.standard_normal((SHAPE[0], rank))
    return Pair(left, rng.standard_normal((SHAPE[1], rank)))


def adapter(seed: int, rank: int = 3, round_index: int = 1) -> GlobalAdapter:
    low_rank, _ = recompress([pair(seed, rank)], rank)
    dense = {"head": np.random.default_rng(seed).standard_normal((2, 3)).astype(np.float32)}
    return GlobalAdapter(round_index, {"w": low_rank}, dense, {"w": 0.25})


def zero() -> GlobalAdapter:
    return GlobalAdapter(0, {"w": empty(*SHAPE)}, {"head": np.zeros((2, 3), np.float32)})


def moved(state: GlobalAdapter, change: Pair, cap: int) -> GlobalAdapter:
    """What a rule of this cap makes of a round in which the devices' mean change was `change`."""
    low_rank, dropped = recompress([pair_of_low_rank(state.matrices["w"]), change], cap)
    return GlobalAdapter(state.round + 1, {"w": low_rank}, state.dense, {"w": dropped})


def dense_of(state: GlobalAdapter) -> Dense:
    return {
        "w": state.matrices["w"].product(),
        "head": np.asarray(state.dense["head"], dtype=np.float64),
    }


def error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def assert_equal(one: GlobalAdapter, other: GlobalAdapter) -> None:
    assert one.round == other.round
    assert one.dense.keys() == other.dense.keys()
    assert one.matrices.keys() == other.matrices.keys()
    for name, array in one.dense.items():
        np.testing.assert_array_equal(array, other.dense[name])
    for name, low_rank in one.matrices.items():
        for side in ("u", "sigma", "v"):
            found, expected = getattr(low_rank, side), getattr(other.matrices[name], side)
            np.testing.assert_array_equal(found, expected)


# ---------------------------------------------------------------- average


def test_a_plain_step_returns_the_joined_state_itself() -> None:
    joined = adapter(1)
    new, states = apply_server_step({}, zero(), joined, ServerStep(2))
    assert new is joined
    assert states == {}


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize(("step", "beta"), [(1.0, 0.9), (0.5, 0.0), (0.7, 0.5)])
def test_three_rounds_agree_with_the_dense_recursion(
    step: float, beta: float, nesterov: bool, keep: bool
) -> None:
    settings = ServerStep(16, step, beta, nesterov=nesterov, keep_dropped=keep)
    state, states = zero(), dict[str, GlobalAdapter]()
    products = dense_of(state)
    velocity = dense_of(state)
    for index in range(3):
        joined = adapter(10 + index, round_index=index + 1)
        for name, target in dense_of(joined).items():
            change = target - products[name]
            velocity[name] = beta * velocity[name] + change
            direction = beta * velocity[name] + change if nesterov else velocity[name]
            products[name] = products[name] + step * direction
        state, states = apply_server_step(states, state, joined, settings)
        assert state.round == index + 1
    for name, found in dense_of(state).items():
        assert error(found, products[name]) < 1e-5
    assert (MOMENTUM in states) == (beta > 0)
    assert SQUARES not in states


def test_state_and_velocity_are_cut_to_the_cap_and_the_loss_is_reported() -> None:
    settings = ServerStep(4, step=0.5, momentum=0.9)
    new, states = apply_server_step({}, adapter(1, rank=6), adapter(2, rank=6), settings)
    assert new.matrices["w"].rank == states[MOMENTUM].matrices["w"].rank == 4
    assert new.dropped_energy["w"] >= 0.25
    kept, _ = apply_server_step({}, adapter(1), adapter(2), ServerStep(16, step=0.5))
    assert kept.dropped_energy["w"] == 0.25  # that of the join; the step dropped nothing


def test_the_velocity_of_a_matrix_that_nobody_trained_is_zero_and_not_rounding() -> None:
    state = adapter(1)
    joined = replace(adapter(2), matrices=state.matrices)
    new, states = apply_server_step({}, state, joined, ServerStep(8, momentum=0.9))
    assert states[MOMENTUM].matrices["w"].rank == 0
    assert error(new.matrices["w"].product(), state.matrices["w"].product()) < 1e-6
    assert new.matrices["w"].rank == 3


# ---------------------------------------------------------------- adam


def row_column_root(squares: NDArray[np.float64], tau: float) -> NDArray[np.float64]:
    """sqrt(V) of a matrix of mean squares, the dense way."""
    rows, columns = squares.mean(axis=1) + tau**2, squares.mean(axis=0) + tau**2
    return np.asarray(np.sqrt(np.outer(rows, columns) / (squares.mean() + tau**2)))


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("beta", [0.0, 0.9])
def test_three_rounds_of_adam_agree_with_the_dense_recursion(beta: float, keep: bool) -> None:
    eta, beta2, tau = 0.03, 0.9, 0.2
    settings = ServerStep(16, eta, beta, "adam", beta2, tau, keep_dropped=keep)
    state, states = zero(), dict[str, GlobalAdapter]()
    products, mean, squares = dense_of(state), dense_of(state), dense_of(state)
    for rounds in range(1, 4):
        joined = adapter(20 + rounds, round_index=rounds)
        for name, target in dense_of(joined).items():
            change = target - products[name]
            mean[name] = beta * mean[name] + (1 - beta) * change
            squares[name] = beta2 * squares[name] + (1 - beta2) * change**2
            unbiased = squares[name] / (1 - beta2**rounds)
            whole = name == "head"
            root = np.sqrt(unbiased + tau**2) if whole else row_column_root(unbiased, tau)
            products[name] = products[name] + eta * mean[name] / (1 - beta**rounds) / root
        state, states = apply_server_step(states, state, joined, settings)
    for name, found in dense_of(state).items():
        assert error(found, products[name]) < 1e-5
    assert (MOMENTUM in states) == (beta > 0)


def test_on_a_change_of_rank_one_it_is_fedadam_itself() -> None:
    """Its squares are a product of rows and columns, so nothing is smoothed."""
    change = pair(3, 1)
    settings = ServerStep(8, 0.01, optimizer="adam", adaptivity=1e-9)
    joined = moved(zero(), change, 8)
    new, _ = apply_server_step({}, zero(), joined, settings)
    expected = 0.01 * np.sign(change.left @ change.right.T)
    np.testing.assert_allclose(new.matrices["w"].product(), expected, atol=1e-7)
    assert new.matrices["w"].rank == 1


def test_a_step_moves_weights_by_the_step_whatever_the_size_of_the_change() -> None:
    settings = ServerStep(16, 0.01, optimizer="adam", adaptivity=1e-7)
    found = []
    for scale in (1e-3, 1.0, 1e3):
        joined = moved(zero(), pair(4, 3, scale), 16)
        new, _ = apply_server_step({}, zero(), joined, settings)
        found.append(new.matrices["w"].product())
    assert np.sqrt(np.square(found[0]).mean()) == pytest.approx(0.01, rel=0.1)
    assert error(found[0], found[1]) < 1e-4
    assert error(found[2], found[1]) < 1e-4


def test_changes_far_below_the_adaptivity_are_stepped_along_as_they_are() -> None:
    change = pair(5, 2, 1e-5)
    settings = ServerStep(8, 0.01, optimizer="adam", adaptivity=1.0)
    new, _ = apply_server_step({}, zero(), moved(zero(), change, 8), settings)
    expected = 0.01 * change.left @ change.right.T
    assert error(new.matrices["w"].product(), expected) < 1e-5


def test_a_steady_change_is_not_overstepped_in_the_first_rounds() -> None:
    settings = ServerStep(8, 0.01, 0.9, "adam", 0.99, 1e-6)
    state, states = zero(), dict[str, GlobalAdapter]()
    lengths = []
    for _ in range(8):
        before = state
        joined = moved(state, pair(6, 2), 8)
        state, states = apply_server_step(states, state, joined, settings)
        step = state.matrices["w"].product() - before.matrices["w"].product()
        lengths.append(float(np.linalg.norm(step)))
    assert lengths == pytest.approx([lengths[0]] * 8, rel=1e-3)


def test_the_step_is_along_twice_the_directions_that_the_mean_keeps() -> None:
    change, tau = pair(12, 6), 0.1
    settings = ServerStep(3, 0.01, 0.5, "adam", adaptivity=tau, keep_dropped=True)
    state, states = rounds_of([change], settings)
    product = change.left @ change.right.T
    expected = 0.01 * product / row_column_root(np.square(product), tau)
    found = state.matrices["w"].product() + states[DROPPED].matrices["w"].product()
    assert error(found, expected) < 1e-5
    assert states[MOMENTUM].matrices["w"].rank == 3


def test_a_matrix_that_nobody_trained_does_not_move() -> None:
    state = adapter(1)
    joined = replace(adapter(2), matrices=state.matrices, dense=state.dense)
    settings = ServerStep(8, 0.01, optimizer="adam", adaptivity=1e-9)
    new, states = apply_server_step({}, state, joined, settings)
    assert error(new.matrices["w"].product(), state.matrices["w"].product()) < 1e-6
    np.testing.assert_array_equal(new.dense["head"], state.dense["head"])
    assert not states[SQUARES].dense["rows.w"].any()


# ---------------------------------------------------------------- what the cap cut off


def rounds_of(
    changes: list[Pair], settings: ServerStep
) -> tuple[GlobalAdapter, Mapping[str, GlobalAdapter]]:
    state, states = zero(), dict[str, GlobalAdapter]()
    for change in changes:
        joined = moved(state, change, settings.join_cap)
        state, states = apply_server_step(states, state, joined, settings)
        assert state.matrices["w"].rank <= settings.rank_cap
    return state, states


@pytest.mark.parametrize("step", [1.0, 0.5])
def test_of_steady_changes_above_the_cap_state_and_rest_add_up_to_all(step: float) -> None:
    changes = [pair(7, 6)] * 5
    total = 5 * step * changes[0].left @ changes[0].right.T
    state, states = rounds_of(changes, ServerStep(3, step, keep_dropped=True))
    rest = states[DROPPED].matrices["w"]
    assert rest.rank == 3
    assert error(state.matrices["w"].product() + rest.product(), total) < 1e-5
    energy = np.square(total).sum()
    share = 1 - np.square(state.matrices["w"].product()).sum() / energy
    assert state.dropped_energy["w"] == pytest.approx(share, rel=1e-4)


def test_a_small_steady_direction_is_learnt_in_the_end_and_lost_without() -> None:
    """One large direction swings and cancels; the cap of 1 hides the small one behind it."""
    basis = np.linalg.qr(np.random.default_rng(8).standard_normal((16, 2)))[0]
    left = np.concatenate([basis, np.zeros((4, 2))])
    changes = [Pair(left * np.array([sign, 0.4]), basis) for sign in (1, -1, 1, -1, 1, -1)]
    total = sum(change.left @ change.right.T for change in changes)
    kept, _ = rounds_of(changes, ServerStep(1, keep_dropped=True))
    cut, _ = rounds_of(changes, ServerStep(1))
    assert error(kept.matrices["w"].product(), total) < 1e-6
    assert error(cut.matrices["w"].product(), total) > 0.3


def test_what_lies_beyond_twice_the_cap_is_lost_and_counted() -> None:
    change = pair(9, 6)
    sigma = np.linalg.svd(change.left @ change.right.T, compute_uv=False)
    state, states = rounds_of([change], ServerStep(2, keep_dropped=True))
    assert states[DROPPED].matrices["w"].rank == 2
    expected = 1 - np.square(sigma[:2]).sum() / np.square(sigma).sum()
    assert state.dropped_energy["w"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("settings", [ServerStep(3), ServerStep(3, 0.01, optimizer="adam")])
def test_a_round_without_a_change_leaves_state_and_rest_as_they_were(settings: ServerStep) -> None:
    settings = replace(settings, keep_dropped=True)
    state, states = rounds_of([pair(7, 6)], settings)
    still = replace(state, round=2, dropped_energy={})
    new, after = apply_server_step(states, state, still, settings)
    for found, expected in ((new, state), (after[DROPPED], states[DROPPED])):
        assert error(found.matrices["w"].product(), expected.matrices["w"].product()) < 1e-5


@pytest.mark.parametrize("optimizer", ["average", "adam"])
def test_the_rest_is_no_part_of_the_momentum(optimizer: Literal["average", "adam"]) -> None:
    """It has been stepped along already; the velocity would repeat it."""
    changes = [pair(10, 6), pair(11, 2)]
    settings = ServerStep(4, momentum=0.5, optimizer=optimizer, keep_dropped=True)
    _, states = rounds_of(changes, settings)
    share = 1.0 if optimizer == "average" else 0.5
    first, second = (Pair(share * change.left, change.right) for change in changes)
    leading, _ = recompress([first], 4)
    velocity, _ = recompress([pair_of_low_rank(leading, 0.5), second], 4)
    assert error(states[MOMENTUM].matrices["w"].product(), velocity.product()) < 1e-5


# ---------------------------------------------------------------- from round to round


@pytest.mark.parametrize(
    "settings",
    [
        ServerStep(4, 0.9, 0.5),
        ServerStep(4, 0.01, 0.9, "adam"),
        ServerStep(4, 0.01, 0.9, "adam", keep_dropped=True),
        ServerStep(4, keep_dropped=True),
    ],
)
def test_states_read_from_a_checkpoint_go_on_to_the_same_bits(
    settings: ServerStep, tmp_path: Path
) -> None:
    changes = [pair(30 + index, 5) for index in range(3)]
    state, states = rounds_of(changes, settings)
    path = write_checkpoint(tmp_path, state, states)
    saved = read_checkpoint(path)
    joined = moved(state, pair(40, 5), settings.join_cap)
    gone_on = apply_server_step(states, state, joined, settings)
    resumed = apply_server_step(
        saved.extra, saved.adapter, moved(saved.adapter, pair(40, 5), settings.join_cap), settings
    )
    assert_equal(gone_on[0], resumed[0])
    assert gone_on[1].keys() == resumed[1].keys()
    for name, held in gone_on[1].items():
        assert_equal(held, resumed[1][name])


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(("step", "beta"), [(0.0, 0.0), (-1.0, 0.5), (1.0, 1.0), (1.0, -0.1)])
def test_settings_out_of_range_are_refused(step: float, beta: float) -> None:
    with pytest.raises(ConfigError, match=r"aggregate\.server_step must be positive"):
        ServerStep(4, step, beta)


@pytest.mark.parametrize(("beta2", "tau"), [(1.0, 1e-3), (-0.1, 1e-3), (0.9, 0.0)])
def test_settings_of_adam_out_of_range_are_refused(beta2: float, tau: float) -> None:
    with pytest.raises(ConfigError, match=r"aggregate\.adaptivity must be positive"):
        ServerStep(4, 0.01, 0.9, "adam", beta2, tau)


@pytest.mark.parametrize(
    "settings",
    [ServerStep(4, 0.5), ServerStep(4, 0.01, optimizer="adam"), ServerStep(4, keep_dropped=True)],
)
def test_plain_factors_are_refused(settings: ServerStep) -> None:
    state = make_rule("zero-pad", 4).start([MatrixShape("w", *SHAPE, 0)], {})
    with pytest.raises(ConfigError, match=r"under the rule zero-pad leave aggregate\.server_step"):
        apply_server_step({}, state, state, settings)
