"""The `fedtune` command: one verb per module, and the one place where errors become exit codes."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.metadata import version
from typing import Annotated, Final

import click
import typer

from fedtune.errors import FedtuneError

EXIT_ERROR = 2
EXIT_INTERRUPTED = 130
"""What shells report for a program that Ctrl-C ended: 128 plus the signal's number."""

_VERBS: Final[Mapping[str, str]] = {
    "init": "init",
    "check": "check",
    "plan": "plan",
    "measure": "measure",
    "probe": "probe",
    "simulate": "simulate",
    "run": "run",
    "ps": "ps",
    "stop": "stop",
    "resume": "stop",
    "logs": "logs",
    "status": "status",
    "watch": "watch",
    "verify": "verify",
    "export": "export",
    "demo": "demo",
}
"""Verb -> the module below `fedtune.cli` that has it."""
_GROUPS: Final = ("server", "client")


def command_of(arguments: Sequence[str]) -> typer.Typer:
    """The command with the verb that is called, or with all where that is none, as for --help.

    One verb does not wait for what others import.
    """
    app = typer.Typer(
        name="fedtune",
        help="Federated LoRA tuning of language models over unequal devices.",
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    app.callback(invoke_without_command=True)(_root)
    called = arguments[0] if arguments else ""
    one = called in _VERBS or called in _GROUPS
    for verb in [called] if one else [*_VERBS, *_GROUPS]:
        module = import_module(f"fedtune.cli.{_VERBS.get(verb, verb)}")
        found = getattr(module, verb)
        if verb in _GROUPS:
            app.add_typer(found)
        else:
            app.command(verb)(found)
    return app


def _root(
    context: typer.Context,
    show_version: Annotated[bool, typer.Option("--version", help="print the version")] = False,
) -> None:
    if show_version:
        typer.echo(version("fedtune"))
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code.

    0: done. 2: what was asked cannot be done, with one line on stderr that says why. 130:
    interrupted. Anything else that is raised is a fault of ours and keeps its traceback.

    Args:
        arguments: what stands behind `fedtune`; by default the process's own.
    """
    for stream in (sys.stdout, sys.stderr):
        # A console that cannot show a character shows `?` rather than ending the program.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        given = sys.argv[1:] if arguments is None else list(arguments)
        result = command_of(given)(
            args=given,
            prog_name="fedtune",
            standalone_mode=False,
        )
    except FedtuneError as error:
        return _fail(str(error))
    except click.UsageError as error:
        where = error.ctx.command_path if error.ctx is not None else "fedtune"
        return _fail(f"{error.format_message().rstrip('.')}; see: {where} --help")
    except click.ClickException as error:
        return _fail(error.format_message())
    except (KeyboardInterrupt, click.Abort):
        return EXIT_INTERRUPTED
    return result if isinstance(result, int) else 0


def _fail(message: str) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return EXIT_ERROR
