"""Held-out loss by defence, attack and share of hostile devices.

    python benchmarks/robust.py [--quick] [--smoke] [--json] [--workers N]

Data: responses of e2e_nlg, cut to 48 tokens, the 10 largest restaurants as sites; held out: every
24th line of test.jsonl, loss per token, measured on the merged model. Model: stories260k. Ranks 4
and 8 on five devices each, so that updates differ in length; 6 rounds of 4 local steps of 4
samples, all devices in every round, server cap 16, weights uniform, no frozen tail. Real training
through the same simulation as `fedtune simulate`; hostile devices change what they send
(`benchmarks/hostile/attacks.py`), in every round. The first device, by name, is never hostile, and
is the root site of `root-cosine`. `multi-krum` assumes 30 %, in every row. One seed.

`--quick` takes 3 rounds of 3 steps, three attacks by 20 % and a coarser test set.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from reporting import has_public_data, parse_arguments, print_json, publish, table

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("OMP_NUM_THREADS", "1")

DEFENCES = ("none", "clip", "multi-krum", "geometric-median", "root-cosine")
DEVICES = 10
TEXTS: dict[str, Any] = {
    "format": "text",
    "text_field": "response",
    "max_tokens": 48,
    "held_out_fraction": 0.0,
}
CLAIM = 0.05
"""A defence that stops an attack loses at most this share of the loss without attackers."""


@dataclass(frozen=True)
class Size:
    """How large the experiment is."""

    rounds: int
    local_steps: int
    test_stride: int
    seeds: tuple[int, ...]
    percents: tuple[int, ...]
    attacks: tuple[str, ...]
    defences: tuple[str, ...] = DEFENCES


FULL = Size(
    6, 4, 24, (0,), (10, 20, 30),
    ("sign-flip", "scaled", "noise", "colluding", "poisoned"),
)  # fmt: skip
QUICK = Size(3, 3, 96, (0,), (20,), ("sign-flip", "scaled", "colluding"))
SMOKE = Size(1, 1, 960, (0,), (20,), ("sign-flip",), ("none", "multi-krum"))


@dataclass(frozen=True)
class Cell:
    """One run: `percent` 0 has no attacker."""

    defence: str
    attack: str
    percent: int
    seed: int

    @property
    def key(self) -> str:
        return f"{self.defence}: {self.attack} {self.percent}%" if self.percent else self.defence


def cells(size: Size) -> list[Cell]:
    """Every run of the experiment, and one in which nan is sent to no defence at all."""
    clean = [Cell(defence, "", 0, seed) for defence in size.defences for seed in size.seeds]
    attacked = [
        Cell(defence, attack, percent, seed)
        for attack in size.attacks
        for percent in size.percents
        for defence in size.defences
        for seed in size.seeds
    ]
    checked = [Cell("none", attack, max(size.percents), size.seeds[0]) for attack in ("nan", "inf")]
    return clean + attacked + checked


def run_cell(cell: Cell, size: Size, shared: str) -> tuple[str, float, float]:
    """Key, held-out loss per response token, seconds."""
    import numpy as np
    from hostile.attacks import ON_DATA
    from hostile.fleet import Hostile, TamperedApp, TamperedPass

    from fedtune.cli.simulate import cache_folder
    from fedtune.config import parse_run_config
    from fedtune.data.sites import open_sites
    from fedtune.model.shapes import read_shapes
    from fedtune_client.app import make_simulated_client_app
    from fedtune_client.together import make_side_by_side
    from fedtune_server.simulation import simulate

    started = time.perf_counter()
    model = Path(shared) / "models" / "stories260k"
    data = Path(shared) / "data" / "e2e_nlg"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tree = run_tree(cell, size, model, data / "train.jsonl", folder / "run")
        data_section = parse_run_config(tree, "robust").data
        names = open_sites(data_section, devices=DEVICES, seed=cell.seed).names
        drawn = 1 + np.random.default_rng(cell.seed).permutation(DEVICES - 1)
        bad = [int(place) for place in drawn[: DEVICES * cell.percent // 100]]
        tree["defence"]["root_site"] = names[0]
        if cell.attack == ON_DATA:
            poisoned = folder / "train.jsonl"
            poison(data / "train.jsonl", poisoned, {names[place] for place in bad})
            tree["data"]["train"] = str(poisoned)
        config = parse_run_config(tree, "robust")
        shapes = read_shapes(model, config.lora.targets, cache_folder() / "digests")
        hostile = Hostile(cell.attack, bad, shapes.by_name())
        run = simulate(
            config,
            TamperedApp(make_simulated_client_app(config), hostile),  # type: ignore[arg-type]
            shapes,
            DEVICES,
            watch=lambda event: None,
            finish=lambda path, emit: None,
            together=TamperedPass(make_side_by_side(config), hostile),
        )
        loss = merged_loss(run, model, data / "test.jsonl", size.test_stride)
    return cell.key, loss, time.perf_counter() - started


def run_tree(cell: Cell, size: Size, model: Path, train: Path, folder: Path) -> dict[str, dict]:
    """The run file, as a tree."""
    return {
        "run": {"name": "robust", "seed": cell.seed, "rounds": size.rounds},
        "model": {"path": str(model)},
        "data": {
            **TEXTS,
            "train": str(train),
            "partition": {"by": "field", "field": "client", "largest": DEVICES},
        },
        "fleet": {f"rank-{rank}": device_class(DEVICES // 2, rank) for rank in (4, 8)},
        "lora": {"rank_max": 8, "rank_cap": 16, "tail_rank": 0},
        "train": {
            "local_steps": size.local_steps,
            "batch_size": 4,
            "learning_rate": 2e-2,
            "evaluate_every": 0,
        },
        "importance": {"method": "uniform"},
        "aggregate": {"weights": "uniform"},
        "defence": {"method": cell.defence, "assumed_share": 0.3, "root_site": "-"},
        "simulation": {"threads": 1},
        "outputs": {"folder": str(folder), "exports": []},
    }


def device_class(count: int, rank: int) -> dict[str, object]:
    return {
        "count": count,
        "memory": "1 GB",
        "formats": ["fp32"],
        "format": "fp32",
        "rank": rank,
        "micro_batch": 4,
    }


def poison(source: Path, target: Path, clients: set[str]) -> None:
    """Reverse the words of every response of some clients."""
    from hostile.attacks import reversed_words

    rows = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    for row in rows:
        if row["client"] in clients:
            row["response"] = reversed_words(row["response"])
    target.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def merged_loss(run: Path, model: Path, test: Path, stride: int) -> float:
    """Held-out loss of the merged model; infinite where it has no number."""
    from fedtune.data.samples import SampleBuilder, build_samples
    from fedtune.data.sites import read_test_rows
    from fedtune.evaluate.perplexity import held_out_loss
    from fedtune.export.merge import merged_model
    from fedtune.model.tokenizer import load_tokenizer
    from fedtune.settings import DataSection
    from fedtune.wire.checkpoint import latest_checkpoint, read_checkpoint

    path = latest_checkpoint(run / "checkpoints")
    assert path is not None
    merged = merged_model(model, read_checkpoint(path).adapter, "causal-lm", ())
    data = DataSection(train="-", test=str(test), test_stride=stride, **TEXTS)
    builder = SampleBuilder(load_tokenizer(model), data)
    loss = held_out_loss(merged, build_samples(read_test_rows(data), builder).samples).loss
    return loss if math.isfinite(loss) else math.inf


def loss_rows(losses: Mapping[str, float], size: Size) -> list[dict[str, str]]:
    """The table: one line per attack and share, one column per defence."""
    reference = losses["none"]

    def shown(key: str) -> str:
        loss = losses[key]
        text = f"{loss:.3f}" if loss < 100 else "diverged"
        return f"**{text}**" if loss <= (1 + CLAIM) * reference else text

    lines = [("none", "0 %", {defence: shown(defence) for defence in size.defences})]
    for attack in size.attacks:
        for percent in size.percents:
            found = {d: shown(Cell(d, attack, percent, 0).key) for d in size.defences}
            lines.append((attack, f"{percent} %", found))
    return [{"attack": attack, "hostile": share, **found} for attack, share, found in lines]


def play(size: Size, shared: Path, workers: int) -> dict[str, float]:
    """Mean loss by key, over the seeds."""
    found: dict[str, list[float]] = {}
    with ProcessPoolExecutor(max_workers=workers) as pool:
        futures = [pool.submit(run_cell, cell, size, str(shared)) for cell in cells(size)]
        for future in futures:
            key, loss, seconds = future.result()
            found.setdefault(key, []).append(loss)
            print(f"{key:40s} {loss:9.4f}  ({seconds:.1f} s)", flush=True)
    return {key: mean(values) for key, values in found.items()}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--smoke", action="store_true", help="see that it runs, in seconds")
    parser.add_argument("--workers", type=int, default=2, help="runs at the same time")


def main() -> int:
    arguments = parse_arguments(__doc__ or "", add_options)
    if not has_public_data(arguments.shared):
        return 2
    size = SMOKE if arguments.smoke else QUICK if arguments.quick else FULL
    losses = play(size, arguments.shared, arguments.workers)
    rows = loss_rows(losses, size)
    print("\n" + table(rows))
    if size is FULL:
        publish(
            "Defences against hostile devices",
            "python benchmarks/robust.py",
            _PREFACE + table(rows) + reading(losses),
        )
    if arguments.json:
        print_json({key: round(min(loss, 1e6), 5) for key, loss in losses.items()})
    return 0


def reading(losses: Mapping[str, float]) -> str:
    refused = [losses[key] for key in losses if ": nan" in key or ": inf" in key]
    return _READING.format(refused=max(refused))


_READING = """

Bold: at most 5 % above `none` without attackers. Updates with nan or inf never reach a defence:
the checks refuse them, and a run with 30 % of them ends at {refused:.3f}, by the other devices.
"""
_PREFACE = (__doc__ or "").split("\n\n", 2)[2].split("\n\n`--quick`")[0] + "\n\n"


if __name__ == "__main__":
    sys.exit(main())
