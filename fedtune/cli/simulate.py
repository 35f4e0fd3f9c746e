"""`fedtune simulate RUN.toml`: a whole federation on this machine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from fedtune.cli.apps import load_app
from fedtune.cli.display import JsonLines, LiveDisplay
from fedtune.cli.paper import check_named_files, plan_on_paper
from fedtune.cli.simulable import need_simulated_fleet
from fedtune.cli.with_base import finish_run, measure_base
from fedtune.config import cache_folder, load_run_config
from fedtune.data.sites import open_sites
from fedtune.devices.simulated import simulated_profiles
from fedtune.errors import MissingExtraError
from fedtune.model.shapes import read_shapes
from fedtune.model.source import resolve_model
from fedtune.records import Event
from fedtune.settings import RunConfig


def simulate(
    run_file: Annotated[Path, typer.Argument(help="the run file, RUN.toml")],
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="override a key, such as run.rounds=3"),
    ] = None,
    plan: Annotated[
        Path | None,
        typer.Option("--plan", help="follow this plan, as `fedtune plan` writes it (plan.file)"),
    ] = None,
    json_lines: Annotated[
        bool, typer.Option("--json", help="print one JSON object per event instead of a display")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="replace a run that is already in the folder")
    ] = False,
) -> None:
    """Run a whole federation on this machine and write the merged model."""
    overrides = [*(set_ or []), *([f"plan.file={plan}"] if plan else [])]
    run_simulation_file(run_file, overrides, json_lines=json_lines, overwrite=overwrite)


def run_simulation_file(
    path: Path, overrides: Sequence[str], *, json_lines: bool, overwrite: bool
) -> Path:
    """Load a run file and simulate it; returns the run folder.

    Raises:
        FedtuneError: the run file, its data or its model is wrong, or the run failed.
        KeyboardInterrupt: the run was interrupted; its folder says so.
    """
    config = load_run_config(path, overrides)
    at_once = config.simulation.workers if config.simulation.backend == "ray" else 1
    with JsonLines() if json_lines else LiveDisplay(at_once=at_once) as display:
        return simulate_config(config, watch=display, overwrite=overwrite)


def simulate_config(
    config: RunConfig, *, watch: Callable[[Event], None], overwrite: bool = False
) -> Path:
    """Simulate a run; returns its folder.

    Raises:
        FedtuneError: the data or the model is wrong, or the run failed.
    """
    need_simulated_fleet(config)
    sites = open_sites(config.data, devices=config.devices, seed=config.run.seed)
    simulated_profiles(config.fleet, sites.declared, config.run.seed)  # refuses before a run starts
    model = resolve_model(config.model.path, config.model.revision)
    shapes = read_shapes(model, config.lora.targets, cache_folder() / "digests")
    check_named_files(config, shapes)
    if config.plan.file:
        plan_on_paper(config, model, shapes, sites)  # refuses it before a run starts
    folder: Path = load_app("simulation")(
        config,
        _client_app(config),
        shapes,
        len(sites),
        watch=watch,
        finish=partial(finish_run, config),
        overwrite=overwrite,
        warnings=sites.warnings,
        measure=partial(measure_base, model, shapes),
        together=load_app("side_by_side")(config),
    )
    return folder


def _client_app(config: RunConfig) -> Any:  # a Flower ClientApp; the core does not import Flower
    try:
        import torch  # noqa: F401  the client needs it, and its absence deserves a clear word
    except ImportError:
        raise MissingExtraError("torch", "train", "simulating devices") from None
    return load_app("simulated_client")(config)
