"""A recorded step has the loss and the gradients of the plain one.

What needs no GPU is the static form that is recorded: here it is computed without a recording.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from fedtune.errors import ModelError
from fedtune.kernels.workspace import release_workspaces, workspace, workspaces_taken
from fedtune.lora.linear import Factors, attach
from fedtune.model.backbone import Backbone, BackboneShelf
from fedtune.model.shapes import read_shapes
from fedtune.records import DevicePlan, Dispatch, GraphUse, LoraFactors, MatrixForm
from fedtune.train.form import Form, fill, form_of
from fedtune.train.graph import (
    StaticStep,
    StepGraphs,
    forget_graphs,
    step_graphs,
    why_not,
)
from fedtune.train.optimizer import RoundOptimizer
from fedtune.train.round import RoundResult, set_checkpointing, train_round, trained_tensors
from fedtune.train.step import accumulate
from fedtune.wire.messages import OptimizerSpec

CPU = torch.device("cpu")
PAD = 2
ADAMW = OptimizerSpec("adamw", 1e-2, 1e-2)


@dataclass(frozen=True)
class Sample:
    tokens: NDArray[np.int32]
    loss_mask: NDArray[np.bool_]
    label: int = -1


def samples(*lengths: int, prompt: int = 3, seed: int = 0) -> list[Sample]:
    """The first 1/prompt of each has no loss; a prompt of 0 leaves all with loss."""
    rng = np.random.default_rng(seed)
    return [
        Sample(
            rng.integers(3, 200, n).astype(np.int32),
            np.arange(n) >= (n // prompt if prompt else 0),
        )
        for n in lengths
    ]


def load(folder: Path, place: str, dtype: torch.dtype, matrix: MatrixForm) -> Backbone:
    shapes = read_shapes(folder, ("all-linear",)).by_name()
    shelf = BackboneShelf(folder, torch.device(place), keep_base=False, compute=dtype)
    return shelf.get("causal-lm", (), dict.fromkeys(shapes, matrix))


def factors_of(backbone: Backbone, rank: int = 2, seed: int = 0) -> dict[str, Factors]:
    generator = torch.Generator().manual_seed(seed)
    device = backbone.model.device

    def values(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).mul_(0.2).to(device)

    return {
        name: Factors(
            values(rank, layer.in_features).requires_grad_(),
            values(layer.out_features, rank).requires_grad_(),
            values(1, layer.in_features),
            values(layer.out_features, 1),
            0.5,
        )
        for name, layer in backbone.layers.items()
    }


def plainly(backbone: Backbone, batch: Sequence[Sample], micro_batch: int = 100) -> float:
    return accumulate(backbone, batch, micro_batch, "causal-lm", PAD)


def gradients(factors: dict[str, Factors]) -> list[torch.Tensor]:
    """Of every factor; they are set to zero."""
    found = []
    for tensor in trained_tensors(factors).values():
        assert tensor.grad is not None
        found.append(tensor.grad.clone())
        tensor.grad.zero_()
    return found


@pytest.fixture
def backbone(tiny_llama: Path) -> Backbone:
    return load(tiny_llama, "cpu", torch.float32, MatrixForm("fp32"))


# ---------------------------------------------------------------- forms


@pytest.mark.parametrize(
    ("lengths", "form"),
    [
        ((512,), Form(512, 1, 512, 512)),  # powers of two are filled up by nothing
        ((8192,), Form(8192, 1, 8192, 8192)),
        ((10,), Form(64, 2, 64, 16)),  # nine rows with loss, in eighths of the tokens
        ((300, 250), Form(576, 3, 512, 576)),  # 550 in steps of 64
        ((2000, 100), Form(2304, 3, 2048, 2304)),  # 2100 in steps of 256
    ],
)
def test_a_form_is_the_next_eighth_of_a_power_of_two(lengths: tuple[int, ...], form: Form) -> None:
    assert form_of(samples(*lengths, prompt=0)) == form


def test_no_segment_is_longer_than_the_form_says() -> None:
    rng = np.random.default_rng(0)
    for count in range(1, 40):
        batch = samples(*map(int, rng.integers(1, 300, count)), prompt=2)
        form = form_of(batch)
        lengths = fill(torch.empty(form.words, dtype=torch.int64), batch, form, PAD, 1.0)
        assert max(lengths) <= form.longest <= form.tokens
        assert (sum(lengths), len(lengths)) == (form.tokens, form.segments)
        assert sum(int(s.loss_mask[1:].sum()) for s in batch) <= form.rows


def test_like_batches_share_a_form() -> None:
    forms = {form_of(samples(100, 100 + extra, prompt=2)) for extra in range(1, 50)}
    assert len(forms) <= 3


@pytest.mark.parametrize("lengths", [(5, 17, 9, 24), (64,), (1, 30), (40, 40, 48), (63, 1)])
@pytest.mark.parametrize("prompt", [0, 2])
def test_a_filled_form_has_the_loss_and_the_gradients_of_its_samples(
    backbone: Backbone, lengths: tuple[int, ...], prompt: int
) -> None:
    batch, factors = samples(*lengths, prompt=prompt), factors_of(backbone)
    attach(backbone.layers, factors)
    units = sum(int(s.loss_mask[1:].sum()) for s in batch)
    right = plainly(backbone, batch)
    expected = gradients(factors)
    trained, form = list(trained_tensors(factors).values()), form_of(batch)
    step = StaticStep(form, trained)
    where = fill(step.buffer, batch, form, PAD, 1.0 / units)
    for _ in range(2):
        loss = step.add(backbone, where)
        assert float(loss) / units == pytest.approx(right, rel=1e-5)
    for found, once in zip(gradients(factors), expected, strict=True):
        torch.testing.assert_close(found, 2 * once, rtol=1e-4, atol=1e-6)


def test_padding_tokens_change_no_bit_of_the_gradients(backbone: Backbone) -> None:
    batch, factors = samples(30, 20), factors_of(backbone)
    attach(backbone.layers, factors)
    form, found = form_of(batch), []
    for pad_id in (2, 77):
        step = StaticStep(form, list(trained_tensors(factors).values()))
        where = fill(step.buffer, batch, form, pad_id, 1.0)
        trained_ = trained_tensors(factors).values()
        for tensor in trained_:
            tensor.grad = torch.zeros_like(tensor)
        step.add(backbone, where)
        found.append(gradients(factors))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


# ---------------------------------------------------------------- what is refused


def test_a_model_is_not_recorded_on_a_cpu_or_in_float32(
    backbone: Backbone, tiny_llama: Path
) -> None:
    assert why_not(backbone, "causal-lm") == "it computes in float32"
    halves = load(tiny_llama, "cpu", torch.bfloat16, MatrixForm("nf4"))
    assert why_not(halves, "causal-lm") == "it is on cpu"


def test_what_cannot_be_recorded_is_named(backbone: Backbone) -> None:
    assert "language modelling" in (why_not(backbone, "sequence-classification") or "")
    set_checkpointing(backbone, True)
    assert why_not(backbone, "causal-lm") == "activations are recomputed"
    set_checkpointing(backbone, False)
    weight = backbone.model.base_model.norm.weight.requires_grad_()
    assert why_not(backbone, "causal-lm") == "parameters of the model itself are trained"
    weight.requires_grad_(False)
    backbone.model.base_model.rotary_emb.rope_type = "dynamic"
    assert "positions' values" in (why_not(backbone, "causal-lm") or "")
    hook = backbone.model.base_model.layers[0].register_forward_hook(lambda *_: None)
    assert "fused blocks" in (why_not(backbone, "causal-lm") or "")
    hook.remove()


def test_on_refuses_and_auto_goes_without(backbone: Backbone) -> None:
    factors = factors_of(backbone)
    assert step_graphs(backbone, factors, "causal-lm", "off") is None
    assert step_graphs(backbone, factors, "causal-lm", "auto") is None
    with pytest.raises(ModelError, match=r"it computes in float32; set train\.cuda_graph"):
        step_graphs(backbone, factors, "causal-lm", "on")


# ---------------------------------------------------------------- around the recording


def test_a_round_takes_the_place_of_one_whose_factors_have_its_shapes(backbone: Backbone) -> None:
    first, second = factors_of(backbone), factors_of(backbone, seed=1)
    graphs = StepGraphs(first, at_once=True)
    places = [t.data_ptr() for t in trained_tensors(first).values()]
    for tensor in trained_tensors(first).values():
        assert tensor.grad is not None
        tensor.grad.fill_(1.0)
    assert graphs.take(second)
    held = trained_tensors(graphs.factors)
    assert [t.data_ptr() for t in held.values()] == places
    for name, tensor in trained_tensors(second).items():
        assert torch.equal(held[name], tensor)
        gradient = held[name].grad
        assert gradient is not None
        assert not gradient.any()
    assert not graphs.take(factors_of(backbone, rank=3))
    name = next(iter(second))
    assert not graphs.take({k: v for k, v in second.items() if k != name})


def test_an_optimiser_may_keep_the_gradients_where_they_are(backbone: Backbone) -> None:
    factors = factors_of(backbone)
    graphs = StepGraphs(factors, at_once=True)
    held = trained_tensors(graphs.factors)
    places = [t.grad.data_ptr() for t in held.values() if t.grad is not None]
    stepper = RoundOptimizer(held, ADAMW, 1, keeps_gradients=True)
    attach(backbone.layers, graphs.factors)
    plainly(backbone, samples(9, 12))
    assert all(t.grad is not None and t.grad.any() for t in held.values())
    stepper.step()
    assert [t.grad.data_ptr() for t in held.values() if t.grad is not None] == places
    assert not any(t.grad.any() for t in held.values() if t.grad is not None)


def test_buffers_that_were_given_out_are_kept_by_who_asked_for_them() -> None:
    release_workspaces()
    with workspaces_taken() as taken:
        first = workspace(8, torch.float32, CPU).fill_(3.0)
    workspace(1 << 20, torch.float32, CPU).fill_(1.0)  # replaces the buffer
    assert [t.data_ptr() for t in taken] == [first.data_ptr()]
    assert torch.equal(taken[0], torch.full((8,), 3.0))
    release_workspaces()


# ---------------------------------------------------------------- the recording

on_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is at hand"),
]


def gpu(test):  # type: ignore[no-untyped-def]  # pytest's decorators
    for mark in on_gpu:
        test = mark(test)
    return test


def near(found: Sequence[torch.Tensor], right: Sequence[torch.Tensor]) -> None:
    """Both round to bfloat16 at the same places; sums are in another order."""
    for one, other in zip(found, right, strict=True):
        assert float((one - other).norm()) <= 5e-2 * float(other.norm()) + 1e-6


STEPS = [
    samples(100, 90, 17, 33, seed=1),
    samples(64, 64, 64, 64, prompt=0, seed=2),
    samples(100, 90, 18, 33, seed=3),
    samples(512, prompt=0, seed=4),
    samples(60, 64, 60, 64, prompt=0, seed=5),
]


@gpu
@pytest.mark.parametrize("matrix", ["nf4", "q3", "int8", "bf16"])
@pytest.mark.parametrize("micro_batch", [2, 4])
def test_replays_have_the_gradients_of_plain_steps(
    tiny_llama: Path, matrix: str, micro_batch: int
) -> None:
    backbone = load(tiny_llama, "cuda", torch.bfloat16, MatrixForm(matrix))  # type: ignore[arg-type]
    plain = factors_of(backbone)
    graphs = step_graphs(backbone, factors_of(backbone), "causal-lm", "on")
    assert graphs is not None
    stepper = RoundOptimizer(
        trained_tensors(graphs.factors), ADAMW, len(STEPS), keeps_gradients=True
    )
    for batch in [*STEPS, *STEPS]:
        attach(backbone.layers, graphs.factors)
        loss = accumulate(backbone, batch, micro_batch, "causal-lm", PAD, graphs=graphs)
        found = [t.grad.clone() for t in trained_tensors(graphs.factors).values()]  # type: ignore[union-attr]
        with torch.no_grad():  # the same factors, elsewhere
            pairs = zip(
                trained_tensors(plain).values(),
                trained_tensors(graphs.factors).values(),
                strict=True,
            )
            for into, value in pairs:
                into.copy_(value)
        attach(backbone.layers, plain)
        assert loss == pytest.approx(plainly(backbone, batch, micro_batch), rel=5e-3)
        near(found, gradients(plain))
        stepper.step()  # replays must see the factors that it leaves
    assert graphs.forms
    forget_graphs(backbone)


@gpu
def test_the_oldest_graph_goes_and_is_recorded_again(tiny_llama: Path) -> None:
    backbone = load(tiny_llama, "cuda", torch.bfloat16, MatrixForm("nf4"))
    graphs, plain = StepGraphs(factors_of(backbone), at_once=True, most=2), factors_of(backbone)
    for length in (64, 128, 256, 64, 256, 128):
        batch = samples(length, prompt=0, seed=length)
        attach(backbone.layers, graphs.factors)
        loss = accumulate(backbone, batch, 1, "causal-lm", PAD, graphs=graphs)
        found = gradients(graphs.factors)
        attach(backbone.layers, plain)
        assert loss == pytest.approx(plainly(backbone, batch), rel=5e-3)
        near(found, gradients(plain))
    assert [form.tokens for form in graphs.forms] == [256, 128]


@gpu
def test_auto_records_a_form_when_it_comes_again(tiny_llama: Path) -> None:
    backbone = load(tiny_llama, "cuda", torch.bfloat16, MatrixForm("nf4"))
    graphs = step_graphs(backbone, factors_of(backbone), "causal-lm", "auto")
    assert graphs is not None
    batch = samples(20, 30)
    losses = []
    for recorded in (0, 1, 1):
        losses.append(accumulate(backbone, batch, 2, "causal-lm", PAD, graphs=graphs))
        assert len(graphs.forms) == recorded
    assert losses == pytest.approx([losses[0]] * 3, rel=5e-3)
    forget_graphs(backbone)


@gpu
@pytest.mark.parametrize("proximal", [0.0, 1.0])
@pytest.mark.parametrize("use", ["auto", "on"])
def test_rounds_with_graphs_are_near_rounds_without(
    tiny_llama: Path, use: GraphUse, proximal: float
) -> None:
    backbone = load(tiny_llama, "cuda", torch.bfloat16, MatrixForm("nf4"))
    for seed in (0, 1):  # the second round uses the graphs of the first
        sent = {
            name: LoraFactors(f.a.detach().cpu().numpy(), f.b.detach().cpu().numpy(), f.scale)
            for name, f in factors_of(backbone, seed=seed).items()
        }

        def run(cuda_graph: GraphUse, sent: dict[str, LoraFactors] = sent) -> RoundResult:
            plan = DevicePlan("site", (), 4, 4, 64, len(STEPS))
            return train_round(
                backbone,
                STEPS,
                Dispatch(sent),
                plan,
                replace(ADAMW, proximal=proximal),
                task="causal-lm",
                pad_id=PAD,
                cuda_graph=cuda_graph,
            )

        assert run(use).losses == pytest.approx(run("off").losses, rel=2e-2)
    forget_graphs(backbone)
