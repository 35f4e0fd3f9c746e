"""A real machine as a Flower node: from a run's messages to its answers, in one process."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from flwr.app import Message, RecordDict

from fedtune.config import parse_run_config
from fedtune.deploy.homes import SiteHome
from fedtune.deploy.policy_file import policy_template
from fedtune.deploy.site_task import flower_config, site_task
from fedtune.settings import RunConfig
from fedtune.wire import messages
from fedtune.wire.calibration import (
    CalibrationInstruction,
    decode_calibration_report,
    encode_calibration_instruction,
)
from fedtune.wire.flower import CALIBRATE, EVALUATE, PROFILE, TRAIN, from_record, to_record
from fedtune.wire.packing import pack_tensors, tensors_digest
from fedtune_client import deployed
from fedtune_client.answering import make_answering_app
from fedtune_client.deployed import Device
from fedtune_client.policy import Readings
from fedtune_client.round_states import state_folder
from fedtune_client.shelves import _shelves
from fedtune_server.simulation.grid import InProcessGrid

Desk = Any  # tests/fedtune_client/conftest.py; test folders are not importable packages


class QuietCoordinator:
    """Answers the measurement of the link, and nothing else."""

    def http(self) -> httpx.Client:
        def answer(request: httpx.Request) -> httpx.Response:
            return httpx.Response(200, content=bytes(int(request.url.params.get("bytes", 2))))

        return httpx.Client(base_url="https://c", transport=httpx.MockTransport(answer))

    def channel(self) -> Any:
        raise OSError("no coordinator in this test")

    def fetch(self, digest: str, target: Path, progress: object) -> None:
        raise AssertionError("nothing to fetch in this test")


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all tests here: this machine is measured once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def config(desk: Desk) -> RunConfig:
    tree = desk.config.model_dump()
    tree["run"]["name"] = "first"
    tree["train"]["compute"] = "fp32"
    return parse_run_config(tree, "test")


@pytest.fixture
def home(
    desk: Desk, colour_rows: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> SiteHome:
    """The site `north`, with its own rows."""
    monkeypatch.setenv("FEDTUNE_CACHE", str(cache))
    # A first step of this process has been taken, if not here.
    monkeypatch.setattr("fedtune.train.idle.settle", lambda: None)
    return make_home(tmp_path / "site", desk.folder, colour_rows)


def make_home(path: Path, base: Path, rows: Path) -> SiteHome:
    path.mkdir()
    lines = rows.read_text(encoding="utf-8").splitlines()
    own = [line for line in lines if json.loads(line)["client"] == "north"]
    (path / "rows.jsonl").write_text("\n".join(own), encoding="utf-8")
    (path / "client.toml").write_text(
        "[site]\nname = 'north'\nserver = 'localhost:1'\nservice = 'localhost:2'\n"
        "[data]\ntrain = 'rows.jsonl'\n"
        f"[base]\nfolders = ['{base}']\n"
        "[device]\naccelerator = 'cpu'\ndevice_class = 'any'\n",
        encoding="utf-8",
    )
    (path / "policy.toml").write_text(policy_template(), encoding="utf-8")
    return SiteHome(path)


@pytest.fixture
def device(home: SiteHome) -> Device:
    return Device(home, home.settings(), QuietCoordinator())  # type: ignore[arg-type]


class Asker:
    """Sends one device the messages of a run, as a coordinator does."""

    def __init__(self, grid: InProcessGrid, desk: Desk) -> None:
        self._grid, self.desk = grid, desk

    def ask(self, kind: str, content: RecordDict) -> Message:
        (reply,) = self._grid.send_and_receive([Message(content, 1000, kind, ttl=60.0)])
        return reply

    def profile(self) -> Message:
        return self.ask(PROFILE, to_record(PROFILE, messages.encode_task_spec(self.desk.spec)))

    def train(self, **changes: Any) -> Message:
        plan = self.desk.plan("north", **changes)
        packed = self.desk.tensors(plan)
        body = messages.encode_train_instruction(self.desk.order(plan, packed))
        return self.ask(TRAIN, to_record(TRAIN, body, packed))


@pytest.fixture
def asker(device: Device, desk: Desk, config: RunConfig) -> Iterator[Asker]:
    app = make_answering_app(device.worker)
    with InProcessGrid(app, 1, run_config=flower_config(config)) as grid:
        yield Asker(grid, desk)


def failure(reply: Message) -> str:
    assert reply.has_error()
    return str(reply.error.reason)


# ---------------------------------------------------------------- a run's messages


def test_a_machine_describes_itself_and_its_own_rows(device: Device, asker: Asker) -> None:
    body, _ = from_record(asker.profile().content, PROFILE)
    report = messages.decode_site_report(body)
    simulated = asker.desk.agent(1).describe(asker.desk.spec)
    assert (report.profile.name, report.profile.device_class) == ("north", "any")
    assert report.profile.link_bytes_per_s > 0
    assert report.profile.memory_bytes > 10**7
    assert (report.train_samples, report.held_out_samples, report.train_tokens) == (
        simulated.train_samples,
        simulated.held_out_samples,
        simulated.train_tokens,
    )
    assert report.base_digest == simulated.base_digest
    assert device.board.now().state == "idle"


def test_a_run_has_the_numbers_of_the_simulated_device(asker: Asker) -> None:
    desk, simulated = asker.desk, asker.desk.agent(1)
    plan = desk.plan("north", format="nf4", local_steps=3)
    packed = desk.tensors(plan)
    order = desk.order(plan, packed)
    reply = asker.ask(TRAIN, to_record(TRAIN, messages.encode_train_instruction(order), packed))
    body, tensors = from_record(reply.content, TRAIN)
    report, expected = messages.decode_train_report(body), simulated.train(order, packed)
    assert tensors == expected[1]
    assert report.samples == expected[0].samples
    for name in ("train_loss", "held_out_loss"):
        assert report.metrics[name] == expected[0].metrics[name]
    assert report.metrics["step_seconds"] > 0

    evaluation = desk.evaluation(plan, packed)
    body = messages.encode_evaluate_instruction(evaluation)
    reply = asker.ask(EVALUATE, to_record(EVALUATE, body, packed))
    body, _ = from_record(reply.content, EVALUATE)
    found = messages.decode_evaluate_report(body)
    assert found.metrics == simulated.evaluate(evaluation, packed).metrics


def test_a_calibration_measures_a_step_of_this_machine(asker: Asker) -> None:
    plan = asker.desk.plan("north")
    packed = pack_tensors({}, "fp32")
    base = asker.desk.order(plan, packed)
    order = CalibrationInstruction(
        run="run-1",
        base_digest=base.base_digest,
        plan=plan,
        tensors_digest=tensors_digest(packed),
        seed=1,
        method=None,
        rank=1,
        batches=1,
        measure_step=True,
    )
    body = encode_calibration_instruction(order)
    reply = asker.ask(CALIBRATE, to_record(CALIBRATE, body, packed))
    body, _ = from_record(reply.content, CALIBRATE)
    assert decode_calibration_report(body).step_seconds > 0


def test_the_backbone_stays_for_the_next_message_and_the_next_run(
    device: Device, asker: Asker, config: RunConfig
) -> None:
    from fedtune.model.backbone import BackboneShelf

    built: list[object] = []
    build = BackboneShelf._build
    _shelves.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            BackboneShelf, "_build", lambda *args: (built.append(args[0]), build(*args))[1]
        )
        for _ in range(2):
            assert not asker.train().has_error()
        tree = config.model_dump()
        tree["run"]["name"] = "second"
        other = flower_config(parse_run_config(tree, "test"))
        with InProcessGrid(make_answering_app(device.worker), 1, run_config=other) as grid:
            assert not Asker(grid, asker.desk).train().has_error()
    assert len(built) == 1


def test_a_second_backbone_stays_only_where_memory_carries_both(
    asker: Asker, monkeypatch: pytest.MonkeyPatch
) -> None:
    _shelves.clear()
    for format_name, held in (("fp32", 1), ("nf4", 2)):
        assert not asker.train(format=format_name).has_error()
        (shelf,) = _shelves.values()
        assert len(shelf) == held
    # The plans take 10 MB; beside one, a backbone of tens of kB has no room in 10 MB and a little.
    monkeypatch.setattr("fedtune_client.allowance.Allowance.bytes_now", lambda self: 10**7 + 1000)
    assert not asker.train(format="fp32").has_error()
    assert len(shelf) == 1


# ---------------------------------------------------------------- refusals


def test_without_a_policy_nothing_is_done(device: Device, asker: Asker, home: SiteHome) -> None:
    home.policy_file.unlink()
    assert "policy.toml cannot be read" in failure(asker.profile())
    assert "accepts nothing" in failure(asker.train())
    now = device.board.now()
    assert (now.state, now.refusals) == ("refusing", 2)
    assert "accepts nothing" in device.status().last_refusal


def test_a_policy_is_asked_before_work_and_read_again_when_it_changes(
    asker: Asker, home: SiteHome
) -> None:
    home.policy_file.write_text("max_steps = 2", encoding="utf-8")
    assert "at most 2 steps in a round, the plan has 3" in failure(asker.train(local_steps=3))
    assert not asker.train(local_steps=2).has_error()
    home.policy_file.write_text("allowed_runs = ['clinic-*']", encoding="utf-8")
    assert "run first is not one of allowed_runs (clinic-*)" in failure(asker.profile())


def test_a_policys_memory_lowers_the_reported_budget(asker: Asker, home: SiteHome) -> None:
    home.policy_file.write_text("memory = '5 MB'", encoding="utf-8")
    body, _ = from_record(asker.profile().content, PROFILE)
    assert messages.decode_site_report(body).profile.memory_bytes == 5_000_000
    assert "memory for a plan is 5000000 bytes, this one needs 10000000" in failure(asker.train())


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (None, "data file"),
        ("", "holds no rows"),
        ('{"prompt": "a", "response": "b"}\n{"prompt": "a"}\n', "rows.jsonl:2: missing key"),
    ],
)
def test_data_that_cannot_be_used_is_one_line(
    asker: Asker, home: SiteHome, rows: str | None, words: str
) -> None:
    file = home.path / "rows.jsonl"
    good = file.read_text(encoding="utf-8")
    file.unlink()
    if rows is not None:
        file.write_text(rows, encoding="utf-8")
    assert words in failure(asker.profile())
    # Mended, without a restart.
    file.write_text(good, encoding="utf-8")
    assert not asker.profile().has_error()


def test_a_site_without_torch_says_what_to_install(
    asker: Asker, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = deployed.importlib.util.find_spec
    monkeypatch.setattr(
        deployed.importlib.util, "find_spec", lambda n: None if n == "torch" else find(n)
    )
    assert "pip install 'fedtune[train]'" in failure(asker.profile())


def test_the_module_of_a_site_is_imported_without_torch() -> None:
    code = "import sys, fedtune_client.deployed; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_run_that_is_not_fedtunes_is_refused(device: Device, desk: Desk) -> None:
    with InProcessGrid(make_answering_app(device.worker), 1) as grid:
        assert "expected a run of fedtune" in failure(Asker(grid, desk).profile())


def test_an_unknown_base_is_refused_by_its_digest(asker: Asker, home: SiteHome) -> None:
    text = home.settings_file.read_text(encoding="utf-8")
    start = text.index("[base]")
    home.settings_file.write_text(
        text[:start] + "[base]\ndownload = false\n[device]\naccelerator = 'cpu'\n", "utf-8"
    )
    device = Device(home, home.settings(), QuietCoordinator())  # type: ignore[arg-type]
    digest = asker.desk.spec.base_digest
    with pytest.raises(Exception, match=f"base {digest[:12]} is not on this site"):
        device.agent(_task(), digest, 0.0)


def _task() -> Any:
    from fedtune.deploy.site_task import SiteTask
    from fedtune.settings import DataSection

    return SiteTask(
        name="r",
        seed=0,
        task="causal-lm",
        data=DataSection(),
        compute="fp32",
        cuda_graph="off",
        tune_allocator=False,
    )


# ---------------------------------------------------------------- orders to stop


def watched_steps(device: Device, at: int, then: Callable[[], None]) -> list[int]:
    """Have something happen after a step; returns the steps that are seen."""
    seen: list[int] = []
    change = device.board.change

    def noted(**fields: Any) -> None:
        change(**fields)
        if fields.get("step"):
            seen.append(fields["step"])
            if fields["step"] == at:
                then()

    device.board.change = noted  # type: ignore[method-assign]
    return seen


def test_an_order_to_stop_is_followed_within_a_step(device: Device, asker: Asker) -> None:
    seen = watched_steps(device, 3, lambda: device.stop.order(["first", "other"]))
    reply = asker.train(local_steps=50)
    assert "first: the operator has stopped this run" in failure(reply)
    assert seen == [1, 2, 3]
    assert device.board.now().refusals == 0
    # A run that was resumed is on the coordinator's next list no more.
    device.stop.order(["other"])
    assert not asker.train().has_error()


def test_a_step_of_many_passes_is_left_between_them(device: Device, asker: Asker) -> None:
    passes: list[int] = []
    check = device.stop.check

    def counted(run: str) -> None:
        passes.append(1)
        if len(passes) == 12:
            device.stop.now("its task is gone")
        check(run)

    device.stop.check = counted  # type: ignore[method-assign]
    reply = asker.train(batch_size=64, micro_batch=1, local_steps=1)
    assert "its task is gone" in failure(reply)
    assert len(passes) == 12


def test_an_order_for_another_run_stops_nothing(device: Device, asker: Asker) -> None:
    seen = watched_steps(device, 1, lambda: device.stop.order(["another"]))
    assert not asker.train(local_steps=2).has_error()
    assert seen == [1, 2]


def test_what_stopped_one_piece_of_work_does_not_stop_the_next(
    device: Device, asker: Asker
) -> None:
    device.stop.now("the task before is gone")
    device.stop.begin()
    assert not asker.train().has_error()


def test_a_task_that_is_gone_before_its_work_begins_does_none(device: Device, asker: Asker) -> None:
    device.stop.begin()
    device.stop.now("the coordinator no longer waits for it")
    seen = watched_steps(device, 1, lambda: None)
    assert "no longer waits" in failure(asker.train())
    assert not seen


def test_work_for_a_new_run_clears_what_old_ones_left(asker: Asker, home: SiteHome) -> None:
    old = state_folder(home.state / "runs", "old")
    old.mkdir(parents=True)
    os.utime(old, (0, 0))
    assert not asker.train().has_error()
    assert not old.exists()


def test_a_new_process_goes_on_from_the_kept_state(
    device: Device, asker: Asker, home: SiteHome, config: RunConfig
) -> None:
    """What a round left of the optimiser is on the disk, whole, and a stopped round adds none."""
    desk = asker.desk
    plan = desk.plan("north", local_steps=2)
    packed = desk.tensors(plan)
    keeping = replace(desk.order(plan, packed).optimizer, keep=True)

    def train(asking: Asker, round: int) -> Message:
        order = desk.order(plan, packed, round=round, optimizer=keeping)
        body = messages.encode_train_instruction(order)
        return asking.ask(TRAIN, to_record(TRAIN, body, packed))

    assert not train(asker, 1).has_error()
    states = sorted(path.name for path in home.state.rglob("*.safetensors"))
    assert states == ["round-0001.safetensors"]
    watched_steps(device, 1, lambda: device.stop.order(["first"]))
    assert "stopped" in failure(train(asker, 2))
    assert sorted(path.name for path in home.state.rglob("*.safetensors")) == states
    device.stop.order(())
    del device.board.change  # type: ignore[attr-defined]  # the hook of `watched_steps`
    again = Device(home, home.settings(), QuietCoordinator())  # type: ignore[arg-type]
    with InProcessGrid(
        make_answering_app(again.worker), 1, run_config=flower_config(config)
    ) as grid:
        anew = from_record(train(Asker(grid, desk), 2).content, TRAIN)[1]
    assert anew == from_record(train(asker, 2).content, TRAIN)[1]
    fresh = desk.agent(1).train(desk.order(plan, packed, round=2), packed)[1]
    assert anew != fresh


_TRAINS = """
import os, signal, sys
from pathlib import Path
from fedtune.deploy.homes import SiteHome
from fedtune.deploy.site_task import SiteTask
from fedtune.errors import StoppedError
from fedtune.wire.messages import decode_train_instruction
from fedtune_client import deployed
from fedtune_client.deployed import DeployedWorker, Device
folder = Path(sys.argv[1])
home = SiteHome(folder / "site")
device = Device(home, home.settings(), deployed.Coordinator(home, home.settings()))
deployed._devices[home.path] = device
signal.signal(signal.SIGTERM, lambda *_: deployed.interrupt(home.path, "the process ends"))
device.board.change = lambda **fields: print(fields, flush=True)
task = SiteTask.model_validate_json((folder / "task.json").read_bytes())
order = decode_train_instruction((folder / "order").read_bytes())
try:
    DeployedWorker(device, task, 0).train(order, (folder / "tensors").read_bytes())
