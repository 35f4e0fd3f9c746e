"""One round on one device: what must not change the result, and what must not be left behind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedtune.errors import ModelError, ProtocolError
from fedtune.lora import linear
from fedtune.lora.linear import AdaptedLinear
from fedtune.model.backbone import Backbone, BackboneShelf
from fedtune.model.load import dense_shapes, tensor_names
from fedtune.model.loss import LossSum, collate, loss_sum, loss_units
from fedtune.model.packing import packs
from fedtune.model.shapes import read_shapes
from fedtune.records import (
    BACKBONE_FORMATS,
    DevicePlan,
    Dispatch,
    FormatName,
    LoraFactors,
    MatrixForm,
    MatrixShape,
    TaskName,
)
from fedtune.train.compute import LossScale
from fedtune.train.memory import OptimizerMemory
from fedtune.train.round import RoundResult, mount, train_round, unmount
from fedtune.wire.messages import OptimizerSpec

CPU = torch.device("cpu")
LABELS = ("a", "b", "c")
SPEC = OptimizerSpec("adamw", 1e-2, 1e-2)
SCALE = 0.5
PAD = 2


@dataclass(frozen=True)
class Sample:
    tokens: NDArray[np.int32]
    loss_mask: NDArray[np.bool_]
    label: int = -1


def batches(steps: int = 2, size: int = 4, seed: int = 0) -> list[list[Sample]]:
    """Samples of unequal lengths."""
    rng = np.random.default_rng(seed)

    def sample() -> Sample:
        length = int(rng.integers(4, 24))
        tokens = rng.integers(3, 200, length).astype(np.int32)
        return Sample(tokens, np.arange(length) >= length // 3, int(rng.integers(3)))

    return [[sample() for _ in range(size)] for _ in range(steps)]


def plan(micro_batch: int = 4, checkpointing: bool = False) -> DevicePlan:
    return DevicePlan("site", (), micro_batch, 4, 32, 2, checkpointing=checkpointing)


class World:
    """A base and everything that is sent to devices that train on it."""

    def __init__(self, folder: Path, task: TaskName) -> None:
        self.task: TaskName = task
        self.labels = LABELS if task == "sequence-classification" else ()
        self.shapes = read_shapes(folder, ("all-linear",)).by_name()
        self.heads = dense_shapes(folder, task, tensor_names(folder))
        self._folder = folder

    def backbone(
        self, format_name: FormatName = "fp32", compute: torch.dtype = torch.float32
    ) -> Backbone:
        """A new one, which no other test has used."""
        shelf = BackboneShelf(self._folder, CPU, keep_base=False, compute=compute)
        return shelf.get(
            self.task, self.labels, dict.fromkeys(self.shapes, MatrixForm(format_name))
        )

    def dispatch(self, seed: int = 0, tail: int = 0, rank: int = 3) -> Dispatch:
        """Factors for every matrix; ranks differ from one matrix to the next."""
        rng = np.random.default_rng(seed)

        def pair(shape: MatrixShape, rank: int) -> LoraFactors:
            return LoraFactors(
                rng.normal(0, 0.2, (rank, shape.in_features)).astype(np.float32),
                rng.normal(0, 0.2, (shape.out_features, rank)).astype(np.float32),
                SCALE,
            )

        every = enumerate(self.shapes.items())
        trained = {name: pair(shape, rank + i % 2) for i, (name, shape) in every}
        tails = {name: pair(shape, tail) for name, shape in self.shapes.items() if tail}
        dense = {
            name: rng.normal(0, 0.1, [len(LABELS) if a == 0 else a for a in shape]).astype("f4")
            for name, shape in sorted(self.heads.items())
        }
        return Dispatch(trained, tails, dense)

    def train(
        self,
        backbone: Backbone,
        dispatch: Dispatch,
        steps: Sequence[Sequence[Sample]],
        plan: DevicePlan = plan(),  # noqa: B008  frozen
        spec: OptimizerSpec = SPEC,
        **options: Any,
    ) -> RoundResult:
        return train_round(
            backbone, steps, dispatch, plan, spec, task=self.task, pad_id=PAD, **options
        )

    def logits(self, backbone: Backbone) -> Tensor:
        with torch.no_grad():
            return backbone.model(input_ids=torch.arange(3, 30)[None]).logits  # type: ignore[no-any-return]


@pytest.fixture
def llama(tiny_llama: Path) -> World:
    return World(tiny_llama, "causal-lm")


@pytest.fixture(params=["causal-lm", "sequence-classification"])
def world(request: pytest.FixtureRequest, tiny_llama: Path, tiny_bert: Path) -> World:
    folder = tiny_llama if request.param == "causal-lm" else tiny_bert
    return World(folder, request.param)


def arrays(result: RoundResult) -> dict[str, NDArray[np.floating]]:
    found = {f"{n}.{side}": getattr(p, side) for n, p in result.factors.items() for side in "ab"}
    return found | dict(result.dense)


def sent_arrays(dispatch: Dispatch) -> dict[str, NDArray[np.floating]]:
    found = {f"{n}.{side}": getattr(p, side) for n, p in dispatch.trained.items() for side in "ab"}
    return found | dict(dispatch.dense)


def assert_same(one: RoundResult, other: RoundResult, atol: float = 0.0) -> None:
    assert one.losses == pytest.approx(other.losses, abs=atol)
    left, right = arrays(one), arrays(other)
    assert left.keys() == right.keys()
    for name, value in left.items():
        np.testing.assert_allclose(value, right[name], rtol=0, atol=atol, err_msg=name)


# ---------------------------------------------------------------- what changes nothing


@pytest.mark.parametrize("micro_batch", [1, 2])
def test_the_micro_batch_does_not_change_the_result(world: World, micro_batch: int) -> None:
    # SGD: AdamW's first step is the gradient's sign, which rounding can turn where it is near 0.
    spec = replace(SPEC, name="sgd", learning_rate=0.1, final_learning_rate=0.1)
    dispatch, steps = world.dispatch(tail=2), batches()
    whole = world.train(world.backbone(), dispatch, steps, plan(4), spec)
    parts = world.train(world.backbone(), dispatch, steps, plan(micro_batch), spec)
    assert_same(whole, parts, atol=2e-5)


def test_checkpointing_does_not_change_the_result(world: World) -> None:
    dispatch, steps = world.dispatch(tail=2), batches()
    kept = world.train(world.backbone(), dispatch, steps, plan())
    backbone = world.backbone()
    again = world.train(backbone, dispatch, steps, plan(checkpointing=True))
    assert_same(kept, again)
    assert not backbone.model.is_activation_checkpointing
    assert not any(module.training for module in backbone.model.modules())


def counted(function: Callable[..., Any], calls: list[Any]) -> Callable[..., Any]:
    """The function, which notes the arguments of its calls."""
    return lambda *arguments: (calls.append(arguments), function(*arguments))[1]


def test_checkpointing_recomputes_the_blocks(llama: World, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = []
    monkeypatch.setattr(linear, "_frozen_product", counted(linear._frozen_product, passes))
    counts = []
    for checkpointing in (False, True):
        backbone = llama.backbone()
        packs(backbone.model)  # which runs the model, the first time it is asked
        passes.clear()
        llama.train(backbone, llama.dispatch(), batches(1), plan(4, checkpointing))
        counts.append(len(passes))
    assert counts == [len(llama.shapes), 2 * len(llama.shapes)]


def test_the_first_steps_loss_is_that_of_the_whole_batch(world: World) -> None:
    backbone, dispatch, steps = world.backbone(), world.dispatch(tail=1), batches(1)
    result = world.train(backbone, dispatch, steps, plan(1))
    mounted = mount(backbone, dispatch, trainable=False)
    with torch.no_grad():
        whole = loss_sum(backbone.model, collate(steps[0], PAD, CPU), world.task)
    unmount(backbone, mounted)
    assert result.losses == pytest.approx([float(whole.total) / whole.units], rel=1e-5)


def test_two_devices_in_turn_on_one_backbone_are_each_as_if_alone(world: World) -> None:
    shared = world.backbone("nf4")
    for seed in (1, 2, 1):
        dispatch, steps = world.dispatch(seed, tail=seed), batches(seed=seed)
        alone = world.train(world.backbone("nf4"), dispatch, steps)
        assert_same(world.train(shared, dispatch, steps), alone)


def test_a_round_counts_its_samples_and_units(world: World) -> None:
    steps = batches(3)
    result = world.train(world.backbone(), world.dispatch(), steps)
    assert result.samples == 12
    assert result.units == sum(loss_units(step, world.task) for step in steps)
    assert len(result.losses) == 3
    assert result.seconds > 0


# ---------------------------------------------------------------- what is trained


def test_what_comes_back_has_the_sent_ranks_shapes_and_scale_and_is_new(world: World) -> None:
    dispatch = world.dispatch(tail=2)
    before = {name: pair.b.copy() for name, pair in dispatch.trained.items()}
    result = world.train(world.backbone(), dispatch, batches())
    assert result.factors.keys() == dispatch.trained.keys()
    assert result.dense.keys() == dispatch.dense.keys()
    for name, sent in dispatch.trained.items():
        back = result.factors[name]
        assert (back.a.shape, back.b.shape, back.scale) == (sent.a.shape, sent.b.shape, SCALE)
        assert back.a.dtype == back.b.dtype == np.float32
        assert np.abs(back.a - sent.a).max() > 1e-4
        assert np.abs(back.b - sent.b).max() > 1e-4
        np.testing.assert_array_equal(sent.b, before[name])
    for name, value in result.dense.items():
        assert np.abs(value - dispatch.dense[name]).max() > 1e-4


def test_the_tail_is_computed_with_and_not_trained(llama: World) -> None:
    backbone, dispatch = llama.backbone(), llama.dispatch(tail=2)
    bare = llama.logits(backbone)
    without = mount(backbone, replace(dispatch, tail={}), trainable=False)
    trained_only = llama.logits(backbone)
    unmount(backbone, without)
    mounted = mount(backbone, dispatch, trainable=True)
    assert not torch.allclose(llama.logits(backbone), trained_only, atol=1e-3)
    assert not torch.allclose(trained_only, bare, atol=1e-3)
    tails = [t for f in mounted.factors.values() for t in (f.tail_a, f.tail_b)]
    assert not any(tail.requires_grad for tail in tails)
    assert not {id(t) for t in tails} & {id(t) for t in mounted.trained().values()}
    assert len(mounted.trained()) == 2 * len(dispatch.trained)
    unmount(backbone, mounted)


def test_a_tail_alone_is_the_same_as_factors_that_are_not_trained(llama: World) -> None:
    backbone, sent = llama.backbone(), llama.dispatch().trained
    found = []
    for dispatch in (Dispatch(trained=sent), Dispatch(trained={}, tail=sent)):
        mounted = mount(backbone, dispatch, trainable=False)
        found.append(llama.logits(backbone))
        unmount(backbone, mounted)
    torch.testing.assert_close(*found)


def test_gradients_stop_below_the_first_trained_block(
    llama: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = llama.dispatch(tail=1)
    upper = {n: pair for n, pair in whole.trained.items() if llama.shapes[n].layer == 1}
    backbone = llama.backbone()
    lower = {id(layer) for n, layer in backbone.layers.items() if llama.shapes[n].layer == 0}
    recorded: list[tuple[object, ...]] = []
    monkeypatch.setattr(linear, "_frozen_gradient", counted(linear._frozen_gradient, recorded))
    for checkpointing in (False, True):
        recorded.clear()
        dispatch = replace(whole, trained=upper)
        result = llama.train(backbone, dispatch, batches(1), plan(4, checkpointing))
        assert result.factors.keys() == upper.keys()
        through = {
            id(layer)
            for arguments in recorded
            for values in arguments
            for layer in values
            if isinstance(layer, AdaptedLinear)
        }
        assert through
        assert not through & lower


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_first_trained_block_gets_an_input_without_a_graph(
    llama: World, checkpointing: bool
) -> None:
    whole, backbone = llama.dispatch(), llama.backbone()
    upper = {n: pair for n, pair in whole.trained.items() if llama.shapes[n].layer == 1}
    inputs: dict[int, bool] = {}
    for index, block in enumerate(backbone.model.base_model.layers):
        block.register_forward_pre_hook(
            lambda _, x, index=index: inputs.__setitem__(index, x[0].requires_grad)
        )
    backbone.model.base_model.norm.register_forward_pre_hook(
        lambda _, x: inputs.__setitem__(2, x[0].requires_grad)
    )
    llama.train(
        backbone, replace(whole, trained=upper), batches(1), plan(4, checkpointing=checkpointing)
    )
    assert inputs == {0: False, 1: False, 2: True}


def test_recomputed_blocks_may_keep_their_dense_matrices(
    llama: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    dispatch, steps = llama.dispatch(tail=2), batches()
    plain = llama.train(llama.backbone("q4"), dispatch, steps, plan(checkpointing=True))
    # As on an accelerator.
    always = property(lambda _: True, lambda *_: None)
    monkeypatch.setattr(AdaptedLinear, "keeps_values", always, raising=False)
    kept = llama.train(llama.backbone("q4"), dispatch, steps, plan(checkpointing=True))
    assert_same(plain, kept, atol=1e-5)


# ---------------------------------------------------------------- dtypes and the optimiser's state


@pytest.mark.parametrize("compute", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_narrow_dtype_trains_float32_factors_to_about_the_same(
    world: World, compute: torch.dtype, checkpointing: bool
) -> None:
    spec = replace(SPEC, name="sgd", learning_rate=0.1, final_learning_rate=0.1)
    dispatch, steps = world.dispatch(tail=2), batches()
    exact = world.train(world.backbone("q8"), dispatch, steps, plan(), spec)
    scale = LossScale() if compute == torch.float16 else None
    narrow = world.train(
        world.backbone("q8", compute), dispatch, steps, plan(checkpointing=checkpointing), spec,
        loss_scale=scale,
    )  # fmt: skip
    assert narrow.losses == pytest.approx(exact.losses, rel=2e-2)
    moves = [
        np.concatenate(
            [(value - start[name]).ravel() for name, value in sorted(arrays(result).items())]
        )
        for start in (sent_arrays(dispatch),)
        for result in (exact, narrow)
    ]
    assert all(value.dtype == np.float32 for value in arrays(narrow).values())
    cosine = moves[0] @ moves[1] / np.linalg.norm(moves[0]) / np.linalg.norm(moves[1])
    assert cosine > 0.99
    assert scale is None or scale.skipped == 0


def test_a_scale_that_is_too_large_skips_steps_and_leaves_the_factors(llama: World) -> None:
    dispatch, scale = llama.dispatch(), LossScale(value=2.0**60)
    result = llama.train(
        llama.backbone(compute=torch.float16), dispatch, batches(2), loss_scale=scale
    )
    assert (scale.skipped, scale.value) == (2, 2.0**58)
    for name, value in sent_arrays(dispatch).items():
        np.testing.assert_array_equal(arrays(result)[name], value)


def test_a_second_round_with_memory_is_not_one_without(world: World) -> None:
    memory, dispatch = OptimizerMemory(), world.dispatch()
    first = world.train(world.backbone(), dispatch, batches(), memory=memory)
    assert set(memory.squares) == {
        *(f"{name}.{side}" for name in dispatch.trained for side in "ab"),
        *(f"dense.{name}" for name in dispatch.dense),
    }
    assert_same(first, world.train(world.backbone(), dispatch, batches()))
    later = batches(1, seed=5) * 6
    with_memory = world.train(world.backbone(), dispatch, later, memory=memory)
    without = world.train(world.backbone(), dispatch, later)
    name = next(iter(dispatch.trained))
    assert np.abs(with_memory.factors[name].b - without.factors[name].b).max() > 1e-4
    assert with_memory.losses[-1] < with_memory.losses[0] - 0.05
    assert set(memory.steps.values()) == {8}


@pytest.mark.parametrize("format_name", BACKBONE_FORMATS)
def test_every_format_learns(world: World, format_name: FormatName) -> None:
    steps = batches(1) * 8
    result = world.train(world.backbone(format_name), world.dispatch(), steps)
    assert result.losses[-1] < result.losses[0] - 0.05


def test_a_step_tells_its_number_and_loss_and_may_end_the_round(llama: World) -> None:
    backbone, seen = llama.backbone(), []

    def stop(index: int, loss: float) -> None:
        seen.append((index, loss))
        if index == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_round(
            backbone, batches(3), llama.dispatch(), plan(checkpointing=True), SPEC,
            task="causal-lm", pad_id=PAD, after_step=stop,
        )  # fmt: skip
    assert [index for index, _ in seen] == [0, 1]
    assert_bare(backbone)


# ---------------------------------------------------------------- what is left behind


def assert_bare(backbone: Backbone) -> None:
    assert all(layer.factors is None for layer in backbone.layers.values())
    assert all(p.grad is None and not p.requires_grad for p in backbone.model.parameters())
    assert not backbone.model.is_activation_checkpointing
    assert not backbone.lock.locked()


def test_a_device_leaves_the_backbone_bare_and_frozen(world: World) -> None:
    backbone = world.backbone()
    before = {name: p.clone() for name, p in backbone.model.named_parameters()}
    logits = world.logits(backbone)
    dispatch = world.dispatch(tail=1)
    world.train(backbone, dispatch, batches(), plan(checkpointing=True))
    assert_bare(backbone)
    after = dict(backbone.model.named_parameters())
    changed = {name for name, p in before.items() if not torch.equal(p, after[name])}
    assert changed == set(dispatch.dense)  # whoever comes next sets these first
    if not dispatch.dense:
        torch.testing.assert_close(world.logits(backbone), logits, rtol=0, atol=0)


def test_a_round_that_breaks_off_between_micro_batches_leaves_no_gradients(
    tiny_bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world, calls = World(tiny_bert, "sequence-classification"), []

    def fail_at_the_second(*arguments: Any) -> LossSum:
        calls.append(arguments)
        if len(calls) == 2:
            raise MemoryError("no memory left")
        return loss_sum(*arguments)

    monkeypatch.setattr("fedtune.train.step.loss_sum", fail_at_the_second)
    backbone = world.backbone()
    with pytest.raises(MemoryError):
        world.train(backbone, world.dispatch(), batches(), plan(2, checkpointing=True))
    assert_bare(backbone)


def wrong(dispatch: Dispatch, case: str) -> Dispatch:
    name, pair = next(iter(dispatch.trained.items()))
    wide = LoraFactors(np.zeros((2, 5), np.float32), np.zeros((7, 2), np.float32))
    head = next(iter(dispatch.dense), "")
    return {
        "a matrix": lambda: replace(dispatch, trained={"ghost": pair}),
        "a tail's matrix": lambda: replace(dispatch, tail={"ghost": pair}),
        "a shape": lambda: replace(dispatch, trained={name: wide}),
        "a tail's shape": lambda: replace(dispatch, tail={name: wide}),
        "a head's shape": lambda: replace(dispatch, dense={head: np.zeros(1, np.float32)}),
    }[case]()


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("a matrix", "sent factors for ghost, which this backbone does not adapt"),
        ("a tail's matrix", "sent factors for ghost, which this backbone does not adapt"),
        ("a shape", r"sent factors for a 7x5 matrix, found \d+x\d+"),
        ("a tail's shape", r"sent factors for a 7x5 matrix, found \d+x\d+"),
        ("a head's shape", r"sent classifier\.bias of shape \(1,\), expected \(3,\)"),
    ],
)
def test_a_dispatch_that_does_not_fit_is_refused_and_leaves_nothing(
    tiny_bert: Path, case: str, words: str
) -> None:
    world = World(tiny_bert, "sequence-classification")
    backbone = world.backbone()
    with pytest.raises(ProtocolError, match=words):
        world.train(backbone, wrong(world.dispatch(), case), batches())
    assert_bare(backbone)


def test_a_dense_parameter_that_is_not_there_is_refused_and_leaves_nothing(llama: World) -> None:
    backbone = llama.backbone()
    dispatch = replace(llama.dispatch(), dense={"score.weight": np.zeros((3, 32), np.float32)})
    with pytest.raises(ModelError, match=r"LlamaForCausalLM has no parameter score\.weight"):
        llama.train(backbone, dispatch, batches())
    assert_bare(backbone)
