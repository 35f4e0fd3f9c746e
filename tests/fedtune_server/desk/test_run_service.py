"""RunService on loopback: what operators ask, and what they are told."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from fedtune.deploy.channel import open_channel
from fedtune.v1 import coordinator_pb2 as pb
from fedtune.v1.coordinator_pb2_grpc import RunServiceStub
from fedtune_server.deployed_config import deployed_config
from tests.fedtune_server.desk.office import (
    Office,
    config,
    opened_office,
    until,
    write_ledger,
    write_status,
)


@pytest.fixture
def office(tmp_path: Path) -> Iterator[Office]:
    with opened_office(tmp_path / "home") as found:
        yield found


@pytest.fixture
def runs(office: Office) -> Iterator[Any]:
    with office.channel() as channel:
        yield RunServiceStub(channel)


def start(runs: Any, name: str = "demo", overwrite: bool = False, **sections: Any) -> pb.RunInfo:
    text = config(name, **sections).model_dump_json()
    return runs.StartRun(pb.StartRunRequest(config_json=text, overwrite=overwrite), timeout=10)


def test_a_started_run_is_played_and_listed(office: Office, runs: Any) -> None:
    assert start(runs).state in ("queued", "running")
    until(lambda: office.flower.started == ["demo"])
    until(lambda: runs.GetRun(pb.RunName(name="demo"), timeout=5).state == "running")
    (only,) = runs.ListRuns(pb.ListRunsRequest(), timeout=5).runs
    assert (only.name, only.rounds, list(only.devices)) == ("demo", 3, ["north", "south"])
    assert json.loads((office.parts.home.queue / "demo.json").read_text())["wanted"] == "running"


def test_the_run_folder_is_the_coordinators(office: Office, runs: Any) -> None:
    start(runs, outputs={"folder": "/etc"})
    kept = json.loads((office.parts.home.queue / "demo.json").read_text())
    assert json.loads(kept["config_json"])["outputs"]["folder"] == str(office.folder("demo"))


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"deployment": {"sites": ["nort"]}}, "nort is not known at this coordinator; it has"),
        ({"plan": {"file": "/no/plan.json"}}, "plan.file = /no/plan.json: expected a whole path"),
        ({"model": {"path": "/no/base"}}, "model.path = /no/base: expected a folder on the coord"),
        ({"data": {"test": "here.jsonl"}}, "data.test = here.jsonl: expected a whole path"),
    ],
)
def test_what_could_only_fail_later_is_refused(
    office: Office, runs: Any, sections: dict[str, Any], words: str
) -> None:
    with pytest.raises(grpc.RpcError, match=words):
        start(runs, **sections)
    assert office.parts.desk.runs() == []


def test_a_run_that_goes_on_is_not_started_again(office: Office, runs: Any) -> None:
    start(runs)
    with pytest.raises(grpc.RpcError, match=r"run demo is (queued|running) already"):
        start(runs, overwrite=True)


def test_another_run_in_the_folder_is_kept_unless_overwritten(office: Office, runs: Any) -> None:
    start(runs)
    until(lambda: office.flower.started)
    folder = office.folder("demo")
    folder.mkdir(parents=True)
    # As the run's process writes it.
    written = deployed_config(config("demo"), folder).model_dump_json()
    (folder / "config.json").write_text(written)
    write_status(folder, "finished", 3)
    office.flower.end(100, "completed")
    until(lambda: runs.GetRun(pb.RunName(name="demo"), timeout=5).state == "finished")
    with pytest.raises(grpc.RpcError, match=r"with lora.rank_max .* or pass --overwrite"):
        start(runs, lora={"rank_max": 4})
    with pytest.raises(grpc.RpcError, match="finished at round 3; raise run"):
        start(runs)
    assert start(runs, run={"rounds": 5}).rounds == 5
    until(lambda: len(office.flower.started) == 2)
    office.flower.end(101, "completed")
    write_status(folder, "finished", 5)
    until(lambda: runs.GetRun(pb.RunName(name="demo"), timeout=5).state == "finished")
    start(runs, overwrite=True, lora={"rank_max": 4})
    assert not (folder / "config.json").exists()


def test_watching_gives_every_line_once_until_the_end(office: Office, runs: Any) -> None:
    start(runs)
    until(lambda: office.flower.started)
    folder = office.folder("demo")
    write_ledger(folder, *({"kind": "note", "n": n} for n in range(3)))
    seen: list[tuple[int, int]] = []

    def watch() -> None:
        for event in runs.WatchRun(pb.WatchRunRequest(name="demo", after=1), timeout=30):
            seen.append((event.line, json.loads(event.json)["n"]))

    thread = threading.Thread(target=watch)
    thread.start()
    until(lambda: seen == [(2, 1), (3, 2)])
    write_ledger(folder, {"kind": "note", "n": 3})
    until(lambda: seen[-1] == (4, 3))
    write_ledger(folder, {"kind": "note", "n": 4})
    write_status(folder, "finished", 3)
    office.flower.end(100, "completed")
    thread.join(10)
    assert not thread.is_alive()
    assert seen == [(n + 1, n) for n in range(1, 5)]


def test_watching_begins_anew_with_a_ledger_that_replaced_the_one_before(
    office: Office, runs: Any
) -> None:
    start(runs)
    until(lambda: office.flower.started)
    folder = office.folder("demo")
    write_ledger(folder, {"n": 0}, {"n": 1}, {"n": 2})
    stream = runs.WatchRun(pb.WatchRunRequest(name="demo", after=2), timeout=30)
    assert next(stream).line == 3
    (folder / "ledger.jsonl").unlink()
    write_ledger(folder, {"other": 7})
    found = next(stream)
    assert (found.line, json.loads(found.json)) == (1, {"other": 7})
    stream.cancel()


def test_stopping_and_resuming(office: Office, runs: Any) -> None:
    start(runs)
    until(lambda: office.flower.started)
    assert runs.StopRun(pb.RunName(name="demo"), timeout=5).state in ("stopping", "stopped")
    until(lambda: runs.GetRun(pb.RunName(name="demo"), timeout=5).state == "stopped")
    assert office.flower.known[100].sub_status == "stopped"
    with pytest.raises(grpc.RpcError, match="there is nothing to stop"):
        runs.StopRun(pb.RunName(name="demo"), timeout=5)
    runs.ResumeRun(pb.RunName(name="demo"), timeout=5)
    until(lambda: office.flower.started == ["demo", "demo"])


def test_nobody_calls_without_a_token(office: Office) -> None:
    for token, words in (
        ("", "expected `authorization: Bearer TOKEN`"),
        ("guess", "neither the operator's nor an enrolled"),
        ("token-of-north", "a site's token gives no right to call"),
    ):
        channel = open_channel(office.address, b"", token, insecure=True)
        with pytest.raises(grpc.RpcError, match=words) as caught:
            RunServiceStub(channel).ListRuns(pb.ListRunsRequest(), timeout=5)
        assert caught.value.code() == grpc.StatusCode.PERMISSION_DENIED
        channel.close()
    assert len(office.parts.desk.refusals()) == 3


def test_guessing_is_slowed_down(office: Office) -> None:
    with office.channel("guess") as channel:
        codes = []
        for _ in range(30):
            with pytest.raises(grpc.RpcError) as caught:
                RunServiceStub(channel).ListRuns(pb.ListRunsRequest(), timeout=5)
            codes.append(caught.value.code())
    assert codes[-1] == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert office.parts.desk.runs() == []  # and the operator is answered all the same
    with office.channel() as channel:
        RunServiceStub(channel).ListRuns(pb.ListRunsRequest(), timeout=5)


def test_a_site_sees_its_own_runs_alone(office: Office, runs: Any) -> None:
    start(runs)
    office.registry.add("east")
    with office.channel("token-of-north") as channel:
        assert RunServiceStub(channel).GetRun(pb.RunName(name="demo"), timeout=5).name == "demo"
    with office.channel("token-of-east") as channel, pytest.raises(grpc.RpcError) as caught:
        RunServiceStub(channel).GetRun(pb.RunName(name="demo"), timeout=5)
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND


def test_messages_have_a_bound(runs: Any) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        runs.StartRun(pb.StartRunRequest(config_json="x" * 3_000_000), timeout=10)
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    with pytest.raises(grpc.RpcError, match="may have 1000000 bytes"):
        runs.StartRun(pb.StartRunRequest(config_json="x" * 1_500_000), timeout=10)


def test_names_are_not_paths(runs: Any) -> None:
    for name in ("../demo", "a/b", "", "x" * 5000, ".."):
        with pytest.raises(grpc.RpcError) as caught:
            runs.GetRun(pb.RunName(name=name), timeout=5)
        assert caught.value.code() == grpc.StatusCode.NOT_FOUND
