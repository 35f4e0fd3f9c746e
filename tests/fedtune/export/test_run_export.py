from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import cast

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from fedtune.errors import ConfigError, ModelError, RunError
from fedtune.export import merge, onnx_model, peft_adapter
from fedtune.export.run_export import export_run
from fedtune.model.source import base_digest
from fedtune.records import GlobalAdapter
from fedtune.wire.checkpoint import write_checkpoint

Logits = Callable[[nn.Module], Tensor]


def run_folder(
    folder: Path, base: Path, adapter: GlobalAdapter, labels: Sequence[str] = (), digest: str = ""
) -> Path:
    """A run folder as a finished run leaves it, as far as exports read it."""
    folder.mkdir()
    model: dict[str, str] = {"path": str(base)}
    data = {"train": "train.jsonl"}
    if labels:
        model["task"] = "sequence-classification"
        data["format"] = "text-label"
        (folder / "labels.json").write_text(json.dumps(labels), encoding="utf-8")
    config = {"model": model, "data": data, "fleet": {"laptop": {"count": 1, "memory": "1 GB"}}}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "ledger.jsonl").write_text('{"kind": "run_started", "run": "r"}\n', encoding="utf-8")
    meta = {"base_digest": digest or base_digest(base)}
    write_checkpoint(folder / "checkpoints", GlobalAdapter(1, {}), meta=meta)
    write_checkpoint(folder / "checkpoints", adapter, meta=meta)
    return folder


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.fixture
def llama_run(tmp_path: Path, stories260k: Path, llama_adapter: GlobalAdapter) -> Path:
    return run_folder(tmp_path / "run", stories260k, llama_adapter)


def _fake_onnx(merged: Path, task: str, labels: Sequence[str], folder: Path) -> Path:
    assert (merged / "model.safetensors").is_file()
    (folder / "model.onnx.data").write_bytes(b"weights")
    (folder / "model.onnx").write_bytes(b"graph")
    return folder / "model.onnx"


def test_all_exports_of_a_run_come_from_its_latest_checkpoint(
    llama_run: Path, llama_logits: Tensor, logits_of: Logits, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_model, "write_onnx", _fake_onnx)
    report = export_run(llama_run, ["merged", "peft", "onnx", "report"])
    exports = llama_run / "exports"
    assert report.paths == {
        "merged": str(exports / "merged"),
        "peft": str(exports / "peft"),
        "onnx": str(exports / "model.onnx"),
        "report": str(llama_run / "report.html"),
    }
    assert report.skipped == {}
    assert names_in(exports) == {"merged", "peft", "model.onnx", "model.onnx.data"}
    model = AutoModelForCausalLM.from_pretrained(exports / "merged")
    assert (logits_of(model) - llama_logits).abs().max() <= 1e-4
    assert names_in(exports / "peft") == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    }


def test_the_labels_of_a_classifier_come_from_the_run(
    tmp_path: Path,
    bert_base: Path,
    bert_adapter: GlobalAdapter,
    labels: Sequence[str],
    bert_logits: Tensor,
    logits_of: Logits,
) -> None:
    folder = run_folder(tmp_path / "run", bert_base, bert_adapter, labels)
    report = export_run(folder, ["merged", "peft"])
    model = AutoModelForSequenceClassification.from_pretrained(report.paths["merged"])
    assert (logits_of(model) - bert_logits).abs().max() <= 1e-4
    assert cast(Mapping[int, str], model.config.id2label) == dict(enumerate(labels))
    (folder / "labels.json").unlink()
    with pytest.raises(RunError, match=r"labels\.json must hold the run's class names"):
        export_run(folder, ["merged"])


def test_onnx_alone_leaves_no_merged_folder(
    llama_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_model, "write_onnx", _fake_onnx)
    export_run(llama_run, ["onnx"])
    assert names_in(llama_run / "exports") == {"model.onnx", "model.onnx.data"}


def test_an_onnx_failure_is_skipped_with_its_reason(
    llama_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> Path:
        raise ModelError("torch.onnx cannot export this")

    monkeypatch.setattr(onnx_model, "write_onnx", fail)
    report = export_run(llama_run, ["merged", "onnx"])
    assert report.paths.keys() == {"merged"}
    assert report.skipped == {"onnx": "torch.onnx cannot export this"}
    assert names_in(llama_run / "exports") == {"merged"}


def test_a_failed_export_leaves_the_one_before_in_its_place(
    llama_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_run(llama_run, ["peft"])
    before = (llama_run / "exports" / "peft" / "adapter_model.safetensors").read_bytes()

    def torn(*positional: object) -> None:
        folder = positional[4]
        assert isinstance(folder, Path)
        (folder / "adapter_model.safetensors").write_bytes(b"half")
        raise ModelError("stopped")

    monkeypatch.setattr(peft_adapter, "write_peft", torn)
    with pytest.raises(ModelError, match="stopped"):
        export_run(llama_run, ["peft"])
    assert (llama_run / "exports" / "peft" / "adapter_model.safetensors").read_bytes() == before
    monkeypatch.undo()
    export_run(llama_run, ["peft"])
    assert names_in(llama_run / "exports") == {"peft"}
    assert (llama_run / "exports" / "peft" / "adapter_model.safetensors").read_bytes() == before


def test_another_base_than_the_runs_is_refused(
    tmp_path: Path, stories260k: Path, llama_adapter: GlobalAdapter
) -> None:
    folder = run_folder(tmp_path / "run", stories260k, llama_adapter, digest="f" * 64)
    with pytest.raises(
        RunError, match=r"the run was trained on ffffffffffff; name the same .*--ba"
    ):
        export_run(folder, ["merged"])
    assert not (folder / "exports").exists()


def test_the_base_may_be_named_anew(
    tmp_path: Path, stories260k: Path, llama_adapter: GlobalAdapter
) -> None:
    digest = base_digest(stories260k)
    folder = run_folder(tmp_path / "run", tmp_path, llama_adapter, digest=digest)
    with pytest.raises(ModelError, match=r"no config\.json"):
        export_run(folder, ["peft"])
    assert export_run(folder, ["peft"], base=str(stories260k)).paths.keys() == {"peft"}


def test_a_report_alone_needs_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "ledger.jsonl").write_text('{"kind": "run_started"}\n', encoding="utf-8")
    assert export_run(tmp_path, ["report"]).paths == {"report": str(tmp_path / "report.html")}


def test_a_run_without_a_checkpoint_is_refused(llama_run: Path) -> None:
    for path in (llama_run / "checkpoints").iterdir():
        path.unlink()
    with pytest.raises(RunError, match="no checkpoint to export; let at least one round"):
        export_run(llama_run, ["merged"])


def test_an_unknown_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown export 'gguf'; valid: merged, peft, onnx, rep"):
        export_run(tmp_path, ["gguf"])


def test_without_torch_the_extra_is_named(llama_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from fedtune.errors import MissingExtraError

    monkeypatch.delitem(sys.modules, merge.__name__)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(MissingExtraError, match=r"needs the package torch; .*fedtune\[train\]"):
        export_run(llama_run, ["merged"])
    assert torch.__name__ == "torch"
