"""Launch every kernel once at odd shapes and strides, for a memory checker to watch.

    compute-sanitizer --tool memcheck python scripts/launch_kernels.py
    compute-sanitizer --tool racecheck python scripts/launch_kernels.py
    compute-sanitizer --tool initcheck python scripts/launch_kernels.py

Prints the kernels that ran, and fails if one of `kernels.json` did not.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from struct import Struct

import torch
from torch import Tensor

from fedtune.kernels import dispatch, low_rank
from fedtune.kernels.driver import RECORD, Launcher
from fedtune.kernels.low_rank import groups_of
from fedtune.kernels.packed import SUPERBLOCK, Bits, PackedWeights, padded

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDTHS: tuple[Bits, ...] = (2, 3, 4, 8)
GPU = torch.device("cuda", 0)


class Recorder:
    """A launcher that remembers what it launched, and waits for it."""

    def __init__(self, launcher: Launcher) -> None:
        self._launcher, self.processors = launcher, launcher.processors
        self.launched: set[str] = set()

    def launch(
        self, name: str, teams: int, threads: int, layout: Struct, *arguments: float
    ) -> None:
        self.launched.add(name)
        self._launcher.launch(name, teams, threads, layout, *arguments)
        torch.cuda.synchronize()


def launch_all() -> None:
    for dtype in DTYPES:
        for bits in WIDTHS:
            _dequantise(bits, dtype)
        _cross_entropy(dtype)
        _swiglu(dtype)
        _low_rank_gradient(dtype)
    for dtype, bits in product(DTYPES[1:], WIDTHS):
        _packed_product(bits, dtype)
    for dtype, other in product(DTYPES, DTYPES):
        if other in (dtype, torch.float32):
            _rms_norm(dtype, other)
            _rotate(dtype, other)
            _low_rank(dtype, other)


def _numbers(*shape: int, dtype: torch.dtype) -> Tensor:
    """A view that starts one value into its storage."""
    count = 1
    for size in shape:
        count *= size
    return torch.randn(count + 1, device=GPU).to(dtype)[1:].view(shape)


def _packed(bits: Bits, shape: tuple[int, int]) -> PackedWeights:
    total = padded(shape[0] * shape[1])
    return PackedWeights(
        codes=torch.randint(256, (total * bits // 8,), dtype=torch.uint8, device=GPU),
        scale_codes=torch.randint(256, (total // 32,), dtype=torch.uint8, device=GPU),
        scale_steps=torch.rand(-(-total // 32 // SUPERBLOCK), device=GPU),
        scale_offset=torch.tensor(0.1, device=GPU),
        codebook=torch.rand(1 << bits, device=GPU),
        bits=bits,
        block=32,
        shape=shape,
    )


def _dequantise(bits: Bits, dtype: torch.dtype) -> None:
    for shape in ((1, 1), (37, 1111)):
        packed = _packed(bits, shape)
        dispatch.dequantise(packed, 0, torch.empty(packed.weights, dtype=dtype, device=GPU))
        dispatch.dequantise(packed, 0, _numbers(packed.weights, dtype=dtype))


def _cross_entropy(dtype: torch.dtype) -> None:
    for rows, vocabulary in ((1, 1), (3, 30011)):
        targets = torch.zeros(rows, dtype=torch.int64, device=GPU)
        weights = torch.ones(rows, device=GPU)
        dispatch.softmax_cross_entropy_(_numbers(rows, vocabulary, dtype=dtype), targets, weights)


def _swiglu(dtype: torch.dtype) -> None:
    for columns in (1, 1024, 4099):
        both = _numbers(3, 2 * columns, dtype=dtype)
        gate, up = both[:, :columns], both[:, columns:]
        dispatch.swiglu_backward_(dispatch.swiglu(gate, up), gate, up)


def _rms_norm(dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    for columns in (1, 128, 333, 5003, 8192):
        x, weight = _numbers(9, columns, dtype=dtype), torch.ones(columns, device=GPU)
        y, inverse_rms = dispatch.rms_norm(x, weight.to(weight_dtype), 1e-5)
        dispatch.rms_norm_backward(y, x, weight.to(weight_dtype), inverse_rms)


def _rotate(dtype: torch.dtype, angle_dtype: torch.dtype) -> None:
    for heads, head_dim in ((1, 2), (7, 20), (5, 128)):
        angles = torch.rand(11, head_dim, device=GPU).to(angle_dtype)
        dispatch.rotate_(torch.rand(11, heads, head_dim, device=GPU).to(dtype), angles, angles)
        dispatch.rotate_(_numbers(11, heads, head_dim, dtype=dtype), angles, angles, inverse=True)


def _packed_product(bits: Bits, dtype: torch.dtype) -> None:
    packed = _packed(bits, (37, 512))
    for tokens in (1, 13, 32):
        dispatch.packed_product(_numbers(tokens, 512, dtype=dtype), packed)


def _low_rank(dtype: torch.dtype, factor_dtype: torch.dtype) -> None:
    for columns, out in ((40, 24), (301, 205)):
        groups = groups_of((0, 5, 27, 1), (4, 3, 40, 0), (1.0, 0.5, 2.0, 1.0), GPU)
        y, x = _numbers(33, out, dtype=dtype), _numbers(33, columns, dtype=dtype)
        a = _numbers(47, columns, dtype=factor_dtype)
        dispatch.grouped_low_rank_(y, x, a, _numbers(47, out, dtype=factor_dtype), groups)


def _low_rank_gradient(dtype: torch.dtype) -> None:
    groups = groups_of((0, 5, 27, 1), (4, 3, 40, 0), (1.0, 0.5, 2.0, 1.0), GPU)
    for left in (
        _numbers(33, groups.max_rank, dtype=dtype),
        torch.randn(33, groups.max_rank, device=GPU).to(dtype),
    ):
        right = _numbers(33, 205, dtype=dtype)
        launcher = dispatch.launcher_of(right)
        assert launcher is not None
        # Not by way of dispatch, which leaves few products to torch.
        low_rank.launch_grouped_low_rank_gradient(launcher, left, right, groups)


@contextmanager
def recorded() -> Iterator[Recorder]:
    launcher = dispatch.launcher_of(torch.empty(0, device=GPU))
    if launcher is None:
        sys.exit(f"no compiled kernels: {dispatch.paths()}")
    recorder = Recorder(launcher)
    with dispatch.chosen(recorder, GPU):
        yield recorder


def main() -> int:
    if not torch.cuda.is_available():
        print("there is no CUDA device")
        return 2
    with recorded() as recorder:
        launch_all()
    kernels = set(json.loads(RECORD.read_text(encoding="utf-8"))["kernels"])
    print(f"{len(recorder.launched)} kernels ran")
    missing = sorted(kernels - recorder.launched)
    if missing:
        print(f"not launched: {', '.join(missing)}")
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
