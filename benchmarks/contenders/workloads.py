"""Model shapes with random weights, adapters and batches: all from seeds, the same for everyone.

No torch here: the process that leads a benchmark needs only this.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

RANK = 8
SCALE = 2.0
"""alpha / rank, with alpha 16."""
LEARNING_RATE = 1e-3
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
BATCH_SIZE = 8
POOL_BATCHES = 50
"""Batches among which samples of like length are brought together; the number of HF's Trainer."""


@dataclass(frozen=True)
class Shape:
    """A Llama's sizes.

    Attributes:
        tied: the output matrix is the embedding table.
    """

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int
    tied: bool = True

    @property
    def head_size(self) -> int:
        return self.hidden // self.heads

    def config(self) -> dict[str, object]:
        """The fields of Hugging Face's LlamaConfig."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_size,
            "vocab_size": self.vocabulary,
            "tie_word_embeddings": self.tied,
            "max_position_embeddings": 16384,
            "rms_norm_eps": 1e-5,
            "use_cache": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        }

    def matrices(self) -> dict[str, tuple[int, int]]:
        """(out, in) of every adapted matrix, by its name in the safetensors header."""
        key_value = self.kv_heads * self.head_size
        sizes = {
            "self_attn.q_proj": (self.hidden, self.hidden),
            "self_attn.k_proj": (key_value, self.hidden),
            "self_attn.v_proj": (key_value, self.hidden),
            "self_attn.o_proj": (self.hidden, self.hidden),
            "mlp.gate_proj": (self.intermediate, self.hidden),
            "mlp.up_proj": (self.intermediate, self.hidden),
            "mlp.down_proj": (self.hidden, self.intermediate),
        }
        return {
            f"model.layers.{layer}.{name}": size
            for layer in range(self.layers)
            for name, size in sizes.items()
        }


@dataclass(frozen=True)
class Sample:
    """Token ids, and which of them are predicted with loss."""

    tokens: NDArray[np.int32]
    loss_mask: NDArray[np.bool_]
    label: int = -1


def write_folder(shape: Shape, folder: Path, seed: int = 0) -> None:
    """A Hugging Face model folder of that shape with random float32 weights."""
    from safetensors.numpy import save_file

    rng = np.random.default_rng(seed)
    sizes = {"model.embed_tokens.weight": (shape.vocabulary, shape.hidden)}
    sizes |= {f"{name}.weight": size for name, size in shape.matrices().items()}
    if not shape.tied:
        sizes["lm_head.weight"] = (shape.vocabulary, shape.hidden)
    tensors = {
        name: rng.standard_normal(size, dtype=np.float32) * np.float32(WEIGHT_DEVIATION)
        for name, size in sizes.items()
    }
    norms = [f"model.layers.{i}.{n}" for i in range(shape.layers) for n in LAYER_NORMS]
    for name in [*norms, "model.norm"]:
        tensors[f"{name}.weight"] = np.ones(shape.hidden, np.float32)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(shape.config()), encoding="utf-8")


WEIGHT_DEVIATION = 0.02
"""Standard deviation of random weights: Hugging Face's own default for new models."""
LAYER_NORMS = ("input_layernorm", "post_attention_layernorm")


def first_factors(
    matrices: Mapping[str, tuple[int, int]], rank: int = RANK
) -> dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """A (rank, in) and B (out, rank) of every matrix; B is not zero, so that A has a gradient."""
    return {name: _pair(name, size, rank) for name, size in matrices.items()}


def _pair(
    name: str, size: tuple[int, int], rank: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    rng = np.random.default_rng(name_seed(name))
    a = rng.standard_normal((rank, size[1]), dtype=np.float32) / np.float32(size[1] ** 0.5)
    b = rng.standard_normal((size[0], rank), dtype=np.float32) * np.float32(0.01)
    return a, b


def name_seed(name: str) -> int:
    """A seed that is the same for a name in every process."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")


# ---------------------------------------------------------------- batches


def dense(length: int, vocabulary: int, count: int, seed: int = 1) -> list[list[Sample]]:
    """Batches of one sample, every token of which carries loss."""
    rng = np.random.default_rng(seed)
    return [[_sample(rng, vocabulary, length, 0)] for _ in range(count)]


def ragged(
    vocabulary: int, count: int, size: int = BATCH_SIZE, seed: int = 2
) -> list[list[Sample]]:
    """Batches of instruction-like samples: prompt without loss, then as long an answer with it.

    Lengths are lognormal with median 110 and sigma 0.6, cut to 16..512 tokens.
    """
    rng = np.random.default_rng(seed)
    lengths = np.clip(rng.lognormal(np.log(110), 0.6, count * size), 16, 512).astype(int)
    samples = [_sample(rng, vocabulary, int(n), int(n) // 2) for n in lengths]
    return _cut(samples, size)


def grouped(
    vocabulary: int, count: int, size: int = BATCH_SIZE, seed: int = 2
) -> list[list[Sample]]:
    """The batches of `ragged` after sorting a pool of samples by length.

    `count` of the pool's batches, evenly spaced from the longest to the shortest, so that they
    stand for all.
    """
    pool = [s for batch in ragged(vocabulary, POOL_BATCHES, size, seed) for s in batch]
    batches = _cut(sorted(pool, key=lambda sample: len(sample.tokens), reverse=True), size)
    places = np.linspace(0, len(batches), count, endpoint=False) + len(batches) / (2 * count)
    return [batches[int(place)] for place in places]


def make_batches(
    workload: str, vocabulary: int, count: int, size: int = BATCH_SIZE
) -> list[list[Sample]]:
    """Batches of `ragged`, `grouped` or a number of dense tokens; `size` is of the ragged ones."""
    if workload in ("ragged", "grouped"):
        return (ragged if workload == "ragged" else grouped)(vocabulary, count, size)
    return dense(int(workload), vocabulary, count)


def real_tokens(batch: Sequence[Sample]) -> int:
    """Tokens of a batch, padding left out."""
    return sum(len(sample.tokens) for sample in batch)


def padding_factor(batch: Sequence[Sample]) -> float:
    """Positions of the padded batch over its real tokens."""
    return max(len(s.tokens) for s in batch) * len(batch) / real_tokens(batch)


@dataclass(frozen=True)
class Padded:
    """A batch as Hugging Face takes it: padded on the right.

    Attributes:
        labels: token ids where they carry loss, -100 elsewhere.
    """

    tokens: NDArray[np.int64]
    present: NDArray[np.int64]
    labels: NDArray[np.int64]


def pad(batch: Sequence[Sample]) -> Padded:
    """Pad to the longest sample of the batch."""
    shape = (len(batch), max(len(sample.tokens) for sample in batch))
    padded = Padded(
        np.zeros(shape, np.int64), np.zeros(shape, np.int64), np.full(shape, -100, np.int64)
    )
    for row, sample in enumerate(batch):
        size = len(sample.tokens)
        padded.tokens[row, :size] = sample.tokens
        padded.present[row, :size] = 1
        padded.labels[row, :size] = np.where(sample.loss_mask, sample.tokens, -100)
    return padded


def _sample(rng: np.random.Generator, vocabulary: int, length: int, prompt: int) -> Sample:
    tokens = rng.integers(3, vocabulary, length).astype(np.int32)
    return Sample(tokens, np.arange(length) >= prompt)


def _cut(samples: Sequence[Sample], size: int) -> list[list[Sample]]:
    return [list(samples[i : i + size]) for i in range(0, len(samples), size)]
