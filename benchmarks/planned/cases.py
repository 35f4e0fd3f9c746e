"""Model shapes with random weights, and the plans that are run on them. No torch here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from contenders.workloads import Shape, write_folder

from fedtune.records import (
    BLOCK_BITS,
    DEFAULT_BLOCK,
    DevicePlan,
    FormatName,
    MatrixPlan,
    ModelShapes,
    TaskName,
)

VOCABULARY = 32000

LLAMAS: Mapping[str, Shape] = {
    "llama-15M": Shape(288, 6, 6, 6, 768, VOCABULARY),
    "llama-60M": Shape(512, 8, 8, 8, 1376, VOCABULARY, tied=False),
    "llama-110M": Shape(768, 12, 12, 12, 2048, VOCABULARY),
    "llama-1B-wide": Shape(2048, 2, 32, 8, 5632, VOCABULARY),
}
GPT2 = "gpt2-40M"
BERT = "bert-23M"


@dataclass(frozen=True)
class Case:
    """A plan for a shape.

    Attributes:
        length: tokens of every sample.
        first: first trained layer.
        tail: frozen rank of every matrix beside the trained one.
        correction: rank of the pair that repairs every matrix.
        recorded: the step is recorded as a CUDA graph.
    """

    shape: str
    format: FormatName
    micro_batch: int
    batch_size: int
    length: int
    rank: int = 8
    checkpointing: bool = False
    first: int = 0
    tail: int = 0
    correction: int = 0
    compute: str = "fp32"
    recorded: bool = False

    @property
    def name(self) -> str:
        words = [
            self.shape,
            f"{self.format}{'' if self.compute == 'fp32' else ' in ' + self.compute}",
            f"{self.batch_size}x{self.length} by {self.micro_batch}",
            f"rank {self.rank}" + (f"+{self.tail}" if self.tail else ""),
        ]
        words += [f"from block {self.first}"] if self.first else []
        words += [f"pairs of {self.correction}"] if self.correction else []
        words += ["recorded"] if self.recorded else []
        words += ["checkpointing"] if self.checkpointing else []
        return ", ".join(words)

    @property
    def task(self) -> TaskName:
        return "sequence-classification" if self.shape == BERT else "causal-lm"

    @property
    def itemsize(self) -> int:
        return 4 if self.compute == "fp32" else 2

    def dense(self, shapes: ModelShapes) -> dict[str, tuple[int, ...]]:
        """Parameters that are trained whole: a classifier's head of two classes."""
        if self.task == "causal-lm":
            return {}
        return {"classifier.weight": (2, shapes.hidden_size), "classifier.bias": (2,)}

    def plan(self, shapes: ModelShapes) -> DevicePlan:
        block = DEFAULT_BLOCK if self.format in BLOCK_BITS else 0
        matrices = tuple(
            MatrixPlan(
                matrix.name,
                self.rank if matrix.layer >= self.first else 0,
                self.format,
                self.tail,
                block,
                self.correction,
            )
            for matrix in shapes.matrices
        )
        return DevicePlan(
            "d",
            matrices,
            self.micro_batch,
            self.batch_size,
            self.length,
            1,
            self.checkpointing,
            self.first,
        )


CASES = (
    Case("llama-15M", "nf4", 8, 8, 64),
    Case("llama-15M", "nf4", 1, 1, 64),
    Case("llama-15M", "fp32", 4, 4, 256),
    Case("llama-15M", "q3", 1, 4, 512, rank=16),
    Case("llama-60M", "int8", 2, 4, 256),
    Case("llama-60M", "q4", 4, 4, 512, checkpointing=True),
    Case("llama-60M", "bf16", 4, 8, 128, compute="bf16"),
    Case("llama-60M", "q2", 4, 4, 128, correction=16, tail=16),
    Case("llama-110M", "nf4", 1, 2, 512),
    Case("llama-110M", "nf4", 4, 4, 256, first=8),
    Case("llama-110M", "fp32", 2, 2, 256, rank=32, tail=32),
    Case("llama-110M", "int8", 4, 4, 512, checkpointing=True),
    Case("llama-110M", "q4", 4, 8, 64, compute="bf16"),
    Case("llama-1B-wide", "nf4", 1, 2, 256),
    Case("llama-1B-wide", "bf16", 2, 2, 512),
    Case(GPT2, "q4", 4, 4, 256),
    Case(GPT2, "fp32", 2, 4, 256, checkpointing=True),
    Case(BERT, "int8", 16, 16, 128),
    Case(BERT, "fp32", 32, 32, 64),
)
"""On a CPU; the first is the one whose measured step calibrates."""
QUICK = (
    CASES[0],
    Case("llama-15M", "fp32", 2, 2, 128),
    Case("llama-15M", "q2", 4, 4, 64, correction=16, tail=16),
    Case(BERT, "int8", 8, 8, 64),
)
LIMITED = Case("llama-15M-bf16", "nf4", 8, 8, 64)
"""Under a limit on private memory. Its base is stored in bfloat16 and computed in float32, so that
none of it stays mapped: a private mapping counts as a whole, however little of it is touched."""
CUDA_CASES = tuple(
    Case(shape, form, micro, micro, length, compute="bf16", checkpointing=again, recorded=recorded)
    for shape in ("llama-110M", "llama-1B-wide")
    for form in ("nf4", "bf16")
    for micro, length, again, recorded in (
        (4, 512, False, False),
        (8, 512, True, False),
        (4, 512, False, True),
    )
)


