"""Low-rank products of many adapters of different rank at once, and what their training needs.

Tokens of one adapter lie together; the factors of all adapters lie one below the other, A as
(sum of ranks, in) and B as (sum of ranks, out), B transposed against a single adapter's usual
(out, rank). So both factors of an adapter are whole rows, adapters are joined by concatenation
alone, and the backward pass in x is the forward pass with A and B exchanged: two kernels suffice.

One launch does both products. Punica's SGMV (arXiv 2310.18547) and S-LoRA launch twice, shrink and
then expand, because a serving batch of few tokens must spread the long sums of x A^T over the GPU.
A training step has hundreds of tokens and more: there 16 tokens are work enough for a block, `low`
passes from one product to the other in shared memory, x is read once, y is read and written once,
and the launch is the cost that is halved. Where tokens are few, blocks share the columns of y and
each repeats the small product (`slices` in `grouped_low_rank_`).

There is no Triton path. It would need a compiler at run time for the same products; what it
simplifies, the placing of operands, is tested here on any CPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from struct import Struct

import torch
from jaxtyping import Float, Float32, Int32
from torch import Tensor

from fedtune.errors import KernelError
from fedtune.kernels.driver import Launcher
from fedtune.kernels.launches import MOST_TEAMS, SUFFIX

MOST_RANK = 128
"""Ranks of one adapter that the compiled kernel takes."""

FEWEST_ADAPTERS = 2
"""Adapters from which on our product is faster than torch's: on an H200, for 4096 tokens, one takes
1.08 times as long as torch's two products, and sixteen take 0.54 times as long."""

MOST_PLAIN_PRODUCTS = 2
"""Batched products of which the gradient of the factors may consist to be left to torch."""

_PRODUCT = Struct("@PPPPPPPPqqqiii")
_GRADIENT = Struct("@PPPPPPqii")
_TOKENS, _COLUMNS, _RANKS = 16, 64, 32  # of a block, as in low_rank.h


@dataclass(frozen=True, slots=True)
class Groups:
    """Which tokens belong to which adapter.

    Attributes:
        token_counts: tokens of each adapter, in the order in which they lie; they cover all.
        ranks: of each adapter, in the order in which the factors lie; 0 leaves y as it is.
        scales: of each adapter: alpha / rank.
        token_offsets: where each adapter's tokens start, and the end of the last; for the GPU.
        rank_offsets: where each adapter's rows start, and the end of the last; for the GPU.
        scale_values: `scales`; for the GPU.
    """

    token_counts: tuple[int, ...]
    ranks: tuple[int, ...]
    scales: tuple[float, ...]
    token_offsets: Int32[Tensor, " groups_1"]
    rank_offsets: Int32[Tensor, " groups_1"]
    scale_values: Float32[Tensor, " groups"]

    @property
    def tokens(self) -> int:
        return sum(self.token_counts)

    @property
    def rank(self) -> int:
        """Sum of the ranks."""
        return sum(self.ranks)

    @property
    def max_rank(self) -> int:
        return max(self.ranks, default=0)


def groups_of(
    token_counts: Sequence[int],
    ranks: Sequence[int],
    scales: Sequence[float],
    device: torch.device,
) -> Groups:
    """Describe the adapters of a batch; one small upload, to be kept as long as the batch's form.

    Raises:
        KernelError: the three do not have one length, or a count or a rank is negative.
    """
    if not len(token_counts) == len(ranks) == len(scales):
        raise KernelError(
            "token counts, ranks and scales must have one length, got "
            f"{len(token_counts)}, {len(ranks)} and {len(scales)}"
        )
    if min((*token_counts, *ranks), default=0) < 0:
        raise KernelError("token counts and ranks must not be negative")
    return Groups(
        token_counts=tuple(token_counts),
        ranks=tuple(ranks),
        scales=tuple(scales),
        token_offsets=torch.tensor(_offsets(token_counts), dtype=torch.int32, device=device),
        rank_offsets=torch.tensor(_offsets(ranks), dtype=torch.int32, device=device),
        scale_values=torch.tensor(tuple(scales), dtype=torch.float32, device=device),
    )


# ---------------------------------------------------------------- plain torch


