from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from fedtune.errors import ModelError, RunError
from fedtune.export.merge import write_merged
from fedtune.records import GlobalAdapter, LowRank

Logits = Callable[[nn.Module], Tensor]


def tensor_dtypes(folder: Path) -> dict[str, str]:
    with safe_open(folder / "model.safetensors", framework="pt") as opened:
        return {name: opened.get_slice(name).get_dtype() for name in opened.keys()}  # noqa: SIM118


@pytest.fixture(scope="module")
def merged_llama(
    stories260k: Path, llama_adapter: GlobalAdapter, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("merged") / "llama"
    write_merged(stories260k, llama_adapter, "causal-lm", (), folder)
    return folder


@pytest.fixture(scope="module")
def merged_bert(
    bert_base: Path,
    bert_adapter: GlobalAdapter,
    labels: Sequence[str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    folder = tmp_path_factory.mktemp("merged") / "bert"
    write_merged(bert_base, bert_adapter, "sequence-classification", labels, folder)
    return folder


def test_merged_logits_are_those_of_base_plus_adapter(
    merged_llama: Path, llama_logits: Tensor, logits_of: Logits
) -> None:
    model, info = AutoModelForCausalLM.from_pretrained(merged_llama, output_loading_info=True)
    assert not any(info.values())
    assert (logits_of(model) - llama_logits).abs().max() <= 1e-4


def test_merging_keeps_tied_embeddings_tied(merged_llama: Path, stories260k: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(merged_llama)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert tensor_dtypes(merged_llama) == tensor_dtypes(stories260k)


def test_the_merged_folder_carries_the_tokenizer(merged_llama: Path, stories260k: Path) -> None:
    text = "Once upon a time"
    expected = AutoTokenizer.from_pretrained(stories260k)(text)
    assert AutoTokenizer.from_pretrained(merged_llama)(text) == expected
    assert (merged_llama / "generation_config.json").is_file()


def test_a_bare_encoder_becomes_a_classifier_that_transformers_loads_alone(
    merged_bert: Path, bert_logits: Tensor, logits_of: Logits, labels: Sequence[str]
) -> None:
    model, info = AutoModelForSequenceClassification.from_pretrained(
        merged_bert, output_loading_info=True
    )
    assert not any(info.values())
    assert (logits_of(model) - bert_logits).abs().max() <= 1e-4
    config = json.loads((merged_bert / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["BertForSequenceClassification"]
    assert config["id2label"] == {str(index): label for index, label in enumerate(labels)}
    assert config["label2id"] == {label: index for index, label in enumerate(labels)}


def test_licence_and_vocabulary_travel_with_the_weights(merged_bert: Path) -> None:
    names = {path.name for path in merged_bert.iterdir()}
    assert {"LICENSE", "vocab.txt", "tokenizer.json"} <= names


def test_a_bfloat16_base_stays_bfloat16(
    stories260k: Path, llama_adapter: GlobalAdapter, tmp_path: Path
) -> None:
    half = AutoModelForCausalLM.from_pretrained(stories260k, dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "base")
    write_merged(tmp_path / "base", llama_adapter, "causal-lm", (), tmp_path / "merged")
    assert set(tensor_dtypes(tmp_path / "merged").values()) == {"BF16"}
    name = "model.layers.2.mlp.down_proj"
    exact = half.get_submodule(name).weight.detach().double().numpy()
    exact = exact + llama_adapter.matrices[name].product()
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").get_submodule(name).weight
    assert torch.equal(found, torch.from_numpy(exact).to(torch.bfloat16))


def test_an_update_of_another_shape_is_refused(stories260k: Path, tmp_path: Path) -> None:
    update = LowRank(np.ones((64, 1)), np.ones(1), np.ones((32, 1)))
    adapter = GlobalAdapter(1, {"model.layers.0.self_attn.q_proj": update})
    with pytest.raises(ModelError, match=r"q_proj is 64x32, the base's weight is 64x64; use the"):
        write_merged(stories260k, adapter, "causal-lm", (), tmp_path)


def test_an_update_of_an_unknown_matrix_is_refused(stories260k: Path, tmp_path: Path) -> None:
    update = LowRank(np.ones((64, 1)), np.ones(1), np.ones((64, 1)))
    with pytest.raises(ModelError, match=r"matrix model.layers.9.q of the model folder"):
        write_merged(
            stories260k, GlobalAdapter(1, {"model.layers.9.q": update}), "causal-lm", (), tmp_path
        )


def test_an_embedding_cannot_carry_an_update(stories260k: Path, tmp_path: Path) -> None:
    adapter = GlobalAdapter(
        1, {"model.embed_tokens": LowRank(np.ones((512, 1)), np.ones(1), np.ones((64, 1)))}
    )
    with pytest.raises(
        ModelError, match=r"model.embed_tokens is a Embedding, and only linear layers"
    ):
        write_merged(stories260k, adapter, "causal-lm", (), tmp_path)


def test_a_checkpoint_without_the_task_head_is_refused(
    bert_base: Path, bert_adapter: GlobalAdapter, labels: Sequence[str], tmp_path: Path
) -> None:
    headless = replace(bert_adapter, dense={})
    with pytest.raises(RunError, match=r"lacks classifier\.bias, classifier\.weight"):
        write_merged(bert_base, headless, "sequence-classification", labels, tmp_path)


def test_a_head_for_other_labels_is_refused(
    bert_base: Path, bert_adapter: GlobalAdapter, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=r"classifier.* of the checkpoint is \(3.* not that of"):
        write_merged(bert_base, bert_adapter, "sequence-classification", ("a", "b"), tmp_path)
