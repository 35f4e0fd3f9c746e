"""Random packed weights, and their values by arithmetic on Python and numpy integers alone."""

from __future__ import annotations

import numpy as np
import torch

from fedtune.kernels.packed import SUPERBLOCK, Bits, PackedWeights, padded


def random_packed(
    bits: Bits, block: int, shape: tuple[int, int], seed: int = 0
) -> tuple[PackedWeights, np.ndarray]:
    """Packed weights with random codes and scales; also the codes, one per weight."""
    generator = np.random.default_rng(seed)
    total = padded(shape[0] * shape[1])
    codes = generator.integers(0, 1 << bits, total).astype(np.uint8)
    blocks = total // block
    codebook = np.sort(generator.uniform(-1, 1, 1 << bits)).astype(np.float32)
    steps = generator.uniform(1e-4, 2e-4, -(-blocks // SUPERBLOCK)).astype(np.float32)
    packed = PackedWeights(
        codes=torch.from_numpy(_pack(codes, bits)),
        scale_codes=torch.from_numpy(generator.integers(0, 256, blocks).astype(np.uint8)),
        scale_steps=torch.from_numpy(steps),
        scale_offset=torch.tensor(0.0123),
        codebook=torch.from_numpy(codebook),
        bits=bits,
        block=block,
        shape=shape,
    )
    return packed, codes


def values_of(packed: PackedWeights, codes: np.ndarray) -> np.ndarray:
    """Float32 values of the padded row."""
    block_index = np.arange(len(codes)) // packed.block
    steps = packed.scale_steps.numpy()[block_index // SUPERBLOCK]
    products = packed.scale_codes.numpy()[block_index].astype(np.float32) * steps
    scales = packed.scale_offset.numpy() + products
    assert scales.dtype == np.float32
    values: np.ndarray = packed.codebook.numpy()[codes] * scales
    return values


def _pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes to bytes, by the words of `fedtune/kernels/packed.py`: first weight, highest bits."""
    planes = [codes] if bits != 3 else [codes & 3, codes >> 2]
    widths = [bits] if bits != 3 else [2, 1]
    parts = []
    for plane, width in zip(planes, widths, strict=True):
        each = np.unpackbits(plane[:, None], axis=1)[:, 8 - width :]
        parts.append(np.packbits(each.reshape(-1)))
    return np.concatenate(parts)
