"""Time to the same held-out loss on a fleet whose classes are ten times apart.

    python benchmarks/fleet.py [--quick] [--json]

Three classes of two devices; each class is ten times as fast as the one before, has ten times the
memory, the memory bandwidth and the link. The weakest has just the memory in which rank 4 on every
matrix can be trained (on an int8 backbone, one sample at a time, activations recomputed). Model:
stories260k; data: e2e_nlg, one of the largest restaurants per device, dealt to the classes by the
seed; held out: every 24th line of test.jsonl, loss per response token of the merged model after
every round.

- FedIT: rank 4 everywhere, A and B averaged apart, equal local steps; and with one local step, so
  that rounds are as short as its weakest device allows.
- HetLoRA-like: ranks 4, 8 and 16 by hand, padded with zeros (without pruning and sparsity
  weights), equal local steps.
- fedtune: the rule `delta` and the planner's own choice of ranks, depth, steps, and the rest.

Training is real. The clock is not: a round takes as long as the slowest device's plan says
(arithmetic, weight traffic, both transfers), whoever made the plan. A rival's target is the lowest
loss that it gets to, and its time is when it first gets there; a speedup is that time over the time
at which fedtune's loss first is as low, interpolated between rounds. Nobody takes more than 10
local steps; batches of 4 samples, AdamW, no clipping, a constant learning rate: of three values the
one whose loss is the lowest on seed 0.

`--quick` takes four rounds, one seed, one learning rate, and not the line of one local step.
"""

from __future__ import annotations

import math
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

from reporting import has_public_data, parse_arguments, print_json, publish, table

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("OMP_NUM_THREADS", "1")

CARRIED_RANK = 4
"""What the weakest class can carry."""
RANKS = {"weak": CARRIED_RANK, "middle": 8, "strong": 16}
"""By hand, for the method that is like HetLoRA."""
APART = {"weak": 1, "middle": 10, "strong": 100}
"""How many times the weakest class's speed and memory."""
FORMATS = ("fp32", "bf16", "int8")
LOCAL_STEPS = 10


@dataclass(frozen=True)
class Size:
    """How large the experiment is."""

    devices_each: int
    rounds: int
    test_stride: int
    seeds: tuple[int, ...]


FULL = Size(2, 10, 24, (0, 1, 2))
QUICK = Size(2, 4, 48, (0,))
QUICK_RATE = 1e-2
"""Of every method under `--quick`."""


@dataclass(frozen=True)
class Method:
    """One line of the table.

    Attributes:
        run: sections of the run file that make the method.
        ranks: class -> pinned rank; empty: planned.
        local_steps: most that a device takes in a round.
        more_rounds: rounds as a multiple of the experiment's; short rounds may be more.
        every: rounds between held-out losses.
    """

    key: str
    text: str
    run: Mapping[str, Mapping[str, object]]
    ranks: Mapping[str, int]
    local_steps: int = LOCAL_STEPS
    more_rounds: float = 1.0
    every: int = 1


def padded(rank_cap: int) -> dict[str, dict[str, object]]:
    """Sections of a run file that average A and B apart, over devices of equal local steps."""
    return {
        "aggregate": {"rule": "zero-pad"},
        "lora": {"rank_max": rank_cap, "rank_cap": rank_cap},
        "plan": {"steps": "equal", "makespan_weight": 0.0},
    }


FEDTUNE = "fedtune"
ONE_STEP = "fedit_one_step"
_EQUAL = dict.fromkeys(APART, CARRIED_RANK)
METHODS = (
    Method("fedit", f"FedIT, rank {CARRIED_RANK}", padded(CARRIED_RANK), _EQUAL),
    Method(
        ONE_STEP,
        f"FedIT, rank {CARRIED_RANK}, one local step",
        padded(CARRIED_RANK),
        _EQUAL,
        local_steps=1,
        more_rounds=8,
        every=8,
    ),
    Method(
        "hetlora",
        "HetLoRA-like, ranks " + ", ".join(map(str, RANKS.values())),
        padded(max(RANKS.values())),
        RANKS,
    ),
    Method(
        FEDTUNE,
        "fedtune's plan",
        {"lora": {"rank_max": max(RANKS.values()), "rank_cap": 32}},
        {},
        more_rounds=1.5,
    ),
)
RATES = (1e-3, 3e-3, 1e-2)


@dataclass(frozen=True)
class Played:
    """One run.

    Attributes:
        round_seconds: virtual seconds of a round.
        losses: held-out loss of the base model, and after every `every` rounds.
        steps: class -> local steps of its devices.
        took_s: real seconds.
    """

    key: str
    rate: float
    seed: int
    round_seconds: float
    losses: tuple[float, ...]
    steps: Mapping[str, int]
    took_s: float
    every: int = 1

    def seconds_to(self, loss: float) -> float:
        """Virtual seconds until the loss is first as low, straight between rounds; inf: never."""
        for index, (before, after) in enumerate(zip(self.losses, self.losses[1:], strict=False)):
            if after <= loss:
                part = 0.0 if before <= loss else (before - loss) / (before - after)
                return self.round_seconds * self.every * (index + part)
        return math.inf


