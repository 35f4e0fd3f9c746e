"""Closed-form predictions of memory, work and traffic, each from the shapes of a model.

The formulas describe `fedtune.train.round` on a transformer with pre-normalised blocks: frozen
matrices in a packed format, activations in the dtype of the products, adapters in float32, AdamW,
logits on the rows that carry loss, a chunk at a time. `docs/training.md` says what a block keeps.
Where a model differs, the prediction is meant to err to the safe side; a test holds it between the
tensors of a real round and a quarter more. The interpreter and its libraries, and what the
allocator keeps beyond tensors, are not counted: a budget is what training may use on top.
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
"""Of which a panel on a CPU has a multiple (`fedtune.quant.panels`)."""
PANEL_WEIGHTS = 1 << 20
"""Weights that a product unpacks at a time on a CPU (`fedtune.lora.linear`)."""
UNPACK_CHUNK = 1 << 19
"""Weights whose indices are held at once while they are unpacked (`fedtune.kernels.unpack`)."""
CORRECTION_ITEMSIZE = 2
"""Bytes of one number of a frozen pair, which is held in float16."""
CORRECTION_BYTES = CORRECTION_ITEMSIZE + FLOAT_BYTES
"""The same with the copy in float32 that stands beside the layer's other factors."""
TRAINED_COPIES = 4
"""Value, gradient and the two moments of AdamW."""

LOGIT_CHUNK_BYTES = {"cpu": 32 << 20, "accelerator": 128 << 20}
FEWEST_LOGIT_ROWS = 128
"""Logits that exist at a time (`fedtune.model.head`)."""
ROW_BYTES = 64
"""Bytes per token of the batch itself, as three int64 and a flag, on both sides of a copy."""

FUSED = frozenset({"llama", "mistral", "qwen2", "qwen3", "gemma"})
"""Model types whose blocks run by fused steps (`fedtune.model.blocks`)."""
_BY_STEPS = frozenset({"gpt2", "gpt_neo", "gptj", "phi"})
"""Those that compute their activation (`gelu_new`) in steps, which keep three numbers more."""
_UNGATED = _BY_STEPS | {"bert", "roberta", "distilbert", "electra", "gpt_neox", "opt"}
"""Those whose feed-forward part is two matrices; others are taken to have a gate."""
_CAPPED = frozenset({"gemma2"})
"""Those that cap attention scores, which then have to exist, and logits."""
_FOUR_NORMS = frozenset({"gemma2", "gemma3", "gemma3_text"})
"""Those with a norm behind attention and feed-forward part as well."""
_JOINT = frozenset({"qkv_proj", "query_key_value"})
"""Names of one matrix for queries, keys and values, where the first two are turned."""


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
        itemsize: bytes of one activation: 4 in float32, 2 in bfloat16 and float16.
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
    itemsize: int = FLOAT_BYTES

    @property
    def tokens(self) -> int:
        """Most tokens of one forward pass; as many as it has if every sample is of full length."""
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
        transient: the larger of the head's pass and of one block's backward pass, which take
            turns.
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


def other_bytes(shapes: ModelShapes, itemsize: int = FLOAT_BYTES) -> int:
    """Bytes of the parameters outside the packed matrices, held in the dtype of the products."""
    return itemsize * shapes.other_parameters


def adapter_bytes(load: Load) -> int:
    """Bytes of trained numbers with gradient and AdamW state, plus the tail's values."""
    trained = load.trained_elements + load.dense_parameters
    return FLOAT_BYTES * (TRAINED_COPIES * trained + load.tail_elements)


