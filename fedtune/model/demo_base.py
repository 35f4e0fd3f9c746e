"""A small Llama-shaped base model, trained from nothing in about a minute on two cores.

The demo needs a base that is on no hub and in no package, so it makes one: a byte-level BPE
tokenizer of 2048 tokens and a model of 2 million parameters, trained on the texts it is given. It
reads like broken English, and that is enough: it has a loss that tuning lowers, every matrix that
a large Llama has, and the files that every tool expects of a base.

The schedule follows the share of the work done, counted in steps or in seconds, whichever is
further. On a machine that keeps up, the steps decide and the same seed gives the same training, up
to rounding (how many threads take part is measured). On a slower one the clock decides, and the
learning rate still falls to its end.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from jaxtyping import Int64
from torch import Tensor, nn

from fedtune.errors import DataError, ModelError
from fedtune.model.load import quiet_transformers
from fedtune.model.muon import Muon
from fedtune.model.thread_choice import ThreadChoice, threads_restored

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

RECIPE: Final = 1
"""Raise it when anything below changes what a build gives, so that caches are built anew."""

MARKER: Final = "demo.json"
"""The file that says from what a folder was built; written last, so it marks a whole folder."""

_LONGEST_S: Final = 90.0
_BOS, _EOS, _PAD = "<s>", "</s>", "<pad>"


@dataclass(frozen=True, slots=True)
class DemoRecipe:
    """Sizes and steps of the build.

    Chosen on two cores of an AMD EPYC: of widths 192 and 256, batches of 4 to 16 windows and Muon
    or AdamW, these reach the lowest held-out loss in the time.

    Attributes:
        vocabulary: tokens, at least 259 (all bytes and three special tokens).
        window: tokens of one training sequence; samples are packed end to end.
        batch: windows of one step.
        matrix_rate: learning rate of the blocks' matrices, under Muon.
        other_rate: learning rate of the embedding and the norms, under Adam.
        warm_up: steps over which the learning rates rise from zero.
        held_out_stride: every n-th text is kept for the held-out loss and never trained on.
    """

    vocabulary: int = 2048
    hidden: int = 192
    intermediate: int = 512
    layers: int = 4
    heads: int = 6
    window: int = 128
    batch: int = 8
    steps: int = 300
    matrix_rate: float = 0.02
    other_rate: float = 0.006
    warm_up: int = 15
    held_out_stride: int = 20


@dataclass(frozen=True, slots=True)
class DemoBase:
    """What a build left behind, as its marker file tells it.

    Attributes:
        folder: model folder in Hugging Face form, tokenizer included.
        steps: optimiser steps that were taken before the end or the time limit.
        held_out_loss: nats per token on texts of the same kind that were not trained on.
    """

    folder: Path
    parameters: int
    steps: int
    held_out_loss: float
    seconds: float


Progress = Callable[[float, float], None]
"""Called after each step with the share of the work done (0..1) and the step's loss."""


def build_demo_base(
    folder: Path,
    texts: Sequence[str],
    *,
    seconds: float = 75.0,
    seed: int = 0,
    recipe: DemoRecipe | None = None,
    progress: Progress | None = None,
) -> DemoBase:
    """Train the base into a folder, or return at once when the same build is already there.

    Everything is written beside the folder and renamed at the end: a build that is cut off leaves
    nothing that looks complete.

    Args:
        folder: where the model shall be; another build found there is replaced.
        texts: training samples, in a fixed order.
        seconds: limit of the training itself, at most 90; the tokenizer takes a second more.

    Raises:
        DataError: the texts fill too few windows to train on.
        ModelError: the folder holds something that is no demo base, or cannot be written.
    """
    recipe = recipe or DemoRecipe()
    key = _key(texts, recipe, seed)
    found = read_demo_base(folder)
    if found is not None and _marker(folder).get("key") == key:
        return found
    if folder.exists() and found is None and any(folder.iterdir()):
        raise ModelError(f"{folder} holds files that are no demo base; choose another folder")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".building-") as scratch:
            built = Path(scratch, "base")
            facts = _build(built, texts, recipe, min(seconds, _LONGEST_S), seed, progress)
            marker = {"recipe": RECIPE, "key": key, **facts, "settings": asdict(recipe)}
            (built / MARKER).write_text(json.dumps(marker, indent=1) + "\n", encoding="utf-8")
            if folder.exists():
                shutil.rmtree(folder)
            built.rename(folder)
    except OSError as error:
        reason = error.strerror or error
        raise ModelError(f"the demo's base cannot be written to {folder}: {reason}") from error
    done = read_demo_base(folder)
    assert done is not None
    return done


def read_demo_base(folder: Path) -> DemoBase | None:
    """What the marker of a finished build says; None when there is no such build."""
    marker = _marker(folder)
    if not {"key", "parameters", "steps", "held_out_loss", "seconds"} <= marker.keys():
        return None
    return DemoBase(
        folder,
        int(marker["parameters"]),
        int(marker["steps"]),
        float(marker["held_out_loss"]),
        float(marker["seconds"]),
    )


# ---------------------------------------------------------------- the build


