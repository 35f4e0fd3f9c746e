"""How a frozen weight matrix is held, and how its values come back for a product.

Every format is a class with one small interface (`fedtune.lora.linear.FrozenMatrix`): `panels`
gives the dense values some rows at a time in a workspace that is reused, `values` all of them at
once, `bytes` says what the storage keeps, and `tensors` with `metadata` what `restore` needs.
The matrix product itself lives in `fedtune.lora.linear`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

from jaxtyping import Float
from torch import Tensor

from fedtune.quant.block import BLOCK_FORMATS, BlockMatrix, restore_block, store_block
from fedtune.quant.bnb import (
    BnbInt8,
    BnbNf4,
    restore_bnb_int8,
    restore_bnb_nf4,
    store_bnb_int8,
    store_bnb_nf4,
)
from fedtune.quant.dense import (
    DenseMatrix,
    Int8Matrix,
    restore_dense,
    restore_int8,
    store_dense,
    store_int8,
)
from fedtune.records import FormatName, MatrixForm

StoredMatrix: TypeAlias = DenseMatrix | Int8Matrix | BlockMatrix | BnbInt8 | BnbNf4


def store(weight: Float[Tensor, "out in"], form: MatrixForm) -> StoredMatrix:
    """Hold a weight matrix in a form; its correction rank is no matter of the storage.

    Raises:
        MissingExtraError: the format needs bitsandbytes and it is not installed.
        ModelError: the block size is not known, or a weight does not fit the format.
    """
    if form.format in BLOCK_FORMATS:
        return store_block(weight, form)
    match form.format:
        case "int8":
            return store_int8(weight)
        case "bnb-int8":
            return store_bnb_int8(weight)
        case "bnb-nf4":
            return store_bnb_nf4(weight)
    return store_dense(weight, form.format)


def restore(
    format_name: FormatName,
    shape: tuple[int, int],
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
) -> StoredMatrix:
    """The matrix that gave these `tensors()` and `metadata()`.

    The tensors are used as they are, without a copy: they may be mapped from a file. Whoever reads
    a file checks its digest first.

    Raises:
        KeyError: a part is missing.
        MissingExtraError: as for `store`.
    """
    if format_name in BLOCK_FORMATS:
        return restore_block(format_name, shape, tensors, metadata)
    match format_name:
        case "int8":
            return restore_int8(tensors)
        case "bnb-int8":
            return restore_bnb_int8(tensors)
        case "bnb-nf4":
            return restore_bnb_nf4(shape, tensors)
    return restore_dense(format_name, tensors)
