"""A fleet of devices that follow the protocol and compute nothing, and one model's shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedtune.records import DeviceProfile, Event, LoraFactors, MatrixShape, ModelShapes, SiteReport
from fedtune.wire import messages
from fedtune.wire.calibration import (
    CalibrationInstruction,
    CalibrationReport,
    decode_calibration_instruction,
    encode_calibration_report,
)
from fedtune.wire.feedback import encode_update
from fedtune.wire.flower import CALIBRATE, EVALUATE, PROFILE, TRAIN, from_record, to_record
from fedtune.wire.messages import EvaluateReport, TrainInstruction, TrainReport
from fedtune.wire.packing import tensors_digest
from fedtune.wire.tensors import unpack_dispatch
from fedtune_server.fleet import Fleet, gather_fleet
from fedtune_server.open_round import OpenRounds
from fedtune_server.simulation.grid import FaultHook, InProcessGrid

SHAPES = ModelShapes(
    digest="d" * 64,
    model_type="llama",
    hidden_size=8,
    intermediate_size=12,
    layers=1,
    attention_heads=2,
    vocabulary=50,
    matrices=(MatrixShape("layers.0.up", 12, 8, 0), MatrixShape("layers.0.down", 8, 12, 0)),
    other_parameters=400,
)

Calibrated = Callable[[CalibrationInstruction], tuple[CalibrationReport, bytes]]
Spoil = Callable[[TrainReport, bytes], tuple[TrainReport, bytes]]


class FakeFleet:
    """Devices that add 0.01 (first device), 0.02 (second), ... to every `b` that they are sent.

    Attributes:
        reports: device -> what it says to the profile query.
        heads: shapes of the parameters that are trained whole, with the labels filled in.
        spoil: device -> what befalls its report and its tensors before they leave it.
        measured: device -> what it says to an evaluation.
        calibrated: device -> what it answers when asked to measure; nobody else can.
        orders: every instruction to train, as it arrived.
        events: all that the coordinator emitted.
    """

    def __init__(self, *names: str, folder: Path) -> None:
        self.open_rounds = OpenRounds(folder / "open")
        self.shapes = SHAPES
        self.names = names
        self.reports = {name: report(name, 10 * (i + 1)) for i, name in enumerate(names)}
        self.heads: dict[str, tuple[int, ...]] = {}
        self.spoil: dict[str, Spoil] = {}
        self.measured: dict[str, Mapping[str, float]] = {
            name: {"held_out_loss": i + 1.0, "held_out_units": 10.0 * (i + 1)}
            for i, name in enumerate(names)
        }
        self.calibrated: dict[str, Calibrated] = {}
        self.orders: list[TrainInstruction] = []
        self.events: list[Event] = []

    def change(self, name: str, **fields: Any) -> None:
        """Let a device report something else of itself."""
        self.reports[name] = replace(self.reports[name], **fields)

    def all(self, kind: str) -> list[Mapping[str, Any]]:
        return [event.fields for event in self.events if event.kind == kind]

    @contextmanager
    def grid(self, fault: FaultHook | None = None) -> Iterator[InProcessGrid]:
        with InProcessGrid(self._app(), len(self.names), fault=fault) as grid:
            yield grid

    def gather(self, grid: InProcessGrid, deadline_s: float = 30.0) -> Fleet:
        task = messages.TaskSpec("run-1", "causal-lm", SHAPES.digest, ())
        return gather_fleet(grid, grid.get_node_ids(), task, deadline_s, self.events.append)

    def lose(self, name: str, kind: str) -> FaultHook:
        """A fault: one device never answers messages of one kind."""
        node = 1000 + self.names.index(name)
        return lambda at, message: (
            "lost" if (at, message.metadata.message_type) == (node, kind) else None
        )

    def _name(self, context: Context) -> str:
        return self.names[int(context.node_config["partition-id"])]  # type: ignore[arg-type]

    def _app(self) -> ClientApp:
        app = ClientApp()

        @app.query("profile")
        def profile(message: Message, context: Context) -> Message:
            body = messages.encode_site_report(self.reports[self._name(context)])
            return Message(to_record(PROFILE, body), reply_to=message)

        @app.query("calibration")
        def calibration(message: Message, context: Context) -> Message:
            body, _ = from_record(message.content, CALIBRATE)
            answer = self.calibrated[self._name(context)]
            said, tensors = answer(decode_calibration_instruction(body))
            body = encode_calibration_report(said)
            return Message(to_record(CALIBRATE, body, tensors), reply_to=message)

        @app.train("lora")
        def train(message: Message, context: Context) -> Message:
            body, packed = from_record(message.content, TRAIN)
            name, order = self._name(context), messages.decode_train_instruction(body)
            self.orders.append(order)
            said, tensors = self._work(name, order, packed or b"")
            if name in self.spoil:
                said, tensors = self.spoil[name](said, tensors)
            body = messages.encode_train_report(said)
            return Message(to_record(TRAIN, body, tensors or None), reply_to=message)

        @app.evaluate("loss")
        def evaluate(message: Message, context: Context) -> Message:
            body, _ = from_record(message.content, EVALUATE)
            order, name = messages.decode_evaluate_instruction(body), self._name(context)
            found = EvaluateReport(order.run, order.round, name, self.measured[name])
            body = messages.encode_evaluate_report(found)
            return Message(to_record(EVALUATE, body), reply_to=message)

        return app

    def _work(self, name: str, order: TrainInstruction, packed: bytes) -> tuple[TrainReport, bytes]:
        sent = unpack_dispatch(packed, order.plan, SHAPES.by_name(), self.heads, order.scale)
        added = 0.01 * (self.names.index(name) + 1)
        factors = {
            matrix: LoraFactors(pair.a, pair.b + added, pair.scale)
            for matrix, pair in sent.trained.items()
        }
        tensors, _ = encode_update(sent, factors, sent.dense, order.codec)
        said = TrainReport(
            run=order.run,
            round=order.round,
            device=name,
            base_digest=order.base_digest,
            samples=order.plan.batch_size,
            tokens=7 * (self.names.index(name) + 1),
            tensors_digest=tensors_digest(tensors),
            metrics={**self.measured[name], "train_loss": 2.0, "train_units": 7.0}
            if order.evaluate
            else {"train_loss": 2.0, "train_units": 7.0},
        )
        return said, tensors


def report(name: str, samples: int) -> SiteReport:
    return SiteReport(
        profile=DeviceProfile(name, "any", 1, 10**9),
        base_digest=SHAPES.digest,
        train_samples=samples,
        held_out_samples=3,
        train_tokens=100 * samples,
    )


@pytest.fixture
def fleet_of(tmp_path: Path) -> Callable[..., FakeFleet]:
    """Make a fleet of named devices; the first has node 1000, 10 samples, and so on."""
    return partial(FakeFleet, folder=tmp_path)
