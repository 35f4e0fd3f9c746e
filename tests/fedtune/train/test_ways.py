"""Rounds by every way: what a device starts with is what it was sent, and joining is exact."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from fedtune.aggregate.rules import make_rule
from fedtune.errors import ModelError
from fedtune.lora import linear
from fedtune.model.backbone import Backbone, BackboneShelf
from fedtune.model.load import dense_shapes, tensor_names
from fedtune.model.shapes import read_shapes
from fedtune.records import (
    AdapterUpdate,
    Contribution,
    DevicePlan,
    Dispatch,
    MatrixForm,
    MatrixPlan,
    TaskName,
    TrainingWay,
)
from fedtune.train import ways
from fedtune.train.compute import LossScale
from fedtune.train.inputs import layer_inputs
from fedtune.train.round import RoundResult, mount, train_round, unmount
from fedtune.train.side_by_side import Share, train_side_by_side
from fedtune.train.step import accumulate
from fedtune.wire.messages import OptimizerSpec

PAD = 2
WAYS = {
    "lora": TrainingWay(),
    "decay": TrainingWay(layer_rate_decay=0.5),
    "allora": TrainingWay("allora"),
    "eva": TrainingWay(start="eva"),
    "corda": TrainingWay(start="corda"),
    "pissa": TrainingWay(start="pissa"),
    "s2ft": TrainingWay("s2ft"),
    "s2ft-weight": TrainingWay("s2ft", channels="weight"),
    "s2ft-activation": TrainingWay("s2ft", channels="activation"),
    "greentrainer": TrainingWay("greentrainer", flops_share=0.4),
}
TASKS: tuple[TaskName, ...] = ("causal-lm", "sequence-classification")


@dataclass(frozen=True)
class Sample:
    tokens: NDArray[np.int32]
    loss_mask: NDArray[np.bool_]
    label: int = -1


def batches(seed: int = 0, steps: int = 3, size: int = 4) -> list[list[Sample]]:
    rng = np.random.default_rng(seed)

    def sample() -> Sample:
        length = int(rng.integers(4, 24))
        tokens = rng.integers(3, 200, length).astype(np.int32)
        return Sample(tokens, np.arange(length) >= length // 3, int(rng.integers(3)))

    return [[sample() for _ in range(size)] for _ in range(steps)]


def spec(way: TrainingWay, name: str = "adamw") -> OptimizerSpec:
    return OptimizerSpec(name, 1e-2, 1e-2, way=way)  # type: ignore[arg-type]


class World:
    """A base, a rule, and devices of unequal ranks."""

    def __init__(self, folder: Path, task: TaskName, rule: str = "delta") -> None:
        self.task: TaskName = task
        labels = ("a", "b", "c") if task == "sequence-classification" else ()
        shapes = read_shapes(folder, ("all-linear",))
        heads = dense_shapes(folder, task, tensor_names(folder))
        shelf = BackboneShelf(folder, torch.device("cpu"), keep_base=False)
        self.backbone: Backbone = shelf.get(
            task, labels, dict.fromkeys(shapes.by_name(), MatrixForm("fp32"))
        )
        self.names = tuple(shapes.by_name())
        self.rule = make_rule(rule, 16)
        rng = np.random.default_rng(0)
        dense = {
            name: rng.normal(0, 0.1, [3 if size == 0 else size for size in shape]).astype("f4")
            for name, shape in heads.items()
        }
        self.adapter = self.rule.start(shapes.matrices, dense)

    def plan(self, rank: int, micro_batch: int = 2) -> DevicePlan:
        matrices = tuple(MatrixPlan(n, rank, "fp32", tail_rank=16) for n in self.names)
        return DevicePlan(f"rank-{rank}", matrices, micro_batch, 4, 32, 3)

    def sent(self, rank: int, round: int = 0) -> Dispatch:
        rng = np.random.default_rng([7, round])
        return self.rule.dispatch(self.adapter, self.plan(rank), scale=0.5, rng=rng)

    def train(
        self,
        sent: Dispatch,
        way: TrainingWay,
        rank: int = 4,
        steps: Sequence[Sequence[Sample]] | None = None,
        optimizer: str = "adamw",
        loss_scale: LossScale | None = None,
    ) -> RoundResult:
        return train_round(
            self.backbone,
            batches(rank) if steps is None else steps,
            sent,
            self.plan(rank),
            spec(way, optimizer),
            task=self.task,
            pad_id=PAD,
            loss_scale=loss_scale,
        )

    def round(self, way: TrainingWay, round: int) -> list[Contribution]:
        """One round of two devices; the adapter moves on."""
        contributions = []
        for rank in (2, 4):
            sent = self.sent(rank, round)
            back = self.train(sent, way, rank, batches(10 * round + rank))
            update = AdapterUpdate("r", round, f"{rank}", "d", back.factors, back.dense, 1, 1)
            contributions.append(Contribution(float(rank), sent, update))
        self.adapter = self.rule.join(self.adapter, contributions)
        return contributions


@pytest.fixture(params=TASKS)
def world(request: pytest.FixtureRequest, tiny_llama: Path, tiny_bert: Path) -> World:
    return World(tiny_llama if request.param == "causal-lm" else tiny_bert, request.param)


@pytest.fixture
def llama(tiny_llama: Path) -> World:
    return World(tiny_llama, "causal-lm")


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_two_rounds_join_to_the_weighted_mean_of_differences(
    world: World, way: TrainingWay
) -> None:
    for round in range(2):
        before = world.adapter
        contributions = world.round(way, round)
        for name in world.names:
            expected = before.matrices[name].product() + sum(
                c.weight / 6 * (c.update.factors[name].product() - c.sent.trained[name].product())
                for c in contributions
            )
            found = world.adapter.matrices[name].product()
            np.testing.assert_allclose(found, expected, atol=2e-5, err_msg=name)
    assert any(np.abs(m.product()).max() > 1e-3 for m in world.adapter.matrices.values())


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_a_round_without_steps_of_any_size_gives_back_the_product_that_was_sent(
    llama: World, way: TrainingWay
) -> None:
    llama.round(WAYS["lora"], 0)  # so that some directions are warm and some have a tail
    sent = llama.sent(20)
    back = train_round(
        llama.backbone,
        batches(),
        sent,
        llama.plan(20),
        OptimizerSpec("sgd", 0.0, 0.0, way=way),
        task="causal-lm",
        pad_id=PAD,
    )
    assert any(pair.b.any() for pair in sent.trained.values())
    for name, pair in back.factors.items():
        assert np.array_equal(pair.b @ pair.a, sent.trained[name].b @ sent.trained[name].a), name


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_every_way_learns_and_leaves_the_backbone_bare(world: World, way: TrainingWay) -> None:
    steps = batches(steps=1) * 12
    losses = world.train(world.sent(4), way, steps=steps).losses
    assert losses[-1] < losses[0] - 0.02
    for layer in world.backbone.layers.values():
        assert layer.factors is None
        assert layer.observe is None


@pytest.mark.parametrize("key", ["decay", "allora", "eva", "corda", "pissa", "s2ft"])
def test_every_way_is_another_way(llama: World, key: str) -> None:
    plain, other = (llama.train(llama.sent(4), WAYS[name]) for name in ("lora", key))
    name = "model.layers.0.mlp.up_proj"
    assert not np.allclose(plain.factors[name].product(), other.factors[name].product(), atol=1e-5)


def test_layer_decay_shortens_the_first_step_of_lower_blocks(llama: World) -> None:
    sent = llama.sent(4)
    one = batches(steps=1)
    plain, decayed = (llama.train(sent, WAYS[k], steps=one) for k in ("lora", "decay"))
    for name, pair in plain.factors.items():
        share = 1.0 if ".layers.1." in name else 0.5
        np.testing.assert_allclose(decayed.factors[name].b, share * pair.b, rtol=1e-5, atol=1e-9)


# ---------------------------------------------------------------- s2ft


def test_s2ft_gives_back_ones_and_zeros_for_a(llama: World) -> None:
    for pair in llama.train(llama.sent(4), WAYS["s2ft"]).factors.values():
        assert sorted(pair.a.sum(axis=1)) == [1.0] * 4
        assert set(np.unique(pair.a)) == {0.0, 1.0}


@pytest.mark.parametrize("task", TASKS)
def test_with_a_fixed_the_gradient_of_b_is_that_with_a_trained(
    task: TaskName, tiny_llama: Path, tiny_bert: Path
) -> None:
    world = World(tiny_llama if task == "causal-lm" else tiny_bert, task)
    world.round(WAYS["lora"], 0)
    sent, one = world.sent(2), batches(steps=1)
    free = world.train(sent, TrainingWay(), rank=2, steps=one, optimizer="sgd")
    # No direction is fresh, so S2FT does no more than to hold A.
    fixed = world.train(sent, WAYS["s2ft"], rank=2, steps=one, optimizer="sgd")
    for name, pair in fixed.factors.items():
        assert np.array_equal(pair.a, sent.trained[name].a)
    # Clipping is by the norm of all gradients, so B moves in the same direction, and not less far.
    moved = {n: (p.b - sent.trained[n].b, free.factors[n].b) for n, p in fixed.factors.items()}
    ours = np.concatenate([m.ravel() for m, _ in moved.values()])
    theirs = np.concatenate([(b - sent.trained[n].b).ravel() for n, (_, b) in moved.items()])
    cosine = ours @ theirs / np.linalg.norm(ours) / np.linalg.norm(theirs)
    assert cosine > 1 - 1e-4


def saved_numbers(world: World, way: TrainingWay, monkeypatch: pytest.MonkeyPatch) -> int:
    """Numbers that a forward pass keeps for the backward pass, once each."""
    counts: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        counts[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // 4
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        world.train(world.sent(2), way, rank=2, steps=batches(steps=1))
    return sum(counts.values())


def test_with_a_fixed_inputs_are_not_kept(tiny_bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(tiny_bert, "sequence-classification")
    whole = saved_numbers(world, WAYS["lora"], monkeypatch)
    assert saved_numbers(world, WAYS["s2ft"], monkeypatch) < 0.9 * whole


# ---------------------------------------------------------------- greentrainer


def test_greentrainer_gives_back_what_it_left_out_bit_for_bit(world: World) -> None:
    sent = world.sent(4)
    back = world.train(sent, WAYS["greentrainer"])
    same = {
        name
        for name, pair in back.factors.items()
        if np.array_equal(pair.a, sent.trained[name].a)
        and np.array_equal(pair.b, sent.trained[name].b)
    }
    assert 0 < len(same) < len(world.names)


def test_greentrainer_decays_nothing_that_it_left_out(llama: World) -> None:
    llama.round(WAYS["lora"], 0)
    sent = llama.sent(2)
    settings = OptimizerSpec("sgd", 0.1, 0.1, weight_decay=0.1, way=WAYS["greentrainer"])
    back = train_round(
        llama.backbone, batches(), sent, llama.plan(2), settings, task="causal-lm", pad_id=PAD
    )
    same = [n for n, p in back.factors.items() if np.array_equal(p.b, sent.trained[n].b)]
    assert 0 < len(same) < len(llama.names)


def test_greentrainer_with_the_whole_budget_is_plain_training(llama: World) -> None:
    sent = llama.sent(4)
    plain = llama.train(sent, WAYS["lora"])
    whole = llama.train(sent, TrainingWay("greentrainer", flops_share=1.0))
    for name, pair in plain.factors.items():
        assert np.array_equal(pair.b, whole.factors[name].b)


def test_greentrainer_does_fewer_products_after_its_first_step(
    llama: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    passed: list[int] = []
    real = linear._frozen_gradient

    def count(gradients, parts, layers, dense):  # type: ignore[no-untyped-def]
        passed.append(len(layers))
        return real(gradients, parts, layers, dense)

    monkeypatch.setattr(linear, "_frozen_gradient", count)
    llama.train(llama.sent(4), WAYS["lora"])
    whole = sum(passed)
    passed.clear()
    llama.train(llama.sent(4), WAYS["greentrainer"])
    assert sum(passed) < 0.75 * whole


def test_greentrainer_waits_for_a_gradient_that_is_finite(
    llama: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []
    real = ways.importances

    def watched(*arguments, **named):  # type: ignore[no-untyped-def]
        found = None if not asked else real(*arguments, **named)
        asked.append(found is not None)
        return found

    monkeypatch.setattr(ways, "importances", watched)
    llama.train(llama.sent(4), WAYS["greentrainer"])
    assert asked == [False, True]


# ---------------------------------------------------------------- inputs


def test_inputs_of_layers_are_those_of_the_model_without_padding(world: World) -> None:
    names = world.names
    batch = batches(steps=1)[0]
    mounted = mount(world.backbone, world.sent(2), trainable=True)
    found = layer_inputs(world.backbone, names, batch, 2, world.task, PAD)
    one_by_one = [layer_inputs(world.backbone, names, [s], 1, world.task, PAD) for s in batch]
    unmount(world.backbone, mounted)
    tokens = sum(len(sample.tokens) for sample in batch)
    for name in names:
        assert found[name].shape == (tokens, world.backbone.layers[name].in_features)
        alone = torch.cat([each[name] for each in one_by_one])
        # Longest first within a batch, so compare without the order.
        torch.testing.assert_close(found[name].sum(dim=0), alone.sum(dim=0), rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(found[name].norm(), alone.norm(), rtol=1e-4, atol=0.0)


# ---------------------------------------------------------------- side by side


@pytest.mark.parametrize("key", ["decay", "allora"])
def test_ways_of_the_optimiser_are_the_same_side_by_side(llama: World, key: str) -> None:
    way = WAYS[key]
    assert way.shares_a_pass
    sent = [llama.sent(rank) for rank in (2, 4)]
    together = train_side_by_side(
        llama.backbone,
        [Share(batches(rank), s) for rank, s in zip((2, 4), sent, strict=True)],
        llama.plan(2),
        spec(way),
        pad_id=PAD,
    )
    for rank, s, beside in zip((2, 4), sent, together, strict=True):
        alone = llama.train(s, way, rank)
        for name, pair in alone.factors.items():
            assert np.array_equal(pair.b, beside.factors[name].b), name


@pytest.mark.parametrize("key", ["eva", "corda", "pissa", "s2ft", "greentrainer"])
def test_ways_that_choose_what_trains_go_alone(key: str) -> None:
    assert not WAYS[key].shares_a_pass


@pytest.mark.parametrize("key", ["s2ft-activation", "greentrainer"])
def test_no_stack_of_factors_outlives_a_choice_of_what_trains(llama: World, key: str) -> None:
    """It would go on keeping inputs, and making gradients, for what does not train any more."""
    llama.round(WAYS["lora"], 0)
    sent = llama.sent(20)
    mounted = mount(llama.backbone, sent, trainable=True)
    course = ways.Course(llama.backbone, mounted.factors, spec(WAYS[key]))
    batch = batches(steps=1)[0]
    course.begin(batch, 2, llama.task, PAD)
    if key == "greentrainer":
        accumulate(llama.backbone, batch, 2, llama.task, PAD)
        assert any(layer._stacked for layer in llama.backbone.layers.values())
        course.narrow()
    assert not any(layer._stacked for layer in llama.backbone.layers.values())
    unmount(llama.backbone, mounted)


@pytest.mark.parametrize("key", ["s2ft", "greentrainer"])
def test_ways_that_change_what_trains_are_not_recorded(llama: World, key: str) -> None:
    course = ways.Course(llama.backbone, {}, spec(WAYS[key]))
    assert not course.can_be_recorded("auto")
    with pytest.raises(ModelError, match=f"the steps of {key} cannot be recorded as CUDA graphs"):
        course.can_be_recorded("on")
    assert ways.Course(llama.backbone, {}, spec(WAYS["eva"])).can_be_recorded("on")
