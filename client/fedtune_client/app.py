"""The ClientApp of a fleet whose nodes are told apart by Flower's node configuration."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import cast

from flwr.app import Context
from flwr.clientapp import ClientApp

from fedtune.settings import RunConfig
from fedtune.train.allocator import keep_freed_memory
from fedtune_client.agent import Agent
from fedtune_client.answering import make_answering_app
from fedtune_client.site import SimulatedFleet, SiteSource


def make_client_app(sites: SiteSource) -> ClientApp:
    """Build the app that runs on every device.

    Args:
        sites: finds a Flower node's site; in a simulation `SimulatedFleet`.
    """
    return make_answering_app(lambda message, context: agent_of(sites, context))


def make_simulated_client_app(config: RunConfig) -> ClientApp:
    """Build the app of every device of a simulated fleet."""
    return make_client_app(SimulatedFleet(config.model_dump_json()))


def agent_of(sites: SiteSource, context: Context) -> Agent:
    """The agent of this node: made at its first message, kept for the process's life.

    The cache outlives a ClientApp object, because some engines unpickle the app anew for every
    message while the process, and the loaded base in it, stays.
    """
    node_config = tuple(sorted(cast(Mapping[str, object], context.node_config).items()))
    return _kept_agent(sites, node_config)


@lru_cache(maxsize=4096)
def _kept_agent(sites: SiteSource, node_config: tuple[tuple[str, object], ...]) -> Agent:
    site = sites(dict(node_config))
    if site.tune_allocator:
        keep_freed_memory()
    return Agent(site)
