"""All that reads bytes which somebody else may have written: each with bytes that it accepts."""

from __future__ import annotations

import hashlib
import importlib
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from google.protobuf.message import Message

from fedtune.coding import CODECS, CodecName
from fedtune.config import load_run_config, parse_run_config
from fedtune.deploy.site_task import TASK_KEY, flower_config, read_site_task
from fedtune.export.ledger_tail import LedgerTail
from fedtune.plan.written import read_plan
from fedtune.records import (
    DevicePlan,
    DeviceProfile,
    Dispatch,
    DistortionTable,
    GlobalAdapter,
    ImportanceReport,
    LoraFactors,
    LowRank,
    MatrixForm,
    MatrixPlan,
    MatrixShape,
    SiteReport,
)
from fedtune.v1 import calibration_pb2, coordinator_pb2, fedtune_pb2
from fedtune.wire import calibration, fields, messages
from fedtune.wire.check import check_update
from fedtune.wire.checkpoint import read_checkpoint, write_checkpoint
from fedtune.wire.distortion import distortion_json, read_distortion
from fedtune.wire.flower import TENSORS_STYPE, TRAIN, from_record, to_record
from fedtune.wire.importance import importance_json, read_importance
from fedtune.wire.ledger_chain import FIRST, line_hash, sealed, verify_ledger, verify_whole_lines
from fedtune.wire.packing import pack_tensors, packed_shapes, tensors_digest, unpack_tensors
from fedtune.wire.tensors import pack_dispatch, unpack_dispatch
from scripts.soak import mutations as m

Read = Callable[[bytes], object]


@dataclass(frozen=True)
class Target:
    """One reader.

    Attributes:
        seeds: bytes that it accepts.
        mutations: what may be done to them.
        read: returns, or raises a `FedtuneError`; nothing else.
    """

    name: str
    seeds: tuple[bytes, ...]
    mutations: tuple[m.Mutate, ...]
    read: Read

    def input(self, rng: random.Random) -> bytes:
        """Bytes that nobody wrote: a seed that was changed once or some times."""
        data = rng.choice(self.seeds)
        for _ in range(rng.choice((1, 1, 1, 2, 4))):
            data = rng.choice(self.mutations)(data, rng)
        return data


def all_targets(folder: Path) -> list[Target]:
    """Every reader.

    Args:
        folder: empty; readers of files find theirs there.
    """
    found = [*_messages(), *_services(), *_tensors(), _records(), *_files(folder)]
    return [*found, _site_task(), *_deployment(folder)]


# ---------------------------------------------------------------- messages

PLAN = DevicePlan(
    device="site-a",
    matrices=(MatrixPlan("q", 2, "nf4", 3, 64, 4), MatrixPlan("k", 1, "fp32")),
    micro_batch=2,
    batch_size=4,
    sequence_length=8,
    local_steps=5,
    binding="memory",
)
PROFILE = DeviceProfile(
    name="Krankenhaus Süd",
    device_class="laptop",
    cpu_threads=4,
    memory_bytes=8 * 10**9,
    matmul_flops_per_s={"fp32": 1e10},
    formats=("fp32", "nf4"),
    versions={"torch": "2.13.0"},
)
_HEX = "ab" * 32


