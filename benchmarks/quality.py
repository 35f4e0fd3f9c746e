"""Held-out loss of every aggregation rule beside base, centralised and local-only training.

    python benchmarks/quality.py [--quick] [--json]

Data: e2e_nlg, the 12 largest restaurants as sites; held out: every 24th line of test.jsonl, loss
per response token, measured on the merged model. Model: stories260k. Ranks 2, 4, 8, 16 on 6, 3, 2
and 1 devices, shuffled by the seed; 10 rounds of 5 local steps of 16 samples, all devices in every
round, server cap 32. Centralised training takes the same 50 steps in a row on all sites' rows at
rank 16; it sees a twelfth of the samples, and takes as many steps in a row. Weights are the
sites' numbers of samples; AdamW starts anew in every round; no clipping. Everything runs through
the same simulation as `fedtune simulate`. Learning rates were chosen on seed 0.

`--quick` takes 4 devices, 3 rounds, 3 local steps, one seed and a coarser test set.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

from reporting import has_public_data, parse_arguments, print_json, publish, table

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("OMP_NUM_THREADS", "1")


@dataclass(frozen=True)
class Size:
    """How large the experiment is."""

    counts: tuple[int, int, int, int]
    rounds: int
    local_steps: int
    test_stride: int
    seeds: tuple[int, ...]

    @property
    def devices(self) -> int:
        return sum(self.counts)

    @property
    def steps(self) -> int:
        return self.rounds * self.local_steps


FULL = Size((6, 3, 2, 1), 10, 5, 24, (0, 1, 2))
QUICK = Size((1, 1, 1, 1), 3, 3, 96, (0,))
RANKS = (2, 4, 8, 16)
REFERENCE_RATE = 5e-3


@dataclass(frozen=True)
class Variant:
    """One line of the table.

    Attributes:
        kind: `base`, `central`, `local` or an aggregation rule.
        tail: whether devices compute with the whole joined adapter (the default of `delta`).
    """

    key: str
    text: str
    kind: str
    rate: float = REFERENCE_RATE
    tail: bool = False
    schedule: str = "constant"


VARIANTS = (
    Variant("base", "base model", "base"),
    Variant("central", "centralised, rank 16", "central"),
    Variant(
        "central_tuned", "centralised, rank 16, cosine to a tenth", "central", 1e-2, False, "cosine"
    ),
    Variant("delta", "delta, as by default", "delta", 1e-2, True),
    Variant("delta_tail", "delta, as by default", "delta", tail=True),
    Variant("delta_plain", "delta without the frozen tail", "delta"),
    Variant("flora", "flora", "flora", tail=True),
    Variant("flexlora", "flexlora", "flexlora"),
    Variant("zero_pad", "zero-pad", "zero-pad"),
    Variant("local_only", "local only, mean over devices", "local"),
)
QUICK_KEYS = ("base", "central", "local_only", "zero_pad", "flexlora", "flora", "delta")


def run_variant(
    variant: Variant, seed: int, size: Size, shared: str
) -> tuple[str, int, float, float]:
    """Key, seed, held-out loss per response token, seconds."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        bench = Bench(Path(shared), Path(name), seed, size)
        loss = {
            "base": bench.base,
            "central": lambda: bench.central(variant),
            "local": lambda: bench.local_only(variant),
        }.get(variant.kind, lambda: bench.federated(variant))()
    return variant.key, seed, loss, time.perf_counter() - started


