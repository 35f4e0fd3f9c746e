"""A device describes itself, trains what the plan says, and refuses what does not fit it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import fedtune_client.agent as agent_module
from fedtune.errors import ModelError, ProtocolError
from fedtune.records import ComputeName, DevicePlan, DeviceProfile, Dispatch, GraphUse
from fedtune.train.compute import compute_dtype
from fedtune.train.round import train_round
from fedtune.wire.messages import OptimizerSpec
from fedtune.wire.packing import pack_tensors, tensors_digest, unpack_tensors
from fedtune.wire.tensors import unpack_dispatch, update_from_tensors, update_shapes
from fedtune_client.agent import Agent

Desk = Any  # tests/fedtune_client/conftest.py; test folders are not importable packages


@pytest.fixture
def trained_on(monkeypatch: pytest.MonkeyPatch) -> list[list[Any]]:
    """The samples of every round that is trained, in order."""
    rounds: list[list[Any]] = []

    def watch(backbone: object, batches: Sequence[Sequence[Any]], *rest: Any, **named: Any) -> Any:
        rounds.append([sample for batch in batches for sample in batch])
        return train_round(backbone, batches, *rest, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(agent_module, "train_round", watch)
    return rounds


@pytest.fixture
def options(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The backbone and the keywords of every round that is trained, in order."""
    found: list[dict[str, Any]] = []

    def watch(backbone: object, *rest: Any, **named: Any) -> Any:
        found.append({"backbone": backbone} | named)
        return train_round(backbone, *rest, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(agent_module, "train_round", watch)
    return found


# ---------------------------------------------------------------- describing


def test_a_site_reports_its_data_in_numbers_and_its_base(desk: Desk) -> None:
    agent = desk.agent(1)
    report = agent.describe(desk.spec)
    rows = desk.site(1).sites.site("north")
    assert agent.name == report.profile.name == "north"
    assert (report.train_samples, report.held_out_samples) == (len(rows.train), len(rows.held_out))
    assert report.train_samples + report.held_out_samples == 24
    assert report.base_digest == desk.spec.base_digest
    assert report.train_tokens > 10 * report.train_samples
    assert (report.dense, report.labels, report.warnings) == ({}, (), ())


def test_a_classifying_site_reports_its_own_labels_and_the_label_axis_as_0(
    classifying_desk: Desk,
) -> None:
    found = {i: classifying_desk.agent(i).describe(classifying_desk.spec) for i in range(4)}
    assert [found[i].labels for i in range(4)] == [
        ("a", "b", "c"),
        ("a", "b"),
        ("b", "c"),
        ("a", "c"),
    ]
    for report in found.values():
        assert report.dense == {"classifier.weight": (0, 32), "classifier.bias": (0,)}


def test_a_site_warns_of_samples_that_were_cut(desk: Desk, change: Callable[..., Desk]) -> None:
    (warning,) = change(desk, max_tokens=16).agent().describe(desk.spec).warnings
    assert warning.startswith("site east: ")
    assert warning.endswith("samples cut to data.max_tokens = 16")


# ---------------------------------------------------------------- training


def test_a_round_returns_the_planned_tensors_and_says_what_it_did(desk: Desk) -> None:
    agent, plan = desk.agent(), desk.plan("east", local_steps=3)
    packed = desk.tensors(plan)
    report, returned = agent.train(desk.order(plan, packed, round=4), packed)
    assert (report.run, report.round, report.device) == ("run-1", 4, "east")
    assert report.base_digest == desk.spec.base_digest
    assert report.samples == 12
    assert report.tokens == report.metrics["train_units"] > 0
    assert report.tensors_digest == tensors_digest(returned)
    shapes = update_shapes(plan, agent_module._matrix_shapes(desk.folder), {})
    sent, back = unpack_tensors(packed, shapes), unpack_tensors(returned, shapes)
    assert all(not np.array_equal(back[name], sent[name]) for name in shapes)
    assert {"held_out_loss", "held_out_units", "train_loss", "seconds"} <= report.metrics.keys()


def test_an_update_in_few_bits_and_what_the_device_keeps_make_up_what_it_has_trained(
    desk: Desk,
) -> None:
    """The same start and samples in two orders: in the exact one, and in 2 bits."""
    plan = desk.plan("east")
    packed = desk.tensors(plan)
    sent = unpack_dispatch(packed, plan, agent_module._matrix_shapes(desk.folder), {})
    agent = desk.agent()
    exact = agent.train(desk.order(plan, packed, round=1), packed)[1]
    order = desk.order(plan, packed, round=1, codec="q2", error_feedback=True)
    coarse = agent.train(order, packed)[1]
    assert len(coarse) < 0.5 * len(exact)
    feedback = agent._carried.feedback
    assert feedback is not None
    lost = feedback.at(2)
    assert lost.factors.keys() == plan.ranks().keys()
    for name in plan.ranks():
        trained = _product(exact, plan, desk, name, None)
        found = _product(coarse, plan, desk, name, sent)
        gap, kept = trained - found, lost.factors[name]
        # The pair has the trained rank; what the rank leaves out of the gap is all that is gone.
        rest = np.linalg.norm(gap - kept.scale * (kept.b @ kept.a))
        assert rest < 0.8 * np.linalg.norm(gap)


def test_a_round_that_is_asked_again_gives_the_same_update(desk: Desk) -> None:
    agent, plan = desk.agent(), desk.plan("east")
    packed = desk.tensors(plan)
    orders = [desk.order(plan, packed, round=n, codec="q2", error_feedback=True) for n in (1, 2, 2)]
    first, second, again = (agent.train(order, packed)[1] for order in orders)
    assert second == again
    alone = desk.agent().train(orders[1], packed)[1]
    assert second != alone  # it made up for the first round
    elsewhere = replace(orders[1], run="run-2")
    assert agent.train(elsewhere, packed)[1] == alone
    off = replace(orders[1], error_feedback=False)
    assert desk.agent().train(off, packed)[1] != first


def _product(
    packed: bytes, plan: DevicePlan, desk: Desk, name: str, since: Dispatch | None
) -> np.ndarray:
    shapes = update_shapes(plan, agent_module._matrix_shapes(desk.folder), {})
    factors, _ = update_from_tensors(unpack_tensors(packed, shapes), plan, 1.0, since)
    return np.asarray(factors[name].b @ factors[name].a)


def test_a_plan_of_shorter_samples_cuts_them_and_drops_those_that_teach_nothing(desk: Desk) -> None:
    agent = desk.agent()
    whole = agent._tokenised(())[0].samples
    plan = desk.plan("east", sequence_length=24, local_steps=5)
    packed = desk.tensors(plan)
    work = agent.accept(desk.order(plan, packed), packed)
    taken = [sample for batch in work.batches for sample in batch]
    assert len(taken) == 20
    assert max(len(sample.tokens) for sample in taken) <= 24
    assert max(len(sample.tokens) for sample in whole) > 24
    assert all(sample.loss_mask.any() for sample in taken)
    plan = replace(plan, sequence_length=1)
    with pytest.raises(ProtocolError, match="no sample to train on"):
        agent.accept(desk.order(plan, packed), packed)


def test_a_process_of_its_own_keeps_what_fits_its_budget(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(agent_module, "keep_what_fits", lambda *sizes: asked.append(sizes))
    plan = desk.plan("east", peak_bytes=1000)
    packed = desk.tensors(plan)
    desk.agent().train(desk.order(plan, packed), packed)
    assert asked == []  # a simulated site shares its process
    own = Agent(replace(desk.site(), shares_backbone=False))
    own.train(desk.order(plan, packed), packed)
    assert asked == [(1000, desk.site().profile.budget_bytes)]


def test_the_same_order_gives_the_same_bytes(desk: Desk) -> None:
    plan = desk.plan("east", format="nf4")
    packed = desk.tensors(plan)
    first, second = (desk.agent().train(desk.order(plan, packed), packed)[1] for _ in range(2))
    assert first == second


def test_the_held_out_loss_is_measured_before_the_training_and_only_when_asked(desk: Desk) -> None:
    agent, plan = desk.agent(), desk.plan("east")
    packed = desk.tensors(plan)
    measured = agent.evaluate(desk.evaluation(plan, packed), packed)
    assert (measured.run, measured.round, measured.device) == ("run-1", 3, "east")
    report, _ = agent.train(desk.order(plan, packed), packed)
    for name in ("held_out_loss", "held_out_units"):
        assert report.metrics[name] == measured.metrics[name]
    report, _ = agent.train(desk.order(plan, packed, evaluate=False), packed)
    assert "held_out_loss" not in report.metrics


def test_a_site_that_holds_nothing_out_measures_nothing(
    desk: Desk, change: Callable[..., Desk]
) -> None:
    whole = change(desk, held_out_fraction=0.0)
    plan = whole.plan("east")
    packed = whole.tensors(plan)
    assert whole.agent().evaluate(whole.evaluation(plan, packed), packed).metrics == {}


def test_an_order_to_a_site_without_samples_is_refused(
    desk: Desk, change: Callable[..., Desk]
) -> None:
    bare = change(desk, max_tokens=4, too_long="drop")
    plan = bare.plan("east")
    packed = bare.tensors(plan)
    with pytest.raises(ProtocolError, match="east: there is no sample to train on"):
        bare.agent().train(bare.order(plan, packed), packed)


def test_the_stream_of_samples_goes_on_over_rounds_and_restarts(
    desk: Desk, trained_on: list[list[Any]]
) -> None:
    agent, plan = desk.agent(), desk.plan("east", batch_size=8, local_steps=1, micro_batch=8)
    packed = desk.tensors(plan)
    count = agent.describe(desk.spec).train_samples
    assert 16 < count < 24
    for round in (1, 2, 3):
        agent.train(desk.order(plan, packed, round=round, evaluate=False), packed)
    taken = [id(sample) for samples in trained_on for sample in samples]
    assert len(set(taken[:count])) == count  # every sample once, before any comes again
    assert set(taken[count:]) <= set(taken[:count])
    restarted = desk.agent()
    restarted.train(desk.order(plan, packed, round=3, evaluate=False), packed)
    for before, again in zip(trained_on[2], trained_on[3], strict=True):
        np.testing.assert_array_equal(before.tokens, again.tokens)


def test_sites_and_seeds_read_their_samples_in_orders_of_their_own(
    desk: Desk, trained_on: list[list[Any]], change: Callable[..., Desk]
) -> None:
    # Four sites with the very same rows.
    same = change(
        desk, train="", held_out_fraction=0.0, sites=dict.fromkeys("abcd", desk.config.data.train)
    )
    for partition, seed in ((0, 7), (1, 7), (0, 8)):
        plan = same.plan("abcd"[partition])
        packed = same.tensors(plan)
        agent = same.agent(partition)
        agent.train(same.order(plan, packed, seed=seed, evaluate=False), packed)
    texts = [[bytes(sample.tokens) for sample in samples] for samples in trained_on]
    assert texts[0] != texts[1]
    assert texts[0] != texts[2]


def test_a_classifier_trains_its_head_over_the_labels_of_the_fleet(classifying_desk: Desk) -> None:
    desk = classifying_desk
    agent, plan = desk.agent(1), desk.plan("north")  # its own labels are a and b
    packed = desk.tensors(plan)
    report, returned = agent.train(desk.order(plan, packed), packed)
    shapes = update_shapes(plan, agent_module._matrix_shapes(desk.folder), dict(desk.dense))
    back = unpack_tensors(returned, shapes)
    assert back["dense.classifier.weight"].shape == (3, 32)
    assert report.tokens == report.samples == 4
    assert 0 <= report.metrics["accuracy"] <= 1


# ---------------------------------------------------------------- refusing


@pytest.fixture(params=["train", "evaluate"])
def refuse(request: pytest.FixtureRequest, desk: Desk) -> Callable[..., None]:
    """Have the east device refuse an order to train, and one to evaluate."""

    def check(words: str, *, plan: Any, packed: bytes | None = None, **changes: Any) -> None:
        agent: Agent = desk.agent()
        sent = desk.tensors(plan) if packed is None else packed
        order = desk.order(plan, sent, **changes)
        if request.param == "evaluate":
            evaluation = desk.evaluation(plan, sent)
            order = replace(evaluation, **changes)
        with pytest.raises(ProtocolError, match=words):
            getattr(agent, request.param)(order, sent)

    return check


def test_an_order_for_another_base_is_refused(desk: Desk, refuse: Callable[..., None]) -> None:
    words = r"east: the instruction is for another base model \(ffffffffffff\); copy the coord"
    refuse(words, plan=desk.plan("east"), base_digest="f" * 64)


def test_another_devices_plan_is_refused(desk: Desk, refuse: Callable[..., None]) -> None:
    refuse("east: the instruction is for device 'west'", plan=desk.plan("west"))


def test_a_plan_over_the_sites_memory_is_refused(desk: Desk, refuse: Callable[..., None]) -> None:
    words = "east: the plan needs 10000001 bytes and this site allows 10000000; plan again"
    refuse(words, plan=desk.plan("east", peak_bytes=10**7 + 1))


def test_a_format_that_the_site_does_not_support_is_refused(
    desk: Desk, refuse: Callable[..., None]
) -> None:
    words = "east: the plan wants .* as int8, and this site supports fp32, nf4"
    refuse(words, plan=desk.plan("east", format="int8"))


def test_tensors_that_were_changed_on_the_way_are_refused(
    desk: Desk, refuse: Callable[..., None]
) -> None:
    plan = desk.plan("east")
    tampered = bytearray(desk.tensors(plan))
    tampered[-1] ^= 1
    words = "east: the tensors do not have the sha256 they were sent with"
    digest = tensors_digest(desk.tensors(plan))
    refuse(words, plan=plan, packed=bytes(tampered), tensors_digest=digest)


def test_tensors_of_another_plan_are_refused(desk: Desk, refuse: Callable[..., None]) -> None:
    plan = desk.plan("east")
    name = plan.matrices[0].name
    words = rf"tensor {name}\.a: expected shape \(2, 64\), got \(1, 32\)"
    shapes = update_shapes(plan, agent_module._matrix_shapes(desk.folder), {})
    arrays = {n: np.zeros(shape, np.float32) for n, shape in shapes.items()}
    arrays[f"{name}.a"] = np.zeros((1, 32), np.float32)
    refuse(words, plan=plan, packed=pack_tensors(arrays, "fp32"))


# ---------------------------------------------------------------- dtypes and the optimiser's state


def test_a_round_gets_what_the_runs_last_one_left_of_the_optimiser(
    desk: Desk, options: list[dict[str, Any]]
) -> None:
    agent, plan = desk.agent(), desk.plan("east")
    packed = desk.tensors(plan)

    def train(round: int, **changes: Any) -> None:
        agent.train(replace(desk.order(plan, packed, round), **changes), packed)

    keep = OptimizerSpec(keep=True)
    train(1, optimizer=keep)
    train(2, optimizer=keep)
    train(3)
    train(1, optimizer=keep, run="run-2")
    memories = [option["memory"] for option in options]
    steps = plan.local_steps
    key = f"{plan.matrices[0].name}.a"
    assert [memory and memory.steps[key] for memory in memories] == [steps, 2 * steps, None, steps]


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("compute", ["fp32", "fp16"])
def test_a_round_that_is_asked_for_again_gives_the_same_bytes(
    desk: Desk, tmp_path: Path, on_disk: bool, compute: str
) -> None:
    folder = tmp_path / "state" if on_disk else None
    site = replace(desk.site(), state_folder=folder, compute=compute)
    agent, plan = Agent(site), desk.plan("east")
    packed = desk.tensors(plan)

    def train(agent: Agent, round: int) -> bytes:
        order = replace(desk.order(plan, packed, round), optimizer=OptimizerSpec(keep=True))
        return agent.train(order, packed)[1]

    first, second, third = (train(agent, round) for round in (1, 2, 3))
    assert train(agent, 3) == third  # its answer was lost
    assert train(agent, 2) == second  # the coordinator went back further
    assert train(agent, 3) == third
    anew = Agent(site)
    assert (train(anew, 3) == third) == on_disk
    assert train(anew, 1) == first


@pytest.mark.parametrize(("compute", "scaled"), [("fp32", False), ("bf16", False), ("fp16", True)])
def test_a_site_computes_in_its_dtype_and_scales_losses_in_float16(
    desk: Desk, options: list[dict[str, Any]], compute: str, scaled: bool
) -> None:
    agent, plan = Agent(replace(desk.site(), compute=compute)), desk.plan("east")
    packed = desk.tensors(plan)
    report, _ = agent.train(desk.order(plan, packed), packed)
    (option,) = options
    assert (option["loss_scale"] is not None) == scaled
    weight = option["backbone"].model.get_input_embeddings().weight
    assert weight.dtype == compute_dtype(compute, torch.device("cpu"))
    assert report.metrics["train_loss"] > 0


@pytest.mark.parametrize(
    ("said", "asked", "expected"),
    [
        ("bf16", "auto", torch.bfloat16),
        ("fp32", "auto", torch.float32),
        ("bf16", "fp32", torch.float32),
    ],
)
def test_left_to_itself_a_site_computes_in_what_its_profile_said(
    desk: Desk, said: ComputeName, asked: ComputeName, expected: torch.dtype
) -> None:
    site = desk.site()
    agent = Agent(replace(site, profile=replace(site.profile, compute=said), compute=asked))
    assert agent._compute == expected


def test_an_accelerator_that_is_not_there_is_refused(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    site = desk.site()
    profile = DeviceProfile(
        "east", "gpu", 1, 10**7, accelerator="cuda", accelerator_memory_bytes=10**7
    )
    agent, plan = Agent(replace(site, profile=profile)), desk.plan("east")
    packed = desk.tensors(plan)
    with pytest.raises(ModelError, match="profile says cuda, and torch finds no such device"):
        agent.train(desk.order(plan, packed), packed)


def test_a_site_without_its_base_says_so(desk: Desk) -> None:
    with pytest.raises(ModelError, match="no/such/model"):
        Agent(replace(desk.site(), model_path="no/such/model"))


@pytest.mark.parametrize(
    ("asked", "budget", "expected"),
    [("auto", 150, "auto"), ("auto", 149, "off"), ("on", 100, "on"), ("off", 1000, "off")],
)
def test_steps_are_recorded_unasked_only_where_memory_is_plenty(
    desk: Desk, asked: GraphUse, budget: int, expected: GraphUse
) -> None:
    site = desk.site(1)
    profile = replace(site.profile, memory_bytes=budget)
    agent = Agent(replace(site, profile=profile, cuda_graph=asked))
    assert agent._graph_use(replace(desk.plan("north"), peak_bytes=100)) == expected


# ---------------------------------------------------------------- time and memory as measured


def measuring(desk: Desk, monkeypatch: pytest.MonkeyPatch, free: list[int]) -> Agent:
    """The east device with a clock of its own, on a machine with so much free memory."""
    now = lambda: SimpleNamespace(free_bytes=free[0])  # noqa: E731
    monkeypatch.setattr("fedtune_client.allowance.free_memory", now)
    monkeypatch.setattr("fedtune_client.allowance.own_memory_bytes", lambda: 0)
    return Agent(replace(desk.site(), measures_steps=True))


def test_a_device_that_measures_reports_its_steps_and_what_is_free(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = measuring(desk, monkeypatch, [10**7 + 5])
    plan = desk.plan("east", local_steps=3)
    packed = desk.tensors(plan)
    metrics = agent.train(desk.order(plan, packed), packed)[0].metrics
    assert 0 < 2 * metrics["step_seconds"] < metrics["seconds"]
    assert metrics["free_bytes"] == 10**7  # no more than the site's limit


def test_a_simulated_device_measures_neither(desk: Desk) -> None:
    plan = desk.plan("east")
    packed = desk.tensors(plan)
    metrics = desk.agent().train(desk.order(plan, packed), packed)[0].metrics
    assert not {"step_seconds", "free_bytes"} & set(metrics)


def test_a_device_whose_memory_has_gone_refuses_its_plan_and_says_what_it_allows(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = [10**9]
    agent = measuring(desk, monkeypatch, free)
    plan = desk.plan("east")
    packed = desk.tensors(plan)
    agent.train(desk.order(plan, packed), packed)
    free[0] = 5 * 10**6
    words = "the plan needs 10000000 bytes and this site allows 5000000; plan again"
    with pytest.raises(ProtocolError, match=words):
        agent.train(desk.order(plan, packed), packed)
    assert agent.describe(desk.spec).profile.budget_bytes == 5 * 10**6
    smaller = replace(plan, peak_bytes=5 * 10**6)
    agent.train(desk.order(smaller, packed), packed)


def test_a_new_format_between_rounds_is_what_the_device_computes_with(
    desk: Desk, options: list[dict[str, Any]]
) -> None:
    agent = desk.agent()
    losses = []
    for round, format_name in enumerate(("fp32", "nf4", "fp32"), start=1):
        plan = desk.plan("east", format=format_name)
        packed = desk.tensors(plan)
        report, _ = agent.train(desk.order(plan, packed, round), packed)
        losses.append(report.metrics["held_out_loss"])
    assert losses[0] == losses[2] != losses[1]
    shown = [option["backbone"] for option in options]
    assert shown[0] is not shown[1]
