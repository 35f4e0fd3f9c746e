"""The command's edge: exit codes, and one line on stderr for everything that is refused."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from fedtune.cli import main as main_module
from fedtune.cli.main import command_of, main


def test_help_and_version_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert "check" in capsys.readouterr().out
    assert main(["--help"]) == 0
    assert "init" in capsys.readouterr().out
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == version("fedtune")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["chek"], "error: No such command 'chek'"),
        (["check"], "error: Missing argument 'RUN_FILE'; see: fedtune check --help"),
        (["check", "run.toml", "--sample", "1"], "error: No such option"),
        (["check", "run.toml", "--samples", "-1"], "error: Invalid value for '--samples'"),
        (["check", "none.toml"], "error: run file none.toml cannot be read"),
        (["init", "--template", "poetry"], "error: Invalid value for '--template'"),
    ],
)
def test_every_refusal_is_one_line_and_exits_2(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(words)
    assert captured.err.count("\n") == 1


def test_an_interruption_exits_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fedtune.cli.check.load_run_config", interrupted)
    assert main(["check", "run.toml"]) == main_module.EXIT_INTERRUPTED == 130


def test_a_fault_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("fedtune.cli.check.load_run_config", broken)
    with pytest.raises(ZeroDivisionError):
        main(["check", "run.toml"])


def test_every_verb_and_option_says_what_it_does(capsys: pytest.CaptureFixture[str]) -> None:
    for command in command_of([]).registered_commands:
        assert command.name
        assert main([command.name, "--help"]) == 0
        assert "Usage: fedtune " + command.name in capsys.readouterr().out


def test_the_module_runs_as_the_command(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fedtune", "check", "none.toml"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: run file none.toml cannot be read")


def test_the_command_starts_without_torch_and_transformers(tmp_path: Path) -> None:
    code = (
        "import sys; import fedtune.cli.check, fedtune.cli.init; "
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=False).returncode == 0
