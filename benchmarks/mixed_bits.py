"""What a form per matrix, and the pair that repairs a matrix, are worth.

    python benchmarks/mixed_bits.py [--quick] [--json]

Widths: the squared error of all matrices of a base, in the best single form and in a form per
matrix, at equal bytes; forms are 2, 3, 4 and 8 bits in blocks of 64, each with a pair of rank 0, 4
or 8 (no pair at 8 bits). The greedy answer stands beside the exact one of HiGHS.

Repair: fleets whose devices hold the base in 2, 3, 4 and 8 bits (as many of each), with and without
pairs of rank 8 on the first three. What is measured is the joined adapter merged into the
full-precision base, on held-out rows that no device has: stories260k on e2e_nlg (the largest
restaurants as sites, loss per response token) and MiniLM on the demo's topics (loss per text).
Everything runs through the same simulation as `fedtune simulate`; all ranks are 8.

`--quick` takes six of MiniLM's matrices, and for repair one seed, 4 devices and fewer rounds of
stories260k alone.
"""

from __future__ import annotations

import math
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from reporting import has_public_data, parse_arguments, print_json, publish, table

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("OMP_NUM_THREADS", "1")

FORMATS = ("q2", "q3", "q4", "q8")
RANKS = (0, 4, 8)
BITS = (2.75, 3.25, 4.13)


# ---------------------------------------------------------------- widths


def widths(model: Path, targets: tuple[str, ...]) -> list[dict[str, Any]]:
    """Rows of the first table: one per budget."""
    import numpy as np

    from fedtune.importance.distortion import base_distortion
    from fedtune.model.shapes import read_shapes
    from fedtune.plan.cost import CORRECTION_ITEMSIZE, correction_elements, form_bytes
    from fedtune.plan.mixing import candidate_forms
    from fedtune.plan.widths import choose_forms

    shapes = read_shapes(model, targets)
    forms = candidate_forms(FORMATS, max(RANKS))
    with tempfile.TemporaryDirectory() as cache:
        measured = base_distortion(model, shapes, forms, Path(cache))
    errors = np.array([measured.errors[m.name] for m in shapes.matrices])
    sizes = np.array(
        [
            [form_bytes(m, f) + CORRECTION_ITEMSIZE * correction_elements(m, f) for f in forms]
            for m in shapes.matrices
        ]
    )
    parameters = sum(m.parameters for m in shapes.matrices)
    rows = []
    for bits in BITS:
        budget = int(bits * parameters / 8)
        fitting = sizes.sum(axis=0) <= budget
        uniform = float(np.where(fitting, errors.sum(axis=0), np.inf).min())
        chosen = choose_forms(errors, sizes, budget)
        assert chosen is not None
        mixed = float(errors[np.arange(len(chosen)), chosen].sum())
        repaired = np.mean([forms[column].correction_rank > 0 for column in chosen.tolist()])
        rows.append(
            {
                "bits": bits,
                "uniform_over_mixed": uniform / mixed,
                "greedy_over_exact": mixed / _exact(errors, sizes, budget),
                "repaired": float(repaired),
            }
        )
    return rows


def _exact(errors: Any, sizes: Any, budget: int) -> float:  # numpy arrays
    """The least total error, by HiGHS, which likes its inputs scaled."""
    import numpy as np
    from scipy import sparse
    from scipy.optimize import Bounds, LinearConstraint, milp

    matrices, forms = errors.shape
    usable = np.where(np.isfinite(errors), errors, 10 * errors[np.isfinite(errors)].max())
    one_each = sparse.kron(sparse.eye(matrices), np.ones((1, forms)), format="csr")
    scale = usable.max()
    found = milp(
        c=usable.ravel() / scale,
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(sizes.reshape(1, -1) / budget, -np.inf, 1),
        ],
        integrality=np.ones(usable.size),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 1e-4, "time_limit": 20},
    )
    return float(found.fun * scale)


# ---------------------------------------------------------------- repair


@dataclass(frozen=True)
class Size:
    """How large the fleet and its run are."""

    devices_each: int
    rounds: int
    local_steps: int
    seeds: tuple[int, ...]
    test_stride: int


FULL = Size(2, 6, 5, (0, 1, 2), 24)
QUICK = Size(1, 2, 3, (0,), 96)


def fleet(size: Size, correction_rank: int) -> dict[str, dict[str, object]]:
    """Devices of every width; only the pair differs between the two fleets."""
    return {
        name: {
            "count": size.devices_each,
            "memory": "1 GB",
            "formats": [name],
            "format": name,
            "rank": 8,
            "correction_rank": correction_rank,
            "micro_batch": 4,
        }
        for name in FORMATS
    }


def joined_loss(tree: Mapping[str, Any], folder: Path) -> tuple[float, float]:
    """Held-out loss of the base and of the merged model, both in full precision."""
    from fedtune.cli.simulate import simulate_config
    from fedtune.config import parse_run_config

    losses: list[tuple[float, float]] = []

    def watch(event: Any) -> None:  # an Event
        if event.kind == "tested":
            # A base without a head has no loss.
            losses.append((event.fields["base_loss"] or math.nan, event.fields["merged_loss"]))

    outputs = {"folder": str(folder), "exports": ["merged"]}
    config = parse_run_config({**tree, "outputs": outputs}, "mixed_bits")
    simulate_config(config, watch=watch, overwrite=True)
    return losses[0]


