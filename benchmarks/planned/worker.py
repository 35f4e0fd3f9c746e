"""A device process that runs one plan, or measures the machine, and says what it took.

    python -m planned.worker '{"rates": true}'
    python -m planned.worker '{"folder": "...", "case": {...}, "steps": 3, "device": "cpu"}'

Its last line is a JSON object.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from contenders.workloads import Sample

import fedtune_client.app  # noqa: F401  all that a device imports
from fedtune.devices.usage import peak_resident_bytes, restart_peak
from fedtune.model.backbone import BackboneShelf
from fedtune.model.shapes import read_shapes
from fedtune.records import DevicePlan, Dispatch, LoraFactors, ModelShapes
from fedtune.train.allocator import keep_what_fits
from fedtune.train.idle import SLACK_BYTES, call_seconds, ready_bytes
from fedtune.train.round import train_round
from fedtune.wire.messages import OptimizerSpec
from planned.cases import Case

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

RESERVED_BYTES = 16 << 20
"""Private memory that loading reserves for the stacks and heaps of its threads and hardly touches:
measured, after a model of any size was loaded."""


def main() -> int:
    task = json.loads(sys.argv[1])
    found = rates(task.get("device", "cpu")) if task.get("rates") else run(task)
    print(json.dumps(found), flush=True)
    return 0


def run(task: Mapping[str, Any]) -> dict[str, Any]:
    """One round of the case's plan."""
    case, folder, device = Case(**task["case"]), Path(task["folder"]), torch.device(task["device"])
    keep_what_fits(1, 1)  # the plan is all that its budget allows
    idle = ready_bytes() or 0
    shapes = read_shapes(folder, ("all-linear",))
    plan = case.plan(shapes)
    if limit := task.get("limit_bytes"):
        # The slack is in the idle process's own count.
        _limit_data(limit + SLACK_BYTES + RESERVED_BYTES)
    restart_peak()
    sent = dispatch(plan, shapes, case)
    batch = samples(case, shapes.vocabulary)
    labels = () if case.task == "causal-lm" else ("no", "yes")
    shelf = BackboneShelf(folder, device, keep_base=False, compute=DTYPES[case.compute])
    if device.type != "cpu":
        torch.cuda.reset_peak_memory_stats()
    backbone = shelf.get(case.task, labels, {m.name: m.form for m in plan.matrices})
    loaded = peak_resident_bytes() or 0
    stamps: list[tuple[float, float]] = []

    def stamp(*_: object) -> None:
        if device.type != "cpu":
            torch.cuda.synchronize()
        stamps.append((time.perf_counter(), time.process_time()))

    train_round(
        backbone,
        [batch] * task["steps"],
        sent,
        plan,
        OptimizerSpec(),
        task=case.task,
        pad_id=0,
        after_step=stamp,
        cuda_graph="on" if case.recorded else "off",
    )
    peak = peak_resident_bytes() or 0
    if device.type != "cpu":
        idle, peak = 0, torch.cuda.max_memory_allocated()
        loaded = 0
    wall, cpu = np.diff(np.array(stamps), axis=0).T
    return {
        "idle_bytes": idle,
        "loaded_bytes": loaded,
        "peak_bytes": peak,
        "seconds": wall.tolist(),
        "cpu_seconds": cpu.tolist(),
    }


def dispatch(plan: DevicePlan, shapes: ModelShapes, case: Case) -> Dispatch:
    """Factors of every matrix, and the head of a classifier, as a coordinator would send them."""
    rng, by_name = np.random.default_rng(0), shapes.by_name()

    def pair(name: str, rank: int) -> LoraFactors:
        matrix = by_name[name]
        a = rng.standard_normal((rank, matrix.in_features), dtype=np.float32)
        return LoraFactors(a, np.zeros((matrix.out_features, rank), dtype=np.float32))

    dense = {name: np.zeros(shape, np.float32) for name, shape in case.dense(shapes).items()}
    return Dispatch(
        {m.name: pair(m.name, m.rank) for m in plan.matrices if m.rank},
        {m.name: pair(m.name, m.tail_rank) for m in plan.matrices if m.tail_rank},
        dense,
    )


def samples(case: Case, vocabulary: int) -> list[Sample]:
    """One optimiser step's samples, every token of which carries loss."""
    rng = np.random.default_rng(0)
    return [
        Sample(
            rng.integers(3, vocabulary, case.length).astype(np.int32),
            np.ones(case.length, dtype=np.bool_),
            index % 2,
        )
        for index in range(case.batch_size)
    ]


def _limit_data(limit: int) -> None:
    """Let the process have that much private memory beyond what it has (Linux).

    `RLIMIT_DATA` counts private writable memory: the heap, buffers, and private mappings of files,
    so also a base that is mapped in the dtype that it is stored in. Address space (`RLIMIT_AS`)
    would count code and reservations that take no memory.
    """
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmData:"):
            most = int(line.split()[1]) * 1024 + limit
            resource.setrlimit(resource.RLIMIT_DATA, (most, most))


# ---------------------------------------------------------------- the machine


def rates(device: str) -> dict[str, Any]:
    """Matrix products by dtype and copies, as a probe measures them."""
    found = {}
    for name, dtype in DTYPES.items():
        generator = torch.Generator().manual_seed(0)
        left, right = (torch.randn(1024, 1024, generator=generator) for _ in range(2))
        left, right = (t.to(device, dtype) for t in (left, right))
        found[name] = 2 * 1024**3 / _fastest(lambda a=left, b=right: a @ b, device)
    block = torch.zeros(1 << 26, dtype=torch.uint8, device=device)
    into = torch.empty_like(block)
    copied = 2 * block.numel() / _fastest(lambda: into.copy_(block), device)
    return {
        "matmul_flops_per_s": found,
        "memory_bandwidth_bytes_per_s": copied,
        "block_seconds": min(call_seconds() for _ in range(5)),
    }


def _fastest(call: Callable[[], object], device: str) -> float:
    best = float("inf")
    for _ in range(8):
        started = time.perf_counter()
        call()
        if device != "cpu":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return best


if __name__ == "__main__":
    sys.exit(main())
