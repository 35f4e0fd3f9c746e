"""Time to a loss on a fleet whose devices are now and then much slower than planned.

    python benchmarks/straggler.py [--quick] [--json]

Eight equal devices, each with the rows of one of the largest restaurants of e2e_nlg, train rank 8
on every matrix of stories260k, four local steps of four samples in a round. In every round each
device takes its planned seconds times a factor of its own: lognormal with sigma 1 (one in 20 takes
more than 5 times the median), or Pareto with exponent 1 (one in 20 more than 10 times; no mean).

- all: a round waits for all devices.
- deadline: it closes at twice the planned seconds; what comes later counts in a later round.
- share: it closes when three quarters have reported; what comes later counts in a later round.
- share, refused: the same, but what comes later is refused.
- async: it closes after two updates of any round, and devices get new work at once (FedBuff).

Training is real, and the clock is virtual: seconds are those that the fleet would take. Modes whose
rounds join fewer updates get more rounds, so that all join about as many. Held out: every 48th line
of test.jsonl, loss per response token of the merged model; the target is the highest of the lowest
losses of a seed's runs, so each gets there, and the time is straight between two measurements.
Learning rate 1e-2, constant, for all. Late updates count with (1 + s)^-1/2, up to 20 rounds late.

`--quick` takes six devices, three rounds of all, one seed, and Pareto delays.
"""

from __future__ import annotations

import math
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from statistics import mean, median
from typing import Any

from fleet import losses_of
from reporting import has_public_data, parse_arguments, print_json, publish, table

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("OMP_NUM_THREADS", "1")

ALL = "all"
FOLD: Mapping[str, object] = {"late": "fold", "staleness_limit": 20}


@dataclass(frozen=True)
class Mode:
    """When a round closes.

    Attributes:
        rounds: section of the run file.
        more_rounds: rounds as a multiple of those of `all`.
        deadline: of a round, as a multiple of the planned seconds; infinite: none.
    """

    key: str
    text: str
    rounds: Mapping[str, object]
    more_rounds: float = 1.0
    deadline: float = math.inf


@dataclass(frozen=True)
class Size:
    """How large the experiment is."""

    devices: int
    rounds: int
    close_count: int
    test_stride: int
    seeds: tuple[int, ...]
    delays: tuple[str, ...]


FULL = Size(8, 8, 2, 48, (0, 1), ("lognormal", "pareto"))
QUICK = Size(6, 3, 2, 96, (0,), ("pareto",))


def modes(size: Size) -> tuple[Mode, ...]:
    share = {"close_fraction": 0.75}
    return (
        Mode(ALL, "all", FOLD),
        Mode("deadline", "deadline", FOLD, more_rounds=4 / 3, deadline=2.0),
        Mode("share", "share", {**FOLD, **share}, more_rounds=4 / 3),
        Mode("share_refused", "share, refused", {"late": "refuse", **share}, more_rounds=4 / 3),
        Mode(
            "async",
            "async",
            {**FOLD, "mode": "async", "close_count": size.close_count},
            more_rounds=size.devices / size.close_count,
        ),
    )


@dataclass(frozen=True)
class Played:
    """One run.

    Attributes:
        times: virtual seconds at which the losses were reached, from 0.
        losses: held-out loss of the base model, and after rounds.
        planned_s: seconds of a round by the plan.
        updates: that were joined; `late` of them in a later round.
        refused: updates that were not.
    """

    mode: str
    delay: str
    seed: int
    times: tuple[float, ...]
    losses: tuple[float, ...]
    planned_s: float
    updates: int
    late: int
    refused: int

    def seconds_to(self, loss: float) -> float:
        """Virtual seconds until the loss is first as low; inf: never."""
        for index in range(1, len(self.losses)):
            before, after = self.losses[index - 1 : index + 1]
            if after <= loss:
                part = 0.0 if before <= loss else (before - loss) / (before - after)
                start, end = self.times[index - 1 : index + 1]
                return start + part * (end - start)
        return math.inf


def run_tree(
    mode: Mode, delay: str, seed: int, size: Size, shared: Path, planned_s: float
) -> dict[str, Any]:
    """The run file of one run; without planned seconds there is no deadline."""
    data = shared / "data" / "e2e_nlg"
    deadline_s = mode.deadline * planned_s if planned_s else math.inf
    return {
        "run": {
            "name": mode.key,
            "seed": seed,
            "rounds": round(size.rounds * mode.more_rounds),
            "round_deadline_s": min(deadline_s, 1e6),
        },
        "model": {"path": str(shared / "models" / "stories260k")},
        "data": {
            "train": str(data / "train.jsonl"),
            "test": str(data / "test.jsonl"),
            "test_stride": size.test_stride,
            "held_out_fraction": 0.0,
            "max_tokens": 128,
            "partition": {"by": "field", "field": "client", "largest": size.devices},
        },
        "fleet": {"equal": {"count": size.devices, "memory": "1 GB", "format": "fp32", "rank": 8}},
        "lora": {"rank_max": 8, "rank_cap": 32},
        "importance": {"method": "uniform"},
        "plan": {"solver": "greedy"},
        "train": {
            "local_steps": 4,
            "batch_size": 4,
            "learning_rate": 1e-2,
            "evaluate_every": 0,
        },
        "rounds": dict(mode.rounds),
        "simulation": {"threads": 1, "delay": delay},
    }


