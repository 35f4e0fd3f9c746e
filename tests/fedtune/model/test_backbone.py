"""Devices share what does not change: one reading of the base, one backbone per set of formats."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from fedtune.errors import ModelError
from fedtune.model import backbone as backbone_module
from fedtune.model.backbone import Backbone, BackboneShelf
from fedtune.model.load import load_base
from fedtune.model.shapes import read_shapes
from fedtune.model.stream import BaseTensors
from fedtune.quant.block import BlockMatrix
from fedtune.records import FormatName, MatrixForm

TOKENS = torch.arange(3, 40)[None]
Formats = dict[str, MatrixForm]


def formats(folder: Path, name: FormatName) -> Formats:
    return {
        matrix.name: MatrixForm(name) for matrix in read_shapes(folder, ("all-linear",)).matrices
    }


def shelf(folder: Path, keep_base: bool = True) -> BackboneShelf:
    return BackboneShelf(folder, torch.device("cpu"), keep_base)


def logits(backbone: Backbone) -> Tensor:
    with torch.no_grad():
        return backbone.model(input_ids=TOKENS).logits  # type: ignore[no-any-return]


@pytest.fixture
def readings(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Grows by one each time that a base is read from disk."""
    seen: list[object] = []
    stream = backbone_module.stream_base
    monkeypatch.setattr(backbone_module, "stream_base", lambda *a: (seen.append(a), stream(*a))[1])
    return seen


def test_the_same_formats_give_the_same_backbone(tiny_llama: Path, readings: list[object]) -> None:
    backbones = shelf(tiny_llama)
    first = backbones.get("causal-lm", (), formats(tiny_llama, "fp32"))
    again = backbones.get("causal-lm", (), dict(reversed(formats(tiny_llama, "fp32").items())))
    other = backbones.get("causal-lm", (), formats(tiny_llama, "nf4"))
    assert first is again
    assert first is not other
    assert (len(backbones), len(readings)) == (2, 1)


def test_a_device_of_its_own_keeps_no_second_copy(tiny_llama: Path, readings: list[object]) -> None:
    backbones = shelf(tiny_llama, keep_base=False)
    for name in ("fp32", "bf16"):
        backbones.get("causal-lm", (), formats(tiny_llama, name))
    assert len(readings) == 2
    assert backbones._skeletons == {}


def test_backbones_share_all_that_is_not_in_a_format(tiny_llama: Path) -> None:
    backbones = shelf(tiny_llama)
    one = backbones.get("causal-lm", (), formats(tiny_llama, "int8")).model
    two = backbones.get("causal-lm", (), formats(tiny_llama, "nf4")).model
    places = {name: value.data_ptr() for name, value in one.named_parameters()}
    assert places == {name: value.data_ptr() for name, value in two.named_parameters()}
    assert "model.embed_tokens.weight" in places
    assert not any(name.endswith("_proj.weight") for name in places)


def test_other_labels_make_another_classifier(tiny_bert: Path) -> None:
    backbones = shelf(tiny_bert)
    chosen = formats(tiny_bert, "fp32")
    two = backbones.get("sequence-classification", ("a", "b"), chosen)
    three = backbones.get("sequence-classification", ("a", "b", "c"), chosen)
    assert two.parameter("classifier.weight").shape[0] == 2
    assert three.parameter("classifier.weight").shape[0] == 3


def test_an_unquantised_backbone_computes_what_the_base_does(tiny_llama: Path) -> None:
    with torch.no_grad():
        expected = load_base(tiny_llama, "causal-lm")(input_ids=TOKENS).logits
    found = logits(shelf(tiny_llama).get("causal-lm", (), formats(tiny_llama, "fp32")))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_fewer_bits_are_further_from_the_base_and_smaller(tiny_llama: Path) -> None:
    names: tuple[FormatName, ...] = ("fp32", "bf16", "int8", "q4", "q3", "q2")
    backbones = shelf(tiny_llama)
    found = {name: backbones.get("causal-lm", (), formats(tiny_llama, name)) for name in names}
    exact = logits(found["fp32"])
    errors = [float((logits(found[name]) - exact).norm()) for name in names]
    sizes = [found[name].packed_bytes for name in names]
    assert errors == sorted(errors)
    assert errors[1] > 0
    assert sizes == sorted(sizes, reverse=True)
    parameters = sum(m.parameters for m in read_shapes(tiny_llama, ("all-linear",)).matrices)
    assert sizes[:2] == [4 * parameters, 2 * parameters]
    assert parameters < sizes[2] < 1.5 * parameters
    for bits, size in zip((4, 3, 2), sizes[3:], strict=True):
        assert parameters * bits / 8 < size < parameters * (bits + 0.25) / 8


