"""Two groups of two devices come to what the same four devices come to without groups."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedtune.config import parse_run_config
from fedtune.errors import RunError
from fedtune.records import (
    DeviceProfile,
    Event,
    GlobalAdapter,
    LoraFactors,
    MatrixShape,
    ModelShapes,
    SiteReport,
)
from fedtune.wire import messages
from fedtune.wire.feedback import encode_update
from fedtune.wire.flower import EVALUATE, PROFILE, TRAIN, from_record, to_record
from fedtune.wire.packing import tensors_digest
from fedtune.wire.tensors import unpack_dispatch
from fedtune_server.coordinator import Coordinator
from fedtune_server.hierarchy import Group, SubCoordinator, make_group_app
from fedtune_server.roster import Counted
from fedtune_server.run_folder import RunFolder
from fedtune_server.simulation.grid import InProcessGrid

Tree = dict[str, dict[str, Any]]

SHAPES = ModelShapes(
    digest="d" * 64,
    model_type="llama",
    hidden_size=32,
    intermediate_size=48,
    layers=1,
    attention_heads=2,
    vocabulary=50,
    matrices=(MatrixShape("layers.0.up", 48, 32, 0), MatrixShape("layers.0.down", 32, 48, 0)),
    other_parameters=400,
)
SAMPLES = {"a": 10, "b": 30, "c": 25, "d": 70}
CLASSES = {"a": "small", "b": "large", "c": "large", "d": "small"}
GROUPS = {"east": ("a", "b"), "west": ("c", "d")}
RANK_CAP = 6
ENOUGH = RANK_CAP + 2 + 4

TREE: Tree = {
    "run": {"name": "levels", "rounds": 3, "round_deadline_s": 30.0},
    "model": {"path": "not/read/here"},
    "data": {"train": "not-read.jsonl", "max_tokens": 16},
    "fleet": {
        "small": {"count": 2, "memory": "1 GB", "rank": 2},
        "large": {"count": 2, "memory": "1 GB", "rank": 4},
    },
    "lora": {"rank_max": 4, "rank_cap": RANK_CAP},
    "train": {"batch_size": 4, "local_steps": 3, "learning_rate": 0.1},
    "importance": {"method": "uniform"},
    "plan": {"steps": "equal"},
}


def above(tree: Tree, rank: int = ENOUGH, devices_max: int = 2) -> Tree:
    """The same run for the level above: its devices are groups."""
    changed = copy.deepcopy(tree)
    changed["fleet"] = {
        "group": {"count": 2, "memory": "1 GB", "rank": rank, "devices_max": devices_max}
    }
    return changed


@dataclass
class Devices:
    """Some of the devices; what each learns depends on what it was sent, its name and the round.

    Attributes:
        absent: devices that fail in a round.
        orders: every instruction to train, as it arrived.
    """

    names: tuple[str, ...]
    absent: Collection[tuple[str, int]] = ()
    orders: list[messages.TrainInstruction] = field(default_factory=list)

    def app(self) -> ClientApp:
        app = ClientApp()

        @app.query("profile")
        def profile(message: Message, context: Context) -> Message:
            name = self._name(context)
            profile = DeviceProfile(name, CLASSES[name], 1, 10**9)
            report = SiteReport(profile, SHAPES.digest, SAMPLES[name], 3, 100, {"head": (2, 3)})
            return Message(
                to_record(PROFILE, messages.encode_site_report(report)), reply_to=message
            )

        @app.train("lora")
        def train(message: Message, context: Context) -> Message:
            name = self._name(context)
            body, packed = from_record(message.content, TRAIN)
            order = messages.decode_train_instruction(body)
            self.orders.append(order)
            if (name, order.round) in self.absent:
                raise RunError(f"{name} is away")
            report, tensors = _learn(name, order, packed or b"")
            body = messages.encode_train_report(report)
            return Message(to_record(TRAIN, body, tensors), reply_to=message)

        @app.evaluate("loss")
        def evaluate(message: Message, context: Context) -> Message:
            name = self._name(context)
            body, packed = from_record(message.content, EVALUATE)
            order = messages.decode_evaluate_instruction(body)
            shapes = SHAPES.by_name()
            sent = unpack_dispatch(packed or b"", order.plan, shapes, {"head": (2, 3)}, order.scale)
            metrics = {
                "held_out_loss": 5 + sum(float(p.product().sum()) for p in sent.trained.values()),
                "held_out_units": float(SAMPLES[name]),
                "accuracy": SAMPLES[name] / 100,
            }
            report = messages.EvaluateReport(order.run, order.round, name, metrics)
            body = messages.encode_evaluate_report(report)
            return Message(to_record(EVALUATE, body), reply_to=message)

        return app

    def _name(self, context: Context) -> str:
        return self.names[int(context.node_config["partition-id"])]  # type: ignore[arg-type]


def _learn(
    name: str, order: messages.TrainInstruction, packed: bytes
) -> tuple[messages.TrainReport, bytes]:
    sent = unpack_dispatch(packed, order.plan, SHAPES.by_name(), {"head": (2, 3)}, order.scale)
    factors = {}
    for matrix, pair in sent.trained.items():
        rng = np.random.default_rng([zlib.crc32(f"{name} {matrix}".encode()), order.round])
        step_a, step_b = rng.normal(0, 0.02, pair.a.shape), rng.normal(0, 0.02, pair.b.shape)
        tail = sent.tail[matrix].product().mean() if matrix in sent.tail else 0.0
        b = pair.b + step_b + 0.1 * np.sin(pair.b) + tail
        factors[matrix] = LoraFactors(
            (pair.a + step_a).astype(np.float32), b.astype(np.float32), pair.scale
        )
    dense = {
        key: value + np.float32(len(name) + SAMPLES[name]) for key, value in sent.dense.items()
    }
    tensors, _ = encode_update(sent, factors, dense, order.codec)
    report = messages.TrainReport(
        run=order.run,
        round=order.round,
        device=name,
        base_digest=order.base_digest,
        samples=order.plan.batch_size,
        tokens=SAMPLES[name] % 48 + 1,
        tensors_digest=tensors_digest(tensors),
        metrics={
            "train_loss": float(SAMPLES[name]),
            "train_units": 7.0,
            "held_out_loss": 5.0 + order.round * SAMPLES[name] / 100,
            "held_out_units": float(SAMPLES[name]),
        },
    )
    return report, tensors


@dataclass
class Played:
    adapter: GlobalAdapter
    events: list[Event]
    orders: list[messages.TrainInstruction]
    below: list[Event] = field(default_factory=list)

    def all(self, kind: str) -> list[Mapping[str, Any]]:
        return [event.fields for event in self.events if event.kind == kind]


Absent = Collection[tuple[str, int]]


def play_flat(tree: Tree, folder: Path, absent: Absent = ()) -> Played:
    devices = Devices(tuple(SAMPLES), absent)
    events: list[Event] = []
    with RunFolder.create(folder / "flat") as run, InProcessGrid(devices.app(), 4) as grid:
        coordinator = Coordinator(parse_run_config(tree, "test"), SHAPES, run, events.append)
        return Played(coordinator.run(grid, Counted(4)), events, devices.orders)


def play_levels(
    tree: Tree, folder: Path, absent: Absent = (), rank: int = ENOUGH, devices_max: int = 2
) -> Played:
    events: list[Event] = []
    below: list[Event] = []
    fleets = {group: Devices(names, absent) for group, names in GROUPS.items()}
    with ExitStack() as stack:
        groups = {}
        for group, devices in fleets.items():
            grid = stack.enter_context(InProcessGrid(devices.app(), 2))
            run = stack.enter_context(RunFolder.create(folder / group))
            config = parse_run_config(tree, "test")
            shown = Group(group, "group", 2)
            groups[group] = SubCoordinator(shown, config, SHAPES, grid, run, below.append)

        def group_of(context: Context) -> SubCoordinator:
            return list(groups.values())[int(context.node_config["partition-id"])]  # type: ignore[arg-type]

        run = stack.enter_context(RunFolder.create(folder / "top"))
        config = parse_run_config(above(tree, rank, devices_max), "test")
        top = stack.enter_context(InProcessGrid(make_group_app(group_of), 2))
        adapter = Coordinator(config, SHAPES, run, events.append).run(top, Counted(2))
    orders = [order for devices in fleets.values() for order in devices.orders]
    return Played(adapter, events, orders, below)


def largest_difference(first: GlobalAdapter, second: GlobalAdapter) -> float:
    """Of the joined products, relative to their norm."""
    return max(
        float(
            np.linalg.norm(second.matrices[name].product() - matrix.product())
            / np.linalg.norm(matrix.product())
        )
        for name, matrix in first.matrices.items()
    )


@pytest.fixture
def tree() -> Tree:
    return copy.deepcopy(TREE)


@pytest.mark.parametrize("absent", [(), (("a", 2), ("d", 3))], ids=["all", "some are away"])
@pytest.mark.parametrize("weights", ["samples", "tokens", "uniform"])
def test_two_levels_equal_the_flat_run(
    tree: Tree, tmp_path: Path, weights: str, absent: Absent
) -> None:
    tree["aggregate"] = {"weights": weights}
    flat, levels = play_flat(tree, tmp_path, absent), play_levels(tree, tmp_path, absent)
    assert largest_difference(flat.adapter, levels.adapter) < 1e-5
    np.testing.assert_allclose(flat.adapter.dense["head"], levels.adapter.dense["head"], rtol=1e-5)
    for kind, key in (("round_finished", "held_out_loss"), ("evaluated", "held_out_loss")):
        one, other = ([f[key] for f in played.all(kind)] for played in (flat, levels))
        assert one == pytest.approx(other, rel=1e-5)
    assert flat.all("evaluated")[0]["accuracy"] == pytest.approx(
        levels.all("evaluated")[0]["accuracy"]
    )


def test_devices_are_sent_what_they_would_be_sent_without_groups(
    tree: Tree, tmp_path: Path
) -> None:
    tree["run"]["rounds"] = 1
    flat, levels = play_flat(tree, tmp_path), play_levels(tree, tmp_path)
    digests = [
        {order.plan.device: order.tensors_digest for order in played.orders}
        for played in (flat, levels)
    ]
    assert digests[0] == digests[1]


def test_a_rank_that_is_too_small_is_told_and_what_it_cuts_off_is_reported(
    tree: Tree, tmp_path: Path
) -> None:
    flat, levels = play_flat(tree, tmp_path), play_levels(tree, tmp_path, rank=5)
    texts = [e.fields["text"] for e in levels.below if e.kind == "warning"]
    assert len(texts) == 2  # once a group
    assert "needs rank 6" in str(texts[0])
    cut = [e.fields["dropped_energy"] for e in levels.below if e.kind == "round_finished"]
    assert max(map(float, cut)) > 1e-4  # type: ignore[arg-type]
    assert largest_difference(flat.adapter, levels.adapter) > 1e-3


def test_no_number_of_a_single_device_goes_up(tree: Tree, tmp_path: Path) -> None:
    levels = play_levels(tree, tmp_path)
    reports = [f for f in levels.all("device_reported") if f["round"] == 1]
    assert {f["device"] for f in reports} == set(GROUPS)
    assert [f["train_loss"] for f in reports] == [20.0, 47.5]


def test_a_site_cannot_count_as_several_devices_unless_its_class_may(
    tree: Tree, tmp_path: Path
) -> None:
    with pytest.raises(RunError, match="more devices than its class may"):
        play_levels(tree, tmp_path, devices_max=1)
