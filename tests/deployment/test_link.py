"""Real processes: a link, a runner, nodes and executors, over TLS on loopback."""

from __future__ import annotations

import hashlib
import io
import json
import re
import ssl
import time
import zipfile
from base64 import b64encode
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import httpx
import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from fedtune.deploy.exit_codes import EXIT_CONFIG
from fedtune.errors import AccessError
from fedtune.flwr_compat import (
    PUBLIC_KEY_HEADER,
    SIGNATURE_HEADER,
    TIMESTAMP_HEADER,
    Control,
    run_fab,
)
from tests.deployment.homes import OPERATOR_TOKEN, load_key, make_site, public_pem, set_site
from tests.deployment.running import TASK, Deployment, answers, wait_for

pytestmark = pytest.mark.deployment


AUDIT = """
import os, sys
def hook(event, arguments):
    if event == "socket.getaddrinfo":
        host = arguments[0]
    elif event == "socket.connect":
        host = arguments[1][0] if isinstance(arguments[1], tuple) else None
    else:
        return
    if host is None:
        return
    host = host.decode() if isinstance(host, bytes) else str(host)
    with open(os.environ["TEST_HOSTS"], "a") as file:
        file.write(host + "\\n")
sys.addaudithook(hook)
"""


@pytest.fixture(scope="module")
def two_sites(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """A whole deployment, whose processes write down each host that they look up or connect to."""
    folder = tmp_path_factory.mktemp("two-sites")
    (folder / "audit").mkdir()
    (folder / "audit" / "sitecustomize.py").write_text(AUDIT, encoding="utf-8")
    deployment = Deployment(folder, sites=2)
    deployment.environment = {
        "PYTHONPATH": str(folder / "audit"),
        "TEST_HOSTS": str(folder / "hosts"),
        "FLWR_TELEMETRY_ENABLED": "1",
        "FLWR_DISABLE_UPDATE_CHECK": "0",
    }
    deployment.start_all()
    yield deployment
    deployment.close()


def test_messages_go_round_and_the_executor_stays_the_same_process(two_sites: Deployment) -> None:
    two_sites.plan(rounds=2, bytes=1_000_000)
    answers = two_sites.result(two_sites.begin(), 90)
    first = sorted(text for turn, text in answers.items() if turn.startswith("0-"))
    second = sorted(text for turn, text in answers.items() if turn.startswith("1-"))
    assert [text.split()[0] for text in first] == ["site-0", "site-1"]
    assert first == second
    assert all(text.endswith(" 1000000") for text in first)


def test_a_device_says_why_it_refuses_and_a_run_that_is_not_ours_is_refused(
    two_sites: Deployment,
) -> None:
    two_sites.plan(body="refuse")
    answers = two_sites.result(two_sites.begin(), 90)
    assert "this site rests at night" in answers["0-error"]
    two_sites.plan(body="raise")
    answers = two_sites.result(two_sites.begin(), 90)
    assert "ValueError" in answers["0-error"]
    assert "boo" in answers["0-error"]
    two_sites.plan()
    answers = two_sites.result(two_sites.begin({"other": "run"}), 90)
    assert "expected a run of fedtune" in answers["0-error"]


def test_no_host_but_the_coordinator_is_asked_for(two_sites: Deployment) -> None:
    two_sites.plan()
    assert "0-error" not in two_sites.result(two_sites.begin(), 90)
    for name in ("node-0", "executor-0", "runner"):
        two_sites.stop(name)  # a process may also report its end
    hosts = set((two_sites.folder / "hosts").read_text("utf-8").split())
    assert "localhost" in hosts
    assert hosts <= {"localhost", "127.0.0.1", "::1"}


@pytest.mark.soak
def test_a_site_whose_executor_dies_is_answered_for_and_works_again(tmp_path: Path) -> None:
    deployment = Deployment(tmp_path, sites=1)
    try:
        deployment.start_all()
        deployment.plan(body="die")
        run = deployment.begin()
        wait_for(lambda: (deployment.sites[0].path / "died").exists(), "the executor dies")
        deployment.processes.pop("executor-0").wait(10)
        died = time.monotonic()
        deployment.start_executor(0)
        assert "stopped responding" in deployment.result(run)["0-error"]
        assert time.monotonic() - died < 30  # Flower needs 60 s
        deployment.plan(body="die")  # the file `died` lets it live
        assert "0-error" not in deployment.result(deployment.begin())
    finally:
        deployment.close()


@pytest.mark.soak
def test_links_nodes_and_faults_come_and_go(tmp_path: Path) -> None:
    """One HTTP 500 on each route, a killed node and a killed link: the run still completes."""
    deployment = Deployment(tmp_path, sites=1)
    try:
        routes = ("fleet/pull-messages", "fleet/push-messages", "fleet/pull-object")
        routes += ("fleet/push-object", "fleet/send-node-heartbeat", "fleet/activate-node")
        routes += ("fleet/confirm-message-received", "runtime/pull-messages", "runtime/get-nodes")
        routes += ("runtime/push-messages", "runtime/push-object", "runtime/acquire-task")
        faults = {f"/v1/{route}": [500, 1] for route in routes}
        (deployment.home.path / "faults.json").write_text(json.dumps(faults), encoding="utf-8")
        deployment.start_all()
        deployment.plan(bytes=6_000_000)
        assert "0-error" not in deployment.result(deployment.begin(), 120)

        deployment.kill("node-0")
        killed = time.monotonic()
        deployment.start_node(0)
        wait_for(lambda: "connects" in deployment.output("link"), "the node connects")
        deployment.plan()
        assert "0-error" not in deployment.result(deployment.begin())
        assert time.monotonic() - killed < 40  # Flower refuses the node for up to 60 s

        deployment.plan(rounds=4)
        run = deployment.begin()
        wait_for(lambda: deployment.control.runs()[run].status == "running", "the run begins")
        deployment.kill("link")
        time.sleep(3)
        deployment.start_link()
        assert "3-error" not in deployment.result(run, 120)
        for name in ("node-0", "executor-0", "runner", "link"):
            assert deployment.stop(name) < 5.0, name
    finally:
        deployment.close()


@pytest.mark.soak
def test_a_run_whose_process_dies_fails_at_once_and_the_next_one_plays(tmp_path: Path) -> None:
    deployment = Deployment(tmp_path, sites=0)
    try:
        deployment.start_link()
        deployment.start_runner()
        deployment.plan(die=True)
        run = deployment.begin()
        ended = deployment.ended(run, 30)
        assert (ended.sub_status, "exit code 9" in ended.details) == ("failed", True)
        deployment.plan()
        assert deployment.result(deployment.begin(), 30) == {}
        deployment.plan(nodes=1)  # which never comes
        run = deployment.begin()
        wait_for(lambda: deployment.control.runs()[run].status == "running", "the run begins")
        deployment.control.stop_run(run)
        assert deployment.ended(run, 10).sub_status == "stopped"
        wait_for(lambda: "not be told" in deployment.output("run"), "the app is told", 40)
    finally:
        deployment.close()


@pytest.mark.soak
def test_a_revoked_site_ends_with_the_coordinators_words(tmp_path: Path) -> None:
    deployment = Deployment(tmp_path, sites=1)
    try:
        deployment.start_link()
        wait_for(lambda: answers(deployment.control), "the link answers")
        deployment.start_node(0)
        wait_for(lambda: "connects" in deployment.output("link"), "the node connects")
        pem = public_pem(load_key(deployment.sites[0]))
        set_site(deployment.home, "site-0", pem, "revoked")
        process = deployment.processes.pop("node-0")
        assert process.wait(30) == EXIT_CONFIG
        assert "the operator has revoked the site site-0" in deployment.output("node-0")
    finally:
        deployment.close()


def test_a_hostile_client_gets_nowhere(tmp_path: Path) -> None:
    limits = "[limits]\nrequests_per_s = 5.0\nburst = 60\nbody_bytes = 6000000\n"
    deployment = Deployment(tmp_path, 1, "behind_proxy = true\n" + limits)
    try:
        deployment.start_all()
        wait_for(lambda: answers(deployment.control), "the link answers")
        ca = str(deployment.home.ca_certificate)
        url = f"https://{deployment.address}"
        for token in ("none", OPERATOR_TOKEN + "x"):
            control = Control(deployment.address, Path(ca).read_bytes(), token)
            with pytest.raises(AccessError, match="operator's token"):
                control.start_run(run_fab({}))
            control.close()
        marker = tmp_path / "code-has-run"
        run = deployment.control.start_run(foreign_bundle(marker))
        deployment.plan()
        assert deployment.result(run, 90)  # the installed apps played, and the device replied
        assert not marker.exists()
        trusted = ssl.create_default_context(cafile=ca)
        with httpx.Client(verify=trusted, base_url=url) as client:
            assert client.post("/v1/runtime/acquire-task").status_code == 401
            for path in ("/docs", "/openapi.json", "/v1/fleet/register-node", "/v1/fleet/"):
                assert client.get(path).status_code in (404, 405), path
            old = signed(load_key(deployment.sites[0]), ago_s=400)
            assert client.post("/v1/fleet/pull-messages", headers=old).status_code == 503
            taken = signed(load_key(deployment.sites[0]), ago_s=0)  # its node is connected
            assert client.post("/v1/fleet/pull-messages", headers=taken).status_code == 403
            other = make_site(tmp_path / "other", "other", deployment.home, 1)
            fresh = signed(load_key(other), ago_s=0)
            assert (
                client.post(
                    "/v1/fleet/pull-messages", headers=fresh, content=bytes(6_000_001)
                ).status_code
                == 413
            )
            statuses = {client.post("/v1/control/list-runs").status_code for _ in range(80)}
            assert statuses == {401, 429}
    finally:
        deployment.close()


def signed(key: ec.EllipticCurvePrivateKey, ago_s: float) -> dict[str, str]:
    stamp = datetime.fromtimestamp(time.time() - ago_s, UTC).isoformat()
    signature = key.sign(stamp.encode(), ec.ECDSA(hashes.SHA256()))
    return {
        PUBLIC_KEY_HEADER: b64encode(public_pem(key).encode()).decode(),
        TIMESTAMP_HEADER: stamp,
        SIGNATURE_HEADER: b64encode(signature).decode(),
    }


def foreign_bundle(marker: Path) -> bytes:
    """A run whose bundle brings code for both sides, which leaves a mark where it is imported."""
    config = {"fedtune-run": "tiny", "fedtune-task": json.dumps(TASK)}
    fab = io.BytesIO(run_fab(config))
    with zipfile.ZipFile(fab) as archive:
        project = archive.read("pyproject.toml").decode()
    project = project.replace("fedtune_server.deployed:app", "evil.app:app")
    project = project.replace("fedtune_client.deployed:app", "evil.app:app")
    code = f"import pathlib\npathlib.Path({str(marker)!r}).touch()\napp = None\n"
    files = {"pyproject.toml": project, "evil/__init__.py": code, "evil/app.py": code}
    content = "\n".join(
        f"{name},{hashlib.sha256(text.encode()).hexdigest()},{8 * len(text.encode())}"
        for name, text in files.items()
    )
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, text in {**files, ".info/CONTENT": content}.items():
            archive.writestr(name, text)
    return out.getvalue()


HOUR_LATE = """
import datetime, time
real_time, real = time.time, datetime.datetime
time.time = lambda: real_time() - 3600.0
class Late(real):
    @classmethod
    def now(cls, tz=None):
        return real.now(tz) - datetime.timedelta(hours=1)
datetime.datetime = Late
"""


@pytest.mark.soak
def test_a_site_whose_clock_is_an_hour_late_takes_part(tmp_path: Path) -> None:
    (tmp_path / "late").mkdir()
    (tmp_path / "late" / "sitecustomize.py").write_text(HOUR_LATE, encoding="utf-8")
    deployment = Deployment(tmp_path, sites=1)
    try:
        deployment.start_link()
        deployment.start_runner()
        wait_for(lambda: answers(deployment.control), "the link answers")
        deployment.environment = {"PYTHONPATH": str(tmp_path / "late")}
        deployment.start_node(0)
        deployment.start_executor(0)
        deployment.plan()
        found = deployment.result(deployment.begin(), 90)
        assert "0-error" not in found
        assert found
        assert re.search(r"\+(3599|3600) s from this machine's", deployment.output("node-0"))
    finally:
        deployment.close()


@pytest.mark.soak
def test_all_of_it_speaks_plaintext_only_where_it_is_told_to(tmp_path: Path) -> None:
    deployment = Deployment(tmp_path, sites=1, insecure=True)
    try:
        deployment.start_all()
        deployment.plan()
        found = deployment.result(deployment.begin(), 90)
        assert found
        assert "0-error" not in found
        for name in ("link", "node-0"):
            assert "--insecure" in deployment.output(name), name
    finally:
        deployment.close()
