"""The runner's own rules; its processes are tested in tests/deployment."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedtune.errors import DeploymentError
from fedtune.flwr_compat import FlowerRun
from fedtune_server.runner import Runner, _link, load
from tests.deployment.homes import OPERATOR_TOKEN, make_coordinator


def test_an_app_is_found_by_its_name() -> None:
    assert callable(load("tests.deployment.apps:server"))


@pytest.mark.parametrize("app", ["no_such_module:app", "json:no_such_name", "json:__name__"])
def test_what_is_no_app_is_named(app: str) -> None:
    with pytest.raises(DeploymentError, match=app):
        load(app)


def test_the_link_is_reached_on_this_machine(tmp_path: Path) -> None:
    home = make_coordinator(tmp_path / "home", 9400)
    address, ca, token = _link(home, insecure=False)
    assert (address, token) == ("127.0.0.1:9400", OPERATOR_TOKEN)
    assert ca == home.ca_certificate.read_bytes()
    assert _link(home, insecure=True)[1] is None


def test_an_incomplete_home_says_what_makes_it(tmp_path: Path) -> None:
    home = make_coordinator(tmp_path / "home", 9400)
    home.operator_file.unlink()
    with pytest.raises(DeploymentError, match="fedtune server init"):
        _link(home, insecure=False)
    home.ca_certificate.unlink()
    with pytest.raises(DeploymentError, match="fedtune server init"):
        _link(home, insecure=False)


class Link:
    """A link with runs in each state, which is there at the second question only."""

    def __init__(self) -> None:
        self.asked, self.stopped = 0, list[int]()

    def runs(self) -> dict[int, FlowerRun]:
        self.asked += 1
        if self.asked == 1:
            raise DeploymentError("it is not there")
        states = ("pending", "starting", "running", "finished")
        return {i: FlowerRun(state, "", "", 0, 0) for i, state in enumerate(states)}

    def stop_run(self, run_id: int) -> None:
        self.stopped.append(run_id)

    def acquire(self) -> None:
        return


def test_a_new_runner_ends_the_runs_of_the_one_before_and_no_later_ones(tmp_path: Path) -> None:
    runner, link = Runner(make_coordinator(tmp_path / "home", 9400), "app"), Link()
    for _ in range(4):
        runner._step(link, link)  # type: ignore[arg-type]
    assert (link.asked, link.stopped) == (2, [1, 2])
