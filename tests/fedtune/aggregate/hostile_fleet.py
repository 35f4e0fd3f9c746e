"""A linear regression on low-rank products that ten unequal devices learn, some of them hostile.

Every device draws inputs of its own spread and sees W* x + noise. It trains the factors that it is
sent by a few full steps of gradient descent, so a whole run takes a tenth of a second.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from fedtune.aggregate.defences import Defence, judge
from fedtune.aggregate.delta import Delta
from fedtune.records import (
    AdapterUpdate,
    Contribution,
    DevicePlan,
    Dispatch,
    LoraFactors,
    MatrixPlan,
    MatrixShape,
)

OUT, IN, TRUE_RANK, SAMPLES = 16, 12, 3, 100
DEVICES, ROUNDS, LOCAL_STEPS, RATE, NOISE = 10, 12, 5, 0.05, 0.5
RANKS = (4, 6, 8)
DIVERGED = 1e4
ATTACKS = ("scaled", "noise", "sign-flip", "colluding", "label-flip", "little")


@dataclass(frozen=True)
class Site:
    inputs: np.ndarray
    targets: np.ndarray


def truth() -> np.ndarray:
    rng = np.random.default_rng(0)
    left, right = rng.standard_normal((OUT, TRUE_RANK)), rng.standard_normal((IN, TRUE_RANK))
    return np.asarray(left @ right.T / np.sqrt(IN * TRUE_RANK))


def site(seed: int) -> Site:
    rng = np.random.default_rng([seed, 1])
    inputs = rng.standard_normal((SAMPLES, IN)) * rng.uniform(0.7, 1.3, IN)
    targets = inputs @ truth().T + NOISE * rng.standard_normal((SAMPLES, OUT))
    return Site(inputs, targets)


def train(sent: LoraFactors, data: Site) -> LoraFactors:
    a, b = sent.a.astype(np.float64), sent.b.astype(np.float64)
    for _ in range(LOCAL_STEPS):
        low = data.inputs @ a.T
        error = sent.scale * low @ b.T - data.targets
        slope_b = sent.scale * error.T @ low / SAMPLES
        slope_a = sent.scale * (error @ b).T @ data.inputs / SAMPLES
        a, b = a - RATE * slope_a, b - RATE * slope_b
        if np.abs(b).max() > DIVERGED:
            break
    return LoraFactors(a.astype(np.float32), b.astype(np.float32), sent.scale)


def tamper(
    attack: str, sent: LoraFactors, trained: LoraFactors, told: dict[int, np.ndarray], round: int
) -> LoraFactors:
    change = trained.b - sent.b
    told.setdefault(round, change[:, : RANKS[0]])  # colluders all send what the first one gives
    padded = np.zeros_like(change)
    padded[:, : RANKS[0]] = told[round]
    rng = np.random.default_rng([round, change.size])
    noise = rng.standard_normal(change.shape).astype(np.float32)
    changes = {
        "sign-flip": -change,
        "scaled": 100 * change,
        "noise": noise * np.float32(np.linalg.norm(change) / np.linalg.norm(noise)),
        "colluding": -2 * padded,
        "little": -0.5 * padded,
    }
    if attack not in changes:
        return trained
    a = sent.a if attack in ("sign-flip", "noise") else trained.a
    return LoraFactors(a, sent.b + changes[attack], sent.scale)


def final_loss(defence: Defence, attack: str = "", percent: int = 0) -> float:
    """Mean squared error on inputs that nobody trained on, over the noise in them."""
    rule = Delta(rank_cap=10)
    adapter = rule.start([MatrixShape("w", OUT, IN, 0)], {})
    sites = [site(k) for k in range(DEVICES)]
    hostile = {1, 4, 8} if percent == 30 else {1, 4} if percent == 20 else {4} if percent else set()
    if attack == "label-flip":
        for k in hostile:
            sites[k] = replace(sites[k], targets=-sites[k].targets)
    told: dict[int, np.ndarray] = {}
    for round in range(ROUNDS):
        contributions = []
        for k, data in enumerate(sites):
            name, rank = f"d{k}", RANKS[k % len(RANKS)]
            plan = DevicePlan(name, (MatrixPlan("w", rank, "fp32"),), 1, 1, 8, 1)
            rng = np.random.default_rng([7, round])
            sent = rule.dispatch(adapter, plan, scale=1.0, rng=rng)
            factors = train(sent.trained["w"], data)
            if np.abs(factors.b).max() > DIVERGED:
                return float("inf")
            if k in hostile:
                factors = tamper(attack, sent.trained["w"], factors, told, round)
            contributions.append(contribution(name, sent, {"w": factors}))
        adapter = rule.join(adapter, judge(contributions, defence).kept)
    fresh = site(99)
    error = fresh.inputs @ adapter.matrices["w"].product().T - fresh.targets
    return float(np.mean(error**2)) / NOISE**2


def contribution(
    name: str, sent: Dispatch, factors: dict[str, LoraFactors], weight: float = 1.0
) -> Contribution:
    update = AdapterUpdate("run", 1, name, "0", factors, sent.dense, samples=1, tokens=1)
    return Contribution(weight, sent, update)
