"""The side network: it learns, the base does not move, and no gradient passes through the base."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedtune.lora import linear
from fedtune.model.backbone import Backbone, BackboneShelf
from fedtune.model.load import dense_shapes, tensor_names
from fedtune.model.loss import loss_sum, prepare
from fedtune.model.shapes import read_shapes
from fedtune.records import Dispatch, MatrixForm, TaskName
from fedtune.train.side import beside, side_network, train_side
from fedtune.wire.messages import OptimizerSpec

PAD = 2


@dataclass(frozen=True)
class Sample:
    tokens: NDArray[np.int32]
    loss_mask: NDArray[np.bool_]
    label: int = -1


def batch(seed: int = 0, size: int = 4) -> list[Sample]:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(4, 24, size)
    return [
        Sample(rng.integers(3, 200, n).astype("i4"), np.arange(n) >= n // 3, int(rng.integers(3)))
        for n in lengths
    ]


class World:
    def __init__(self, folder: Path, task: TaskName) -> None:
        self.task: TaskName = task
        names = read_shapes(folder, ("all-linear",)).by_name()
        labels = ("a", "b", "c") if task == "sequence-classification" else ()
        shelf = BackboneShelf(folder, torch.device("cpu"), keep_base=False)
        self.backbone: Backbone = shelf.get(task, labels, dict.fromkeys(names, MatrixForm("fp32")))
        heads = dense_shapes(folder, task, tensor_names(folder))
        rng = np.random.default_rng(0)
        self.heads = Dispatch(
            {},
            dense={
                name: rng.normal(0, 0.1, [3 if a == 0 else a for a in shape]).astype("f4")
                for name, shape in heads.items()
            },
        )

    def loss(self) -> Tensor:
        model = self.backbone.model
        return loss_sum(model, prepare(model, batch(), PAD, self.task), self.task).total


@pytest.fixture(params=["causal-lm", "sequence-classification"])
def world(request: pytest.FixtureRequest, tiny_llama: Path, tiny_bert: Path) -> World:
    folder = tiny_llama if request.param == "causal-lm" else tiny_bert
    return World(folder, request.param)


def test_a_new_side_network_changes_nothing(world: World) -> None:
    before = world.loss()
    side = side_network(world.backbone, seed=0)
    with beside(world.backbone, side):
        torch.testing.assert_close(world.loss(), before)
        with torch.no_grad():
            side.up.normal_(generator=torch.Generator().manual_seed(0))
        assert not torch.isclose(world.loss(), before, rtol=1e-3)
    torch.testing.assert_close(world.loss(), before)


def test_it_learns_and_the_base_stays(world: World) -> None:
    side = side_network(world.backbone, seed=0)
    frozen = {
        name: p.clone()
        for name, p in world.backbone.model.named_parameters()
        if name not in world.heads.dense
    }
    losses: list[float] = []
    heads = train_side(
        world.backbone,
        side,
        [batch()] * 12,
        world.heads,
        OptimizerSpec("adamw", 2e-2, 2e-2),
        micro_batch=2,
        task=world.task,
        pad_id=PAD,
        after_step=lambda _, loss: losses.append(loss),
    )
    assert losses[-1] < losses[0] - 0.1
    for name, value in frozen.items():
        assert torch.equal(value, world.backbone.model.get_parameter(name)), name
    assert heads.keys() == world.heads.dense.keys()
    for name, sent in world.heads.dense.items():
        assert not np.array_equal(heads[name].numpy(), sent)


def test_no_gradient_passes_through_a_matrix_of_the_base(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a gradient went through a frozen matrix")

    monkeypatch.setattr(linear, "_frozen_gradient", refuse)
    side = side_network(world.backbone, seed=0)
    with torch.no_grad():
        side.up.normal_(generator=torch.Generator().manual_seed(0))
    with beside(world.backbone, side):
        world.loss().backward()  # type: ignore[no-untyped-call]
    assert all(p.grad is not None and p.grad.any() for p in side.parameters())


def test_the_same_seed_gives_the_same_network(world: World) -> None:
    one, two, other = (side_network(world.backbone, seed).down[0] for seed in (0, 0, 1))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
