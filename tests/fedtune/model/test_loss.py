"""Losses are sums over units: they add up over any cut, and padding never counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    PretrainedConfig,
    PreTrainedModel,
    RecurrentGemmaConfig,
    RobertaConfig,
)

from fedtune.model.load import load_base
from fedtune.model.loss import collate, loss_sum, loss_units

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Sample:
    tokens: NDArray[np.int32]
    loss_mask: NDArray[np.bool_]
    label: int = -1


def samples(lengths: Sequence[int], vocabulary: int = 200) -> list[Sample]:
    """Random tokens; the first third of each sample carries no loss."""
    rng = np.random.default_rng(3)
    return [
        Sample(rng.integers(3, vocabulary, n).astype(np.int32), np.arange(n) >= n // 3, index % 3)
        for index, n in enumerate(lengths)
    ]


@pytest.fixture(scope="module")
def llama(tiny_llama: Path) -> PreTrainedModel:
    return load_base(tiny_llama, "causal-lm")


@pytest.fixture(scope="module")
def bert(tiny_bert: Path) -> PreTrainedModel:
    torch.manual_seed(4)
    return load_base(tiny_bert, "sequence-classification", ("a", "b", "c"))


def plain(model: PreTrainedModel, chosen: Sequence[Sample]) -> float:
    """Summed cross-entropy of transformers' own logits, one unpadded sample at a time."""
    total = 0.0
    for sample in chosen:
        tokens = torch.from_numpy(sample.tokens.astype(np.int64))
        with torch.no_grad():
            rows = model(input_ids=tokens[None]).logits[0].float().log_softmax(-1)[:-1]
        picked = -rows.gather(1, tokens[1:, None])[:, 0]
        total += float(picked[torch.from_numpy(sample.loss_mask[1:])].sum())
    return total


def test_samples_are_padded_on_the_right() -> None:
    batch = collate(samples([2, 5]), pad_id=9, device=CPU)
    assert batch.tokens.shape == (2, 5)
    assert batch.tokens[0, 2:].tolist() == [9, 9, 9]
    assert batch.present.tolist() == [[True] * 2 + [False] * 3, [True] * 5]
    # The first output of the first sample, and the outputs before tokens 1 to 4 of the second.
    assert batch.loss_rows.tolist() == [0, 5, 6, 7, 8]
    assert batch.targets.tolist() == [int(batch.tokens[0, 1]), *batch.tokens[1, 1:].tolist()]
    assert batch.labels.tolist() == [0, 1]


def test_language_loss_is_that_of_transformers_logits(llama: PreTrainedModel) -> None:
    chosen = samples([4, 17, 9])
    found = loss_sum(llama, collate(chosen, 2, CPU), "causal-lm")
    assert float(found.total) == pytest.approx(plain(llama, chosen), rel=1e-5)
    assert (
        found.units
        == loss_units(chosen, "causal-lm")
        == sum(n - max(1, n // 3) for n in (4, 17, 9))
    )


def test_parts_add_up_to_the_whole_batch(llama: PreTrainedModel) -> None:
    chosen = samples([4, 17, 9, 3, 12])
    whole = loss_sum(llama, collate(chosen, 2, CPU), "causal-lm")
    parts = [
        loss_sum(llama, collate(chosen[a:b], 2, CPU), "causal-lm") for a, b in ((0, 2), (2, 5))
    ]
    assert sum(float(p.total) for p in parts) == pytest.approx(float(whole.total), rel=1e-5)
    assert sum(p.units for p in parts) == whole.units
    assert sum(p.correct for p in parts) == whole.correct


def test_what_fills_a_batch_changes_nothing(llama: PreTrainedModel, bert: PreTrainedModel) -> None:
    chosen = samples([3, 20])
    for model, task in ((llama, "causal-lm"), (bert, "sequence-classification")):
        one, other = (loss_sum(model, collate(chosen, pad, CPU), task) for pad in (2, 77))
        assert float(one.total) == pytest.approx(float(other.total), rel=1e-6)


def test_correct_counts_the_units_whose_best_class_is_right(llama: PreTrainedModel) -> None:
    chosen = samples([30, 30])
    batch = collate(chosen, 2, CPU)
    with torch.no_grad():
        best = llama(input_ids=batch.tokens).logits[:, :-1].argmax(-1)
    # A random model is never right by itself: half of the text is made what it would say.
    for sample, row in zip(chosen, best, strict=True):
        sample.tokens[-1] = int(row[-1])
    batch = collate(chosen, 2, CPU)
    hits = torch.nn.functional.pad(best, (0, 1)).flatten()[batch.loss_rows] == batch.targets
    assert loss_sum(llama, batch, "causal-lm").correct == int(hits.sum()) >= 2


def test_a_first_token_is_never_a_unit() -> None:
    tokens = np.array([5, 6, 7], dtype=np.int32)
    assert loss_units([Sample(tokens, np.array([True, True, False]))], "causal-lm") == 1


def test_classification_counts_samples(bert: PreTrainedModel) -> None:
    chosen = samples([3, 11, 7, 5])
    found = loss_sum(bert, collate(chosen, 2, CPU), "sequence-classification")
    with torch.no_grad():
        rows = [
            bert(input_ids=torch.tensor(s.tokens[None].astype(np.int64))).logits for s in chosen
        ]
    targets = torch.tensor([s.label for s in chosen])
    expected = torch.nn.functional.cross_entropy(torch.cat(rows), targets, reduction="sum")
    assert float(found.total) == pytest.approx(float(expected), rel=1e-5)
    assert found.units == loss_units(chosen, "sequence-classification") == 4
    assert found.correct == int((torch.cat(rows).argmax(-1) == targets).sum())


_SMALL = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "initializer_range": 0.5,
}


@pytest.mark.parametrize(
    "config",
    [
        Gemma2Config(**_SMALL, head_dim=8, final_logit_softcapping=0.5),
        CohereConfig(**_SMALL, logit_scale=0.25),
        GraniteConfig(**_SMALL, logits_scaling=4.0),
        RecurrentGemmaConfig(
            **{**_SMALL, "num_hidden_layers": 3}, lru_width=16, logits_soft_cap=0.5
        ),
        RobertaConfig(**_SMALL, is_decoder=True, pad_token_id=1),
    ],
    ids=lambda config: config.model_type,
)
def test_models_that_change_their_logits_keep_their_own_loss(config: PretrainedConfig) -> None:
    torch.manual_seed(2)
    model = AutoModelForCausalLM.from_config(config).eval()
    chosen = samples([6, 9], vocabulary=64)
    with torch.no_grad():
        found = loss_sum(model, collate(chosen, 2, CPU), "causal-lm")
    assert float(found.total) == pytest.approx(plain(model, chosen), rel=1e-4)
