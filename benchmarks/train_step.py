"""One training step of a LoRA adapter: fedtune beside Hugging Face, PEFT and bitsandbytes.

    python benchmarks/train_step.py [--quick] [--json]

Rank 8 on all seven matrices of every layer, AdamW, random weights, one process per contender; the
processes take their steps in turn, so that a busy machine slows them all alike. Everyone starts
from the same factors, sees the same batches in the same order and has the same allocator settings.
`64` and `512` are one sample of that many tokens, all with loss. `ragged` is 8 samples of
instruction length (lognormal, median 110, sigma 0.6, 16 to 512 tokens), whose first half is a
prompt without loss; Hugging Face pads them, and its second row has them grouped by length, from a
pool of 400, as its Trainer does on request. Speed is real tokens per second, padding not counted.
Memory is the most that the process holds over what it held with its model built.

`--quick` takes the 15M shape, two contenders and few steps; with `--smoke` as well, one timed step.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from contenders.worker import Done, Work
from contenders.workloads import BATCH_SIZE, Shape, make_batches, padding_factor, write_folder
from reporting import parse_arguments, print_json, publish, table

HERE = Path(__file__).resolve().parent
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
if "--quick" in sys.argv:
    # With more threads than free cores, each waits for the others at every product.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

RIVAL, OURS = "PEFT + bitsandbytes NF4", "fedtune nf4"
SHARED = "fedtune bnb-nf4"
"""Holds the very numbers of bitsandbytes, so its loss must be the rival's."""
ALL = (RIVAL, f"{RIVAL}, bf16", "PEFT fp32", OURS, f"{OURS}, bf16")

SHAPES = {
    "15M": Shape(288, 6, 6, 6, 768, 32000),
    "110M": Shape(768, 12, 12, 12, 2048, 32000),
    "1B width, 2 layers": Shape(2048, 2, 32, 32, 5632, 32000),
}
CHECK_SHAPE = Shape(256, 2, 4, 2, 704, 2000)
"""On which losses are compared; every row of its matrices is a whole number of blocks."""
CHECK_STEPS = 20
CHECK = "check"

WORKLOADS = ("64", "512", "ragged")
"""In the order of their memory, so that the peak of each is its own."""
DISTINCT = 4
"""Dense batches before they repeat: a loss that falls shows more than one that stays."""


@dataclass(frozen=True)
class Size:
    """How large the experiment is.

    Attributes:
        steps: of every workload, with the first, which is not timed.
    """

    contenders: tuple[str, ...]
    steps: Mapping[str, int]
    grouped: bool = True


FULL = {
    "15M": Size(ALL, {"64": 21, "512": 9, "ragged": 21}),
    "110M": Size(ALL, {"64": 9, "512": 5, "ragged": 4}),
    "1B width, 2 layers": Size(ALL, {"64": 9, "512": 5, "ragged": 4}),
}
QUICK = {"15M": Size((RIVAL, OURS), {"64": 9, "512": 4, "ragged": 4}, grouped=False)}
SMOKE = {"15M": Size((RIVAL, OURS), {"64": 2, "512": 2, "ragged": 2}, grouped=False)}


@dataclass
class Record:
    """What one contender did, workload by workload."""

    name: str
    built_s: float = 0.0
    held_bytes: int = 0
    losses: dict[str, list[float]] = field(default_factory=dict)
    seconds: dict[str, list[float]] = field(default_factory=dict)
    tokens: dict[str, list[int]] = field(default_factory=dict)
    peak_bytes: dict[str, int] = field(default_factory=dict)

    def add(self, workload: str, done: Done) -> None:
        self.losses.setdefault(workload, []).extend(done.losses)
        self.seconds.setdefault(workload, []).extend(done.seconds)
        self.tokens.setdefault(workload, []).extend(done.tokens)
        self.peak_bytes[workload] = done.peak_bytes

    def rate(self, workload: str) -> float:
        """Real tokens per second, the first step left out."""
        return sum(self.tokens[workload][1:]) / sum(self.seconds[workload][1:])


