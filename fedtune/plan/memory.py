"""The peak of a training process, part by part.

Counted is what a round takes on top of the process that is ready for it (`fedtune.train.idle`): the
tensors of its peak, in the allocator's settings (`fedtune.train.allocator`). Of the base's files,
whose pages are mapped, only those count that stay: the rest goes whenever memory is short. On a CPU
the round's message lies beside it all (`fedtune.plan.traffic.message_bytes`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

from fedtune.plan.activations import activation_bytes, transient_bytes
from fedtune.plan.load import Load
from fedtune.plan.weights import (
    CORRECTION_BYTES,
    FLOAT_BYTES,
    backbone_bytes,
    ceil_div,
    other_bytes,
)
from fedtune.records import BLOCK_BITS, MatrixForm, MatrixShape, ModelShapes

PANEL_ROWS = 256
"""Of which a panel on a CPU has a multiple (`fedtune.quant.panels`)."""
PANEL_WEIGHTS = 1 << 20
"""Weights that a product unpacks at a time on a CPU (`fedtune.lora.linear`)."""
UNPACK_CHUNK = 1 << 19
"""Weights whose indices are held at once while they are unpacked (`fedtune.kernels.unpack`)."""
MOMENTS = 2
"""Numbers that AdamW keeps of each that is trained."""
PACKING_CHUNK = 1 << 18
"""Weights that are quantised at a time (`fedtune.quant.quantise`)."""
PACKING_BYTES = 24
"""Bytes per weight of that chunk; measured: 14 at one codebook, 22 where two are compared."""
FITTING_BYTES = 18
"""Bytes per weight while a matrix and its pair are fitted to each other: four dense float32 and
what quantising takes (measured 16.3 to 16.7 above a shorter side of 512, up to it 22 to 30)."""
FITTING_BYTES_SMALL = 31
FITTING_SIDE = 512
"""Up to this shorter side singular values are computed exactly (`fedtune.quant.correction`)."""


@dataclass(frozen=True, slots=True)
class PeakBytes:
    """Where the memory of a training process is at its peak, in bytes.

    Attributes:
        backbone: packed matrices.
        correction: frozen pairs that repair what the packed matrices lost.
        other: embeddings, norms and biases.
        adapter: trained factors and frozen tail.
        optimiser: gradients, AdamW's moments, and for FedProx what the round started from.
        activations: what the forward pass keeps for the backward pass.
        transient: the larger of the head's pass and of one block's backward pass, which take
            turns.
        workspace: what is unpacked of a matrix at a time.
    """

    backbone: int
    correction: int
    other: int
    adapter: int
    optimiser: int
    activations: int
    transient: int
    workspace: int

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))

    def largest(self) -> tuple[str, int]:
        """The part that takes most, and its bytes."""
        parts = {field.name: int(getattr(self, field.name)) for field in fields(self)}
        name = max(parts, key=parts.__getitem__)
        return name, parts[name]


def adapter_bytes(load: Load) -> int:
    """Bytes of trained and frozen factors and of parameters trained whole."""
    return FLOAT_BYTES * (load.trained_elements + load.dense_parameters + load.tail_elements)


def optimiser_bytes(load: Load) -> int:
    """Bytes of gradients, AdamW's moments and kept starts: float32 whatever the products are in."""
    numbers = 1 + MOMENTS + load.keeps_start
    return FLOAT_BYTES * numbers * (load.trained_elements + load.dense_parameters)


def workspace_bytes(
    shapes: ModelShapes,
    forms: Mapping[str, MatrixForm],
    whole_matrices: bool = False,
    itemsize: int = FLOAT_BYTES,
) -> int:
    """Bytes of the largest panel that a product unpacks, with what unpacking takes.

    Args:
        whole_matrices: whether a panel is the whole matrix, as on an accelerator.
        itemsize: bytes of one number of the product.
    """
    largest = 0
    for matrix in shapes.matrices:
        format_name = forms[matrix.name].format
        if format_name == "fp32" and itemsize == FLOAT_BYTES:
            continue
        rows = matrix.out_features
        if not whole_matrices and not format_name.startswith("bnb-"):
            rows = min(rows, _panel_rows(matrix.in_features))
        panel = rows * matrix.in_features
        chunk = min(panel, UNPACK_CHUNK)
        # Four bytes per index, which stands for 8 / bits weights, and for two at 8 bits.
        scratch = chunk * min(BLOCK_BITS.get(format_name, 0), 4) // 2
        if itemsize != FLOAT_BYTES and format_name in BLOCK_BITS:
            scratch += FLOAT_BYTES * chunk
        if whole_matrices:
            scratch = 0  # one launch
        largest = max(largest, itemsize * panel + scratch)
    return largest


def _panel_rows(columns: int) -> int:
    return ceil_div(PANEL_WEIGHTS // columns or 1, PANEL_ROWS) * PANEL_ROWS


def dense_block_bytes(shapes: ModelShapes, load: Load) -> int:
    """Bytes of one block's matrices, which an accelerator keeps dense while it recomputes it."""
    if not (load.checkpointing and load.whole_matrices):
        return 0
    by_layer: dict[int, int] = {}
    for matrix in shapes.matrices:
        by_layer[matrix.layer] = by_layer.get(matrix.layer, 0) + matrix.parameters
    return load.itemsize * max(by_layer.values(), default=0)


def loading_bytes(shapes: ModelShapes, forms: Mapping[str, MatrixForm]) -> int:
    """Most bytes that bringing one matrix into its form takes, beside the result and the file.

    Without a pair that is a chunk of some megabytes, and less than a step takes afterwards; with
    one, several dense copies. Not a part of `peak_bytes`: training has not begun.
    """
    return max((_packing_bytes(m, forms[m.name]) for m in shapes.matrices), default=0)


def _packing_bytes(matrix: MatrixShape, form: MatrixForm) -> int:
    if form.correction_rank:
        small = min(matrix.out_features, matrix.in_features) <= FITTING_SIDE
        return matrix.parameters * (FITTING_BYTES_SMALL if small else FITTING_BYTES)
    if form.format in BLOCK_BITS:
        return PACKING_BYTES * min(matrix.parameters, PACKING_CHUNK) + matrix.parameters // 2
    return 0


def peak_bytes(shapes: ModelShapes, forms: Mapping[str, MatrixForm], load: Load) -> PeakBytes:
    """The peak of a training process beyond what it uses when idle, part by part."""
    return PeakBytes(
        backbone=backbone_bytes(shapes, forms),
        correction=CORRECTION_BYTES * load.correction_elements,
        other=other_bytes(shapes, load.itemsize),
        adapter=adapter_bytes(load),
        optimiser=optimiser_bytes(load),
        activations=activation_bytes(shapes, load),
        transient=transient_bytes(shapes, load),
        workspace=max(
            workspace_bytes(shapes, forms, load.whole_matrices, load.itemsize),
            dense_block_bytes(shapes, load),
        ),
    )
