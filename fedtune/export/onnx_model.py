"""The merged model as ONNX, for runtimes without Python or torch.

The graph takes `input_ids` and `attention_mask` (both int64, batch x sequence, both free) and
gives `logits` in float32: one pass over a whole sequence, without a key-value cache. What is
written has been run by onnxruntime against torch first, in shapes other than the traced ones.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from fedtune.errors import MissingExtraError, ModelError
from fedtune.model.load import load_base
from fedtune.records import TaskName

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOLERANCE = 1e-4
"""Largest allowed difference of a logit, per unit of the largest logit or 1: float32 rounding in
another order of operations stays ten times below it on the models of the tests."""

_TRACED = (2, 9)
_CHECKED = ((1, 5), (3, 12))
_INPUTS = ("input_ids", "attention_mask")


def write_onnx(merged: Path, task: TaskName, labels: Sequence[str], folder: Path) -> Path:
    """Write `model.onnx`, and `model.onnx.data` beside it when the weights exceed 2 GB.

    Args:
        merged: folder that `write_merged` wrote.
        labels: class names in the order of their indices; empty for language modelling.
        folder: is created when missing.

    Returns:
        The path of `model.onnx`.

    Raises:
        MissingExtraError: onnx, onnxscript or onnxruntime is not installed.
        ModelError: torch cannot export this architecture, or onnxruntime disagrees with torch.
    """
    for package in ("onnx", "onnxscript", "onnxruntime"):
        _require(package)
    model = _LogitsOnly(load_base(merged, task, labels, torch.float32), task)
    model.eval()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "model.onnx"
    try:
        with _quiet_export(), torch.no_grad():
            program = torch.onnx.export(
                model,
                _example(model, _TRACED),
                dynamo=True,
                input_names=list(_INPUTS),
                output_names=["logits"],
                dynamic_shapes={name: {0: "batch", 1: "sequence"} for name in _INPUTS},
                verbose=False,
            )
            assert program is not None
            program.save(path)
    except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
        line = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise ModelError(
            f"torch.onnx cannot export {type(model.model).__name__}: {line[:300]}"
        ) from error
    for shape in _CHECKED:
        _check_against_torch(path, model, shape)
    return path


class _LogitsOnly(nn.Module):
    """A transformers model as a function of two tensors to one."""

    def __init__(self, model: PreTrainedModel, task: TaskName) -> None:
        super().__init__()
        self.model = model
        self._options = {"use_cache": False} if task == "causal-lm" else {}

    def forward(
        self,
        input_ids: Int[Tensor, "batch sequence"],
        attention_mask: Int[Tensor, "batch sequence"],
    ) -> Float[Tensor, "batch ..."]:
        output = self.model(input_ids=input_ids, attention_mask=attention_mask, **self._options)
        return cast(Tensor, output.logits)


def _example(model: _LogitsOnly, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Token ids that spread over the vocabulary, with the last row padded on the right."""
    vocabulary = int(model.model.config.get_text_config().vocab_size)
    batch, sequence = shape
    ids = (torch.arange(batch * sequence).reshape(shape) * 7919) % vocabulary
    mask = torch.ones(shape, dtype=torch.long)
    if batch > 1:
        padding = sequence // 3
        mask[-1, -padding:] = 0
        ids[-1, -padding:] = int(model.model.config.get_text_config().pad_token_id or 0)
    return ids, mask


def _check_against_torch(path: Path, model: _LogitsOnly, shape: tuple[int, int]) -> None:
    """Compare onnxruntime's logits with torch's at all positions that are not padding.

    Raises:
        ModelError: a logit differs by more than the tolerance.
    """
    import onnxruntime

    ids, mask = _example(model, shape)
    with torch.no_grad():
        expected = model(ids, mask).numpy()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
    if expected.ndim == 3:
        visible = mask.numpy().astype(bool)
        expected, found = expected[visible], found[visible]
    difference = float(np.abs(found - expected).max())
    limit = TOLERANCE * max(1.0, float(np.abs(expected).max()))
    if not difference <= limit:
        raise ModelError(
            f"the ONNX graph of {type(model.model).__name__} gives other logits than torch for a "
            f"batch of {shape[0]}x{shape[1]} tokens: they differ by {difference:.2g}, allowed is "
            f"{limit:.2g}"
        )


def _require(package: str) -> None:
    try:
        __import__(package)
    except ImportError:
        raise MissingExtraError(package, "export", "writing ONNX") from None


@contextmanager
def _quiet_export() -> Iterator[None]:
    """Silence what torch's exporter says of itself: none of it is about the user's model."""
    registration = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = registration.level
    registration.setLevel(logging.ERROR)  # it lists torchvision operators it does without
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r".*LeafSpec.* is deprecated", FutureWarning)
            warnings.filterwarnings("ignore", r".*The axis name: .* will not be used", UserWarning)
            yield
    finally:
        registration.setLevel(level)
