"""The Flower ClientApp: four message types, each handed to the site's agent."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import cast

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedtune.errors import ProtocolError
from fedtune.settings import RunConfig
from fedtune.train.allocator import keep_freed_memory
from fedtune.wire.calibration import decode_calibration_instruction, encode_calibration_report
from fedtune.wire.flower import CALIBRATE, EVALUATE, PROFILE, TRAIN, from_record, to_record
from fedtune.wire.messages import (
    decode_evaluate_instruction,
    decode_task_spec,
    decode_train_instruction,
    encode_evaluate_report,
    encode_site_report,
    encode_train_report,
)
from fedtune_client.agent import Agent
from fedtune_client.site import SimulatedFleet, SiteSource


def make_client_app(sites: SiteSource) -> ClientApp:
    """Build the app that runs on every device.

    Args:
        sites: finds a Flower node's site; in a simulation `SimulatedFleet`.
    """
    app = ClientApp()

    @app.query("profile")  # type: ignore[untyped-decorator]
    def profile(message: Message, context: Context) -> Message:
        body, _ = from_record(message.content, PROFILE)
        report = agent_of(sites, context).describe(decode_task_spec(body))
        return Message(to_record(PROFILE, encode_site_report(report)), reply_to=message)

    @app.query("calibration")  # type: ignore[untyped-decorator]
    def calibration(message: Message, context: Context) -> Message:
        body, packed = with_tensors(message.content, CALIBRATE)
        order = decode_calibration_instruction(body)
        report, tensors = agent_of(sites, context).calibrate(order, packed)
        reply = to_record(CALIBRATE, encode_calibration_report(report), tensors)
        return Message(reply, reply_to=message)

    @app.train("lora")  # type: ignore[untyped-decorator]
    def train(message: Message, context: Context) -> Message:
        body, packed = with_tensors(message.content, TRAIN)
        report, tensors = agent_of(sites, context).train(decode_train_instruction(body), packed)
        return Message(to_record(TRAIN, encode_train_report(report), tensors), reply_to=message)

    @app.evaluate("loss")  # type: ignore[untyped-decorator]
    def evaluate(message: Message, context: Context) -> Message:
        body, packed = with_tensors(message.content, EVALUATE)
        report = agent_of(sites, context).evaluate(decode_evaluate_instruction(body), packed)
        return Message(to_record(EVALUATE, encode_evaluate_report(report)), reply_to=message)

    return app


def make_simulated_client_app(config: RunConfig) -> ClientApp:
    """Build the app of every device of a simulated fleet."""
    return make_client_app(SimulatedFleet(config.model_dump_json()))


def with_tensors(content: RecordDict, kind: str) -> tuple[bytes, bytes]:
    body, packed = from_record(content, kind)
    if packed is None:
        raise ProtocolError(f"message {kind}: expected tensors beside it, found none")
    return body, packed


def agent_of(sites: SiteSource, context: Context) -> Agent:
    """The agent of this node: made at its first message, kept for the process's life.

    The cache outlives a ClientApp object, because some engines unpickle the app anew for every
    message while the process, and the loaded base in it, stays.
    """
    node_config = tuple(sorted(cast(Mapping[str, object], context.node_config).items()))
    return _kept_agent(sites, node_config)


@lru_cache(maxsize=4096)
def _kept_agent(sites: SiteSource, node_config: tuple[tuple[str, object], ...]) -> Agent:
    site = sites(dict(node_config))
    if site.tune_allocator:
        keep_freed_memory()
    return Agent(site)
