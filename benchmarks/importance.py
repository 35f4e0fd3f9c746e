"""Where ranks go, by method, at equal bytes: held-out loss of what is then trained.

    python benchmarks/importance.py [--quick] [--json]

Three tasks. Text: e2e_nlg on stories260k, 40 steps of 16 samples, loss per response token on every
16th line of test.jsonl. Medicine: medquad on stories260k, 40 steps of 16 samples of at most 192
tokens, loss on 160 others. Classes: six topics of Python's documentation on all-MiniLM-L6-v2 with a
new head, 20 steps of 8 samples of at most 48 tokens, loss per sample on 240 others.

Each method measures on 4 batches of training samples, on the base as it is, as a device does before
round 1; the coordinator's functions make the report and the planner's ladder of it, and the longest
prefix of at most as many trained numbers as rank 2 on every linear matrix is trained, with ranks up
to 16, by the device's own `train_round` on a float32 backbone: AdamW, a constant learning rate,
clipping at 1. `equal` is rank 2 everywhere; `uniform` is the planner's prior, that rank i of any
matrix gains 1/i, by bytes. Learning rates are the best of three for `equal` on seed 0: 1e-2 on the
texts, 3e-3 on the classes. The seeds draw samples, order, start, sketches and the ranks of
`random`.

`--quick` takes one seed, fewer steps and the first text alone.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

from reporting import has_public_data, parse_arguments, print_json, publish, table

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("OMP_NUM_THREADS", "1")

if TYPE_CHECKING:
    from fedtune.data.samples import Sample
    from fedtune.model.backbone import Backbone
    from fedtune.records import Dispatch, ImportanceReport, ModelShapes, TaskName

EQUAL_RANK = 2
RANK_MAX = 16
BATCHES = 4
SEEDS = (0, 1, 2)
METHODS = (
    "sensitivity",
    "spectrum",
    "activation",
    "adalora",
    "uniform",
    "equal",
    "random",
)


@dataclass(frozen=True)
class Size:
    """How long everyone trains, at which rate, and on how much it is measured."""

    steps: int
    batch: int
    micro_batch: int
    held_out: int
    rate: float


SIZES = {
    "text": Size(40, 16, 8, 240, 1e-2),
    "medicine": Size(40, 16, 8, 160, 1e-2),
    "classes": Size(20, 8, 8, 240, 3e-3),
}
QUICK_SIZES = {"text": Size(12, 16, 8, 96, 1e-2)}


@dataclass(frozen=True)
class Task:
    """A base with samples to train on and to measure on."""

    name: TaskName
    folder: Path
    labels: tuple[str, ...]
    train: Sequence[Sample]
    held_out: Sequence[Sample]
    pad_id: int


@lru_cache(maxsize=2)
def load_task(name: str, shared: str) -> Task:
    """Everything of a task that no seed changes; once per process."""
    from fedtune.cli.demo_files import installed_encoder
    from fedtune.data.demo_text import write_classification_data

    data, stories = Path(shared) / "data", Path(shared) / "models" / "stories260k"
    if name == "text":
        options: dict[str, Any] = {
            "test": str(data / "e2e_nlg" / "test.jsonl"),
            "test_stride": 16,
        }
        return _task("causal-lm", stories, data / "e2e_nlg" / "train.jsonl", options)
    if name == "medicine":
        path = data / "medquad" / "train.jsonl"
        return _task("causal-lm", stories, path, {"max_tokens": 192})
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "topics.jsonl"
        write_classification_data(path)
        options = {"format": "text-label", "max_tokens": 48}
        return _task("sequence-classification", installed_encoder(), path, options)


def _task(name: TaskName, folder: Path, path: Path, options: dict[str, Any]) -> Task:
    import numpy as np

    from fedtune.data.rows import read_rows
    from fedtune.data.samples import SampleBuilder, build_samples, site_labels
    from fedtune.data.sites import read_test_rows
    from fedtune.model.tokenizer import load_tokenizer, pad_id
    from fedtune.settings import DataSection

    classifying = name == "sequence-classification"
    rows = read_rows(path, ["text", "label"] if classifying else ["prompt", "response"])
    section = DataSection(train=str(path), **options)
    labels = site_labels(rows, "label") if classifying else ()
    tokenizer = load_tokenizer(folder)
    builder = SampleBuilder(tokenizer, section, labels)
    samples = build_samples(rows, builder).samples
    if section.test:
        held_out = list(build_samples(read_test_rows(section), builder).samples)
    else:
        order = np.random.default_rng(0).permutation(len(samples))
        held_out = [samples[i] for i in order[:240]]
        samples = [samples[i] for i in order[240:]]
    return Task(name, folder, labels, samples, held_out, pad_id(tokenizer))


# ---------------------------------------------------------------- one cell


class Bench:
    """One task from one seed: what is measured on it, and what is then trained."""

    def __init__(self, task: Task, seed: int, size: Size) -> None:
        import numpy as np
        import torch

        from fedtune.model.backbone import BackboneShelf
        from fedtune.model.load import dense_shapes, tensor_names
        from fedtune.model.shapes import read_shapes
        from fedtune.records import MatrixForm

        self._task, self._seed, self._size = task, seed, size
        self.shapes: ModelShapes = read_shapes(task.folder, ("all-linear",))
        shelf = BackboneShelf(task.folder, torch.device("cpu"), keep_base=False)
        forms = dict.fromkeys(self.shapes.by_name(), MatrixForm("fp32"))
        self._backbone: Backbone = shelf.get(task.name, task.labels, forms)
        rng = np.random.default_rng([seed, 1])
        shapes = dense_shapes(task.folder, task.name, tensor_names(task.folder))
        self._heads = {
            name: rng.normal(0, 0.02, [len(task.labels) if n == 0 else n for n in shape]).astype(
                "f4"
            )
            for name, shape in shapes.items()
        }

    @property
    def budget(self) -> int:
        """Trained numbers of the equal rank."""
        sides = (m.out_features + m.in_features for m in self.shapes.matrices)
        return EQUAL_RANK * sum(sides)

    def report(self, method: str) -> ImportanceReport | None:
        """What the coordinator would make of this device's sums; None: the prior."""
        from fedtune.importance.gains import measured_report, random_report
        from fedtune.wire.calibration import MEASURED_METHODS

        if method == "random":
            return random_report(self.shapes.matrices, RANK_MAX, self._seed)
        measured = next((name for name in MEASURED_METHODS if name == method), None)
        if measured is None:
            return None
        sums, tokens, passes = self.sums(measured)
        return measured_report(
            measured,
            sums,
            self.shapes.matrices,
            RANK_MAX,
            self._seed,
            tokens=tokens,
            passes=passes,
        )

    def sums(self, method: Any) -> tuple[dict[str, Any], int, int]:
        """What a device sends, how many tokens it read, and in how many passes."""
        from fedtune.records import Dispatch
        from fedtune.train.batches import micro_batches
        from fedtune.wire.calibration import CalibrationInstruction
        from fedtune_client import calibrate

        batches = self._batches(BATCHES)
        passes = [p for batch in batches for p in micro_batches(batch, self._size.micro_batch)]
        order = CalibrationInstruction(
            "run", "", self._plan({}), method, RANK_MAX, BATCHES, self._seed, ""
        )
        bench = calibrate.Bench(
            self._backbone,
            Dispatch({}, dense=self._heads),
            batches,
            self._task.name,
            self._task.pad_id,
        )
        tokens = sum(len(sample.tokens) for batch in batches for sample in batch)
        return calibrate.importance_sums(order, bench, passes), tokens, len(passes)

    def ranks(self, method: str) -> dict[str, int]:
        """Rank of every trained matrix, within the budget."""
        if method == "equal":
            return {matrix.name: EQUAL_RANK for matrix in self.shapes.matrices}
        return self.ranks_of(self.report(method))

    def ranks_of(self, report: ImportanceReport | None) -> dict[str, int]:
        """The longest prefix of the planner's ladder that the budget allows."""
        from fedtune.plan.ladder import global_rungs, make_ladder
        from fedtune.plan.settings import PlanSettings

        size = self._size
        settings = PlanSettings(RANK_MAX, 4 * RANK_MAX, size.batch, size.steps, 256)
        rungs = global_rungs(self.shapes, settings, RANK_MAX, report)
        ladder = make_ladder(rungs, self.shapes.layers, RANK_MAX)
        return ladder.ranks(sum(n <= self.budget for n in ladder.elements[1:]))

    def loss(self, ranks: Mapping[str, int], rate: float | None = None) -> float:
        """Held-out loss after training with these ranks."""
        import numpy as np

        from fedtune.aggregate.rules import make_rule
        from fedtune.evaluate.perplexity import held_out_loss
        from fedtune.records import Dispatch
        from fedtune.train.round import mount, train_round, unmount
        from fedtune.wire.messages import OptimizerSpec

        task, size = self._task, self._size
        rate = size.rate if rate is None else rate
        plan, rule = self._plan(ranks), make_rule("delta", 4 * RANK_MAX)
        sent: Dispatch = rule.dispatch(
            rule.start(self.shapes.matrices, self._heads),
            plan,
            scale=1.0,
            rng=np.random.default_rng([self._seed, 2]),
        )
        back = train_round(
            self._backbone,
            self._batches(size.steps),
            sent,
            plan,
            OptimizerSpec("adamw", rate, rate),
            task=task.name,
            pad_id=task.pad_id,
        )
        learnt = Dispatch(back.factors, dense=back.dense)
        mounted = mount(self._backbone, learnt, trainable=False)
        held_out = task.held_out[: size.held_out]
        found = held_out_loss(self._backbone.model, held_out, 16, task.pad_id, task.name)
        unmount(self._backbone, mounted)
        return found.loss

    def _plan(self, ranks: Mapping[str, int]) -> Any:
        from fedtune.records import DevicePlan, MatrixPlan

        size = self._size
        matrices = tuple(
            MatrixPlan(m.name, ranks.get(m.name, 0), "fp32") for m in self.shapes.matrices
        )
        return DevicePlan("one", matrices, size.micro_batch, size.batch, 256, size.steps)

    def _batches(self, steps: int) -> list[list[Sample]]:
        from fedtune.train.batches import stream

        size = self._size.batch
        picked = stream(len(self._task.train), [self._seed, 3], 0, steps * size)
        chosen = [self._task.train[i] for i in picked]
        return [chosen[i : i + size] for i in range(0, len(chosen), size)]


