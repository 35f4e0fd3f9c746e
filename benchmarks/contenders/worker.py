"""A process that holds one contender and steps when it is told to.

    python -m contenders.worker '{"contender": "fedtune nf4", "folder": "..."}'

It speaks JSON lines. Its first line says that the model is built, how long that took and what the
process then holds; each line that it reads is a piece of work, answered by one line.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from contenders.workloads import Sample, make_batches, real_tokens


class Trainer(Protocol):
    """What every contender is."""

    model: Any  # a torch module

    def step(self, batch: Sequence[Sample]) -> float: ...


@dataclass(frozen=True)
class Work:
    """Steps to take.

    Attributes:
        count: how many batches the workload has; the same numbers give the same batches.
        steps: which of them to take.
        folder: of another model, to train afresh instead of the one that is built; "" for none.
        contender: as which to train that one; "" for the process's own.
    """

    workload: str
    vocabulary: int
    count: int
    steps: tuple[int, ...]
    folder: str = ""
    contender: str = ""


@dataclass(frozen=True)
class Done:
    """What came of a `Work`, step by step.

    Attributes:
        tokens: real tokens, without padding.
        peak_bytes: most that the process held since its model was built.
    """

    losses: list[float]
    seconds: list[float]
    tokens: list[int]
    peak_bytes: int


def rival(weights: str, compute: str) -> Callable[[Path], Trainer]:
    def build(folder: Path) -> Trainer:
        from contenders.rivals import from_folder

        return from_folder(folder, weights, compute)

    return build


def device(weights: str, compute: str) -> Callable[[Path], Trainer]:
    def build(folder: Path) -> Trainer:
        from contenders.ours import from_folder

        return from_folder(folder, weights, compute)  # type: ignore[arg-type]

    return build


CONTENDERS: dict[str, Callable[[Path], Trainer]] = {
    "PEFT + bitsandbytes NF4": rival("nf4", "fp32"),
    "PEFT + bitsandbytes NF4, bf16": rival("nf4", "bf16"),
    "PEFT fp32": rival("dense", "fp32"),
    "fedtune nf4": device("nf4", "fp32"),
    "fedtune nf4, bf16": device("nf4", "bf16"),
    "fedtune bnb-nf4": device("bnb-nf4", "fp32"),
}


def held_bytes(field: str) -> int:
    """A size of this process: `VmRSS` now, `VmHWM` at its most."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"no {field}")


def forget_peak() -> None:
    """Let `VmHWM` start from what is held now; the kernel reads 5 as just that (proc(5))."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def main() -> int:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print must not stand between the answers
    from fedtune.train.allocator import keep_freed_memory

    keep_freed_memory()  # as a device of fedtune does; here everyone gets it
    task = json.loads(sys.argv[1])
    started = time.perf_counter()
    own = task["contender"]
    trainer = CONTENDERS[own](Path(task["folder"]))
    for parameter in trainer.model.parameters():  # weights mapped from the file count as held
        parameter.detach().view(-1)[:: 4096 // parameter.element_size()].max()
    built_s = time.perf_counter() - started
    forget_peak()
    held = held_bytes("VmRSS")
    _answer(answers, {"built_s": built_s, "held_bytes": held, "threads": _threads()})
    for line in sys.stdin:
        values = json.loads(line)
        work = Work(**{**values, "steps": tuple(values["steps"])})
        build = CONTENDERS[work.contender or own]
        chosen = build(Path(work.folder)) if work.folder else trainer
        _answer(answers, asdict(run(chosen, work, held)))
    return 0


def run(trainer: Trainer, work: Work, held: int) -> Done:
    """Take the steps and measure each."""
    batches = make_batches(work.workload, work.vocabulary, work.count)
    losses, seconds, tokens = [], [], []
    for index in work.steps:
        started = time.perf_counter()
        losses.append(trainer.step(batches[index]))
        seconds.append(time.perf_counter() - started)
        tokens.append(real_tokens(batches[index]))
    return Done(losses, seconds, tokens, held_bytes("VmHWM") - held)


def _threads() -> int:
    import torch

    return int(torch.get_num_threads())


def _answer(stream: Any, value: dict[str, object]) -> None:  # a text stream
    stream.write(json.dumps(value) + "\n")
    stream.flush()


if __name__ == "__main__":
    sys.exit(main())
