"""The server's optimisers, a pull back to the start, and what the rank cap cuts off.

    python benchmarks/optimizers.py [--quick] [--json]

Data: e2e_nlg, the 12 largest restaurants as sites; held out: every 24th line of test.jsonl, loss
per response token of the merged model. Model: stories260k on fp32 backbones. Ranks 2, 4, 8, 16 on
6, 3, 2 and 1 devices, shuffled by the seed; 10 rounds, all devices in every round, batches of 16
samples, AdamW anew in every round at 1e-2, weights by samples. Three tables, each against the plain
average under the same settings: the server's step and momentum, with rounds of 5 local steps and a
cap of 32; FedProx, with rounds of 15 local steps, in which devices drift apart; and the cap, with
rounds of 5 steps. All values that were tried are in the tables.

`--quick` takes 4 devices, 3 rounds, 3 local steps, one seed and few lines.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev

from reporting import has_public_data, parse_arguments, print_json, publish, table

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("OMP_NUM_THREADS", "1")


@dataclass(frozen=True)
class Size:
    """How large the experiment is; the counts are of devices of rank 2, 4, 8 and 16."""

    counts: tuple[int, int, int, int]
    rounds: int
    seeds: tuple[int, ...]
    test_stride: int
    most_steps: int


FULL = Size((6, 3, 2, 1), 10, (0, 1), 24, 1000)
QUICK = Size((1, 1, 1, 1), 3, (0,), 96, 3)
RANKS = (2, 4, 8, 16)


@dataclass(frozen=True)
class Variant:
    """One line of a table.

    Attributes:
        part: which table.
        aggregate: of the run file's section.
        cap: `lora.rank_cap`.
        quick: whether `--quick` takes it.
    """

    part: str
    text: str
    aggregate: Mapping[str, object] = field(default_factory=dict)
    cap: int = 32
    proximal: float = 0.0
    quick: bool = False

    @property
    def key(self) -> str:
        return f"{self.part}: {self.text}"

    @property
    def local_steps(self) -> int:
        return 15 if self.part == "prox" else 5


def _momentum(beta: float, step: float) -> Variant:
    settings = {"momentum": beta, "server_step": step}
    return Variant("server", f"momentum {beta:g}, step {step:g}", settings)


def _adam(beta: float, step: float, tau: float = 1e-3, quick: bool = False) -> Variant:
    settings = {
        "optimizer": "adam", "momentum": beta, "server_step": step, "adaptivity": tau
    }  # fmt: skip
    text = f"adam {beta:g}, step {step:g}, tau {tau:g}"
    return Variant("server", text, settings, quick=quick)


VARIANTS = (
    Variant("server", "average", quick=True),
    Variant("server", "average, step 1.5", {"server_step": 1.5}),
    Variant("server", "average, step 2", {"server_step": 2.0}),
    _momentum(0.5, 0.5),
    _momentum(0.5, 1.0),
    _adam(0.0, 0.003),
    _adam(0.0, 0.01),
    _adam(0.0, 0.01, 1e-2, quick=True),
    _adam(0.0, 0.02, 1e-2),
    _adam(0.5, 0.01, 1e-2),
    Variant("prox", "average", quick=True),
    Variant("prox", "proximal 0.01", proximal=0.01),
    Variant("prox", "proximal 0.1", proximal=0.1, quick=True),
    Variant("cap", "cap 4", cap=4, quick=True),
    Variant("cap", "cap 4, dropped kept", {"keep_dropped": True}, cap=4, quick=True),
    Variant("cap", "cap 8", cap=8),
    Variant("cap", "cap 8, dropped kept", {"keep_dropped": True}, cap=8),
    Variant("cap", "cap 16", cap=16),
)


def play(variant: Variant, seed: int, size: Size, shared: str) -> tuple[str, float, float]:
    """Key, held-out loss per response token, seconds."""
    from fedtune.cli.simulate import simulate_config
    from fedtune.config import parse_run_config
    from fedtune.export.merge import merged_model
    from fedtune.wire.checkpoint import latest_checkpoint, read_checkpoint

    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        tree = _run_tree(variant, seed, size, Path(shared), Path(name))
        run = simulate_config(parse_run_config(tree, "bench"), watch=_silent, overwrite=True)
        path = latest_checkpoint(run / "checkpoints")
        assert path is not None
        adapter = read_checkpoint(path).adapter
    model = Path(shared) / "models" / "stories260k"
    loss = _held_out(merged_model(model, adapter, "causal-lm", ()), Path(shared), size)
    return variant.key, loss, time.perf_counter() - started


def _run_tree(
    variant: Variant, seed: int, size: Size, shared: Path, folder: Path
) -> dict[str, dict[str, object]]:
    classes = zip(RANKS, size.counts, strict=True)
    return {
        "run": {"name": "bench", "seed": seed, "rounds": size.rounds},
        "model": {"path": str(shared / "models" / "stories260k")},
        "data": {
            "train": str(shared / "data" / "e2e_nlg" / "train.jsonl"),
            "partition": {"by": "field", "field": "client", "largest": sum(size.counts)},
            "held_out_fraction": 0.0,
        },
        "fleet": {f"rank-{rank}": _device_class(count, rank) for rank, count in classes},
        "lora": {"rank_max": 16, "rank_cap": variant.cap},
        "importance": {"method": "uniform"},  # ranks are pinned
        "train": {
            "local_steps": min(variant.local_steps, size.most_steps),
            "batch_size": 16,
            "learning_rate": 1e-2,
            "evaluate_every": 0,
            "max_gradient_norm": 0.0,
            "proximal": variant.proximal,
        },
        "aggregate": dict(variant.aggregate),
        "simulation": {"threads": 1},
        "outputs": {"folder": str(folder / "run"), "exports": []},
    }


def _device_class(count: int, rank: int) -> dict[str, object]:
    fixed = {"format": "fp32", "formats": ["fp32"], "micro_batch": 16}
    return {"count": count, "memory": "1 GB", "rank": rank, **fixed}


def _held_out(model: object, shared: Path, size: Size) -> float:
    from fedtune.data.samples import SampleBuilder, build_samples
    from fedtune.data.sites import read_test_rows
    from fedtune.evaluate.perplexity import held_out_loss
    from fedtune.model.tokenizer import load_tokenizer
    from fedtune.settings import DataSection

    test = str(shared / "data" / "e2e_nlg" / "test.jsonl")
    data = DataSection(train="-", test=test, test_stride=size.test_stride)
    builder = SampleBuilder(load_tokenizer(shared / "models" / "stories260k"), data)
    samples = build_samples(read_test_rows(data), builder).samples
    return held_out_loss(model, samples).loss  # type: ignore[arg-type]


def _silent(event: object) -> None:
    return None


def rows_of(
    part: str, variants: Sequence[Variant], losses: Mapping[str, Sequence[float]]
) -> list[dict[str, object]]:
    """The lines of one table; differences are of the same seeds."""
    chosen = [variant for variant in variants if variant.part == part]
    first = losses[chosen[0].key]
    rows: list[dict[str, object]] = []
    for variant in chosen:
        found = losses[variant.key]
        apart = [one / plain - 1 for one, plain in zip(found, first, strict=True)]
        spread = f" ± {100 * stdev(apart):.1f}" if len(apart) > 1 else ""
        rows.append(
            {
                "setting": variant.text,
                "held-out loss": f"{mean(found):.3f}",
                "against the first line": f"{100 * mean(apart):+.1f}{spread} %",
            }
        )
    return rows


def main() -> int:
    arguments = parse_arguments(__doc__ or "")
    if not has_public_data(arguments.shared):
        return 2
    size = QUICK if arguments.quick else FULL
    variants = [v for v in VARIANTS if v.quick or not arguments.quick]
    losses: dict[str, list[float]] = {v.key: [] for v in variants}
    jobs = [(v, seed) for v in variants for seed in size.seeds]
    with ProcessPoolExecutor(max_workers=2) as pool:
        futures = [pool.submit(play, v, s, size, str(arguments.shared)) for v, s in jobs]
        for future in futures:
            key, loss, seconds = future.result()
            losses[key].append(loss)
            print(f"{key:44s} {loss:.4f}  ({seconds:.0f} s)", flush=True)
    text = "\n\n".join(
        f"{title}:\n\n{table(rows_of(part, variants, losses))}" for part, title in _TITLES.items()
    )
    print("\n" + text)
    if not arguments.quick:
        preface = (__doc__ or "").split("\n\n", 2)[2].split("\n\n`--quick`")[0]
        publish(
            "Server optimisers, FedProx and the rank cap",
            "python benchmarks/optimizers.py",
            f"{preface}\n\n{text}",
        )
    if arguments.json:
        print_json({key: round(mean(values), 5) for key, values in losses.items()})
    return 0


_TITLES = {"server": "The server's step", "prox": "FedProx", "cap": "The rank cap"}


if __name__ == "__main__":
    sys.exit(main())
