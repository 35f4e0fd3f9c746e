"""One training step of a LoRA adapter on a GPU, beside PEFT, bitsandbytes and Liger.

    python benchmarks/gpu.py [--json] [--only WORDS] [--limit SECONDS] [--lines FILE]
    python benchmarks/gpu.py --report FILE     # a table of the lines of an earlier run

Llama shapes with random weights, made on the card; rank 8 on all seven matrices of every layer,
AdamW, bf16 compute, NF4 weights with double quantisation. `512`, `2048` and `8192` are one sample
of that many tokens, all with loss. `ragged` is 16 samples of instruction length (lognormal, median
110, sigma 0.6, 16 to 512 tokens), whose first half is a prompt without loss; Hugging Face pads
them, `grouped` are such batches after sorting a pool of samples by length. Everyone starts from
the same factors and sees the same batches. Speed is real tokens per second, padding not counted.

Each contender runs in a process of its own, so that a fault of one leaves the others alone. Each
cell prints one JSON line as it ends, so that a run that is cut off keeps what it has.
`--smoke` runs every line of this script on the CPU with a tiny model.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import torch
from contenders.workloads import (
    RANK,
    WEIGHT_DEVIATION,
    Sample,
    Shape,
    make_batches,
    name_seed,
    padding_factor,
    real_tokens,
)
from reporting import parse_arguments, print_json, publish, table

SHAPES = {
    "160M": Shape(768, 12, 12, 12, 3072, 32000, tied=False),
    "1B": Shape(2048, 16, 32, 8, 8192, 128256),
    "8B": Shape(4096, 32, 32, 8, 14336, 128256, tied=False),
}
"""Sizes of JackFram/llama-160m, meta-llama/Llama-3.2-1B and Llama-3.1-8B."""
SMOKE_SHAPES = {"tiny": Shape(64, 2, 4, 2, 128, 300)}
WORKLOADS = ("512", "2048", "8192", "ragged", "grouped")
SMOKE_WORKLOADS = ("64", "ragged", "grouped")
BATCH_SIZE = 16
CHECKPOINTED = frozenset({("8B", "8192"), ("8B", "ragged"), ("8B", "grouped"), ("tiny", "ragged")})
"""Cells in which PEFT's activations would not fit, so that everyone recomputes; `tiny` tries it."""

BATCHES = 4
"""Different ones, in turn."""
WARM_UP = BATCHES
"""Each batch once: a graph is recorded for every form that they have."""
STEPS = 10
CELL_SECONDS = 4.0
"""Timed steps of a cell stop here; the least is `FEWEST`."""
FEWEST = 3


class Trainer(Protocol):
    """What every contender is."""

    model: Any  # a torch module

    def restart(self) -> None: ...
    def set_checkpointing(self, on: bool) -> None: ...
    def step(self, batch: Sequence[Sample]) -> float: ...


@dataclass(frozen=True)
class Cell:
    """One contender on one workload of one shape.

    Attributes:
        model_bytes: held by the built model, before the first step.
        peak_bytes: most that was held during the steps, the model included.
        predicted_bytes: what the planner says for it; 0 where it does not apply.
        problem: why there are no numbers.
    """

    contender: str
    shape: str
    workload: str
    checkpointing: bool
    tokens_per_s: float = 0.0
    step_s: float = 0.0
    first_loss: float = 0.0
    steps: int = 0
    padding: float = 1.0
    model_bytes: int = 0
    peak_bytes: int = 0
    predicted_bytes: int = 0
    problem: str = ""

    @property
    def key(self) -> str:
        return f"{self.contender}/{self.shape}/{self.workload}"


# ---------------------------------------------------------------- models


