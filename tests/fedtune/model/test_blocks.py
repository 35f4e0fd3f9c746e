"""Fused blocks compute what transformers' own do, and keep little for the backward pass."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from fedtune.lora.linear import AdaptedLinear, Factors, attach, detach
from fedtune.model.blocks import fuse, run_blocks
from fedtune.model.loss import collate, loss_sum, prepare
from fedtune.model.packing import run_packed
from fedtune.quant.storage import store
from fedtune.records import MatrixForm

CPU = torch.device("cpu")
VOCABULARY, HIDDEN, WIDE, LAYERS = 64, 16, 32, 2
_SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": WIDE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}
FUSED = [
    LlamaConfig(**_SMALL),
    MistralConfig(**_SMALL, sliding_window=4),
    Qwen2Config(**_SMALL, use_sliding_window=True, sliding_window=4, max_window_layers=1),
    Qwen3Config(**_SMALL, head_dim=8),
    GemmaConfig(**_SMALL, head_dim=8),
]
CHOICES = {
    "all": (),
    "some": ("k_proj", "up_proj", "down_proj"),
    "upper": ("layers.0.",),
    "lower": ("layers.1.",),
}


@dataclass(frozen=True)
class Sample:
    tokens: NDArray[np.int32]
    loss_mask: NDArray[np.bool_]
    label: int = -1


def samples(lengths: Sequence[int], prompt: int = 3) -> list[Sample]:
    """Random tokens; the first `1 / prompt` of each sample carries no loss."""
    rng = np.random.default_rng(3)
    return [
        Sample(rng.integers(3, VOCABULARY, n).astype(np.int32), np.arange(n) >= n // prompt)
        for n in lengths
    ]


def built(config: PretrainedConfig) -> PreTrainedModel:
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config)).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "norm" in name or "bias" in name:
            parameter += 0.2 * torch.randn_like(parameter)
    return model


class PlainLora(nn.Module):
    """x (W + s (B A + tail))^T + c in torch's own operations."""

    def __init__(self, linear: nn.Linear, factors: Factors | None) -> None:
        super().__init__()
        self.linear, self.factors = linear, factors

    def forward(self, x: Tensor) -> Tensor:
        weight = self.linear.weight
        if self.factors is not None:
            f = self.factors
            weight = weight + f.scale * (f.b @ f.a + f.tail_b @ f.tail_a)
        return functional.linear(x, weight, self.linear.bias)


def random_factors(model: nn.Module, without: Sequence[str]) -> dict[str, Factors]:
    generator = torch.Generator().manual_seed(7)

    def matrix(*shape: int) -> Tensor:
        return 0.2 * torch.randn(*shape, generator=generator)

    return {
        name: Factors(
            matrix(3, module.in_features).requires_grad_(),
            matrix(module.out_features, 3).requires_grad_(),
            matrix(2, module.in_features),
            matrix(module.out_features, 2),
            0.5,
        )
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and name != "lm_head"
        and not any(part in name for part in without)
    }


def adapted(model: PreTrainedModel) -> dict[str, AdaptedLinear]:
    layers = {}
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            form = MatrixForm("fp32")
            layers[name] = AdaptedLinear(store(module.weight.detach(), form), module.bias).eval()
            model.set_submodule(name, layers[name])
    return layers


def gradients(factors: dict[str, Factors]) -> dict[str, Tensor]:
    found = {}
    for name, f in factors.items():
        for part, tensor in (("a", f.a), ("b", f.b)):
            assert tensor.grad is not None
            found[f"{name}.{part}"], tensor.grad = tensor.grad, None
    return found


def plain_gradients(
    model: PreTrainedModel, factors: dict[str, Factors], chosen: Sequence[Sample]
) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of transformers' model under autograd, sample by sample."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            model.set_submodule(name, PlainLora(module, factors.get(name)))
    loss = 0.0
    for sample in chosen:
        tokens = torch.from_numpy(sample.tokens.astype(np.int64))
        rows = torch.from_numpy(sample.loss_mask[1:])
        logits = model(input_ids=tokens[None]).logits[0, :-1]
        total = functional.cross_entropy(logits[rows], tokens[1:][rows], reduction="sum")
        total.backward()
        loss += total.item()
    return loss, gradients(factors)


