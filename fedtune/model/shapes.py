"""The shapes of a base model, read from its config and its files' headers, never its weights.

A safetensors file starts with the length of its header (8 bytes, little-endian) and the header: a
JSON object from tensor name to dtype, shape and place. Reading that takes milliseconds for any
model, needs no deep-learning library, and shows a file whose download broke off.

Source: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeGuard

from fedtune.errors import ModelError
from fedtune.model.source import (
    MAX_HEADER_BYTES,
    base_digest,
    header_digest,
    read_json,
    weight_files,
)
from fedtune.records import MatrixShape, ModelShapes

_MAX_DIMENSIONS: Final = 8

_FLOATING: Final = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""Bytes per element of the dtypes whose tensors are parameters; others are buffers."""

_BLOCK: Final = re.compile(r"(?:^|\.)(?:layers|layer|h|blocks)\.(\d+)\.")
_NOT_LINEAR: Final = re.compile(r"norm|(^|\.)ln|embed|(^|\.)w[tp]e\.|relative_attention_bias", re.I)

_INDEX: Final = re.compile(r"(?<=\.)\d+(?=\.)")
_EXPERT: Final = re.compile(r"\bexperts\.\d+\.")
_ROUTER: Final = re.compile(r"(^|\.)(gate|router)$")
"""What chooses between experts; it is no linear layer in transformers."""

_TRANSPOSED_TYPES: Final = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
"""Architectures of transformers' Conv1D, which stores (in, out) where Linear stores (out, in)."""

_PLAIN_HEADS: Final = frozenset(
    {"llama", "mistral", "mixtral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi"}
    | {"phi3", "gpt2", "gpt_neo", "gpt_neox", "gptj", "opt", "falcon", "stablelm"}
)
"""Decoders, whose classifier is one matrix without a bias."""
_OWN_DENSE: Final = frozenset(
    {"roberta", "xlm-roberta", "camembert", "electra", "distilbert", "mpnet"}
)
"""Encoders whose classifier has a dense layer of its own, whatever the folder holds."""
_POOLER: Final = re.compile(r"(^|\.)pooler\.dense\.weight$")

# The names that architectures give to the same number, most common first.
_HIDDEN: Final = ("hidden_size", "n_embd", "d_model", "dim")
_INTERMEDIATE: Final = (
    "intermediate_size",
    "ffn_hidden_size",
    "ffn_dim",
    "n_inner",
    "d_ff",
    "hidden_dim",
)
_LAYERS: Final = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_HEADS: Final = ("num_attention_heads", "n_head", "n_heads", "num_heads")


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a header."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


def read_shapes(
    folder: Path,
    targets: tuple[str, ...],
    remembered: Path | None = None,
    *,
    headers_only: bool = False,
) -> ModelShapes:
    """Which matrices can be adapted, and the sizes that a plan's cost depends on.

    Args:
        folder: a base model in Hugging Face form.
        targets: `all-linear` for every weight matrix inside the transformer blocks that is
            neither norm nor embedding; or ends of such matrices' names, such as `q_proj`.
        remembered: folder for digests of large bases; see `base_digest`.
        headers_only: read no weights, so that the base's digest stays empty.

    Raises:
        ModelError: the folder cannot be read, a target matches nothing, or matches matrices that
            cannot be adapted.
    """
    config = read_json(folder / "config.json")
    _check_supported(folder, config)
    tensors = read_headers(folder)
    linear = _linear_matrices(tensors, config)
    if not linear:
        raise ModelError(
            f"model folder {folder} has no weight matrices in numbered blocks (layers.N., "
            "layer.N., h.N., blocks.N.), so none can be adapted"
        )
    matrices = _select(linear, targets)
    _refuse_experts(linear, matrices)
    text = config.get("text_config")
    sizes = {**config, **text} if isinstance(text, dict) else config
    parameters = sum(t.elements for t in tensors.values() if t.dtype in _FLOATING)
    largest = max(max(m.out_features, m.in_features) for m in linear)
    return ModelShapes(
        digest="" if headers_only else base_digest(folder, remembered),
        model_type=str(config.get("model_type", "unknown")),
        hidden_size=_number(folder, sizes, _HIDDEN),
        intermediate_size=_number(folder, sizes, _INTERMEDIATE, default=largest),
        layers=_number(folder, sizes, _LAYERS, default=max(m.layer for m in linear) + 1),
        attention_heads=_number(folder, sizes, _HEADS),
        vocabulary=_number(folder, sizes, ("vocab_size",)),
        matrices=matrices,
        other_parameters=parameters - sum(m.parameters for m in matrices),
        headers=header_digest(folder),
    )


