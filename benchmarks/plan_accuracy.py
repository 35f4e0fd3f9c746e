"""What is predicted of a plan beside what happens: peak memory and seconds of a step.

    python benchmarks/plan_accuracy.py [--quick] [--json] [--device cuda]

Each line is a plan of a model with random weights, run in a process of its own. Memory predicted
is what the process measured of itself before it had a model (`fedtune.train.idle`, with its slack)
plus `peak_bytes` and the message; measured is the peak of its resident memory, mapped files
included, from then on, loading too. The error of the delta leaves the idle process out. Freed
buffers are given back, as on a device whose budget its plan fills. Seconds: rates are probed once
(square products, a copy, a step of a tiny model for the calls), one step of the first line
calibrates, and the others are predicted from both. Every sample has full length. On CUDA, memory
is `torch.cuda.max_memory_allocated`. The last rows run a plan under a limit of the operating
system on private memory (`RLIMIT_DATA`): its own peak, and six tenths of it.

`--quick` takes four plans and one timed step of each.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from planned.cases import CASES, CUDA_CASES, LIMITED, QUICK, Case, make_folder
from reporting import parse_arguments, print_json, publish, table

from fedtune.model.shapes import read_shapes
from fedtune.plan.calibration import StepMeasurement, calibrate
from fedtune.plan.cost import load_of_plan, message_bytes, peak_bytes, step_seconds
from fedtune.plan.traffic import WireCosts
from fedtune.records import DeviceProfile

HERE = Path(__file__).resolve().parent
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
# With more threads than free cores, each waits for the others at every product.
os.environ.setdefault("OMP_NUM_THREADS", "1")

SHARE_OF_LIMIT = 0.6
"""Of the plan's peak, under which a run is expected to fail."""


@dataclass(frozen=True)
class Line:
    """A plan as predicted and as run.

    Attributes:
        predicted_bytes: beyond the idle process, as is `measured_bytes`.
        predicted_seconds: of a step, before calibration.
        measured_seconds: the fastest step after the first.
    """

    name: str
    idle_bytes: int
    predicted_bytes: int
    measured_bytes: int
    predicted_seconds: float
    measured_seconds: float

    @property
    def total_error(self) -> float:
        measured = self.idle_bytes + self.measured_bytes
        return (self.predicted_bytes - self.measured_bytes) / measured

    @property
    def delta_error(self) -> float:
        return self.predicted_bytes / self.measured_bytes - 1

    def time_error(self, factor: float) -> float:
        return factor * self.predicted_seconds / self.measured_seconds - 1


