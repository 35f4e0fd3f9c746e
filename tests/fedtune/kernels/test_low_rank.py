"""Grouped low-rank products: every path against one adapter at a time, in double precision."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from host import HostLauncher
from tolerances import off_by_one
from torch.library import opcheck

from fedtune.errors import KernelError
from fedtune.kernels import dispatch, low_rank, ops
from fedtune.kernels.low_rank import Groups, groups_of

CPU = torch.device("cpu")
# Rounding of low, then of y, to the dtype of x: relative to sums of numbers near one.
BOUND = {torch.float32: 2e-6, torch.bfloat16: 1.2e-2, torch.float16: 1.5e-3}

# Tokens and ranks: one adapter; empty ones at both ends and in between; ranks 0, odd and past one
# pass; groups shorter than a block's 16 tokens, and across its borders.
FORMS = (
    ((20,), (8,)),
    ((0, 5, 0, 27, 1, 16, 0), (4, 3, 7, 16, 1, 0, 2)),
    ((1, 1, 1, 1, 13, 40), (2, 64, 5, 0, 33, 128)),
    ((0, 0), (3, 1)),
)
SIZES = ((40, 24), (37, 65), (300, 200), (1, 1))


def made(
    form: tuple[tuple[int, ...], tuple[int, ...]],
    size: tuple[int, int],
    dtype: torch.dtype,
    factor_dtype: torch.dtype,
    device: torch.device = CPU,
) -> tuple[Groups, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    counts, ranks = form
    scales = [0.5 + 0.25 * i for i in range(len(counts))]
    groups = groups_of(counts, ranks, scales, device)
    columns, out = size

    def normal(rows: int, width: int, kind: torch.dtype) -> torch.Tensor:
        values = torch.randn(rows, width, generator=generator) / max(width, 1) ** 0.5
        return values.to(kind).to(device)

    return groups, {
        "y": normal(groups.tokens, out, dtype),
        "x": normal(groups.tokens, columns, dtype),
        "a": normal(groups.rank, columns, factor_dtype),
        "b": normal(groups.rank, out, factor_dtype),
    }


def expected_of(
    groups: Groups, given: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """y and low by one adapter at a time in float64, of factors as they are rounded."""
    x, y = given["x"].double().cpu(), given["y"].double().cpu()
    a, b = (given[name].to(given["x"].dtype).double().cpu() for name in "ab")
    low = torch.zeros(groups.tokens, groups.max_rank, dtype=torch.float64)
    token = row = 0
    for count, rank, scale in zip(groups.token_counts, groups.ranks, groups.scales, strict=True):
        rows, mine = slice(token, token + count), slice(row, row + rank)
        low[rows, :rank] = x[rows] @ a[mine].t()
        y[rows] += scale * low[rows, :rank] @ b[mine]
        token, row = token + count, row + rank
    return y, low


def error_of(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, relative to the largest value."""
    if expected.numel() == 0:
        return 0.0
    scale = max(float(expected.abs().max()), 1e-3)
    return float((found.double().cpu() - expected).abs().max()) / scale


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("float_factors", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_bodies_and_torch_add_each_adapters_product(
    host: HostLauncher,
    form: tuple[tuple[int, ...], tuple[int, ...]],
    float_factors: bool,
    dtype: torch.dtype,
) -> None:
    for size in SIZES:
        groups, given = made(form, size, dtype, torch.float32 if float_factors else dtype)
        y, low = expected_of(groups, given)
        body = partial(low_rank.launch_grouped_low_rank_, host)
        for add in (body, low_rank.grouped_low_rank_):
            found = given["y"].clone()
            found_low = add(found, given["x"], given["a"], given["b"], groups)
            assert found_low.dtype == found.dtype == dtype
            assert found_low.shape == (groups.tokens, groups.max_rank)
            assert error_of(found, y) < BOUND[dtype], (size, add)
            assert error_of(found_low, low) < BOUND[dtype], (size, add)


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("form", FORMS)
def test_bodies_and_torch_give_each_adapters_gradient(
    host: HostLauncher, form: tuple[tuple[int, ...], tuple[int, ...]], dtype: torch.dtype
) -> None:
    for columns in (1, 24, 65, 200):
        groups, given = made(form, (columns, 8), dtype, dtype)
        left = torch.randn(groups.tokens, groups.max_rank).to(dtype)
        right = given["x"]
        expected = torch.zeros(groups.rank, columns, dtype=torch.float64)
        token = row = 0
        for count, rank, scale in zip(
            groups.token_counts, groups.ranks, groups.scales, strict=True
        ):
            rows = slice(token, token + count)
            product = left[rows, :rank].double().t() @ right[rows].double()
            expected[row : row + rank] = scale * product
            token, row = token + count, row + rank
        for start_left, start_right in ((left, right), (off_by_one(left), off_by_one(right))):
            given_here = start_left, start_right, groups
            found = low_rank.launch_grouped_low_rank_gradient(host, *given_here)
            assert found.dtype == torch.float32
            assert error_of(found, expected) < 3e-6, columns
            found = low_rank.grouped_low_rank_gradient(*given_here)
            assert found.dtype == torch.float32
            assert error_of(found, expected) < BOUND[dtype], columns


@pytest.mark.parametrize(("ranks", "kernels"), [((8,), []), ((8, 4), ["low_rank_f32"])])
def test_the_product_of_one_adapter_is_left_to_torch(
    host: HostLauncher, ranks: tuple[int, ...], kernels: list[str]
) -> None:
    groups, given = made(((5,) * len(ranks), ranks), (24, 8), torch.float32, torch.float32)
    y, low = expected_of(groups, given)
    host.launched.clear()
    with dispatch.chosen(host, CPU):
        found_low = dispatch.grouped_low_rank_(
            given["y"], given["x"], given["a"], given["b"], groups
        )
    assert host.launched == kernels
    assert error_of(given["y"], y) < BOUND[torch.float32]
    assert error_of(found_low, low) < BOUND[torch.float32]


def test_few_products_of_the_gradient_are_left_to_torch(host: HostLauncher) -> None:
    for ranks, kernels in (((8, 4), []), ((8, 4, 8), ["low_rank_gradient_f32"])):
        form = ((5,) * len(ranks), ranks)
        groups, given = made(form, (24, 8), torch.float32, torch.float32)
        left = torch.randn(groups.tokens, groups.max_rank)
        host.launched.clear()
        with dispatch.chosen(host, CPU):
            dispatch.grouped_low_rank_gradient(left, given["x"], groups)
        assert host.launched == kernels


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("float_factors", [False, True])
def test_tensors_may_start_at_any_address(
    host: HostLauncher, float_factors: bool, dtype: torch.dtype
) -> None:
    for size in SIZES:
        factor_dtype = torch.float32 if float_factors else dtype
        groups, given = made(FORMS[1], size, dtype, factor_dtype)
        y, low = expected_of(groups, given)
        for moved in ("y", "x", "a", "b"):
            now = {**given, "y": given["y"].clone()}
            now[moved] = off_by_one(now[moved])
            found_low = low_rank.launch_grouped_low_rank_(
                host, now["y"], now["x"], now["a"], now["b"], groups
            )
            assert error_of(now["y"], y) < BOUND[dtype], (size, moved)
            assert error_of(found_low, low) < BOUND[dtype], (size, moved)


def test_bodies_give_a_token_the_same_bits_whatever_else_is_in_the_batch(
    host: HostLauncher,
) -> None:
    groups, given = made(((9, 30, 4), (5, 70, 16)), (72, 96), torch.bfloat16, torch.float32)
    together = given["y"].clone()
    low_rank.launch_grouped_low_rank_(host, together, given["x"], given["a"], given["b"], groups)
    token = row = 0
    for count, rank, scale in zip(groups.token_counts, groups.ranks, groups.scales, strict=True):
        rows, mine = slice(token, token + count), slice(row, row + rank)
        alone = given["y"][rows].clone()
        low_rank.launch_grouped_low_rank_(
            host,
            alone,
            given["x"][rows],
            given["a"][mine],
            given["b"][mine],
            groups_of([count], [rank], [scale], CPU),
        )
        assert torch.equal(alone, together[rows])
        token, row = token + count, row + rank


def test_nothing_outside_the_tensors_is_written_or_needed(host: HostLauncher) -> None:
    groups, given = made(((7, 3), (3, 5)), (24, 40), torch.float32, torch.float32)
    room = {name: torch.full((value.numel() + 32,), float("nan")) for name, value in given.items()}
    inside = {
        name: room[name][16:-16].view(value.shape).copy_(value) for name, value in given.items()
    }
    expected, _ = expected_of(groups, given)
    low_rank.launch_grouped_low_rank_(
        host, inside["y"], inside["x"], inside["a"], inside["b"], groups
    )
    assert error_of(inside["y"], expected) < BOUND[torch.float32]
    assert bool(room["y"][:16].isnan().all())
    assert bool(room["y"][-16:].isnan().all())


def test_ranks_past_the_kernels_go_through_torch(host: HostLauncher) -> None:
    groups, given = made(((4,), (129,)), (8, 8), torch.float32, torch.float32)
    expected, _ = expected_of(groups, given)
    arguments = given["y"], given["x"], given["a"], given["b"], groups
    with pytest.raises(KernelError, match=r"of rank 128 at most; got .* and rank 129"):
        low_rank.launch_grouped_low_rank_(host, *arguments)
    with dispatch.chosen(host, CPU):
        dispatch.grouped_low_rank_(*arguments)
    assert error_of(given["y"], expected) < 1e-5


def test_wrong_shapes_strides_and_dtypes_are_refused(host: HostLauncher) -> None:
    groups, given = made(((4, 2), (2, 3)), (8, 16), torch.float32, torch.float32)
    y, x, a, b = given["y"], given["x"], given["a"], given["b"]
    with pytest.raises(KernelError, match=r"x must be \(6, 8\) .* got \(5, 8\)"):
        low_rank.launch_grouped_low_rank_(host, y, x[:5], a, b, groups)
    with pytest.raises(KernelError, match=r"b must be \(5, 16\) .* got \(16, 5\)"):
        low_rank.launch_grouped_low_rank_(host, y, x, a, b.t().contiguous(), groups)
    with pytest.raises(KernelError, match=r"y must be \(6, 16\) in torch.float32"):
        low_rank.launch_grouped_low_rank_(host, y.half(), x, a, b, groups)
    with pytest.raises(KernelError, match="a must be contiguous"):
        low_rank.launch_grouped_low_rank_(host, y, x, torch.randn(8, 5).t(), b, groups)
    with pytest.raises(KernelError, match=r"left must be \(6, 3\)"):
        low_rank.launch_grouped_low_rank_gradient(host, x, x, groups)
    elsewhere = groups_of((4, 2), (2, 3), (1.0, 1.0), torch.device("meta"))
    with pytest.raises(KernelError, match="the groups must be on cpu, they are on meta"):
        low_rank.launch_grouped_low_rank_(host, y, x, a, b, elsewhere)


def test_groups_that_contradict_themselves_are_refused() -> None:
    with pytest.raises(KernelError, match="must have one length, got 2, 1 and 2"):
        groups_of([1, 2], [3], [1.0, 1.0], CPU)
    with pytest.raises(KernelError, match="must not be negative"):
        groups_of([1, -2], [3, 3], [1.0, 1.0], CPU)


def test_torch_finds_no_fault_with_the_operator(device: torch.device) -> None:
    groups, given = made(((3, 0, 4), (2, 1, 5)), (8, 6), torch.float32, torch.float32, device)
    leaves = [tensor.requires_grad_() for tensor in given.values()]
    opcheck(ops.grouped_low_rank, (*leaves, [3, 0, 4], [2, 1, 5], list(groups.scales)))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("float_factors", [False, True])
@pytest.mark.parametrize("form", [*FORMS, ((300, 1000, 700), (16, 8, 64))])
def test_the_gpu_adds_each_adapters_product_and_gives_its_gradient(
    form: tuple[tuple[int, ...], tuple[int, ...]], float_factors: bool, dtype: torch.dtype
) -> None:
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    device = torch.device("cuda", 0)
    for size in (*SIZES, (2048, 4096)):
        factor_dtype = torch.float32 if float_factors else dtype
        groups, given = made(form, size, dtype, factor_dtype, device)
        y, low = expected_of(groups, given)
        arguments = given["y"], given["x"], given["a"], given["b"], groups
        found_low = dispatch.grouped_low_rank_(*arguments)
        assert error_of(given["y"], y) < BOUND[dtype]
        assert error_of(found_low, low) < BOUND[dtype]
        found = dispatch.grouped_low_rank_gradient(found_low, given["x"], groups)
        plain = low_rank.grouped_low_rank_gradient(found_low.float(), given["x"].float(), groups)
        # plain may go through TF32, and few products go through torch in x's own dtype
        assert error_of(found, plain.double().cpu()) < max(1e-3, BOUND[dtype])
