"""What each function of the facade means as launches of compiled kernels.

Same signatures as `reference`, after a launcher. Everything that a GPU would read wrongly, such as
another shape, dtype or device than a kernel expects, is refused here, before its address is taken.
"""

from __future__ import annotations

from struct import Struct

import torch
from torch import Tensor

from fedtune.errors import KernelError
from fedtune.kernels.driver import Launcher
from fedtune.kernels.packed import GROUP, PackedWeights, padded

SUFFIX = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
MOST_TEAMS = 2**31 - 1
"""Blocks that one launch may have; bodies take the rest in turns."""

# The structs of arguments, in the order of their fields in cuda/*.h.
_DEQUANTISE = Struct("@PPPPPPqqqii")
_CROSS_ENTROPY = Struct("@PPPPqqq")
_SWIGLU = Struct("@PPPqqqqqi")
_RMS_NORM = Struct("@PPPPPqqqqffi")
_ROTATE = Struct("@PPPqqqiiii")
_DEQUANTISE_BYTES = 32  # of output that a thread takes at a time, as in dequantise.h
_SWIGLU_STEPS = 2


def dequantise(launcher: Launcher, packed: PackedWeights, first: int, out: Tensor) -> Tensor:
    count = out.numel()
    suffix = _suffix(out, "out")
    if first % GROUP or not 0 <= first <= first + count <= padded(packed.weights):
        raise KernelError(
            f"weights {first} to {first + count} cannot be unpacked: the first must be a multiple "
            f"of {GROUP}, and the matrix has {packed.weights}"
        )
    if not out.is_contiguous():
        raise KernelError(f"out must be contiguous, got strides {out.stride()}")
    codes, codebook, bits = packed.codes, packed.codebook, packed.bits
    scale_codes, steps, offset = packed.scale_codes, packed.scale_steps, packed.scale_offset
    _require_one_device(out, codes, scale_codes, steps, offset, codebook)
    if count == 0:
        return out
    start, target = codes.data_ptr(), out.data_ptr()
    if start % 8:
        codes = codes.clone()
        start = codes.data_ptr()
    threads = 512 if bits == 8 else 128
    teams = -(-count // (threads * _DEQUANTISE_BYTES // out.element_size()))
    if bits == 8:  # 32 KB of codebook for each team: large ones, and few, with more to do
        teams = min(teams, 6 * launcher.processors)
    launcher.launch(
        f"dequantise_{bits}_{suffix}",
        teams if teams < MOST_TEAMS else MOST_TEAMS,
        threads,
        _DEQUANTISE,
        start,
        scale_codes.data_ptr(),
        steps.data_ptr(),
        offset.data_ptr(),
        codebook.data_ptr(),
        target,
        codes.numel() // 3 * 2 if bits == 3 else 0,
        first,
        count,
        packed.block.bit_length() - 1,
        target % 16 == 0,
    )
    return out


def softmax_cross_entropy_(
    launcher: Launcher, logits: Tensor, targets: Tensor, weights: Tensor
) -> Tensor:
    suffix = _suffix(logits, "logits")
    _require_shape(logits, "logits", 2)
    rows, vocabulary = logits.shape
    if tuple(targets.shape) != (rows,) or tuple(weights.shape) != (rows,):
        raise KernelError(
            f"{rows} rows of logits need as many targets and weights, "
            f"got {tuple(targets.shape)} and {tuple(weights.shape)}"
        )
    _require_one_device(logits, targets, weights)
    losses = torch.zeros(rows, dtype=torch.float32, device=logits.device)
    if rows == 0 or vocabulary == 0:
        return losses
    _require_runs(logits, "logits")
    targets, weights = _contiguous(targets, torch.int64), _contiguous(weights, torch.float32)
    launcher.launch(
        f"cross_entropy_{suffix}",
        min(rows, MOST_TEAMS),
        _threads(-(-vocabulary // (16 // logits.element_size())), 4, 512),
        _CROSS_ENTROPY,
        logits.data_ptr(),
        targets.data_ptr(),
        weights.data_ptr(),
        losses.data_ptr(),
        rows,
        vocabulary,
        logits.stride(0),
    )
    return losses


def swiglu(launcher: Launcher, gate: Tensor, up: Tensor) -> Tensor:
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    _swiglu(launcher, "swiglu", gate, up, out)
    return out


def swiglu_backward_(
    launcher: Launcher, gradient: Tensor, gate: Tensor, up: Tensor
) -> tuple[Tensor, Tensor]:
    _swiglu(launcher, "swiglu_backward", gate, up, gradient)
    return gate, up


def _swiglu(launcher: Launcher, kernel: str, gate: Tensor, up: Tensor, other: Tensor) -> None:
    suffix = _suffix(gate, "gate")
    if up.shape != gate.shape or other.shape != gate.shape:
        raise KernelError(
            f"gate, up and gradient must have one shape, got {tuple(gate.shape)}, "
            f"{tuple(up.shape)} and {tuple(other.shape)}"
        )
    _require_one_dtype(gate, up, other)
    _require_one_device(gate, up, other)
    if gate.numel() == 0:
        return
    if gate.is_contiguous() and up.is_contiguous() and other.is_contiguous():
        rows, columns, strides = 1, gate.numel(), (0, 0, 0)
        aligned = (gate.data_ptr() | up.data_ptr() | other.data_ptr()) % 16 == 0
    else:
        gate, up = _as_rows(gate, "gate"), _as_rows(up, "up")
        other = other.reshape(-1, other.shape[-1])
        other = other if _has_runs(other) else other.contiguous()
        rows, columns = gate.shape
        strides = (gate.stride(0), up.stride(0), other.stride(0))
        aligned = _aligned(gate, up, other)
    tile = 256 * (16 // gate.element_size()) * _SWIGLU_STEPS
    launcher.launch(
        f"{kernel}_{suffix}",
        min(rows * -(-columns // tile), MOST_TEAMS),
        256,
        _SWIGLU,
        gate.data_ptr(),
        up.data_ptr(),
        other.data_ptr(),
        rows,
        columns,
        *strides,
        aligned,
    )


def rms_norm(
    launcher: Launcher, x: Tensor, weight: Tensor, epsilon: float, weight_offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    _require_shape(x, "x", 2)
    inverse_rms = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    y = _rms_norm(launcher, "rms_norm", x, weight, inverse_rms, x, epsilon, weight_offset)
    return y, inverse_rms


def rms_norm_backward(
    launcher: Launcher,
    gradient: Tensor,
    x: Tensor,
    weight: Tensor,
    inverse_rms: Tensor,
    weight_offset: float = 0.0,
) -> Tensor:
    _require_shape(x, "x", 2)
    if gradient.shape != x.shape or tuple(inverse_rms.shape) != (x.shape[0],):
        raise KernelError(
            f"x {tuple(x.shape)} needs a gradient of its shape and as many inverse_rms as rows, "
            f"got {tuple(gradient.shape)} and {tuple(inverse_rms.shape)}"
        )
    inverse_rms = _contiguous(inverse_rms, torch.float32)
    kernel = "rms_norm_backward"
    return _rms_norm(launcher, kernel, x, weight, inverse_rms, gradient, 0.0, weight_offset)


def _rms_norm(
    launcher: Launcher,
    kernel: str,
    x: Tensor,
    weight: Tensor,
    inverse_rms: Tensor,
    gradient: Tensor,
    epsilon: float,
    weight_offset: float,
) -> Tensor:
    suffix = _suffix(x, "x")
    rows, columns = x.shape
    if tuple(weight.shape) != (columns,):
        raise KernelError(f"x has {columns} columns, and weight has shape {tuple(weight.shape)}")
    _require_one_dtype(x, gradient)
    _require_one_device(x, weight, gradient, inverse_rms)
    out = torch.empty((rows, columns), dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    x = x if _has_runs(x) else x.contiguous()
    gradient = gradient if _has_runs(gradient) else gradient.contiguous()
    weight = _contiguous(weight, x.dtype if weight.dtype is x.dtype else torch.float32)
    runs = -(-columns // (16 // x.element_size()))
    short = runs <= 4 * 32  # a warp is enough, and waits for no other
    runs_each = 4 if kernel == "rms_norm" else 2  # that a thread keeps, as in kernels.h
    launcher.launch(
        f"{kernel}{'_short' if short else ''}_{suffix}_{_suffix(weight, 'weight')}",
        min(-(-rows // 8) if short else rows, MOST_TEAMS),
        256 if short else _threads(runs, runs_each, 512),
        _RMS_NORM,
        x.data_ptr(),
        weight.data_ptr(),
        inverse_rms.data_ptr(),
        gradient.data_ptr(),
        out.data_ptr(),
        rows,
        columns,
        x.stride(0),
        gradient.stride(0),
        epsilon,
        weight_offset,
        columns * x.element_size() % 16 == 0
        and _aligned(x, gradient, out)
        and weight.data_ptr() % 16 == 0,
    )
    return out


def rotate_(
    launcher: Launcher, x: Tensor, cos: Tensor, sin: Tensor, inverse: bool = False
) -> Tensor:
    suffix = _suffix(x, "x")
    _require_shape(x, "x", 3)
    tokens, heads, head_dim = x.shape
    if head_dim % 2 or tuple(cos.shape) != (tokens, head_dim) or cos.shape != sin.shape:
        raise KernelError(
            f"x {tuple(x.shape)} needs an even last size, and cos and sin of shape "
            f"{(tokens, head_dim)}, got {tuple(cos.shape)} and {tuple(sin.shape)}"
        )
    _require_one_device(x, cos, sin)
    if x.numel() == 0:
        return x
    if x.stride(2) != 1:
        raise KernelError(f"the last dimension of x must be dense, got strides {x.stride()}")
    both = cos.dtype is x.dtype and sin.dtype is x.dtype
    angle_dtype = x.dtype if both else torch.float32
    cos, sin = _contiguous(cos, angle_dtype), _contiguous(sin, angle_dtype)
    half, run = head_dim // 2, 16 // x.element_size()
    aligned = half % run == 0 and (x.data_ptr() | cos.data_ptr() | sin.data_ptr()) % 16 == 0
    launcher.launch(
        f"rotate_{suffix}_{_suffix(cos, 'cos')}",
        min(tokens, MOST_TEAMS),
        _threads(heads * -(-half // run), 2, 256),
        _ROTATE,
        x.data_ptr(),
        cos.data_ptr(),
        sin.data_ptr(),
        tokens,
        x.stride(0),
        x.stride(1),
        heads,
        half,
        inverse,
        aligned and x.stride(0) % run == 0 and x.stride(1) % run == 0,
    )
    return x


# ---------------------------------------------------------------- what kernels can read


def _threads(runs: int, runs_each: int, most: int) -> int:
    """Threads of a team that has so many runs of 16 bytes: a multiple of 32."""
    return min(max(-(-runs // (32 * runs_each)), 1) * 32, most)


def _has_runs(rows: Tensor) -> bool:
    """The values of a row lie side by side."""
    return rows.stride(1) == 1 or rows.shape[1] == 1


def _require_runs(rows: Tensor, name: str) -> None:
    if not _has_runs(rows):
        raise KernelError(f"rows of {name} must be dense, got strides {rows.stride()}")


def _as_rows(tensor: Tensor, name: str) -> Tensor:
    """A view (rows, last size) of a tensor that is written over."""
    try:
        rows = tensor.view(-1, tensor.shape[-1])
    except RuntimeError:
        raise KernelError(
            f"{name} {tuple(tensor.shape)} must be rows at equal distances, "
            f"got strides {tensor.stride()}"
        ) from None
    _require_runs(rows, name)
    return rows


def _aligned(*parts: Tensor) -> bool:
    """Every row of every part starts at a multiple of 16 bytes."""
    bits = 0
    for part in parts:
        bits |= part.data_ptr()
        if part.shape[0] > 1:
            bits |= part.stride(0) * part.element_size()
    return bits % 16 == 0


def _require_shape(tensor: Tensor, name: str, dimensions: int) -> None:
    if tensor.dim() != dimensions:
        raise KernelError(f"{name} must have {dimensions} dimensions, got {tuple(tensor.shape)}")


def _require_one_dtype(*tensors: Tensor) -> None:
    dtype = tensors[0].dtype
    for tensor in tensors:
        if tensor.dtype is not dtype:
            raise KernelError(f"tensors must have one dtype, got {dtype} and {tensor.dtype}")


def _suffix(tensor: Tensor, name: str) -> str:
    try:
        return SUFFIX[tensor.dtype]
    except KeyError:
        raise KernelError(
            f"{name} must be float32, bfloat16 or float16, got {tensor.dtype}"
        ) from None


def _require_one_device(*tensors: Tensor) -> None:
    index = tensors[0].get_device()  # faster than .device; -1 is the CPU
    for tensor in tensors:
        if tensor.get_device() != index:
            raise KernelError(
                f"tensors must be on one device, got {tensors[0].device} and {tensor.device}"
            )


def _contiguous(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor, or a copy if it has gaps or another dtype."""
    if tensor.dtype is dtype and tensor.is_contiguous():
        return tensor
    return tensor.to(dtype).contiguous()