def run_cell(task: str, method: str, seed: int, size: Size, shared: str) -> tuple[float, float]:
    """Held-out loss, and the share of the budget that the ranks take."""
    import torch

    torch.set_num_threads(1)
    bench = Bench(load_task(task, shared), seed, size)
    ranks = bench.ranks(method)
    by_name = bench.shapes.by_name()
    spent = sum(r * (by_name[n].out_features + by_name[n].in_features) for n, r in ranks.items())
    return bench.loss(ranks), spent / bench.budget


# ---------------------------------------------------------------- the table


def rows_of(losses: Mapping[str, Mapping[str, Sequence[float]]]) -> list[dict[str, object]]:
    """One row per method, of its losses by task and seed."""
    rows = []
    for method in METHODS:
        row: dict[str, object] = {"method": method}
        for task, by_method in losses.items():
            found = by_method[method]
            spread = f" ± {stdev(found):.4f}" if len(found) > 1 else ""
            row[task] = f"{mean(found):.4f}{spread}"
            if method != "uniform":
                apart = [
                    one - other for one, other in zip(found, by_method["uniform"], strict=True)
                ]
                spread = f" ± {stdev(apart):.4f}" if len(apart) > 1 else ""
                row[f"{task}: to uniform"] = f"{mean(apart):+.4f}{spread}"
            else:
                row[f"{task}: to uniform"] = ""
        rows.append(row)
    return rows


