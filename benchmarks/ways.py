"""The named ways to train, on one device and at equal steps: held-out loss, time and memory.

    python benchmarks/ways.py [--quick] [--json]

Two tasks. Text: e2e_nlg on stories260k, 40 steps of 16 samples, loss per response token on every
16th line of test.jsonl. Classes: six topics of Python's documentation on all-MiniLM-L6-v2 with a
new head (as `fedtune demo --classification`), 20 steps of 8 samples of at most 48 tokens, loss per
sample on 240 others. Everyone trains rank 8 on every linear matrix of a float32 backbone through
the device's own `train_round`, AdamW, a constant learning rate, clipping at 1, from what the rule
`delta` sends in a first round; QST goes through `train_side`. Learning rates were chosen on seed 0:
on the text the best of 3e-3, 1e-2 and 3e-2 for each way, on the classes 3e-3, the best for plain
LoRA, and 1e-2 for QST. The seeds draw samples, order and start.

`kept` is what one forward pass keeps for its backward pass beside the base's weights, in the first
step and, where that is another number, in later ones; `trained` is 16 bytes for each number that
the optimiser moves: value, gradient and AdamW's two moments. `s` is processor time of all steps and
what is done before them, in one thread. Bytes and seconds are those of seed 0.

`--quick` takes one seed, fewer steps and the text alone.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
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
    from fedtune.records import Dispatch, LoraScale, TaskName, TrainingWay
    from fedtune.wire.messages import OptimizerSpec

RANK = 8
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Way:
    """One line of the table.

    Attributes:
        rates: learning rate on the text and on the classes.
        settings: of the record `TrainingWay`.
        alpha: the scale is alpha / sqrt(rank); None: a scale of 1.
    """

    key: str
    text: str
    rates: tuple[float, float]
    settings: dict[str, Any] = field(default_factory=dict)
    alpha: float | None = None


WAYS = (
    Way("lora", "LoRA", (1e-2, 3e-3)),
    Way("decay", "LoRA, layer rates falling by 0.8", (1e-2, 3e-3), {"layer_rate_decay": 0.8}),
    Way("allora", "ALLoRA, eta 2", (1e-2, 3e-3), {"name": "allora", "allora_eta": 2.0}),
    Way("rslora", "rsLoRA, alpha 8", (3e-3, 3e-3), alpha=8.0),
    Way("eva", "start: EVA", (1e-2, 3e-3), {"start": "eva"}),
    Way("corda", "start: CorDA", (1e-2, 3e-3), {"start": "corda"}),
    Way("pissa", "start: PiSSA", (1e-2, 3e-3), {"start": "pissa"}),
    Way("s2ft", "S2FT, random channels", (1e-2, 3e-3), {"name": "s2ft"}),
    Way(
        "s2ft_activation",
        "S2FT, channels of largest inputs",
        (1e-2, 3e-3),
        {"name": "s2ft", "channels": "activation"},
    ),
    Way(
        "greentrainer",
        "GreenTrainer, half of the backward pass",
        (1e-2, 3e-3),
        {"name": "greentrainer", "flops_share": 0.5},
    ),
    Way("qst", "QST, a side network", (3e-2, 1e-2)),
)
QUICK_KEYS = ("lora", "allora", "eva", "s2ft", "greentrainer", "qst")


@dataclass(frozen=True)
class Size:
    """How long everyone trains and on how much it is measured."""

    steps: int
    batch: int
    micro_batch: int
    held_out: int


SIZES = {"text": Size(40, 16, 8, 240), "classes": Size(20, 8, 8, 240)}
QUICK_SIZES = {"text": Size(12, 16, 8, 96)}


@dataclass(frozen=True)
class Cell:
    """What one way did on one task from one seed."""

    loss: float
    seconds: float
    kept_bytes: tuple[int, int]
    trained_bytes: int


@dataclass(frozen=True)
class Task:
    """A base with samples to train on and to measure on."""

    name: TaskName
    folder: Path
    labels: tuple[str, ...]
    train: Sequence[Sample]
    held_out: Sequence[Sample]
    pad_id: int


def run_cell(task: str, key: str, rate: float, seed: int, size: Size, shared: str) -> Cell:
    """Train one way and measure it; once for the clock, and a few steps more for the bytes."""
    import torch

    torch.set_num_threads(1)
    loaded = load_task(task, shared)
    bench = Bench(loaded, way_of(key), rate, seed, size)
    started = time.process_time()
    bench.train(bench.batches(size.steps))
    seconds = time.process_time() - started
    loss = bench.held_out_loss()
    if seed:  # bytes are those of seed 0
        return Cell(loss, seconds, (0, 0), 0)
    with kept_bytes(bench.backbone) as kept:
        trained = bench.train(bench.batches(1) * 2, new_step=kept.new_step)
    return Cell(loss, seconds, (kept.of_step[0], kept.of_step[1]), trained)


def way_of(key: str) -> Way:
    return next(way for way in WAYS if way.key == key)


@lru_cache(maxsize=2)
def load_task(name: str, shared: str) -> Task:
    """Everything of a task that no seed changes; once per process."""
    from fedtune.cli.demo_files import installed_encoder
    from fedtune.data.demo_text import write_classification_data

    if name == "text":
        data = Path(shared) / "data" / "e2e_nlg"
        folder = Path(shared) / "models" / "stories260k"
        options: dict[str, Any] = {"test": str(data / "test.jsonl"), "test_stride": 16}
        return _task("causal-lm", folder, data / "train.jsonl", options)
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
    keys = ["text", "label"] if classifying else ["prompt", "response"]
    rows = read_rows(path, keys)
    section = DataSection(train=str(path), **options)
    labels = site_labels(rows, "label") if classifying else ()
    tokenizer = load_tokenizer(folder)
    builder = SampleBuilder(tokenizer, section, labels)
    samples = build_samples(rows, builder).samples
    if classifying:
        order = np.random.default_rng(0).permutation(len(samples))
        held_out = [samples[i] for i in order[:240]]
        samples = [samples[i] for i in order[240:]]
    else:
        held_out = list(build_samples(read_test_rows(section), builder).samples)
    return Task(name, folder, labels, samples, held_out, pad_id(tokenizer))


class Bench:
    """One way on one task: its backbone, its start, and what it has learnt."""

    def __init__(self, task: Task, way: Way, rate: float, seed: int, size: Size) -> None:
        import torch

        from fedtune.model.backbone import BackboneShelf
        from fedtune.model.shapes import read_shapes
        from fedtune.records import MatrixForm
        from fedtune.train.side import side_network

        self._task, self._way, self._rate, self._seed, self._size = task, way, rate, seed, size
        self._shapes = read_shapes(task.folder, ("all-linear",))
        shelf = BackboneShelf(task.folder, torch.device("cpu"), keep_base=False)
        forms = dict.fromkeys(self._shapes.by_name(), MatrixForm("fp32"))
        self.backbone: Backbone = shelf.get(task.name, task.labels, forms)
        self._sent = self._first_dispatch()
        self._learnt: Dispatch = self._sent
        self._side = side_network(self.backbone, seed) if way.key == "qst" else None
        self._warm_up()

    def train(
        self,
        batches: Sequence[Sequence[Sample]],
        new_step: Callable[[int, float], None] | None = None,
    ) -> int:
        """Train from the start; returns the bytes of what the optimiser moved."""
        import numpy as np

        from fedtune.records import Dispatch
        from fedtune.train.round import train_round
        from fedtune.train.side import train_side

        common: dict[str, Any] = {
            "task": self._task.name,
            "pad_id": self._task.pad_id,
            "after_step": new_step,
        }
        if self._side is not None:
            micro_batch = self._size.micro_batch
            heads = train_side(
                self.backbone,
                self._side,
                batches,
                self._sent,
                self._optimizer(),
                micro_batch=micro_batch,
                **common,
            )
            self._learnt = Dispatch({}, dense={n: v.numpy() for n, v in heads.items()})
            moved = sum(p.numel() for p in [*self._side.parameters(), *heads.values()])
            return 16 * moved
        plan = replace(self._plan(), local_steps=len(batches))
        back = train_round(self.backbone, batches, self._sent, plan, self._optimizer(), **common)
        self._learnt = Dispatch(back.factors, dense=back.dense)
        pairs = [(self._sent.trained[n], pair) for n, pair in back.factors.items()]
        moved = sum(v.size for v in back.dense.values())
        fixed = self._way.settings.get("name") == "s2ft"
        for sent, pair in pairs:
            if not np.array_equal(sent.b, pair.b):
                moved += pair.b.size + (0 if fixed else pair.a.size)
        return 16 * moved

    def held_out_loss(self) -> float:
        from contextlib import nullcontext

        from fedtune.evaluate.perplexity import held_out_loss
        from fedtune.train.round import mount, unmount
        from fedtune.train.side import beside

        samples = self._task.held_out[: self._size.held_out]
        mounted = mount(self.backbone, self._learnt, trainable=False)
        side = beside(self.backbone, self._side) if self._side is not None else nullcontext()
        with side:
            found = held_out_loss(
                self.backbone.model, samples, 16, self._task.pad_id, self._task.name
            )
        unmount(self.backbone, mounted)
        return found.loss

    def _warm_up(self) -> None:
        """The first products of a process are slow, and a new model is tried for packing."""
        from fedtune.train.round import mount, unmount
        from fedtune.train.step import accumulate

        mounted = mount(self.backbone, self._sent, trainable=True)
        batch = self._task.train[: self._size.micro_batch]
        if self._sent.trained or self._sent.dense:
            accumulate(
                self.backbone,
                batch,
                self._size.micro_batch,
                self._task.name,
                self._task.pad_id,
            )
        unmount(self.backbone, mounted)

    def _scale(self) -> LoraScale:
        from fedtune.records import LoraScale

        alpha = self._way.alpha
        return LoraScale() if alpha is None else LoraScale(alpha, "rank-stabilised")

    def _plan(self) -> Any:
        from fedtune.records import DevicePlan, MatrixPlan

        size = self._size
        matrices = tuple(MatrixPlan(m.name, RANK, "fp32") for m in self._shapes.matrices)
        return DevicePlan("one", matrices, size.micro_batch, size.batch, 256, size.steps)

    def _first_dispatch(self) -> Dispatch:
        import numpy as np

        from fedtune.aggregate.rules import make_rule
        from fedtune.model.load import dense_shapes, tensor_names
        from fedtune.records import Dispatch

        rng = np.random.default_rng([self._seed, 1])
        classes = len(self._task.labels)
        shapes = dense_shapes(self._task.folder, self._task.name, tensor_names(self._task.folder))
        heads = {
            name: rng.normal(0, 0.02, [classes if n == 0 else n for n in shape]).astype("f4")
            for name, shape in shapes.items()
        }
        if self._way.key == "qst":
            return Dispatch({}, dense=heads)
        rule = make_rule("delta", 2 * RANK)
        adapter = rule.start(self._shapes.matrices, heads)
        return rule.dispatch(
            adapter,
            self._plan(),
            scale=self._scale(),
            rng=np.random.default_rng([self._seed, 2]),
        )

    def _optimizer(self) -> OptimizerSpec:
        from fedtune.wire.messages import OptimizerSpec

        return OptimizerSpec("adamw", self._rate, self._rate, way=self._training_way())

    def _training_way(self) -> TrainingWay:
        from fedtune.records import TrainingWay

        return TrainingWay(seed=self._seed, **self._way.settings)

    def batches(self, steps: int) -> list[list[Sample]]:
        from fedtune.train.batches import stream

        size = self._size.batch
        picked = stream(len(self._task.train), [self._seed, 3], 0, steps * size)
        chosen = [self._task.train[i] for i in picked]
        return [chosen[i : i + size] for i in range(0, len(chosen), size)]


class Kept:
    """Bytes that the forward passes of a step keep, each storage once.

    A pass is over when its backward pass first asks for something back.
    """

    def __init__(self, known: set[int]) -> None:
        self._known, self._seen, self._asked = known, {}, False  # type: ignore[var-annotated]
        self._most = 0
        self.of_step: list[int] = []

    def pack(self, tensor: Any) -> Any:
        if self._asked:
            self._seen, self._asked = {}, False
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._known:
            self._seen[storage.data_ptr()] = storage.nbytes()
            self._most = max(self._most, sum(self._seen.values()))
        return tensor

    def unpack(self, tensor: Any) -> Any:
        self._asked = True
        return tensor

    def new_step(self, _index: int, _loss: float) -> None:
        self.of_step.append(self._most)
        self._seen, self._most, self._asked = {}, 0, False


@contextmanager
def kept_bytes(backbone: Backbone) -> Iterator[Kept]:
    """Watch what autograd saves, the base's own tensors left out."""
    import torch

    own = [p.untyped_storage().data_ptr() for p in backbone.model.parameters()]
    for layer in backbone.layers.values():
        own.append(layer.matrix.values(torch.float32).untyped_storage().data_ptr())
    kept = Kept(set(own))
    with torch.autograd.graph.saved_tensors_hooks(kept.pack, kept.unpack):
        yield kept


