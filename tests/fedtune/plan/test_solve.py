from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from math import ceil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.errors import PlanError
from fedtune.plan.cost import Load, PeakBytes, peak_bytes
from fedtune.plan.settings import Pins, PlanSettings
from fedtune.plan.solve import plan_fleet
from fedtune.plan.traffic import WireCosts
from fedtune.records import (
    BACKBONE_FORMATS,
    DevicePlan,
    DeviceProfile,
    FormatName,
    ImportanceReport,
    MatrixShape,
    ModelShapes,
)


def llama(hidden: int, inner: int, layers: int, vocabulary: int, key_value: int) -> ModelShapes:
    sides = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (key_value, hidden),
        "self_attn.v_proj": (key_value, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    matrices = tuple(
        MatrixShape(f"model.layers.{layer}.{name}", *side, layer)
        for layer in range(layers)
        for name, side in sides.items()
    )
    other = vocabulary * hidden + (2 * layers + 1) * hidden
    return ModelShapes("0", "llama", hidden, inner, layers, 8, vocabulary, matrices, other)


TINY = llama(64, 172, 5, 512, 32)
SEVEN_B = llama(4096, 11008, 32, 32000, 4096)
SETTINGS = PlanSettings(rank_max=16, rank_cap=32, batch_size=16, local_steps=5, sequence_length=64)
MB, GB = 10**6, 10**9
FORMATS: tuple[FormatName, ...] = ("fp32", "bf16", "int8", "nf4")
"""Four that differ much in bytes."""


def device(
    name: str,
    memory: float,
    formats: tuple[FormatName, ...] = FORMATS,
    link: float = 1e6,
    flops: float = 1e11,
) -> DeviceProfile:
    return DeviceProfile(
        name=name,
        device_class=f"class-{name}",
        cpu_threads=1,
        memory_bytes=int(memory),
        matmul_flops_per_s={"fp32": flops},
        memory_bandwidth_bytes_per_s=1e10,
        link_bytes_per_s=link,
        formats=formats,
    )


def plan_one(
    profile: DeviceProfile,
    run: PlanSettings = SETTINGS,
    pins: Pins | None = None,
    shapes: ModelShapes = TINY,
) -> DevicePlan:
    fixed = {} if pins is None else {profile.device_class: pins}
    return plan_fleet([profile], shapes, run, pins=fixed).devices[0]


def format_of(plan: DevicePlan) -> FormatName:
    return plan.matrices[0].format


def sums(plan: DevicePlan, shapes: ModelShapes = TINY) -> tuple[int, int]:
    """Elements of the trained factors and of the tail."""
    by_name = shapes.by_name()
    sides = {
        m.name: by_name[m.name].out_features + by_name[m.name].in_features for m in plan.matrices
    }
    trained = sum(m.rank * sides[m.name] for m in plan.matrices)
    return trained, sum(m.tail_rank * sides[m.name] for m in plan.matrices)


def parts(plan: DevicePlan, shapes: ModelShapes, whole_matrices: bool = False) -> PeakBytes:
    """The peak of a plan by the cost model."""
    trained, tail = sums(plan, shapes)
    load = Load(
        micro_batch=plan.micro_batch,
        sequence_length=plan.sequence_length,
        checkpointing=plan.checkpointing,
        first_trained_layer=plan.first_trained_layer,
        trained_elements=trained,
        trained_ranks=sum(m.rank for m in plan.matrices),
        tail_elements=tail,
        tail_ranks=sum(m.tail_rank for m in plan.matrices),
        whole_matrices=whole_matrices,
    )
    return peak_bytes(shapes, {m.name: m.form for m in plan.matrices}, load)


def test_unequal_budgets_give_unequal_plans() -> None:
    fleet = [device(f"d{index}", size * MB) for index, size in enumerate((1, 2, 2.2, 2.4, 16, 64))]
    plans = plan_fleet(fleet, TINY, SETTINGS).devices
    assert [format_of(p) for p in plans] == ["nf4", "nf4", "int8", "bf16", "fp32", "fp32"]
    assert len({tuple(p.ranks().values()) for p in plans}) >= 4
    assert {p.micro_batch for p in plans} >= {1, 8, 16}
    assert [p.checkpointing for p in plans] == [True, True, True, True, False, False]
    assert plans[0].binding == "memory"
    assert plans[-1].binding == "rank-max"
    assert all(len(p.matrices) == len(TINY.matrices) for p in plans)


def test_a_seven_billion_model_spans_cards_from_8_to_140_gb() -> None:
    fleet = [
        replace(
            device(f"d{index}", size * GB),
            accelerator="cuda",
            accelerator_memory_bytes=size * GB,
        )
        for index, size in enumerate((8, 12, 24, 140))
    ]
    run = replace(SETTINGS, sequence_length=512)
    plans = plan_fleet(fleet, SEVEN_B, run).devices
    assert [format_of(p) for p in plans] == ["nf4", "int8", "bf16", "fp32"]
    assert plans[-1].micro_batch == 16
    assert all(p.peak_bytes <= d.budget_bytes for p, d in zip(plans, fleet, strict=True))


def test_the_accelerators_memory_is_the_budget_of_a_device_that_has_one() -> None:
    card = replace(device("d", 64 * MB), accelerator="cuda", accelerator_memory_bytes=2 * MB)
    assert plan_one(card) == plan_one(replace(card, memory_bytes=32 * MB))
    assert plan_one(card).peak_bytes <= 2 * MB < plan_one(device("d", 64 * MB)).peak_bytes


budgets = st.integers(min_value=int(1 * MB), max_value=40 * MB)
runs = st.builds(
    PlanSettings,
    rank_max=st.integers(1, 24),
    rank_cap=st.integers(1, 40),
    batch_size=st.sampled_from([1, 6, 8, 16]),
    local_steps=st.integers(1, 5),
    sequence_length=st.sampled_from([16, 48]),
    tail=st.sampled_from([False, True, 3]),
    checkpointing=st.just(True),
    round_seconds=st.sampled_from([0.0, 0.5, 2.0]),
    wire=st.sampled_from([WireCosts(), WireCosts(2.0, 0.5, 40)]),
)


@settings(max_examples=60, deadline=None)
@given(budget=budgets, run=runs)
def test_the_predicted_peak_never_exceeds_the_budget(budget: int, run: PlanSettings) -> None:
    plan = plan_one(device("d", budget), run)
    trained, tail = sums(plan)
    assert plan.peak_bytes == parts(plan, TINY).total <= budget
    assert plan.batch_size % plan.micro_batch == 0
    assert plan.download_bytes == ceil((trained + tail) * run.wire.down) + run.wire.header_bytes
    assert plan.upload_bytes == ceil(trained * run.wire.up) + run.wire.header_bytes
    layers = {TINY.by_name()[name].layer for name in plan.ranks()}
    assert plan.first_trained_layer == min(layers)
    if run.round_seconds:
        assert plan.seconds <= run.round_seconds * (1 + 1e-9)
    for matrix in plan.matrices:
        assert matrix.rank <= run.rank_max
        assert matrix.rank + matrix.tail_rank <= max(run.rank_cap, matrix.rank)


@settings(max_examples=60, deadline=None)
@given(low=budgets, more=st.integers(0, 10 * MB), run=runs)
def test_more_memory_never_lowers_the_rank_at_the_same_format(
    low: int, more: int, run: PlanSettings
) -> None:
    first, second = plan_one(device("d", low), run), plan_one(device("d", low + more), run)
    assert BACKBONE_FORMATS.index(format_of(second)) <= BACKBONE_FORMATS.index(format_of(first))
    if format_of(first) == format_of(second):
        assert sum(second.ranks().values()) >= sum(first.ranks().values())


@settings(max_examples=30, deadline=None)
@given(memory=st.lists(budgets, min_size=2, max_size=5), run=runs)
def test_ranks_nest_over_devices(memory: list[int], run: PlanSettings) -> None:
    fleet = [device(f"d{index}", size) for index, size in enumerate(memory)]
    ranks = [[m.rank for m in plan.matrices] for plan in plan_fleet(fleet, TINY, run).devices]
    chain = sorted(ranks, key=sum)
    for lower, higher in pairwise(chain):
        assert all(x <= y for x, y in zip(lower, higher, strict=True))


def test_the_plan_does_not_depend_on_the_order_of_devices() -> None:
    fleet = [device(f"d{index}", size * MB) for index, size in enumerate((16, 2, 4))]
    plan = plan_fleet(fleet, TINY, SETTINGS)
    assert plan == plan_fleet(fleet[::-1], TINY, SETTINGS)
    assert [p.device for p in plan.devices] == ["d0", "d1", "d2"]


@pytest.mark.parametrize(
    "changes",
    [
        {"memory_bytes": 2 * MB},
        {"link_bytes_per_s": 2e5},
        {"matmul_flops_per_s": {"fp32": 4e9}},
        {"memory_bandwidth_bytes_per_s": 5e8},
        {"formats": ("nf4",)},
    ],
)
def test_devices_of_one_class_may_differ(changes: dict[str, object]) -> None:
    run = replace(SETTINGS, round_seconds=2.0)
    first = device("a", 64 * MB)
    second = replace(first, name="b", **changes)
    plans = plan_fleet([first, second], TINY, run).devices
    assert plans[1] == plan_one(second, run)
    assert replace(plans[0], device="b") != plans[1]


def test_the_next_rung_would_not_have_fitted() -> None:
    plan = plan_one(device("d", 2 * MB))
    assert plan.binding == "memory"
    # The dearest rung: 16 bytes a number, 8 more while the step runs, and its activations.
    assert plan.peak_bytes > 2 * MB - 24 * (64 + 172) - 4 * 64


def test_importance_moves_ranks_to_the_matrices_that_gain() -> None:
    favourite = TINY.matrices[6].name
    gains = {m.name: (1e-3,) * 16 for m in TINY.matrices}
    report = ImportanceReport(gains | {favourite: (1.0,) * 16}, tokens=1)
    plan = plan_fleet([device("d", 1.6 * MB)], TINY, SETTINGS, report).devices[0]
    ranks = plan.ranks()
    assert ranks[favourite] == 16
    assert min(m.rank for m in plan.matrices) < 16


def test_a_device_without_a_format_uses_the_next_best() -> None:
    assert format_of(plan_one(device("d", 64 * MB, formats=("nf4", "int8")))) == "int8"


def test_a_better_format_is_given_up_only_for_much_more_rank() -> None:
    """fp32 fits with few ranks, bf16 with nearly all: nine tenths of the gain decide."""
    plan = plan_one(device("d", 2.5 * MB))
    pinned = plan_one(device("d", 2.5 * MB), pins=Pins(format="fp32"))
    assert format_of(plan) == "bf16"
    assert 0 < sum(pinned.ranks().values()) < 0.9 * sum(plan.ranks().values())


def test_rank_comes_before_speed() -> None:
    slow = plan_one(device("d", 4 * MB))
    fast = plan_one(device("d", 4 * MB), replace(SETTINGS, checkpointing=False))
    assert slow.checkpointing
    assert not fast.checkpointing
    assert sum(slow.ranks().values()) > sum(fast.ranks().values())


def test_the_effective_batch_is_the_same_on_every_device() -> None:
    fleet = [device(f"d{index}", size * MB) for index, size in enumerate((2, 64))]
    assert {p.batch_size for p in plan_fleet(fleet, TINY, SETTINGS).devices} == {16}


def test_micro_batches_are_powers_of_two_that_divide_the_batch() -> None:
    run = replace(SETTINGS, batch_size=12)
    assert plan_one(device("d", GB), run).micro_batch == 4


def test_a_slow_link_limits_the_ranks() -> None:
    run = replace(SETTINGS, round_seconds=2.0)
    plan = plan_one(device("d", 64 * MB, link=3e5), run)
    assert plan.binding == "upload time"
    assert plan.download_bytes + plan.upload_bytes <= 0.25 * 2.0 * 3e5
    assert plan.local_steps == 5


def test_a_slow_processor_takes_fewer_steps() -> None:
    run = replace(SETTINGS, round_seconds=1.0)
    plan = plan_one(device("d", 64 * MB, link=1e9, flops=4e9), run)
    assert 1 <= plan.local_steps < 5
    assert plan.seconds <= 1.0
    assert plan.binding.endswith(f"round time ({plan.local_steps} of 5 steps)")


def test_a_processor_too_slow_for_one_step_is_an_error() -> None:
    run = replace(SETTINGS, round_seconds=1.0)
    with pytest.raises(PlanError, match=r"device d cannot finish a round in plan\.round_seconds"):
        plan_one(device("d", 64 * MB, flops=1e7), run)


def test_the_fastest_plan_that_the_error_names_fits_the_memory() -> None:
    run = replace(SETTINGS, round_seconds=1.0)
    with pytest.raises(PlanError, match="nf4 backbone, micro-batch 1, checkpointing"):
        plan_one(device("d", 1.6 * MB, flops=1e7), run, Pins(rank=4))


def test_the_tail_fills_what_is_left_up_to_the_cap() -> None:
    plenty = plan_one(device("d", 64 * MB), replace(SETTINGS, rank_max=4, tail=True))
    assert {m.tail_rank for m in plenty.matrices} == {28}
    few = plan_one(device("d", 64 * MB), replace(SETTINGS, rank_max=4, tail=3))
    assert {m.tail_rank for m in few.matrices} == {3}
    none = plan_one(device("d", 64 * MB), replace(SETTINGS, rank_max=4))
    assert {m.tail_rank for m in none.matrices} == {0}
    assert plenty.upload_bytes == none.upload_bytes
    assert plenty.download_bytes > few.download_bytes > none.download_bytes


def test_a_tail_never_costs_rank() -> None:
    bare = plan_one(device("d", 2 * MB))
    tailed = plan_one(device("d", 2 * MB), replace(SETTINGS, tail=True))
    assert bare.ranks() == tailed.ranks()


def test_matrices_that_are_not_trained_are_still_packed() -> None:
    name = TINY.matrices[0].name
    run = replace(SETTINGS, trainable=(name,), tail=True)
    plan = plan_one(device("d", 1.6 * MB), run)
    assert set(plan.ranks()) == {name}
    assert len({m.format for m in plan.matrices}) == 1
    assert all(m.tail_rank == 0 for m in plan.matrices if m.name != name)


def test_pinned_values_are_kept_and_named() -> None:
    pins = Pins(rank=6, format="int8", micro_batch=2)
    plan = plan_one(device("d", 16 * MB), pins=pins)
    assert set(plan.ranks().values()) == {6}
    assert (format_of(plan), plan.micro_batch) == ("int8", 2)
    assert plan.binding == "pinned rank 6, pinned format int8, pinned micro-batch 2"


def test_a_pinned_rank_limit_replaces_the_runs() -> None:
    assert max(plan_one(device("d", GB), pins=Pins(rank_max=3)).ranks().values()) == 3
    assert max(plan_one(device("d", GB), pins=Pins(rank_max=20)).ranks().values()) == 20


def test_a_pinned_rank_stops_at_the_matrix() -> None:
    plan = plan_one(device("d", GB), pins=Pins(rank=40))
    assert {m.rank for m in plan.matrices} == {32, 40}


def test_plans_of_block_formats_name_their_block() -> None:
    everything = device("d", GB, formats=BACKBONE_FORMATS)
    blocks = {
        name: plan_one(everything, pins=Pins(format=name)).matrices[0].block_size
        for name in BACKBONE_FORMATS
    }
    with_blocks = {"q8", "q4", "nf4", "q3", "q2"}
    assert blocks == {name: 64 if name in with_blocks else 0 for name in BACKBONE_FORMATS}


def test_formats_are_tried_in_their_order_whatever_order_the_device_names() -> None:
    def chosen(*formats: FormatName) -> FormatName:
        return format_of(plan_one(device("d", 64 * MB, formats=formats)))

    assert chosen("q2", "q3", "q4") == "q4"
    assert chosen("nf4", "q4", "bnb-nf4") == "q4"
    assert chosen("bnb-int8", "q2") == "q2"


def test_three_bits_fit_where_four_do_not() -> None:
    run = replace(SETTINGS, sequence_length=512)
    plans = [
        plan_one(device("d", memory, formats=("q4", "q3")), run, shapes=SEVEN_B)
        for memory in (5.5 * GB, 4 * GB)
    ]
    assert [format_of(plan) for plan in plans] == ["q4", "q3"]
    with pytest.raises(PlanError, match=r"smallest plan needs 4\.\d GB \(q4 backbone"):
        plan_one(device("d", 4 * GB, formats=("q4",)), run, shapes=SEVEN_B)


def test_a_card_unpacks_whole_matrices_and_a_processor_panels() -> None:
    run = replace(SETTINGS, sequence_length=512)
    host = device("d", 100 * GB, formats=("nf4",))
    card = replace(host, accelerator="cuda", accelerator_memory_bytes=100 * GB)
    plans = plan_fleet([host, replace(card, name="e")], SEVEN_B, run).devices
    panels, whole = parts(plans[0], SEVEN_B), parts(plans[1], SEVEN_B, whole_matrices=True)
    assert [p.peak_bytes for p in plans] == [panels.total, whole.total]
    assert whole.workspace == 4 * 4096 * 11008
    assert panels.workspace < whole.workspace / 10


@pytest.mark.parametrize(
    ("profile", "run", "pins", "words"),
    [
        (
            device("lab", 0.5 * MB),
            SETTINGS,
            Pins(),
            r"device lab has a memory budget of 500 kB, and the smallest plan needs 76\d\.\d kB "
            r"\(nf4 backbone, micro-batch 1, checkpointing, rank 1 of one matrix\); its logits and "
            r"block gradients take .* at least 76\d\.\d kB in fleet\.class-lab, or choose a lower "
            r"data\.max_tokens",
        ),
        (
            device("lab", 1.5 * MB, formats=("fp32",)),
            replace(SETTINGS, checkpointing=False),
            Pins(micro_batch=4),
            r"fp32 backbone, micro-batch 4, rank 1.*its logits and .*or unpin "
            r"fleet\.class-lab\.micro_batch, or allow plan\.checkpointing, or add q4",
        ),
        (
            device("lab", 2 * MB),
            SETTINGS,
            Pins(rank=16),
            r"rank 16 pinned\); its adapter takes .*or unpin fleet\.class-lab\.rank",
        ),
        (
            device("lab", 2 * MB, formats=("fp32",)),
            SETTINGS,
            Pins(format="nf4"),
            r"class-lab\.format is pinned to nf4, but device lab supports fp32",
        ),
        (
            device("lab", 2 * MB),
            SETTINGS,
            Pins(micro_batch=3),
            r"micro_batch must divide train\.batch_size = 16, got 3",
        ),
    ],
)
def test_a_plan_that_cannot_be_made_says_why(
    profile: DeviceProfile, run: PlanSettings, pins: Pins, words: str
) -> None:
    with pytest.raises(PlanError, match=words):
        plan_one(profile, run, pins)


def test_the_memory_that_the_error_asks_for_is_enough() -> None:
    with pytest.raises(PlanError) as caught:
        plan_one(device("d", MB / 2))
    asked = str(caught.value).split("memory of at least ")[1].split(" kB")[0]
    plan = plan_one(device("d", float(asked) * 1000))
    assert sum(plan.ranks().values()) >= 1


def test_an_upload_limit_leaves_ranks_that_differ_between_matrices() -> None:
    plan = plan_one(device("a", 64 * MB), pins=Pins(upload_bytes=60_000))
    assert plan.upload_bytes <= 60_000
    assert len(set(plan.ranks().values())) > 1
    assert "upload size" in plan.binding
    free = plan_one(device("a", 64 * MB))
    assert free.upload_bytes > 60_000
    assert "upload size" not in free.binding


def test_an_upload_limit_below_the_smallest_update_is_an_error() -> None:
    words = r"device a may send 10 B a round, .* raise fleet\.class-a\.upload$"
    with pytest.raises(PlanError, match=words):
        plan_one(device("a", 64 * MB), pins=Pins(upload_bytes=10))


def test_a_whole_tail_is_planned_apart_from_the_trained_directions_or_refused() -> None:
    free = replace(SETTINGS, tail=4096, rank_cap=4096)
    whole = replace(free, whole_tail=True)
    apart, beside = plan_one(device("a", 64 * MB), whole), plan_one(device("a", 64 * MB), free)
    sides = {m.name: min(m.out_features, m.in_features) for m in TINY.matrices}
    assert {m.name: m.tail_rank for m in apart.matrices} == sides
    assert all(m.tail_rank == sides[m.name] - m.rank for m in beside.matrices)
    least = 1.2 * MB
    assert plan_one(device("a", least), free).peak_bytes <= least
    with pytest.raises(PlanError, match="memory budget"):
        plan_one(device("a", least), whole)
