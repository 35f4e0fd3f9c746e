"""Packed samples give what padded ones give; models of another kind are found out and padded."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GptOssConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    RecurrentGemmaConfig,
    RobertaConfig,
)

from fedtune.evaluate.perplexity import held_out_loss
from fedtune.model.loss import Batch, collate, loss_sum, prepare
from fedtune.model.packing import ATTENTION_NAME, packs

CPU = torch.device("cpu")
VOCABULARY = 64
_SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}

PACKED = [
    LlamaConfig(**_SMALL),
    MistralConfig(**_SMALL, sliding_window=4),
    Qwen2Config(**_SMALL),
    Qwen2Config(**_SMALL, use_sliding_window=True, sliding_window=4, max_window_layers=1),
    Qwen3Config(**_SMALL, head_dim=8),
    GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, initializer_range=0.3),
    GemmaConfig(**_SMALL, head_dim=8),
    Gemma2Config(
        **_SMALL,
        head_dim=8,
        sliding_window=4,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=1.5,
    ),
    Gemma3TextConfig(**_SMALL, head_dim=8, sliding_window=4),
    Phi3Config(**_SMALL),
    OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        ffn_dim=32,
        word_embed_proj_dim=16,
    ),
    GraniteConfig(**_SMALL, logits_scaling=4.0),
]

PADDED = [
    (BloomConfig(vocab_size=VOCABULARY, hidden_size=16, n_layer=2, n_head=2), "does not run"),
    (
        FalconConfig(
            vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=2
        ),
        "0 of its 2 layers",
    ),
    (
        RecurrentGemmaConfig(**{**_SMALL, "num_hidden_layers": 3}, lru_width=16),
        "layers of linear_attention",
    ),
    (RobertaConfig(**{**_SMALL, "pad_token_id": 1}, is_decoder=True), "differ from separate ones"),
    (
        GptOssConfig(**_SMALL, head_dim=8, num_local_experts=2, num_experts_per_tok=1),
        "its attention has s_aux",
    ),
]


@dataclass(frozen=True)
class Sample:
    tokens: NDArray[np.int32]
    loss_mask: NDArray[np.bool_]
    label: int = -1


def samples(lengths: Sequence[int]) -> list[Sample]:
    """Random tokens; the first third of each sample carries no loss."""
    rng = np.random.default_rng(3)
    return [
        Sample(rng.integers(3, VOCABULARY, n).astype(np.int32), np.arange(n) >= n // 3)
        for n in lengths
    ]


def built(config: PretrainedConfig) -> PreTrainedModel:
    torch.manual_seed(5)
    # A config is shared by the models built from it, and packing writes into it.
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config)).eval()
    return model.requires_grad_(False)


def slope_of_embeddings(model: PreTrainedModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """The loss, and its gradient at each token's embedding."""
    held: list[Tensor] = []

    def hold(_: object, __: object, output: Tensor) -> Tensor:
        held.append(output.detach().requires_grad_())
        return held[-1]

    handle = model.get_input_embeddings().register_forward_hook(hold)
    try:
        total = loss_sum(model, batch, "causal-lm").total
        (slope,) = torch.autograd.grad(total, held[0])
    finally:
        handle.remove()
    return total.detach(), slope.flatten(0, 1)


@pytest.mark.parametrize("config", PACKED, ids=lambda config: config.model_type)
def test_packed_samples_have_the_loss_and_gradient_of_padded_ones(config: PretrainedConfig) -> None:
    model = built(config)
    chosen = samples([9, 9, 3, 12, 5])
    padded = collate(chosen, 0, CPU)
    before, slope = slope_of_embeddings(model, padded)
    packed = prepare(model, chosen, 0, "causal-lm")
    assert packed.segments is not None
    assert packed.tokens.shape == (1, 38)
    found, ours = slope_of_embeddings(model, packed)
    assert float(found) == pytest.approx(float(before), rel=1e-6)
    present = padded.present
    assert present is not None
    torch.testing.assert_close(ours, slope[present.flatten()], rtol=1e-4, atol=1e-5)
    # And the padded way still gives what it gave.
    again, _ = slope_of_embeddings(model, padded)
    assert float(again) == pytest.approx(float(before), rel=1e-6)


@pytest.mark.parametrize(
    ("config", "reason"), PADDED, ids=lambda value: getattr(value, "model_type", "")
)
def test_a_model_that_cannot_be_packed_is_padded_and_says_why(
    config: PretrainedConfig, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = built(config)
    before = model.config._attn_implementation
    with caplog.at_level(logging.INFO, "fedtune.model.packing"):
        batch = prepare(model, samples([5, 8]), 0, "causal-lm")
        prepare(model, samples([5, 8]), 0, "causal-lm")
    assert batch.segments is None
    assert batch.tokens.shape == (2, 8)
    (line,) = [record.getMessage() for record in caplog.records]
    assert reason in line
    assert model.config._attn_implementation == before


def test_a_window_that_the_attention_is_not_told_of_is_noticed() -> None:
    # Qwen's modules read the window when they are built: this one is in the config alone.
    model = built(Qwen2Config(**_SMALL))
    assert model.config.layer_types == ["full_attention"] * 2
    model.config.layer_types = ["full_attention", "sliding_attention"]
    model.config.sliding_window = 100
    model.model.has_sliding_layers = True
    assert not packs(model)


def test_generation_goes_on_as_before() -> None:
    model = built(LlamaConfig(**_SMALL))
    prompt = torch.tensor([[0, 0, 5, 6, 7], [9, 8, 7, 6, 5]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])

    def generated() -> list[list[int]]:
        tokens: Tensor = model.generate(
            prompt, attention_mask=mask, max_new_tokens=6, do_sample=False
        )
        return tokens.tolist()

    before = generated()
    assert packs(model)
    assert model.config._attn_implementation == ATTENTION_NAME
    assert generated() == before


def test_a_copy_of_a_model_that_packs_packs() -> None:
    model = built(LlamaConfig(**_SMALL))
    assert packs(model)
    assert packs(copy.deepcopy(model))


def test_weights_of_samples_become_weights_of_their_tokens() -> None:
    model = built(LlamaConfig(**_SMALL))
    chosen = samples([9, 4, 6])
    weights = [0.5, 2.0, 0.0]
    both = [
        loss_sum(
            model, collate(chosen, 0, CPU, packed=packed, weights=weights), "causal-lm"
        ).total.item()
        for packed in (packs(model), False)
    ]
    each = [
        loss_sum(model, prepare(model, [sample], 0, "causal-lm"), "causal-lm").total.item()
        for sample in chosen
    ]
    assert both == pytest.approx([0.5 * each[0] + 2.0 * each[1]] * 2, rel=1e-5)


def test_held_out_loss_is_that_of_padded_batches() -> None:
    model = built(LlamaConfig(**_SMALL))
    chosen = samples([9, 4, 6, 17, 3])
    found = held_out_loss(model, chosen, batch_size=2)
    with torch.no_grad():
        expected = loss_sum(model, collate(chosen, 0, CPU), "causal-lm")
    assert found.loss == pytest.approx(float(expected.total) / expected.units, rel=1e-6)
    assert found.tokens == expected.units