def speedup(rival: Played, ours: Played) -> float:
    """How much sooner ours is where the rival ends at best; 0 if it never is."""
    target = min(rival.losses)
    return rival.seconds_to(target) / ours.seconds_to(target)


# ---------------------------------------------------------------- the fleet


def fleet(size: Size, weak_bytes: int, ranks: Mapping[str, int]) -> dict[str, dict[str, object]]:
    """The fleet section of a run file."""
    return {
        name: {
            "count": size.devices_each,
            "memory": times * weak_bytes,
            "flops_per_s": times * 1e9,
            "memory_bandwidth": times * 10**9,
            "link": times * 10**6,
            "formats": list(FORMATS),
            **({"rank": ranks[name]} if ranks else {}),
        }
        for name, times in APART.items()
    }


def run_tree(
    method: Method, rate: float, seed: int, size: Size, shared: Path, weak_bytes: int
) -> dict[str, Any]:
    data = shared / "data" / "e2e_nlg"
    rounds = round(size.rounds * method.more_rounds)
    partition = {"by": "field", "field": "client", "largest": len(APART) * size.devices_each}
    return {
        "run": {"name": method.key, "seed": seed, "rounds": rounds},
        "model": {"path": str(shared / "models" / "stories260k")},
        "data": {
            "train": str(data / "train.jsonl"),
            "test": str(data / "test.jsonl"),
            "test_stride": size.test_stride,
            "held_out_fraction": 0.0,
            "max_tokens": 128,
            "partition": partition,
        },
        "fleet": fleet(size, weak_bytes, method.ranks),
        "train": {
            "local_steps": method.local_steps,
            "batch_size": 4,
            "learning_rate": rate,
            "max_gradient_norm": 0.0,
            "evaluate_every": 0,
        },
        "simulation": {"threads": 1},
        **method.run,
    }


def smallest_memory(shared: Path, size: Size) -> int:
    """Fewest bytes in which the planner can place FedIT's rank on a device, to a per cent."""
    from fedtune.config import parse_run_config
    from fedtune.devices.simulated import simulated_profiles
    from fedtune.errors import PlanError
    from fedtune.model.shapes import read_shapes
    from fedtune.plan.from_config import plan_pins, plan_settings
    from fedtune.plan.solve import plan_fleet

    shapes = read_shapes(shared / "models" / "stories260k", ("all-linear",))

    def fits(weak_bytes: int) -> bool:
        config = parse_run_config(run_tree(METHODS[0], 1e-2, 0, size, shared, weak_bytes), "fleet")
        sites = [f"site-{number}" for number in range(config.devices)]
        profiles = list(simulated_profiles(config.fleet, sites, 0).values())
        try:
            plan_fleet(profiles, shapes, plan_settings(config, 0, "none"), pins=plan_pins(config))
        except PlanError:
            return False
        return True

    low, high = 1, 1 << 20
    while not fits(high):
        low, high = high, 2 * high
    while high - low > high // 100:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high


# ---------------------------------------------------------------- one run


def play(
    method: Method, rate: float, seed: int, size: Size, shared: Path, weak_bytes: int
) -> Played:
    from fedtune.cli.simulate import simulate_config
    from fedtune.config import parse_run_config

    started = time.perf_counter()
    planned: list[Mapping[str, Any]] = []

    def watch(event: Any) -> None:  # an Event
        if event.kind == "planned":
            planned.extend(event.fields["devices"])

    with tempfile.TemporaryDirectory() as folder:
        tree = run_tree(method, rate, seed, size, shared, weak_bytes)
        rounds = tree["run"]["rounds"]
        outputs = {"folder": str(Path(folder) / "run"), "exports": [], "keep_checkpoints": rounds}
        config = parse_run_config({**tree, "outputs": outputs}, "fleet")
        run = simulate_config(config, watch=watch, overwrite=True)
        losses = losses_of(config, run, method.every)
    return Played(
        method.key,
        rate,
        seed,
        round_seconds=max(row["seconds"] for row in planned),
        losses=losses,
        steps={row["device_class"]: row["local_steps"] for row in planned},
        took_s=time.perf_counter() - started,
        every=method.every,
    )


def losses_of(config: Any, run: Path, every: int) -> tuple[float, ...]:  # a RunConfig
    """Held-out loss of the base, and merged with every checkpoint that is to be measured."""
    from fedtune.data.samples import SampleBuilder, build_samples
    from fedtune.data.sites import read_test_rows
    from fedtune.evaluate.perplexity import held_out_loss
    from fedtune.export.merge import merged_model
    from fedtune.model.load import load_base
    from fedtune.model.tokenizer import load_tokenizer
    from fedtune.wire.checkpoint import read_checkpoint

    base = Path(config.model.path)
    builder = SampleBuilder(load_tokenizer(base), config.data)
    samples = build_samples(read_test_rows(config.data), builder).samples
    losses = [held_out_loss(load_base(base, "causal-lm"), samples).loss]
    checkpoints = sorted((run / "checkpoints").glob("round-*.safetensors"))
    for path in checkpoints[every - 1 :: every]:
        model = merged_model(base, read_checkpoint(path).adapter, "causal-lm", ())
        losses.append(held_out_loss(model, samples).loss)
    return tuple(losses)


