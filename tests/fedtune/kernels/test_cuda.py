"""What only a GPU can show: recorded graphs, streams, threads, whole matrices, refused launches.

The arithmetic is tested beside each kernel, over the same paths and this one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from struct import Struct

import pytest
import torch
from oracle import random_packed
from tolerances import assert_near, random
from torch import Tensor

from fedtune.errors import KernelError
from fedtune.kernels import dispatch, reference
from fedtune.kernels.packed import Bits

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
GPU = torch.device("cuda", 0)
BF16 = torch.bfloat16


def operations() -> dict[str, tuple[Callable[[], None], list[Tensor]]]:
    """Each kernel as something to run, which writes to tensors that stay, and those tensors."""
    packed = random_packed(4, 64, (64, 512))[0].to(GPU)
    out = torch.zeros(packed.weights, dtype=BF16, device=GPU)
    logits = random(9, 1003, dtype=BF16, device=GPU)
    start, targets = logits.clone(), torch.arange(9, device=GPU)
    weights, losses = torch.ones(9, device=GPU), torch.zeros(9, device=GPU)
    x, weight = random(9, 1024, dtype=BF16, device=GPU), random(1024, dtype=BF16, device=GPU)
    y, dx = torch.zeros_like(x), torch.zeros_like(x)
    gate, up, product = x.clone(), x.flip(0).clone(), torch.zeros_like(x)
    turned, angle = x.clone().view(9, 8, 128), random(9, 128, dtype=BF16, device=GPU)

    def cross_entropy() -> None:
        logits.copy_(start)
        losses.copy_(dispatch.softmax_cross_entropy_(logits, targets, weights))

    def normalise() -> None:
        result, inverse_rms = dispatch.rms_norm(x, weight, 1e-5)
        y.copy_(result)
        dx.copy_(dispatch.rms_norm_backward(y, x, weight, inverse_rms))

    def gated() -> None:
        gate.copy_(x)
        up.copy_(x)
        product.copy_(dispatch.swiglu(gate, up))
        dispatch.swiglu_backward_(x, gate, up)

    def rotate() -> None:
        turned.copy_(x.view(9, 8, 128))
        dispatch.rotate_(turned, angle, angle)

    def unpack() -> None:
        dispatch.dequantise(packed, 0, out)

    return {
        "dequantise": (unpack, [out]),
        "cross-entropy": (cross_entropy, [logits, losses]),
        "rms norm": (normalise, [y, dx]),
        "swiglu": (gated, [gate, up, product]),
        "rotate": (rotate, [turned]),
    }


NAMES = ("dequantise", "cross-entropy", "rms norm", "swiglu", "rotate")


@pytest.mark.parametrize("name", NAMES)
def test_a_recorded_graph_gives_the_same_bits(name: str) -> None:
    run, results = operations()[name]
    run()
    torch.cuda.synchronize()
    expected = [result.clone() for result in results]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for result in results:
        result.zero_()
    graph.replay()
    for result, wanted in zip(results, expected, strict=True):
        assert bool(wanted.any())
        assert torch.equal(result, wanted)


@pytest.mark.parametrize("name", NAMES)
def test_kernels_run_on_the_current_stream_in_order(name: str) -> None:
    run, results = operations()[name]
    run()
    torch.cuda.synchronize()
    expected = [result.clone() for result in results]
    for result in results:
        result.zero_()
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # a kernel on another stream would be done before this one
        run()
        copies = [result.clone() for result in results]
        assert not stream.query()
    torch.cuda.default_stream().synchronize()
    stream.synchronize()
    for copy, wanted in zip(copies, expected, strict=True):
        assert torch.equal(copy, wanted)


def test_a_thread_that_never_used_cuda_can_launch() -> None:
    packed, _ = random_packed(4, 64, (64, 512))
    packed, out = packed.to(GPU), torch.zeros(64 * 512, device=GPU)
    expected = reference.dequantise(packed, 0, torch.empty_like(out))
    launcher = dispatch.launcher_of(out)
    assert launcher is not None
    thread = threading.Thread(target=dispatch.dequantise, args=(packed, 0, out))
    thread.start()
    thread.join()
    torch.cuda.synchronize()
    assert torch.equal(out, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one CUDA device")
def test_a_device_that_is_not_current_can_be_used() -> None:
    packed = random_packed(4, 64, (64, 512))[0].to(torch.device("cuda", 1))
    out = torch.zeros(64 * 512, device="cuda:1")
    assert torch.cuda.current_device() == 0
    dispatch.dequantise(packed, 0, out)
    assert torch.equal(out, reference.dequantise(packed, 0, torch.empty_like(out)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_whole_matrix_is_unpacked_to_the_bits_of_the_reference(
    bits: Bits, dtype: torch.dtype
) -> None:
    packed = random_packed(bits, 64, (4096, 3001))[0].to(GPU)
    out = torch.empty(packed.shape, dtype=dtype, device=GPU)
    dispatch.dequantise(packed, 0, out)
    assert torch.equal(out, reference.dequantise(packed, 0, torch.empty_like(out)))


@pytest.mark.parametrize("vocabulary", [32000, 128256, 262144, 151937])
def test_wide_vocabularies_have_the_losses_of_torch(vocabulary: int) -> None:
    logits = random(33, vocabulary, dtype=BF16, device=GPU, scale=4.0)
    targets = torch.arange(33, device=GPU) * 900
    weights = torch.full((33,), 1 / 33, device=GPU)
    leaf = logits.double().requires_grad_()
    expected = torch.nn.functional.cross_entropy(leaf, targets, reduction="none")
    expected.mean().backward()
    losses = dispatch.softmax_cross_entropy_(logits, targets, weights)
    assert_near(losses, expected.detach(), absolute=1e-5)
    assert leaf.grad is not None
    assert_near(logits, leaf.grad, absolute=1e-8)


def test_a_refused_launch_names_the_kernel_and_the_error() -> None:
    launcher = dispatch.launcher_of(torch.empty(0, device=GPU))
    assert launcher is not None
    with pytest.raises(KernelError, match="launching dequantise_4_f32 with 1 blocks of 4096"):
        launcher.launch("dequantise_4_f32", 1, 4096, Struct("@8q"), *[0] * 8)


def test_tensors_on_two_devices_are_refused() -> None:
    packed, _ = random_packed(4, 64, (2, 256))
    with pytest.raises(KernelError, match="tensors must be on one device, got cuda:0 and cpu"):
        dispatch.dequantise(packed, 0, torch.empty(512, device=GPU))
