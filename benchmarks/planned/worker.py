"""A device process that runs one plan and says what it took.

python -m planned.worker '{"folder": "...", "case": {...}, "steps": 3}'
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
import time
from pathlib import Path

import numpy as np


def held_bytes(field):
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024


def rss():
    return {f: held_bytes(f) // 1000000 for f in ("RssAnon", "RssFile", "VmHWM", "VmData")}


def main():
    from planned.cases import Case

    task = json.loads(sys.argv[1])
    case, folder = Case(**task["case"]), Path(task["folder"])
    import torch

    import fedtune_client.app
    from fedtune.lora.linear import AdaptedLinear
    from fedtune.model.backbone import BackboneShelf
    from fedtune.model.shapes import read_shapes
    from fedtune.records import Dispatch, LoraFactors
    from fedtune.train.allocator import keep_freed_memory
    from fedtune.train.round import train_round
    from fedtune.wire.messages import OptimizerSpec
    from contenders.workloads import Sample

    import os

    if os.environ.get("KEEP", "1") == "1":
        keep_freed_memory()
    elif os.environ["KEEP"] != "0":
        lib = ctypes.CDLL(None)
        lib.mallopt(-3, int(os.environ["KEEP"]))
        lib.mallopt(-1, 2**31 - 1)
    A = rss()
    if task.get("warm"):
        from planned.worker_warm import warm

        warm()
    B = rss()
    idle = held_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    shapes = read_shapes(folder, ("all-linear",))
    plan = case.plan(shapes)
    compute = {"fp32": torch.float32, "bf16": torch.bfloat16}[case.compute]
    rng = np.random.default_rng(0)
    draw = lambda m, r: LoraFactors(
        rng.standard_normal((r, m.in_features), dtype=np.float32),
        np.zeros((m.out_features, r), np.float32),
        1.0,
    )
    by = shapes.by_name()
    sent = Dispatch(
        {m.name: draw(by[m.name], m.rank) for m in plan.matrices if m.rank},
        {m.name: draw(by[m.name], m.tail_rank) for m in plan.matrices if m.tail_rank},
    )
    batch = [
        Sample(
            rng.integers(3, shapes.vocabulary, case.length).astype(np.int32),
            np.ones(case.length, bool),
            i % 2,
        )
        for i in range(case.batch_size)
    ]
    labels = () if case.task == "causal-lm" else ("no", "yes")
    shelf = BackboneShelf(folder, torch.device("cpu"), keep_base=False, compute=compute)
    backbone = shelf.get(case.task, labels, {m.name: m.form for m in plan.matrices})
    loaded, C = held_bytes("VmHWM"), rss()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    seconds = []

    def after(i, loss):
        seconds.append(time.perf_counter())

    if os.environ.get("PROFILE"):
        from planned.worker_warm import tensor_peak

        print(
            "tensors",
            tensor_peak(
                lambda: train_round(
                    backbone, [batch] * 2, sent, plan, OptimizerSpec(), task=case.task, pad_id=0
                )
            )
            / 1e6,
            file=sys.stderr,
        )
    train_round(
        backbone,
        [batch] * task["steps"],
        sent,
        plan,
        OptimizerSpec(),
        task=case.task,
        pad_id=0,
        after_step=after,
    )
    peak = held_bytes("VmHWM")
    print(
        json.dumps(
            {
                "idle": idle,
                "load": loaded - idle,
                "train": peak - idle,
                "A": A,
                "B": B,
                "C": C,
                "E": rss(),
                "steps": list(np.diff(seconds)),
            }
        )
    )


if __name__ == "__main__":
    main()