def checkpoint(model: PreTrainedModel) -> None:
    model.activation_checkpointing_enable({"use_reentrant": False})
    model.disable_input_require_grads()
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            module.training = True


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("without", CHOICES.values(), ids=CHOICES)
@pytest.mark.parametrize("config", FUSED, ids=lambda config: config.model_type)
def test_gradients_are_those_of_transformers_under_autograd(
    config: PretrainedConfig, without: Sequence[str], recompute: bool
) -> None:
    model = built(config)
    factors = random_factors(model, without)
    chosen = samples([9, 9, 3, 12, 5])
    loss, expected = plain_gradients(built(config), factors, chosen)
    attach(adapted(model), factors)
    assert fuse(model) == LAYERS
    if recompute:
        checkpoint(model)
    batch = prepare(model, chosen, 0, "causal-lm")
    assert batch.segments is not None
    found = loss_sum(model, batch, "causal-lm")
    found.total.backward()
    assert found.total.item() == pytest.approx(loss, rel=1e-5)
    for name, gradient in gradients(factors).items():
        scale = float(expected[name].abs().max())
        torch.testing.assert_close(
            gradient / scale, expected[name] / scale, rtol=0.0, atol=1e-5, msg=name
        )


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("lengths", [(16, 16, 16, 16), (9, 14, 3)], ids=["dense", "ragged"])
def test_a_batch_of_either_form_has_the_gradients_of_transformers(
    lengths: Sequence[int], packed: bool
) -> None:
    model = built(LlamaConfig(**_SMALL))
    factors = random_factors(model, ())
    chosen = samples(lengths, prompt=100)
    _, expected = plain_gradients(built(LlamaConfig(**_SMALL)), factors, chosen)
    attach(adapted(model), factors)
    fuse(model)
    batch = prepare(model, chosen, 0, "causal-lm") if packed else collate(chosen, 0, CPU)
    loss_sum(model, batch, "causal-lm").total.backward()
    for name, gradient in gradients(factors).items():
        scale = float(expected[name].abs().max())
        torch.testing.assert_close(gradient / scale, expected[name] / scale, rtol=0, atol=1e-5)


@pytest.mark.parametrize("config", FUSED, ids=lambda config: config.model_type)
def test_bfloat16_stays_as_near_as_the_plain_modules(config: PretrainedConfig) -> None:
    chosen = samples([9, 5, 14])
    exact = built(config)
    with torch.no_grad():
        right = loss_sum(exact, collate(chosen, 0, CPU), "causal-lm").total.item()
        plain, fused = built(config).bfloat16(), built(config).bfloat16()
        adapted(fused)
        fuse(fused)
        off = [
            abs(loss_sum(m, prepare(m, chosen, 0, "causal-lm"), "causal-lm").total.item() - right)
            for m in (plain, fused)
        ]
    assert off[1] <= 2 * off[0] + 5e-3 * right


@pytest.mark.parametrize("config", FUSED, ids=lambda c: c.model_type)
def test_blocks_one_after_another_are_the_models_own_pass(config: PretrainedConfig) -> None:
    model = built(config)
    adapted(model)
    fuse(model)
    batch = prepare(model, samples((9, 6)), 0, "causal-lm")
    assert batch.positions is not None
    assert batch.segments is not None
    where = (batch.tokens, batch.positions, batch.segments)
    own = run_packed(model.base_model, *where).last_hidden_state
    found = run_blocks(model.base_model, *where)
    if config.model_type == "gemma":  # which scales its embeddings
        assert found is None
    else:
        assert found is not None
        assert torch.equal(found, own)


def test_a_hook_on_a_block_is_still_called() -> None:
    model = built(FUSED[0])
    adapted(model)
    fuse(model)
    batch = prepare(model, samples((9, 6)), 0, "causal-lm")
    called = []
    hook = model.base_model.layers[1].mlp.register_forward_hook(lambda *_: called.append(1))
    loss_sum(model, batch, "causal-lm")
    assert called == [1]
    hook.remove()
    loss_sum(model, batch, "causal-lm")
    assert called == [1]


def test_names_and_parameters_stay() -> None:
    model = built(LlamaConfig(**_SMALL))
    before = {name: p.data_ptr() for name, p in model.named_parameters()}
    modules = [name for name, _ in model.named_modules()]
    fuse(model)
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == before
    assert [name for name, _ in model.named_modules()] == modules
    assert fuse(model) == 0  # again: nothing is left to do


def test_other_models_of_the_class_stay_as_they_are() -> None:
    fuse(built(LlamaConfig(**_SMALL)))
    other = built(LlamaConfig(**_SMALL))
    assert not any("Fused" in type(module).__name__ for module in other.modules())


def test_a_copy_of_a_fused_model_uses_its_own_norms() -> None:
    model = built(LlamaConfig(**_SMALL))
    fuse(model)
    twin = copy.deepcopy(model)
    tokens = torch.arange(6)[None]
    before = model(input_ids=tokens).logits
    for parameter in twin.parameters():
        parameter.zero_()
    assert torch.equal(model(input_ids=tokens).logits, before)
    assert not twin(input_ids=tokens).logits.any()


