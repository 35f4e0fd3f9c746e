"""What an operator may ask of runs: start, stop and resume, with what is checked before."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from fedtune.errors import ConfigError, RunError
from fedtune.settings import RunConfig
from fedtune_server.deployed_config import deployed_config
from fedtune_server.desk.credentials import SiteRegistry
from fedtune_server.desk.player import Player, read_status
from fedtune_server.desk.presence import Presence, utc_now
from fedtune_server.desk.queue import Queue, Wanted, read_config
from fedtune_server.same_run import first_difference, written_config

CONFIG_BYTES = 1_000_000
_TOLD_OF_STOPPED = 1000
"""Names of stopped runs that sites are told of; older ones have long ended at every site."""


class Orders:
    """Changes which runs are wanted; safe to call from any thread.

    Args:
        now: UTC in ISO 8601; runs are played in its order.
    """

    def __init__(
        self,
        queue: Queue,
        runs: Path,
        player: Player,
        presence: Presence,
        registry: SiteRegistry,
        now: Callable[[], str] = utc_now,
    ) -> None:
        self._queue, self._runs, self._player = queue, runs, player
        self._presence, self._registry, self._now = presence, registry, now

    def start(self, config_json: str, overwrite: bool) -> Wanted:
        """Want a run, or want one of that name to go on, such as with more rounds.

        Raises:
            ConfigError: it is not a configuration, or not one that can be played here.
            RunError: another run has the name, or it cannot be written.
        """
        if len(config_json.encode("utf-8", "replace")) > CONFIG_BYTES:
            raise ConfigError(f"a run's configuration may have {CONFIG_BYTES} bytes, found more")
        config = read_config(config_json)
        check_playable(config, self._registry)
        folder = self._runs / config.run.name
        outputs = config.outputs.model_copy(update={"folder": str(folder)})
        config = config.model_copy(update={"outputs": outputs})
        run = Wanted(config.run.name, config.model_dump_json(), self._now())
        with self._queue.lock:
            known = self._queue.get(run.name)
            if known is not None and not known.ended:
                raise RunError(
                    f"run {run.name} is {_state_words(known)} already; follow it with: fedtune "
                    f"watch {run.name}, or end it with: fedtune stop {run.name}"
                )
            if overwrite:
                _remove(folder)
            else:
                _check_same(folder, deployed_config(config, folder))
            self._queue.put(run)
        self.tell_sites()
        self._player.wake()
        return run

    def stop(self, name: str) -> Wanted:
        """Want a run to stop; sites are told before Flower is.

        Raises:
            RunError: no run has that name, or it has ended.
        """
        with self._queue.lock:
            run = self._queue.need(name)
            if run.ended:
                raise RunError(f"run {run.name} is over ({run.ended}); there is nothing to stop")
            run = self._queue.change(name, wanted="stopped", reason="the operator stopped it")
        self.tell_sites()
        self._player.wake()
        return run

    def resume(self, name: str) -> Wanted:
        """Want a run that was stopped or failed to go on from its folder.

        Raises:
            RunError: no run has that name, or it is not one of those.
        """
        with self._queue.lock:
            run = self._queue.need(name)
            if not run.ended:
                raise RunError(f"run {run.name} is {_state_words(run)}; wait until it has ended")
            if run.ended == "finished":
                raise RunError(
                    f"run {run.name} is finished; give it more rounds with: fedtune run RUN.toml "
                    "--set run.rounds=N"
                )
            check_playable(run.config(), self._registry)
            run = self._queue.change(
                name,
                wanted="running",
                ended="",
                reason="",
                flower_run_id=None,
                fruitless=0,
                since=self._now(),
            )
        self.tell_sites()
        self._player.wake()
        return run

    def tell_sites(self) -> None:
        """Tell every site which runs are stopped now.

        Raises:
            RunError: a run's file is damaged.
        """
        stopped = [run.name for run in self._queue.all() if run.wanted == "stopped"]
        self._presence.order(tuple(stopped[-_TOLD_OF_STOPPED:]))


def check_playable(config: RunConfig, registry: SiteRegistry) -> None:
    """Refuse what could only fail later: sites nobody knows, and files that are not here.

    Raises:
        ConfigError: the first such thing.
    """
    asked = config.deployment.sites
    if not asked:
        raise ConfigError(
            "deployment.sites is empty: the run file is for simulations; add a section "
            '[deployment] with sites = ["NAME", ...], or sites = ["*"] for all that are enrolled'
        )
    known = registry.sites()
    for name in asked:
        if name != "*" and (name not in known or known[name].state == "revoked"):
            names = ", ".join(sorted(n for n, site in known.items() if site.state != "revoked"))
            what = "is revoked" if name in known else "is not known"
            raise ConfigError(
                f"deployment.sites: site {name} {what} at this coordinator; it has: "
                f"{names or 'none'}; invite it with: fedtune server invite {name}"
            )
    _check_paths(config)


def _check_paths(config: RunConfig) -> None:
    files = {
        "data.test": config.data.test,
        "plan.file": config.plan.file,
        "plan.distortion": config.plan.distortion,
        "importance.file": config.importance.file,
    }
    for key, text in files.items():
        if text and not (os.path.isabs(text) and os.path.isfile(text)):
            raise ConfigError(
                f"{key} = {text}: expected a whole path of a file on the coordinator's machine, "
                "found none there; copy it there and name it as it is called there"
            )
    base = config.model.path
    if os.path.isabs(base) and not os.path.isdir(base):
        raise ConfigError(
            f"model.path = {base}: expected a folder on the coordinator's machine, found none "
            "there; copy the base model there, or name it as it is called there"
        )


def _check_same(folder: Path, config: RunConfig) -> None:
    """Refuse to put a run into the folder of another one, or of a finished one."""
    written = written_config(folder / "config.json")
    if written is None:
        return
    difference = first_difference(written, config)
    if difference is not None:
        raise RunError(
            f"there is already a run {config.run.name} with {difference.words()}; undo the change "
            "to continue it, choose another run.name, or pass --overwrite to replace it"
        )
    status = read_status(folder)
    reached = status.get("round")
    if (
        status.get("state") == "finished"
        and isinstance(reached, int)
        and reached >= config.run.rounds
    ):
        raise RunError(
            f"run {config.run.name} is finished at round {reached}; raise run.rounds to continue "
            "it, choose another run.name, or pass --overwrite to replace it"
        )


def _remove(folder: Path) -> None:
    """Remove a run's folder: out of the way at once, then its files."""
    if not folder.exists():
        return
    away = folder.with_name(f".{folder.name}.replaced")
    try:
        shutil.rmtree(away, ignore_errors=True)
        os.replace(folder, away)
        shutil.rmtree(away, ignore_errors=True)
    except OSError as error:
        raise RunError(f"{folder} cannot be replaced ({error.strerror})") from None


def _state_words(run: Wanted) -> str:
    if run.wanted == "stopped":
        return "stopping"
    return "queued" if run.flower_run_id is None else "running"