def main() -> int:
    arguments = parse_arguments(__doc__ or "")
    if not has_public_data(arguments.shared):
        return 2
    sizes = QUICK_SIZES if arguments.quick else SIZES
    seeds = SEEDS[:1] if arguments.quick else SEEDS
    jobs = [(task, method, seed) for task in sizes for method in METHODS for seed in seeds]
    losses: dict[str, dict[str, list[float]]] = {t: {m: [] for m in METHODS} for t in sizes}
    with ProcessPoolExecutor(max_workers=2) as pool:
        futures = [
            pool.submit(run_cell, task, method, seed, sizes[task], str(arguments.shared))
            for task, method, seed in jobs
        ]
        for (task, method, seed), future in zip(jobs, futures, strict=True):
            loss, spent = future.result()
            losses[task][method].append(loss)
            print(
                f"{task:9s} {method:12s} seed {seed}: {loss:.4f} at {spent:.3f} of the budget",
                flush=True,
            )
    rows = rows_of(losses)
    print("\n" + table(rows))
    if not arguments.quick:
        publish("Importance", "python benchmarks/importance.py", _PREFACE + table(rows) + _READING)
    if arguments.json:
        found = {
            f"{method}/{task}": round(mean(values), 4)
            for task, by_method in losses.items()
            for method, values in by_method.items()
        }
        print_json(found)
    return 0


_PREFACE = (__doc__ or "").split("\n\n", 2)[2].split("\n\n`--quick`")[0] + "\n\n"
_READING = """

What was tried beside these, and how to read them: [importance.md](importance.md#which-method).
"""

if __name__ == "__main__":
    sys.exit(main())