@pytest.mark.parametrize("config", FUSED, ids=lambda config: config.model_type)
def test_what_is_not_packed_goes_the_models_own_way(config: PretrainedConfig) -> None:
    model, fused = built(config), built(config)
    adapted(fused)
    fuse(fused)
    tokens = torch.tensor([[0, 0, 5, 6, 7, 1, 8], [9, 8, 7, 6, 5, 3, 4]])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
    one, other = (m(input_ids=tokens, attention_mask=mask).logits[0, 2:] for m in (model, fused))
    torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-4)
    one, other = (
        m.generate(tokens, attention_mask=mask, max_new_tokens=4, do_sample=False)
        for m in (model, fused)
    )
    assert torch.equal(one, other)


@pytest.mark.parametrize("trained", ["input_layernorm.weight", "q_proj.bias"])
def test_a_norm_or_bias_that_is_trained_whole_gets_its_gradient(trained: str) -> None:
    chosen = samples([9, 5])
    slopes = []
    for fused in (False, True):
        model = built(Qwen2Config(**_SMALL))
        if fused:
            adapted(model)
            fuse(model)
        parts = [p for name, p in model.named_parameters() if name.endswith(trained)]
        for part in parts:
            part.requires_grad_(True)
        loss_sum(model, prepare(model, chosen, 0, "causal-lm"), "causal-lm").total.backward()
        slopes.append([part.grad for part in parts])
    assert len(slopes[0]) == LAYERS
    torch.testing.assert_close(slopes[1], slopes[0], rtol=1e-4, atol=1e-5)


def test_an_activation_that_is_not_known_is_left_alone() -> None:
    assert fuse(built(LlamaConfig(**_SMALL, hidden_act="relu"))) == 0


def test_a_model_of_another_family_is_left_alone() -> None:
    model = built(GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=1, n_head=2))
    assert fuse(model) == 0


def test_factors_come_and_go_between_rounds() -> None:
    model = built(LlamaConfig(**_SMALL))
    layers = adapted(model)
    fuse(model)
    chosen = samples([9, 5])

    def loss() -> float:
        with torch.no_grad():
            batch = prepare(model, chosen, 0, "causal-lm")
            return loss_sum(model, batch, "causal-lm").total.item()

    bare = loss()
    attach(layers, random_factors(built(LlamaConfig(**_SMALL)), ("k_proj",)))
    assert loss() != pytest.approx(bare, rel=1e-3)
    detach(layers)
    assert loss() == bare


def test_a_second_backward_pass_is_refused() -> None:
    model = built(LlamaConfig(**_SMALL))
    attach(adapted(model), random_factors(built(LlamaConfig(**_SMALL)), ()))
    fuse(model)
    batch = prepare(model, samples([9]), 0, "causal-lm")
    total = loss_sum(model, batch, "causal-lm").total
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="written over"):
        total.backward()


def kept_by(model: PreTrainedModel, chosen: Sequence[Sample]) -> list[Tensor]:
    """Tensors that the backward pass of a step asks for, each storage once, parameters apart."""
    batch = prepare(model, chosen, 0, "causal-lm")
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss_sum(model, batch, "causal-lm")
    held = {p.untyped_storage().data_ptr() for p in model.parameters()}
    return [tensor for at, tensor in kept.items() if at not in held]


def test_a_block_keeps_its_inputs_and_no_logits() -> None:
    model = built(LlamaConfig(**_SMALL))
    factors = random_factors(model, ())
    attach(adapted(model), factors)
    fuse(model)
    chosen = samples([40, 30, 30])
    tokens = 100
    rank = 3
    kept = kept_by(model, chosen)
    sizes = [tensor.untyped_storage().nbytes() // 4 for tensor in kept]
    # Two norms' inputs with a number per row each; q, k, v and the attention's result with a
    # number per head; gate and up; x A^T for seven matrices.
    block = 2 * (HIDDEN + 1) + 2 * HIDDEN + 2 * HIDDEN // 2 + 4 + 2 * WIDE + 7 * (rank + 2)
    # The last norm's input, and the gradient of hidden states that carry loss with their numbers.
    rest = (HIDDEN + 1) + (HIDDEN + 2)
    # Each layer's factors in the form of its products, A and B, trained part and tail.
    stacks = sum((rank + 2) * (f.a.shape[1] + f.b.shape[0]) for f in factors.values())
    assert sum(sizes) <= tokens * (LAYERS * block + rest) + stacks
    assert max(sizes) < 67 * VOCABULARY  # logits of the rows that carry loss
