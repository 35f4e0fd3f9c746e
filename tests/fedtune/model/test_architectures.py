"""Every architecture is streamed, adapted and merged as transformers itself would load it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn

from fedtune.errors import ModelError
from fedtune.export.merge import write_merged
from fedtune.lora.linear import Factors, attach
from fedtune.model.backbone import Backbone, BackboneShelf
from fedtune.model.load import auto_class, load_base
from fedtune.model.replace import coverage
from fedtune.model.shapes import read_shapes
from fedtune.model.stream import BaseTensors, put, stream_base
from fedtune.records import FormatName, GlobalAdapter, LowRank, MatrixForm, TaskName

SIZES: dict[str, Any] = {  # Any: arguments of configs
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
GROUPED = SIZES | {"num_key_value_heads": 2, "head_dim": 8}
GPT2: dict[str, Any] = {
    "vocab_size": 99,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 128,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
# Name -> (config, matrices in a block)
CONFIGS: dict[str, tuple[Callable[[], transformers.PreTrainedConfig], int]] = {
    "llama": (lambda: transformers.LlamaConfig(**GROUPED), 7),
    "llama-tied": (lambda: transformers.LlamaConfig(**GROUPED, tie_word_embeddings=True), 7),
    "llama-biased": (lambda: transformers.LlamaConfig(**GROUPED, attention_bias=True), 7),
    "mistral": (lambda: transformers.MistralConfig(**GROUPED), 7),
    "qwen2": (lambda: transformers.Qwen2Config(**GROUPED, tie_word_embeddings=True), 7),
    "qwen3": (lambda: transformers.Qwen3Config(**GROUPED), 7),
    "gemma": (lambda: transformers.GemmaConfig(**GROUPED), 7),
    "gemma2": (lambda: transformers.Gemma2Config(**GROUPED), 7),
    "gemma3": (lambda: transformers.Gemma3TextConfig(**GROUPED), 7),
    "phi": (lambda: transformers.PhiConfig(**SIZES), 6),
    "phi3": (lambda: transformers.Phi3Config(**SIZES), 4),
    "gpt2": (lambda: transformers.GPT2Config(**GPT2), 4),
    "bert": (lambda: transformers.BertConfig(**SIZES), 6),
    "roberta": (lambda: transformers.RobertaConfig(**SIZES), 6),
}
LABELS = ("a", "b", "c")
TOKENS = torch.arange(3, 40)[None]
CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=CONFIGS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(request.param, tmp_path_factory.mktemp(request.param))


class Case:
    """A folder of one architecture: a language model, or an encoder without a head."""

    def __init__(self, name: str, folder: Path) -> None:
        self.folder = folder
        config, self.matrices_in_block = CONFIGS[name]
        self.task: TaskName = "causal-lm"
        self.labels: tuple[str, ...] = ()
        kind = transformers.AutoModelForCausalLM
        if name in ("bert", "roberta"):
            self.task, self.labels = "sequence-classification", LABELS
            kind = transformers.AutoModel
        torch.manual_seed(0)
        model = kind.from_config(config())
        with torch.no_grad():
            for path, parameter in model.named_parameters():
                if path.endswith("bias"):  # zero by default, which would hide that it is lost
                    parameter.normal_()
        model.save_pretrained(folder, max_shard_size="40kB")

    def forms(self, name: FormatName) -> dict[str, MatrixForm]:
        shapes = read_shapes(self.folder, ("all-linear",))
        return {matrix.name: MatrixForm(name) for matrix in shapes.matrices}

    def untouched(self) -> nn.Module:
        """The model as transformers loads it, with the head that streaming draws."""
        model = load_base(self.folder, self.task, self.labels)
        if self.task == "sequence-classification":
            streamed = stream_base(
                self.folder, BaseTensors(self.folder), self.task, self.labels, ()
            ).model
            head = {n: p for n, p in streamed.named_parameters() if n.startswith("classifier")}
            model.load_state_dict(head, strict=False)
        return model

    def backbone(self, name: FormatName) -> Backbone:
        shelf = BackboneShelf(self.folder, CPU, keep_base=False)
        return shelf.get(self.task, self.labels, self.forms(name))


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=TOKENS).logits
    return found


def test_a_streamed_base_is_to_the_bit_what_transformers_loads(case: Case) -> None:
    tensors = BaseTensors(case.folder)
    forms = case.forms("fp32")
    skeleton = stream_base(case.folder, tensors, case.task, case.labels, forms)
    assert (skeleton.lost, skeleton.places.keys()) == ((), forms.keys())
    for name, path in skeleton.places.items():
        assert skeleton.model.get_submodule(path).weight.untyped_storage().nbytes() == 4
        put(skeleton.model, path, tensors.read(f"{name}.weight"))
    expected = case.untouched()
    assert type(skeleton.model) is type(expected)
    assert torch.equal(logits(skeleton.model), logits(expected))
    theirs = dict(expected.named_buffers())
    ours = dict(skeleton.model.named_buffers())
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_tied_embeddings_are_one_tensor(case: Case) -> None:
    model = case.backbone("fp32").model
    tied = case.untouched().all_tied_weights_keys
    for one, other in tied.items():
        assert model.get_parameter(one) is model.get_parameter(other)


def test_an_adapted_model_computes_what_the_untouched_one_does(case: Case) -> None:
    backbone = case.backbone("fp32")
    assert len(backbone.layers) == 2 * case.matrices_in_block
    assert len(coverage(backbone.model).adapted) == len(backbone.layers)
    torch.testing.assert_close(
        logits(backbone.model), logits(case.untouched()), rtol=1e-4, atol=1e-4
    )


def test_a_quantised_model_has_gradients_in_every_adapted_layer(case: Case) -> None:
    backbone = case.backbone("nf4")
    generator = torch.Generator().manual_seed(0)
    factors = {}
    for name, layer in backbone.layers.items():
        a = torch.randn(2, layer.in_features, generator=generator)
        b = torch.randn(layer.out_features, 2, generator=generator)
        tail_a, tail_b = torch.empty(0, layer.in_features), torch.empty(layer.out_features, 0)
        factors[name] = Factors(a.requires_grad_(), b.requires_grad_(), tail_a, tail_b, 0.01)
    attach(backbone.layers, factors)
    backbone.model(input_ids=TOKENS).logits.square().mean().backward()
    for name, pair in factors.items():
        for factor in (pair.a, pair.b):
            assert factor.grad is not None, name
            assert factor.grad.isfinite().all(), name
            assert factor.grad.abs().max() > 0, name


def test_a_merged_model_computes_what_the_adapted_one_does(case: Case, tmp_path: Path) -> None:
    backbone = case.backbone("fp32")
    rng = np.random.default_rng(0)
    updates, factors = {}, {}
    for name, layer in backbone.layers.items():
        u, _ = np.linalg.qr(rng.standard_normal((layer.out_features, 3)))
        v, _ = np.linalg.qr(rng.standard_normal((layer.in_features, 3)))
        sigma = np.array([0.5, 0.25, 0.125])
        updates[name] = LowRank(*(x.astype(np.float32) for x in (u, sigma, v)))
        a, b = torch.from_numpy(updates[name].v.T), torch.from_numpy(updates[name].u)
        b = b * torch.from_numpy(updates[name].sigma)
        none_a, none_b = torch.empty(0, layer.in_features), torch.empty(layer.out_features, 0)
        factors[name] = Factors(a, b, none_a, none_b, 1.0)
    before = logits(backbone.model)
    attach(backbone.layers, factors)
    after = logits(backbone.model)
    assert (after - before).abs().max() > 3e-3
    head = {
        name: parameter.numpy()
        for name, parameter in backbone.model.named_parameters()
        if case.labels and name.startswith("classifier")
    }
    write_merged(
        case.folder, GlobalAdapter(1, updates, head), case.task, case.labels, tmp_path / "merged"
    )
    merged = auto_class(case.task).from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits(merged), after, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- experts

EXPERTS: dict[str, Callable[[], transformers.PreTrainedConfig]] = {
    "mixtral": lambda: transformers.MixtralConfig(**GROUPED, num_local_experts=4),
    "qwen2-moe": lambda: transformers.Qwen2MoeConfig(
        **SIZES, num_key_value_heads=2, num_experts=4, moe_intermediate_size=16
    ),
    "qwen3-moe": lambda: transformers.Qwen3MoeConfig(
        **GROUPED, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16
    ),
}


@pytest.fixture(params=EXPERTS)
def experts(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = EXPERTS[request.param]()
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    return tmp_path


def test_attention_beside_experts_is_adapted(experts: Path) -> None:
    shapes = read_shapes(experts, ("q_proj", "k_proj", "v_proj", "o_proj"))
    forms = {matrix.name: MatrixForm("fp32") for matrix in shapes.matrices}
    backbone = BackboneShelf(experts, CPU, keep_base=False).get("causal-lm", (), forms)
    assert len(backbone.layers) == 8
    assert any("experts" in path for path in coverage(backbone.model).left)
    expected = logits(load_base(experts, "causal-lm"))
    torch.testing.assert_close(logits(backbone.model), expected, rtol=1e-4, atol=1e-4)


def test_stacked_experts_are_refused_by_name(experts: Path) -> None:
    names = {n.removesuffix(".weight") for n in BaseTensors(experts).shapes if ".experts." in n}
    forms = {name: MatrixForm("fp32") for name in names}
    shelf = BackboneShelf(experts, CPU, keep_base=False)
    with pytest.raises(ModelError, match=r"experts\.0\..* and others: \w+ stacks the matrices"):
        shelf.get("causal-lm", (), forms)
    with pytest.raises(ModelError, match=r"experts\.0\..* matrices of experts.*instead: .*q_proj"):
        read_shapes(experts, ("all-linear",))
