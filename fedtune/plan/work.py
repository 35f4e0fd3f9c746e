"""Arithmetic, moved bytes and seconds of one optimiser step."""

from __future__ import annotations

from collections.abc import Mapping

from fedtune.plan.load import Load
from fedtune.plan.weights import FLOAT_BYTES, form_bytes
from fedtune.records import DeviceProfile, MatrixForm, ModelShapes


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


def step_seconds(
    profile: DeviceProfile,
    shapes: ModelShapes,
    forms: Mapping[str, MatrixForm],
    load: Load,
    batch_size: int,
) -> float:
    """Seconds of one optimiser step: arithmetic plus weight traffic, taken not to overlap.

    The rate is that of the products' dtype, or of float32 where a device does not report it; one
    that it does not report at all contributes nothing.
    """
    rates = profile.matmul_flops_per_s
    flops_per_s = rates.get("fp32", max(rates.values(), default=0.0))
    if load.itemsize != FLOAT_BYTES:
        flops_per_s = rates.get("bf16", flops_per_s)
    seconds = 0.0
    if flops_per_s > 0:
        seconds += step_flops(shapes, load, batch_size) / flops_per_s
    if profile.memory_bandwidth_bytes_per_s > 0:
        moved = moved_bytes(shapes, forms, load, batch_size)
        seconds += moved / profile.memory_bandwidth_bytes_per_s
    return seconds


def _parameters_above(shapes: ModelShapes, layer: int) -> float:
    """Parameters of all linear matrices at or above a layer, adapted or not.

    Those that may not be adapted are among the other parameters: all beyond one embedding table,
    taken as spread evenly over the layers.
    """
    adaptable = sum(matrix.parameters for matrix in shapes.matrices if matrix.layer >= layer)
    rest = max(0, shapes.other_parameters - shapes.vocabulary * shapes.hidden_size)
    return adaptable + rest * (shapes.layers - layer) / shapes.layers


def _forward_flops(
    shapes: ModelShapes, load: Load, tokens: int, parameters: float, blocks: int
) -> float:
    attention = 4.0 * tokens * load.sequence_length * shapes.hidden_size * blocks
    return 2.0 * parameters * tokens + attention
