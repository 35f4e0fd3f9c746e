"""Closed-form predictions of memory, work and traffic, each from the shapes of a model.

The formulas describe `fedtune.train.round` on a transformer with pre-normalised blocks: frozen
matrices in a packed format, activations and adapters in float32, AdamW, logits on the rows that
carry loss. Where a model differs, the prediction is meant to err to the safe side; a test holds it
between the tensors of a real round and a quarter more. The interpreter and its libraries, and what
the allocator keeps beyond tensors, are not counted: a budget is what training may use on top.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

from fedtune.records import (
    BLOCK_BITS,
    DEFAULT_BLOCK,
    DeviceProfile,
    FormatName,
    MatrixForm,
    MatrixShape,
    ModelShapes,
    TaskName,
)

FLOAT_BYTES = 4
GROUP = 256
"""Weights to which a block-quantised matrix is padded; so `fedtune.kernels.packed` lays it out."""
SUPERBLOCK = 256
"""Scales that share one float32 step (the same layout)."""
PANEL_ROWS = 256
"""Rows that a product unpacks at a time on a CPU (`fedtune.quant.panels`)."""
UNPACK_CHUNK = 1 << 19
"""Weights whose indices are held at once while they are unpacked (`fedtune.kernels.unpack`)."""
CORRECTION_ITEMSIZE = 2
"""Bytes of one number of a frozen pair, which is held in float16."""
CORRECTION_BYTES = CORRECTION_ITEMSIZE + FLOAT_BYTES
"""The same with the copy in float32 that stands beside the layer's other factors."""
TRAINED_COPIES = 4
"""Value, gradient and the two moments of AdamW."""

_UNGATED = frozenset({"bert", "roberta", "distilbert", "electra", "gpt2", "gpt_neox", "opt", "phi"})
"""Model types whose feed-forward part is two matrices; others are taken to have a gate."""


@dataclass(frozen=True, slots=True)
class Load:
    """What one device computes in a step, summed over its matrices.

    Attributes:
        first_trained_layer: the backward pass stops below it.
        trained_elements: sum of rank * (out + in).
        trained_ranks: sum of ranks.
        tail_elements: as `trained_elements`, of the frozen tail.
        tail_ranks: as `trained_ranks`, of the frozen tail.
        correction_elements: as `trained_elements`, of the pairs that repair the forms' errors.
        dense_parameters: parameters that are trained whole.
        whole_matrices: a product unpacks a whole matrix, as on an accelerator, not a panel of it.
    """

    micro_batch: int
    sequence_length: int
    checkpointing: bool = False
    first_trained_layer: int = 0
    trained_elements: int = 0
    trained_ranks: int = 0
    tail_elements: int = 0
    tail_ranks: int = 0
    correction_elements: int = 0
    dense_parameters: int = 0
    task: TaskName = "causal-lm"
    eager_attention: bool = False
    whole_matrices: bool = False

    @property
    def tokens(self) -> int:
        """Tokens of one forward pass, padding included."""
        return self.micro_batch * self.sequence_length


@dataclass(frozen=True, slots=True)
class PeakBytes:
    """Where the memory of a training process is at its peak, in bytes.

    Attributes:
        backbone: packed matrices.
        correction: frozen pairs that repair what the packed matrices lost.
        other: embeddings, norms and biases.
        adapter: trained factors with gradients and optimiser state, and the frozen tail.
        activations: what the forward pass keeps for the backward pass.
        transient: the larger of the logits and of one block's backward pass, which take turns.
        workspace: what is unpacked of a matrix at a time.
    """

    backbone: int
    correction: int
    other: int
    adapter: int
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


# ---------------------------------------------------------------- memory


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
            blocks = _ceil_div(parameters, DEFAULT_BLOCK)
            scales = blocks + FLOAT_BYTES * _ceil_div(blocks, SUPERBLOCK)
            return _ceil_div(parameters, 2) + scales
        case _:
            row = _ceil_div(parameters, GROUP) * GROUP
            blocks = row // (block_size or DEFAULT_BLOCK)
            scales = blocks + FLOAT_BYTES * (_ceil_div(blocks, SUPERBLOCK) + 1)
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


def other_bytes(shapes: ModelShapes) -> int:
    """Bytes of the parameters outside the packed matrices, held in float32."""
    return FLOAT_BYTES * shapes.other_parameters


def adapter_bytes(load: Load) -> int:
    """Bytes of trained numbers with gradient and AdamW state, plus the tail's values."""
    trained = load.trained_elements + load.dense_parameters
    return FLOAT_BYTES * (TRAINED_COPIES * trained + load.tail_elements)


def block_activation_bytes(shapes: ModelShapes, load: Load) -> int:
    """Bytes that one transformer block keeps for its backward pass, without adapters.

    Per token, in numbers of float32: 9 hidden (input of each norm and its result, query, key and
    value as attention takes them, its result, and that result as the output matrix takes it) and
    4 intermediate (gate before and after its activation, up, their product; 2 without a gate).
    Eager attention also keeps heads * sequence scores and as many probabilities.
    """
    intermediate = 2 if shapes.model_type in _UNGATED else 4
    per_token = 9 * shapes.hidden_size + intermediate * shapes.intermediate_size
    if load.eager_attention:
        per_token += 2 * shapes.attention_heads * load.sequence_length
    return FLOAT_BYTES * load.tokens * per_token


