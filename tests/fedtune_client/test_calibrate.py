"""A device measures what matters in its data, and what a step costs it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Message

import fedtune_client.calibrate as calibrate_module
from fedtune.data.samples import Sample
from fedtune.errors import ProtocolError
from fedtune.model.backbone import Backbone, BackboneShelf
from fedtune.model.shapes import read_shapes
from fedtune.records import DevicePlan, Dispatch, MatrixForm, MatrixPlan
from fedtune.train.compute import LossScale
from fedtune.wire.calibration import (
    MEASURED_METHODS,
    CalibrationInstruction,
    CalibrationReport,
    MeasuredMethod,
    check_calibration,
    decode_calibration_report,
    encode_calibration_instruction,
)
from fedtune.wire.flower import CALIBRATE, from_record, to_record
from fedtune.wire.messages import OptimizerSpec
from fedtune.wire.packing import pack_tensors, tensors_digest
from fedtune_client.agent import Agent
from fedtune_client.allowance import Idle
from fedtune_client.app import make_simulated_client_app
from fedtune_client.calibrate import Bench, importance_sums, measured_step
from fedtune_client.together import make_side_by_side
from fedtune_server.simulation.grid import InProcessGrid

Desk = Any  # tests/fedtune_client/conftest.py; test folders are not importable packages
SEED = 7


def order_of(desk: Desk, plan: DevicePlan, **changes: Any) -> tuple[CalibrationInstruction, bytes]:
    rng = np.random.default_rng(0)
    heads = {f"dense.{n}": rng.normal(0, 0.1, s).astype(np.float32) for n, s in desk.dense}
    packed = pack_tensors(heads, "fp32")
    fields: dict[str, Any] = {
        "method": "spectrum",
        "rank": 2,
        "batches": 2,
        "seed": SEED,
        "tensors_digest": tensors_digest(packed),
        "labels": desk.labels,
    }
    order = CalibrationInstruction("run-1", desk.spec.base_digest, plan, **{**fields, **changes})
    return order, packed


def measured(desk: Desk, agent: Agent, **changes: Any) -> tuple[CalibrationReport, Any]:
    """What the coordinator takes from a device."""
    plan = changes.pop("plan", None) or desk.plan(agent.name)
    order, packed = order_of(desk, plan, **changes)
    report, tensors = agent.calibrate(order, packed)
    shapes = read_shapes(desk.folder, ("all-linear",)).matrices
    return report, check_calibration(report, tensors, order, shapes)


@pytest.mark.parametrize("method", MEASURED_METHODS)
def test_a_device_answers_what_was_asked_and_counts_what_it_read(
    desk: Desk, method: MeasuredMethod
) -> None:
    report, sums = measured(desk, desk.agent(), method=method)
    assert (report.device, report.method, report.samples, report.passes) == ("east", method, 8, 4)
    assert 0 < report.units < report.tokens
    assert report.seconds > 0
    assert (report.step_seconds, report.step_peak_bytes) == (0.0, 0)
    assert all(value.any() for value in sums.values())


@pytest.mark.parametrize("method", MEASURED_METHODS)
def test_a_classifying_device_answers_too(classifying_desk: Desk, method: MeasuredMethod) -> None:
    _, sums = measured(classifying_desk, classifying_desk.agent(), method=method)
    assert sum(float(np.abs(value).sum()) for value in sums.values()) > 0


def test_the_same_order_gives_the_same_bytes(desk: Desk) -> None:
    order, packed = order_of(desk, desk.plan("east", format="nf4"))
    first, second = (desk.agent().calibrate(order, packed)[1] for _ in range(2))
    assert first == second


def test_a_device_measures_after_and_before_it_trains_alike(desk: Desk) -> None:
    agent, plan = desk.agent(), desk.plan("east")
    order, packed = order_of(desk, plan)
    before = agent.calibrate(order, packed)[1]
    factors = desk.tensors(plan)
    agent.train(desk.order(plan, factors), factors)
    assert agent.calibrate(order, packed)[1] == before


def test_an_order_that_does_not_fit_the_site_is_refused(desk: Desk) -> None:
    agent = desk.agent()
    for changes, words in (
        ({"plan": desk.plan("west")}, "is for device 'west'"),
        ({"plan": desk.plan("east", peak_bytes=10**12)}, "plan again"),
        ({"tensors_digest": "0" * 64}, "sha256"),
    ):
        order, packed = order_of(desk, changes.get("plan", desk.plan("east")))
        rest = {name: value for name, value in changes.items() if name != "plan"}
        with pytest.raises(ProtocolError, match=words):
            agent.calibrate(replace(order, **rest), packed)


# ---------------------------------------------------------------- sums


def bench_of(folder: Path, batches: list[list[Sample]], **changes: Any) -> Bench:
    shelf = BackboneShelf(folder, torch.device("cpu"), keep_base=False)
    names = read_shapes(folder, ("all-linear",)).by_name()
    backbone: Backbone = shelf.get("causal-lm", (), dict.fromkeys(names, MatrixForm("fp32")))
    fields: dict[str, Any] = {"task": "causal-lm", "pad_id": 2}
    return Bench(backbone, Dispatch({}), batches, **{**fields, **changes})


def drawn(count: int, length: int = 24, seed: int = 0, vocabulary: int = 200) -> list[Sample]:
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        tokens = rng.integers(3, vocabulary, length).astype(np.int32)
        found.append(Sample(tokens, np.arange(length) > length // 2))
    return found


@pytest.mark.parametrize("method", MEASURED_METHODS)
def test_sums_of_devices_are_the_sums_of_their_joined_samples(
    desk: Desk, method: MeasuredMethod
) -> None:
    parts = [drawn(4, seed=seed) for seed in range(3)]
    order, _ = order_of(desk, desk.plan("east", micro_batch=4), method=method)
    apart = [importance_sums(order, bench_of(desk.folder, [p]), [p]) for p in parts]
    together = importance_sums(order, bench_of(desk.folder, parts), parts)
    for name, value in together.items():
        added = sum(sums[name].astype(np.float64) for sums in apart)
        scale = np.abs(value).max()
        np.testing.assert_allclose(value, added, atol=1e-5 * scale)


def test_sketches_do_not_depend_on_the_micro_batch(desk: Desk) -> None:
    samples = drawn(8)
    order, _ = order_of(desk, desk.plan("east"))
    bench = bench_of(desk.folder, [samples])
    whole = importance_sums(order, bench, [samples])
    cut = importance_sums(order, bench, [samples[i : i + 2] for i in range(0, 8, 2)])
    for name, value in whole.items():
        if name.endswith(".weight"):
            assert cut[name] == pytest.approx(4 * value)  # counts passes
            continue
        np.testing.assert_allclose(value, cut[name], atol=1e-5 * np.abs(value).max())


def test_scaled_losses_give_the_same_sums(desk: Desk) -> None:
    passes = [drawn(4), drawn(3, seed=1)]
    order, _ = order_of(desk, desk.plan("east"))
    plain = importance_sums(order, bench_of(desk.folder, passes), passes)
    scaled = bench_of(desk.folder, passes, loss_scale=LossScale(2.0**10))
    for name, value in importance_sums(order, scaled, passes).items():
        np.testing.assert_allclose(value, plain[name], atol=1e-5 * np.abs(value).max())


def test_gradients_that_overflow_are_tried_at_a_lower_scale_and_then_refused(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[float] = []

    def overflowing(_order: object, _bench: object, _passes: object, scale: float) -> Any:
        tried.append(scale)
        return {"q.right": np.array([np.inf if scale > least else 1.0])}

    monkeypatch.setattr(calibrate_module, "_sums_at", overflowing)
    order, _ = order_of(desk, desk.plan("east"))
    bench = bench_of(desk.folder, [], loss_scale=LossScale(2.0**10))
    least = 2.0**3
    assert importance_sums(order, bench, [])["q.right"] == [1.0]
    assert tried == [2.0**10, 2.0**6, 2.0**2]
    least = 0.0
    with pytest.raises(ProtocolError, match="east: expected finite gradients"):
        importance_sums(order, bench, [])


# ---------------------------------------------------------------- memory


def most_held(run: Callable[[], object]) -> int:
    """Most bytes that tensors hold at once beyond those that were there before."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = np.cumsum([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())])
    return int(held.max())


