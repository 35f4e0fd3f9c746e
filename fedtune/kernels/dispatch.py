"""The kernels that the rest of the program calls: compiled ones where they run, else plain torch.

The path is chosen once for each device, when its first tensor arrives, and logged: on a GPU the
CUDA kernels, on a CPU C where the device can compile it, beside plain torch for what C leaves.
`FEDTUNE_KERNELS` can ask for one path. `reference` says what every function means.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from fedtune.config import c_compilers, cache_folder, kernel_path
from fedtune.errors import KernelError
from fedtune.kernels import launches, low_rank, reference, unpack
from fedtune.kernels import packed_product as packed_products
from fedtune.kernels.driver import Driver, Launcher
from fedtune.kernels.low_rank import Groups
from fedtune.kernels.native import NativeKernels, NoCompilerError, load_native
from fedtune.kernels.packed import PackedWeights

LOGGER = logging.getLogger(__name__)

_LAUNCHERS: dict[torch.device, Launcher | None] = {}
_NATIVE: dict[torch.device, NativeKernels] = {}
"""Kernels in C, on a CPU that has them; nothing launches kernels there."""
_WHY_TORCH: dict[torch.device, str] = {}


def dequantise(packed: PackedWeights, first: int, out: Tensor) -> Tensor:
    """See `reference.dequantise`."""
    launcher = launcher_of(out)
    if launcher is None:
        native = _NATIVE.get(out.device)
        return (unpack if native is None else native).dequantise(packed, first, out)
    return launches.dequantise(launcher, packed, first, out)


def softmax_cross_entropy_(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """See `reference.softmax_cross_entropy_`."""
    launcher = _launcher_of(logits)
    if launcher is None:
        return reference.softmax_cross_entropy_(logits, targets, weights)
    return launches.softmax_cross_entropy_(launcher, logits, targets, weights)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """See `reference.swiglu`."""
    launcher = _launcher_of(gate, up)
    if launcher is None:
        return reference.swiglu(gate, up)
    return launches.swiglu(launcher, gate, up)


def swiglu_backward_(gradient: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """See `reference.swiglu_backward_`."""
    launcher = _launcher_of(gate, up, gradient)
    if launcher is None:
        return reference.swiglu_backward_(gradient, gate, up)
    return launches.swiglu_backward_(launcher, gradient, gate, up)


def rms_norm(
    x: Tensor, weight: Tensor, epsilon: float, weight_offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    """See `reference.rms_norm`."""
    launcher = _launcher_of(x, weight)
    if launcher is None:
        return reference.rms_norm(x, weight, epsilon, weight_offset)
    return launches.rms_norm(launcher, x, weight, epsilon, weight_offset)


def rms_norm_backward(
    gradient: Tensor, x: Tensor, weight: Tensor, inverse_rms: Tensor, weight_offset: float = 0.0
) -> Tensor:
    """See `reference.rms_norm_backward`."""
    launcher = _launcher_of(x, weight, gradient)
    if launcher is None:
        return reference.rms_norm_backward(gradient, x, weight, inverse_rms, weight_offset)
    return launches.rms_norm_backward(launcher, gradient, x, weight, inverse_rms, weight_offset)


def rotate_(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool = False) -> Tensor:
    """See `reference.rotate_`."""
    launcher = _launcher_of(x, cos, sin)
    if launcher is None:
        return reference.rotate_(x, cos, sin, inverse)
    return launches.rotate_(launcher, x, cos, sin, inverse)


def grouped_low_rank_(y: Tensor, x: Tensor, a: Tensor, b: Tensor, groups: Groups) -> Tensor:
    """See `low_rank.grouped_low_rank_`."""
    launcher = launcher_of(x)
    if launcher is None or not (low_rank.wins(groups) and low_rank.takes(x, a, b, groups)):
        return low_rank.grouped_low_rank_(y, x, a, b, groups)
    return low_rank.launch_grouped_low_rank_(launcher, y, x, a, b, groups)


def grouped_low_rank_gradient(left: Tensor, right: Tensor, groups: Groups) -> Tensor:
    """See `low_rank.grouped_low_rank_gradient`."""
    launcher = launcher_of(right)
    if launcher is None or not low_rank.takes_gradient(right, groups):
        return low_rank.grouped_low_rank_gradient(left, right, groups)
    return low_rank.launch_grouped_low_rank_gradient(launcher, left, right, groups)


def packed_product(x: Tensor, packed: PackedWeights) -> Tensor:
    """See `packed_product.packed_product`; meant for where `packed_product_wins`."""
    launcher = launcher_of(x)
    if launcher is None or not packed_products.launchable(x.shape[0], packed, x.dtype):
        return packed_products.packed_product(x, packed)
    return packed_products.launch_packed_product(launcher, x, packed)


def packed_product_wins(tokens: int, packed: PackedWeights, dtype: torch.dtype) -> bool:
    """Whether `packed_product` is the faster way to x W^T; if not, unpack and multiply."""
    launcher = launcher_of(packed.codes)
    return launcher is not None and packed_products.launchable(tokens, packed, dtype)


# ---------------------------------------------------------------- which path


def launcher_of(tensor: Tensor) -> Launcher | None:
    """What runs compiled kernels on a tensor's device; None where plain torch does the work."""
    device = tensor.device
    try:
        return _LAUNCHERS[device]
    except KeyError:
        return _choose(device)


