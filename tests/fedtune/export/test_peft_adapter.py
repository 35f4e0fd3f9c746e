from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
)
from transformers.utils import logging

from fedtune.errors import ModelError, RunError
from fedtune.export.merge import write_merged
from fedtune.export.peft_adapter import balanced_factors, write_peft
from fedtune.records import GlobalAdapter, LowRank

Logits = Callable[[nn.Module], Tensor]

# peft asks transformers in a way that transformers has renamed
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)


def test_peft_gives_the_logits_of_base_plus_adapter(
    stories260k: Path,
    llama_adapter: GlobalAdapter,
    llama_logits: Tensor,
    logits_of: Logits,
    tmp_path: Path,
) -> None:
    write_peft(stories260k, llama_adapter, "causal-lm", (), tmp_path)
    base = AutoModelForCausalLM.from_pretrained(stories260k)
    assert (logits_of(PeftModel.from_pretrained(base, tmp_path)) - llama_logits).abs().max() <= 1e-4


def test_peft_restores_the_classification_head(
    bert_base: Path,
    bert_adapter: GlobalAdapter,
    bert_logits: Tensor,
    logits_of: Logits,
    labels: Sequence[str],
    tmp_path: Path,
) -> None:
    write_peft(bert_base, bert_adapter, "sequence-classification", labels, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["modules_to_save"] == ["classifier"]
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    base = AutoModelForSequenceClassification.from_pretrained(bert_base, num_labels=len(labels))
    logging.set_verbosity(level)
    assert (logits_of(PeftModel.from_pretrained(base, tmp_path)) - bert_logits).abs().max() <= 1e-4


def test_peft_adapts_a_base_that_stores_its_matrices_transposed(
    logits_of: Logits, tmp_path: Path
) -> None:
    base = tmp_path / "gpt2"
    config = GPT2Config(
        vocab_size=99, n_embd=32, n_layer=1, n_head=2, n_positions=64, initializer_range=0.2
    )
    torch.manual_seed(0)
    GPT2LMHeadModel(config).save_pretrained(base)
    rng = np.random.default_rng(0)
    name, shape = "transformer.h.0.mlp.c_fc", (128, 32)
    u, v = (np.linalg.qr(rng.standard_normal((length, 3)))[0] for length in shape)
    update = LowRank(u.astype(np.float32), np.ones(3, np.float32), v.astype(np.float32))
    adapter = GlobalAdapter(1, {name: update})
    write_peft(base, adapter, "causal-lm", (), tmp_path / "adapter")
    adapted = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter"
    )
    plain = logits_of(AutoModelForCausalLM.from_pretrained(base))
    assert (logits_of(adapted) - plain).abs().max() > 1e-2
    write_merged(base, adapter, "causal-lm", (), tmp_path / "merged")
    merged = logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    assert (logits_of(adapted) - merged).abs().max() <= 1e-4
    written = json.loads((tmp_path / "adapter/adapter_config.json").read_text(encoding="utf-8"))
    assert written["fan_in_fan_out"] is True


def test_the_config_names_exactly_the_trained_matrices_and_their_ranks(
    stories260k: Path, llama_adapter: GlobalAdapter, tmp_path: Path
) -> None:
    write_peft(stories260k, llama_adapter, "causal-lm", (), tmp_path, "org/model", "abc")
    config = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    ranks = {name: low.rank for name, low in llama_adapter.matrices.items() if low.rank}
    assert config["target_modules"] == sorted(ranks)
    largest = max(ranks.values())
    assert config["r"] == config["lora_alpha"] == largest
    others = {name: rank for name, rank in ranks.items() if rank != largest}
    assert config["rank_pattern"] == config["alpha_pattern"] == others
    assert config["base_model_name_or_path"] == "org/model"
    assert config["revision"] == "abc"
    assert 'from_pretrained("org/model")' in (tmp_path / "README.md").read_text(encoding="utf-8")


def test_balanced_factors_share_the_norm_and_keep_the_product() -> None:
    rng = np.random.default_rng(0)
    u, _ = np.linalg.qr(rng.standard_normal((7, 3)))
    v, _ = np.linalg.qr(rng.standard_normal((5, 3)))
    update = LowRank(u, np.array([4.0, 1.0, 0.0]), v)
    a, b = balanced_factors(update)
    assert a.shape == (2, 5)
    np.testing.assert_allclose(b @ a, update.product(), atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=0), rtol=1e-6)


def test_an_adapter_that_changes_nothing_is_refused(stories260k: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="changes no matrix yet; export after the first round"):
        write_peft(stories260k, GlobalAdapter(0, {}), "causal-lm", (), tmp_path)


def test_a_matrix_that_the_base_lacks_is_refused(stories260k: Path, tmp_path: Path) -> None:
    update = LowRank(np.ones((4, 1)), np.ones(1), np.ones((4, 1)))
    with pytest.raises(ModelError, match=r"matrix model.layers.9.q of the model folder is not"):
        write_peft(
            stories260k, GlobalAdapter(1, {"model.layers.9.q": update}), "causal-lm", (), tmp_path
        )