def _build(
    folder: Path,
    texts: Sequence[str],
    recipe: DemoRecipe,
    seconds: float,
    seed: int,
    progress: Progress | None,
) -> dict[str, float]:
    started = time.perf_counter()
    held_out = texts[:: recipe.held_out_stride]
    training = [text for i, text in enumerate(texts) if i % recipe.held_out_stride]
    tokenizer = train_tokenizer(training, recipe.vocabulary)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(training), generator=generator).tolist()
    windows = _pack(tokenizer, [training[i] for i in order], recipe.window)
    held_out_windows = _pack(tokenizer, held_out, recipe.window)
    if len(windows) < recipe.batch or len(held_out_windows) == 0:
        raise DataError(
            f"the demo's base needs text for {recipe.batch} or more windows of {recipe.window} "
            f"tokens, found {len(windows)}"
        )
    with threads_restored():
        model = _new_model(recipe, tokenizer, seed)
        steps = _train(model, windows, recipe, seconds, generator, progress)
        loss = _held_out_loss(model, held_out_windows)
    with quiet_transformers():
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return {
        "parameters": model.num_parameters(),
        "steps": steps,
        "held_out_loss": loss,
        "seconds": time.perf_counter() - started,
    }


def train_tokenizer(texts: Sequence[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer: any text is some tokens, and none is unknown."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[_BOS, _EOS, _PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=_BOS, eos_token=_EOS, pad_token=_PAD
    )


def _pack(
    tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], window: int
) -> Int64[Tensor, "windows window"]:
    """Join the texts, each between its start and end tokens, and cut into full windows."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    encoded = tokenizer(list(texts), add_special_tokens=False)["input_ids"] if texts else []
    tokens = [token for ids in encoded for token in (bos, *ids, eos)]
    count = len(tokens) // window
    return torch.tensor(tokens[: count * window], dtype=torch.int64).view(count, window)


def _new_model(
    recipe: DemoRecipe, tokenizer: PreTrainedTokenizerFast, seed: int
) -> LlamaForCausalLM:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden,
        intermediate_size=recipe.intermediate,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        max_position_embeddings=4 * recipe.window,
        tie_word_embeddings=True,
        use_cache=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    # The library draws the weights from torch's global generator; it is put back afterwards.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def _train(
    model: LlamaForCausalLM,
    windows: Int64[Tensor, "windows window"],
    recipe: DemoRecipe,
    seconds: float,
    generator: torch.Generator,
    progress: Progress | None,
) -> int:
    """Train until the last step or the time limit, one step at least; return how many it were."""
    optimizers = _optimizers(model, recipe)
    batches = _batches(windows, recipe.batch, generator)
    threads = ThreadChoice()
    started = time.perf_counter()
    model.train()
    for step in range(recipe.steps):
        share = min(1.0, max(step / recipe.steps, (time.perf_counter() - started) / seconds))
        if step > 0 and share == 1:
            return step
        factor = learning_rate_factor(step, share, recipe.warm_up)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["full_rate"] * factor
        with threads.step(step):
            loss = _step(model, next(batches), optimizers)
        if progress is not None:
            progress(min(1.0, max(share, (step + 1) / recipe.steps)), loss)
    return recipe.steps


def learning_rate_factor(step: int, share: float, warm_up: int) -> float:
    """Linear rise over the first steps, then half a cosine down to a twentieth.

    Args:
        step: from 0.
        share: of the whole training, 0..1.
        warm_up: steps of the rise.
    """
    rise = min(1.0, (step + 1) / max(warm_up, 1))
    return rise * (0.05 + 0.95 * 0.5 * (1.0 + math.cos(math.pi * share)))


def _step(
    model: LlamaForCausalLM,
    batch: Int64[Tensor, "batch window"],
    optimizers: Sequence[torch.optim.Optimizer],
) -> float:
    loss: Tensor = model(input_ids=batch, labels=batch).loss
    loss.backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return loss.item()


def _optimizers(model: LlamaForCausalLM, recipe: DemoRecipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, Adam for the embedding and the norms."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        in_block = parameter.ndim == 2 and "embed" not in name and "lm_head" not in name
        (matrices if in_block else others).append(parameter)
    muon = Muon(matrices, learning_rate=recipe.matrix_rate)
    adam = torch.optim.AdamW(others, lr=recipe.other_rate, betas=(0.9, 0.98), weight_decay=0.0)
    for optimizer in (muon, adam):
        for group in optimizer.param_groups:
            group["full_rate"] = group["lr"]
    return [muon, adam]


def _batches(
    windows: Int64[Tensor, "windows window"], batch: int, generator: torch.Generator
) -> Iterator[Int64[Tensor, "batch window"]]:
    """Yield batches for ever; every window comes once before any comes again."""
    waiting: list[int] = []
    while True:
        while len(waiting) < batch:
            waiting += torch.randperm(len(windows), generator=generator).tolist()
        chosen, waiting = waiting[:batch], waiting[batch:]
        yield windows[chosen]


@torch.no_grad()
def _held_out_loss(model: LlamaForCausalLM, windows: Int64[Tensor, "windows window"]) -> float:
    """Mean loss in nats per token; every window predicts the same number of tokens."""
    model.eval()
    losses = [float(model(input_ids=w, labels=w).loss) * len(w) for w in torch.split(windows, 32)]
    return sum(losses) / len(windows)


# ---------------------------------------------------------------- the cache


def _key(texts: Sequence[str], recipe: DemoRecipe, seed: int) -> str:
    """Digest of all that a build depends on, but for the time limit and the machine."""
    digest = hashlib.sha256(json.dumps([RECIPE, seed, asdict(recipe)]).encode())
    for text in texts:
        digest.update(b"\0" + text.encode("utf-8"))
    return digest.hexdigest()


def _marker(folder: Path) -> dict[str, Any]:  # Any: JSON
    try:
        found = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
