"""Rounds of devices whose updates lie on the disk, as those of a coordinator do."""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from fedtune.aggregate.rules import Rule
from fedtune.records import (
    AdapterUpdate,
    Contribution,
    DevicePlan,
    Dispatch,
    GlobalAdapter,
    LowRank,
    MatrixPlan,
    MatrixShape,
)
from fedtune.wire.packing import PackedTensors, pack_tensors
from fedtune.wire.tensors import update_from_tensors

RANKS = (4, 8, 8, 16, 16, 16, 32, 32, 48, 64)
"""Of ten devices; larger fleets repeat them."""

STATE_RANK = 64
SHARED = 96
"""Directions that all devices move along, beside those of their own."""


def layers_of_7b(layers: int, divisor: int = 1) -> list[MatrixShape]:
    """The seven matrices a layer of Llama 2 7B, or of a model whose sides are smaller."""
    hidden, inner = 4096 // divisor, 11008 // divisor
    sides = [("q", hidden, hidden), ("k", hidden, hidden), ("v", hidden, hidden)]
    sides += [("o", hidden, hidden), ("gate", inner, hidden), ("up", inner, hidden)]
    sides += [("down", hidden, inner)]
    return [
        MatrixShape(f"layers.{layer}.{name}", rows, columns, layer)
        for layer in range(layers)
        for name, rows, columns in sides
    ]


def state_of(shapes: Sequence[MatrixShape], rank: int = STATE_RANK) -> GlobalAdapter:
    """A global adapter after some rounds: orthonormal directions of falling weight."""
    rng = np.random.default_rng(1)
    sigma = (1.0 + np.arange(rank)) ** -0.7

    def directions(length: int) -> np.ndarray:
        return np.linalg.qr(rng.standard_normal((length, rank)))[0].astype(np.float32)

    sides = {side for s in shapes for side in (s.out_features, s.in_features)}
    basis = {side: directions(side) for side in sides}
    return GlobalAdapter(
        1,
        {
            s.name: LowRank(
                np.roll(basis[s.out_features], s.layer, axis=0),
                sigma.astype(np.float32),
                np.roll(basis[s.in_features], -s.layer, axis=0),
            )
            for s in shapes
        },
    )


def plan_of(device: str, rank: int, shapes: Sequence[MatrixShape]) -> DevicePlan:
    matrices = tuple(MatrixPlan(s.name, rank, "bf16") for s in shapes)
    return DevicePlan(device, matrices, 1, 1, 8, 1)


@cache
def along(length: int) -> np.ndarray:
    """Directions that all devices move along, of falling weight."""
    falling = ((1.0 + np.arange(SHARED)) ** -0.7).astype(np.float32)
    return np.random.default_rng(length).standard_normal((length, SHARED), np.float32) * falling


def trained(sent: Dispatch, seed: int, shapes: Sequence[MatrixShape]) -> dict[str, np.ndarray]:
    """What training could make of the sent factors: a step along directions that all devices
    share, and another tenth of that size along the device's own."""
    rng = np.random.default_rng(100 + seed)

    def moved(value: np.ndarray) -> np.ndarray:
        length, rank = value.shape
        mix = rng.standard_normal((SHARED, rank), np.float32) / np.float32(SHARED**0.5)
        own = rng.standard_normal((length, rank), np.float32)
        return value + (0.1 * along(length) @ mix + 0.01 * own) / np.float32(length**0.5)

    tensors = {}
    for s in shapes:
        factors = sent.trained[s.name]
        tensors[f"{s.name}.a"] = np.ascontiguousarray(moved(factors.a.T).T)
        tensors[f"{s.name}.b"] = moved(factors.b)
    return tensors


@dataclass(frozen=True, slots=True)
class Fleet:
    """Devices whose updates were written to files."""

    shapes: Sequence[MatrixShape]
    plans: Sequence[DevicePlan]
    sent: Sequence[Dispatch]
    files: Sequence[Path]

    @contextmanager
    def opened(self) -> Iterator[list[Contribution]]:
        """Contributions that read a tensor when it is asked for."""
        maps = []
        try:
            found = []
            for plan, sent, file in zip(self.plans, self.sent, self.files, strict=True):
                with file.open("rb") as stream:
                    maps.append(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ))
                expected = {
                    f"{name}.{side}": value.shape
                    for name, factors in sent.trained.items()
                    for side, value in (("a", factors.a), ("b", factors.b))
                }
                factors, dense = update_from_tensors(PackedTensors(maps[-1], expected), plan)
                update = AdapterUpdate("run", 2, plan.device, "0", factors, dense, 1, 1)
                found.append(Contribution(1.0, sent, update))
            yield found
        finally:
            for each in maps:
                each.close()

    def module_bytes(self) -> int:
        """Float32 bytes of what all devices return of the largest matrix."""
        columns = sum(plan.matrices[0].rank for plan in self.plans)
        return max(4 * columns * (s.out_features + s.in_features) for s in self.shapes)


def fleet_of(
    folder: Path,
    rule: Rule,
    adapter: GlobalAdapter,
    shapes: Sequence[MatrixShape],
    devices: int,
    *,
    write: bool = True,
) -> Fleet:
    """Send, train and write down; devices of equal rank share what they are sent.

    Args:
        write: otherwise the files are there.
    """
    names = [f"site-{i:04d}" for i in range(devices)]
    ranks = [RANKS[i % len(RANKS)] for i in range(devices)]
    plans = [plan_of(name, rank, shapes) for name, rank in zip(names, ranks, strict=True)]
    by_rank: dict[int, Dispatch] = {}
    for plan, rank in zip(plans, ranks, strict=True):
        if rank not in by_rank:
            rng = np.random.default_rng(2)
            by_rank[rank] = rule.dispatch(adapter, plan, scale=1.0, rng=rng)
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for index, (name, rank) in enumerate(zip(names, ranks, strict=True)):
        files.append(folder / f"{name}.safetensors")
        if write:
            tensors = trained(by_rank[rank], index, shapes)
            files[-1].write_bytes(pack_tensors(tensors))
    return Fleet(shapes, plans, [by_rank[rank] for rank in ranks], files)