def block_activation_bytes(shapes: ModelShapes, load: Load) -> int:
    """Bytes that one transformer block keeps for its backward pass, without adapters.

    Per token, in numbers: the input of each of two norms and its 1 / rms; query, key and value and
    the attention's result as wide as they are, and the logarithm of each head's sum; gate and up.
    A model's own modules also keep each norm's result, if an adapted matrix reads it, and what
    their activation leaves. Attention over scores keeps heads * sequence of them, twice.
    """
    query, key_value = _attention_widths(shapes)
    if not _packs(shapes, load):
        key_value = query  # shared heads are repeated
    numbers = 2 * (shapes.hidden_size + 1) + 2 * query + 2 * key_value + shapes.attention_heads
    if not _fused_attention(shapes, load):
        numbers += shapes.hidden_size
    elif shapes.model_type == "qwen3":  # norms of heads keep their inputs
        numbers += query + key_value + 2 * shapes.attention_heads
    if _ends(shapes) & _JOINT:  # the turned q and k beside the product that v is a part of
        numbers += query + key_value
    if shapes.model_type in _FOUR_NORMS:
        numbers += 2 * shapes.hidden_size
    if load.eager_attention or shapes.model_type in _CAPPED:
        numbers += 2 * shapes.attention_heads * load.sequence_length
    return load.itemsize * load.tokens * (numbers + _feed_forward_numbers(shapes))


def _feed_forward_numbers(shapes: ModelShapes) -> int:
    """What a block's feed-forward part keeps per token, but for the input of its norm."""
    intermediate = shapes.intermediate_size
    if _fused_mlp(shapes):
        return 2 * intermediate
    if shapes.model_type not in _UNGATED:
        read = _ends(shapes)
        plain = shapes.model_type in FUSED
        result = 0 if plain and not read & {"gate_proj", "up_proj"} else shapes.hidden_size
        product = 0 if plain and "down_proj" not in read else intermediate
        return result + 3 * intermediate + product
    return shapes.hidden_size + (5 if shapes.model_type in _BY_STEPS else 2) * intermediate


def adapter_activation_bytes(load: Load) -> int:
    """Bytes that the adapters keep for the backward pass, over all matrices.

    One number per rank and token, and the factors side by side (`factor_stack_bytes`).
    """
    ranks = load.trained_ranks + load.tail_ranks
    return load.itemsize * load.tokens * ranks + factor_stack_bytes(load)


def factor_stack_bytes(load: Load) -> int:
    """Bytes of the trained and frozen factors side by side, kept for a whole step."""
    return load.itemsize * (load.trained_elements + load.tail_elements)


def activation_bytes(shapes: ModelShapes, load: Load) -> int:
    """Bytes kept from the forward pass until the backward pass of the blocks begins.

    Without checkpointing: all of every block from the first trained one up. With it: only the
    input of each of those blocks. In both, the input of the last norm, and the batch itself.
    """
    blocks = shapes.layers - load.first_trained_layer
    ends = load.tokens * (load.itemsize * shapes.hidden_size + ROW_BYTES)
    if load.checkpointing:
        inputs = load.itemsize * load.tokens * shapes.hidden_size * blocks
        return ends + inputs + factor_stack_bytes(load)
    return ends + blocks * block_activation_bytes(shapes, load) + adapter_activation_bytes(load)