class Bench:
    """One seed's data on disk, and the ways to train on it."""

    def __init__(self, shared: Path, folder: Path, seed: int, size: Size) -> None:
        self._model = shared / "models" / "stories260k"
        self._data = shared / "data" / "e2e_nlg"
        self._folder, self._seed, self._size = folder, seed, size

    def base(self) -> float:
        from fedtune.model.load import load_base

        return self._measure(load_base(self._model, "causal-lm"))

    def central(self, variant: Variant) -> float:
        rows = [row for site in self._largest_sites() for row in site]
        return self._train_alone(rows, 16, variant, "central")

    def local_only(self, variant: Variant) -> float:
        return mean(
            self._train_alone(rows, rank, variant, f"local-{index}")
            for index, (rows, rank) in enumerate(
                zip(self._largest_sites(), self._ranks(), strict=True)
            )
        )

    def federated(self, variant: Variant) -> float:
        data = {
            "train": str(self._data / "train.jsonl"),
            "partition": {"by": "field", "field": "client", "largest": self._size.devices},
        }
        fleet = {
            f"rank-{rank}": _device_class(count, rank)
            for rank, count in zip(RANKS, self._size.counts, strict=True)
        }
        return self._simulate(variant, data, fleet, self._size.rounds, self._size.local_steps)

    def _largest_sites(self) -> list[list[dict[str, object]]]:
        lines = (self._data / "train.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        names = [n for n, _ in Counter(r["client"] for r in rows).most_common(self._size.devices)]
        return [[row for row in rows if row["client"] == name] for name in names]

    def _ranks(self) -> list[int]:
        import numpy as np

        ranks = [r for r, c in zip(RANKS, self._size.counts, strict=True) for _ in range(c)]
        return [ranks[i] for i in np.random.default_rng(self._seed).permutation(len(ranks))]

    def _train_alone(
        self, rows: Sequence[dict[str, object]], rank: int, variant: Variant, name: str
    ) -> float:
        path = self._folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        fleet = {"alone": _device_class(1, rank)}
        return self._simulate(variant, {"train": str(path)}, fleet, 1, self._size.steps)

    def _simulate(
        self,
        variant: Variant,
        data: dict[str, object],
        fleet: dict[str, dict[str, object]],
        rounds: int,
        local_steps: int,
    ) -> float:
        from fedtune.cli.simulate import simulate_config
        from fedtune.config import parse_run_config
        from fedtune.export.merge import merged_model
        from fedtune.wire.checkpoint import latest_checkpoint, read_checkpoint

        rule = variant.kind if variant.kind not in ("central", "local") else "delta"
        tree = {
            "run": {"name": variant.key, "seed": self._seed, "rounds": rounds},
            "model": {"path": str(self._model)},
            "data": {"held_out_fraction": 0.0, **data},
            "fleet": fleet,
            "lora": {"rank_max": 16, "rank_cap": 32, "tail_rank": 4096 if variant.tail else 0},
            "train": {
                "local_steps": local_steps,
                "batch_size": 16,
                "learning_rate": variant.rate,
                "schedule": variant.schedule,
                "final_learning_rate_share": 0.1,
                "evaluate_every": 0,
                "max_gradient_norm": 0.0,
            },
            "aggregate": {"rule": rule},
            "simulation": {"threads": 1},
            "outputs": {"folder": str(self._folder / f"run-{variant.key}"), "exports": []},
        }
        run = simulate_config(parse_run_config(tree, "quality"), watch=_silent, overwrite=True)
        path = latest_checkpoint(run / "checkpoints")
        assert path is not None
        adapter = read_checkpoint(path).adapter
        return self._measure(merged_model(self._model, adapter, "causal-lm", ()))

    def _measure(self, model: object) -> float:
        from fedtune.data.samples import SampleBuilder, build_samples
        from fedtune.data.sites import read_test_rows
        from fedtune.evaluate.perplexity import held_out_loss
        from fedtune.model.tokenizer import load_tokenizer
        from fedtune.settings import DataSection

        test = str(self._data / "test.jsonl")
        data = DataSection(train="-", test=test, test_stride=self._size.test_stride)
        builder = SampleBuilder(load_tokenizer(self._model), data)
        samples = build_samples(read_test_rows(data), builder).samples
        return held_out_loss(model, samples).loss  # type: ignore[arg-type]


def _device_class(count: int, rank: int) -> dict[str, object]:
    return {
        "count": count,
        "memory": "1 GB",
        "formats": ["fp32"],
        "format": "fp32",
        "rank": rank,
        "micro_batch": 4,
    }


def _silent(event: object) -> None:
    return None


def main() -> int:
    arguments = parse_arguments(__doc__ or "")
    if not has_public_data(arguments.shared):
        return 2
    size = QUICK if arguments.quick else FULL
    variants = [v for v in VARIANTS if not arguments.quick or v.key in QUICK_KEYS]
    # The longest first, so that no worker is left with one at the end.
    jobs = [
        (v, seed)
        for v in sorted(variants, key=lambda v: v.kind in ("base", "central"))
        for seed in size.seeds
    ]
    losses: dict[str, list[float]] = {v.key: [] for v in variants}
    with ProcessPoolExecutor(max_workers=2) as pool:
        futures = [pool.submit(run_variant, v, s, size, str(arguments.shared)) for v, s in jobs]
        for future in futures:
            key, seed, loss, seconds = future.result()
            losses[key].append(loss)
            print(f"{key:14s} seed {seed}: {loss:.4f}  ({seconds:.0f} s)", flush=True)
    central = mean(losses["central"])
    rows = [
        {
            "method": v.text,
            "learning rate": "-" if v.kind == "base" else f"{v.rate:g}",
            "held-out loss": f"{mean(losses[v.key]):.3f}",
            "spread over seeds": f"{stdev(losses[v.key]):.3f}" if len(size.seeds) > 1 else "-",
            "over centralised": f"{100 * (mean(losses[v.key]) / central - 1):+.1f} %",
        }
        for v in variants
    ]
    print("\n" + table(rows))
    if not arguments.quick:
        publish(
            "Quality of the joined adapter",
            "python benchmarks/quality.py",
            _PREFACE + table(rows) + _READING,
        )
    if arguments.json:
        print_json({key: round(mean(values), 5) for key, values in losses.items()})
    return 0


_READING = """

Compare rules at one learning rate and over seeds: which devices draw the high ranks moves a run by
more than the choice among the rules that join products. The tail is what a device of low rank
lacks: without it `delta` and `flexlora` are level here.
"""
_PREFACE = (__doc__ or "").split("\n\n", 2)[2].split("\n\n`--quick`")[0] + "\n\n"


if __name__ == "__main__":
    sys.exit(main())