# ---------------------------------------------------------------- all runs


def best_rate(runs: Sequence[Played]) -> float:
    """The learning rate of the lowest loss."""
    return min(runs, key=lambda run: min(run.losses)).rate


def play_all(size: Size, shared: Path, quick: bool) -> dict[str, list[Played]]:
    """Method -> its run on every seed, at its best learning rate."""
    weak_bytes = smallest_memory(shared, size)
    found: dict[str, list[Played]] = {}
    with ProcessPoolExecutor(max_workers=2) as pool:

        def play_jobs(jobs: Sequence[tuple[Method, float, int]]) -> list[Played]:
            futures = [pool.submit(play, *job, size, shared, weak_bytes) for job in jobs]
            runs = []
            for future in futures:
                run = future.result()
                print(line_of(run), flush=True)
                runs.append(run)
            return runs

        first = size.seeds[0]
        methods = [m for m in METHODS if not quick or m.key != ONE_STEP]
        rates = (QUICK_RATE,) if quick else RATES
        tried = play_jobs([(m, rate, first) for m in methods for rate in rates])
        for method in methods:
            runs = [run for run in tried if run.key == method.key]
            rate = best_rate(runs)
            found[method.key] = [run for run in runs if run.rate == rate]
        chosen = {key: runs[0].rate for key, runs in found.items()}
        for run in play_jobs([(m, chosen[m.key], s) for s in size.seeds[1:] for m in methods]):
            found[run.key].append(run)
    return found


def line_of(run: Played) -> str:
    losses = " ".join(f"{loss:.3f}" for loss in run.losses)
    return (
        f"{run.key:8s} rate {run.rate:g} seed {run.seed}: {run.round_seconds:.2f} virtual s a "
        f"round; {losses}  ({run.took_s:.0f} s)"
    )


def speedups(found: Mapping[str, Sequence[Played]], rival: str) -> list[float]:
    """One per seed."""
    pairs = zip(found[rival], found[FEDTUNE], strict=True)
    return [speedup(theirs, ours) for theirs, ours in pairs]


def rows_of(found: Mapping[str, Sequence[Played]]) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for method in METHODS:
        if method.key not in found:
            continue
        runs = found[method.key]
        target = [min(run.losses) for run in found["fedit"]]
        reached = [run.seconds_to(loss) for run, loss in zip(runs, target, strict=True)]
        factors = [] if method.key == FEDTUNE else speedups(found, method.key)
        rows.append(
            {
                "method": method.text,
                "learning rate": f"{runs[0].rate:g}",
                "local steps": ", ".join(str(runs[0].steps[name]) for name in APART),
                "virtual s a round": f"{mean(run.round_seconds for run in runs):.2f}",
                "s to FedIT's loss, by seed": ", ".join(_seconds_text(each) for each in reached),
                "lowest loss": f"{mean(min(run.losses) for run in runs):.3f}",
                "fedtune is sooner by": ", ".join(f"{each:.1f}" for each in factors) or "-",
            }
        )
    return rows


def plainly(found: Mapping[str, Sequence[Played]]) -> str:
    """The outcome against FedIT in words, the seeds on which it failed first."""
    factors = speedups(found, "fedit")
    lost = sum(factor == 0 for factor in factors)
    failed = (
        f"On {lost} of {len(factors)} seeds fedtune's plan never reached FedIT's lowest loss: slow "
        "sites take few of the steps, and where their data differ most the joined model settles "
        "above it. "
        if lost
        else ""
    )
    return f"{failed}The median over the seeds is {median(factors):.1f} times sooner."


def _seconds_text(seconds: float) -> str:
    return f"{seconds:.1f}" if math.isfinite(seconds) else "not reached"


def figures(found: Mapping[str, Sequence[Played]]) -> dict[str, object]:
    return {
        f"speedup_vs_{rival}": round(median(speedups(found, rival)), 2)
        for rival in ("fedit", "hetlora")
    }


def main() -> int:
    arguments = parse_arguments(__doc__ or "")
    if not has_public_data(arguments.shared):
        return 2
    size = QUICK if arguments.quick else FULL
    found = play_all(size, arguments.shared, arguments.quick)
    body = f"{table(rows_of(found))}\n\n{plainly(found)}"
    print("\n" + body)
    if not arguments.quick:
        preface = (__doc__ or "").split("\n\n", 2)[2].split("\n\n`--quick`")[0]
        publish("Unequal fleets", "python benchmarks/fleet.py", f"{preface}\n\n{body}")
    if arguments.json:
        print_json(figures(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
