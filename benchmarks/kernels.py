"""How fast each kernel is, as a share of the rate at which the device copies memory.

    python benchmarks/kernels.py [--quick] [--json]

A kernel that waits for memory alone reads and writes its bytes at the rate of a copy from the
device to itself; the share of that rate is how near it comes. Each time is the median of runs
that each launch a kernel many times in a row, over buffers that together do not fit in a cache.
The GPU sleeps until the launches of a run are queued, so that a time is the GPU's alone: the CPU
needs about as long for a call as a GPU for 100 MB.
"Plain torch" is the same work by the operations that transformers uses, with autograd where there
is a gradient. Without a CUDA device the table is of the CPU, in float32, at smaller sizes.

`--quick` takes fewer runs, and 4-bit weights in bf16 only.
"""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch
from reporting import parse_arguments, print_json, publish, table
from torch import Tensor
from torch.nn import functional

from fedtune.kernels import dispatch, reference
from fedtune.kernels.low_rank import groups_of
from fedtune.kernels.packed import SUPERBLOCK, Bits, PackedWeights, padded

BUFFERS = 4
LONGEST_SLEEP_S = 0.1
"""Work that takes the CPU longer to launch is measured with its launches."""
SLEEP_CYCLES_PER_S = 2e9
"""Of a GPU's clock, at most."""
WIDTHS: tuple[Bits, ...] = (2, 3, 4, 8)


@dataclass(frozen=True)
class Size:
    """How large the matrices are, and how often each is measured."""

    matrix: tuple[int, int]
    tokens: int
    hidden: int
    vocabulary: int
    heads: int
    copied_bytes: int
    runs: int
    launches: int


GPU = Size((4096, 14336), 4096, 4096, 128256, 40, 1 << 30, 9, 20)
GPU_QUICK = Size((4096, 14336), 4096, 4096, 128256, 40, 1 << 29, 3, 8)
CPU = Size((1024, 2816), 256, 1024, 16384, 16, 1 << 26, 5, 4)


@dataclass(frozen=True)
class Measurement:
    """One kernel's time for one launch, and what it moved."""

    name: str
    seconds: float
    moved_bytes: int
    plain_seconds: float


