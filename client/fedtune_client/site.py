"""What a device knows of itself before the coordinator says anything: its data and its limits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Protocol

from fedtune.config import cache_folder
from fedtune.data.sites import Sites, open_sites
from fedtune.devices.simulated import simulated_profiles
from fedtune.records import ComputeName, DeviceProfile, GraphUse
from fedtune.settings import DataSection, RunConfig
from fedtune_client.allowance import Idle
from fedtune_client.round_states import state_folder


@dataclass(frozen=True, slots=True)
class SiteSettings:
    """One site, as the agent on it starts.

    Attributes:
        model_path: local folder or hub id of the site's copy of the base.
        sites: where the site's rows are, under the profile's name.
        threads: torch threads to compute with; 0 leaves torch's choice.
        shares_backbone: other sites live in this process and use the same base.
        compute: dtype of activations and products; `auto` is measured in this process.
        cuda_graph: whether training steps are recorded as CUDA graphs.
        tune_allocator: whether this process, which is the site's own, may keep freed memory.
        cache_folder: where what was made of the base is kept between processes; None: nowhere.
        state_folder: where the device keeps what it carries from round to round; None: in memory.
        measures_steps: what a step takes on this machine, and the memory free on it, are the
            site's own; False: the device is simulated, and has what its class says.
        idle: what the site's process held before it loaded any base; None: it has loaded none.
    """

    profile: DeviceProfile
    model_path: str
    model_revision: str
    data: DataSection
    sites: Sites
    seed: int
    threads: int = 0
    shares_backbone: bool = False
    compute: ComputeName = "auto"
    cuda_graph: GraphUse = "off"
    tune_allocator: bool = True
    cache_folder: Path | None = None
    state_folder: Path | None = None
    measures_steps: bool = False
    idle: Idle | None = None


class SiteSource(Protocol):
    """Finds the settings of the site that a Flower node is."""

    def __call__(self, node_config: Mapping[str, object]) -> SiteSettings: ...

    def __hash__(self) -> int:
        """Equal sources give equal agents, which a process makes once."""
        ...


@dataclass(frozen=True, slots=True)
class SimulatedFleet:
    """The sites of a simulated fleet; Flower's `partition-id` picks one.

    It holds the run's settings only, so that worker processes can be given it cheaply; each opens
    the data itself, once.

    Attributes:
        config_json: a whole `RunConfig`, as JSON.
    """

    config_json: str

    def __call__(self, node_config: Mapping[str, object]) -> SiteSettings:
        config, sites, profiles = _open(self.config_json)
        partition = node_config["partition-id"]
        assert isinstance(partition, int)
        name = sites.names[partition]
        return SiteSettings(
            profile=profiles[name],
            model_path=config.model.path,
            model_revision=config.model.revision,
            data=config.data,
            sites=sites,
            seed=config.run.seed,
            threads=config.simulation.threads,
            shares_backbone=True,
            # Measured, one seed would give other results on other machines.
            compute="fp32" if config.train.compute == "auto" else config.train.compute,
            cuda_graph=config.train.cuda_graph,
            tune_allocator=config.train.tune_allocator,
            cache_folder=cache_folder(),
            state_folder=state_folder(config.folder / "devices", name),
            measures_steps=config.simulation.clock == "measured",
        )


@lru_cache(maxsize=4)
def _open(config_json: str) -> tuple[RunConfig, Sites, dict[str, DeviceProfile]]:
    config = RunConfig.model_validate_json(config_json)
    sites = open_sites(config.data, devices=config.devices, seed=config.run.seed)
    return (
        config,
        sites,
        simulated_profiles(
            config.fleet, sites.declared, config.run.seed, config.simulation.accelerator
        ),
    )
