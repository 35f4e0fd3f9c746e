"""The sums that a device gathers, against the dense gradients of a plain model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn

from fedtune.importance.collect import collecting
from fedtune.importance.sketch import signs
from fedtune.model.backbone import Backbone, BackboneShelf
from fedtune.model.load import load_base, module_path
from fedtune.model.loss import loss_sum, prepare
from fedtune.model.replace import linear_at, oriented
from fedtune.model.shapes import read_shapes
from fedtune.records import FormatName, MatrixForm, TaskName
from fedtune.train.round import set_checkpointing
from fedtune.wire.calibration import MeasuredMethod, calibration_shapes

SIZES: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 2,
}
GROUPED = SIZES | {"num_key_value_heads": 2, "head_dim": 8}
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**GROUPED),
    "qwen3": lambda: transformers.Qwen3Config(**GROUPED),
    "gemma": lambda: transformers.GemmaConfig(**GROUPED),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=99, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2
    ),
    "bert": lambda: transformers.BertConfig(**SIZES),
}
LABELS = ("a", "b", "c")
RANK, SEED = 3, 5


@dataclass(frozen=True)
class Sample:
    tokens: np.ndarray
    loss_mask: np.ndarray
    label: int


def samples(count: int = 5) -> list[Sample]:
    """Of unequal lengths, so that rows are padded where they are not packed."""
    rng = np.random.default_rng(0)
    found = []
    for i in range(count):
        tokens = rng.integers(3, 99, 6 + 5 * i).astype(np.int32)
        found.append(Sample(tokens, np.arange(len(tokens)) > 2, i % 3))
    return found


class Case:
    """A model of one architecture, as a backbone and as it is."""

    def __init__(self, name: str, folder: Path) -> None:
        self.folder = folder
        self.task: TaskName = "sequence-classification" if name == "bert" else "causal-lm"
        self.labels = LABELS if name == "bert" else ()
        torch.manual_seed(0)
        kind = transformers.AutoModel if name == "bert" else transformers.AutoModelForCausalLM
        kind.from_config(CONFIGS[name]()).save_pretrained(folder)
        self.shapes = read_shapes(folder, ("all-linear",))

    def backbone(self, form: FormatName = "fp32") -> Backbone:
        shelf = BackboneShelf(self.folder, torch.device("cpu"), keep_base=False)
        backbone = shelf.get(self.task, self.labels, dict.fromkeys(self.names, MatrixForm(form)))
        if self.labels:
            head = backbone.model.get_parameter("classifier.weight")
            with torch.no_grad():
                head.copy_(torch.randn(head.shape, generator=torch.Generator().manual_seed(1)))
        return backbone

    @property
    def names(self) -> list[str]:
        return [matrix.name for matrix in self.shapes.matrices]

    def plain(self) -> tuple[nn.Module, dict[str, Tensor]]:
        """The model without anything of ours, and its matrices (out, in) as its parameters are."""
        model = load_base(self.folder, self.task, self.labels)
        if self.labels:
            ours = self.backbone().model
            head = {n: p for n, p in ours.named_parameters() if n.startswith("classifier")}
            model.load_state_dict(head, strict=False)
        weights = {n: linear_at(model, module_path(n, model), n).weight for n in self.names}
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for weight in weights.values():
            weight.requires_grad_(True)
        return model, weights

    def oriented(self, name: str, values: Tensor, model: nn.Module) -> np.ndarray:
        return oriented(values, linear_at(model, module_path(name, model), name)).double().numpy()


@pytest.fixture(scope="module", params=CONFIGS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(request.param, tmp_path_factory.mktemp(request.param))


def gathered(
    case: Case,
    method: MeasuredMethod,
    passes: Sequence[Sequence[Sample]],
    backbone: Backbone | None = None,
    checkpointing: bool = False,
) -> dict[str, np.ndarray]:
    backbone = backbone or case.backbone()
    batches = [prepare(backbone.model, part, 2, case.task) for part in passes]
    set_checkpointing(backbone, checkpointing)
    with collecting(backbone, method, RANK, SEED) as collector:
        for batch in batches:
            collector.present = batch.present
            loss_sum(backbone.model, batch, case.task).total.backward()
        sums = collector.tensors()
    set_checkpointing(backbone, False)
    return sums


@pytest.fixture(scope="module")
def dense(case: Case) -> Callable[[Sequence[Sample]], dict[str, np.ndarray]]:
    """dL/dW (out, in) of every matrix by plain autograd, each sample alone, without padding."""
    model, weights = case.plain()

    def gradients(part: Sequence[Sample]) -> dict[str, np.ndarray]:
        model.zero_grad()
        for sample in part:
            tokens = torch.from_numpy(sample.tokens.astype(np.int64))[None]
            logits = model(input_ids=tokens).logits
            if case.labels:
                loss = nn.functional.cross_entropy(logits, torch.tensor([sample.label]))
            else:
                where = np.flatnonzero(sample.loss_mask[1:])
                targets = tokens[0, 1:][where]
                loss = nn.functional.cross_entropy(logits[0, where], targets, reduction="sum")
            loss.backward()
        return {
            name: case.oriented(name, weight.grad.clone(), model)  # type: ignore[union-attr]
            for name, weight in weights.items()
        }

    return gradients


PASSES = (samples()[3:], samples()[:3])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_sketches_are_those_of_the_dense_gradient(
    case: Case, dense: Any, checkpointing: bool
) -> None:
    found = gathered(case, "spectrum", PASSES, checkpointing=checkpointing)
    whole, backbone = dense(samples()), case.backbone()
    assert {n: v.shape for n, v in found.items()} == calibration_shapes(
        "spectrum", RANK, case.shapes.matrices
    )
    for name, g in whole.items():
        right, left = found[f"{name}.right"], found[f"{name}.left"]
        omega = signs(SEED, name, "right", g.shape[1], right.shape[1])
        psi = signs(SEED, name, "left", left.shape[0], g.shape[0])
        scale = np.abs(g).sum(axis=1).max()
        assert scale > 0
        w = backbone.layers[name].matrix.values(torch.float32)
        squares = len(PASSES) * float(w.square().sum())
        np.testing.assert_allclose(found[f"{name}.weight"], [squares], rtol=1e-4)
        np.testing.assert_allclose(right, g @ omega, atol=2e-5 * scale)
        np.testing.assert_allclose(left, psi @ g, atol=2e-5 * np.abs(g).sum(axis=0).max())


def test_sensitivity_is_the_sum_over_entries_and_passes(
    case: Case, dense: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedtune.importance import collect

    monkeypatch.setattr(collect, "PANEL_WEIGHTS", 5 * 32)  # several panels, the last one short
    found = gathered(case, "sensitivity", PASSES)
    model, weights = case.plain()
    parts = [dense(part) for part in PASSES]
    for name in case.names:
        w = case.oriented(name, weights[name].detach(), model)
        expected = sum(np.abs(w * g[name]).sum() for g in parts)
        np.testing.assert_allclose(found[f"{name}.sensitivity"], [expected], rtol=1e-4)


def test_scores_of_triplets_are_those_of_the_dense_gradient(
    case: Case, dense: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedtune.importance import collect

    # Random weights have singular values next to each other, which two passes do not tell apart.
    monkeypatch.setattr(collect, "_PASSES", 150)
    found = gathered(case, "adalora", PASSES)
    model, weights = case.plain()
    parts = [dense(part) for part in PASSES]
    for name in case.names:
        w = case.oriented(name, weights[name].detach(), model)
        u, sigma, vt = np.linalg.svd(w)
        scores = []
        for g in (part[name] for part in parts):
            of_left, of_right = g @ vt[:RANK].T, g.T @ u[:, :RANK]
            scores.append(
                sigma[:RANK]
                * (
                    np.abs((u[:, :RANK] * of_left).sum(axis=0))
                    + np.abs(u[:, :RANK] * of_left).mean(axis=0)
                    + np.abs(vt[:RANK].T * of_right).mean(axis=0)
                )
            )
        scale = sum(scores).max()
        np.testing.assert_allclose(found[f"{name}.score"], sum(scores), atol=0.02 * scale)


def test_inputs_are_counted_without_padding(case: Case) -> None:
    one_by_one = gathered(case, "activation", [[sample] for sample in samples()])
    together = gathered(case, "activation", PASSES)
    for name, value in together.items():
        np.testing.assert_allclose(value, one_by_one[name], rtol=1e-3, atol=1e-3)
    # 95 tokens: the norm's output has about unit variance in each of 32 inputs.
    assert one_by_one[f"{case.names[0]}.energy"][0] > 0


def test_padding_carries_no_gradient(case: Case) -> None:
    one_by_one = gathered(case, "spectrum", [[sample] for sample in samples()])
    together = gathered(case, "spectrum", [samples()])
    for name, value in together.items():
        if name.endswith(".weight"):
            continue  # counts passes
        scale = np.abs(value).max()
        np.testing.assert_allclose(value, one_by_one[name], atol=1e-4 * scale)


def test_nothing_is_left_on_the_layers(case: Case) -> None:
    backbone = case.backbone()
    gathered(case, "spectrum", PASSES, backbone)
    for layer in backbone.layers.values():
        assert layer.observe_gradient is None
        assert layer.factors is None


@pytest.mark.parametrize(
    ("method", "form"), [("spectrum", "nf4"), ("sensitivity", "int8"), ("adalora", "nf4")]
)
def test_a_quantised_backbone_gives_sums_near_those_of_the_base(
    case: Case, method: MeasuredMethod, form: FormatName
) -> None:
    exact = gathered(case, method, PASSES)
    near = gathered(case, method, PASSES, case.backbone(form))
    total = sum(float(np.square(v).sum()) for v in exact.values())
    apart = sum(float(np.square(near[n] - v).sum()) for n, v in exact.items())
    assert {n: v.shape for n, v in near.items()} == calibration_shapes(
        method, RANK, case.shapes.matrices
    )
    assert apart < 0.6 * total
