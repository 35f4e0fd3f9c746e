"""Each defence decides as its paper says, and stops what docs/defences.md says that it stops."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from fedtune.aggregate.defences import METHODS, Defence, Judgement, judge
from fedtune.aggregate.rules import make_rule
from fedtune.errors import RoundError
from fedtune.records import AdapterUpdate, Contribution, Dispatch, LoraFactors, MatrixShape


def _load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


fleet = _load("hostile_fleet")


def change(device: str, values: Sequence[float], weight: float = 1.0) -> Contribution:
    """A device whose difference is a row of numbers: B is 1, A goes from zero to the values."""
    width, one = len(values), np.ones((1, 1), np.float32)
    sent = LoraFactors(np.zeros((1, width), np.float32), one)
    returned = LoraFactors(np.array([values], np.float32), one)
    update = AdapterUpdate("run", 1, device, "0", {"w": returned}, {}, samples=1, tokens=1)
    return Contribution(weight, Dispatch({"w": sent}), update)


def crowd(*rows: Sequence[float]) -> list[Contribution]:
    return [change(f"d{place}", row) for place, row in enumerate(rows)]


def joined(judgement: Judgement, width: int = 2) -> np.ndarray:
    rule = make_rule("delta", 8)
    adapter = rule.start([MatrixShape("w", 1, width, 0)], {})
    return np.asarray(rule.join(adapter, judgement.kept).matrices["w"].product())[0]


# ---------------------------------------------------------------- what is told of every round


def test_without_a_defence_every_update_counts_as_it_came() -> None:
    given = [change("a", (3.0, 4.0), 1.0), change("b", (0.0, -5.0), 3.0)]
    found = judge(given, Defence())
    assert found.kept == tuple(given)
    assert [v.length for v in found.verdicts] == [5.0, 5.0]
    assert [v.share for v in found.verdicts] == [0.25, 0.75]
    mean = joined(found)
    for verdict, row in zip(found.verdicts, [(3.0, 4.0), (0.0, -5.0)], strict=True):
        cosine = np.dot(row, mean) / (np.linalg.norm(row) * np.linalg.norm(mean))
        assert verdict.cosine == pytest.approx(cosine, abs=1e-6)
        assert (verdict.factor, verdict.trust, verdict.reason) == (1.0, None, "")


@pytest.mark.parametrize("method", METHODS)
def test_updates_that_change_nothing_have_no_cosine_and_stop_nobody(method: str) -> None:
    found = judge(crowd(*[(0.0, 0.0)] * 5), Defence(method, 0.2, 1.0, "d0"))  # type: ignore[arg-type]
    assert [v.cosine for v in found.verdicts] == [None] * 5
    assert found.kept
    assert not joined(found).any()


@pytest.mark.parametrize("method", METHODS)
def test_a_late_update_stays_as_light_as_it_came(method: str) -> None:
    given = crowd((1.0, 0.0), (1.0, 0.1), (1.0, -0.1), (1.1, 0.0), (0.9, 0.0))
    given[1] = replace(given[1], factor=0.5)
    found = judge(given, Defence(method, 0.2, 1.0, "d0"))  # type: ignore[arg-type]
    factors = {v.device: v.factor for v in found.verdicts}
    before = judge(crowd((1.0, 0.0), (1.0, 0.1), (1.0, -0.1), (1.1, 0.0), (0.9, 0.0)),
                   Defence(method, 0.2, 1.0, "d0"))  # type: ignore[arg-type]  # fmt: skip
    assert factors["d1"] == pytest.approx(
        0.5 * {v.device: v.factor for v in before.verdicts}["d1"], rel=1e-6
    )


# ---------------------------------------------------------------- clip


def test_clip_shortens_to_the_median_length_times_the_factor() -> None:
    found = judge(crowd((1.0, 0.0), (0.0, 2.0), (300.0, 400.0)), Defence("clip", clip_factor=1.5))
    assert [v.factor for v in found.verdicts] == [1.0, 1.0, pytest.approx(3 / 500)]
    expected = np.array([1.0 + 3 * 0.6, 2.0 + 3 * 0.8]) / 3
    np.testing.assert_allclose(joined(found), expected, rtol=1e-6)


def test_the_median_length_has_no_weights() -> None:
    given = [change("a", (1.0, 0.0)), change("b", (2.0, 0.0)), change("c", (90.0, 0.0), 1e6)]
    assert judge(given, Defence("clip")).verdicts[2].factor == pytest.approx(2 / 90)


# ---------------------------------------------------------------- multi-krum


NEAR = [(1.0, 0.0), (1.0, 0.1), (1.0, -0.1), (1.1, 0.0), (0.9, 0.0)]


def test_multi_krum_leaves_out_the_farthest_and_keeps_the_others_weights() -> None:
    given = [*crowd(*NEAR), change("bad", (-3.0, 0.0)), change("far", (0.0, 9.0))]
    given[0] = replace(given[0], weight=2.0)
    given[3] = change("d3", (1.1e3, 0.0))  # far too long, but it points where the others do
    found = judge(given, Defence("multi-krum", assumed_share=0.3))
    assert [c.update.device for c in found.kept] == ["d0", "d1", "d2", "d3", "d4"]
    assert [c.weight for c in found.kept] == pytest.approx([2 / 6, 1 / 6, 1 / 6, 1 / 6, 1 / 6])
    reasons = {v.device: v.reason for v in found.verdicts if v.reason}
    assert set(reasons) == {"bad", "far"}
    assert reasons["bad"] == (
        "left out by multi-krum: its mean cosine with 2 near updates is -1.00, "
        "the median one is 1.00"
    )
    assert found.note == ""
    assert [v.factor * v.length for v in found.verdicts[:5]] == pytest.approx(
        [1.0, np.sqrt(1.01), np.sqrt(1.01), np.sqrt(1.01), 0.9], rel=1e-6
    )


def test_multi_krum_leaves_out_nobody_where_all_agree() -> None:
    rows = np.random.default_rng(3).standard_normal((10, 40)) / np.sqrt(40) + np.eye(40)[0]
    found = judge(crowd(*rows.tolist()), Defence("multi-krum", assumed_share=0.4))
    assert len(found.kept) == 10


def test_multi_krum_is_not_fooled_by_devices_that_all_send_one_update() -> None:
    """By the paper's sum they would be nearest: two of their five neighbours are themselves."""
    rng = np.random.default_rng(6)
    honest = rng.standard_normal((7, 40)) / np.sqrt(40) + 0.4 * np.eye(40)[0]
    bad = -honest[:3].mean(axis=0)
    rows = np.concatenate([honest, [bad] * 3])
    found = judge(crowd(*rows.tolist()), Defence("multi-krum", assumed_share=0.3))
    assert [v.device for v in found.verdicts if v.reason] == ["d7", "d8", "d9"]
    units = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    squares = ((units[:, None] - units[None]) ** 2).sum(axis=2)
    paper = [sum(sorted(np.delete(squares[i], i))[:5]) for i in range(10)]
    assert set(np.argsort(paper)[-3:]) != {7, 8, 9}