def row(way: Way, cells: dict[str, list[Cell]]) -> dict[str, object]:
    found: dict[str, object] = {"way": way.text}
    for index, (task, of_task) in enumerate(cells.items()):
        losses = [cell.loss for cell in of_task]
        spread = f" ± {stdev(losses):.3f}" if len(losses) > 1 else ""
        found[f"{task}: rate"] = f"{way.rates[index]:g}"
        found[f"{task}: loss"] = f"{mean(losses):.3f}{spread}"
        found[f"{task}: s"] = f"{of_task[0].seconds:.1f}"
        first, later = (f"{max(c.kept_bytes[i] for c in of_task) / 1e6:.1f}" for i in (0, 1))
        alike = abs(float(first) - float(later)) < 0.05 * float(first)
        found[f"{task}: kept MB"] = first if alike else f"{first}, then {later}"
        found[f"{task}: trained MB"] = f"{max(c.trained_bytes for c in of_task) / 1e6:.2f}"
    return found


def main() -> int:
    arguments = parse_arguments(
        __doc__ or "",
        lambda parser: parser.add_argument(
            "--rates", default="", help="print seed 0 at these learning rates, with commas"
        ),
    )
    if not has_public_data(arguments.shared):
        return 2
    sizes = QUICK_SIZES if arguments.quick else SIZES
    ways = [way for way in WAYS if not arguments.quick or way.key in QUICK_KEYS]
    seeds = SEEDS[:1] if arguments.quick else SEEDS
    tried = [float(text) for text in arguments.rates.split(",") if text]
    jobs = [
        (task, way.key, rate, seed)
        for task_index, task in enumerate(sizes)
        for way in ways
        for rate in (tried or [way.rates[task_index]])
        for seed in (seeds[:1] if tried else seeds)
    ]
    cells: dict[str, dict[str, list[Cell]]] = {w.key: {t: [] for t in sizes} for w in ways}
    with ProcessPoolExecutor(max_workers=2) as pool:
        futures = [
            pool.submit(run_cell, task, key, rate, seed, sizes[task], str(arguments.shared))
            for task, key, rate, seed in jobs
        ]
        for (task, key, rate, seed), future in zip(jobs, futures, strict=True):
            cell = future.result()
            cells[key][task].append(cell)
            print(
                f"{task:8s} {key:16s} rate {rate:g} seed {seed}: {cell.loss:.4f}  "
                f"{cell.seconds:.1f} s",
                flush=True,
            )
    if tried:
        return 0
    rows = [row(way, cells[way.key]) for way in ways]
    print("\n" + table(rows))
    if not arguments.quick:
        publish("Ways to train", "python benchmarks/ways.py", _PREFACE + table(rows) + _READING)
    if arguments.json:
        losses = {
            f"{key}/{task}": round(mean(cell.loss for cell in of_task), 4)
            for key, by_task in cells.items()
            for task, of_task in by_task.items()
        }
        print_json(losses)
    return 0


_PREFACE = (__doc__ or "").split("\n\n", 2)[2].split("\n\n`--quick`")[0] + "\n\n"
_READING = """

Over three seeds no way is clearly ahead of plain LoRA; what differs is cost. EVA and S2FT are
behind on the classes, at plain LoRA's learning rate. S2FT keeps less where blocks are not fused,
and moves half the numbers. GreenTrainer saves time from the second step on, for a loss that
is behind on the text and level on the classes. QST costs least by far and is level where a new head
does most of the work; on the text it is far behind.
"""

if __name__ == "__main__":
    sys.exit(main())
