"""Devices side by side get, bit for bit, what each of them gets alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from fedtune.errors import ModelError, ProtocolError
from fedtune.lora import linear
from fedtune.lora.linear import AdaptedLinear, FactorsSideBySide
from fedtune.model.backbone import Backbone, BackboneShelf
from fedtune.model.shapes import read_shapes
from fedtune.records import (
    DevicePlan,
    Dispatch,
    FormatName,
    LoraFactors,
    MatrixForm,
    MatrixShape,
)
from fedtune.train import side_by_side
from fedtune.train.memory import OptimizerMemory
from fedtune.train.round import RoundResult, train_round
from fedtune.train.side_by_side import Share, train_side_by_side
from fedtune.wire.messages import OptimizerSpec

SPEC = OptimizerSpec("adamw", 1e-2, 1e-2)
PAD = 2


@dataclass(frozen=True)
class Sample:
    tokens: NDArray[np.int32]
    loss_mask: NDArray[np.bool_]
    label: int = -1


def batches(seed: int, steps: int = 2, size: int = 4) -> list[list[Sample]]:
    """Samples of unequal lengths; every device has another number of tokens."""
    rng = np.random.default_rng(seed)

    def sample() -> Sample:
        length = int(rng.integers(3, 9 + 5 * seed))
        tokens = rng.integers(3, 200, length).astype(np.int32)
        return Sample(tokens, np.arange(length) >= length // 3)

    return [[sample() for _ in range(size)] for _ in range(steps)]


class World:
    """A base, and what devices of unequal ranks are sent."""

    def __init__(self, folder: Path, format_name: FormatName = "fp32") -> None:
        self.shapes = read_shapes(folder, ("all-linear",)).by_name()
        forms = {name: MatrixForm(format_name) for name in self.shapes}
        shelf = BackboneShelf(folder, torch.device("cpu"), keep_base=False)
        self.backbone: Backbone = shelf.get("causal-lm", (), forms)

    def dispatch(self, rank: int, tail: int, *, only: str = "") -> Dispatch:
        rng = np.random.default_rng(rank)

        def pair(shape: MatrixShape, rank: int) -> LoraFactors:
            a = rng.normal(0, 0.2, (rank, shape.in_features)).astype(np.float32)
            b = rng.normal(0, 0.2, (shape.out_features, rank)).astype(np.float32)
            return LoraFactors(a, b, 1.0 / rank)

        named = {name: shape for name, shape in self.shapes.items() if only in name}
        tails = {name: pair(shape, tail) for name, shape in named.items() if tail}
        return Dispatch({name: pair(shape, rank) for name, shape in named.items()}, tails)

    def shares(self) -> list[Share]:
        """Three devices: small, with a tail, and one that trains no more than one kind."""
        sent = (self.dispatch(1, 0), self.dispatch(5, 2), self.dispatch(3, 0, only="v_proj"))
        return [Share(batches(seed), dispatch) for seed, dispatch in enumerate(sent)]

    def alone(
        self,
        share: Share,
        plan: DevicePlan,
        memory: OptimizerMemory | None = None,
        spec: OptimizerSpec = SPEC,
    ) -> RoundResult:
        return train_round(
            self.backbone,
            share.batches,
            share.dispatch,
            plan,
            spec,
            task="causal-lm",
            pad_id=PAD,
            memory=memory,
        )

    def beside(
        self, shares: Sequence[Share], plan: DevicePlan, spec: OptimizerSpec = SPEC
    ) -> list[RoundResult]:
        return train_side_by_side(self.backbone, shares, plan, spec, pad_id=PAD)


def plan(micro_batch: int = 4, checkpointing: bool = False) -> DevicePlan:
    return DevicePlan("site", (), micro_batch, 4, 64, 2, checkpointing=checkpointing)


def assert_same(one: RoundResult, other: RoundResult) -> None:
    assert (one.losses, one.samples, one.units) == (other.losses, other.samples, other.units)
    assert one.factors.keys() == other.factors.keys()
    for name, factors in one.factors.items():
        np.testing.assert_array_equal(factors.a, other.factors[name].a, err_msg=name)
        np.testing.assert_array_equal(factors.b, other.factors[name].b, err_msg=name)
        assert factors.scale == other.factors[name].scale


@pytest.mark.parametrize("format_name", ["fp32", "int8", "q4", "q2"])
@pytest.mark.parametrize(
    "cut", [plan(), plan(micro_batch=2), plan(checkpointing=True)], ids=["whole", "micro", "check"]
)
def test_every_device_gets_the_bits_that_it_gets_alone(
    tiny_llama: Path, format_name: FormatName, cut: DevicePlan
) -> None:
    world = World(tiny_llama, format_name)
    shares = world.shares()
    together = world.beside(shares, cut)
    for share, result in zip(shares, together, strict=True):
        assert_same(result, world.alone(share, cut))


def test_the_bits_are_the_same_on_a_trained_model_too(stories260k: Path) -> None:
    world = World(stories260k, "q3")
    shares = [Share(batches(k, size=4), world.dispatch(2 + k, k)) for k in range(5)]
    for share, result in zip(shares, world.beside(shares, plan()), strict=True):
        assert_same(result, world.alone(share, plan()))


def test_a_pull_to_the_start_leaves_the_bits_the_same(tiny_llama: Path) -> None:
    world, pulled = World(tiny_llama), replace(SPEC, proximal=10.0)
    shares = world.shares()
    for share, result in zip(shares, world.beside(shares, plan(), pulled), strict=True):
        assert_same(result, world.alone(share, plan(), spec=pulled))
        free = world.alone(share, plan())
        name = next(iter(free.factors))
        assert not np.array_equal(result.factors[name].b, free.factors[name].b)


def test_a_device_is_trained_on_its_own_samples_only(tiny_llama: Path) -> None:
    world = World(tiny_llama)
    shares = world.shares()
    other = [shares[0], Share(batches(9), shares[1].dispatch), shares[2]]
    one, two = world.beside(shares, plan()), world.beside(other, plan())
    assert_same(one[0], two[0])
    assert_same(one[2], two[2])
    assert one[1].losses != two[1].losses


def test_the_backbone_is_bare_afterwards(tiny_llama: Path) -> None:
    world = World(tiny_llama)
    world.beside(world.shares(), plan())
    assert all(layer.factors is None for layer in world.backbone.layers.values())
    world.beside(world.shares()[:1], plan(checkpointing=True))
    assert not world.backbone.model.is_activation_checkpointing


def test_each_device_keeps_its_own_optimiser_state(tiny_llama: Path) -> None:
    world = World(tiny_llama)
    apart = [OptimizerMemory(), OptimizerMemory(), OptimizerMemory()]
    beside = [OptimizerMemory(), OptimizerMemory(), OptimizerMemory()]
    for _ in range(2):
        shares = world.shares()
        alone = [world.alone(s, plan(), m) for s, m in zip(shares, apart, strict=True)]
        remembering = [Share(s.batches, s.dispatch, m) for s, m in zip(shares, beside, strict=True)]
        for one, other in zip(alone, world.beside(remembering, plan()), strict=True):
            assert_same(one, other)
    assert all(memory.squares for memory in beside)


def test_a_dispatch_that_does_not_fit_leaves_the_backbone_bare(tiny_llama: Path) -> None:
    world = World(tiny_llama)
    share = world.shares()[0]
    (name, factors), *_ = share.dispatch.trained.items()
    wrong = Share(share.batches, Dispatch({name: LoraFactors(factors.a[:, :-1], factors.b)}))
    with pytest.raises(ProtocolError, match="the coordinator sent factors for a"):
        world.beside([share, wrong], plan())
    assert all(layer.factors is None for layer in world.backbone.layers.values())
    assert world.backbone.lock.acquire(blocking=False)


def test_layers_without_factors_of_any_device_stay_frozen(tiny_llama: Path) -> None:
    world = World(tiny_llama)
    share = Share(batches(0), world.dispatch(2, 0, only="v_proj"))
    seen: list[AdaptedLinear] = []

    def look(layer: AdaptedLinear, _: object) -> None:
        seen.extend([layer] if isinstance(layer.factors, FactorsSideBySide) else [])

    handles = [m.register_forward_pre_hook(look) for m in world.backbone.layers.values()]
    (result,) = world.beside([share], plan())
    for handle in handles:
        handle.remove()
    assert set(result.factors) == {name for name in world.shapes if "v_proj" in name}


def test_a_model_that_does_not_pack_is_refused_before_anything_is_attached(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(tiny_llama)
    monkeypatch.setattr(side_by_side, "sums_together", lambda _: False)
    with pytest.raises(ModelError, match="train them one by one"):
        world.beside(world.shares()[:2], plan())
    assert all(layer.factors is None for layer in world.backbone.layers.values())


@pytest.mark.parametrize("cut", [plan(), plan(checkpointing=True)], ids=["whole", "check"])
def test_in_one_launch_every_device_gets_what_it_gets_alone_but_for_rounding(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, cut: DevicePlan
) -> None:
    world = World(tiny_llama, "q4")
    shares = world.shares()
    alone = [world.alone(share, cut) for share in shares]
    monkeypatch.setattr(linear, "_in_one_launch", lambda rows: True)
    for one, other in zip(alone, world.beside(shares, cut), strict=True):
        assert one.losses == pytest.approx(other.losses, rel=1e-5)
        assert one.factors.keys() == other.factors.keys()
        for name, factors in one.factors.items():
            np.testing.assert_allclose(factors.a, other.factors[name].a, atol=2e-4, err_msg=name)
            np.testing.assert_allclose(factors.b, other.factors[name].b, atol=2e-4, err_msg=name)