def worker(task: Mapping[str, Any]) -> subprocess.CompletedProcess[str]:
    """Run a task of `planned.worker` to its end."""
    paths = [str(HERE.parent / part) for part in ("", "server", "client", "benchmarks")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    return subprocess.run(
        [sys.executable, "-m", "planned.worker", json.dumps(task)],
        cwd=HERE,
        env=environment,
        capture_output=True,
        text=True,
    )


def answer(task: Mapping[str, Any]) -> dict[str, Any]:
    """What a task of `planned.worker` answers.

    Raises:
        RuntimeError: it failed.
    """
    ran = worker(task)
    if ran.returncode:
        raise RuntimeError(f"{task}: {ran.stderr.strip()[-2000:]}")
    found: dict[str, Any] = json.loads(ran.stdout.strip().splitlines()[-1])
    return found


def probe(device: str) -> tuple[DeviceProfile, float]:
    """This machine's rates, and what a block's pass takes to call."""
    found = answer({"rates": True, "device": device})
    return this_machine(
        device,
        found["matmul_flops_per_s"],
        found["memory_bandwidth_bytes_per_s"],
        found["block_seconds"],
    )


def this_machine(
    device: str, flops_per_s: Mapping[str, float], bandwidth: float, block_seconds: float
) -> tuple[DeviceProfile, float]:
    """Rates as a profile, beside the seconds of a block's call."""
    profile = DeviceProfile(
        "this",
        "this",
        cpu_threads=1,
        memory_bytes=1,
        accelerator=device,
        matmul_flops_per_s=flops_per_s,
        memory_bandwidth_bytes_per_s=bandwidth,
    )
    return profile, block_seconds


def measure(
    case: Case, work: Path, profile: DeviceProfile, block_seconds: float, steps: int
) -> Line:
    """Predict a plan and run it."""
    folder = make_folder(case.shape, work)
    shapes = read_shapes(folder, ("all-linear",))
    plan = case.plan(shapes)
    load = load_of_plan(
        plan,
        shapes,
        task=case.task,
        dense_parameters=sum(_product(shape) for shape in case.dense(shapes).values()),
        whole_matrices=profile.accelerator != "cpu",
        itemsize=case.itemsize,
    )
    forms = {matrix.name: matrix.form for matrix in plan.matrices}
    message = 0 if load.whole_matrices else message_bytes(load, WireCosts())
    seconds = step_seconds(
        profile, shapes, forms, load, plan.batch_size, block_seconds=block_seconds
    )
    task = {"folder": str(folder), "case": asdict(case), "steps": steps + 1}
    found = answer({**task, "device": profile.accelerator})
    peak = max(found["peak_bytes"], found["loaded_bytes"])
    return Line(
        case.name,
        found["idle_bytes"],
        peak_bytes(shapes, forms, load).total + message,
        peak - found["idle_bytes"],
        seconds,
        min(found["seconds"]),
    )


def _product(shape: Sequence[int]) -> int:
    total = 1
    for side in shape:
        total *= side
    return total


# ---------------------------------------------------------------- figures


def figures(lines: Sequence[Line]) -> dict[str, float]:
    """The key figures; the first line calibrates, and its own time is no prediction."""
    factor = time_factor(lines)
    memory = [abs(line.total_error) for line in lines]
    times = [abs(line.time_error(factor)) for line in lines[1:]]
    return {
        "memory_error_median": round(median(memory), 4),
        "memory_error_worst": round(max(memory), 4),
        "memory_delta_error_median": round(median(abs(line.delta_error) for line in lines), 4),
        "memory_delta_error_worst": round(max(abs(line.delta_error) for line in lines), 4),
        "time_error_median": round(median(times), 4),
        "time_error_worst": round(max(times), 4),
    }


def time_factor(lines: Sequence[Line]) -> float:
    """What the first line's step says of this machine."""
    first = lines[0]
    step = StepMeasurement(first.measured_seconds, first.predicted_seconds)
    return calibrate({"this": [step]})["this"].seconds_factor


def rows_of(lines: Sequence[Line]) -> list[dict[str, object]]:
    """The table of plans."""
    factor = time_factor(lines)
    return [
        {
            "plan": line.name,
            "predicted, MB": f"{(line.idle_bytes + line.predicted_bytes) / 1e6:.0f}",
            "measured, MB": f"{(line.idle_bytes + line.measured_bytes) / 1e6:.0f}",
            "error": f"{line.total_error:+.1%}",
            "error of the delta": f"{line.delta_error:+.1%}",
            "predicted, s": f"{factor * line.predicted_seconds:.3f}",
            "measured, s": f"{line.measured_seconds:.3f}",
            "error of the time": "calibrates" if place == 0 else f"{line.time_error(factor):+.1%}",
        }
        for place, line in enumerate(lines)
    ]


def under_a_limit(work: Path) -> list[dict[str, object]]:
    """A plan run under a limit on private memory: its own peak, and well under that."""
    folder = make_folder(LIMITED.shape, work)
    shapes = read_shapes(folder, ("all-linear",))
    plan = LIMITED.plan(shapes)
    load = load_of_plan(plan, shapes, task=LIMITED.task, itemsize=LIMITED.itemsize)
    forms = {matrix.name: matrix.form for matrix in plan.matrices}
    peak = peak_bytes(shapes, forms, load).total + message_bytes(load, WireCosts())
    rows = []
    for share in (1.0, SHARE_OF_LIMIT):
        limit = {"limit_bytes": int(share * peak)}
        task = {"folder": str(folder), "case": asdict(LIMITED), "steps": 2, "device": "cpu"}
        ended = worker({**task, **limit}).returncode
        rows.append(
            {
                "plan": LIMITED.name,
                "limit beyond the idle process": f"{share * peak / 1e6:.0f} MB ({share:.0%})",
                "it": "finishes" if ended == 0 else "runs out of memory",
            }
        )
    return rows


def main() -> int:
    def add_options(parser: ArgumentParser) -> None:
        parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
        parser.add_argument("--work", type=Path, help="keep the models in this folder")

    arguments = parse_arguments(__doc__ or "", add_options)
    cases = CUDA_CASES if arguments.device == "cuda" else QUICK if arguments.quick else CASES
    with tempfile.TemporaryDirectory() as name:
        work = arguments.work or Path(name)
        profile, block_seconds = probe(arguments.device)
        lines = []
        for case in cases:
            lines.append(measure(case, work, profile, block_seconds, 1 if arguments.quick else 3))
            print(f"{case.name}: memory {lines[-1].total_error:+.1%}", flush=True)
        body = table(rows_of(lines))
        found = figures(lines)
        if arguments.device == "cpu" and sys.platform == "linux" and not arguments.quick:
            body += "\n\n" + table(under_a_limit(work))
    print(f"\n{body}\n\n{found}", flush=True)
    if not arguments.quick and arguments.device == "cpu":
        publish("Plans and what they take", "python benchmarks/plan_accuracy.py", _preface() + body)
    if arguments.json:
        print_json(found)
    return 0


def _preface() -> str:
    return (__doc__ or "").split("\n\n", 2)[2].split("\n\n`--quick`")[0] + "\n\n"


if __name__ == "__main__":
    sys.exit(main())
