"""docs/hierarchy.md as a stranger follows it (`tests/docs/walk.py`).

Its machines are `top`, the coordinator above; `east`, a group's coordinator and the site that it is
above; and `site`, each of the group's sites.
"""

from __future__ import annotations

import json
import shutil
import signal
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedtune.config import load_run_config
from fedtune.deploy.homes import SiteSettings
from fedtune.deploy.site_task import site_task
from fedtune.settings import RunConfig
from fedtune_server.hierarchy.below import check_same_task
from tests.deployment.conftest import real_sites
from tests.docs.walk import (
    COORDINATOR_PORTS,
    DOCS,
    SITE_PORTS,
    Walk,
    fenced,
    lay_out_site,
    machines,
    marked,
)

PAGE = DOCS / "hierarchy.md"
SITES = ("ward-1", "ward-2")
GROUP = "east"
BELOW = "east-server/operator.toml"
INTERRUPTED = 130
WATCH_S = 60.0
ENDS_S = 10.0
"""From the end of a run to that of its process, on a machine that does other work, too."""


def block(what: str) -> str:
    """The text of the file, or of the change of one, that the page shows under a name."""
    (found,) = (block.text for block in marked(PAGE) if block.what == what and block.kind != "run")
    return found


def run_file(what: str, folder: Path) -> RunConfig:
    path = folder / Path(what).name
    path.write_text(block(what), encoding="utf-8")
    return load_run_config(path)


def commands() -> list[list[str]]:
    """The words of every command of the page, in its order."""
    return [words for block in marked(PAGE) if block.kind == "run" for words in block.commands]


def test_every_console_block_of_the_page_is_run() -> None:
    run = [block.text for block in marked(PAGE) if block.kind == "run"]
    assert fenced(PAGE, "console") == run
    assert machines(PAGE) == {"top", "east", "site"}


def test_every_toml_block_of_the_page_has_a_name() -> None:
    named = [block.text for block in marked(PAGE) if block.kind != "run"]
    assert fenced(PAGE, "toml") == named


def test_what_the_site_of_the_group_is_told_names_its_coordinator_and_its_class(
    tmp_path: Path,
) -> None:
    told = tomllib.loads(block("east/east-site/client.toml"))
    site = {"name": GROUP, "server": "top:9400", "service": "top:9401"}
    settings = SiteSettings.model_validate({"site": site, **told})
    above = run_file("top/top.toml", tmp_path)
    assert above.fleet[settings.device.device_class].devices_max > 1
    made = [words[3] for words in commands() if words[1:3] == ["server", "init"]]
    homes = [tmp_path / "east" / name for name in made]
    (tmp_path / "east" / "east-site").mkdir(parents=True)
    coordinator = tmp_path / "east" / "east-site" / settings.group.coordinator
    assert coordinator.resolve() == homes[1]


def test_the_run_files_of_both_levels_are_what_the_page_says_of_them(tmp_path: Path) -> None:
    above, own = run_file("top/top.toml", tmp_path), run_file("east/east.toml", tmp_path)
    for section in ("model", "data", "lora", "train"):
        assert getattr(own, section) == getattr(above, section), section
    assert own.aggregate.weights == above.aggregate.weights
    assert own.run.seed == above.run.seed
    check_same_task(site_task(above), site_task(own), GROUP)
    assert own.run.rounds >= above.run.rounds
    assert own.run.round_deadline_s < above.run.round_deadline_s
    invited = [words[3] for words in commands() if words[1:3] == ["server", "invite"]]
    assert invited == [GROUP, *SITES]
    assert own.deployment.group == GROUP
    assert above.deployment.sites == (GROUP,)
    assert not above.deployment.group
    assert own.deployment.sites == ("*",)
    assert own.deployment.minimum == own.devices == len(SITES)


def test_the_run_file_above_meets_what_the_identity_rests_on(tmp_path: Path) -> None:
    above, own = run_file("top/top.toml", tmp_path), run_file("east/east.toml", tmp_path)
    group, site = (
        above.fleet["group"],
        own.fleet[SiteSettings.model_fields["device"].default.device_class],
    )
    assert group.devices_max == own.devices
    assert group.count == len(above.deployment.sites)
    assert group.rank == above.lora.rank_cap + own.devices * site.rank
    assert above.aggregate.rule == "delta"
    assert (above.wire.up, above.wire.down) == ("fp32", "fp32")
    assert (above.run.devices_per_round, own.run.devices_per_round) == (0, 0)
    assert above.plan.steps == "equal"
    assert above.importance.method == "uniform"


class HierarchyWalk(Walk):
    """What is this page's alone: a run that is watched goes on."""

    def follow(self, machine: str, words: list[str]) -> None:
        if words[0] == "run":
            super().follow(machine, words)
            return
        log = self.folder / f"{machine}-watch.out"
        watching = self.tools.Started(words, log)
        try:
            self.tools.wait_for("both rounds", lambda: "round 2/20" in log.read_text(), WATCH_S)
            watching.process.send_signal(signal.SIGINT)
            assert watching.wait(WATCH_S) == INTERRUPTED
        finally:
            watching.kill()
        assert self.state(GROUP, GROUP, BELOW) == "running"

    def group_has_ended(self) -> bool:
        """Whether the process of the group's run is over."""
        path = self.folder / "east/east-server/runs/east/status.json"
        return bool(json.loads(path.read_text(encoding="utf-8"))["state"] == "interrupted")


@pytest.fixture
def walk(
    tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[HierarchyWalk]:
    base = tmp_path / "base"
    shutil.copytree(tiny_llama, base)
    for machine in ("top", "east"):
        (tmp_path / machine).mkdir()
    for at, site in enumerate(SITES):
        rows = [{"prompt": f"{site} {i % 5}", "response": "ab"[i % 2]} for i in range(20 + 4 * at)]
        lay_out_site(tmp_path / site, rows, base)
    ports = real_sites().free_ports(2 * COORDINATOR_PORTS + 3 * SITE_PORTS)
    found = HierarchyWalk(tmp_path, base, monkeypatch, iter(ports), SITES)
    yield found
    found.kill_all()


@pytest.mark.soak
@pytest.mark.deployment
@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_a_stranger_sets_up_two_levels_by_the_page(walk: HierarchyWalk) -> None:
    for block in marked(PAGE):
        walk.do(block)
    walk.wait_until("east", GROUP, BELOW, "stopped")
    walk.tools.wait_for("the end of the group's process", walk.group_has_ended, ENDS_S)
    assert walk.state("top", "wards", "top/operator.toml") == "finished"
    shown = (walk.folder / "east-watch.out").read_text(encoding="utf-8")
    for site in SITES:
        assert f"{site} (site): " in shown
    said_above = (walk.folder / "top-run.out").read_text(encoding="utf-8")
    for site in SITES:
        assert site not in said_above
    walk.stop_all()