def make_folder(shape: str, folder: Path) -> Path:
    """A Hugging Face folder of that shape with random float32 weights."""
    path = folder / shape
    if path.exists():
        return path
    if shape in LLAMAS:
        write_folder(LLAMAS[shape], path)
    elif shape == LIMITED.shape:
        write_folder(LLAMAS["llama-15M"], path)
        _round_to_bfloat16(path / "model.safetensors")
    elif shape == GPT2:
        _write(path, *_gpt2())
    else:
        _write(path, *_bert())
    return path


def _round_to_bfloat16(file: Path) -> None:
    """Store a file of float32 in bfloat16, cut, which numpy does not know."""
    from safetensors.numpy import load_file

    tensors = {
        name: (t.view(np.uint32) >> 16).astype(np.uint16) for name, t in load_file(file).items()
    }
    header, data, end = {}, [], 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": "BF16", "shape": tensor.shape, "data_offsets": (start, end)}
        data.append(tensor.tobytes())
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(data))


def _write(
    folder: Path, config: Mapping[str, object], sizes: Mapping[str, tuple[int, ...]]
) -> None:
    from safetensors.numpy import save_file

    rng = np.random.default_rng(0)
    tensors = {n: rng.standard_normal(s, dtype=np.float32) * 0.02 for n, s in sizes.items()}
    tensors = {n: t + np.float32("norm.w" in n.lower() or ".ln" in n) for n, t in tensors.items()}
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def _gpt2() -> tuple[dict[str, object], dict[str, tuple[int, ...]]]:
    width, layers, vocabulary, positions = 512, 8, 32000, 1024
    config = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "n_embd": width,
        "n_layer": layers,
        "n_head": 8,
        "n_inner": 4 * width,
        "vocab_size": vocabulary,
        "n_positions": positions,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    sizes: dict[str, tuple[int, ...]] = {
        "wte.weight": (vocabulary, width),
        "wpe.weight": (positions, width),
    }
    for layer in range(layers):
        for name, into, out in (
            ("attn.c_attn", width, 3 * width),
            ("attn.c_proj", width, width),
            ("mlp.c_fc", width, 4 * width),
            ("mlp.c_proj", 4 * width, width),
        ):
            sizes[f"h.{layer}.{name}.weight"] = (into, out)
            sizes[f"h.{layer}.{name}.bias"] = (out,)
        for name in ("ln_1", "ln_2"):
            sizes[f"h.{layer}.{name}.weight"] = sizes[f"h.{layer}.{name}.bias"] = (width,)
    sizes["ln_f.weight"] = sizes["ln_f.bias"] = (width,)
    return config, sizes


def _bert() -> tuple[dict[str, object], dict[str, tuple[int, ...]]]:
    width, layers, vocabulary, positions = 384, 6, 30522, 512
    config = {
        "architectures": ["BertModel"],
        "model_type": "bert",
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": 12,
        "intermediate_size": 4 * width,
        "vocab_size": vocabulary,
        "max_position_embeddings": positions,
        "pad_token_id": 0,
    }
    sizes: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (vocabulary, width),
        "embeddings.position_embeddings.weight": (positions, width),
        "embeddings.token_type_embeddings.weight": (2, width),
        "embeddings.LayerNorm.weight": (width,),
        "embeddings.LayerNorm.bias": (width,),
        "pooler.dense.weight": (width, width),
        "pooler.dense.bias": (width,),
    }
    for layer in range(layers):
        start = f"encoder.layer.{layer}."
        for name, out, into in (
            ("attention.self.query", width, width),
            ("attention.self.key", width, width),
            ("attention.self.value", width, width),
            ("attention.output.dense", width, width),
            ("intermediate.dense", 4 * width, width),
            ("output.dense", width, 4 * width),
        ):
            sizes[f"{start}{name}.weight"], sizes[f"{start}{name}.bias"] = (out, into), (out,)
        for name in ("attention.output.LayerNorm", "output.LayerNorm"):
            sizes[f"{start}{name}.weight"] = sizes[f"{start}{name}.bias"] = (width,)
    return config, sizes
