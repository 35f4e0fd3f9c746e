"""Arithmetic, moved bytes and seconds of one optimiser step.

Seconds are products at the device's rate, and everything else as bytes at its bandwidth: weights
that are unpacked, and what happens number by number to activations and logits (norms, rotations,
exponentials). How many bytes the latter are worth was fitted to 19 plans on a CPU
(`benchmarks/plan_accuracy.py`), where exponentials and conversions cost more than memory does; for
an accelerator it is counted from what its fused kernels read and write. What is common to all of it
is left to calibration: one measured step says how a device's own rates relate to its probed ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from fedtune.plan.activations import block_activation_bytes
from fedtune.plan.load import Load
from fedtune.plan.weights import FLOAT_BYTES, form_bytes
from fedtune.records import DeviceProfile, MatrixForm, ModelShapes

LOGIT_BYTES = 25.0
"""Bytes of traffic that a logit's loss is worth on a CPU with C kernels: 1.2 ns at 20 GB/s. Plain
torch takes five times that."""
ACTIVATION_BYTES = {4: 34.0, 2: 140.0}
"""The same for each number that a block keeps, in each of its passes, by its own bytes: narrow ones
are widened for every step, and rounded again."""
ACCELERATOR_TOUCHES = {"logit": 5, "activation": 3}
"""How often an accelerator reads or writes each of those; counted, not measured."""


def step_flops(shapes: ModelShapes, load: Load, batch_size: int) -> float:
    """Floating-point operations of one optimiser step, a multiply-add counted as two.

    With T tokens, P parameters in matrices and P' of them at or above the first trained layer:
    2 P T forward, 2 P' T backward (the gradient of a frozen matrix is never formed), as much
    again as the forward of P' when checkpointing; the head alike; attention 4 T S hidden per
    block forward and twice that backward; a trained adapter element 6 T, a frozen one 4 T.
    """
    tokens = batch_size * load.sequence_length
    blocks = shapes.layers - load.first_trained_layer
    above = _parameters_above(shapes, load.first_trained_layer)
    forward = _forward_flops(shapes, load, tokens, _parameters_above(shapes, 0), shapes.layers)
    through = _forward_flops(shapes, load, tokens, above, blocks)
    attention = 4.0 * tokens * load.sequence_length * shapes.hidden_size * blocks
    head = 0.0
    if load.task == "causal-lm":
        head = 2.0 * tokens * shapes.hidden_size * shapes.vocabulary
    frozen = load.tail_elements + load.correction_elements
    adapters = tokens * (6.0 * load.trained_elements + 4.0 * frozen)
    recomputed = through if load.checkpointing else 0.0
    return forward + through + attention + recomputed + 2 * head + adapters


def moved_bytes(
    shapes: ModelShapes, forms: Mapping[str, MatrixForm], load: Load, batch_size: int
) -> float:
    """Bytes of weights that one optimiser step moves through memory.

    Each pass reads every matrix once: forward, backward from the first trained layer up, and a
    second forward there when checkpointing. A packed matrix is read, written unpacked, and read
    again. Each micro-batch pays this anew; so larger ones are faster.
    """
    passes = 3 if load.checkpointing else 2
    total = 0.0
    for matrix in shapes.matrices:
        form = forms[matrix.name]
        held_so = form.format == "fp32" and load.itemsize == FLOAT_BYTES
        unpacked = 0 if held_so else 2 * load.itemsize * matrix.parameters
        once = form_bytes(matrix, form) + unpacked
        total += once * (passes if matrix.layer >= load.first_trained_layer else 1)
    return total * (batch_size / load.micro_batch)


def touched_bytes(shapes: ModelShapes, load: Load, batch_size: int) -> float:
    """What a step does number by number, as bytes of traffic: see the head of this file."""
    size = load.itemsize
    per_logit, per_number = LOGIT_BYTES, ACTIVATION_BYTES[size]
    if load.whole_matrices:
        per_logit = float(size * ACCELERATOR_TOUCHES["logit"])
        per_number = float(size * ACCELERATOR_TOUCHES["activation"])
    tokens = batch_size * load.sequence_length
    numbers = block_activation_bytes(shapes, load) / (size * load.tokens)
    logits = tokens * shapes.vocabulary if load.task == "causal-lm" else 0
    return per_logit * logits + per_number * tokens * numbers * block_passes(shapes, load)


def block_passes(shapes: ModelShapes, load: Load) -> int:
    """Passes through a block in a micro-batch: forward, twice that backward, forward again."""
    trained = shapes.layers - load.first_trained_layer
    return shapes.layers + (3 if load.checkpointing else 2) * trained


def step_seconds(
    profile: DeviceProfile,
    shapes: ModelShapes,
    forms: Mapping[str, MatrixForm],
    load: Load,
    batch_size: int,
    *,
    sample_tokens: float = 0.0,
    block_seconds: float = 0.0,
) -> float:
    """Seconds of one optimiser step: arithmetic plus traffic, taken not to overlap.

    The rate is that of the products' dtype, or of float32 where a device does not report it; one
    that it does not report at all contributes nothing.

    Args:
        sample_tokens: mean length of the site's samples; 0: all are of full length.
        block_seconds: time of a block's pass over next to nothing (`CostCalibration`): what the
            host takes to call it.
    """
    if 0 < sample_tokens < load.sequence_length:
        load = replace(load, sequence_length=max(1, round(sample_tokens)))
    rates = profile.matmul_flops_per_s
    flops_per_s = rates.get("fp32", max(rates.values(), default=0.0))
    if load.itemsize != FLOAT_BYTES:
        dtype = profile.compute if profile.compute in ("bf16", "fp16") else "bf16"
        flops_per_s = rates.get(dtype, flops_per_s)
    seconds = block_seconds * block_passes(shapes, load) * (batch_size / load.micro_batch)
    if flops_per_s > 0:
        seconds += step_flops(shapes, load, batch_size) / flops_per_s
    if profile.memory_bandwidth_bytes_per_s > 0:
        moved = moved_bytes(shapes, forms, load, batch_size)
        moved += touched_bytes(shapes, load, batch_size)
        seconds += moved / profile.memory_bandwidth_bytes_per_s
    return seconds


def _parameters_above(shapes: ModelShapes, layer: int) -> float:
    """Parameters of all linear matrices at or above a layer, adapted or not.

    Those that may not be adapted are among the other parameters: all beyond one embedding table,
    taken as spread evenly over the layers. Where the adapted ones make up whole blocks there are
    none, and what is beyond the table is an output matrix of its own, which the head counts.
    """
    adaptable = sum(matrix.parameters for matrix in shapes.matrices if matrix.layer >= layer)
    if _adapts_whole_blocks(shapes):
        return adaptable
    rest = max(0, shapes.other_parameters - shapes.vocabulary * shapes.hidden_size)
    return adaptable + rest * (shapes.layers - layer) / shapes.layers


def _adapts_whole_blocks(shapes: ModelShapes) -> bool:
    """Whether the matrices are as many as a block has at least: q and o, and two of the MLP."""
    hidden, wide = shapes.hidden_size, shapes.intermediate_size
    least = shapes.layers * (2 * hidden * hidden + 2 * hidden * wide)
    return sum(matrix.parameters for matrix in shapes.matrices) >= least


def _forward_flops(
    shapes: ModelShapes, load: Load, tokens: int, parameters: float, blocks: int
) -> float:
    attention = 4.0 * tokens * load.sequence_length * shapes.hidden_size * blocks
    return 2.0 * parameters * tokens + attention