def adapter_activation_bytes(load: Load) -> int:
    """Bytes that the adapters keep for the backward pass, over all matrices.

    One number per rank and token, and the trained and frozen factors side by side.
    """
    ranks = load.trained_ranks + load.tail_ranks
    return FLOAT_BYTES * (load.tokens * ranks + load.trained_elements + load.tail_elements)


def activation_bytes(shapes: ModelShapes, load: Load) -> int:
    """Bytes kept from the forward pass until the backward pass of the blocks begins.

    Without checkpointing: all of every block from the first trained one up. With it: only the
    input of each of those blocks.
    """
    blocks = shapes.layers - load.first_trained_layer
    if load.checkpointing:
        return FLOAT_BYTES * load.tokens * shapes.hidden_size * blocks
    return blocks * block_activation_bytes(shapes, load) + adapter_activation_bytes(load)


def transient_bytes(shapes: ModelShapes, load: Load) -> int:
    """Bytes of the larger of two that take turns: the logits, and one block's backward pass.

    With checkpointing the latter holds the block's activations too, as it recomputes them; its
    adapters are taken to be twice the mean block's, because ranks differ between blocks.
    """
    block = block_gradient_bytes(shapes, load)
    if load.checkpointing:
        adapters = adapter_activation_bytes(load)
        block += block_activation_bytes(shapes, load) + min(adapters, 2 * adapters // shapes.layers)
    return max(logits_bytes(shapes, load), block)


def logits_bytes(shapes: ModelShapes, load: Load) -> int:
    """Bytes of logits, log-probabilities and their gradient, if every row carries loss.

    A classifier has one row per sample and few columns: nothing next to a block.
    """
    if load.task != "causal-lm":
        return 0
    return 3 * FLOAT_BYTES * load.tokens * shapes.vocabulary


def block_gradient_bytes(shapes: ModelShapes, load: Load) -> int:
    """Bytes of the gradients alive at once inside one block: 3 intermediate and 2 hidden."""
    per_token = 3 * shapes.intermediate_size + 2 * shapes.hidden_size
    return FLOAT_BYTES * load.tokens * per_token


def workspace_bytes(
    shapes: ModelShapes, forms: Mapping[str, MatrixForm], whole_matrices: bool = False
) -> int:
    """Bytes of the largest panel that a product unpacks, as float32, with its indices.

    Args:
        whole_matrices: whether a panel is the whole matrix, as on an accelerator.
    """
    largest = 0
    for matrix in shapes.matrices:
        format_name = forms[matrix.name].format
        if format_name == "fp32":
            continue
        rows = matrix.out_features
        if not whole_matrices and not format_name.startswith("bnb-"):
            rows = min(rows, PANEL_ROWS)
        panel = rows * matrix.in_features
        # Four bytes per index, which stands for 8 / bits weights, and for two at 8 bits.
        indices = min(panel, UNPACK_CHUNK) * min(BLOCK_BITS.get(format_name, 0), 4) // 2
        largest = max(largest, FLOAT_BYTES * panel + indices)
    return largest


def peak_bytes(shapes: ModelShapes, forms: Mapping[str, MatrixForm], load: Load) -> PeakBytes:
    """The peak of a training process beyond what it uses when idle, part by part."""
    return PeakBytes(
        backbone=backbone_bytes(shapes, forms),
        correction=CORRECTION_BYTES * load.correction_elements,
        other=other_bytes(shapes),
        adapter=adapter_bytes(load),
        activations=activation_bytes(shapes, load),
        transient=transient_bytes(shapes, load),
        workspace=workspace_bytes(shapes, forms, load.whole_matrices),
    )


# ---------------------------------------------------------------- work


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
        unpacked = 0 if form.format == "fp32" else 2 * FLOAT_BYTES * matrix.parameters
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

    Activations are float32, so the float32 rate counts; a rate that the device does not report
    contributes nothing.
    """
    rates = profile.matmul_flops_per_s
    flops_per_s = rates.get("fp32", max(rates.values(), default=0.0))
    seconds = 0.0
    if flops_per_s > 0:
        seconds += step_flops(shapes, load, batch_size) / flops_per_s
    if profile.memory_bandwidth_bytes_per_s > 0:
        moved = moved_bytes(shapes, forms, load, batch_size)
        seconds += moved / profile.memory_bandwidth_bytes_per_s
    return seconds


# ---------------------------------------------------------------- traffic


def download_bytes(load: Load, wire_itemsize: int) -> int:
    """Bytes of tensors that a device receives at the start of a round."""
    return (load.trained_elements + load.tail_elements + load.dense_parameters) * wire_itemsize


def upload_bytes(load: Load, wire_itemsize: int) -> int:
    """Bytes of tensors that a device returns at the end of a round."""
    return (load.trained_elements + load.dense_parameters) * wire_itemsize


def transfer_seconds(profile: DeviceProfile, load: Load, wire_itemsize: int) -> float:
    """Seconds of both transfers; nothing when the link's rate is unknown."""
    if profile.link_bytes_per_s <= 0:
        return 0.0
    both = download_bytes(load, wire_itemsize) + upload_bytes(load, wire_itemsize)
    return both / profile.link_bytes_per_s


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


def _ceil_div(numerator: int, denominator: int) -> int:
    return -(-numerator // denominator)
