"""One site with a tiny model, and the orders that a coordinator would send it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedtune.config import parse_run_config
from fedtune.model.shapes import read_shapes
from fedtune.model.source import base_digest
from fedtune.records import DevicePlan, LoraFactors, MatrixPlan
from fedtune.settings import RunConfig
from fedtune.wire.messages import EvaluateInstruction, OptimizerSpec, TaskSpec, TrainInstruction
from fedtune.wire.packing import pack_tensors, tensors_digest
from fedtune.wire.tensors import update_tensors
from fedtune_client.agent import Agent
from fedtune_client.site import SimulatedFleet, SiteSettings

MEMORY = 10**7


@dataclass(frozen=True)
class Desk:
    """A run's settings, and orders for its devices.

    Attributes:
        dense: name -> shape of the head, as an order fills it in.
    """

    config: RunConfig
    labels: tuple[str, ...] = ()
    dense: tuple[tuple[str, tuple[int, ...]], ...] = ()

    @property
    def folder(self) -> Path:
        return Path(self.config.model.path)

    @property
    def spec(self) -> TaskSpec:
        return TaskSpec("run-1", self.config.model.task, base_digest(self.folder), ())

    def site(self, partition: int = 0) -> SiteSettings:
        site = SimulatedFleet(self.config.model_dump_json())({"partition-id": partition})
        return replace(site, state_folder=None)

    def agent(self, partition: int = 0) -> Agent:
        return Agent(self.site(partition))

    def plan(self, device: str, **changes: Any) -> DevicePlan:
        format_name = changes.pop("format", "fp32")
        matrices = read_shapes(self.folder, ("all-linear",)).matrices
        fields: dict[str, Any] = {
            "matrices": tuple(MatrixPlan(m.name, 2, format_name) for m in matrices),
            "micro_batch": 2,
            "batch_size": 4,
            "sequence_length": 40,
            "local_steps": 1,
            "peak_bytes": MEMORY,
        }
        return DevicePlan(device, **{**fields, **changes})

    def tensors(self, plan: DevicePlan, seed: int = 0) -> bytes:
        """What a device of the plan starts from, packed."""
        rng = np.random.default_rng(seed)
        factors = {
            m.name: LoraFactors(
                rng.normal(0, 0.1, (2, m.in_features)).astype(np.float32),
                rng.normal(0, 0.1, (m.out_features, 2)).astype(np.float32),
            )
            for m in read_shapes(self.folder, ("all-linear",)).matrices
            if m.name in plan.ranks()
        }
        dense = {name: rng.normal(0, 0.1, shape).astype(np.float32) for name, shape in self.dense}
        return pack_tensors(update_tensors(factors, dense), "fp32")

    def order(
        self, plan: DevicePlan, packed: bytes, round: int = 1, **changes: Any
    ) -> TrainInstruction:
        fields: dict[str, Any] = {
            "base_digest": base_digest(self.folder),
            "plan": plan,
            "optimizer": OptimizerSpec(),
            "seed": 7,
            "tensors_digest": tensors_digest(packed),
            "labels": self.labels,
        }
        return TrainInstruction("run-1", round, **{**fields, **changes})

    def evaluation(self, plan: DevicePlan, packed: bytes) -> EvaluateInstruction:
        order = self.order(plan, packed)
        return EvaluateInstruction(
            "run-1", 3, order.base_digest, plan, order.tensors_digest, order.scale, self.labels
        )


def _tree(model: Path, rows: Path, **data: object) -> dict[str, Any]:
    return {
        "model": {"path": str(model)},
        "data": {
            "train": str(rows),
            "max_tokens": 40,
            "partition": {"by": "field", "field": "client"},
            **data,
        },
        "fleet": {"any": {"count": 4, "memory": MEMORY, "formats": ["fp32", "nf4"]}},
    }


@pytest.fixture(scope="session")
def desk(tiny_llama: Path, colour_rows: Path) -> Desk:
    """Four sites (east, north, south, west) that tune a language model."""
    return Desk(parse_run_config(_tree(tiny_llama, colour_rows), "test"))


@pytest.fixture(scope="session")
def classifying_desk(tiny_bert: Path, letter_rows: Path) -> Desk:
    """The same sites, classifying letters; north has no c, south no a, west no b."""
    tree = _tree(tiny_bert, letter_rows, format="text-label")
    tree["model"]["task"] = "sequence-classification"
    heads = (("classifier.bias", (3,)), ("classifier.weight", (3, 32)))
    return Desk(parse_run_config(tree, "test"), ("a", "b", "c"), heads)


@pytest.fixture
def change() -> Callable[..., Desk]:
    """The desk of a run with some settings of `data` changed."""

    def changed(desk: Desk, **data: object) -> Desk:
        tree = desk.config.model_dump()
        tree["data"] |= data
        return Desk(parse_run_config(tree, "test"), desk.labels, desk.dense)

    return changed
