"""Causal attention inside each sample of a packed row, and nowhere else.

The samples of a micro-batch lie behind one another in one row of tokens. Attention runs inside
each of them: on the CPU one fused call per run of samples of equal length, on a GPU one call over
all samples (FlashAttention takes their bounds). No mask of (tokens x tokens) is ever formed, and
keys and values that several heads share are never repeated.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

_FUSED_DTYPES = (torch.bfloat16, torch.float16)
"""What FlashAttention on a GPU computes in."""


@dataclass(frozen=True, slots=True)
class Segments:
    """Where the samples of a packed row begin and end; known to the host and to the device.

    Attributes:
        lengths: tokens of each sample.
        offsets: first token of each sample, and the end of the last, as int32 on the device.
    """

    lengths: tuple[int, ...]
    offsets: Int[Tensor, " bounds"]

    @property
    def longest(self) -> int:
        return max(self.lengths)

    def runs(self) -> Iterator[tuple[int, int, int]]:
        """(first token, samples, length of each) of neighbours of equal length."""
        first = 0
        for length, same in groupby(self.lengths):
            count = len(list(same))
            yield first, count, length
            first += count * length


def segments(lengths: Sequence[int], device: torch.device) -> Segments:
    """The bounds of samples of these lengths that lie behind one another."""
    bounds = torch.zeros(len(lengths) + 1, dtype=torch.int32)
    torch.cumsum(torch.tensor(lengths, dtype=torch.int32), 0, out=bounds[1:])
    return Segments(tuple(lengths), bounds.to(device, non_blocking=True))


def packed_attention(
    query: Float[Tensor, "tokens heads dim"],
    key: Float[Tensor, "tokens kv_heads dim"],
    value: Float[Tensor, "tokens kv_heads dim"],
    where: Segments,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Float[Tensor, "tokens heads dim"]:
    """Softmax attention of each token to those before it in the same sample, and to itself.

    Args:
        window: a token sees this many tokens, itself among them; None for all.
        softcap: scores become `softcap * tanh(score / softcap)`, as in Gemma 2.
    """
    if window is not None and window >= where.longest:
        window = None
    if softcap is not None:
        return _each_run(_capped, query, key, value, where, scale, window, softcap)
    if query.device.type == "cpu":
        result = _SegmentAttention.apply(  # type: ignore[no-untyped-call]
            query, key, value, where, scale, window
        )
        assert isinstance(result, Tensor)
        return result
    if one_launch(query):
        return _flash(query, key, value, where, scale, window)
    return _each_run(_plain, query, key, value, where, scale, window, None)


class _SegmentAttention(torch.autograd.Function):
    """The CPU's fused attention over runs of equal length, written into one result.

    Autograd over slices would fill a gradient of the whole row for every sample; here each run's
    gradient is written to its place.
    """

    @staticmethod
    def forward(ctx, query, key, value, where, scale, window):  # type: ignore[no-untyped-def]  # torch's protocol
        out = torch.empty(query.shape, dtype=query.dtype)
        sums = []
        for first, count, length in where.runs():
            parts = [_run(x, first, count, length) for x in (query, key, value)]
            mask = _band(length, window, query.device)
            found, logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                *parts, 0.0, mask is None, attn_mask=_additive(mask, query.dtype), scale=scale
            )
            _run(out, first, count, length).copy_(found)
            sums.append(logsumexp)
        ctx.save_for_backward(query, key, value, out, *sums)
        ctx.where, ctx.scale, ctx.window = where, scale, window
        return out

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        query, key, value, out, *sums = ctx.saved_tensors
        gradients = tuple(torch.empty(x.shape, dtype=x.dtype) for x in (query, key, value))
        for (first, count, length), logsumexp in zip(ctx.where.runs(), sums, strict=True):
            parts = [_run(x, first, count, length) for x in (gradient, query, key, value, out)]
            mask = _band(length, ctx.window, query.device)
            found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                *parts,
                logsumexp,
                0.0,
                mask is None,
                attn_mask=_additive(mask, query.dtype),
                scale=ctx.scale,
            )
            for whole, part in zip(gradients, found, strict=True):
                _run(whole, first, count, length).copy_(part)
        return *gradients, None, None, None


def _run(x: Tensor, first: int, count: int, length: int) -> Tensor:
    """A run of samples as (samples, heads, length, dim), without a copy."""
    return x[first : first + count * length].view(count, length, *x.shape[1:]).transpose(1, 2)


def _band(length: int, window: int | None, device: torch.device) -> Tensor | None:
    """True where a token may look, when a window makes it less than the whole past."""
    if window is None or window >= length:
        return None
    full = torch.ones(length, length, dtype=torch.bool, device=device)
    return full.tril_() & full.clone().triu_(1 - window)


def _additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if mask is None:
        return None
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(
        ~mask, float("-inf")
    )


# ---------------------------------------------------------------- on a GPU


def one_launch(query: Tensor) -> bool:
    """Whether one launch serves samples of any lengths.

    FlashAttention 2 asks for sm_80, half precision, and a head of at most 256 by eights.
    """
    dim = query.shape[-1]
    return (
        query.device.type == "cuda"
        and query.dtype in _FUSED_DTYPES
        and dim % 8 == 0
        and dim <= 256
        and torch.backends.cuda.is_flash_attention_available()
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


def _flash(
    query: Tensor, key: Tensor, value: Tensor, where: Segments, scale: float, window: int | None
) -> Tensor:
    """One launch for all samples; torch knows its gradient."""
    found = torch.ops.aten._flash_attention_forward(
        query,
        key,
        value,
        where.offsets,
        where.offsets,
        where.longest,
        where.longest,
        0.0,
        True,
        False,
        scale=scale,
        # FlashAttention counts the tokens before the own one.
        window_size_left=None if window is None else window - 1,
        window_size_right=None if window is None else 0,
    )
    out: Tensor = found[0]
    return out


# ---------------------------------------------------------------- plain torch


def _each_run(  # type: ignore[no-untyped-def]
    attend,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    where: Segments,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    sizes = [count * length for _, count, length in where.runs()]
    # Splitting and `cat` are each other's gradients: no gradient of the whole row per run.
    parts_of = (torch.ops.aten.split_with_sizes(x, sizes) for x in (query, key, value))
    pieces = zip(where.runs(), *parts_of, strict=True)
    found = []
    for (_, count, length), *parts in pieces:
        q, k, v = (_run(x, 0, count, length) for x in parts)
        out = attend(q, k, v, _band(length, window, q.device), scale, softcap)
        found.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(found)


def _plain(
    q: Tensor, k: Tensor, v: Tensor, band: Tensor | None, scale: float, softcap: float | None
) -> Tensor:
    return functional.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=band,
        is_causal=band is None,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )


def _capped(
    q: Tensor, k: Tensor, v: Tensor, band: Tensor | None, scale: float, softcap: float
) -> Tensor:
    """Attention with capped scores, which no fused call of torch computes."""
    heads = q.shape[1] // k.shape[1]
    length = q.shape[2]
    grouped = q.reshape(
        len(q), k.shape[1], heads, length, -1
    )  # (samples, kv heads, group, length, dim)
    scores = (grouped @ k.unsqueeze(2).transpose(-1, -2)).mul(scale / softcap).tanh() * softcap
    seen = band
    if seen is None:
        seen = torch.ones(length, length, dtype=torch.bool, device=q.device).tril_()
    scores = scores.masked_fill(~seen, float("-inf"))
    weights = scores.softmax(-1, dtype=torch.float32).to(q.dtype)
    out: Tensor = weights @ v.unsqueeze(2)
    return out.flatten(1, 2)
