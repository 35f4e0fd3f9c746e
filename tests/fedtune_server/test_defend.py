"""A round with a defence: what is left out is told, and not joined."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fedtune.aggregate.defences import Defence
from fedtune.aggregate.rules import make_rule
from fedtune.errors import RoundError, RunError
from fedtune.records import DevicePlan, LoraScale, MatrixPlan
from fedtune.wire.messages import OptimizerSpec
from fedtune.wire.packing import tensors_digest
from fedtune_server.defend import check_root
from fedtune_server.round import Outcome, train
from fedtune_server.terms import RoundTerms

FleetOf = Callable[..., Any]  # tests/fedtune_server/conftest.py
NAMES = ("a", "b", "c", "d", "e", "f", "g")
UP = "layers.0.up"


def play(fake: Any, defence: Defence, **terms: Any) -> Outcome:
    """One round of the fake fleet, whose devices change `b` by 0.01, 0.02, ..."""
    shapes = fake.shapes
    rule = make_rule("delta", 8)
    all_terms = RoundTerms(
        run="run-1", base_digest=shapes.digest, shapes=shapes.by_name(), scale=LoraScale(2.0),
        down="fp32", up="fp32", weights="uniform", minimum_devices=1, deadline_s=30.0, seed=0,
        defence=defence,
    )  # fmt: skip
    plans = [
        DevicePlan(name, (MatrixPlan(UP, 2, "fp32"),), 2, 4, 16, 3) for name in sorted(fake.names)
    ]
    with fake.grid() as grid:
        return train(
            grid, fake.gather(grid), rule, rule.start(shapes.matrices, {}), plans,
            OptimizerSpec(), replace(all_terms, **terms), 1, fake.open_rounds, evaluate=True,
            emit=fake.events.append,
        )  # fmt: skip


def values(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Any, bytes], Any]:
    """Change the values of the packed tensors, which lie behind their header."""

    def spoil(said: Any, tensors: bytes) -> Any:
        count = 2 * 8 + 12 * 2  # a, then b
        numbers = np.frombuffer(tensors[-4 * count :], np.float32).copy()
        bad = tensors[: -4 * count] + change(numbers).astype(np.float32).tobytes()
        return replace(said, tensors_digest=tensors_digest(bad)), bad

    return spoil


def last(value: float) -> Callable[[np.ndarray], np.ndarray]:
    return lambda numbers: np.concatenate([numbers[:-1], [value]])


def refused(fake: Any) -> dict[str, str]:
    return {fields["device"]: fields["reason"] for fields in fake.all("device_refused")}


@pytest.mark.parametrize("method", ["none", "clip", "multi-krum", "geometric-median"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_never_reaches_a_defence(
    fleet_of: FleetOf, method: Any, value: float
) -> None:
    fake = fleet_of(*NAMES)
    fake.spoil["b"] = values(last(value))
    outcome = play(fake, Defence(method))
    assert "expected finite values, got nan or inf" in refused(fake)["b"]
    (compared,) = fake.all("updates_compared")
    assert "b" not in [entry["device"] for entry in compared["devices"]]
    assert np.isfinite(outcome.joined.matrices[UP].product()).all()


FLIP_B = np.repeat([1.0, -1.0], [16, 24])


def test_an_update_that_is_left_out_is_refused_once_and_not_joined(fleet_of: FleetOf) -> None:
    fake = fleet_of(*NAMES)
    fake.spoil["f"] = values(lambda numbers: FLIP_B * numbers)
    fake.spoil["g"] = values(lambda numbers: 20 * numbers)  # too long, but it points as the others
    outcome = play(fake, Defence("multi-krum", assumed_share=0.3))
    assert refused(fake) == {
        "f": "left out by multi-krum: its mean cosine with 2 near updates is -1.00, the median one "
        "is 1.00"
    }
    (finished,) = fake.all("round_finished")
    assert (finished["reported"], finished["refused"]) == (6, 1)
    assert outcome.metrics.keys() == {"a", "b", "c", "d", "e", "g"}
    (compared,) = fake.all("updates_compared")
    shares = {entry["device"]: entry["share"] for entry in compared["devices"]}
    assert shares == pytest.approx(dict.fromkeys("abcdeg", 1 / 6) | {"f": 0.0})
    factors = {entry["device"]: entry["factor"] for entry in compared["devices"]}
    assert factors["g"] < 0.01
    others = fleet_of(*NAMES)
    play(others, Defence())
    assert refused(others) == {}
    assert others.all("round_finished")[0]["reported"] == 7


def test_every_round_of_two_updates_or_more_is_compared(fleet_of: FleetOf) -> None:
    fake = fleet_of("a", "b", "c")
    play(fake, Defence())
    (compared,) = fake.all("updates_compared")
    assert (compared["round"], compared["method"]) == (1, "none")
    devices = compared["devices"]
    assert [set(entry) for entry in devices] == [
        {"device", "length", "cosine", "share", "factor"}
    ] * 3
    lengths = [entry["length"] for entry in devices]
    assert lengths == pytest.approx([lengths[0], 2 * lengths[0], 3 * lengths[0]], rel=1e-4)
    assert [entry["cosine"] for entry in devices] == pytest.approx([1.0] * 3, abs=1e-6)
    alone = fleet_of("a")
    play(alone, Defence())
    assert alone.all("updates_compared") == []


def test_a_trusted_sites_round_tells_of_trust(fleet_of: FleetOf) -> None:
    fake = fleet_of("a", "b", "c")
    fake.spoil["c"] = values(lambda numbers: FLIP_B * numbers)
    play(fake, Defence("root-cosine", root_site="a"))
    trusts = {e["device"]: e["trust"] for e in fake.all("updates_compared")[0]["devices"]}
    assert trusts == pytest.approx({"a": 1.0, "b": 1.0, "c": 0.0}, abs=1e-6)
    assert "its cosine with the update of a is -1.00" in refused(fake)["c"]


def test_a_round_without_the_trusted_sites_update_fails(fleet_of: FleetOf) -> None:
    fake = fleet_of("a", "b", "c")
    fake.spoil["a"] = values(last(float("nan")))
    with pytest.raises(RoundError, match=r"defence\.root_site a in every round, got b, c"):
        play(fake, Defence("root-cosine", root_site="a"))


def test_too_few_updates_to_leave_any_out_is_a_warning(fleet_of: FleetOf) -> None:
    fake = fleet_of("a", "b", "c", "d")
    play(fake, Defence("multi-krum", assumed_share=0.3))
    (warning,) = fake.all("warning")
    assert warning["text"] == (
        "round 1: multi-krum needs 5 updates to leave out 1, got 4; it leaves out 0"
    )


def test_the_root_site_must_be_in_the_fleet() -> None:
    with pytest.raises(RunError, match=r"take part \(a, b\), got 'hq'"):
        check_root(Defence("root-cosine", root_site="hq"), ["b", "a"])
    check_root(Defence("root-cosine", root_site="a"), ["b", "a"])
    check_root(Defence("clip", root_site="hq"), ["b", "a"])
