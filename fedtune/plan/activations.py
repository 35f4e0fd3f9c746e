"""Bytes of what a step computes: kept for the backward pass, or alive for a moment."""

from __future__ import annotations

from fedtune.plan.load import Load
from fedtune.plan.weights import FLOAT_BYTES
from fedtune.records import ModelShapes

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
