"""What a ledger says of a run that was continued."""

from __future__ import annotations

from typing import Any

from fedtune.export.ledger_facts import Line, gather


def line(kind: str, **fields: Any) -> Line:
    return {"kind": kind, **fields}


def play(*rounds: int, loss: float = 1.0) -> list[Line]:
    return [
        each
        for round in rounds
        for each in (
            line("round_started", round=round, devices=["a"]),
            line("device_refused", round=round, device="b", reason=f"late at {loss}"),
            line("device_reported", round=round, device="a", train_loss=loss),
            line("round_finished", round=round, train_loss=loss, upload_bytes=10),
        )
    ]


START = line("run_started", run="a-1", rounds=4)


def resumed(round: int, rounds: int = 4) -> Line:
    return line("run_resumed", round=round, rounds=rounds)


def test_of_a_round_that_was_played_twice_the_later_lines_count() -> None:
    facts = gather([START, *play(1, 2, 3), resumed(1), *play(2, loss=2.0)])
    assert sorted(facts.rounds) == [1, 2]
    assert facts.rounds[2]["train_loss"] == 2.0
    assert sorted(facts.reports) == [(1, "a"), (2, "a")]
    assert facts.refusals == {(1, "b"): "late at 1.0", (2, "b"): "late at 2.0"}
    assert facts.status == "not finished"
    assert facts.started == START


def test_a_run_that_stopped_and_goes_on_is_not_failed_any_more() -> None:
    failed = [START, *play(1), line("run_failed", reason="disk")]
    assert gather(failed).status == "failed"
    assert gather([*failed, resumed(1)]).status == "not finished"


def test_a_run_whose_exports_alone_are_left_is_finished() -> None:
    ended = line("run_finished", held_out_loss_after=1.5)
    played = [START, *play(1, 2, 3, 4), line("evaluated", round=4, held_out_loss=1.5), ended]
    facts = gather([*played, line("run_interrupted", round=4), resumed(4)])
    assert (facts.status, facts.ending) == ("finished", ended)
    assert facts.evaluations[4]["held_out_loss"] == 1.5
    assert gather([*played, resumed(4, 6), *play(5)]).status == "not finished"


def test_a_warning_of_each_start_is_told_once() -> None:
    warning = line("warning", text="b has no sample of 1 of 3 labels (red)")
    facts = gather([START, warning, *play(1), resumed(1), warning])
    assert facts.warnings == [warning["text"]]