def random_model(shape: Shape, device: torch.device) -> Any:  # transformers is untyped
    """A Llama in bf16 whose weights depend on nothing but their names."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    fields = {k: v for k, v in shape.config().items() if k not in ("architectures", "model_type")}
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(
            LlamaConfig(**fields), dtype=torch.bfloat16, attn_implementation="sdpa"
        )
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            generator = torch.Generator(device).manual_seed(name_seed(name))
            with torch.no_grad():
                parameter.normal_(0.0, WEIGHT_DEVIATION, generator=generator)
    return model.requires_grad_(False)


def build_rival(shape: Shape, device: torch.device) -> Trainer:
    from contenders.rivals import PeftTrainer, quantise

    return PeftTrainer(quantise(random_model(shape, device)))


def build_liger(shape: Shape, device: torch.device) -> Trainer:
    """PEFT and bitsandbytes with Liger's kernels; it changes transformers' functions for good."""
    from contenders.rivals import PeftTrainer, quantise
    from liger_kernel.transformers import apply_liger_kernel_to_llama

    base = quantise(random_model(shape, device))
    apply_liger_kernel_to_llama(
        rope=True,
        swiglu=True,
        rms_norm=True,
        cross_entropy=False,
        fused_linear_cross_entropy=True,
        model=base,
    )
    return PeftTrainer(base)


def build_ours(shape: Shape, device: torch.device) -> Trainer:
    from contenders.ours import DeviceTrainer, quantise

    from fedtune.records import MatrixForm

    model = random_model(shape, device)
    return DeviceTrainer(quantise(model, list(shape.matrices()), MatrixForm("nf4")))


def build_captured(shape: Shape, device: torch.device) -> Trainer:
    from contenders.captured import CapturedTrainer
    from contenders.ours import quantise

    from fedtune.records import MatrixForm

    model = random_model(shape, device)
    return CapturedTrainer(quantise(model, list(shape.matrices()), MatrixForm("nf4")))


RIVAL, OURS, CAPTURED, LIGER = (
    "PEFT + bitsandbytes",
    "fedtune",
    "fedtune, CUDA graph",
    "PEFT + bitsandbytes + Liger",
)
CONTENDERS: dict[str, Callable[[Shape, torch.device], Trainer]] = {
    OURS: build_ours,
    RIVAL: build_rival,
    CAPTURED: build_captured,
    LIGER: build_liger,
}


# ---------------------------------------------------------------- one cell


@dataclass
class Card:
    """Where the work runs, and what it knows of its memory."""

    device: torch.device
    smoke: bool
    ends_at: float
    model_bytes: int = 0

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def settle(self) -> None:
        """Wait for the device, and let the peak start from what is held now."""
        gc.collect()
        if self.on_gpu:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def held(self) -> int:
        return int(torch.cuda.memory_allocated()) if self.on_gpu else 0

    def peak(self) -> int:
        return int(torch.cuda.max_memory_allocated()) if self.on_gpu else 0

    def wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()


def run_cell(card: Card, trainer: Trainer, cell: Cell, shape: Shape) -> Cell:
    """Warm up, time some steps, and say what they took."""
    count = BATCHES
    batches = make_batches(cell.workload, shape.vocabulary, count, BATCH_SIZE)
    trainer.restart()
    trainer.set_checkpointing(cell.checkpointing)
    card.settle()
    first = trainer.step(batches[0])
    for index in range(1, WARM_UP):
        trainer.step(batches[index])
    card.wait()
    seconds: list[float] = []
    tokens = 0
    while len(seconds) < STEPS and (len(seconds) < FEWEST or sum(seconds) < CELL_SECONDS):
        batch = batches[len(seconds) % count]
        started = time.perf_counter()
        trainer.step(batch)
        card.wait()
        seconds.append(time.perf_counter() - started)
        tokens += real_tokens(batch)
    trainer.set_checkpointing(False)
    return Cell(
        cell.contender,
        cell.shape,
        cell.workload,
        cell.checkpointing,
        tokens_per_s=tokens / sum(seconds),
        step_s=median(seconds),
        first_loss=first,
        steps=len(seconds),
        padding=sum(map(padding_factor, batches)) / count,
        model_bytes=card.model_bytes,
        peak_bytes=card.peak(),
        predicted_bytes=predicted_bytes(cell, shape, batches) if cell.contender == OURS else 0,
    )


def predicted_bytes(cell: Cell, shape: Shape, batches: Sequence[Sequence[Sample]]) -> int:
    """The planner's peak for the largest of the batches."""
    from fedtune.plan.cost import Load, peak_bytes
    from fedtune.records import MatrixForm, MatrixShape, ModelShapes

    matrices = tuple(
        MatrixShape(name, out, into, int(name.split(".")[2]))
        for name, (out, into) in shape.matrices().items()
    )
    tables = 1 if shape.tied else 2
    norms = shape.hidden * (2 * shape.layers + 1)
    shapes = ModelShapes(
        digest="",
        model_type="llama",
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        layers=shape.layers,
        attention_heads=shape.heads,
        vocabulary=shape.vocabulary,
        matrices=matrices,
        other_parameters=tables * shape.vocabulary * shape.hidden + norms,
    )
    load = Load(
        1,
        max(real_tokens(batch) for batch in batches),
        cell.checkpointing,
        0,
        RANK * sum(m.out_features + m.in_features for m in matrices),
        RANK * len(matrices),
        whole_matrices=True,
        itemsize=2,
    )
    return peak_bytes(shapes, {m.name: MatrixForm("nf4") for m in matrices}, load).total


