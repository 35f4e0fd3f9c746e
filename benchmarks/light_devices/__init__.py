"""Devices that follow the protocol and train nothing: all that they cost is their messages."""

from __future__ import annotations

import time
import zlib
from collections.abc import Sequence

import numpy as np
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedtune.records import DeviceProfile, LoraFactors, MatrixShape, ModelShapes, SiteReport
from fedtune.wire import messages
from fedtune.wire.calibration import (
    CalibrationReport,
    decode_calibration_instruction,
    encode_calibration_report,
)
from fedtune.wire.feedback import encode_update
from fedtune.wire.flower import CALIBRATE, EVALUATE, PROFILE, TRAIN, from_record, to_record
from fedtune.wire.packing import pack_tensors, tensors_digest
from fedtune.wire.tensors import unpack_dispatch

WIDTH = 512
_PER_LAYER = 7


def shapes(layers: int) -> ModelShapes:
    """A transformer of so many layers, all of whose matrices are square."""
    return ModelShapes(
        digest="d" * 64,
        model_type="llama",
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        layers=layers,
        attention_heads=8,
        vocabulary=1000,
        matrices=tuple(
            MatrixShape(f"layers.{layer}.m{i}", WIDTH, WIDTH, layer)
            for layer in range(layers)
            for i in range(_PER_LAYER)
        ),
        other_parameters=WIDTH * 1000,
    )


def name(device: int) -> str:
    """Of a device, by its number."""
    return f"light-{device:04d}"


class LightFleet:
    """Devices of one app; Flower's `partition-id` says which one answers.

    Attributes:
        cpu_s: processor time that their answers took in their thread.
    """

    def __init__(
        self, devices: int, model: ModelShapes, names: Sequence[str] | None = None
    ) -> None:
        self.names = list(names or map(name, range(devices)))
        self.cpu_s = 0.0
        self._model = model

    def app(self) -> ClientApp:
        app = ClientApp()

        @app.query("profile")
        def profile(message: Message, context: Context) -> Message:
            profile = DeviceProfile(self._name(context), "light", 1, 64 * 10**9)
            report = SiteReport(profile, self._model.digest, 100, 10, 10_000)
            return Message(
                to_record(PROFILE, messages.encode_site_report(report)), reply_to=message
            )

        @app.query("calibration")
        def calibration(message: Message, context: Context) -> Message:
            body, _ = from_record(message.content, CALIBRATE)
            order = decode_calibration_instruction(body)
            nothing = pack_tensors({}, "fp32")
            report = CalibrationReport(
                run=order.run,
                device=self._name(context),
                base_digest=order.base_digest,
                method=order.method,
                samples=0,
                units=0,
                tokens=0,
                passes=0,
                tensors_digest=tensors_digest(nothing),
            )
            body = encode_calibration_report(report)
            return Message(to_record(CALIBRATE, body, nothing), reply_to=message)

        @app.train("lora")
        def train(message: Message, context: Context) -> Message:
            started = time.thread_time()
            body, packed = from_record(message.content, TRAIN)
            order = messages.decode_train_instruction(body)
            report, tensors = self._update(self._name(context), order, packed or b"")
            reply = to_record(TRAIN, messages.encode_train_report(report), tensors)
            self.cpu_s += time.thread_time() - started
            return Message(reply, reply_to=message)

        @app.evaluate("loss")
        def evaluate(message: Message, context: Context) -> Message:
            body, _ = from_record(message.content, EVALUATE)
            order = messages.decode_evaluate_instruction(body)
            found = {"held_out_loss": 2.0, "held_out_units": 10.0}
            report = messages.EvaluateReport(order.run, order.round, self._name(context), found)
            body = messages.encode_evaluate_report(report)
            return Message(to_record(EVALUATE, body), reply_to=message)

        return app

    def _name(self, context: Context) -> str:
        return self.names[int(context.node_config["partition-id"])]

    def _update(
        self, name: str, order: messages.TrainInstruction, packed: bytes
    ) -> tuple[messages.TrainReport, bytes]:
        sent = unpack_dispatch(packed, order.plan, self._model.by_name(), {}, order.scale)
        rng = np.random.default_rng([zlib.crc32(name.encode()), order.round])
        factors = {}
        for matrix, pair in sent.trained.items():
            step = rng.standard_normal(pair.b.shape, dtype=np.float32) * np.float32(0.01)
            factors[matrix] = LoraFactors(pair.a, pair.b + step, pair.scale)
        tensors, _ = encode_update(sent, factors, sent.dense, order.codec)
        report = messages.TrainReport(
            run=order.run,
            round=order.round,
            device=name,
            base_digest=order.base_digest,
            samples=order.plan.batch_size,
            tokens=order.plan.batch_size,
            tensors_digest=tensors_digest(tensors),
            metrics={"train_loss": 2.0, "train_units": 1.0, "seconds": 0.0},
        )
        return report, tensors
