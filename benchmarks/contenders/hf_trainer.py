"""What Hugging Face's Trainer adds to a bare loop over the same model and batches.

    python -m contenders.hf_trainer FOLDER VOCABULARY

Prints one JSON line: median seconds of a step in each.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from contenders.rivals import from_folder
from contenders.workloads import LEARNING_RATE, dense, pad
from fedtune.train.allocator import keep_freed_memory

STEPS = 10


class Clock(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """When each step ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *_: object, **__: object) -> None:
        self.ends.append(time.perf_counter())


def main() -> int:
    keep_freed_memory()
    folder, vocabulary = Path(sys.argv[1]), int(sys.argv[2])
    batches = dense(64, vocabulary, STEPS)
    rival = from_folder(folder, "nf4", "fp32")
    bare = []
    for batch in batches:
        started = time.perf_counter()
        rival.step(batch)
        bare.append(time.perf_counter() - started)
    rows = [
        {"input_ids": torch.from_numpy(p.tokens[0]), "labels": torch.from_numpy(p.labels[0])}
        for p in map(pad, batches)
    ]
    clock = Clock()
    with tempfile.TemporaryDirectory() as work:
        arguments = TrainingArguments(
            output_dir=work,
            per_device_train_batch_size=1,
            max_steps=STEPS,
            learning_rate=LEARNING_RATE,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
        )
        Trainer(rival.model, arguments, train_dataset=rows, callbacks=[clock]).train()
    trainer = [b - a for a, b in zip(clock.ends, clock.ends[1:], strict=False)]
    print(json.dumps({"bare_s": median(bare[1:]), "trainer_s": median(trainer)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
