"""A plan on paper: what a run would plan, from its run file, its data's names and headers alone.

Nothing is loaded that would need torch, and no weight is read. What a run learns from its devices
before it plans (their profiles, labels, samples) comes from the run file and the data here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedtune.aggregate.rules import make_rule
from fedtune.cli.simulable import need_simulated_fleet
from fedtune.config import cache_folder
from fedtune.data.samples import site_labels
from fedtune.data.sites import Sites, open_sites
from fedtune.devices.simulated import simulated_profiles
from fedtune.errors import PlanError
from fedtune.model.shapes import head_parameters, read_shapes
from fedtune.model.source import resolve_model
from fedtune.plan.edited import follow_plan, unknown_devices
from fedtune.plan.from_config import plan_pins, plan_settings
from fedtune.plan.mixing import may_mix
from fedtune.plan.settings import PlanSettings
from fedtune.plan.solve import plan_fleet
from fedtune.plan.written import read_plan
from fedtune.records import (
    DeviceProfile,
    DistortionTable,
    FleetPlan,
    ImportanceReport,
    ModelShapes,
)
from fedtune.settings import RunConfig
from fedtune.wire.distortion import read_distortion
from fedtune.wire.importance import read_importance

_FEWEST_LABELS = 2
"""Classes of a task whose data is not here: what a classifier has at least."""


@dataclass(frozen=True, slots=True)
class PaperPlan:
    """A plan, and what it was made from.

    Attributes:
        named: whether the devices have the names of the run's sites; else only classes are known.
        notes: what a person should know of it, one line each.
    """

    plan: FleetPlan
    profiles: tuple[DeviceProfile, ...]
    shapes: ModelShapes
    settings: PlanSettings
    named: bool
    notes: tuple[str, ...]


def plan_run(config: RunConfig) -> PaperPlan:
    """Plan a run before it starts, from headers alone.

    The weights are read only where a distortion table or an importance report is named, to see
    that it is of this base.

    Raises:
        FedtuneError: the data, the sites or the model cannot be used, or no plan fits a device.
    """
    need_simulated_fleet(config, data=False)
    sites = sites_at_hand(config)
    folder = resolve_model(config.model.path, config.model.revision)
    shapes = read_shapes(
        folder,
        config.lora.targets,
        cache_folder() / "digests",
        headers_only=not (config.plan.distortion or config.importance.file),
    )
    return plan_on_paper(config, folder, shapes, sites)


def plan_on_paper(
    config: RunConfig, folder: Path, shapes: ModelShapes, sites: Sites | None
) -> PaperPlan:
    """The plan of a run, or the one in `plan.file`, checked and priced.

    Args:
        folder: of the base model.
        sites: of the run; None where its data is not here.

    Raises:
        FedtuneError: as for `plan_run`; or the plan in `plan.file` cannot be followed.
    """
    declared = sites.declared if sites else _names_without_data(config)
    # A run draws each site's class before it leaves out those that hold no rows.
    drawn = simulated_profiles(
        config.fleet, declared, config.run.seed, config.simulation.accelerator
    )
    profiles = tuple(drawn[name] for name in (sites.names if sites else declared))
    rule = make_rule(config.aggregate.rule, config.lora.rank_cap, seed=config.run.seed)
    dense = _dense_parameters(config, folder, sites)
    settings = plan_settings(config, dense, rule.tail, shapes.matrices)
    named = bool(sites or config.data.sites)
    away = "the data is not here" + ("" if named else "; devices have no names yet")
    notes = list(sites.warnings) if sites else [away]
    if config.plan.file:
        plan = _followed(config, profiles, shapes, settings, declared)
    else:
        plan = _planned(config, profiles, shapes, settings, _samples(config, sites), notes)
    return PaperPlan(plan, profiles, shapes, settings, named, tuple(notes))


def sites_at_hand(config: RunConfig) -> Sites | None:
    """The run's sites; None where a file of them is not on this machine.

    Raises:
        FedtuneError: the files are here and cannot be used.
    """
    files = list(config.data.sites.values()) or [config.data.train]
    if not all(Path(file).is_file() for file in files):
        return None
    return open_sites(config.data, devices=config.devices, seed=config.run.seed)


def _names_without_data(config: RunConfig) -> tuple[str, ...]:
    """Names of the sites as far as the run file has them, and made-up ones for the rest."""
    if config.data.sites:
        return tuple(sorted(config.data.sites))
    known = [name for section in config.fleet.values() for name in section.sites]
    digits = len(str(config.devices))
    made = (f"device-{index:0{digits}d}" for index in range(1, config.devices + 1))
    return (*known, *made)[: config.devices]


def _dense_parameters(config: RunConfig, folder: Path, sites: Sites | None) -> int:
    if config.model.task != "sequence-classification":
        return 0
    labels: set[str] = set()
    for site in (sites.site(name) for name in sites.names) if sites else ():
        labels |= set(site_labels([*site.train, *site.held_out], config.data.label_field))
    return head_parameters(folder, max(len(labels), _FEWEST_LABELS))


def _samples(config: RunConfig, sites: Sites | None) -> Mapping[str, int] | None:
    """What each site's share in the joined adapter goes by; None where all count alike."""
    if sites is None or config.aggregate.weights == "uniform":
        return None
    return {name: len(sites.site(name).train) for name in sites.names}


def _followed(
    config: RunConfig,
    profiles: Sequence[DeviceProfile],
    shapes: ModelShapes,
    settings: PlanSettings,
    declared: Sequence[str],
) -> FleetPlan:
    written = read_plan(Path(config.plan.file))
    strangers = unknown_devices(written, declared)
    if strangers:
        raise PlanError(strangers)
    return follow_plan(written, profiles, shapes, settings, plan_pins(config))


def _planned(
    config: RunConfig,
    profiles: Sequence[DeviceProfile],
    shapes: ModelShapes,
    settings: PlanSettings,
    samples: Mapping[str, int] | None,
    notes: list[str],
) -> FleetPlan:
    """The planner's plan; adds to the notes what a run would know beyond it."""
    importance, table = _importance(config, shapes), _distortion(config)
    if importance is None and config.importance.method != "uniform":
        notes.append(
            "ranks follow a prior here, and a run measures importance "
            f"({config.importance.method}) first; --importance takes what an earlier run measured"
        )
    plan = plan_fleet(
        profiles,
        shapes,
        settings,
        importance=importance,
        pins=plan_pins(config),
        distortion=table,
        samples=samples,
    )
    if table is None and config.plan.widths == "mixed" and may_mix(plan):
        notes.append(
            "a run may hold single matrices in better forms than here, since it measures the base: "
            "fedtune measure writes the table for plan.distortion"
        )
    return plan


def check_named_files(config: RunConfig, shapes: ModelShapes) -> None:
    """Read the measurements that a run file names, so that a bad one is refused before a run.

    Raises:
        FedtuneError: one cannot be read, or is of another base.
    """
    _importance(config, shapes)
    _distortion(config)


def _importance(config: RunConfig, shapes: ModelShapes) -> ImportanceReport | None:
    """What an earlier run measured; None takes the prior."""
    if not config.importance.file:
        return None
    return read_importance(Path(config.importance.file), shapes.digest)


def _distortion(config: RunConfig) -> DistortionTable | None:
    if not config.plan.distortion or config.plan.widths == "uniform":
        return None
    return read_distortion(Path(config.plan.distortion))
