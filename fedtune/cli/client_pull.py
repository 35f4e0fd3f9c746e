"""`fedtune client pull RUN`: what a run has made so far, from the coordinator to a site."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from fedtune.cli.amounts import bytes_text, one_line
from fedtune.cli.coordinator import Insecure, warn_of_plain
from fedtune.deploy.channel import open_channel
from fedtune.deploy.download import download
from fedtune.deploy.homes import SiteHome
from fedtune.errors import DeploymentError
from fedtune.v1 import coordinator_pb2 as pb


def pull(
    run: Annotated[str, typer.Argument(help="the run's name")],
    folder: Annotated[Path, typer.Option("--dir", help="the site's folder")] = Path("fedtune-site"),
    to: Annotated[
        Path | None,
        typer.Option("--to", metavar="FOLDER", help="where to put it; else runs/RUN in --dir"),
    ] = None,
    insecure: Insecure = False,
) -> None:
    """Download a run's adapter, exports and report; what was cut goes on where it was."""
    home = SiteHome(folder)
    site = home.settings().site
    target = to if to is not None else home.path / "runs" / _folder_name(run)
    if insecure:
        warn_of_plain(site.service)
    channel = open_channel(
        site.service,
        b"" if insecure else _read(home.ca_certificate),
        _read(home.token).decode("ascii", "replace").strip(),
        insecure=insecure,
    )
    try:
        with _shown(run) as progress:
            task = progress.add_task(one_line(run), total=None)
            paths = download(
                channel,
                pb.ManifestRequest(run=run),
                target,
                lambda here, total: progress.update(task, completed=here, total=total),
            )
    finally:
        channel.close()
    size = sum(path.stat().st_size for path in paths)
    typer.echo(f"{len(paths)} files, {bytes_text(size)}, in {target}")


def _folder_name(run: str) -> str:
    """A run's name, where it is one; it came from a person and becomes a folder."""
    if run in (".", "..") or Path(run).name != run or "\\" in run:
        raise DeploymentError(f"{run!r} is not the name of a run; see run.name of its run file")
    return run


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DeploymentError(
            f"{path} cannot be read ({error.strerror}); make the site with: fedtune client join"
        ) from None


def _shown(run: str) -> Progress:
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        console=Console(stderr=True),
        transient=True,
    )
