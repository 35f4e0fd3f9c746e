"""Every message survives its way through bytes, and nothing else does."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.errors import ProtocolError
from fedtune.records import (
    BACKBONE_FORMATS,
    DevicePlan,
    DeviceProfile,
    FormatName,
    LoraScale,
    MatrixPlan,
    SiteReport,
    TrainingWay,
)
from fedtune.v1 import fedtune_pb2 as pb
from fedtune.wire import fields
from fedtune.wire import messages as m

PLAN = DevicePlan(
    device="site-a",
    matrices=(
        MatrixPlan("model.layers.0.q_proj", 4, "nf4", tail_rank=3, block_size=64),
        MatrixPlan("model.layers.0.k_proj", 0, "bf16"),
    ),
    micro_batch=4,
    batch_size=16,
    sequence_length=128,
    local_steps=5,
    checkpointing=True,
    first_trained_layer=2,
    peak_bytes=10**9,
    seconds=1.5,
    download_bytes=1000,
    upload_bytes=500,
    binding="memory",
)
REPORT = SiteReport(
    profile=DeviceProfile(
        name="Krankenhaus Süd",
        device_class="laptop",
        cpu_threads=4,
        memory_bytes=8 * 10**9,
        matmul_flops_per_s={"fp32": 1e10},
        memory_bandwidth_bytes_per_s=1e10,
        link_bytes_per_s=1e7,
        formats=("fp32", "nf4"),
        versions={"torch": "2.13.0"},
        compute="bf16",
    ),
    base_digest="ab" * 32,
    train_samples=100,
    held_out_samples=10,
    train_tokens=12345,
    dense={"score.weight": (0, 64), "score.bias": (3,)},
    labels=("no", "yes"),
    warnings=("3 samples are longer than 128 tokens",),
)
TRAIN = m.TrainInstruction(
    run="demo-1",
    round=3,
    base_digest="ab" * 32,
    plan=PLAN,
    optimizer=m.OptimizerSpec(
        "adamw-8bit",
        0.1,
        0.05,
        0.01,
        0.8,
        0.9,
        0.0,
        keep=True,
        way=TrainingWay("s2ft", "eva", 0.9, 0.25, 2.0, "weight", seed=2**64 - 1),
        proximal=0.125,
    ),
    seed=2**64 - 1,
    tensors_digest="cd" * 32,
    evaluate=False,
    scale=LoraScale(2.0, "rank-stabilised"),
    labels=("no", "yes"),
)
TRAINED = m.TrainReport(
    run="demo-1",
    round=3,
    device="site-a",
    base_digest="ab" * 32,
    samples=80,
    tokens=999,
    tensors_digest="cd" * 32,
    metrics={"train_loss": 2.5, "seconds": 1.0},
)
EVALUATE = m.EvaluateInstruction(
    "demo-1", 0, "ab" * 32, PLAN, "cd" * 32, LoraScale(0.5, "rank-stabilised"), ("no", "yes")
)
EVALUATED = m.EvaluateReport("demo-1", 0, "site-a", {"held_out_loss": 2.0})
TASK = m.TaskSpec("demo-1", "causal-lm", "ab" * 32, ("a", "b"), 7)

CASES = [
    (TASK, m.encode_task_spec, m.decode_task_spec),
    (REPORT, m.encode_site_report, m.decode_site_report),
    (TRAIN, m.encode_train_instruction, m.decode_train_instruction),
    (TRAINED, m.encode_train_report, m.decode_train_report),
    (EVALUATE, m.encode_evaluate_instruction, m.decode_evaluate_instruction),
    (EVALUATED, m.encode_evaluate_report, m.decode_evaluate_report),
]
GROUPS = [
    (replace(REPORT, devices=12), m.encode_site_report, m.decode_site_report),
    (replace(TRAINED, devices=11, held_samples=640), m.encode_train_report, m.decode_train_report),
]
CASES += GROUPS
IDS = [type(case[0]).__name__ for case in CASES]
Encode = Callable[[object], bytes]
Decode = Callable[[bytes], object]


@pytest.mark.parametrize(("record", "encode", "decode"), CASES, ids=IDS)
def test_a_record_is_what_it_was_after_the_way_through_bytes(
    record: object, encode: Encode, decode: Decode
) -> None:
    data = encode(record)
    assert decode(data) == record
    assert encode(decode(data)) == data


@pytest.mark.parametrize(("record", "encode", "decode"), CASES, ids=IDS)
def test_an_empty_message_is_refused(record: object, encode: Encode, decode: Decode) -> None:
    with pytest.raises(ProtocolError):
        decode(b"")


@pytest.mark.parametrize(("record", "encode", "decode"), CASES, ids=IDS)
def test_too_many_bytes_are_refused_before_they_are_parsed(
    record: object, encode: Encode, decode: Decode
) -> None:
    with pytest.raises(ProtocolError, match="expected at most 16777216 bytes, got 16777217"):
        decode(bytes(fields.MAX_MESSAGE_BYTES + 1))


@pytest.mark.parametrize(("record", "encode", "decode"), CASES, ids=IDS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_changed_bytes_raise_nothing_but_a_protocol_error(
    record: object, encode: Encode, decode: Decode, data: st.DataObject
) -> None:
    good = bytearray(encode(record))
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, len(good) - 1))
        good[position] ^= data.draw(st.integers(1, 255))
    cut = data.draw(st.integers(0, len(good)))
    for changed in (bytes(good), bytes(good[:cut])):
        with contextlib.suppress(ProtocolError):
            decode(changed)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200))
def test_random_bytes_raise_nothing_but_a_protocol_error(data: bytes) -> None:
    for _, _, decode in CASES:
        with contextlib.suppress(ProtocolError):
            decode(data)


def _train_with_plan(plan: DevicePlan) -> bytes:
    return m.encode_train_instruction(replace(TRAIN, plan=plan))


def _with_matrix(**changes: object) -> bytes:
    message = pb.TrainInstruction.FromString(m.encode_train_instruction(TRAIN))
    for name, value in changes.items():
        setattr(message.plan.matrices[0], name, value)
    return message.SerializeToString()


def _plan_changed(**changes: object) -> bytes:
    message = pb.TrainInstruction.FromString(m.encode_train_instruction(TRAIN))
    for name, value in changes.items():
        setattr(message.plan, name, value)
    return message.SerializeToString()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (
            _with_matrix(rank=4097),
            r"plan rank of model.layers.0.q_proj: expected 0..4096, got 4097",
        ),
        (_with_matrix(tail_rank=4097), r"plan tail rank of .*: expected 0..4096, got 4097"),
        (_with_matrix(format="fp7"), r"plan format of .*: expected one of fp32, .* got 'fp7'"),
        (_with_matrix(name=""), r"plan.matrices.name: expected a text, got none"),
        (_with_matrix(name="model.layers.0.k_proj"), r"plan.matrices: .*k_proj' comes twice"),
        (_plan_changed(batch_size=17), r"plan.batch_size: expected a multiple of micro_batch 4"),
        (_plan_changed(micro_batch=0), r"plan.micro_batch: expected 1..65536, got 0"),
        (_plan_changed(local_steps=0), r"plan.local_steps: expected 1..1000000000, got 0"),
        (_plan_changed(sequence_length=0), r"plan.sequence_length: expected 1.."),
        (_plan_changed(seconds=float("nan")), r"plan.seconds: expected a finite number, got nan"),
        (_plan_changed(seconds=-1.0), r"plan.seconds: expected 0..1e\+300, got -1"),
    ],
)
def test_a_plan_out_of_range_is_refused_by_the_name_of_its_field(data: bytes, words: str) -> None:
    with pytest.raises(ProtocolError, match=words):
        m.decode_train_instruction(data)


def _way(**changes: object) -> m.OptimizerSpec:
    return m.OptimizerSpec(way=replace(TrainingWay(), **changes))  # type: ignore[arg-type]


def test_an_instruction_without_a_way_or_a_scaling_means_plain_lora() -> None:
    """As coordinators sent it before there were ways."""
    message = pb.TrainInstruction.FromString(m.encode_train_instruction(TRAIN))
    message.optimizer.ClearField("way")
    message.ClearField("scaling")
    found = m.decode_train_instruction(message.SerializeToString())
    assert found.optimizer.way == TrainingWay()
    assert found.scale == LoraScale(2.0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"round": 0}, "round: expected 1..1000000000, got 0"),
        ({"scale": LoraScale(0.0)}, "scale: expected 1e-09..1e"),
        ({"scale": LoraScale(float("inf"))}, "scale: expected a finite number, got inf"),
        ({"scale": LoraScale(1.0, "loud")}, "scaling: expected one of constant, rank-stabilised"),
        ({"optimizer": _way(name="dora")}, "way.name: expected one of lora, allora"),
        ({"optimizer": _way(start="zero")}, "way.start: expected one of random, eva"),
        ({"optimizer": _way(channels="all")}, "way.channels: expected one of random, weight"),
        ({"optimizer": _way(layer_rate_decay=1.5)}, "way.layer_rate_decay: expected 0.001..1"),
        ({"optimizer": _way(flops_share=0.0)}, "way.flops_share: expected 1e-06..1, got 0"),
        ({"optimizer": _way(allora_eta=0.0)}, "way.allora_eta: expected 0.001..1000, got 0"),
        ({"run": "x" * 513}, "run: expected at most 512 characters, got 513"),
        ({"run": "a\x1b[31mb"}, "run: expected printable characters"),
        ({"labels": ("a", "a")}, "labels: 'a' comes twice"),
        ({"optimizer": m.OptimizerSpec(beta1=1.0)}, "optimizer.beta1: expected 0..1, got 1"),
        ({"optimizer": m.OptimizerSpec(proximal=-1.0)}, "optimizer.proximal: expected 0..1e"),
        (
            {"optimizer": m.OptimizerSpec(learning_rate=float("nan"))},
            "optimizer.learning_rate: expected a finite number, got nan",
        ),
    ],
)
def test_an_instruction_out_of_range_is_refused_by_the_name_of_its_field(
    changes: dict[str, object], words: str
) -> None:
    with pytest.raises(ProtocolError, match=words):
        m.decode_train_instruction(m.encode_train_instruction(replace(TRAIN, **changes)))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"metrics": {"train_loss": float("nan")}}, r"metrics\['train_loss'\]: expected a finite"),
        ({"metrics": {str(i): 0.0 for i in range(257)}}, "metrics: expected at most 256 entries"),
        ({"samples": 10**15 + 1}, "samples: expected 0..1000000000000000, got"),
        ({"device": ""}, "device: expected a text, got none"),
    ],
)
def test_a_train_report_out_of_range_is_refused_by_the_name_of_its_field(
    changes: dict[str, object], words: str
) -> None:
    with pytest.raises(ProtocolError, match=words):
        m.decode_train_report(m.encode_train_report(replace(TRAINED, **changes)))


def _site(**changes: object) -> bytes:
    message = pb.SiteReport.FromString(m.encode_site_report(REPORT))
    for name, value in changes.items():
        setattr(message.profile, name, value)
    return message.SerializeToString()


def _site_with(change: Callable[[pb.SiteReport], object]) -> bytes:
    message = pb.SiteReport.FromString(m.encode_site_report(REPORT))
    change(message)
    return message.SerializeToString()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (_site(memory_bytes=0), "profile.memory_bytes: expected 1.."),
        (_site(memory_bytes=2**60), "profile.memory_bytes: expected 1.."),
        (_site(accelerator="tpu"), "profile.accelerator: expected one of cpu, cuda, got 'tpu'"),
        (_site(link_bytes_per_s=float("inf")), "profile.link_bytes_per_s: expected a finite"),
        (_site_with(lambda s: s.profile.formats.append("fp7")), "profile.formats: expected one of"),
        (_site_with(lambda s: s.profile.formats.append("nf4")), "'nf4' comes twice"),
        (_site_with(lambda s: s.profile.ClearField("formats")), "at least one backbone format"),
        (_site_with(lambda s: s.dense.add(name="score.bias", shape=[1])), "comes twice"),
        (_site_with(lambda s: s.dense.add(name="x", shape=[2**31, 2])), "dense 'x': expected 1 to"),
        (_site_with(lambda s: s.dense.add(name="x")), "dense 'x': expected 1 to 4 dimensions"),
        (_site_with(lambda s: s.labels.append("yes")), "labels: 'yes' comes twice"),
        (_site_with(lambda s: s.warnings.append("a\nb")), "warnings: expected printable"),
    ],
)
def test_a_site_report_out_of_range_is_refused_by_the_name_of_its_field(
    data: bytes, words: str
) -> None:
    with pytest.raises(ProtocolError, match=words):
        m.decode_site_report(data)


def test_an_unknown_task_is_refused() -> None:
    data = pb.TaskSpec(run="r", task="poetry", base_digest="d").SerializeToString()
    with pytest.raises(ProtocolError, match="task: expected one of causal-lm, sequence-class"):
        m.decode_task_spec(data)


def test_too_many_matrices_are_refused() -> None:
    matrices = tuple(MatrixPlan(f"m{i}", 1, "fp32") for i in range(fields.MAX_ENTRIES + 1))
    with pytest.raises(ProtocolError, match=r"plan\.matrices: expected at most 20000 entries"):
        m.decode_train_instruction(_train_with_plan(replace(PLAN, matrices=matrices)))


@pytest.mark.parametrize("name", BACKBONE_FORMATS)
def test_every_backbone_format_travels(name: FormatName) -> None:
    plan = replace(PLAN, matrices=(MatrixPlan("w", 1, name, block_size=32, correction_rank=2),))
    sent = replace(TRAIN, plan=plan)
    assert m.decode_train_instruction(m.encode_train_instruction(sent)).plan == plan
    report = replace(REPORT, profile=replace(REPORT.profile, formats=(name,)))
    assert m.decode_site_report(m.encode_site_report(report)) == report


def test_a_device_that_does_not_say_what_it_computes_in_is_one_that_does_not_know() -> None:
    silent = replace(REPORT, profile=replace(REPORT.profile, compute="auto"))
    message = pb.SiteReport.FromString(m.encode_site_report(silent))
    # Devices of before the field send none.
    assert not message.profile.compute
    assert m.decode_site_report(message.SerializeToString()) == silent


@pytest.mark.parametrize("value", ["auto", "int4"])
def test_a_dtype_that_is_none_to_compute_in_is_refused(value: str) -> None:
    message = pb.SiteReport.FromString(m.encode_site_report(REPORT))
    message.profile.compute = value
    with pytest.raises(ProtocolError, match=r"profile\.compute: expected one of"):
        m.decode_site_report(message.SerializeToString())