# ---------------------------------------------------------------- all cells


def run_contender(
    card: Card, contender: str, shapes: Mapping[str, Shape], only: str
) -> Iterator[Cell]:
    """Every cell of a contender in turn, each model freed before the next."""
    for name, shape in shapes.items():
        cells = [cell for cell in _cells(contender, name, card.smoke) if only in cell.key]
        if cells:
            yield from _run_model(card, CONTENDERS[contender], cells, shape)


def _cells(contender: str, shape: str, smoke: bool) -> list[Cell]:
    workloads = SMOKE_WORKLOADS if smoke else WORKLOADS
    if contender in (OURS, CAPTURED):  # nothing to gain by grouping where nothing is padded
        workloads = tuple(w for w in workloads if w != "grouped")
    if contender == CAPTURED and not smoke:  # a recomputed block is not recorded
        workloads = tuple(w for w in workloads if (shape, w) not in CHECKPOINTED)
    return [Cell(contender, shape, w, (shape, w) in CHECKPOINTED) for w in workloads]


def _run_model(
    card: Card,
    build: Callable[[Shape, torch.device], Trainer],
    cells: Sequence[Cell],
    shape: Shape,
) -> Iterator[Cell]:
    card.settle()
    trainer: Trainer | None = None
    for cell in cells:
        if time.perf_counter() > card.ends_at:
            yield _failed(cell, "out of time")
            continue
        try:
            if trainer is None:
                trainer = build(shape, card.device)
                card.settle()
                card.model_bytes = card.held()
            yield run_cell(card, trainer, cell, shape)
        except Exception as error:  # noqa: BLE001  # one cell that fails must not end a paid run
            yield _failed(cell, f"{type(error).__name__}: {error}")
    del trainer
    card.settle()


def _failed(cell: Cell, problem: str) -> Cell:
    return Cell(
        cell.contender, cell.shape, cell.workload, cell.checkpointing, problem=problem[:300]
    )


# ---------------------------------------------------------------- the tables


def report(cells: Sequence[Cell]) -> str:
    """A table per shape: speed and peak, with ratios to PEFT + bitsandbytes on the same batches."""
    found = {(c.shape, c.workload, c.contender): c for c in cells}
    workloads = list(dict.fromkeys(c.workload for c in cells))
    parts = []
    for shape in dict.fromkeys(c.shape for c in cells):
        chosen = sorted(
            (c for c in cells if c.shape == shape), key=lambda c: workloads.index(c.workload)
        )
        rows = [_row(cell, _baseline(found, cell)) for cell in chosen]
        parts.append(f"### {shape}\n\n{table(rows)}")
    return "\n\n".join(parts)


def _baseline(found: Mapping[tuple[str, str, str], Cell], cell: Cell) -> Cell | None:
    """PEFT + bitsandbytes on the same samples; grouped ones are compared with ragged ones."""
    workload = "ragged" if cell.workload == "grouped" else cell.workload
    return found.get((cell.shape, workload, RIVAL))


def _row(cell: Cell, baseline: Cell | None) -> dict[str, object]:
    row: dict[str, object] = {
        "workload": cell.workload,
        "contender": cell.contender + (", recomputing" if cell.checkpointing else ""),
    }
    if cell.problem:
        return {**row, **dict.fromkeys(_COLUMNS, "-"), "tokens/s": cell.problem}
    over = cell.peak_bytes - cell.model_bytes
    speed = peak = above = gap = "-"
    if baseline is not None and not baseline.problem:
        speed = f"{cell.tokens_per_s / baseline.tokens_per_s:.2f}x"
        gap = f"{cell.first_loss - baseline.first_loss:+.4f}"
        if baseline.peak_bytes:
            peak = f"{cell.peak_bytes / baseline.peak_bytes:.2f}x"
            above = f"{over / (baseline.peak_bytes - baseline.model_bytes):.2f}x"
    predicted = f"{cell.predicted_bytes / 1e9:.2f} GB" if cell.predicted_bytes else "-"
    values = (
        f"{cell.tokens_per_s:.0f}",
        speed,
        f"{cell.step_s * 1e3:.1f} ms",
        f"{cell.peak_bytes / 1e9:.2f} GB",
        peak,
        above,
        predicted,
        gap,
    )
    return {**row, **dict(zip(_COLUMNS, values, strict=True))}