class Bench:
    """Measures on one device."""

    def __init__(self, device: torch.device, size: Size) -> None:
        self.device, self.size = device, size
        self.generator = torch.Generator(device).manual_seed(0)
        source = torch.empty(size.copied_bytes, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        seconds = self.seconds([lambda: target.copy_(source)])
        self.copy_bytes_per_s = 2 * size.copied_bytes / seconds

    def seconds(self, works: Sequence[Callable[[], object]]) -> float:
        """Median time of one launch, of launches that take turns over `works`."""
        for work in works:
            work()
        times = []
        launches = max(self.size.launches, len(works))
        began = time.perf_counter()
        for i in range(launches):
            works[i % len(works)]()
        queue_seconds = time.perf_counter() - began
        for _ in range(self.size.runs):
            if self.device.type == "cuda":
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                if queue_seconds < LONGEST_SLEEP_S:
                    torch.cuda._sleep(int(1.5 * queue_seconds * SLEEP_CYCLES_PER_S))
                start.record()
                for i in range(launches):
                    works[i % len(works)]()
                end.record()
                end.synchronize()
                times.append(start.elapsed_time(end) / 1e3 / launches)
            else:
                began = time.perf_counter()
                for i in range(launches):
                    works[i % len(works)]()
                times.append((time.perf_counter() - began) / launches)
        return median(times)

    def random(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(*shape, generator=self.generator, device=self.device).to(dtype)

    def packed(self, bits: Bits) -> PackedWeights:
        """Packed weights of random codes."""
        total, device = padded(self.size.matrix[0] * self.size.matrix[1]), self.device
        blocks = total // 64
        draw = partial(torch.randint, 256, generator=self.generator, device=device)
        return PackedWeights(
            codes=draw((total * bits // 8,), dtype=torch.uint8),
            scale_codes=draw((blocks,), dtype=torch.uint8),
            scale_steps=torch.rand(-(-blocks // SUPERBLOCK), device=device),
            scale_offset=torch.tensor(0.1, device=device),
            codebook=torch.linspace(-1, 1, 1 << bits, device=device),
            bits=bits,
            block=64,
            shape=self.size.matrix,
        )

    def dequantise(self, bits: Bits, dtype: torch.dtype) -> Measurement:
        matrices = [self.packed(bits) for _ in range(BUFFERS)]
        outs = [
            torch.empty(self.size.matrix, dtype=dtype, device=self.device) for _ in range(BUFFERS)
        ]
        pairs = list(zip(matrices, outs, strict=True))
        seconds = self.seconds([partial(dispatch.dequantise, m, 0, out) for m, out in pairs])
        plain = self.seconds([partial(reference.dequantise, m, 0, out) for m, out in pairs[:1]])
        moved = matrices[0].bytes + outs[0].numel() * outs[0].element_size()
        return Measurement(f"dequantise {bits} bits to {_name(dtype)}", seconds, moved, plain)

    def cross_entropy(self, dtype: torch.dtype) -> Measurement:
        rows = self.size.tokens // 4
        logits = [self.random(rows, self.size.vocabulary, dtype=dtype) for _ in range(2)]
        targets = torch.arange(rows, device=self.device)
        weights = torch.ones(rows, device=self.device)

        def plain() -> None:
            leaf = logits[0].detach().requires_grad_()
            functional.cross_entropy(leaf.float(), targets, reduction="sum").backward()

        works = [partial(dispatch.softmax_cross_entropy_, x, targets, weights) for x in logits]
        seconds = self.seconds(works)
        moved = 3 * logits[0].numel() * logits[0].element_size()
        return Measurement(
            f"cross-entropy with gradient, {_name(dtype)}", seconds, moved, self.seconds([plain])
        )

    def swiglu(self, dtype: torch.dtype) -> list[Measurement]:
        shape = (self.size.tokens, self.size.matrix[1])
        gate, up, gradient = (self.random(*shape, dtype=dtype) for _ in range(3))
        bytes_each = gate.numel() * gate.element_size()

        def plain(leaves: tuple[Tensor, Tensor]) -> Tensor:
            return functional.silu(leaves[0]) * leaves[1]

        leaves = (gate.clone().requires_grad_(), up.clone().requires_grad_())
        forward = Measurement(
            f"swiglu, {_name(dtype)}",
            self.seconds([partial(dispatch.swiglu, gate, up)]),
            3 * bytes_each,
            self.seconds([partial(plain, (gate, up))]),
        )
        backward = Measurement(
            f"swiglu backward, {_name(dtype)}",
            self.seconds([partial(dispatch.swiglu_backward_, gradient, gate, up)]),
            5 * bytes_each,
            self._backward_seconds(plain(leaves), leaves, gradient),
        )
        return [forward, backward]

    def rms_norm(self, dtype: torch.dtype) -> list[Measurement]:
        shape = (self.size.tokens, self.size.hidden)
        x, gradient = self.random(*shape, dtype=dtype), self.random(*shape, dtype=dtype)
        weight = self.random(self.size.hidden, dtype=dtype)
        bytes_each = x.numel() * x.element_size()
        inverse_rms = dispatch.rms_norm(x, weight, 1e-5)[1]

        def plain(leaf: Tensor) -> Tensor:
            wide = leaf.float()
            normal = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)
            return weight * normal.to(dtype)

        leaf = x.clone().requires_grad_()
        backward = partial(dispatch.rms_norm_backward, gradient, x, weight, inverse_rms)
        return [
            Measurement(
                f"rms norm, {_name(dtype)}",
                self.seconds([partial(dispatch.rms_norm, x, weight, 1e-5)]),
                2 * bytes_each,
                self.seconds([partial(plain, x)]),
            ),
            Measurement(
                f"rms norm backward, {_name(dtype)}",
                self.seconds([backward]),
                3 * bytes_each,
                self._backward_seconds(plain(leaf), (leaf,), gradient),
            ),
        ]

    def rotate(self, dtype: torch.dtype) -> Measurement:
        x = self.random(self.size.tokens, self.size.heads, 128, dtype=dtype)
        angles = self.random(self.size.tokens, 128, dtype=torch.float32)
        cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)

        def plain() -> Tensor:
            half = x.shape[-1] // 2
            turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
            return x * cos[:, None] + turned * sin[:, None]

        seconds = self.seconds([partial(dispatch.rotate_, x, cos, sin)])
        moved = 2 * x.numel() * x.element_size()
        return Measurement(f"rotate, {_name(dtype)}", seconds, moved, self.seconds([plain]))

    def grouped_low_rank(self, adapters: int, dtype: torch.dtype) -> list[Measurement]:
        """Adapters of ranks 4 to 32 over equal parts of the tokens, against a loop over them."""
        size = self.size
        counts = [size.tokens // adapters] * adapters
        ranks = [(4, 8, 16, 32)[i % 4] for i in range(adapters)]
        groups = groups_of(counts, ranks, [1.0] * adapters, self.device)
        y, x = (self.random(groups.tokens, size.hidden, dtype=dtype) for _ in range(2))
        a, b = (self.random(groups.rank, size.hidden, dtype=dtype) * 1e-3 for _ in range(2))
        low = dispatch.grouped_low_rank_(y, x, a, b, groups)
        parts = list(
            zip(
                x.split(counts),
                y.split(counts),
                a.split(ranks),
                [part.t().contiguous().t() for part in b.split(ranks)],
                [part[:, :rank] for part, rank in zip(low.split(counts), ranks, strict=True)],
                strict=True,
            )
        )

        def loop() -> None:
            for x_part, y_part, a_part, b_part, _ in parts:
                y_part.addmm_(x_part @ a_part.t(), b_part)

        def loop_gradient() -> None:
            for x_part, _, _, _, low_part in parts:
                low_part.t() @ x_part

        bytes_each = x.numel() * x.element_size()
        label = f"{adapters} adapters, {groups.tokens} tokens, {_name(dtype)}"
        return [
            Measurement(
                f"grouped low-rank: {label}",
                self.seconds([partial(dispatch.grouped_low_rank_, y, x, a, b, groups)]),
                3 * bytes_each + 2 * a.numel() * a.element_size(),
                self.seconds([loop]),
            ),
            Measurement(
                f"grouped low-rank gradient: {label}",
                self.seconds([partial(dispatch.grouped_low_rank_gradient, low, x, groups)]),
                bytes_each + 4 * a.numel(),
                self.seconds([loop_gradient]),
            ),
        ]

    def packed_product(self, bits: Bits, tokens: int, dtype: torch.dtype) -> list[Measurement]:
        """Against unpacking by our kernel and cuBLAS; bitsandbytes against the same."""
        matrices = [self.packed(bits) for _ in range(BUFFERS)]
        x = self.random(tokens, self.size.matrix[1], dtype=dtype)
        dense = torch.empty(self.size.matrix, dtype=dtype, device=self.device)

        def unpacked(packed: PackedWeights) -> Tensor:
            return x @ dispatch.dequantise(packed, 0, dense).t()

        plain = self.seconds([partial(unpacked, packed) for packed in matrices])
        seconds = self.seconds([partial(dispatch.packed_product, x, p) for p in matrices])
        label = f"{tokens} tokens, {bits} bits, {_name(dtype)}"
        found = [Measurement(f"packed product: {label}", seconds, matrices[0].bytes, plain)]
        if bits == 4 and importlib.util.find_spec("bitsandbytes") is not None:
            import bitsandbytes

            given = [
                bitsandbytes.functional.quantize_4bit(dense.normal_(), quant_type="nf4")
                for _ in matrices
            ]
            with torch.no_grad():
                theirs = self.seconds(
                    [partial(bitsandbytes.matmul_4bit, x, q.t(), state) for q, state in given]
                )
            name = f"bitsandbytes NF4: {label}"
            found.append(Measurement(name, theirs, matrices[0].bytes, plain))
        return found

    def launch_seconds(self) -> float:
        """Time of the CPU for a call whose work on the device is next to none."""
        x, weight = torch.zeros(1, 64, device=self.device), torch.ones(64, device=self.device)
        gradient, inverse_rms = torch.zeros_like(x), torch.ones(1, device=self.device)
        calls = 500
        dispatch.rms_norm_backward(gradient, x, weight, inverse_rms)
        began = time.perf_counter()
        for _ in range(calls):
            dispatch.rms_norm_backward(gradient, x, weight, inverse_rms)
        return (time.perf_counter() - began) / calls

    def _backward_seconds(
        self, result: Tensor, leaves: tuple[Tensor, ...], gradient: Tensor
    ) -> float:
        return self.seconds(
            [lambda: torch.autograd.grad(result, leaves, gradient, retain_graph=True)]
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def measure(bench: Bench, quick: bool) -> list[Measurement]:
    on_gpu = bench.device.type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    others = (torch.float16, torch.float32) if on_gpu and not quick else ()
    found = [
        bench.dequantise(bits, out_dtype)
        for bits in (WIDTHS if not quick else (4,))
        for out_dtype in (dtype, *others)
    ]
    found.append(bench.cross_entropy(dtype))
    found += bench.swiglu(dtype) + bench.rms_norm(dtype)
    found.append(bench.rotate(dtype))
    for adapters in (1, 16) if quick else (1, 4, 16, 64):
        found += bench.grouped_low_rank(adapters, dtype)
    if on_gpu:
        for tokens in (1, 32) if quick else (1, 4, 16, 32):
            for bits in (4,) if quick else WIDTHS:
                found += bench.packed_product(bits, tokens, dtype)
    return found


def main() -> int:
    arguments = parse_arguments(__doc__ or "")
    if torch.cuda.is_available():
        device, size = torch.device("cuda", 0), GPU_QUICK if arguments.quick else GPU
        name = torch.cuda.get_device_name(device)
    else:
        print("there is no CUDA device: this is the CPU's path", file=sys.stderr)
        device, size, name = torch.device("cpu"), CPU, "CPU"
    torch.set_flush_denormal(True)  # what is written over again and again shrinks
    bench = Bench(device, size)
    measurements = measure(bench, arguments.quick)
    rate, call_s = bench.copy_bytes_per_s, bench.launch_seconds()
    rows = [
        {
            "kernel": m.name,
            "time": f"{m.seconds * 1e6:.1f} us",
            "GB/s": f"{m.moved_bytes / m.seconds / 1e9:.0f}",
            "share of copy": f"{m.moved_bytes / m.seconds / rate:.0%}",
            "plain torch": f"{m.plain_seconds / m.seconds:.1f} x as long",
        }
        for m in measurements
    ]
    path = dispatch.paths()[str(device)]
    facts = (
        f"{name}, torch {torch.__version__}, {path}; it copies memory at {rate / 1e9:.0f} GB/s, "
        f"read and written; a call costs {call_s * 1e6:.1f} us of the CPU."
    )
    print(f"{facts}\n\n{table(rows)}")
    if not arguments.quick and device.type == "cuda":
        publish("Kernels", "python benchmarks/kernels.py", f"{facts}\n\n{table(rows)}")
    if arguments.json:
        shares = {m.name: round(m.moved_bytes / m.seconds / rate, 4) for m in measurements}
        gains = {m.name: round(m.plain_seconds / m.seconds, 3) for m in measurements}
        print_json(
            {
                "device": name,
                "path": path,
                "copy_gb_per_s": round(rate / 1e9, 1),
                "call_us": round(call_s * 1e6, 2),
                "share_of_copy": shares,
                "times_plain_torch": gains,
            }
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
