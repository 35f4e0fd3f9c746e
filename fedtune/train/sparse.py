"""S2FT: train chosen input channels of a matrix, as an adapter whose A is fixed.

An update that is zero outside the columns S of a matrix is B A with one row of the identity in A
for each channel of S, and B free. So the fresh rows of A become rows of the identity, A stays
fixed, and B is trained: what is sent, joined and exported is an ordinary adapter. Nothing of the
layer's input is kept for the backward pass but the chosen channels.

What a device is sent in later rounds are the joined adapter's leading directions. Where all
devices choose the same channels those lie in S again, and with A fixed no device ever leaves S;
where each chooses its own, the joined adapter lies in all of theirs together.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from fedtune.lora.linear import Factors
from fedtune.records import ChannelChoice
from fedtune.train.start import fresh_directions


@torch.no_grad()
def pin_channels(
    factors: Mapping[str, Factors],
    choice: ChannelChoice,
    weight: Callable[[str], Tensor],
    inputs: Mapping[str, Tensor],
    seed: int,
) -> None:
    """Point the fresh rows of every trained A at channels, in place, and train B alone.

    Of the leading channels, as many as A has rows, the fresh rows take those that the directions
    sent hold least of.

    Args:
        choice: `random` is drawn by the seed, alike on every device and in every round; `weight`
            takes the columns of largest norm, alike on devices of one backbone format;
            `activation` the inputs of largest norm on this device.
        weight: name -> the dense matrix (out, in); read for `weight`.
        inputs: name -> inputs (tokens, in); of matrices with fresh rows; read for `activation`.

    Source:
        S2FT, arXiv 2412.06289, section 3. There whole heads and coupled channels are permuted to
        the front and only output and down projections are trained: name those in `lora.targets`.
    """
    for name, pair in factors.items():
        if not pair.trains:
            continue
        pair.a.requires_grad_(False)
        fresh, known = fresh_directions(pair), pair.a[pair.b.any(dim=0)]
        if not len(fresh):
            continue
        leading = _order(name, pair.a.shape[1], choice, weight, inputs, seed)[: pair.a.shape[0]]
        leading = leading.to(pair.a.device)
        held = known[:, leading].square().sum(dim=0)  # of each channel
        chosen = leading[held.argsort(stable=True)[: len(fresh)]]
        pair.a[fresh[: len(chosen)]] = torch.nn.functional.one_hot(chosen, pair.a.shape[1]).to(
            pair.a
        )


def _order(
    name: str,
    size: int,
    choice: ChannelChoice,
    weight: Callable[[str], Tensor],
    inputs: Mapping[str, Tensor],
    seed: int,
) -> Tensor:
    """All channels of a matrix, the most wanted first."""
    if choice == "random":
        rng = np.random.default_rng([seed, zlib.crc32(name.encode("utf-8"))])
        return torch.from_numpy(rng.permutation(size))
    norms = torch.linalg.vector_norm(weight(name) if choice == "weight" else inputs[name], dim=0)
    order: Tensor = norms.argsort(descending=True, stable=True)
    return order