@pytest.mark.parametrize("method", MEASURED_METHODS)
@pytest.mark.parametrize(
    ("checkpointing", "first"), [(False, 0), (True, 0), (False, 3)], ids=["plain", "again", "deep"]
)
def test_a_measurement_takes_little_more_memory_than_a_step_of_its_plan(
    stories260k: Path, method: MeasuredMethod, checkpointing: bool, first: int
) -> None:
    from fedtune.kernels.workspace import release_workspaces
    from fedtune.train.round import train_round

    matrices = read_shapes(stories260k, ("all-linear",)).matrices
    trained = tuple(MatrixPlan(m.name, 8 if m.layer >= first else 0, "fp32") for m in matrices)
    plan = DevicePlan("east", trained, 4, 4, 64, 1, checkpointing, first_trained_layer=first)
    samples = drawn(4, 64, vocabulary=500)
    bench = bench_of(stories260k, [samples])
    factors = calibrate_module._drawn_factors(plan, bench.backbone)
    order = CalibrationInstruction("run-1", "", plan, method, 8, 1, SEED, "")
    importance_sums(order, bench, [samples])  # a new model is first tried
    release_workspaces()
    step = most_held(
        lambda: train_round(
            bench.backbone,
            [samples],
            Dispatch(factors),
            plan,
            OptimizerSpec(),
            task="causal-lm",
            pad_id=2,
        )
    )
    release_workspaces()
    measurement = most_held(lambda: importance_sums(order, bench, [samples]))
    assert measurement <= 1.3 * step


