"""The frame of the soak: what counts as passed, and that one bad case does not end the others."""

from __future__ import annotations

import importlib.util
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from scripts.soak import __main__ as soak
from scripts.soak import guided
from scripts.soak.faults import (
    FAULTS,
    KILLS,
    ROUTES,
    Deployment,
    Fault,
    fill_disk,
    nothing,
    play,
    send,
)
from scripts.soak.results import Result, Tell, table


class Toy:
    """A deployment of one process, whose result says how it came to its end."""

    def __init__(self, folder: Path, case: str) -> None:
        self._folder, self._case = folder, case
        self._process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(30)"])
        self._left = [1] if case == "leaves one" else []

    def pids(self, who: str) -> Sequence[int]:
        return [self._process.pid] if who == "site-1" else []

    def home(self, who: str) -> Path:
        return self._folder

    def call(self, who: str, action: str, **details: object) -> None: ...

    def progress(self) -> float:
        return 2.9

    def working(self, who: str) -> bool:
        return True

    def asked(self, who: str, message: str) -> bool:
        return (who, message) == ("site-1", "query.profile")

    def numbers(self) -> Mapping[str, float]:
        return {"run_s": 1.0}

    def wait(self, seconds: float) -> str:
        return "" if self._case == "hangs" or not seconds else "finished"

    def simulated(self) -> str:
        return "other"

    def result(self) -> str:
        return "other" if self._case.startswith("differs") else "same"

    def missing(self) -> Mapping[str, Sequence[int]]:
        return {"site-1": [2]} if self._case == "differs, named" else {}

    def reason(self) -> str:
        return ""

    def left(self) -> Sequence[int]:
        return self._left

    def end(self) -> int:
        self._process.kill()
        return self._process.wait()


def played(tmp_path: Path, *faults: Fault, until: float = 60.0) -> dict[str, Result]:
    results: list[Result] = []

    @contextmanager
    def start(case: Fault) -> Iterator[Deployment]:
        toy = Toy(tmp_path, case.name)
        try:
            yield toy
        finally:
            toy.end()

    end = time.monotonic() + until
    play(
        faults,
        start,
        results.append,
        part="x",
        rounds=3,
        deadline_s=5.0,
        until=end,
        expected="same",
    )
    return {result.case: result for result in results}


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("fine", ""),
        ("differs", "its result differs"),
        ("differs, named", ""),
        ("hangs", "did not end"),
        ("leaves one", "processes are left: [1]"),
    ],
)
def test_what_counts_as_passed(tmp_path: Path, case: str, words: str) -> None:
    found = played(tmp_path, Fault(case, nothing, nothing, "equal or named"))[case]
    assert found.state == ("failed" if words else "passed")
    assert words in found.words


def test_named_is_not_enough_where_the_result_must_be_equal(tmp_path: Path) -> None:
    found = played(tmp_path, Fault("differs, named", nothing, nothing, "equal"))
    assert found["differs, named"].state == "failed"


@pytest.mark.parametrize(
    ("returns", "rounds", "words"),
    [("site-1", 3, ""), ("site-1", 2, "has not come back"), ("site-2", 3, "missed none")],
)
def test_a_device_that_must_return_misses_a_round_and_not_the_last(
    tmp_path: Path, returns: str, rounds: int, words: str
) -> None:
    fault = Fault(
        "differs, named", nothing, nothing, "equal or named", rounds=rounds, returns=returns
    )
    found = played(tmp_path, fault)["differs, named"]
    assert (found.state, words in found.words) == ("failed" if words else "passed", True)


def test_a_case_may_wait_for_a_question_and_must_hit_it(tmp_path: Path) -> None:
    kill = send("site-1", signal.SIGKILL)
    asked = Fault("asked", kill, nothing, "equal", at=0.0, asked=("site-1", "query.profile"))
    never = replace(asked, name="never", asked=("site-1", "evaluate.loss"), shows="run_s")
    missed = replace(asked, name="missed", shows="asked_again")
    shown = replace(asked, name="shown", shows="run_s")
    found = played(tmp_path, asked, never, missed, shown)
    assert found["asked"].state == found["shown"].state == "passed"
    assert "the moment of the fault did not come" in found["never"].words
    assert found["missed"].words == "it has hit nothing: asked_again is 0"


def test_a_run_that_plans_itself_must_equal_a_simulation_of_its_plan(tmp_path: Path) -> None:
    alike = Fault("differs from the others", nothing, nothing, "equal", measures=True)
    found = played(tmp_path, alike, replace(alike, name="as the others"))
    assert found["differs from the others"].state == "passed"
    assert "its result differs" in found["as the others"].words


def test_a_case_that_cannot_happen_fails_alone(tmp_path: Path) -> None:
    nobody = Fault("nobody", send("site-9", signal.SIGKILL), nothing, "equal")
    full = Fault("full", fill_disk("site-1"), nothing, "equal")  # shares its disk with its parent
    fine = Fault("fine", send("site-1", signal.SIGKILL), nothing, "equal")
    found = played(tmp_path, nobody, full, fine)
    assert {name: result.state for name, result in found.items()} == {
        "nobody": "failed",
        "full": "failed",
        "fine": "passed",
    }
    assert "no process of site-9" in found["nobody"].words
    assert "shares its disk" in found["full"].words


def test_a_case_whose_time_is_over_is_skipped(tmp_path: Path) -> None:
    found = played(tmp_path, Fault("fine", nothing, nothing, "equal"), until=-1.0)
    assert found["fine"].state == "skipped"


def test_cases_have_names_of_their_own() -> None:
    names = [fault.name for fault in (*KILLS, *FAULTS, *ROUTES)]
    assert len(set(names)) == len(names)


def test_parts_are_told_line_by_line_and_in_a_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(budget: soak.Budget, tell: object) -> None:
        raise OSError("no room")

    def skips(budget: soak.Budget, tell: Tell) -> None:
        tell(Result("skips", "all", "skipped", 0.0))

    monkeypatch.setattr(soak, "PARTS", {"breaks": breaks, "skips": skips})
    out = tmp_path / "soak.jsonl"
    assert soak.main(["--out", str(out)]) == 1
    lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [(line["part"], line["state"]) for line in lines] == [
        ("breaks", "failed"),
        ("skips", "skipped"),
    ]
    shown = capsys.readouterr().out
    assert "OSError: no room" in shown
    assert table([]).split() == ["part", "case", "state", "seconds", "words"]


def test_an_unknown_part_is_refused() -> None:
    with pytest.raises(SystemExit):
        soak.main(["sleep"])


def test_guided_fuzzing_is_skipped_where_atheris_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    results: list[Result] = []
    guided.play(1.0, tmp_path, results.append)
    assert [(result.state, result.words) for result in results] == [
        ("skipped", "atheris is not installed")
    ]


@pytest.mark.slow
def test_the_fuzz_part_tells_how_many_inputs_it_tried(tmp_path: Path) -> None:
    out = tmp_path / "soak.jsonl"
    arguments = ["fuzz", "--inputs", "400", "--processes", "1", "--out", str(out)]
    assert soak.main([*arguments, "--folder", str(tmp_path)]) == 0
    (line,) = out.read_text(encoding="utf-8").splitlines()
    assert json.loads(line)["numbers"]["inputs"] >= 400
