"""A real machine as a site: what `client.toml` says, what is measured, and a run's task."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from fedtune.data.sites import Sites
from fedtune.deploy import homes
from fedtune.deploy.site_task import SiteTask
from fedtune.devices.probe import probe, profile_of
from fedtune.errors import DataError, DeploymentError, ModelError
from fedtune.records import BACKBONE_FORMATS, DeviceProfile, FormatName
from fedtune.train.measure_device import TorchMeasurer
from fedtune_client.allowance import Idle
from fedtune_client.round_states import state_folder
from fedtune_client.site import SiteSettings


def machine_profile(settings: homes.SiteSettings, cache: Path) -> DeviceProfile:
    """What this machine can carry; measured once, and kept until the machine changes.

    Its budget is the site's limit, or nine tenths of what is free: what the process holds already
    is not free, so it is called in a process that is ready and has loaded no base.

    Args:
        cache: folder of kept measurements.

    Raises:
        DeploymentError: `device.formats` names a format that does not exist.
        ModelError: no format, or not the accelerator, that is asked for runs here.
    """
    device = settings.device
    found = probe(TorchMeasurer(device.accelerator), cache)
    profile = profile_of(found, settings.site.name, device.device_class, device.memory)
    formats = _formats(device.formats, profile)
    return replace(profile, cpu_threads=device.threads or found.cores, formats=formats)


def _formats(wanted: tuple[str, ...], profile: DeviceProfile) -> tuple[FormatName, ...]:
    for name in wanted:
        if name not in BACKBONE_FORMATS:
            raise DeploymentError(
                f"client.toml: device.formats: there is no format {name!r}; expected some of "
                f"{', '.join(BACKBONE_FORMATS)}"
            )
    kept = tuple(name for name in profile.formats if not wanted or name in wanted)
    if not kept:
        raise ModelError(
            f"none of device.formats ({', '.join(wanted)}) runs on this machine; those that do: "
            f"{', '.join(profile.formats)}"
        )
    return kept


def site_settings(
    home: homes.SiteHome,
    settings: homes.SiteSettings,
    task: SiteTask,
    base: Path,
    profile: DeviceProfile,
    idle: Idle,
    cache: Path,
) -> SiteSettings:
    """One run's site on this machine, as an agent starts.

    Args:
        base: folder of the base that the run tunes.
        cache: folder of what can be made again.

    Raises:
        DataError: the site's file is not named, cannot be read or is empty.
    """
    name = settings.site.name
    file = data_file(home, settings)
    sites = Sites(task.data, seed=task.seed, rows={}, files={name: file})
    if not sites.names:
        raise DataError(f"{file} holds no rows; expected one JSON object per line")
    return SiteSettings(
        profile=profile,
        model_path=str(base),
        model_revision="main",
        data=task.data,
        sites=sites,
        seed=task.seed,
        threads=settings.device.threads,
        compute=task.compute,
        cuda_graph=task.cuda_graph,
        tune_allocator=task.tune_allocator,
        cache_folder=cache,
        state_folder=state_folder(home.state / "runs", task.name),
        measures_steps=True,
        idle=idle,
    )


def data_file(home: homes.SiteHome, settings: homes.SiteSettings) -> Path:
    """The site's rows; a relative path is below the site's home.

    Raises:
        DataError: `client.toml` names none.
    """
    if not settings.data.train:
        raise DataError(
            "client.toml: data.train: expected the JSONL file of this site's rows, found none; "
            "name it there"
        )
    return home.path / Path(settings.data.train).expanduser()