def _messages() -> Iterator[Target]:
    spec = messages.TaskSpec("demo-1", "causal-lm", _HEX, ("q", "k"), 7)
    report = SiteReport(PROFILE, _HEX, 100, 10, 12345, {"w": (0, 64)}, ("no", "yes"), ("odd",), 3)
    order = messages.TrainInstruction(
        "demo-1", 3, _HEX, PLAN, messages.OptimizerSpec(), 5, _HEX, labels=("no", "yes")
    )
    trained = messages.TrainReport("demo-1", 3, "site-a", _HEX, 8, 99, _HEX, {"loss": 2.5}, 2, 9)
    evaluate = messages.EvaluateInstruction("demo-1", 0, _HEX, PLAN, _HEX)
    evaluated = messages.EvaluateReport("demo-1", 0, "site-a", {"held_out_loss": 2.0})
    measure = calibration.CalibrationInstruction(
        "demo-1", _HEX, PLAN, "spectrum", 4, 2, 5, _HEX, ("no", "yes")
    )
    measured = calibration.CalibrationReport(
        "demo-1", "site-a", _HEX, "spectrum", 8, 60, 64, 4, _HEX
    )
    pb, cpb = fedtune_pb2, calibration_pb2
    table: tuple[tuple[type[Message], bytes, Read], ...] = (
        (pb.TaskSpec, messages.encode_task_spec(spec), messages.decode_task_spec),
        (pb.SiteReport, messages.encode_site_report(report), messages.decode_site_report),
        (
            pb.TrainInstruction,
            messages.encode_train_instruction(order),
            messages.decode_train_instruction,
        ),
        (pb.TrainReport, messages.encode_train_report(trained), messages.decode_train_report),
        (
            pb.EvaluateInstruction,
            messages.encode_evaluate_instruction(evaluate),
            messages.decode_evaluate_instruction,
        ),
        (
            pb.EvaluateReport,
            messages.encode_evaluate_report(evaluated),
            messages.decode_evaluate_report,
        ),
        (
            cpb.CalibrationInstruction,
            calibration.encode_calibration_instruction(measure),
            calibration.decode_calibration_instruction,
        ),
        (
            cpb.CalibrationReport,
            calibration.encode_calibration_report(measured),
            calibration.decode_calibration_report,
        ),
    )
    for kind, data, read in table:
        yield Target(kind.DESCRIPTOR.name, (data,), m.protobuf(kind), read)


def _services() -> Iterator[Target]:
    """Messages of the coordinator's services: their parsing."""
    for name in sorted(coordinator_pb2.DESCRIPTOR.message_types_by_name):
        kind: type[Message] = getattr(coordinator_pb2, name)
        seed = kind()
        rng = random.Random(name)
        for _ in range(12):
            seed.ParseFromString(m.edit_protobuf(kind)(seed.SerializeToString(), rng))

        def read(data: bytes, kind: type[Message] = kind, name: str = name) -> object:
            return fields.parse(kind(), data, name)

        yield Target(f"service {name}", (seed.SerializeToString(),), m.protobuf(kind), read)


# ---------------------------------------------------------------- tensors

SHAPES = {"q": MatrixShape("q", 24, 16, 0), "k": MatrixShape("k", 20, 16, 0)}


def _tensors() -> Iterator[Target]:
    rng = np.random.default_rng(0)
    named = {
        "a": rng.normal(size=(3, 70)).astype(np.float32),
        "b": rng.normal(size=(65, 2)).astype(np.float32),
        "c": np.zeros((), np.float32),
        "d": np.zeros((0, 4), np.float32),
    }
    expected = {name: value.shape for name, value in named.items()}
    packed = tuple(pack_tensors(named, codec) for codec in CODECS)
    yield Target("packed tensors", packed, m.PACKED, lambda data: unpack_tensors(data, expected))
    bomb = (*m.PACKED, m.inflating)
    yield Target("packed header", packed, bomb, packed_shapes)
    # Whoever names the shapes it wants from a header must be safe, too.
    yield Target(
        "packed, any shape", packed, m.PACKED, lambda d: unpack_tensors(d, packed_shapes(d))
    )

    def pair(name: str, rank: int) -> LoraFactors:
        shape = SHAPES[name]
        a, b = (
            rng.normal(size=(rank, shape.in_features)),
            rng.normal(size=(shape.out_features, rank)),
        )
        return LoraFactors(a.astype(np.float32), b.astype(np.float32))

    dispatch = Dispatch({"q": pair("q", 2), "k": pair("k", 1)}, {"q": pair("q", 3)}, {})
    sent = tuple(pack_dispatch(dispatch, codec) for codec in CODECS)
    yield Target("dispatch", sent, m.PACKED, lambda data: unpack_dispatch(data, PLAN, SHAPES, {}))

    tensors = {"q.a": dispatch.trained["q"].a, "q.b": dispatch.trained["q"].b}
    tensors |= {"k.a": dispatch.trained["k"].a, "k.b": dispatch.trained["k"].b}

    def update(data: bytes, codec: CodecName) -> object:
        report = messages.TrainReport("r", 1, "site-a", _HEX, 8, 40, tensors_digest(data))
        return check_update(
            report,
            data,
            run="r",
            round=1,
            device="site-a",
            base_digest=_HEX,
            plan=PLAN,
            shapes=SHAPES,
            dense_shapes={},
            max_norm=1e4,
            codec=codec,
            sent=dispatch,
        )

    for codec in ("fp32", "fp16", "q4"):
        if codec in CODECS:
            seeds = (pack_tensors(tensors, codec),)
            yield Target(f"update in {codec}", seeds, m.PACKED, partial(update, codec=codec))


