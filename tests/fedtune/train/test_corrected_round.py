"""What a correction pair changes, and that nobody else ever sees it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

torch = pytest.importorskip("torch")

from fedtune.aggregate.rules import make_rule  # noqa: E402
from fedtune.model.backbone import Backbone, BackboneShelf  # noqa: E402
from fedtune.model.shapes import read_shapes  # noqa: E402
from fedtune.records import (  # noqa: E402
    AdapterUpdate,
    Contribution,
    DevicePlan,
    Dispatch,
    MatrixForm,
    MatrixPlan,
    ModelShapes,
)
from fedtune.train.round import RoundResult, train_round  # noqa: E402
from fedtune.wire.messages import OptimizerSpec  # noqa: E402
from fedtune.wire.packing import pack_tensors, packed_shapes  # noqa: E402
from fedtune.wire.tensors import update_shapes, update_tensors  # noqa: E402

TOKENS = torch.arange(3, 40)[None]


@dataclass(frozen=True)
class Sample:
    tokens: NDArray[np.int32]
    loss_mask: NDArray[np.bool_]
    label: int = -1


@pytest.fixture(scope="module")
def shapes(tiny_llama: Path) -> ModelShapes:
    return read_shapes(tiny_llama, ("all-linear",))


def plan_of(shapes: ModelShapes, correction_rank: int) -> DevicePlan:
    matrices = tuple(
        MatrixPlan(m.name, 2, "q2", block_size=64, correction_rank=correction_rank)
        for m in shapes.matrices
    )
    return DevicePlan("site", matrices, 4, 4, 32, 3)


def backbone_of(folder: Path, plan: DevicePlan) -> Backbone:
    shelf = BackboneShelf(folder, torch.device("cpu"), keep_base=False)
    return shelf.get("causal-lm", (), {m.name: m.form for m in plan.matrices})


def exact(folder: Path, shapes: ModelShapes) -> Backbone:
    shelf = BackboneShelf(folder, torch.device("cpu"), keep_base=False)
    return shelf.get("causal-lm", (), {m.name: MatrixForm("fp32") for m in shapes.matrices})


def logits(backbone: Backbone) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = backbone.model(input_ids=TOKENS).logits
    return found


def start(shapes: ModelShapes, plan: DevicePlan) -> Dispatch:
    rule = make_rule("delta", 8)
    return rule.dispatch(
        rule.start(shapes.matrices, {}), plan, scale=1.0, rng=np.random.default_rng(0)
    )


def train(backbone: Backbone, plan: DevicePlan, sent: Dispatch) -> RoundResult:
    rng = np.random.default_rng(0)
    steps = [
        [Sample(rng.integers(3, 200, 20).astype(np.int32), np.ones(20, np.bool_)) for _ in range(4)]
        for _ in range(plan.local_steps)
    ]
    spec = OptimizerSpec("adamw", 1e-2, 1e-2)
    return train_round(backbone, steps, sent, plan, spec, task="causal-lm", pad_id=2)


def pairs(backbone: Backbone) -> Mapping[str, tuple[torch.Tensor, torch.Tensor]]:
    found = {}
    for name, layer in backbone.layers.items():
        assert layer.correction is not None
        found[name] = (layer.correction.a.clone(), layer.correction.b.clone())
    return found


def test_a_repaired_backbone_is_nearer_to_the_base(tiny_llama: Path, shapes: ModelShapes) -> None:
    right = logits(exact(tiny_llama, shapes))
    errors = [
        float((logits(backbone_of(tiny_llama, plan_of(shapes, rank))) - right).norm())
        for rank in (0, 4, 12)
    ]
    assert errors[2] < errors[1] < errors[0]


def test_a_layer_computes_with_matrix_and_pair_together(
    tiny_llama: Path, shapes: ModelShapes
) -> None:
    backbone = backbone_of(tiny_llama, plan_of(shapes, 4))
    layer = backbone.layers[shapes.matrices[0].name]
    assert layer.correction is not None
    dense = layer.matrix.values(torch.float32)
    dense = dense + layer.correction.b.float() @ layer.correction.a.float()
    x = torch.randn(5, layer.in_features, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(layer(x), x @ dense.t(), rtol=1e-4, atol=1e-5)


def test_training_leaves_the_pair_as_it_is(tiny_llama: Path, shapes: ModelShapes) -> None:
    plan = plan_of(shapes, 4)
    backbone = backbone_of(tiny_llama, plan)
    before = pairs(backbone)
    train(backbone, plan, start(shapes, plan))
    for name, (a, b) in pairs(backbone).items():
        assert torch.equal(a, before[name][0])
        assert torch.equal(b, before[name][1])
        assert not a.requires_grad
        assert not b.requires_grad


def test_the_pair_never_leaves_the_device(tiny_llama: Path, shapes: ModelShapes) -> None:
    """What travels has the same names and shapes, whatever the correction."""
    sent_back = []
    for rank in (0, 4):
        plan = plan_of(shapes, rank)
        result = train(backbone_of(tiny_llama, plan), plan, start(shapes, plan))
        packed = pack_tensors(update_tensors(result.factors, result.dense), "fp32")
        sent_back.append(packed_shapes(packed))
        assert packed_shapes(packed) == update_shapes(plan, shapes.by_name(), {})
    assert sent_back[0] == sent_back[1]
    assert {shape[0] for name, shape in sent_back[0].items() if name.endswith(".a")} == {2}


def test_one_repaired_device_is_still_the_identity_of_joining(
    tiny_llama: Path, shapes: ModelShapes
) -> None:
    plan = plan_of(shapes, 4)
    rule = make_rule("delta", 8)
    sent = start(shapes, plan)
    result = train(backbone_of(tiny_llama, plan), plan, sent)
    update = AdapterUpdate("run", 1, "site", shapes.digest, result.factors, result.dense, 4, 4)
    joined = rule.join(rule.start(shapes.matrices, {}), [Contribution(1.0, sent, update)])
    for name, pair in result.factors.items():
        np.testing.assert_allclose(joined.matrices[name].product(), pair.product(), atol=1e-5)
