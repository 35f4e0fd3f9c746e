"""A stored matrix and the pair that repairs it, kept together until a layer takes both."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from fedtune.quant.correction import Pair, store_corrected
from fedtune.quant.storage import StoredMatrix, restore
from fedtune.records import FormatName, MatrixForm

_A, _B = "correction_a", "correction_b"


@dataclass(frozen=True, slots=True)
class RepairedMatrix:
    """W ~ matrix + pair.b @ pair.a."""

    matrix: StoredMatrix
    pair: Pair

    @property
    def format(self) -> FormatName:
        return self.matrix.format

    @property
    def shape(self) -> tuple[int, int]:
        return self.matrix.shape

    @property
    def bytes(self) -> int:
        return self.matrix.bytes + self.pair.bytes

    def to(self, device: torch.device) -> RepairedMatrix:
        pair = Pair(self.pair.a.to(device), self.pair.b.to(device))
        return RepairedMatrix(self.matrix.to(device), pair)

    def tensors(self) -> dict[str, Tensor]:
        return {**self.matrix.tensors(), _A: self.pair.a, _B: self.pair.b}

    def metadata(self) -> dict[str, str]:
        return self.matrix.metadata()


HeldMatrix: TypeAlias = StoredMatrix | RepairedMatrix


def hold(weight: Float[Tensor, "out in"], form: MatrixForm) -> HeldMatrix:
    """A matrix in its form, with the pair that the form asks for.

    Raises:
        MissingExtraError: the format needs bitsandbytes and it is not installed.
        ModelError: the block size is not known, or a weight does not fit the format.
    """
    stored, pair = store_corrected(weight, form)
    return stored if pair is None else RepairedMatrix(stored, pair)


def restore_held(
    form: MatrixForm,
    shape: tuple[int, int],
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
) -> HeldMatrix:
    """What gave these `tensors()` and `metadata()` in that form, as `restore` does.

    Raises:
        KeyError: a part is missing.
    """
    parts = {name: tensor for name, tensor in tensors.items() if name not in (_A, _B)}
    stored = restore(form.format, shape, parts, metadata)
    if form.correction_rank == 0:
        return stored
    return RepairedMatrix(stored, Pair(tensors[_A], tensors[_B]))
