"""The `fedtune` command: one verb per module, and the one place where errors become exit codes."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import Annotated

import click
import typer

from fedtune.cli.check import check
from fedtune.cli.client import client
from fedtune.cli.demo import demo
from fedtune.cli.export import export
from fedtune.cli.init import init
from fedtune.cli.logs import logs
from fedtune.cli.measure import measure
from fedtune.cli.plan import plan
from fedtune.cli.probe import probe
from fedtune.cli.ps import ps
from fedtune.cli.run import run
from fedtune.cli.server import server
from fedtune.cli.simulate import simulate
from fedtune.cli.status import status
from fedtune.cli.stop import resume, stop
from fedtune.cli.verify import verify
from fedtune.cli.watch import watch
from fedtune.errors import FedtuneError

EXIT_ERROR = 2
EXIT_INTERRUPTED = 130
"""What shells report for a program that Ctrl-C ended: 128 plus the signal's number."""

app = typer.Typer(
    name="fedtune",
    help="Federated LoRA tuning of language models over unequal devices.",
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("init")(init)
app.command("check")(check)
app.command("plan")(plan)
app.command("measure")(measure)
app.command("probe")(probe)
app.command("simulate")(simulate)
app.command("run")(run)
app.command("ps")(ps)
app.command("stop")(stop)
app.command("resume")(resume)
app.command("logs")(logs)
app.command("status")(status)
app.command("watch")(watch)
app.command("verify")(verify)
app.command("export")(export)
app.command("demo")(demo)
app.add_typer(server)
app.add_typer(client)


@app.callback(invoke_without_command=True)
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
        result = app(
            args=None if arguments is None else list(arguments),
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
