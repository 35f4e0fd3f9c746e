from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, BertConfig, BertForSequenceClassification
from transformers.utils import logging

from fedtune.errors import DataError
from fedtune.evaluate.perplexity import evaluate_folder, held_out_loss


@dataclass(frozen=True)
class Sample:
    tokens: NDArray[np.int32]
    loss_mask: NDArray[np.bool_]
    label: int = -1


@pytest.fixture(autouse=True)
def _quiet() -> None:
    logging.disable_progress_bar()


def samples(count: int, vocabulary: int, classes: int = 0) -> list[Sample]:
    """Random tokens of unequal lengths; the first third of each is a prompt without loss."""
    rng = np.random.default_rng(5)
    made = []
    for index in range(count):
        length = int(rng.integers(4, 20))
        mask = np.arange(length) >= length // 3
        tokens = rng.integers(3, vocabulary, length).astype(np.int32)
        made.append(Sample(tokens, mask, index % classes if classes else -1))
    return made


def plain_loss(model: torch.nn.Module, chosen: Sequence[Sample]) -> tuple[float, int]:
    """Transformers' own loss, one sample at a time, weighted by its tokens."""
    total, count = 0.0, 0
    for sample in chosen:
        ids = torch.from_numpy(sample.tokens.astype(np.int64))[None]
        labels = torch.where(torch.from_numpy(sample.loss_mask)[None], ids, -100)
        tokens = int(sample.loss_mask[1:].sum())
        with torch.no_grad():
            total += tokens * model(input_ids=ids, labels=labels).loss.item()
        count += tokens
    return total / count, count


def test_loss_is_the_token_weighted_mean_of_transformers_own(stories260k: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(stories260k)
    chosen = samples(7, 512)
    loss, count = plain_loss(model, chosen)
    report = held_out_loss(model, chosen, batch_size=3, pad_id=0)
    assert report.loss == pytest.approx(loss, abs=1e-5)
    assert report.tokens == count
    assert report.accuracy is None
    assert report.perplexity == pytest.approx(math.exp(loss), rel=1e-5)


def test_loss_does_not_depend_on_batch_size_or_padding(stories260k: Path) -> None:
    chosen = samples(9, 512)
    one = evaluate_folder(stories260k, chosen, batch_size=1)
    many = evaluate_folder(stories260k, chosen, batch_size=4, pad_id=7)
    assert many.loss == pytest.approx(one.loss, abs=1e-5)


def test_a_first_token_is_never_predicted(stories260k: Path) -> None:
    tokens = np.array([5, 6, 7], dtype=np.int32)
    full = Sample(tokens, np.array([True, True, True]))
    rest = Sample(tokens, np.array([False, True, True]))
    assert evaluate_folder(stories260k, [full]) == evaluate_folder(stories260k, [rest])


def classifier(folder: Path) -> BertForSequenceClassification:
    config = BertConfig(
        vocab_size=99,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        num_labels=3,
        initializer_range=0.3,
    )
    torch.manual_seed(1)
    model = BertForSequenceClassification(config)
    model.save_pretrained(folder)
    return model.eval()


def test_classification_gives_loss_and_accuracy_per_sample(tmp_path: Path) -> None:
    model = classifier(tmp_path)
    chosen = samples(11, 99, classes=3)
    with torch.no_grad():
        logits = torch.cat(
            [model(torch.from_numpy(s.tokens.astype(np.int64))[None]).logits for s in chosen]
        )
    labels = torch.tensor([s.label for s in chosen])
    report = evaluate_folder(tmp_path, chosen, batch_size=4, task="sequence-classification")
    expected = torch.nn.functional.cross_entropy(logits, labels).item()
    assert report.loss == pytest.approx(expected, abs=1e-5)
    assert report.tokens == 11
    assert report.accuracy == pytest.approx((logits.argmax(-1) == labels).float().mean().item())


def test_a_model_in_training_stays_in_training(tmp_path: Path) -> None:
    model = classifier(tmp_path).train()
    chosen = samples(4, 99, classes=3)
    first = held_out_loss(model, chosen, task="sequence-classification")
    assert model.training
    assert held_out_loss(model, chosen, task="sequence-classification") == first


def test_samples_without_loss_are_refused(stories260k: Path) -> None:
    silent = [Sample(np.array([5, 6], dtype=np.int32), np.array([True, False]))]
    with pytest.raises(DataError, match="none of the 1 held-out samples carries loss"):
        evaluate_folder(stories260k, silent)
