"""Closed-form predictions of memory, work and traffic, each from the shapes of a model.

The formulas describe `fedtune.train.round` on a transformer with pre-normalised blocks: frozen
matrices in a packed format, activations in the dtype of the products, adapters in float32, AdamW,
logits on the rows that carry loss, a chunk at a time. `docs/training.md` says what a block keeps.
Where a model differs, the prediction is meant to err to the safe side; a test holds it between the
tensors of a real round and a quarter more. The interpreter and its libraries are not counted: a
budget is what training may use on top (`fedtune.train.idle` measures the rest).

The parts are in files of their own: `load` (what a plan comes down to), `weights`, `activations`
and `memory`, `work`, `traffic`; `calibration` corrects them by measured steps.
"""

from __future__ import annotations

from fedtune.plan.activations import (
    FEWEST_LOGIT_ROWS,
    FUSED,
    LOGIT_CHUNK_BYTES,
    ROW_BYTES,
    activation_bytes,
    adapter_activation_bytes,
    block_activation_bytes,
    block_gradient_bytes,
    factor_stack_bytes,
    head_bytes,
    logit_rows,
    transient_bytes,
)
from fedtune.plan.load import Load, load_of_plan
from fedtune.plan.memory import (
    PANEL_ROWS,
    PANEL_WEIGHTS,
    UNPACK_CHUNK,
    PeakBytes,
    adapter_bytes,
    dense_block_bytes,
    loading_bytes,
    optimiser_bytes,
    peak_bytes,
    workspace_bytes,
)
from fedtune.plan.traffic import download_bytes, message_bytes, transfer_seconds, upload_bytes
from fedtune.plan.weights import (
    CORRECTION_BYTES,
    CORRECTION_ITEMSIZE,
    FLOAT_BYTES,
    GROUP,
    SUPERBLOCK,
    backbone_bytes,
    correction_elements,
    correction_rank,
    form_bytes,
    matrix_bytes,
    other_bytes,
    pair_bytes,
)
from fedtune.plan.work import block_passes, moved_bytes, step_flops, step_seconds, touched_bytes

__all__ = [
    "CORRECTION_BYTES",
    "CORRECTION_ITEMSIZE",
    "FEWEST_LOGIT_ROWS",
    "FLOAT_BYTES",
    "FUSED",
    "GROUP",
    "LOGIT_CHUNK_BYTES",
    "PANEL_ROWS",
    "PANEL_WEIGHTS",
    "ROW_BYTES",
    "SUPERBLOCK",
    "UNPACK_CHUNK",
    "Load",
    "PeakBytes",
    "activation_bytes",
    "adapter_activation_bytes",
    "adapter_bytes",
    "backbone_bytes",
    "block_activation_bytes",
    "block_gradient_bytes",
    "block_passes",
    "correction_elements",
    "correction_rank",
    "dense_block_bytes",
    "download_bytes",
    "factor_stack_bytes",
    "form_bytes",
    "head_bytes",
    "load_of_plan",
    "loading_bytes",
    "logit_rows",
    "matrix_bytes",
    "message_bytes",
    "moved_bytes",
    "optimiser_bytes",
    "other_bytes",
    "pair_bytes",
    "peak_bytes",
    "step_flops",
    "step_seconds",
    "touched_bytes",
    "transfer_seconds",
    "transient_bytes",
    "upload_bytes",
    "workspace_bytes",
]