def test_multi_krum_does_not_leave_out_a_device_for_the_length_of_its_update() -> None:
    """Higher ranks make longer updates; between whole updates the flipped short one is nearer."""
    rng = np.random.default_rng(5)
    honest = rng.standard_normal((9, 6)) * 0.3 + np.eye(6)[0]
    honest[:4] *= 4.0
    rows = np.concatenate([honest, -honest[-1:]])
    found = judge(crowd(*rows.tolist()), Defence("multi-krum", assumed_share=0.1))
    assert [v.device for v in found.verdicts if v.reason] == ["d9"]
    squares = ((rows[:, None] - rows[None]) ** 2).sum(axis=2)
    whole = [sum(sorted(np.delete(squares[i], i))[:7]) for i in range(10)]
    assert int(np.argmax(whole)) < 4


def test_the_scores_are_those_of_the_paper_on_unit_lengths() -> None:
    rng = np.random.default_rng(1)
    rows = rng.standard_normal((11, 4))
    hostile = 3  # 0.29 * 11 = 3.19
    units = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    squares = ((units[:, None] - units[None]) ** 2).sum(axis=2)
    scores = np.array(
        [sum(sorted(np.delete(squares[i], i))[hostile - 1 : 11 - hostile - 2]) for i in range(11)]
    )
    cosines = 1 - scores / (2 * (11 - 2 * hostile - 1))
    worst = [i for i in np.argsort(scores)[-hostile:] if cosines[i] < np.median(cosines) / 2]
    assert worst
    expected = {f"d{i}" for i in range(11) if i not in worst}
    found = judge(crowd(*rows.tolist()), Defence("multi-krum", assumed_share=0.29))
    assert {c.update.device for c in found.kept} == expected