_COLUMNS = (
    "tokens/s",
    "speed",
    "step",
    "peak",
    "of the rival's",
    "above the model",
    "planned",
    "first loss against the rival",
)


def options(parser: ArgumentParser) -> None:
    parser.add_argument("--only", default="", help="cells whose contender/shape/workload has this")
    parser.add_argument("--limit", type=float, default=230.0, help="seconds; later cells are left")
    parser.add_argument("--lines", type=Path, help="file that each cell's JSON line is added to")
    parser.add_argument("--report", type=Path, help="print and publish the lines of a file; no run")
    parser.add_argument("--smoke", action="store_true", help="a tiny model on the CPU")
    parser.add_argument("--contender", help="run this one, in this process")


def main() -> int:
    arguments = parse_arguments(__doc__ or "", options)
    if arguments.report is not None:
        return _report_file(arguments.report)
    if not arguments.smoke and not torch.cuda.is_available():
        print("no CUDA device here; --smoke runs a tiny model on the CPU", file=sys.stderr)
        return 2
    if arguments.contender is not None:
        return _run_one(arguments)
    return _run(arguments)


def _run_one(arguments: Namespace) -> int:
    from fedtune.train.allocator import keep_freed_memory

    keep_freed_memory()  # as a device of fedtune does; here everyone gets it
    smoke = arguments.smoke
    ends_at = time.perf_counter() + arguments.limit
    card = Card(torch.device("cpu" if smoke else "cuda"), smoke, ends_at)
    name = "CPU" if smoke else torch.cuda.get_device_name()
    where = f"{name}, torch {torch.__version__}, Python {sys.version.split()[0]}"
    shapes = SMOKE_SHAPES if smoke else SHAPES
    for cell in run_contender(card, arguments.contender, shapes, arguments.only):
        print(json.dumps({**asdict(cell), "where": where}), flush=True)
    return 0


def _run(arguments: Namespace) -> int:
    """Every contender in its own process."""
    ends_at = time.perf_counter() + arguments.limit
    cells: list[Cell] = []
    shapes = SMOKE_SHAPES if arguments.smoke else SHAPES
    for contender in CONTENDERS:
        planned = (c for s in shapes for c in _cells(contender, s, arguments.smoke))
        if not any(arguments.only in cell.key for cell in planned):
            continue
        command = [sys.executable, __file__, "--contender", contender, "--only", arguments.only]
        command += ["--limit", f"{ends_at - time.perf_counter():.0f}"]
        command += ["--smoke"] if arguments.smoke else []
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                print(line, end="", flush=True)
                if not line.startswith("{"):
                    continue
                cells.append(_cell(line))
                if arguments.lines is not None:
                    with arguments.lines.open("a", encoding="utf-8") as stream:
                        stream.write(line)
        if process.returncode != 0:
            print(f"{contender} ended with code {process.returncode}", file=sys.stderr)
    print("\n" + report(cells), flush=True)
    if arguments.json:
        print_json({cell.key: round(cell.tokens_per_s, 1) for cell in cells})
    return int(any(cell.problem for cell in cells))


def _cell(line: str) -> Cell:
    values = json.loads(line)
    values.pop("where")
    return Cell(**values)


def _report_file(path: Path) -> int:
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line]
    where = str(json.loads(lines[0])["where"])
    found = {cell.key: cell for cell in map(_cell, lines)}  # a later run replaces an earlier one
    body = report(list(found.values()))
    print(body)
    text = (__doc__ or "").split("\n\n", 2)[2].split("\n\nEach contender")[0]
    publish("One training step on a GPU", "python benchmarks/gpu.py", f"{text}\n\n{body}", where)
    return 0


if __name__ == "__main__":
    sys.exit(main())
