"""Bytes of what is held of the base: packed matrices, the pairs that repair them, the rest."""

from __future__ import annotations

from collections.abc import Mapping

from fedtune.records import (
    BLOCK_BITS,
    DEFAULT_BLOCK,
    FormatName,
    MatrixForm,
    MatrixShape,
    ModelShapes,
)

FLOAT_BYTES = 4
GROUP = 256
"""Weights to which a block-quantised matrix is padded; so `fedtune.kernels.packed` lays it out."""
SUPERBLOCK = 256
"""Scales that share one float32 step (the same layout)."""
CORRECTION_ITEMSIZE = 2
"""Bytes of one number of a frozen pair, which is held in float16."""
CORRECTION_BYTES = CORRECTION_ITEMSIZE + FLOAT_BYTES
"""The same with the copy in float32 that stands beside the layer's other factors."""


def matrix_bytes(matrix: MatrixShape, format_name: FormatName, block_size: int = 0) -> int:
    """Bytes that one packed matrix keeps.

    int8 has a float32 scale per row. A block format has its bits per weight, an 8-bit scale per
    block, a float32 step per 256 of those and one offset: nf4 at block 64 takes
    4 + 8/64 + 32/(64*256) = 4.127 bits per weight.

    Args:
        block_size: of a block format; 0: 64.
    """
    parameters = matrix.parameters
    match format_name:
        case "fp32":
            return FLOAT_BYTES * parameters
        case "bf16" | "fp16":
            return 2 * parameters
        case "int8" | "bnb-int8":
            return parameters + FLOAT_BYTES * matrix.out_features
        case "bnb-nf4":
            blocks = ceil_div(parameters, DEFAULT_BLOCK)
            scales = blocks + FLOAT_BYTES * ceil_div(blocks, SUPERBLOCK)
            return ceil_div(parameters, 2) + scales
        case _:
            row = ceil_div(parameters, GROUP) * GROUP
            blocks = row // (block_size or DEFAULT_BLOCK)
            scales = blocks + FLOAT_BYTES * (ceil_div(blocks, SUPERBLOCK) + 1)
            return row * BLOCK_BITS[format_name] // 8 + scales


def backbone_bytes(shapes: ModelShapes, forms: Mapping[str, MatrixForm]) -> int:
    """Bytes of all packed matrices; `forms` has one form per matrix name."""
    return sum(form_bytes(matrix, forms[matrix.name]) for matrix in shapes.matrices)


def form_bytes(matrix: MatrixShape, form: MatrixForm) -> int:
    """Bytes of one packed matrix, without the pair that repairs it."""
    return matrix_bytes(matrix, form.format, form.block_size)


def correction_rank(matrix: MatrixShape, form: MatrixForm) -> int:
    """Rank of the pair that repairs a matrix; no more than the matrix can have."""
    return min(form.correction_rank, matrix.out_features, matrix.in_features)


def correction_elements(matrix: MatrixShape, form: MatrixForm) -> int:
    """Numbers in the pair that repairs a matrix."""
    return correction_rank(matrix, form) * (matrix.out_features + matrix.in_features)


def pair_bytes(matrix: MatrixShape, form: MatrixForm) -> int:
    """Bytes of the pair that repairs a matrix."""
    return CORRECTION_BYTES * correction_elements(matrix, form)


def other_bytes(shapes: ModelShapes, itemsize: int = FLOAT_BYTES) -> int:
    """Bytes of the parameters outside the packed matrices, held in the dtype of the products."""
    return itemsize * shapes.other_parameters


def ceil_div(numerator: int, denominator: int) -> int:
    return -(-numerator // denominator)
