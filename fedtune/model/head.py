"""The output matrix and the cross-entropy in one step, a chunk of rows at a time.

Logits are the largest tensor of a step: rows x vocabulary. Here a chunk of them exists at a time.
Its losses are read off, the gradient is written over it, and the product with the output matrix
gives the gradient of the hidden states at once. What the backward pass keeps is of the size of the
hidden states that carry loss.

    logits = h W^T,  d loss / d h = (softmax(logits) - onehot(target)) W

The output matrix is frozen, so it needs no gradient. Where it is trained, or adapted, the plain
way over autograd is taken.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from fedtune.kernels.dispatch import softmax_cross_entropy_

_CHUNK_BYTES: Final = {"cpu": 32 << 20, "cuda": 128 << 20}
_FEWEST_ROWS: Final = 128
"""See `chunk_rows`. On one core, 440 rows of a vocabulary of 32 thousand (hidden size 288) took
0.88 s in chunks of 1 MiB, 0.62 s of 8, 0.45 s of 32 and 0.63 s of 64; with a vocabulary of 128
thousand (512), 2.7 s in chunks of 32 rows and 1.8 s of 128. On a GPU, 512 rows of a vocabulary of
128 thousand in half precision are compute-bound and need 128 MiB (computed, not measured)."""


@dataclass(frozen=True, slots=True)
class Head:
    """What makes logits of hidden states.

    Attributes:
        weight: frozen output matrix.
        softcap: logits become `softcap * tanh(logits / softcap)`, as in Gemma 2.
    """

    weight: Float[Tensor, "vocabulary hidden"]
    bias: Float[Tensor, " vocabulary"] | None = None
    softcap: float | None = None


@dataclass(frozen=True, slots=True)
class HeadLoss:
    """Cross-entropy of some rows.

    Attributes:
        total: weighted sum, with its graph.
        hits: rows whose target has the highest logit; a tie counts.
    """

    total: Float[Tensor, ""]
    hits: Int[Tensor, ""]


def frozen_head(module: nn.Module, softcap: float | None = None) -> Head | None:
    """The head of an output layer that is a frozen linear layer; None for any other."""
    if type(module) is not nn.Linear or module.weight.requires_grad:
        return None
    if module.bias is not None and module.bias.requires_grad:
        return None
    return Head(module.weight, module.bias, softcap)


def head_loss(
    hidden: Float[Tensor, "tokens hidden"],
    head: Head,
    rows: Int[Tensor, " units"],
    targets: Int[Tensor, " units"],
    weights: Float[Tensor, " units"] | None = None,
) -> HeadLoss:
    """Cross-entropy at some of the hidden states, as a weighted sum.

    Args:
        rows: which hidden states carry loss; each at most once.
        targets: the right token of each.
        weights: of each; None for one.
    """
    total, hits = _HeadLoss.apply(  # type: ignore[no-untyped-call]
        hidden, head, rows, targets, weights
    )
    return HeadLoss(total, hits)


def chunk_rows(vocabulary: int, itemsize: int, device_type: str) -> int:
    """Rows whose logits are formed together.

    As many as fill the chunk, and 128 or more: the output matrix is read twice for each chunk, and
    a product of few rows waits for that. A larger chunk only falls out of the cache.
    """
    size = _CHUNK_BYTES.get(device_type, _CHUNK_BYTES["cuda"])
    return max(size // (vocabulary * itemsize), _FEWEST_ROWS)


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, head, rows, targets, weights):  # type: ignore[no-untyped-def]  # torch's protocol
        chosen = hidden.index_select(0, rows)
        wanted = ctx.needs_input_grad[0]
        weight = head.weight.to(hidden.dtype)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        hits = torch.zeros((), dtype=torch.int64, device=hidden.device)
        size = chunk_rows(weight.shape[0], hidden.element_size(), hidden.device.type)
        multiply = _product_with(weight, min(size, len(rows)))
        ones = torch.ones(min(size, len(rows)), dtype=torch.float32, device=hidden.device)
        for start in range(0, len(rows), size):
            part = chosen[start : start + size]
            logits = multiply(part)
            slope = _reshape_(logits, head)
            wished = targets[start : start + size]
            best = logits.amax(-1)
            hits += (logits.gather(1, wished[:, None])[:, 0] >= best).sum()
            losses = softmax_cross_entropy_(logits, wished, ones[: len(part)])
            total += losses.sum() if weights is None else losses @ weights[start : start + size]
            if wanted:
                if slope is not None:
                    logits.mul_(slope)
                # The rows are done with: their place takes the gradient.
                torch.mm(logits, weight, out=part)
            del logits  # its memory is that of the next chunk
        if wanted:
            ctx.save_for_backward(chosen, rows, weights)
            ctx.tokens = len(hidden)
        ctx.mark_non_differentiable(hits)
        return total, hits

    @staticmethod
    def backward(ctx, upstream, _):  # type: ignore[no-untyped-def]
        slopes, rows, weights = ctx.saved_tensors
        # Weights and loss scale multiply after the product, in float32: float16 keeps its range.
        scale = upstream if weights is None else (upstream * weights)[:, None]
        gradient = slopes.new_zeros(ctx.tokens, slopes.shape[1])
        gradient.index_copy_(0, rows, (slopes * scale).to(slopes.dtype))
        return gradient, None, None, None, None


def _product_with(weight: Tensor, rows: int) -> Callable[[Tensor], Tensor]:
    """x -> x W^T of up to so many rows; a result is valid until the next is asked for.

    oneDNN's product takes 0.7 to 0.8 of the time of torch's own for 64 to 256 rows of a vocabulary
    of 32 thousand (hidden size 288, one core of a Zen 4). Measured with AVX-512 alone, so used
    there alone; torch gives it no public name.
    """
    fast = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    if (
        fast is not None
        and weight.dtype == torch.float32
        and weight.device.type == "cpu"
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
    ):
        return lambda x: fast(x, weight, None, "none", [], "")
    buffer = weight.new_empty(rows, weight.shape[0])
    return lambda x: torch.mm(x, weight.t(), out=buffer[: len(x)])


def _reshape_(logits: Tensor, head: Head) -> Tensor | None:
    """Add the bias and cap the logits in place; returns d capped / d logits, None for one."""
    if head.bias is not None:
        logits.add_(head.bias)
    if head.softcap is None:
        return None
    logits.div_(head.softcap).tanh_()
    slope = 1.0 - logits * logits
    logits.mul_(head.softcap)
    return slope
