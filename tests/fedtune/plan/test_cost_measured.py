"""The predicted peak against the allocations of a real round on a tiny model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from fedtune.aggregate.rules import make_rule
from fedtune.model.shapes import read_shapes
from fedtune.plan import cost
from fedtune.plan.cost import (
    backbone_bytes,
    form_bytes,
    load_of_plan,
    loading_bytes,
    peak_bytes,
)
from fedtune.records import (
    DevicePlan,
    FormatName,
    MatrixForm,
    MatrixPlan,
    MatrixShape,
    ModelShapes,
    TaskName,
)
from fedtune.wire.messages import OptimizerSpec

torch = pytest.importorskip("torch")


@dataclass(frozen=True)
class Sample:
    tokens: np.ndarray
    loss_mask: np.ndarray
    label: int = 0


@pytest.fixture(autouse=True)
def plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Predictions are those of plain torch, which every device can fall back to; C takes less."""
    from fedtune.kernels import dispatch

    for decided in ("_LAUNCHERS", "_NATIVE", "_WHY_TORCH"):
        monkeypatch.setattr(dispatch, decided, {})
    monkeypatch.setenv("FEDTUNE_KERNELS", "torch")


def measured_peak(run: Callable[[], object]) -> int:
    """Most bytes that tensors hold at once beyond those that were there before."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = np.cumsum([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())])
    return int(held.max())


@dataclass(frozen=True)
class Case:
    """A round on a model: `first` is the first trained layer."""

    format: FormatName
    micro_batch: int
    checkpointing: bool
    rank: int
    first: int = 0
    compute: torch.dtype = torch.float32
    task: TaskName = "causal-lm"
    targets: tuple[str, ...] = ("all-linear",)


def within_a_quarter(folder: Path, case: Case) -> None:
    """Whether the predicted peak of a round covers the measured one by no more than a quarter."""
    from fedtune.kernels.workspace import release_workspaces
    from fedtune.model.backbone import BackboneShelf
    from fedtune.model.packing import packs
    from fedtune.train.round import train_round

    shapes = read_shapes(folder, case.targets)
    matrices = tuple(
        MatrixPlan(m.name, case.rank if m.layer >= case.first else 0, case.format)
        for m in shapes.matrices
    )
    plan = DevicePlan("d", matrices, case.micro_batch, 4, 64, 2, case.checkpointing, case.first)
    forms = {m.name: MatrixForm(case.format) for m in shapes.matrices}
    rule = make_rule("delta", 32)
    sent = rule.dispatch(
        rule.start(shapes.matrices, {}), plan, scale=1.0, rng=np.random.default_rng(0)
    )
    rng = np.random.default_rng(0)
    batch = [
        Sample(rng.integers(0, shapes.vocabulary, 64).astype(np.int32), np.ones(64, np.bool_))
        for _ in range(4)
    ]
    labels = () if case.task == "causal-lm" else ("no", "yes")
    shelf = BackboneShelf(folder, torch.device("cpu"), keep_base=False, compute=case.compute)
    backbone = shelf.get(case.task, labels, forms)
    if case.task == "causal-lm":
        packs(backbone.model)  # tried once per model, and no part of a step
    release_workspaces()  # what another test left does not count as new

    measured = measured_peak(
        lambda: train_round(
            backbone, [batch, batch], sent, plan, OptimizerSpec(), task=case.task, pad_id=0
        )
    )
    load = load_of_plan(plan, shapes, task=case.task, itemsize=case.compute.itemsize)
    peak = peak_bytes(shapes, forms, load)
    predicted = peak.total - peak.backbone - peak.other
    assert backbone.packed_bytes == backbone_bytes(shapes, forms)
    assert measured <= predicted <= 1.25 * measured


@pytest.mark.parametrize(
    "case",
    [
        Case("fp32", 1, False, 4),
        Case("nf4", 4, False, 16),
        Case("int8", 4, False, 4, first=3),
        Case("q3", 1, False, 4),
        Case("fp32", 2, True, 16),
        Case("q4", 4, False, 8, compute=torch.bfloat16),
        Case("fp32", 4, True, 8, compute=torch.bfloat16),
        Case("fp32", 4, False, 8, task="sequence-classification"),
        Case("fp32", 4, False, 8, targets=("q_proj", "v_proj")),
    ],
    ids=str,
)
def test_the_predicted_peak_covers_the_measured_one_within_a_quarter(
    stories260k: Path, case: Case
) -> None:
    within_a_quarter(stories260k, case)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["qwen3", "gpt2", "gemma2", "phi3", "bert"])
def test_it_does_so_for_other_kinds_of_blocks(
    kind: str, checkpointing: bool, tmp_path: Path
) -> None:
    folder = random_model(kind, tmp_path)
    task: TaskName = "sequence-classification" if kind == "bert" else "causal-lm"
    within_a_quarter(folder, Case("fp32", 4, checkpointing, 8, task=task))


def random_model(kind: str, folder: Path) -> Path:
    """A small model of a kind whose blocks keep other things than Llama's."""
    import transformers

    sizes = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    sizes |= {"intermediate_size": 176, "vocab_size": 500, "max_position_embeddings": 256}
    if kind == "gpt2":
        sizes["n_inner"] = sizes.pop("intermediate_size")
    elif kind in ("qwen3", "gemma2"):
        sizes |= {"num_key_value_heads": 2, "head_dim": 16}
    names = {name: None for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = transformers.AutoConfig.for_model(kind, **sizes, **names)
    auto = (
        transformers.AutoModelForMaskedLM if kind == "bert" else transformers.AutoModelForCausalLM
    )
    auto.from_config(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("size", [(256, 512), (1024, 1024), (600, 1800)])
@pytest.mark.parametrize(
    "form",
    [MatrixForm("nf4", 64), MatrixForm("q3", 64), MatrixForm("q2", 64, 16)],
    ids=str,
)
def test_bringing_a_matrix_into_its_form_takes_what_is_said(
    size: tuple[int, int], form: MatrixForm
) -> None:
    from fedtune.quant.correction import store_corrected

    weight = torch.randn(size, generator=torch.Generator().manual_seed(0))
    matrix = MatrixShape("w", *size, 0)
    shapes = ModelShapes("", "llama", 8, 8, 1, 1, 8, (matrix,), 0)
    store_corrected(weight, form)  # tables are made once
    measured = measured_peak(lambda: store_corrected(weight, form))
    held = form_bytes(matrix, form)
    assert measured - held <= loading_bytes(shapes, {"w": form}) <= 1.8 * (measured - held)


def test_the_model_types_and_sizes_are_those_of_the_code_that_they_describe() -> None:
    from fedtune.kernels.unpack import CHUNK
    from fedtune.lora.linear import PANEL_WEIGHTS
    from fedtune.model.blocks import _FAMILIES
    from fedtune.model.head import chunk_rows
    from fedtune.quant.panels import PANEL_ROWS

    assert set(_FAMILIES) == cost.FUSED
    assert (cost.PANEL_WEIGHTS, cost.PANEL_ROWS) == (PANEL_WEIGHTS, PANEL_ROWS)
    assert cost.UNPACK_CHUNK == CHUNK
    for vocabulary in (500, 32_000, 1_000_000):
        assert cost.logit_rows(vocabulary, 4, False) == chunk_rows(vocabulary, 4, "cpu")
        assert cost.logit_rows(vocabulary, 2, True) == chunk_rows(vocabulary, 2, "cuda")