def _records() -> Target:
    """Flower's records, in every form that Flower lets through."""

    def read(data: bytes) -> object:
        rng = random.Random(data)
        body = data[:64]
        record = to_record(TRAIN, body, body if rng.random() < 0.7 else None)
        for _ in range(rng.choice((1, 1, 2, 3))):
            _spoil(record, body, rng)
        return from_record(record, TRAIN)

    return Target("records", (b"seed", b""), (m.nothing_of_it, m.insert), read)


def _spoil(record: RecordDict, body: bytes, rng: random.Random) -> None:
    values = (b"", body, 1, 2, -1, 2**63, 0.5, True, "train.lora", "\x1b[2J", [1], [b"x"], ["a"])
    name = rng.choice(("fedtune", "tensors", "other", "", "\0"))
    kinds = (
        ConfigRecord({rng.choice(("version", "kind", "body", "x", "")): rng.choice(values)}),
        ConfigRecord({"version": rng.choice(values), "kind": rng.choice(values), "body": body}),
        MetricRecord({"version": 1}),
        ArrayRecord({}),
        ArrayRecord({rng.choice(("packed", "x")): _array(body, rng)}),
    )
    if name in record:
        del record[name]
    if rng.random() < 0.8:
        record[name] = rng.choice(kinds)


def _array(body: bytes, rng: random.Random) -> Array:
    shape = rng.choice(((len(body),), (), (2**62,), (-1,), (1, len(body)), (0,)))
    dtype = rng.choice(("uint8", "float32", "object", "\0"))
    return Array(dtype, shape, rng.choice((TENSORS_STYPE, "numpy.ndarray", "")), body)


# ---------------------------------------------------------------- files


def _files(folder: Path) -> Iterator[Target]:
    def from_file(name: str, read: Callable[[Path], object]) -> Read:
        path = folder / name

        def write_and_read(data: bytes) -> object:
            path.write_bytes(data)
            return read(path)

        return write_and_read

    lines, before = [], FIRST
    for seq in range(3):
        line = sealed(
            {"seq": seq, "time": "2026-11-27T10:00:00+00:00", "kind": "x", "prev": before}
        )
        lines.append(line + b"\n")
        before = line_hash(line)
    ledger = (b"".join(lines),)
    yield Target("ledger", ledger, m.JSON, from_file("ledger.jsonl", verify_ledger))
    yield Target("growing ledger", ledger, m.JSON, from_file("ledger.jsonl", verify_whole_lines))
    tail = from_file("tail.jsonl", lambda path: LedgerTail(path).read())
    yield Target("ledger tail", ledger, m.JSON, tail)

    yield Target("checkpoint", (_checkpoint(folder),), m.CHECKPOINT, _read_checkpoint(folder))

    config = json.dumps(_run_tree()).encode()
    yield Target("config.json", (config,), m.JSON, from_file("config.json", load_run_config))
    yield Target("run file", (_RUN_TOML,), m.TOML, from_file("run.toml", load_run_config))
    yield Target("plan file", (_PLAN_JSON,), m.JSON, from_file("plan.json", read_plan))
    form = MatrixForm("nf4", 64, 2)
    table = json.dumps(distortion_json(DistortionTable(_HEX, (form,), {"q": (0.5,)}))).encode()
    yield Target("distortion", (table,), m.JSON, from_file("distortion.json", read_distortion))
    gains = importance_json(ImportanceReport({"q": (2.0, 1.0)}, 10, "sensitivity"), _HEX)
    read_gains = from_file("importance.json", lambda path: read_importance(path, _HEX))
    yield Target("importance", (json.dumps(gains).encode(),), m.JSON, read_gains)


