"""Only a plain linear layer is replaced, and what is left is named."""

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedtune.errors import ModelError
from fedtune.lora.linear import AdaptedLinear
from fedtune.model.replace import coverage, is_transposed, linear_at, oriented
from fedtune.quant.storage import store
from fedtune.records import MatrixForm


class Router(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).softmax(-1)


class Named(nn.Linear):
    """A name of its own, and nothing else."""


@pytest.mark.parametrize("module", [nn.Linear(3, 5), Named(3, 5), Conv1D(5, 3)])
def test_a_plain_layer_is_taken_and_its_matrix_is_out_by_in(module: nn.Module) -> None:
    model = nn.Sequential(module)
    assert linear_at(model, "0", "h.0.fc") is module
    weight = oriented(module.get_parameter("weight"), module)
    assert tuple(weight.shape) == (5, 3)
    x = torch.randn(2, 3)
    bias = module.get_parameter("bias")
    torch.testing.assert_close(module(x), nn.functional.linear(x, weight, bias))


def test_a_view_writes_to_the_module() -> None:
    module = Conv1D(5, 3)
    assert is_transposed(module)
    with torch.no_grad():
        oriented(module.weight, module)[4, 2] = 9.0
    assert module.weight[2, 4] == 9.0


@pytest.mark.parametrize(
    ("module", "kind"),
    [
        (nn.Embedding(3, 5), "Embedding"),
        (Router(3, 5), "Router"),
        (nn.MultiheadAttention(4, 2).out_proj, "NonDynamicallyQuantizableLinear"),
    ],
)
def test_a_layer_that_computes_something_else_is_refused(module: nn.Module, kind: str) -> None:
    words = f"matrix h.0.fc is a {kind}, and only linear layers can be adapted; leave it out"
    with pytest.raises(ModelError, match=words):
        linear_at(nn.Sequential(module), "0", "h.0.fc")


def test_what_is_adapted_and_what_is_left_fits_on_a_line() -> None:
    adapted = AdaptedLinear(store(torch.zeros(3, 3), MatrixForm("fp32")), torch.zeros(3))
    block = nn.ModuleDict({"fc": adapted, "gate": nn.Linear(3, 2), "norm": nn.LayerNorm(3)})
    model = nn.ModuleDict({"embed": nn.Embedding(4, 3), "layers": nn.ModuleList([block, block])})
    model["layers"][1] = nn.ModuleDict({"fc": adapted, "gate": nn.Linear(3, 2)})
    found = coverage(model)
    assert found.left == {
        "embed": "Embedding",
        "layers.0.gate": "Linear",
        "layers.1.gate": "Linear",
    }
    assert str(found).startswith("adapted: layers.N.fc; left: embed (Embedding), 2 x layers.N.gate")
    assert str(coverage(nn.Sequential())) == "adapted: nothing; left: nothing"
