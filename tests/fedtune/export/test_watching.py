"""Following a run by its folder: from before its first line to its end, whatever that is."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from fedtune.export.watching import RunWatch
from fedtune.records import Event
from fedtune_server.ledger import Ledger

STARTED = Event("run_started", {"run": "a"})
PLANNED = Event("planned", {"makespan_seconds": 2.0})
ENDED = (Event("run_finished", {"seconds": 1.0}), Event("exported", {"paths": {}}))


class Scene:
    """A folder to which something happens at every poll; time passes only between them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / "ledger.jsonl"
        self.happens: Iterator[Callable[[], object]] = iter(())
        self.at_work: bool | None = True
        self.seconds = 0.0
        self.began = datetime.now(UTC)

    def tell(self, *events: Event) -> None:
        with Ledger(self.path) as ledger:
            for event in events:
                ledger(event)

    def watch(self, *happens: Callable[[], object]) -> RunWatch:
        self.happens = iter(happens)
        return RunWatch(
            self.folder,
            now=lambda: self.began + timedelta(seconds=self.seconds),
            sleep=self._sleep,
            at_work=lambda folder: self.at_work,
        )

    def _sleep(self, seconds: float) -> None:
        self.seconds += seconds
        try:
            next(self.happens)()
        except StopIteration:
            if self.seconds > 3600:
                pytest.fail("the watch did not end")


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path / "run")


def kinds(watch: RunWatch) -> list[str]:
    return [
        str(event.fields["alarm"]) if event.kind == "alarm" else event.kind
        for event in watch.events()
    ]


def test_a_run_is_followed_from_before_its_folder_to_its_end(scene: Scene) -> None:
    watch = scene.watch(
        lambda: None,
        scene.folder.mkdir,
        lambda: scene.tell(STARTED),
        lambda: None,
        lambda: scene.tell(PLANNED),
        lambda: scene.tell(*ENDED),
    )
    assert kinds(watch) == ["run_started", "planned", "run_finished", "exported"]
    assert watch.state == "finished"


def test_events_are_what_the_coordinator_told(scene: Scene) -> None:
    scene.folder.mkdir()
    scene.tell(STARTED, *ENDED)
    assert list(scene.watch().events()) == [STARTED, *ENDED]


@pytest.mark.parametrize("kind", ["run_interrupted", "run_failed"])
def test_a_run_that_ends_otherwise_ends_the_watch(scene: Scene, kind: str) -> None:
    scene.folder.mkdir()
    scene.tell(STARTED, Event(kind, {"reason": "x"}))

    def let_go() -> None:
        scene.at_work = False

    watch = scene.watch(lambda: None, let_go)
    assert kinds(watch) == ["run_started", kind]
    assert watch.state == kind.removeprefix("run_")
    assert scene.seconds == 1.0, "as long as a coordinator has the folder, more may come"


def test_a_continued_run_is_followed_on(scene: Scene) -> None:
    scene.folder.mkdir()
    scene.tell(STARTED, Event("run_interrupted", {"round": 1}))
    resumed = Event("run_resumed", {"round": 1})
    watch = scene.watch(lambda: scene.tell(resumed), lambda: scene.tell(*ENDED))
    expected = ["run_started", "run_interrupted", "run_resumed", "run_finished", "exported"]
    assert kinds(watch) == expected


def test_a_killed_coordinator_is_noticed_after_seconds(scene: Scene) -> None:
    scene.folder.mkdir()
    scene.tell(STARTED, PLANNED)
    scene.at_work = False
    watch = scene.watch()
    assert kinds(watch) == ["run_started", "planned", "gone"]
    assert watch.state == "stopped"
    assert scene.seconds == pytest.approx(5.0, abs=1.0)


@pytest.mark.parametrize("at_work", [True, None])
def test_silence_is_an_alarm_and_the_watch_goes_on(scene: Scene, at_work: bool | None) -> None:
    scene.folder.mkdir()
    scene.tell(STARTED, PLANNED)
    scene.at_work = at_work
    quiet = [lambda: None] * 300
    watch = scene.watch(*quiet, lambda: scene.tell(*ENDED))
    assert kinds(watch) == ["run_started", "planned", "silence", "run_finished", "exported"]


def test_the_deadline_is_that_of_the_run_even_if_its_settings_come_later(scene: Scene) -> None:
    def begin() -> None:
        scene.folder.mkdir()
        settings = {"run": {"round_deadline_s": 10}}
        (scene.folder / "config.json").write_text(json.dumps(settings), encoding="utf-8")
        scene.tell(STARTED)

    quiet = [lambda: None] * 30
    watch = scene.watch(begin, *quiet, lambda: scene.tell(*ENDED))
    assert kinds(watch) == ["run_started", "silence", "run_finished", "exported"]


def test_a_replaced_run_is_followed_from_its_first_event(scene: Scene) -> None:
    scene.folder.mkdir()
    scene.tell(STARTED, PLANNED)

    def replace() -> None:
        scene.path.unlink()
        scene.tell(Event("run_started", {"run": "b"}))

    watch = scene.watch(replace, lambda: scene.tell(*ENDED))
    told = list(watch.events())
    assert [event.fields.get("run", event.kind) for event in told] == [
        "a", "planned", "alarm", "b", "run_finished", "exported",
    ]  # fmt: skip
    assert told[2].fields["alarm"] == "replaced"


def test_half_a_line_is_told_when_it_is_whole(scene: Scene) -> None:
    scene.folder.mkdir()
    scene.tell(STARTED, *ENDED)
    whole = scene.path.read_bytes()
    scene.path.write_bytes(whole[:-9])
    watch = scene.watch(lambda: scene.path.write_bytes(whole))
    assert kinds(watch) == ["run_started", "run_finished", "exported"]


def test_alarms_stand_behind_the_events_that_gave_them(scene: Scene) -> None:
    scene.folder.mkdir()
    finished = Event("round_finished", {"round": 1, "dropped_energy": 0.5})
    scene.tell(STARTED, finished, *ENDED)
    assert kinds(scene.watch())[1:3] == ["round_finished", "rank-cap"]