def stories_tree(shared: Path, size: Size, seed: int, rank: int) -> dict[str, Any]:
    data = shared / "data" / "e2e_nlg"
    return {
        "run": {"name": "stories", "seed": seed, "rounds": size.rounds},
        "model": {"path": str(shared / "models" / "stories260k")},
        "data": {
            "train": str(data / "train.jsonl"),
            "test": str(data / "test.jsonl"),
            "test_stride": size.test_stride,
            "held_out_fraction": 0.0,
            "partition": {"by": "field", "field": "client", "largest": 4 * size.devices_each},
        },
        "fleet": fleet(size, rank),
        "lora": {"rank_max": 8, "rank_cap": 32},
        "train": {"local_steps": size.local_steps, "learning_rate": 1e-2, "evaluate_every": 0},
        "plan": {"widths": "uniform"},
        "simulation": {"threads": 1},
    }


def minilm_tree(folder: Path, size: Size, seed: int, rank: int) -> dict[str, Any]:
    from fedtune.cli.demo_files import installed_encoder
    from fedtune.data.demo_text import write_classification_data

    whole = folder / "topics.jsonl"
    write_classification_data(whole)
    lines = whole.read_text(encoding="utf-8").splitlines()
    for name, rows in (("train", lines), ("test", lines[::8])):
        kept = rows if name == "test" else [line for i, line in enumerate(rows) if i % 8]
        (folder / f"{name}.jsonl").write_text("\n".join(kept) + "\n", encoding="utf-8")
    return {
        "run": {"name": "minilm", "seed": seed, "rounds": 4},
        "model": {"path": str(installed_encoder()), "task": "sequence-classification"},
        "data": {
            "train": str(folder / "train.jsonl"),
            "test": str(folder / "test.jsonl"),
            "format": "text-label",
            "max_tokens": 64,
            "held_out_fraction": 0.0,
            "partition": {"by": "dirichlet", "alpha": 0.5},
        },
        "fleet": fleet(Size(1, 4, 5, size.seeds, 1), rank),
        "lora": {"rank_max": 8, "rank_cap": 32},
        "train": {"local_steps": 5, "learning_rate": 5e-3, "evaluate_every": 0},
        "plan": {"widths": "uniform"},
        "simulation": {"threads": 1},
    }


def repair(name: str, shared: Path, size: Size) -> dict[str, Any]:
    """One row of the second table: mean losses over seeds."""
    base, losses = 0.0, {0: list[float](), 8: list[float]()}
    for seed in size.seeds:
        for rank, found in losses.items():
            started = time.perf_counter()
            with tempfile.TemporaryDirectory() as folder:
                tree = (
                    stories_tree(shared, size, seed, rank)
                    if name == "stories260k"
                    else minilm_tree(Path(folder), size, seed, rank)
                )
                base, loss = joined_loss(tree, Path(folder) / "run")
            found.append(loss)
            seconds = time.perf_counter() - started
            print(f"{name} seed {seed} rank {rank}: {loss:.4f} ({seconds:.0f} s)", flush=True)
    wins = sum(b < a for a, b in zip(losses[0], losses[8], strict=True))
    return {
        "base": base,
        "without": mean(losses[0]),
        "with": mean(losses[8]),
        "wins": f"{wins} of {len(size.seeds)}",
    }


# ---------------------------------------------------------------- both


_SOME = ("query", "key", "value")


def _bases(shared: Path, quick: bool) -> dict[str, tuple[Path, tuple[str, ...]]]:
    from fedtune.cli.demo_files import installed_encoder

    some = tuple(f"layer.{block}.attention.self.{name}" for block in (0, 5) for name in _SOME)
    return {
        "stories260k": (shared / "models" / "stories260k", ("all-linear",)),
        "minilm": (installed_encoder(), some if quick else ("all-linear",)),
    }


def _width_rows(name: str, found: Sequence[Mapping[str, Any]]) -> list[dict[str, object]]:
    return [
        {
            "base": name,
            "bits per weight": row["bits"],
            "error, best single form over mix": f"{row['uniform_over_mixed']:.2f}",
            "greedy over exact": f"{row['greedy_over_exact']:.5f}",
            "matrices with a pair": f"{row['repaired']:.0%}",
        }
        for row in found
    ]


def main() -> int:
    arguments = parse_arguments(__doc__ or "")
    if not has_public_data(arguments.shared):
        return 2
    size = QUICK if arguments.quick else FULL
    bases = _bases(arguments.shared, arguments.quick)
    measured = {name: widths(*base) for name, base in bases.items()}
    first = table([row for name, rows in measured.items() for row in _width_rows(name, rows)])
    print("\n" + first + "\n", flush=True)
    names = ["stories260k"] if arguments.quick else ["stories260k", "minilm"]
    repaired = {name: repair(name, arguments.shared, size) for name in names}
    second = table(
        [
            {
                "base": name,
                "base model": f"{row['base']:.4f}",
                "joined, no pairs": f"{row['without']:.4f}",
                "joined, pairs of rank 8": f"{row['with']:.4f}",
                "seeds on which pairs win": row["wins"],
            }
            for name, row in repaired.items()
        ]
    )
    print("\n" + second)
    if not arguments.quick:
        preface = (__doc__ or "").split("\n\n", 2)[2].split("\n\n`--quick`")[0]
        body = f"{preface}\n\n{first}\n\n{second}"
        publish("Widths and repair", "python benchmarks/mixed_bits.py", body)
    if arguments.json:
        flat: dict[str, object] = {}
        for name, rows in measured.items():
            flat[f"uniform_over_mixed_{name}"] = round(
                max(r["uniform_over_mixed"] for r in rows), 3
            )
            flat[f"greedy_over_exact_{name}"] = round(max(r["greedy_over_exact"] for r in rows), 5)
        for name, row in repaired.items():
            flat[f"loss_without_pairs_{name}"] = round(row["without"], 5)
            flat[f"loss_with_pairs_{name}"] = round(row["with"], 5)
        print_json(flat)
    return 0


if __name__ == "__main__":
    sys.exit(main())