# ---------------------------------------------------------------- the cost of a step


def test_a_step_is_measured_where_the_site_says_its_clock_is_real(desk: Desk) -> None:
    # Earlier tests may have left memory to this process that it gives back meanwhile.
    site = replace(desk.site(), measures_steps=True, idle=Idle(None, 1))
    for own, seen in ((True, True), (False, False)):
        agent = Agent(replace(site, shares_backbone=not own))
        order, packed = order_of(desk, desk.plan("east"), method=None)
        report, _ = agent.calibrate(order, packed)
        assert 0 < report.step_seconds < 60
        linux = Path("/proc/self/clear_refs").exists()
        assert (report.step_peak_bytes > 0) == (seen and linux)
        assert report.samples == 0
        report, _ = agent.calibrate(replace(order, measure_step=False), packed)
        assert report.step_seconds == 0


def test_only_a_measured_clock_makes_simulated_sites_measure(desk: Desk) -> None:
    assert not desk.site().measures_steps
    simulation = desk.config.simulation.model_copy(update={"clock": "measured"})
    real = desk.config.model_copy(update={"simulation": simulation})
    assert replace(desk, config=real).site().measures_steps


def test_the_fastest_step_counts_and_the_first_does_not(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends = iter([100.0, 103.0, 105.0, 109.0])
    monkeypatch.setattr(calibrate_module.time, "perf_counter", lambda: 0.0)
    seen: list[Any] = []

    def trained(
        _backbone: Any, batches: Any, dispatch: Any, plan: Any, *_: Any, **named: Any
    ) -> None:
        seen.append((len(batches), plan.local_steps, dispatch.trained.keys()))
        for index in range(len(batches)):
            now = next(ends)
            monkeypatch.setattr(calibrate_module.time, "perf_counter", lambda: now)  # noqa: B023
            named["after_step"](index, 0.0)

    monkeypatch.setattr(calibrate_module, "train_round", trained)
    plan = desk.plan("east")
    step = measured_step(plan, bench_of(desk.folder, [drawn(4)]), 0)
    assert (step.seconds, step.peak_bytes) == (2.0, 0)
    assert seen == [(4, 4, plan.ranks().keys())]


# ---------------------------------------------------------------- over the wire


def test_the_app_answers_devices_side_by_side_as_one_by_one(desk: Desk) -> None:
    answers = []
    for together in (make_side_by_side(desk.config), None):
        with InProcessGrid(make_simulated_client_app(desk.config), 4, together=together) as grid:
            asked = []
            for node, name in enumerate(("east", "north", "south", "west"), start=1000):
                order, packed = order_of(desk, desk.plan(name))
                content = to_record(CALIBRATE, encode_calibration_instruction(order), packed)
                asked.append(Message(content, node, CALIBRATE))
            replies = grid.send_and_receive(asked)
        found = {}
        for reply in replies:
            body, tensors = from_record(reply.content, CALIBRATE)
            report = decode_calibration_report(body)
            assert tensors_digest(tensors or b"") == report.tensors_digest
            found[report.device] = tensors
        assert len(found) == 4
        answers.append(found)
    assert answers[0] == answers[1]


def test_a_bench_without_samples_is_refused(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    agent = desk.agent()
    labels = desk.labels
    train, held_out = agent._tokenised(labels)
    monkeypatch.setattr(agent, "_samples", {labels: (replace(train, samples=()), held_out)})
    order, packed = order_of(desk, desk.plan("east"))
    with pytest.raises(ProtocolError, match="no sample to train on"):
        agent.calibrate(order, packed)