def _checkpoint(folder: Path) -> bytes:
    def low_rank(rank: int) -> LowRank:
        ones = np.ones((4, rank), np.float32)
        return LowRank(ones, np.ones(rank, np.float32), ones)

    adapter = GlobalAdapter(3, {"q": low_rank(2)}, {"head": np.ones(3, np.float32)}, {"q": 0.1})
    written = write_checkpoint(folder / "seed", adapter, {"momentum": adapter}, {"state": "{}"})
    return written.read_bytes()


def _read_checkpoint(folder: Path) -> Read:
    """With a digest that fits: it finds damage of the disk, and a hand may have renewed it."""
    path = folder / "round-0003.safetensors"

    def read(data: bytes) -> object:
        path.write_bytes(data)
        digest = hashlib.sha256(data).hexdigest()
        path.with_name(path.name + ".sha256").write_text(f"{digest}  {path.name}\n")
        return read_checkpoint(path)

    return read


def _run_tree() -> dict[str, dict[str, object]]:
    return {
        "run": {"name": "unit", "rounds": 4, "round_deadline_s": 30.0},
        "model": {"path": "not/read/here"},
        "data": {"train": "rows.jsonl", "max_tokens": 16, "partition": {"by": "iid"}},
        "fleet": {"any": {"count": 3, "memory": "1 GB", "formats": ["fp32"]}},
        "lora": {"rank_max": 3, "rank_cap": 6},
        "train": {"batch_size": 4, "local_steps": 3, "learning_rate": 0.1},
        "outputs": {"keep_checkpoints": 2, "exports": ["peft"]},
    }


_RUN_TOML = b"""[run]
name = "unit"
rounds = 4
[model]
path = "base"
[data]
train = "rows.jsonl"
[data.partition]
by = "iid"
[fleet.any]
count = 3
memory = "1 GB"
formats = ["fp32", "nf4"]
[train]
learning_rate = 1e-3
"""

_PLAN_JSON = json.dumps(
    {
        "layout": "fedtune-plan-1",
        "base": {"digest": _HEX},
        "classes": {"any": {"ranks": {"q": 2}, "micro_batch": 1, "local_steps": 3}},
        "devices": {"a": "any"},
    }
).encode()


# ---------------------------------------------------------------- deployments


def _site_task() -> Target:
    text = flower_config(parse_run_config(_run_tree(), "seed"))[TASK_KEY].encode()
    return Target("site task", (text,), m.JSON, lambda d: read_site_task({TASK_KEY: _text(d)}))


def _text(data: bytes) -> str:
    return data.decode("utf-8", "replace")


def _deployment(folder: Path) -> Iterator[Target]:
    """Readers of what belongs to a deployment."""
    if (codes := _module("fedtune.deploy.join_code")) is not None:
        code = codes.JoinCode(b"\1" * codes.SECRET_BYTES, b"\2" * codes.FINGERPRINT_BYTES)
        seeds = (str(code).encode(),)
        yield Target("join code", seeds, m.ANY, lambda d: codes.parse_join_code(_text(d)))
    if (operator := _module("fedtune.deploy.operator")) is not None:
        path = folder / "operator.toml"
        seed = b'server = "host:1"\nservice = "host:2"\ntoken = "t"\nca = "PEM"\n'

        def read_operator(data: bytes) -> object:
            path.write_bytes(data)
            return operator.OperatorFile.read(path)

        yield Target("operator file", (seed,), m.TOML, read_operator)
    if (policy := _module("fedtune.deploy.policy_file")) is not None:
        policy_path = folder / "policy.toml"

        def read_policy(data: bytes) -> object:
            policy_path.write_bytes(data)
            return policy.read_policy(policy_path)

        yield Target("policy", (policy.policy_template().encode(),), m.TOML, read_policy)
    if (manifest := _module("fedtune.deploy.manifest")) is not None:
        kind: type[Message] = coordinator_pb2.Manifest
        file = coordinator_pb2.ArtifactFile()
        rng = random.Random(1)
        for _ in range(8):
            file.ParseFromString(
                m.edit_protobuf(coordinator_pb2.ArtifactFile)(file.SerializeToString(), rng)
            )
        seed = coordinator_pb2.Manifest(files=[file]).SerializeToString()

        def read_manifest(data: bytes) -> object:
            return manifest.read_manifest(
                fields.parse(coordinator_pb2.Manifest(), data, "Manifest")
            )

        yield Target("manifest", (seed,), m.protobuf(kind), read_manifest)


def _module(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        return None