def grouped_low_rank_(
    y: Float[Tensor, "tokens out"],
    x: Float[Tensor, "tokens in"],
    a: Float[Tensor, "rank in"],
    b: Float[Tensor, "rank out"],
    groups: Groups,
) -> Float[Tensor, "tokens max_rank"]:
    """Add scale_g (x A_g^T) B_g to the rows of y of every adapter g.

    Factors are rounded to the dtype of x, sums are float32, y is rounded once.

    Returns:
        x A_g^T in the dtype of x, zero beyond the adapter's rank: the gradients need it.
    """
    low = x.new_zeros(x.shape[0], groups.max_rank)
    a, b = a.to(x.dtype), b.to(x.dtype)
    for run in _runs(groups):
        if run.groups == 1:  # a batch of one costs several times the product
            part = x[run.tokens] @ a[run.factors].t()
            y[run.tokens].addmm_(part, b[run.factors], alpha=run.scale)
        else:
            part = torch.bmm(run.tokens_of(x), run.factors_of(a).transpose(1, 2))
            run.tokens_of(y).baddbmm_(part, run.factors_of(b), alpha=run.scale)
        part = part.view(-1, run.rank)
        if part.shape == low.shape:  # the only run
            return part
        low[run.tokens, : run.rank] = part
    return low


def grouped_low_rank_gradient(
    left: Float[Tensor, "tokens max_rank"], right: Float[Tensor, "tokens columns"], groups: Groups
) -> Float32[Tensor, "rank columns"]:
    """For every adapter g, scale_g left_g^T right_g over its tokens, in its rows.

    This is dA with left = g B^T (what `grouped_low_rank_` returns in the backward pass) and
    right = x, and dB with left = x A^T and right = g. Without a compiled kernel the products are
    rounded to the dtype of `right` before the scale.
    """
    out = torch.zeros(groups.rank, right.shape[1], dtype=torch.float32, device=right.device)
    for run in _runs(groups):
        rows = left[run.tokens, : run.rank].contiguous()
        if run.groups == 1:
            part = rows.t() @ right[run.tokens]
        else:
            rows = rows.view(run.groups, -1, run.rank)
            part = torch.bmm(rows.transpose(1, 2), run.tokens_of(right)).flatten(0, 1)
        torch.mul(part, run.scale, out=out[run.factors])
    return out


@dataclass(frozen=True, slots=True)
class _Run:
    """Neighbouring adapters of one rank, one scale and one number of tokens: a batched product.

    torch's batched product gives each member the bits of a product of its own, so an adapter gets
    what it gets alone, as long as rows start at multiples of 64 bytes: elsewhere the CPU's library
    may sum in another order.
    """

    groups: int
    tokens: slice
    factors: slice
    rank: int
    scale: float

    def tokens_of(self, tensor: Tensor) -> Tensor:
        return tensor[self.tokens].view(self.groups, -1, tensor.shape[1])

    def factors_of(self, tensor: Tensor) -> Tensor:
        return tensor[self.factors].view(self.groups, -1, tensor.shape[1])


def _runs(groups: Groups) -> Iterator[_Run]:
    members = list(zip(groups.token_counts, groups.ranks, groups.scales, strict=True))
    first = token = row = 0
    while first < len(members):
        count, rank, scale = members[first]
        last = first
        while last < len(members) and members[last] == members[first]:
            last += 1
        size = last - first
        end_token, end_row = token + size * count, row + size * rank
        if count and rank:
            yield _Run(size, slice(token, end_token), slice(row, end_row), rank, scale)
        first, token, row = last, end_token, end_row


# ---------------------------------------------------------------- compiled kernels