@pytest.mark.parametrize(
    ("devices", "share", "left_out", "warned"),
    [(10, 0.3, 3, False), (10, 0.4, 3, True), (5, 0.3, 1, False), (4, 0.3, 0, True),
     (2, 0.4, 0, False), (3, 0.4, 0, True), (1, 0.4, 0, False), (100, 0.29, 29, False)],
)  # fmt: skip
def test_small_rounds_bear_fewer_hostile_devices_and_say_so(
    devices: int, share: float, left_out: int, warned: bool
) -> None:
    rows = np.random.default_rng(0).standard_normal((devices, 3)) * 0.1 + np.eye(3)[0]
    rows[devices - int(share * devices + 1e-9) :] *= -1
    found = judge(crowd(*rows.tolist()), Defence("multi-krum", assumed_share=share))
    assert len(found.kept) == devices - left_out
    assert bool(found.note) == warned
    if warned:
        wanted = int(share * devices)
        assert found.note == (
            f"multi-krum needs {2 * wanted + 3} updates to leave out {wanted}, got {devices}; "
            f"it leaves out {left_out}"
        )


# ---------------------------------------------------------------- geometric median


def test_the_geometric_median_has_the_least_sum_of_distances() -> None:
    rng = np.random.default_rng(2)
    rows, weights = rng.standard_normal((7, 2)), rng.uniform(0.5, 2.0, 7)
    given = [change(f"d{i}", row, w) for i, (row, w) in enumerate(zip(rows, weights, strict=True))]
    found = joined(judge(given, Defence("geometric-median")))

    def cost(point: np.ndarray) -> float:
        return float(weights @ np.linalg.norm(rows - point, axis=1))

    for step in rng.standard_normal((200, 2)):
        assert cost(found) <= cost(found + 1e-2 * step)


@pytest.mark.parametrize("length", [1e2, 1e4, 1e8])
def test_however_far_an_update_is_the_geometric_median_stays(length: float) -> None:
    found = judge(
        [*crowd(*NEAR), change("far", (0.0, length)), change("further", (0.0, -2 * length))],
        Defence("geometric-median"),
    )
    assert np.linalg.norm(joined(found) - [1.0, 0.0]) < 0.1
    assert len(found.kept) == 7


def test_an_update_that_is_the_median_itself_is_no_division_by_zero() -> None:
    found = judge(crowd((1.0, 0.0), (0.0, 0.0), (-1.0, 0.0)), Defence("geometric-median"))
    np.testing.assert_allclose(joined(found), [0.0, 0.0], atol=1e-5)
    assert found.verdicts[1].share > 0.99


# ---------------------------------------------------------------- root-cosine