def play(
    mode: Mode, delay: str, seed: int, size: Size, shared: Path, planned_s: float = 0.0
) -> Played:
    from fedtune.cli.simulate import simulate_config
    from fedtune.config import parse_run_config

    finished: list[Mapping[str, Any]] = []

    def watch(event: Any) -> None:  # an Event
        if event.kind == "round_finished":
            finished.append(event.fields)

    with tempfile.TemporaryDirectory() as folder:
        tree = run_tree(mode, delay, seed, size, shared, planned_s)
        rounds = tree["run"]["rounds"]
        outputs = {"folder": str(Path(folder) / "run"), "exports": [], "keep_checkpoints": rounds}
        config = parse_run_config({**tree, "outputs": outputs}, "straggler")
        run = simulate_config(config, watch=watch, overwrite=True)
        every = max(1, round(mode.more_rounds / 2))
        losses = losses_of(config, run, every)
    ends = list(accumulate(float(fields["virtual_seconds"]) for fields in finished))
    return Played(
        mode.key,
        delay,
        seed,
        times=(0.0, *ends[every - 1 :: every]),
        losses=losses,
        planned_s=max(float(fields["planned_seconds"]) for fields in finished),
        updates=sum(int(fields["reported"]) for fields in finished),
        late=sum(int(fields["folded"]) for fields in finished),
        refused=sum(int(fields["refused"]) for fields in finished),
    )


def play_all(size: Size, shared: Path) -> list[Played]:
    found = []
    for delay in size.delays:
        for seed in size.seeds:
            planned_s = 0.0
            for mode in modes(size):
                found.append(play(mode, delay, seed, size, shared, planned_s))
                planned_s = found[-1].planned_s
                print(line_of(found[-1]), flush=True)
    return found


def line_of(run: Played) -> str:
    losses = " ".join(f"{loss:.3f}" for loss in run.losses)
    return (
        f"{run.delay} seed {run.seed} {run.mode}: {run.times[-1]:.1f} virtual s, {run.updates} "
        f"updates, {run.late} late, {run.refused} refused; {losses}"
    )


# ---------------------------------------------------------------- the table


def times_to(found: Sequence[Played], mode: str, delay: str) -> list[float]:
    """Virtual seconds to the loss that all modes get to; one per seed."""
    seconds = []
    for run in (run for run in found if (run.mode, run.delay) == (mode, delay)):
        rivals = [r for r in found if (r.delay, r.seed) == (run.delay, run.seed)]
        seconds.append(run.seconds_to(max(min(rival.losses) for rival in rivals)))
    return seconds


def sooner(found: Sequence[Played], mode: str, delay: str) -> list[float]:
    """How many times sooner than rounds that wait for all; one per seed."""
    pairs = zip(times_to(found, ALL, delay), times_to(found, mode, delay), strict=True)
    return [waiting / own for waiting, own in pairs]


def rows_of(found: Sequence[Played], size: Size) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for delay in size.delays:
        for mode in modes(size):
            runs = [run for run in found if (run.mode, run.delay) == (mode.key, delay)]
            factors = sooner(found, mode.key, delay)
            rows.append(
                {
                    "delays": delay,
                    "a round waits for": mode.text,
                    "s to the loss, by seed": ", ".join(
                        f"{each:.1f}" for each in times_to(found, mode.key, delay)
                    ),
                    "sooner than all by": ", ".join(f"{each:.1f}" for each in factors),
                    "lowest loss": f"{mean(min(run.losses) for run in runs):.3f}",
                    "updates": f"{mean(run.updates for run in runs):.0f}",
                    "of them late": f"{mean(run.late for run in runs):.0f}",
                    "refused": f"{mean(run.refused for run in runs):.0f}",
                    "whole run, s": f"{mean(run.times[-1] for run in runs):.1f}",
                }
            )
    return rows


def figures(found: Sequence[Played], size: Size) -> dict[str, object]:
    """Median over the seeds; seconds are virtual."""
    return {
        f"{delay}: seconds_to_loss_{mode.key}": round(median(times_to(found, mode.key, delay)), 4)
        for delay in size.delays
        for mode in modes(size)
    }


def main() -> int:
    arguments = parse_arguments(__doc__ or "")
    if not has_public_data(arguments.shared):
        return 2
    size = QUICK if arguments.quick else FULL
    found = play_all(size, arguments.shared)
    body = table(rows_of(found, size))
    print("\n" + body)
    if not arguments.quick:
        preface = (__doc__ or "").split("\n\n", 2)[2].split("\n\n`--quick`")[0]
        publish("Slow devices", "python benchmarks/straggler.py", f"{preface}\n\n{body}")
    if arguments.json:
        print_json(figures(found, size))
    return 0


if __name__ == "__main__":
    sys.exit(main())
