"""A round on a GPU is the round of the CPU, within what its dtype rounds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from fedtune.model.backbone import Backbone, BackboneShelf
from fedtune.model.shapes import read_shapes
from fedtune.records import DevicePlan, Dispatch, FormatName, LoraFactors, MatrixForm
from fedtune.train.compute import LossScale
from fedtune.train.round import RoundResult, train_round
from fedtune.train.side_by_side import Share, train_side_by_side
from fedtune.wire.messages import OptimizerSpec

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is at hand"),
]

ADAMW = OptimizerSpec("adamw", 1e-2, 1e-2)
PAD = 2


@dataclass(frozen=True)
class Sample:
    tokens: NDArray[np.int32]
    loss_mask: NDArray[np.bool_]
    label: int = -1


def batches(seed: int = 0, equal: bool = False) -> list[list[Sample]]:
    """Two steps of four samples, of unequal lengths unless asked otherwise."""
    rng = np.random.default_rng(seed)

    def sample() -> Sample:
        length = 16 if equal else int(rng.integers(4, 40))
        tokens = rng.integers(3, 200, length).astype(np.int32)
        return Sample(tokens, np.arange(length) >= length // 3)

    return [[sample() for _ in range(4)] for _ in range(2)]


class World:
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.shapes = read_shapes(folder, ("all-linear",)).by_name()

    def backbone(
        self, place: str, form: MatrixForm, compute: torch.dtype = torch.float32
    ) -> Backbone:
        shelf = BackboneShelf(self._folder, torch.device(place), keep_base=False, compute=compute)
        return shelf.get("causal-lm", (), dict.fromkeys(self.shapes, form))

    def dispatch(self, seed: int = 0) -> Dispatch:
        rng = np.random.default_rng(seed)

        def pairs(rank: int) -> dict[str, LoraFactors]:
            return {
                name: LoraFactors(
                    rng.normal(0, 0.2, (rank, shape.in_features)).astype(np.float32),
                    rng.normal(0, 0.2, (shape.out_features, rank)).astype(np.float32),
                    0.5,
                )
                for name, shape in self.shapes.items()
            }

        return Dispatch(pairs(3), pairs(2))


def train(
    backbone: Backbone,
    dispatch: Dispatch,
    steps: Sequence[Sequence[Sample]],
    *,
    checkpointing: bool = False,
    spec: OptimizerSpec = ADAMW,
    loss_scale: LossScale | None = None,
) -> RoundResult:
    plan = DevicePlan("site", (), 4, 4, 64, len(steps), checkpointing=checkpointing)
    return train_round(
        backbone, steps, dispatch, plan, spec, task="causal-lm", pad_id=PAD, loss_scale=loss_scale
    )


def distance(one: RoundResult, other: RoundResult, sent: Dispatch) -> float:
    """How far two rounds' changes lie apart, over the length of the first's; largest matrix."""

    def change(result: RoundResult, name: str) -> NDArray[np.floating]:
        return result.factors[name].product() - sent.trained[name].product()

    return max(
        float(np.linalg.norm(change(one, n) - change(other, n)) / np.linalg.norm(change(one, n)))
        for n in one.factors
    )


@pytest.fixture
def world(tiny_llama: Path) -> World:
    return World(tiny_llama)


@pytest.mark.parametrize("format_name", ["fp32", "int8", "q8", "q4", "nf4", "q3", "q2"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_float32_rounds_agree_with_the_cpu(
    world: World, format_name: FormatName, checkpointing: bool
) -> None:
    sent, form = world.dispatch(), MatrixForm(format_name)
    here = train(world.backbone("cpu", form), sent, batches())
    there = train(world.backbone("cuda", form), sent, batches(), checkpointing=checkpointing)
    assert there.losses == pytest.approx(here.losses, rel=1e-4)
    assert distance(here, there, sent) < 2e-2


def test_a_repaired_matrix_agrees_with_the_cpu(world: World) -> None:
    sent, form = world.dispatch(), MatrixForm("q2", 64, 4)
    here = train(world.backbone("cpu", form), sent, batches())
    there = train(world.backbone("cuda", form), sent, batches())
    assert there.losses == pytest.approx(here.losses, rel=1e-3)


@pytest.mark.parametrize("equal", [False, True])
def test_bfloat16_rounds_lie_near_the_cpus(world: World, equal: bool) -> None:
    sent, form = world.dispatch(), MatrixForm("q4")
    here = train(world.backbone("cpu", form), sent, batches(equal=equal))
    there = train(world.backbone("cuda", form, torch.bfloat16), sent, batches(equal=equal))
    assert there.losses == pytest.approx(here.losses, rel=2e-2)
    assert distance(here, there, sent) < 0.6


def test_float16_rounds_lie_near_the_cpus_under_a_loss_scale(world: World) -> None:
    sent, form = world.dispatch(), MatrixForm("q4")
    here = train(world.backbone("cpu", form), sent, batches())
    there = train(
        world.backbone("cuda", form, torch.float16), sent, batches(), loss_scale=LossScale()
    )
    assert there.losses == pytest.approx(here.losses, rel=1e-2)
    assert distance(here, there, sent) < 0.3


def test_moments_of_8_bits_can_be_paged(world: World) -> None:
    pytest.importorskip("bitsandbytes")
    sent, form = world.dispatch(), MatrixForm("q4")
    spec = OptimizerSpec("adamw-8bit", 1e-2, 1e-2)
    there = train(world.backbone("cuda", form), sent, batches(), spec=spec)
    here = train(world.backbone("cuda", form), sent, batches())
    assert there.losses == pytest.approx(here.losses, rel=1e-2)


def test_devices_side_by_side_get_what_they_get_alone(world: World) -> None:
    backbone = world.backbone("cuda", MatrixForm("q4"))
    shares = [Share(batches(seed), world.dispatch(seed)) for seed in range(3)]
    plan = DevicePlan("site", (), 4, 4, 64, 2)
    beside = train_side_by_side(backbone, shares, plan, ADAMW, pad_id=PAD)
    for share, result in zip(shares, beside, strict=True):
        alone = train(backbone, share.dispatch, share.batches)
        assert result.losses == pytest.approx(alone.losses, rel=1e-4)
        assert distance(alone, result, share.dispatch) < 2e-2