class Process:
    """One contender in a process of its own."""

    def __init__(self, contender: str, folder: Path) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  # lives as long as the process
        task = json.dumps({"contender": contender, "folder": str(folder)})
        self._process = subprocess.Popen(
            [sys.executable, "-m", "contenders.worker", task],
            cwd=HERE,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        built = self._read()
        self.threads = int(built["threads"])
        self.record = Record(contender, built["built_s"], built["held_bytes"])

    def work(self, work: Work, name: str = "") -> None:
        """Take steps and keep what came of them, under the workload's name or another."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(asdict(work)) + "\n")
        self._process.stdin.flush()
        self.record.add(name or work.workload, Done(**self._read()))

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._errors.seek(0)
            said = self._errors.read().decode(errors="replace").strip()[-2000:]
            raise RuntimeError(f"a contender ended with code {self._process.returncode}:\n{said}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def measure(name: str, size: Size, work: Path, check: Path | None) -> tuple[list[Record], int]:
    """Let all contenders train one shape; also how many threads they use.

    Args:
        check: folder for a small model on which losses are compared; None for no comparison.
    """
    shape, folder = SHAPES[name], work / name.replace(" ", "-")
    write_folder(shape, folder)
    processes: list[Process] = []
    try:
        with ThreadPoolExecutor(2) as pool:
            futures = [pool.submit(Process, one, folder) for one in size.contenders]
            failures = [future.exception() for future in futures]
            processes = [f.result() for f in futures if f.exception() is None]
        for failure in failures:
            if failure is not None:
                raise failure
        for workload in WORKLOADS:
            _in_turn(processes, workload, shape, size.steps[workload])
        if size.grouped:
            rivals = [p for p in processes if p.record.name.startswith(RIVAL)]
            _in_turn(rivals, "grouped", shape, size.steps["ragged"])
        if check is not None:
            _compare_losses(processes, check)
        return [process.record for process in processes], processes[0].threads
    finally:
        for process in processes:
            process.close()


def _compare_losses(processes: Sequence[Process], folder: Path) -> None:
    """Train a small model from the same start on the same ragged batches, over and over."""
    write_folder(CHECK_SHAPE, folder)
    steps = tuple(step % DISTINCT for step in range(CHECK_STEPS + 1))
    for process in processes:
        own = process.record.name
        for contender in (own, SHARED) if own == OURS else (own,):
            work = Work("ragged", CHECK_SHAPE.vocabulary, DISTINCT, steps, str(folder), contender)
            process.work(work, CHECK if contender == own else SHARED)


def _in_turn(processes: Sequence[Process], workload: str, shape: Shape, steps: int) -> None:
    count = min(DISTINCT, steps) if workload.isdigit() else steps
    for step in range(steps):
        # Who steps first changes, so that nobody always follows the same one.
        first = step % len(processes)
        for process in [*processes[first:], *processes[:first]]:
            process.work(Work(workload, shape.vocabulary, count, (step % count,)))


# ---------------------------------------------------------------- figures


def speed_ratio(record: Record, baseline: Record, workload: str) -> float:
    """Median over the timed steps of the baseline's time over the contender's."""
    pairs = zip(record.seconds[workload][1:], baseline.seconds[workload][1:], strict=True)
    return median(theirs / ours for ours, theirs in pairs)


def checked_losses(records: Sequence[Record]) -> dict[str, list[float]]:
    """Losses of the comparison by contender, the baseline's first."""
    found = {record.name: record.losses[CHECK] for record in records}
    shared = next(record.losses[SHARED] for record in records if record.name == OURS)
    return {**found, SHARED: shared}


def loss_gap(losses: Sequence[float], baseline: Sequence[float]) -> float:
    """Largest difference of the losses of the same step."""
    return max(abs(ours - theirs) for ours, theirs in zip(losses, baseline, strict=True))


def loss_rows(losses: Mapping[str, Sequence[float]]) -> list[dict[str, object]]:
    """The table of losses."""
    return [
        {
            "contender": name,
            "loss of the first step": f"{found[0]:.4f}",
            f"after {CHECK_STEPS} steps": f"{found[-1]:.4f}",
            "largest gap to the first row": f"{loss_gap(found, losses[RIVAL]):.1e}",
        }
        for name, found in losses.items()
    ]


def rows_of(records: Sequence[Record]) -> list[dict[str, object]]:
    """The table of one shape."""
    baseline = records[0]
    rows = []
    for record in records:
        row: dict[str, object] = {"contender": record.name}
        for workload in WORKLOADS:
            ratio = speed_ratio(record, baseline, workload)
            row[f"{workload}: tokens/s"] = f"{record.rate(workload):.0f} ({ratio:.2f}x)"
        row["memory, 512"] = _mb(record.peak_bytes["512"])
        row["memory, ragged"] = _mb(record.peak_bytes["ragged"])
        rows.append(row)
        if "grouped" in record.losses:
            ratio = record.rate("grouped") / baseline.rate("ragged")
            rate = f"{record.rate('grouped'):.0f} ({ratio:.2f}x)"
            rows.append(
                {**dict.fromkeys(row, ""), "contender": f"{record.name}, grouped by length"}
                | {"ragged: tokens/s": rate}
            )
    return rows


def figures(records: Sequence[Record]) -> dict[str, float]:
    """The key figures of one shape: fedtune's nf4 against bitsandbytes'."""
    by_name = {record.name: record for record in records}
    ours, rival = by_name[OURS], by_name[RIVAL]
    return {
        "speedup_ragged": round(speed_ratio(ours, rival, "ragged"), 3),
        "speedup_small": round(speed_ratio(ours, rival, "64"), 3),
        "speedup_dense": round(speed_ratio(ours, rival, "512"), 3),
        "memory_ratio": round(ours.peak_bytes["ragged"] / rival.peak_bytes["ragged"], 3),
    }


def _mb(count: int) -> str:
    return f"{count / 1e6:.0f} MB"


# ---------------------------------------------------------------- around the step


STARTS = {
    "fedtune device": "import fedtune_client.app, fedtune.train.round",
    "torch, transformers, PEFT and bitsandbytes": (
        "import torch, peft, bitsandbytes; from transformers import LlamaForCausalLM"
    ),
}
_SAY_HELD = "; from contenders.worker import held_bytes; print(held_bytes('VmRSS'))"


def start_row(name: str) -> dict[str, object]:
    """Seconds and bytes of a process before it has a model; the fastest of three starts."""
    import time

    seconds, held = [], 0
    for _ in range(3):
        started = time.perf_counter()
        command = [sys.executable, "-c", STARTS[name] + _SAY_HELD]
        ran = subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=True)
        seconds.append(time.perf_counter() - started)
        held = int(ran.stdout.split()[-1])
    return {"process": name, "start": f"{min(seconds):.1f} s", "memory": _mb(held)}