def transient_bytes(shapes: ModelShapes, load: Load) -> int:
    """Bytes of the larger of two that take turns: the head's pass, and one block's backward pass.

    With checkpointing the latter holds the block's activations too, as it recomputes them from its
    input; its adapters are taken to be twice the mean block's, because ranks differ between blocks.
    """
    block = block_gradient_bytes(shapes, load)
    if load.checkpointing:
        again = block_activation_bytes(shapes, load)
        again -= load.itemsize * load.tokens * shapes.hidden_size
        ranks = load.itemsize * load.tokens * (load.trained_ranks + load.tail_ranks)
        block += again + min(ranks, 2 * ranks // shapes.layers)
    return max(head_bytes(shapes, load), block)


def head_bytes(shapes: ModelShapes, load: Load) -> int:
    """Bytes of a chunk of logits and of the hidden states around it, if every row carries loss.

    On a CPU the loss of narrow logits is computed on a float32 copy, and a cap keeps its slope. A
    classifier has one row per sample and few columns: nothing next to a block.
    """
    if load.task != "causal-lm":
        return 0
    size = load.itemsize
    rows = min(load.tokens, logit_rows(shapes.vocabulary, size, load.whole_matrices))
    number = size if load.whole_matrices or size == FLOAT_BYTES else size + FLOAT_BYTES
    if shapes.model_type in _CAPPED:
        number += 2 * size
    # The last norm's result, and its rows that carry loss, which become their gradient.
    return number * rows * shapes.vocabulary + 2 * size * load.tokens * shapes.hidden_size


def logit_rows(vocabulary: int, itemsize: int, accelerator: bool) -> int:
    """Rows whose logits exist at a time (`fedtune.model.head.chunk_rows`)."""
    chunk = LOGIT_CHUNK_BYTES["accelerator" if accelerator else "cpu"]
    return max(chunk // (vocabulary * itemsize), FEWEST_LOGIT_ROWS)


def block_gradient_bytes(shapes: ModelShapes, load: Load) -> int:
    """Bytes of the tensors alive at once inside one block's backward pass.

    Per token: 2 hidden, which are the gradient that arrives and the one that leaves, and of the
    feed-forward part the gradients on both sides of its activation, less what has been freed by
    then. A fused step on an accelerator writes them over gate and up, and makes the activation
    anew; on a CPU it works in float32, and takes three more.
    """
    size, hidden, intermediate = load.itemsize, shapes.hidden_size, shapes.intermediate_size
    kind = shapes.model_type
    if _fused_mlp(shapes):
        wide = 0 if load.whole_matrices else FLOAT_BYTES * (3 if size == FLOAT_BYTES else 6)
        return load.tokens * (size * (2 * hidden + 2 * intermediate) + wide * intermediate)
    alive = 1 if kind in _UNGATED and kind not in _BY_STEPS else 3
    return load.tokens * size * (2 * hidden + alive * intermediate)


def _ends(shapes: ModelShapes) -> set[str]:
    """Last parts of the names of the adapted matrices."""
    return {matrix.name.rsplit(".", 1)[-1] for matrix in shapes.matrices}


def _packs(shapes: ModelShapes, load: Load) -> bool:
    """Whether samples are laid into one row; taken of every causal model, as nearly all are."""
    return load.task == "causal-lm" and not load.eager_attention


def _fused_attention(shapes: ModelShapes, load: Load) -> bool:
    adapted = _ends(shapes) >= {"q_proj", "k_proj", "v_proj"}
    return adapted and shapes.model_type in FUSED and _packs(shapes, load)


def _fused_mlp(shapes: ModelShapes) -> bool:
    return shapes.model_type in FUSED and _ends(shapes) >= {"gate_proj", "up_proj", "down_proj"}


def _attention_widths(shapes: ModelShapes) -> tuple[int, int]:
    """Numbers per token of the queries, and of the keys; the hidden size where names do not say."""
    widths = {"q_proj": 0, "k_proj": 0}
    for matrix in shapes.matrices:
        end = matrix.name.rsplit(".", 1)[-1]
        if end in widths:
            widths[end] = max(widths[end], matrix.out_features)
    query = widths["q_proj"] or shapes.hidden_size
    return query, min(query, widths["k_proj"] or query)


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
    return _ceil_div(PANEL_WEIGHTS // columns or 1, PANEL_ROWS) * PANEL_ROWS


def dense_block_bytes(shapes: ModelShapes, load: Load) -> int:
    """Bytes of one block's matrices, which an accelerator keeps dense while it recomputes it."""
    if not (load.checkpointing and load.whole_matrices):
        return 0
    by_layer: dict[int, int] = {}
    for matrix in shapes.matrices:
        by_layer[matrix.layer] = by_layer.get(matrix.layer, 0) + matrix.parameters
    return load.itemsize * max(by_layer.values(), default=0)


def peak_bytes(shapes: ModelShapes, forms: Mapping[str, MatrixForm], load: Load) -> PeakBytes:
    """The peak of a training process beyond what it uses when idle, part by part."""
    return PeakBytes(
        backbone=backbone_bytes(shapes, forms),
        correction=CORRECTION_BYTES * load.correction_elements,
        other=other_bytes(shapes, load.itemsize),
        adapter=adapter_bytes(load),
        activations=activation_bytes(shapes, load),
        transient=transient_bytes(shapes, load),
        workspace=max(
            workspace_bytes(shapes, forms, load.whole_matrices, load.itemsize),
            dense_block_bytes(shapes, load),
        ),
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