def _launcher_of(*tensors: Tensor) -> Launcher | None:
    """The same, for kernels that C has too: of tensors of the dtype that it knows."""
    launcher = launcher_of(tensors[0])
    if launcher is None:
        native = _NATIVE.get(tensors[0].device)
        return native if native is not None and native.launches(*tensors) else None
    return launcher


@contextmanager
def chosen(path: Launcher | NativeKernels | None, device: torch.device) -> Iterator[None]:
    """Take one path on a device for a while; None: plain torch."""
    launcher, native = launcher_of(torch.empty(0, device=device)), _NATIVE.get(device)
    _set(device, path)
    try:
        yield
    finally:
        _set(device, launcher or native)


def path_of(device: torch.device) -> str:
    """Which path a device's kernels take, and why if it is plain torch, in words for people."""
    launcher = _choose(device)
    if launcher is not None:
        return "compiled CUDA kernels"
    native = _NATIVE.get(device)
    if native is not None:
        return f"compiled C ({native.description})"
    return f"plain torch ({_WHY_TORCH.get(device, 'asked for')})"


def paths() -> dict[str, str]:
    """For the CPU and every GPU: `path_of` it."""
    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        devices += [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    return {str(device): path_of(device) for device in devices}


def _set(device: torch.device, path: Launcher | NativeKernels | None) -> None:
    _NATIVE.pop(device, None)
    if isinstance(path, NativeKernels):
        _NATIVE[device], path = path, None
    _LAUNCHERS[device] = path


def _choose(device: torch.device) -> Launcher | None:
    if device in _LAUNCHERS:
        return _LAUNCHERS[device]
    path: Launcher | NativeKernels | None = None
    asked = kernel_path()
    try:
        if asked == "torch":
            _WHY_TORCH[device] = "FEDTUNE_KERNELS asks for it"
        elif device.type == "cpu":
            path = load_native(c_compilers(), cache_folder() / "kernels")
        elif device.type == "cuda" and torch.version.cuda is not None:
            path = Driver(device.index)
        else:
            _WHY_TORCH[device] = (
                "this torch is not built for CUDA"
                if device.type == "cuda"
                else f"there are no compiled kernels for {device.type}"
            )
    except KernelError as error:
        if asked == "c" and device.type == "cpu":
            raise
        _WHY_TORCH[device] = str(error)
        if device.type == "cpu" and not isinstance(error, NoCompilerError):
            LOGGER.warning("no compiled C on this CPU, which is slower: %s", error)
    _set(device, path)
    LOGGER.info("kernels on %s: %s", device, path_of(device))
    return _LAUNCHERS[device]