def head_parameters(folder: Path, labels: int) -> int:
    """Parameters of the task head that a classifier gets on top of a base, from its config alone.

    As transformers builds it: a decoder has one matrix; an encoder a matrix with bias, behind a
    dense layer of the hidden size, which BERT's own folder holds as its pooler. An architecture
    that is not named here is taken to have both.

    Raises:
        ModelError: the folder cannot be read.
    """
    config = read_json(folder / "config.json")
    text = config.get("text_config")
    sizes = {**config, **text} if isinstance(text, dict) else config
    hidden = _number(folder, sizes, _HIDDEN)
    kind = str(config.get("model_type", ""))
    if kind in _PLAIN_HEADS:
        return labels * hidden
    held = any(_POOLER.search(name) for name in read_headers(folder))
    dense = 0 if held and kind not in _OWN_DENSE else hidden * hidden + hidden
    return dense + labels * hidden + labels


def linear_matrices(folder: Path) -> dict[str, MatrixShape]:
    """Every weight matrix inside the transformer blocks, by name, be it adapted or not.

    Raises:
        ModelError: the folder cannot be read.
    """
    found = _linear_matrices(read_headers(folder), read_json(folder / "config.json"))
    return {matrix.name: matrix for matrix in found}


def left_matrices(folder: Path, adapted: Iterable[MatrixShape]) -> tuple[str, ...]:
    """Names of the other tensors of two or more dimensions, such as embeddings.

    The number of a block is written N, so that each kind is named once.

    Raises:
        ModelError: the folder cannot be read.
    """
    names = {matrix.name for matrix in adapted}
    left = {
        name.removesuffix(".weight")
        for name, tensor in read_headers(folder).items()
        if len(tensor.shape) >= 2 and tensor.dtype in _FLOATING
    }
    return tuple(sorted({_INDEX.sub("N", name) for name in left - names}))


def read_headers(folder: Path) -> dict[str, TensorEntry]:
    """Every tensor of a model folder, by name.

    Raises:
        ModelError: a weight file is missing, cut off, or not safetensors.
    """
    tensors: dict[str, TensorEntry] = {}
    for file in weight_files(folder):
        tensors.update(read_header(file))
    return tensors