def test_each_matrix_is_held_in_its_own_form(tiny_llama: Path) -> None:
    chosen = formats(tiny_llama, "q4")
    first, second, *_ = chosen
    chosen |= {first: MatrixForm("q2", 32), second: MatrixForm("bf16")}
    layers = shelf(tiny_llama).get("causal-lm", (), chosen).layers
    assert isinstance(layers[first].matrix, BlockMatrix)
    assert layers[first].matrix.metadata()["block"] == "32"
    assert [layers[name].matrix.format for name in (first, second)] == ["q2", "bf16"]


def test_sets_of_forms_that_name_other_matrices_are_each_right(tiny_llama: Path) -> None:
    every = formats(tiny_llama, "fp32")
    some = {name: form for name, form in every.items() if name.endswith("q_proj")}
    rest = {name: form for name, form in every.items() if name not in some}
    with torch.no_grad():
        expected = load_base(tiny_llama, "causal-lm")(input_ids=TOKENS).logits
    for compute in (torch.float32, torch.bfloat16):
        backbones = BackboneShelf(tiny_llama, torch.device("cpu"), True, compute=compute)
        for chosen in (some, every, rest, some):
            found = backbones.get("causal-lm", (), chosen)
            assert found.layers.keys() == chosen.keys()
            near = 1e-5 if compute == torch.float32 else 0.3
            torch.testing.assert_close(logits(found).float(), expected, rtol=near, atol=near)
        for layer in backbones.get("causal-lm", (), every).layers.values():
            assert layer.matrix.values(torch.float32).dtype == torch.float32


def test_a_matrix_is_quantised_from_the_file_whatever_the_dtype_to_compute_in(
    tiny_llama: Path,
) -> None:
    chosen = formats(tiny_llama, "fp32")
    backbones = BackboneShelf(
        tiny_llama, torch.device("cpu"), keep_base=True, compute=torch.bfloat16
    )
    first = dict(list(chosen.items())[:1])
    for forms in (first, chosen):
        layers = backbones.get("causal-lm", (), forms).layers
        for name, layer in layers.items():
            stored = BaseTensors(tiny_llama).read(f"{name}.weight")
            assert torch.equal(layer.matrix.values(torch.float32), stored)


def test_a_head_stays_in_float32_whatever_the_dtype_to_compute_in(tiny_bert: Path) -> None:
    backbones = BackboneShelf(
        tiny_bert, torch.device("cpu"), keep_base=True, compute=torch.bfloat16
    )
    built = backbones.get("sequence-classification", ("a", "b"), formats(tiny_bert, "fp32"))
    dtypes = {n: p.dtype for n, p in built.model.named_parameters()}
    heads = {name for name, dtype in dtypes.items() if dtype == torch.float32}
    assert heads == {"classifier.weight", "classifier.bias"}


def test_a_backbone_is_frozen_and_in_evaluation_mode(tiny_bert: Path) -> None:
    built = shelf(tiny_bert).get("sequence-classification", ("a",), formats(tiny_bert, "nf4"))
    assert not any(parameter.requires_grad for parameter in built.model.parameters())
    assert not any(module.training for module in built.model.modules())


def test_a_matrix_that_is_not_linear_is_refused(tiny_llama: Path) -> None:
    words = r"matrix model\.embed_tokens is a Embedding, and only linear .* out of lora\.targets"
    with pytest.raises(ModelError, match=words):
        shelf(tiny_llama).get("causal-lm", (), {"model.embed_tokens": MatrixForm("fp32")})


def test_a_failed_build_leaves_the_base_whole_for_the_next(tiny_llama: Path) -> None:
    backbones = shelf(tiny_llama)
    chosen = formats(tiny_llama, "int8")
    with pytest.raises(ModelError):
        backbones.get("causal-lm", (), chosen | {"model.embed_tokens": MatrixForm("int8")})
    expected = logits(shelf(tiny_llama).get("causal-lm", (), chosen))
    torch.testing.assert_close(logits(backbones.get("causal-lm", (), chosen)), expected)


def test_a_parameter_that_is_not_there_is_refused(tiny_llama: Path) -> None:
    built = shelf(tiny_llama).get("causal-lm", (), formats(tiny_llama, "fp32"))
    with pytest.raises(ModelError, match=r"LlamaForCausalLM has no parameter classifier\.weight"):
        built.parameter("classifier.weight")
