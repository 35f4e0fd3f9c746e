"""What AdamW carries over rounds: the squares, through changes of basis, rank and matrices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fedtune.train.memory import OptimizerMemory
from fedtune.train.optimizer import RoundOptimizer
from fedtune.wire.messages import OptimizerSpec

SPEC = OptimizerSpec("adamw", 0.01, 0.01, max_gradient_norm=0.0, keep=True)


def pair(rank: int, matrix: str = "q") -> dict[str, Tensor]:
    return {
        f"{matrix}.a": torch.zeros(rank, 5, requires_grad=True),
        f"{matrix}.b": torch.zeros(7, rank, requires_grad=True),
    }


def gradients(parameters: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(p.shape, generator=generator) for n, p in parameters.items()}


def a_round(
    memory: OptimizerMemory | None,
    parameters: Mapping[str, Tensor],
    steps: int,
    spec: OptimizerSpec = SPEC,
    turn: Tensor | None = None,
    seed: int = 0,
) -> RoundOptimizer:
    """Steps with seeded gradients, turned in rank space if asked for."""
    optimizer = RoundOptimizer(parameters, spec, steps, memory=memory)
    for step in range(steps):
        for name, gradient in gradients(parameters, seed + step).items():
            if turn is not None:
                gradient = turn @ gradient if name.endswith(".a") else gradient @ turn.t()
            parameters[name].grad = gradient
        optimizer.step()
    optimizer.keep()
    return optimizer


def test_a_turn_of_the_rank_directions_leaves_the_kept_squares_as_they_are() -> None:
    turn, _ = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(1)))
    plain, turned = OptimizerMemory(), OptimizerMemory()
    a_round(plain, pair(3), 4)
    a_round(turned, pair(3), 4, turn=turn)
    assert plain.squares.keys() == {"q.a", "q.b"}
    for name, squares in plain.squares.items():
        torch.testing.assert_close(turned.squares[name], squares)


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_a_device_starts_from_the_kept_squares_at_any_rank(rank: int) -> None:
    memory = OptimizerMemory()
    a_round(memory, pair(3), 4)
    parameters = pair(rank)
    state = RoundOptimizer(parameters, SPEC, 2, memory=memory).inner.state
    a, b = (state[parameters[name]] for name in ("q.a", "q.b"))
    assert a["step"].item() == 4.0
    assert not a["exp_avg"].any()
    torch.testing.assert_close(a["exp_avg_sq"], memory.squares["q.a"].expand(rank, 5))
    torch.testing.assert_close(b["exp_avg_sq"], memory.squares["q.b"][:, None].expand(7, rank))


def test_the_first_step_after_a_pause_is_as_long_as_the_squares_say() -> None:
    memory = OptimizerMemory()
    parameters = {"dense.w": torch.zeros(2, requires_grad=True)}
    optimizer = RoundOptimizer(parameters, SPEC, 50, memory=memory)
    for _ in range(50):
        parameters["dense.w"].grad = torch.tensor([1.0, 1.0])
        optimizer.step()
    optimizer.keep()
    again = {"dense.w": torch.zeros(2, requires_grad=True)}
    optimizer = RoundOptimizer(again, SPEC, 1, memory=memory)
    again["dense.w"].grad = torch.tensor([1.0, -0.5])
    optimizer.step()
    # Not a tenth of it, which a mean of zero would give, nor a sign, which fresh squares would.
    assert again["dense.w"].tolist() == pytest.approx([-0.01, 0.005], rel=0.02)


def test_decay_is_the_same_share_of_the_learning_rate_as_without_memory() -> None:
    spec = replace(SPEC, weight_decay=0.1)
    memory = OptimizerMemory()
    a_round(memory, pair(2), 3, spec)
    parameters = {name: p.detach().add(1.0).requires_grad_() for name, p in pair(2).items()}
    optimizer = RoundOptimizer(parameters, spec, 2, memory=memory)
    for _ in range(2):
        for parameter in parameters.values():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    expected = torch.full((2, 5), (1 - 0.01 * 0.1) ** 2)
    torch.testing.assert_close(parameters["q.a"].detach(), expected)


def test_a_matrix_without_squares_begins_anew_beside_one_that_has_them() -> None:
    memory = OptimizerMemory()
    a_round(memory, pair(2), 3)
    fresh, both = pair(2, "p"), pair(2, "p") | pair(2)
    alone = RoundOptimizer(fresh, SPEC, 1)
    beside = RoundOptimizer(both, SPEC, 1, memory=memory)
    for parameters, optimizer in ((fresh, alone), (both, beside)):
        for name, gradient in gradients(pair(2, "p"), 9).items():
            parameters[name].grad = gradient
        optimizer.step()
    for name, parameter in fresh.items():
        torch.testing.assert_close(both[name], parameter, rtol=0, atol=0)
        assert parameter.any()


def test_squares_of_a_matrix_that_is_left_out_for_a_round_stay() -> None:
    memory = OptimizerMemory()
    a_round(memory, pair(2), 3)
    before = memory.squares["q.a"].clone()
    a_round(memory, pair(2, "p"), 2)
    assert memory.squares.keys() == {"q.a", "q.b", "p.a", "p.b"}
    torch.testing.assert_close(memory.squares["q.a"], before, rtol=0, atol=0)
    assert memory.steps == {"q.a": 3, "q.b": 3, "p.a": 2, "p.b": 2}


def test_steps_add_up_over_rounds() -> None:
    memory = OptimizerMemory()
    a_round(memory, pair(2), 3)
    a_round(memory, pair(4), 2)
    assert memory.steps["q.a"] == 5


def test_without_memory_nothing_is_carried_over() -> None:
    once, twice = pair(2), pair(2)
    a_round(None, once, 2)
    a_round(None, pair(2), 3)
    a_round(None, twice, 2)
    torch.testing.assert_close(once["q.a"], twice["q.a"], rtol=0, atol=0)


def test_sgd_leaves_nothing() -> None:
    memory = OptimizerMemory()
    a_round(memory, pair(2), 2, replace(SPEC, name="sgd"))
    assert not memory.squares


def test_a_memory_comes_back_from_its_tensors() -> None:
    memory = OptimizerMemory()
    a_round(memory, pair(2, "layers.0.q.steps"), 3)
    again = OptimizerMemory.from_tensors(memory.tensors())
    assert again.steps == memory.steps
    assert again.squares.keys() == memory.squares.keys()
    for name, squares in memory.squares.items():
        torch.testing.assert_close(again.squares[name], squares, rtol=0, atol=0)
