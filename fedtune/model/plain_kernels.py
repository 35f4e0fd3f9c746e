"""Stand-in for `fedtune.kernels.dispatch` until it is merged."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def softmax_cross_entropy_(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    highest = logits.float().amax(-1, keepdim=True) if logits.dtype != torch.float32 else None
    work = logits if highest is None else logits.float()
    picked = work.gather(1, targets[:, None])[:, 0].clone()
    top = work.amax(-1, keepdim=True)
    work.sub_(top).exp_()
    sums = work.sum(-1, keepdim=True)
    losses = (sums.log() + top)[:, 0] - picked
    work.mul_(weights[:, None] / sums)
    work.scatter_add_(1, targets[:, None], -weights[:, None].to(work.dtype))
    if work is not logits:
        logits.copy_(work)
    return losses


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return functional.silu(gate) * up


def swiglu_backward_(gradient: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    g, u, d = gate.float(), up.float(), gradient.float()
    s = torch.sigmoid(g)
    up_gradient = d * g * s
    gate_gradient = d * u * s * (1 + g * (1 - s))
    return gate.copy_(gate_gradient), up.copy_(up_gradient)


def rms_norm(
    x: Tensor, weight: Tensor, epsilon: float, weight_offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    wide = x.float()
    inverse = (wide.pow(2).mean(-1) + epsilon).rsqrt()
    normed = wide * inverse[:, None]
    if weight_offset:
        return (normed * (weight_offset + weight.float())).to(x.dtype), inverse
    return (weight * normed.to(x.dtype)).to(x.dtype), inverse


def rms_norm_backward(
    gradient: Tensor, x: Tensor, weight: Tensor, inverse_rms: Tensor, weight_offset: float = 0.0
) -> Tensor:
    inverse = inverse_rms[:, None]
    scaled = gradient.float() * (weight_offset + weight.float())
    normed = x.float() * inverse
    mean = (scaled * normed).mean(-1, keepdim=True)
    return ((scaled - normed * mean) * inverse).to(x.dtype)


def rotate_(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool = False) -> Tensor:
    half = x.shape[-1] // 2
    c, s = cos[:, None].float(), sin[:, None].float()
    if inverse:
        s = -s
    first, second = x[..., :half].float(), x[..., half:].float()
    rotated_first = first * c[..., :half] - second * s[..., :half]
    rotated_second = second * c[..., half:] + first * s[..., half:]
    x[..., :half] = rotated_first.to(x.dtype)
    x[..., half:] = rotated_second.to(x.dtype)
    return x
