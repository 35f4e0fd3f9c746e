"""A site that stands for a coordinator's sites: what it hands on, and when it does not."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from flwr.app import Message

from fedtune.config import parse_run_config
from fedtune.deploy.homes import SiteHome
from fedtune.deploy.mailbox import Answer, Ask, Mailbox
from fedtune.deploy.policy_file import policy_template
from fedtune.deploy.site_task import SiteTask, flower_config, site_task
from fedtune.errors import DeploymentError, PolicyError, ProtocolError, RunError, StoppedError
from fedtune.settings import RunConfig
from fedtune.wire import messages
from fedtune.wire.flower import PROFILE, from_record, to_record
from fedtune_client import executor
from fedtune_client.group import GroupSite, client_app, close, make_group_site_app
from fedtune_server.simulation.grid import InProcessGrid

SPEC = messages.encode_task_spec(messages.TaskSpec("run-1", "causal-lm", "d" * 64, ()))


@pytest.fixture
def config() -> RunConfig:
    tree = {
        "run": {"name": "two"},
        "model": {"path": "not/read/here"},
        "data": {"max_tokens": 16},
        "deployment": {"sites": ["*"]},
    }
    return parse_run_config(tree, "test")


@pytest.fixture
def task(config: RunConfig) -> SiteTask:
    return site_task(config)


@pytest.fixture
def home(tmp_path: Path) -> SiteHome:
    """The site `east`, and the home of its coordinator beside it."""
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "server.toml").write_text('host = "localhost"\n', encoding="utf-8")
    made = SiteHome(tmp_path / "site")
    made.path.mkdir()
    made.settings_file.write_text(
        '[site]\nname = "east"\nserver = "127.0.0.1:1"\nservice = "127.0.0.1:1"\n'
        '[device]\ndevice_class = "region"\n[group]\ncoordinator = "../below"\n',
        encoding="utf-8",
    )
    made.policy_file.write_text(policy_template(), encoding="utf-8")
    made.token.write_text("token-of-east", encoding="ascii")
    return made


class Run:
    """Stands for the run of the group's coordinator."""

    def __init__(self, folder: Path) -> None:
        self.mailbox = Mailbox(folder)
        self.says: Callable[[Ask], Answer] | None = lambda asked: Answer("", b"said", b"learnt")
        self.asked: list[Ask] = []
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._play, daemon=True)
        self.mailbox.alive()
        self.thread.start()

    def _play(self) -> None:
        done = ""
        while not self.over.is_set():
            found = self.mailbox.take()
            if found is not None and found.id != done:
                done = found.id
                self.asked.append(found)
                if self.says is not None:
                    self.mailbox.answer(done, self.says(found))
            time.sleep(0.02)


@pytest.fixture
def run(home: SiteHome, tmp_path: Path) -> Iterator[Run]:
    made = Run(tmp_path / "below" / "groups" / "east")
    yield made
    made.over.set()
    made.thread.join(5)


@pytest.fixture
def site(home: SiteHome) -> GroupSite:
    return GroupSite(home, home.settings())


def test_a_question_is_handed_on_and_its_answer_comes_back(
    site: GroupSite, run: Run, task: SiteTask
) -> None:
    found = site.answer(PROFILE, task, SPEC, None, 100.0)
    assert (found.body, found.tensors) == (b"said", b"learnt")
    (asked,) = run.asked
    assert (asked.kind, asked.body, asked.tensors) == (PROFILE, SPEC, None)
    assert asked.about["device_class"] == "region"
    assert asked.about["within_s"] == 85.0
    assert run.mailbox.asked() is None
    assert site.board.now().state == "idle"


def test_the_app_answers_a_message_with_what_the_group_says(
    site: GroupSite, run: Run, config: RunConfig
) -> None:
    with InProcessGrid(make_group_site_app(site), 1, run_config=flower_config(config)) as grid:
        (node,) = grid.get_node_ids()
        (sent,) = grid.push_messages([Message(to_record(PROFILE, SPEC), node, PROFILE, ttl=60.0)])
        replies: list[Message] = []
        end = time.monotonic() + 20
        while not replies and time.monotonic() < end:
            replies = list(grid.pull_messages([sent]))
    assert from_record(replies[0].content, PROFILE) == (b"said", b"learnt")


def test_what_the_group_refuses_is_refused_with_its_reason(
    site: GroupSite, run: Run, task: SiteTask
) -> None:
    run.says = lambda asked: Answer("no device can take part")
    with pytest.raises(ProtocolError, match="no device can take part"):
        site.answer(PROFILE, task, SPEC, None, 100.0)
    assert site.board.now().last_refusal == "no device can take part"


def test_a_group_whose_run_does_not_play_says_so(
    site: GroupSite, task: SiteTask, home: SiteHome, tmp_path: Path
) -> None:
    words = 'does not play; hand in one with deployment.group = "east"'
    with pytest.raises(RunError, match=words):
        site.answer(PROFILE, task, SPEC, None, 100.0)
    Mailbox(tmp_path / "below" / "groups" / "east").alive()
    quick = GroupSite(home, home.settings(), silence_s=0.5)
    with pytest.raises(RunError, match=words):
        quick.answer(PROFILE, task, SPEC, None, 100.0)


def test_nobody_waits_longer_than_the_run_gives(site: GroupSite, run: Run, task: SiteTask) -> None:
    run.says = None
    with pytest.raises(RunError, match="did not answer in the time"):
        site.answer(PROFILE, task, SPEC, None, 0.5)
    assert run.mailbox.asked() is None


def test_a_stop_ends_the_wait(site: GroupSite, run: Run, task: SiteTask) -> None:
    run.says = None
    threading.Timer(0.5, lambda: site.stop.order(["two"])).start()
    began = time.monotonic()
    with pytest.raises(StoppedError, match="the operator has stopped this run"):
        site.answer(PROFILE, task, SPEC, None, 60.0)
    assert time.monotonic() - began < 20
    assert run.mailbox.asked() is None


def test_the_site_has_a_policy_of_its_own(
    site: GroupSite, run: Run, home: SiteHome, task: SiteTask
) -> None:
    home.policy_file.write_text('allowed_runs = ["other"]\n', encoding="utf-8")
    with pytest.raises(PolicyError, match="run two is not one of allowed_runs"):
        site.answer(PROFILE, task, SPEC, None, 60.0)
    assert run.asked == []
    assert site.board.now().refusals == 1


def test_a_coordinator_that_is_not_there_is_named(home: SiteHome) -> None:
    text = home.settings_file.read_text("utf-8").replace("../below", "../nowhere")
    home.settings_file.write_text(text, encoding="utf-8")
    with pytest.raises(DeploymentError, match=r"group\.coordinator: expected a coordinator's home"):
        GroupSite(home, home.settings())


def test_its_app_begins_and_ends(home: SiteHome) -> None:
    client_app(home.path)
    loaded = executor.load(executor.GROUP_APP, home.path)
    loaded.interrupt("the test ends")
    loaded.close()
    assert not [t for t in threading.enumerate() if t.name == "presence" and t.is_alive()]
    close(home.path)  # again: nothing to end
