"""The frozen part of a model in a narrow dtype, and what stays float32 in it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedtune.model.backbone import Backbone, BackboneShelf
from fedtune.model.shapes import read_shapes
from fedtune.records import MatrixForm, TaskName

CPU = torch.device("cpu")


def backbone(folder: Path, task: TaskName, compute: torch.dtype) -> Backbone:
    labels = ("a", "b") if task == "sequence-classification" else ()
    forms = dict.fromkeys(read_shapes(folder, ("all-linear",)).by_name(), MatrixForm("q8"))
    return BackboneShelf(folder, CPU, keep_base=True, compute=compute).get(task, labels, forms)


@pytest.mark.parametrize("compute", [torch.bfloat16, torch.float16])
def test_activations_have_the_dtype_and_logits_are_about_the_same(
    tiny_llama: Path, compute: torch.dtype
) -> None:
    tokens = torch.arange(3, 40)[None]
    exact = backbone(tiny_llama, "causal-lm", torch.float32)
    narrow = backbone(tiny_llama, "causal-lm", compute)
    with torch.no_grad():
        wide = exact.model(input_ids=tokens).logits
        found = narrow.model(input_ids=tokens).logits
    assert found.dtype == compute
    assert (found.float() - wide).norm() < 0.02 * wide.norm()


def test_rotary_frequencies_stay_in_float32(tiny_llama: Path) -> None:
    model = backbone(tiny_llama, "causal-lm", torch.bfloat16).model
    buffers = dict(model.named_buffers())
    assert buffers
    assert {buffer.dtype for buffer in buffers.values()} == {torch.float32}


def test_tied_embeddings_stay_tied(tiny_llama: Path) -> None:
    model = backbone(tiny_llama, "causal-lm", torch.bfloat16).model
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert model.get_input_embeddings().weight.dtype == torch.bfloat16


def test_a_head_that_is_trained_whole_stays_in_float32_and_so_do_its_logits(
    tiny_bert: Path,
) -> None:
    held = backbone(tiny_bert, "sequence-classification", torch.bfloat16)
    head = held.parameter("classifier.weight")
    assert head.dtype == torch.float32
    assert held.model.bert.embeddings.word_embeddings.weight.dtype == torch.bfloat16
    head.requires_grad_(True)
    logits = held.model(input_ids=torch.arange(3, 20)[None]).logits
    assert logits.dtype == torch.float32
    logits.sum().backward()
    assert head.grad is not None
    assert head.grad.dtype == torch.float32


def test_backbones_of_one_shelf_share_the_narrow_embeddings(tiny_llama: Path) -> None:
    shelf = BackboneShelf(tiny_llama, CPU, keep_base=True, compute=torch.bfloat16)
    names = read_shapes(tiny_llama, ("all-linear",)).by_name()
    one, two = (
        shelf.get("causal-lm", (), dict.fromkeys(names, MatrixForm(form))) for form in ("q8", "q4")
    )
    first, second = (held.model.get_input_embeddings().weight for held in (one, two))
    assert first.dtype == torch.bfloat16
    assert first.data_ptr() == second.data_ptr()