def trainer_line(work: Path) -> str:
    """What Hugging Face's Trainer takes for the same steps."""
    shape = SHAPES["15M"]
    command = ["-m", "contenders.hf_trainer", str(work / "15M"), str(shape.vocabulary)]
    ran = subprocess.run(
        [sys.executable, *command], cwd=HERE, capture_output=True, text=True, check=True
    )
    found = json.loads(ran.stdout.strip().splitlines()[-1])
    return (
        "The loops are bare. Hugging Face's Trainer takes "
        f"{found['trainer_s'] / found['bare_s']:.2f} times as long at 15M and 64 tokens."
    )


_LOSSES = """A small model (hidden size 256, 2 layers) on four ragged batches, again and again. The
codes of `nf4` are bitsandbytes'; its block scales are rounded otherwise. `bnb-nf4` holds
bitsandbytes' own numbers, and so shows whether the step itself is the same."""


def preface(threads: int) -> str:
    text = (__doc__ or "").split("\n\n", 2)[2].split("\n\n`--quick`")[0]
    batches = make_batches("ragged", 32000, FULL["15M"].steps["ragged"])
    padding = sum(map(padding_factor, batches)) / len(batches)
    return (
        f"{text} {threads} threads.\n\n"
        f"Padding makes {padding:.2f} positions of a real token in a batch of {BATCH_SIZE}.\n\n"
        "Each cell: real tokens per second, and in brackets the median over the steps of the "
        "first row's time over this one's.\n"
    )


def main() -> int:
    arguments = parse_arguments(
        __doc__ or "", lambda parser: parser.add_argument("--smoke", action="store_true")
    )
    sizes = (SMOKE if arguments.smoke else QUICK) if arguments.quick else FULL
    body, found, threads, gap = [], {}, 0, 0.0
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        for shape, size in sizes.items():
            check = None if found else work / CHECK
            records, threads = measure(shape, size, work, check)
            found[shape] = figures(records)
            body.append(f"### {shape}\n\n{table(rows_of(records))}")
            if check is not None:
                losses = checked_losses(records)
                gap = loss_gap(losses[SHARED], losses[RIVAL])
                body.append(f"### The same loss\n\n{_LOSSES}\n\n{table(loss_rows(losses))}")
                print("\n" + body[-1])
            print("\n" + body[0 if check else -1], flush=True)
        if not arguments.quick:
            starts = table([start_row(name) for name in STARTS])
            body.append(f"### Before the model\n\n{starts}\n\n{trainer_line(work)}")
            print("\n" + body[-1], flush=True)
            publish(
                "One training step on a CPU",
                "python benchmarks/train_step.py",
                preface(threads) + "\n" + "\n\n".join(body),
            )
    if arguments.json:
        key_figures = {**found["15M"], "loss_gap": round(gap, 7)}
        if not arguments.quick:
            key_figures = {
                **key_figures,
                **{f"{s}: {k}": v for s in found for k, v in found[s].items()},
            }
        print_json(key_figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
