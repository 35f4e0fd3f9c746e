"""A solver that prints does not spoil what the program prints."""

from __future__ import annotations

import ctypes
import os
import sys

import pytest

from fedtune.plan.solver_output import without_solver_lines


def test_lines_of_the_solver_are_dropped_and_those_of_others_are_kept(
    capfd: pytest.CaptureFixture[str],
) -> None:
    with without_solver_lines():
        os.write(1, b"HighsMipSolverData::transform tmpSolver.run();\n")
        print("of another thread", flush=True)
    print("after", flush=True)
    assert capfd.readouterr().out == "of another thread\nafter\n"


@pytest.mark.skipif(sys.platform == "win32", reason="which C library printf is of differs")
def test_what_c_has_buffered_is_dropped_too(capfd: pytest.CaptureFixture[str]) -> None:
    library = ctypes.CDLL(None)
    with without_solver_lines():
        library.printf(b"HighsMipSolverData: %d\n", 1)
    library.fflush(None)
    assert capfd.readouterr().out == ""


def test_the_output_comes_back_after_an_error(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="of the solver"), without_solver_lines():
        raise ValueError("of the solver")
    print("after", flush=True)
    assert capfd.readouterr().out == "after\n"