except StoppedError as error:
    print("left:", error, flush=True)
    os._exit(0)
os._exit(1)
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGTERM to handle")
def test_a_process_that_is_told_to_end_leaves_its_training_at_once(
    home: SiteHome, desk: Desk, config: RunConfig
) -> None:
    folder = home.path.parent
    plan = desk.plan("north", local_steps=5_000, batch_size=1, micro_batch=1)
    packed = desk.tensors(plan)
    (folder / "tensors").write_bytes(packed)
    (folder / "order").write_bytes(messages.encode_train_instruction(desk.order(plan, packed)))
    (folder / "task.json").write_text(site_task(config).model_dump_json(), encoding="utf-8")
    process = subprocess.Popen(
        [sys.executable, "-c", _TRAINS, str(folder)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if "'step': 3}" in line:
                break
        process.send_signal(signal.SIGTERM)
        rest = process.stdout.read()
        assert process.wait(60) == 0
        # It is left long before its last step; in seconds, it depends on who else computes here.
        assert len(rest.splitlines()) < 4_000
        assert "left: first: stopped: the process ends" in rest
        assert not list(home.state.rglob("*.safetensors"))
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


# ---------------------------------------------------------------- the process around it


def test_an_app_tells_of_itself_and_ends_at_once(
    home: SiteHome, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deployed, "Coordinator", lambda *_: QuietCoordinator())
    app = deployed.client_app(home.path)
    assert app is not None
    try:
        device = deployed._devices[home.path]
        deadline = time.monotonic() + 20
        metrics = home.state / "metrics.prom"
        while not metrics.exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert "fedtune_device_working 0.0" in metrics.read_text(encoding="utf-8")
        # Whoever configures the log replaces the root's handlers.
        monkeypatch.setattr(logging.getLogger(), "handlers", [])
        logging.getLogger("fedtune_client.test").warning("a line of the log")
        assert not device.status().log_lines
        home.policy_file.write_text("share_logs = true", encoding="utf-8")
        lines = [json.loads(line)["message"] for line in device.status().log_lines]
        assert "a line of the log" in lines
        deployed.interrupt(home.path, "reason")
    finally:
        begun = time.monotonic()
        deployed.close(home.path)
    assert time.monotonic() - begun < 3
    names = {thread.name for thread in threading.enumerate()}
    assert not names & {"presence", "metrics"}


def test_a_policys_hours_are_those_of_the_site(
    home: SiteHome, desk: Desk, config: RunConfig
) -> None:
    home.policy_file.write_text("hours = ['22:00-06:00']", encoding="utf-8")
    readings = Readings(lambda: 0, now=lambda: datetime(2026, 11, 27, 12, 0))
    device = Device(home, home.settings(), QuietCoordinator(), readings=readings)  # type: ignore[arg-type]
    with InProcessGrid(
        make_answering_app(device.worker), 1, run_config=flower_config(config)
    ) as grid:
        assert "try again at 2026-11-27 22:00" in failure(Asker(grid, desk).profile())