def read_header(file: Path) -> dict[str, TensorEntry]:
    """Every tensor of one safetensors file, by name.

    Raises:
        ModelError: the file cannot be read, is cut off, or not safetensors.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                raise ModelError(f"{file} is not a safetensors file, or cut off in its header")
            header = json.loads(stream.read(length).decode("utf-8"))
    except OSError as error:
        raise ModelError(f"{file} cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError):
        raise ModelError(f"{file} is not a safetensors file: its header is not JSON") from None
    if not isinstance(header, dict):
        raise ModelError(f"{file} is not a safetensors file: its header is not an object")
    header.pop("__metadata__", None)
    ends = [0]
    tensors = {name: _entry(file, name, value, ends) for name, value in header.items()}
    expected = 8 + length + max(ends)
    if size != expected:
        what = "cut off" if size < expected else "too long"
        raise ModelError(
            f"{file} is {what}: expected {expected} bytes, found {size}; download it again"
        )
    return tensors


def _entry(file: Path, name: str, value: object, ends: list[int]) -> TensorEntry:
    """One checked entry of a header; adds where its data ends to `ends`."""
    fields = value if isinstance(value, dict) else {}
    dtype, shape, place = (fields.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not (isinstance(dtype, str) and _are_counts(shape) and _are_counts(place)):
        raise ModelError(f"{file} is not a safetensors file: broken entry for {name!r}")
    if len(shape) > _MAX_DIMENSIONS or len(place) != 2:
        raise ModelError(f"{file} is not a safetensors file: broken entry for {name!r}")
    entry = TensorEntry(dtype, tuple(shape))
    width = _FLOATING.get(dtype)
    if width is not None and place[1] - place[0] != entry.elements * width:
        raise ModelError(f"{file}: {name!r} has not the bytes that its shape {shape} needs")
    ends.append(place[1])
    return entry


def _are_counts(values: object) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(type(v) is int and v >= 0 for v in values)


def _check_supported(folder: Path, config: Mapping[str, object]) -> None:
    if "quantization_config" in config:
        raise ModelError(
            f"the weights in {folder} are already quantised; take the full-precision model, "
            "which every device quantises for itself"
        )


def _linear_matrices(
    tensors: Mapping[str, TensorEntry], config: Mapping[str, object]
) -> tuple[MatrixShape, ...]:
    transposed = config.get("model_type") in _TRANSPOSED_TYPES
    matrices = []
    for name, tensor in tensors.items():
        block = _BLOCK.search(name)
        if block is None or not name.endswith(".weight") or _NOT_LINEAR.search(name):
            continue
        if len(tensor.shape) == 2 and tensor.dtype in _FLOATING:
            out_features, in_features = reversed(tensor.shape) if transposed else tensor.shape
            path = name.removesuffix(".weight")
            matrices.append(MatrixShape(path, out_features, in_features, int(block[1])))
    return tuple(sorted(matrices, key=lambda matrix: (matrix.layer, matrix.name)))


def block_of(name: str) -> int:
    """Index of the block that an adaptable matrix lies in, from 0."""
    block = _BLOCK.search(name)
    assert block is not None  # only matrices of blocks can be adapted
    return int(block[1])


def _select(linear: tuple[MatrixShape, ...], targets: Iterable[str]) -> tuple[MatrixShape, ...]:
    chosen: set[str] = set()
    for target in targets:
        matched = {m.name for m in linear if target == "all-linear" or _ends_in(m.name, target)}
        if not matched:
            raise ModelError(_no_match(linear, target))
        chosen |= matched
    return tuple(matrix for matrix in linear if matrix.name in chosen)


def _refuse_experts(linear: tuple[MatrixShape, ...], chosen: tuple[MatrixShape, ...]) -> None:
    experts = [matrix.name for matrix in chosen if is_expert(matrix.name)]
    if experts:
        plain = (m.name for m in linear if not is_expert(m.name) and not _ROUTER.search(m.name))
        ends = sorted({name.rsplit(".", 1)[-1] for name in plain})
        raise ModelError(
            f"lora.targets: {experts[0]} and {len(experts) - 1} others are matrices of experts, "
            "which are stacked when the model is loaded and cannot be adapted; name the others "
            f"instead: {', '.join(ends)}"
        )


def is_expert(name: str) -> bool:
    """Whether a matrix belongs to one of several experts of a block."""
    return _EXPERT.search(name) is not None


def _ends_in(name: str, end: str) -> bool:
    return f".{name}".endswith(f".{end}")


def _no_match(linear: tuple[MatrixShape, ...], target: str) -> str:
    # What follows the block's number, such as `self_attn.q_proj`: the same in every block.
    inside = sorted({_BLOCK.split(matrix.name)[-1] for matrix in linear})
    near = difflib.get_close_matches(
        target, {*inside, *(end.split(".")[-1] for end in inside)}, n=1
    )
    hint = f"did you mean {near[0]!r}? " if near else ""
    return (
        f"lora.targets: no matrix of the model has a name that ends in {target!r}; {hint}valid: "
        f"all-linear, {', '.join(inside)}"
    )


def _number(
    folder: Path, config: Mapping[str, object], names: tuple[str, ...], default: int = 0
) -> int:
    for name in names:
        value = config.get(name)
        if type(value) is int and value > 0:
            return value
    if default:
        return default
    raise ModelError(f"{folder / 'config.json'} has no {names[0]}; is it a text model's config?")
