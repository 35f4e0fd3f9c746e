"""A base is loaded frozen from its folder alone, and its matrices are found by their names."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel
from transformers.utils import logging

from fedtune.errors import MissingExtraError, ModelError
from fedtune.model.load import dense_shapes, load_base, module_path, tensor_names

LABELS = ("a", "b", "c")


@pytest.fixture
def copied(tiny_llama: Path, tmp_path: Path) -> Path:
    """A copy of the base that a test may spoil."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "copied"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_base_is_frozen_in_evaluation_mode_and_holds_the_folders_values(
    tiny_llama: Path, dtype: torch.dtype
) -> None:
    model = load_base(tiny_llama, "causal-lm", dtype=dtype)
    stored = load_file(tiny_llama / "model.safetensors")
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, stored[name].to(dtype), rtol=0, atol=0)


def test_a_classifier_counts_its_labels_in_their_order(tiny_bert: Path) -> None:
    model = load_base(tiny_bert, "sequence-classification", LABELS)
    assert model.config.id2label == dict(enumerate(LABELS))
    assert model.config.label2id == {"a": 0, "b": 1, "c": 2}
    logits = model(input_ids=torch.tensor([[5, 6, 7]])).logits
    assert logits.shape == (1, 3)


def test_a_classifier_without_a_padding_token_ends_at_the_end_token(copied: Path) -> None:
    config = (copied / "config.json").read_text(encoding="utf-8")
    spoiled = config.replace('"pad_token_id": 2', '"pad_token_id": null')
    assert spoiled != config
    (copied / "config.json").write_text(spoiled, encoding="utf-8")
    model = load_base(copied, "sequence-classification", LABELS)
    assert model.config.pad_token_id == model.config.eos_token_id == 1


def test_loading_leaves_transformers_log_settings_as_they_were(tiny_bert: Path) -> None:
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    try:
        for shown in (True, False):
            logging.set_verbosity_info()
            (logging.enable_progress_bar if shown else logging.disable_progress_bar)()
            load_base(tiny_bert, "sequence-classification", LABELS)
            assert logging.get_verbosity() == logging.INFO
            assert logging.is_progress_bar_enabled() == shown
    finally:
        logging.set_verbosity(level)
        (logging.enable_progress_bar if bars else logging.disable_progress_bar)()


# ---------------------------------------------------------------- refusals


def test_a_folder_that_lacks_weights_of_the_model_is_refused(copied: Path) -> None:
    stored = load_file(copied / "model.safetensors")
    del stored["model.layers.1.mlp.up_proj.weight"]
    save_file(stored, copied / "model.safetensors", {"format": "pt"})
    words = r"lacks weights that LlamaForCausalLM needs: model\.layers\.1\.mlp\.up_proj\.weight; is"
    with pytest.raises(ModelError, match=words):
        load_base(copied, "causal-lm")


def test_weights_that_are_cut_short_are_refused_in_one_line(copied: Path) -> None:
    weights = copied / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelError, match="cannot be loaded for causal-lm: ") as caught:
        load_base(copied, "causal-lm")
    assert "\n" not in str(caught.value)


def test_a_broken_config_is_refused_in_one_line(copied: Path) -> None:
    (copied / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(ModelError, match=r"has no usable config\.json: ") as caught:
        load_base(copied, "causal-lm")
    assert "\n" not in str(caught.value)


def test_an_absent_library_is_named_with_its_extra(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtraError, match=r"needs the package transformers.*fedtune\[train"):
        load_base(tiny_llama, "causal-lm")


# ---------------------------------------------------------------- heads and names


def test_a_language_model_trains_nothing_whole(tiny_llama: Path) -> None:
    assert dense_shapes(tiny_llama, "causal-lm", tensor_names(tiny_llama)) == {}


@pytest.mark.parametrize("base", ["tiny_bert", "tiny_llama"])
def test_a_head_is_what_the_folder_lacks_with_its_label_axis_as_0(
    base: str, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(base)
    found = dense_shapes(folder, "sequence-classification", tensor_names(folder))
    model = load_base(folder, "sequence-classification", LABELS)
    filled = {n: tuple(len(LABELS) if a == 0 else a for a in s) for n, s in found.items()}
    assert filled == {name: tuple(model.get_parameter(name).shape) for name in found}
    assert all(0 in shape for shape in found.values())
    held = {module_path(n.removesuffix(".weight"), model) for n in _weights(folder)}
    rest = {n.removesuffix(".weight") for n, _ in model.named_parameters() if n.endswith(".weight")}
    assert rest - held == {name.removesuffix(".weight") for name in found if "bias" not in name}


def _weights(folder: Path) -> list[str]:
    """Header names of weights that the task model holds, too."""
    names = [name for name in tensor_names(folder) if name.endswith(".weight")]
    return [name for name in names if not name.startswith("lm_head")]


def test_a_matrix_is_found_with_and_without_the_models_prefix(
    tiny_llama: Path, tiny_bert: Path
) -> None:
    llama, up = load_base(tiny_llama, "causal-lm"), "layers.0.mlp.up_proj"
    assert module_path(f"model.{up}", llama) == f"model.{up}"
    assert module_path(f"model.{up}", AutoModel.from_pretrained(tiny_llama)) == up
    bert = load_base(tiny_bert, "sequence-classification", LABELS)
    query = "encoder.layer.0.attention.self.query"
    assert module_path(query, bert) == f"bert.{query}"


def test_a_matrix_that_is_not_in_the_model_is_refused(tiny_llama: Path) -> None:
    model = load_base(tiny_llama, "causal-lm")
    words = r"matrix model\.layers\.9\.ghost of the .* not a module of LlamaForCausalLM; name other"
    with pytest.raises(ModelError, match=words):
        module_path("model.layers.9.ghost", model)


def test_tensor_names_are_those_of_all_shards_sorted(tiny_llama: Path, tmp_path: Path) -> None:
    model = load_base(tiny_llama, "causal-lm")
    model.save_pretrained(tmp_path, max_shard_size="40kB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert tensor_names(tmp_path) == tensor_names(tiny_llama)
    assert tensor_names(tiny_llama) == sorted(load_file(tiny_llama / "model.safetensors"))