def test_root_cosine_weighs_by_the_cosine_and_cuts_to_the_roots_length() -> None:
    given = [
        change("root", (2.0, 0.0)),
        change("same", (8.0, 0.0), weight=1.0),
        change("half", (1.0, np.sqrt(3.0)), weight=3.0),
        change("away", (-1.0, 0.1)),
        change("short", (0.5, 0.0)),
    ]
    found = judge(given, Defence("root-cosine", root_site="root"))
    trusts = [1.0, 1.0, 0.5, 0.0, 1.0]  # the root's own is that of the best of the others
    assert [v.trust for v in found.verdicts] == pytest.approx(trusts, abs=1e-6)
    assert [v.factor for v in found.verdicts] == pytest.approx([1.0, 0.25, 1.0, 1.0, 1.0])
    assert [v.share for v in found.verdicts] == pytest.approx(np.array([1, 1, 1.5, 0, 1]) / 4.5)
    assert [v.reason for v in found.verdicts if v.reason] == [
        "left out by root-cosine: its cosine with the update of root is -1.00, expected above 0"
    ]
    assert [c.update.device for c in found.kept] == ["root", "same", "half", "short"]


def test_the_root_site_counts_as_the_most_trusted_other() -> None:
    given = crowd((1.0, 0.0), (1.0, 2.0), (1.0, 3.0), (-1.0, 0.0))
    found = judge(given, Defence("root-cosine", root_site="d0"))
    best = 1 / np.sqrt(5)
    assert [v.trust for v in found.verdicts] == pytest.approx([best, best, 1 / np.sqrt(10), 0])
    alone = judge(crowd((1.0, 0.0), (-1.0, 0.0)), Defence("root-cosine", root_site="d0"))
    assert [v.trust for v in alone.verdicts] == [1.0, 0.0]
    np.testing.assert_allclose(joined(alone), [1.0, 0.0], rtol=1e-6)


def test_root_cosine_without_the_root_is_an_error() -> None:
    words = "needs the update of defence.root_site hq in every round, got d0, d1"
    with pytest.raises(RoundError, match=words):
        judge(crowd((1.0, 0.0), (1.0, 1.0)), Defence("root-cosine", root_site="hq"))


# ---------------------------------------------------------------- whole runs


ROOT = Path(__file__).resolve().parents[3]


def claims() -> list[tuple[str, str, int]]:
    """(method, attack, per cent hostile) of all that the table of docs/defences.md claims."""
    text = (ROOT / "docs" / "defences.md").read_text(encoding="utf-8")
    rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("| ")]
    rows = [[cell.strip().strip("`") for cell in row] for row in rows]
    start = next(i for i, row in enumerate(rows) if row[0] == "Attack")
    methods = rows[start][2:]
    found = []
    for row in rows[start + 1 :]:
        for method, cell in zip(methods, row[2:], strict=True):
            most = int(cell.split(" ")[0]) if cell.endswith("%") else 0
            found += [(method, row[0], percent) for percent in (10, 20, 30) if percent <= most]
    return found


@cache
def loss(method: str, attack: str = "", percent: int = 0) -> float:
    return float(fleet.final_loss(Defence(method, 0.3, 1.0, "d0"), attack, percent))  # type: ignore[arg-type]


@pytest.mark.parametrize(("method", "attack", "percent"), claims())
def test_a_defended_run_stays_within_five_per_cent(method: str, attack: str, percent: int) -> None:
    assert loss(method, attack, percent) <= 1.05 * loss("none")


@pytest.mark.parametrize(
    ("attack", "percent"),
    [("scaled", 10), ("label-flip", 10), ("colluding", 20), ("sign-flip", 30)],
)
def test_the_same_attack_undefended_does_harm(attack: str, percent: int) -> None:
    assert loss("none", attack, percent) > 1.05 * loss("none")


def test_the_table_claims_something_of_every_defence() -> None:
    assert {method for method, _, _ in claims()} == METHODS.keys() - {"none"}
    assert {attack for _, attack, _ in claims()} == set(fleet.ATTACKS)
    assert len(claims()) > 40


@pytest.mark.parametrize("method", METHODS)
def test_a_defence_costs_little_where_nobody_is_hostile(method: str) -> None:
    assert loss(method) <= 1.05 * loss("none")
