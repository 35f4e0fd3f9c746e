"""Models and adapters that the tests of all exports share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
)
from transformers.utils import logging

from fedtune.records import GlobalAdapter, LowRank

LABELS = ("causes", "symptoms", "treatment")


@pytest.fixture(scope="session")
def labels() -> tuple[str, ...]:
    return LABELS


@pytest.fixture(autouse=True, scope="session")
def _quiet_transformers() -> Iterator[None]:
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


def _random_update(rng: np.random.Generator, out: int, inner: int, rank: int) -> LowRank:
    """Orthonormal factors with singular values 0.5, 0.25, ...: large enough to move logits."""
    u, _ = np.linalg.qr(rng.standard_normal((out, rank)))
    v, _ = np.linalg.qr(rng.standard_normal((inner, rank)))
    sigma = 0.5 ** np.arange(1, rank + 1)
    return LowRank(u.astype(np.float32), sigma.astype(np.float32), v.astype(np.float32))


@pytest.fixture(scope="session")
def llama_adapter() -> GlobalAdapter:
    """Unequal ranks on matrices of stories260k, one of them empty."""
    rng = np.random.default_rng(1)
    layer = "model.layers.{}"
    shapes = {
        f"{layer.format(0)}.self_attn.q_proj": (64, 64, 4),
        f"{layer.format(1)}.self_attn.k_proj": (32, 64, 2),
        f"{layer.format(2)}.mlp.down_proj": (64, 172, 8),
        f"{layer.format(4)}.mlp.gate_proj": (172, 64, 3),
        f"{layer.format(4)}.mlp.up_proj": (172, 64, 0),
    }
    matrices = {name: _random_update(rng, *shape) for name, shape in shapes.items()}
    return GlobalAdapter(round=3, matrices=matrices)


@pytest.fixture(scope="session")
def bert_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT saved as a bare encoder: its tensor names lack the prefix `bert.`."""
    folder = tmp_path_factory.mktemp("bert")
    config = BertConfig(
        vocab_size=99,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    BertModel(config).save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}", encoding="utf-8")
    (folder / "vocab.txt").write_text("[PAD]\n", encoding="utf-8")
    (folder / "LICENSE").write_text("free\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def bert_adapter() -> GlobalAdapter:
    rng = np.random.default_rng(2)
    encoder = "encoder.layer.{}"
    return GlobalAdapter(
        round=2,
        matrices={
            f"{encoder.format(0)}.attention.self.query": _random_update(rng, 32, 32, 3),
            f"{encoder.format(1)}.output.dense": _random_update(rng, 32, 48, 5),
        },
        dense={
            "classifier.weight": rng.standard_normal((3, 32)).astype(np.float32),
            "classifier.bias": rng.standard_normal(3).astype(np.float32),
        },
    )


@pytest.fixture(scope="session")
def logits_of() -> Callable[[torch.nn.Module], torch.Tensor]:
    """Logits that a model gives for a fixed batch whose second row is padded."""
    return _logits


@pytest.fixture(scope="session")
def llama_logits(stories260k: Path, llama_adapter: GlobalAdapter) -> torch.Tensor:
    """Logits of the base with each update as its own branch beside the weight."""
    model = AutoModelForCausalLM.from_pretrained(stories260k)
    before = _logits(model)
    _attach_branches(model, llama_adapter.matrices)
    after = _logits(model)
    assert (after - before).abs().max() > 0.1  # the adapter matters to what is compared
    return after


@pytest.fixture(scope="session")
def bert_logits(bert_base: Path, bert_adapter: GlobalAdapter) -> torch.Tensor:
    """Logits of the base with each update as its own branch and the task head set."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    model = AutoModelForSequenceClassification.from_pretrained(bert_base, num_labels=len(LABELS))
    logging.set_verbosity(level)
    with torch.no_grad():
        for name, value in bert_adapter.dense.items():
            model.get_parameter(name).copy_(torch.from_numpy(value))
    before = _logits(model)
    _attach_branches(model, {f"bert.{name}": low for name, low in bert_adapter.matrices.items()})
    after = _logits(model)
    assert (after - before).abs().max() > 1e-2
    return after


@torch.no_grad()
def _logits(model: torch.nn.Module) -> torch.Tensor:
    ids = torch.randint(3, 99, (2, 10), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, -3:] = 0
    logits: torch.Tensor = model.eval()(input_ids=ids, attention_mask=mask).logits
    return logits if logits.ndim == 2 else logits[mask.bool()]


def _attach_branches(model: torch.nn.Module, updates: Mapping[str, LowRank]) -> None:
    """Make each named linear layer give `W x + u diag(sigma) v.T x`, leaving W alone."""
    for path, update in updates.items():
        u, v = torch.from_numpy(update.u * update.sigma), torch.from_numpy(update.v)

        def branch(
            _: torch.nn.Module,
            inputs: tuple[torch.Tensor],
            output: torch.Tensor,
            u: torch.Tensor = u,
            v: torch.Tensor = v,
        ) -> torch.Tensor:
            return output + inputs[0] @ v @ u.T

        model.get_submodule(path).register_forward_hook(branch)
