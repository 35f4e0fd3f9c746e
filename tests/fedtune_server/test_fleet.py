"""Who takes part: devices that fit together, by name, and who of them in which round."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from fedtune.errors import RoundError, RunError
from fedtune.records import DeviceProfile
from fedtune.wire.flower import PROFILE
from fedtune.wire.messages import TaskSpec
from fedtune_server.fleet import (
    Emit,
    Fleet,
    ask_again,
    choose_devices,
    find_again,
    gather_fleet,
    wait_for_nodes,
)

FleetOf = Callable[..., Any]  # tests/fedtune_server/conftest.py


def test_devices_are_gathered_in_the_order_of_their_names(fleet_of: FleetOf) -> None:
    fake = fleet_of("c", "a", "b")
    with fake.grid() as grid:
        fleet = fake.gather(grid)
    assert fleet.names == ("a", "b", "c")
    assert dict(fleet.nodes) == {"a": 1001, "b": 1002, "c": 1000}
    assert fleet.reports["c"].train_samples == 10
    assert (fleet.labels, fleet.dense_shapes) == ((), {})
    reported = fake.all("site_reported")
    assert [fields["device"] for fields in reported] == ["a", "b", "c"]
    assert reported[2]["train_samples"] == 10
    assert reported[2]["memory_bytes"] == 10**9


def test_a_device_with_another_base_is_left_out_with_both_digests(fleet_of: FleetOf) -> None:
    fake = fleet_of("a", "b")
    fake.change("b", base_digest="e" * 64)
    with fake.grid() as grid:
        assert fake.gather(grid).names == ("a",)
    (excluded,) = fake.all("site_excluded")
    words = "b holds another base model: expected digest dddddddddddd, found eeeeeeeeeeee; copy"
    assert str(excluded["reason"]).startswith(words)


def test_a_device_without_samples_is_left_out_with_its_own_reason(fleet_of: FleetOf) -> None:
    fake = fleet_of("a", "b", "c")
    fake.change("b", train_samples=0, warnings=("site b is left out: all are too long",))
    fake.change("c", train_samples=0)
    with fake.grid() as grid:
        assert fake.gather(grid).names == ("a",)
    reasons = [str(fields["reason"]) for fields in fake.all("site_excluded")]
    assert reasons == ["b: site b is left out: all are too long", "c: it has no sample to train on"]


def test_a_device_that_does_not_answer_is_left_out_and_the_run_goes_on(fleet_of: FleetOf) -> None:
    fake = fleet_of("a", "b")
    with fake.grid(fake.lose("b", PROFILE)) as grid:
        assert fake.gather(grid, deadline_s=0.2).names == ("a",)
    assert "0.2 s" in str(fake.all("site_excluded")[0]["reason"])


def test_the_second_device_of_a_name_is_left_out(fleet_of: FleetOf) -> None:
    fake = fleet_of("a", "b", "c")
    fake.change("b", profile=DeviceProfile("a", "any", 1, 10**9))
    with fake.grid() as grid:
        fleet = fake.gather(grid)
    assert fleet.names == ("a", "c")
    assert fleet.nodes["a"] == 1000
    (excluded,) = fake.all("site_excluded")
    assert "another device is called 'a'; give it a name of its own" in str(excluded["reason"])


def test_a_fleet_of_none_ends_the_run(fleet_of: FleetOf) -> None:
    fake = fleet_of("a")
    fake.change("a", base_digest="e" * 64)
    with (
        fake.grid() as grid,
        pytest.raises(
            RunError, match=r"no device can take part; the last reason: .* holds another base"
        ),
    ):
        fake.gather(grid)


def test_a_sites_warnings_are_the_runs(fleet_of: FleetOf) -> None:
    fake = fleet_of("a", "b")
    fake.change("b", warnings=("site b: 2 of 20 samples cut",))
    with fake.grid() as grid:
        fake.gather(grid)
    assert fake.all("warning") == [{"text": "site b: 2 of 20 samples cut"}]


# ---------------------------------------------------------------- labels and heads


def test_labels_are_joined_and_whoever_lacks_some_is_named(fleet_of: FleetOf) -> None:
    fake = fleet_of("a", "b", "c")
    for name, labels in (("a", ("x", "z")), ("b", ("y",)), ("c", ("x", "y", "z"))):
        fake.change(name, labels=labels, dense={"head.weight": (0, 8), "head.bias": (0,)})
    with fake.grid() as grid:
        fleet = fake.gather(grid)
    assert fleet.labels == ("x", "y", "z")
    assert fleet.dense_shapes == {"head.weight": (3, 8), "head.bias": (3,)}
    assert [fields["text"] for fields in fake.all("warning")] == [
        "a has no sample of 1 of 3 labels (y)",
        "b has no sample of 2 of 3 labels (x, z)",
    ]


def test_many_missing_labels_are_not_all_listed(fleet_of: FleetOf) -> None:
    fake = fleet_of("a", "b")
    fake.change("a", labels=tuple("abcdefgh"))
    fake.change("b", labels=("a",))
    with fake.grid() as grid:
        fake.gather(grid)
    (warning,) = fake.all("warning")
    assert warning["text"] == "b has no sample of 7 of 8 labels (b, c, d, e, f, ...)"


def test_a_device_that_would_train_another_head_than_most_is_left_out(fleet_of: FleetOf) -> None:
    fake = fleet_of("a", "b", "c")
    for name, width in (("a", 9), ("b", 8), ("c", 8)):
        fake.change(name, dense={"head.weight": (0, width)})
    with fake.grid() as grid:
        assert fake.gather(grid).names == ("b", "c")
    (excluded,) = fake.all("site_excluded")
    assert "a would train other parameters whole than most of the fleet" in str(excluded["reason"])


def test_a_device_that_claims_a_huge_head_is_left_out(fleet_of: FleetOf) -> None:
    fake = fleet_of("a", "b")
    fake.change("b", dense={"head.weight": (0, 2**27)})
    with fake.grid() as grid:
        assert fake.gather(grid).names == ("a",)
    (excluded,) = fake.all("site_excluded")
    assert "b would train 134217728 parameters whole, expected at most" in str(excluded["reason"])


# ---------------------------------------------------------------- waiting and choosing


def test_only_as_many_nodes_as_expected_take_part(fleet_of: FleetOf) -> None:
    with fleet_of("a", "b", "c").grid() as grid:
        assert wait_for_nodes(grid, 2, 1.0) == [1000, 1001]


def test_missing_devices_are_counted_when_the_wait_ends(fleet_of: FleetOf) -> None:
    words = r"expected 3 devices within 0\.1 s, found 2; start the missing devices or lower"
    with fleet_of("a", "b").grid() as grid, pytest.raises(RoundError, match=words):
        wait_for_nodes(grid, 3, 0.1)


NAMES = tuple("gfedcba")


def test_all_devices_are_chosen_unless_fewer_are_wanted() -> None:
    for count in (0, 7, 9):
        assert choose_devices(NAMES, count, seed=0, round=1) == tuple("abcdefg")


def test_a_choice_is_a_sorted_sample_that_the_seed_and_the_round_decide() -> None:
    found = {
        (seed, round): choose_devices(NAMES, 3, seed, round)
        for seed in range(4)
        for round in range(1, 9)
    }
    for (seed, round), chosen in found.items():
        assert len(set(chosen)) == 3
        assert list(chosen) == sorted(chosen)
        assert set(chosen) <= set(NAMES)
        assert chosen == choose_devices(NAMES[::-1], 3, seed, round)
    assert len(set(found.values())) > 15
    assert {name for chosen in found.values() for name in chosen} == set(NAMES)


def test_devices_that_are_asked_again_say_what_they_are_now(fleet_of: FleetOf) -> None:
    fake = fleet_of("a", "b", "c", "d")
    with fake.grid(fake.lose("d", PROFILE)) as grid:
        fleet = replace(fake.gather(grid, 0.3), nodes={n: 1000 + i for i, n in enumerate("abcd")})
        now = replace(fake.reports["a"].profile, memory_bytes=5)
        fake.change("a", profile=now)
        fake.change("b", profile=replace(now, name="a"))  # speaks for another device
        fake.change("c", base_digest="e" * 64)
        task = TaskSpec("run-1", "causal-lm", fake.shapes.digest, ())
        found = ask_again(grid, fleet, ("a", "b", "c", "d"), task, 0.3)
    assert found == {"a": now}


def test_a_run_that_goes_on_takes_back_its_own_devices_alone(fleet_of: FleetOf) -> None:
    fake = fleet_of("a", "b", "new")
    known = {name: replace(fake.reports[name], train_tokens=7) for name in ("a", "b")}
    task = TaskSpec("run-1", "causal-lm", fake.shapes.digest, ())
    with fake.grid() as grid:

        def gather(emit: Emit) -> Fleet:
            return gather_fleet(grid, grid.get_node_ids(), task, 30.0, emit)

        found = find_again(gather, known, fake.events.append, live=False)
        assert found.names == ("a", "b")
        assert found.reports == known  # the plan was made with what they said then
        (excluded,) = fake.all("site_excluded")
        assert excluded["reason"].startswith("new was not there when the run was planned")
        assert len(fake.all("warning")) == 2
        with pytest.raises(RunError, match="none of the run's devices came back; expected gone, f"):
            find_again(gather, {"gone": known["a"]}, fake.events.append, live=False)


def test_a_site_that_is_left_out_has_its_name_where_that_is_known(fleet_of: FleetOf) -> None:
    fake = fleet_of("a", "b")
    fake.change("b", base_digest="e" * 64)
    task = TaskSpec("run-1", "causal-lm", fake.shapes.digest, ())
    with fake.grid() as grid:
        names = {1000: "a", 1001: "b"}
        nodes, emit = grid.get_node_ids(), fake.events.append
        gather_fleet(grid, nodes, task, 30.0, emit, called=names.__getitem__)
        gather_fleet(grid, nodes, task, 30.0, emit)
    assert [each["device"] for each in fake.all("site_excluded")] == ["b", "node 1001"]