def launchable(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the compiled kernels take x of a dtype on a device: bfloat16 from sm_80 on."""
    if dtype == torch.bfloat16 and device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return dtype in SUFFIX


def takes(x: Tensor, a: Tensor, b: Tensor, groups: Groups) -> bool:
    """Whether `launch_grouped_low_rank_` takes these dtypes and ranks."""
    return (
        launchable(x.dtype, x.device)
        and a.dtype == b.dtype
        and a.dtype in (x.dtype, torch.float32)
        and groups.max_rank <= MOST_RANK
    )


def wins(groups: Groups) -> bool:
    """Whether `launch_grouped_low_rank_` is the faster way, where it takes the product."""
    return len(groups.ranks) >= FEWEST_ADAPTERS


def takes_gradient(right: Tensor, groups: Groups) -> bool:
    """Whether `launch_grouped_low_rank_gradient` takes this dtype and is the faster way.

    A product of torch's spreads the sum over many tokens over the whole GPU, our kernel does not:
    on an H200 it needs 5.5 times as long for one adapter of 4096 tokens, and a quarter of the time
    for 16 adapters of 16 products. So one or two products are torch's.
    """
    if not launchable(right.dtype, right.device):
        return False
    return sum(1 for _ in _runs(groups)) > MOST_PLAIN_PRODUCTS


def launch_grouped_low_rank_(
    launcher: Launcher, y: Tensor, x: Tensor, a: Tensor, b: Tensor, groups: Groups
) -> Tensor:
    """`grouped_low_rank_` in one launch.

    Raises:
        KernelError: shapes, dtypes, strides or devices are not those of the signature.
    """
    (tokens, columns), out = x.shape, y.shape[1]
    _require(y, (groups.tokens, out), x.dtype, x.device, "y")
    _require(x, (groups.tokens, columns), x.dtype, x.device, "x")
    _require(a, (groups.rank, columns), a.dtype, x.device, "a")
    _require(b, (groups.rank, out), a.dtype, x.device, "b")
    _require_groups(groups, x.device)
    if not takes(x, a, b, groups):
        raise KernelError(
            f"x must be float32, bfloat16 (from sm_80 on) or float16, and the factors of its dtype "
            f"or float32 and of rank {MOST_RANK} at most; got {x.dtype}, {a.dtype}, {b.dtype} and "
            f"rank {groups.max_rank}"
        )
    low = x.new_empty(tokens, groups.max_rank)
    if tokens == 0 or groups.rank == 0:
        return low
    tiles = -(-tokens // _TOKENS)
    # Few tokens: blocks share the columns of y, as long as each still has eight warps' worth.
    slices = max(1, min(4, launcher.processors // tiles, out // (8 * _COLUMNS)))
    suffix = SUFFIX[x.dtype] if a.dtype == x.dtype else f"{SUFFIX[x.dtype]}_{SUFFIX[a.dtype]}"
    launcher.launch(
        f"low_rank_{suffix}",
        min(tiles * slices, MOST_TEAMS),
        128 if x.dtype == torch.float32 else 256,  # float32 needs more registers a thread
        _PRODUCT,
        y.data_ptr(),
        low.data_ptr(),
        x.data_ptr(),
        a.data_ptr(),
        b.data_ptr(),
        groups.token_offsets.data_ptr(),
        groups.rank_offsets.data_ptr(),
        groups.scale_values.data_ptr(),
        tokens,
        columns,
        out,
        len(groups.ranks),
        groups.max_rank,
        slices,
    )
    return low


def launch_grouped_low_rank_gradient(
    launcher: Launcher, left: Tensor, right: Tensor, groups: Groups
) -> Tensor:
    """`grouped_low_rank_gradient` in one launch.

    Raises:
        KernelError: shapes, dtypes, strides or devices are not those of the signature.
    """
    columns = right.shape[1]
    _require(left, (groups.tokens, groups.max_rank), right.dtype, right.device, "left")
    _require(right, (groups.tokens, columns), right.dtype, right.device, "right")
    _require_groups(groups, right.device)
    out = torch.empty(groups.rank, columns, dtype=torch.float32, device=right.device)
    if out.numel() == 0:
        return out
    blocks = len(groups.ranks) * -(-groups.max_rank // _RANKS) * -(-columns // _COLUMNS)
    launcher.launch(
        f"low_rank_gradient_{SUFFIX[right.dtype]}",
        min(blocks, MOST_TEAMS),
        128,
        _GRADIENT,
        out.data_ptr(),
        left.data_ptr(),
        right.data_ptr(),
        groups.token_offsets.data_ptr(),
        groups.rank_offsets.data_ptr(),
        groups.scale_values.data_ptr(),
        columns,
        len(groups.ranks),
        groups.max_rank,
    )
    return out


def _offsets(counts: Sequence[int]) -> list[int]:
    return list(accumulate(counts, initial=0))


def _require(
    tensor: Tensor, shape: tuple[int, int], dtype: torch.dtype, device: torch.device, name: str
) -> None:
    if tensor.shape != shape or tensor.dtype != dtype or tensor.device != device:
        raise KernelError(
            f"{name} must be {shape} in {dtype} on {device}, got {tuple(tensor.shape)} in "
            f"{tensor.dtype} on {tensor.device}"
        )
    if not tensor.is_contiguous():
        raise KernelError(f"{name} must be contiguous, got strides {tensor.stride()}")


def _require_groups(groups: Groups, device: torch.device) -> None:
    if groups.token_offsets.device != device:
        raise KernelError(
            f"the groups must be on {device}, they are on {groups.token_offsets.device}"
        )
