"""From an invitation to a site that is in, over TLS, and all that goes wrong."""

from __future__ import annotations

import contextlib
import datetime
import json
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import uvicorn
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from fedtune.cli.main import main
from fedtune.deploy.certificates import (
    KeyPair,
    make_authority,
    make_server_certificate,
    public_pem,
)
from fedtune.deploy.coordinator_home import make_coordinator
from fedtune.deploy.homes import CoordinatorHome, SiteHome
from fedtune.deploy.join_code import JoinCode
from fedtune.deploy.policy_file import PolicySettings, read_policy
from fedtune.errors import AccessError, DataError, DeploymentError, ModelError
from fedtune_client.joining import Joining, join
from fedtune_server.enrolment import reconcile, routes
from fedtune_server.registry import Registry


@dataclass
class Flower:
    """What the link's control does for enrolment."""

    nodes: dict[bytes, int] = field(default_factory=dict)
    fails: bool = False

    def register(self, key: bytes) -> int:
        if self.fails:
            raise ConnectionError("link is not there")
        return self.nodes.setdefault(key, 2**63 + len(self.nodes))

    def unregister(self, node_id: int) -> None:
        self.nodes = {key: node for key, node in self.nodes.items() if node != node_id}


@dataclass
class Coordinator:
    home: CoordinatorHome
    server: str
    flower: Flower
    registry: Registry

    def invite(self, name: str = "north", *, again: bool = False) -> str:
        return str(self.registry.invite(name, again=again))


@contextlib.contextmanager
def serving(
    app: Starlette,
    certificate: Path | None = None,
    key: Path | None = None,
    host: str = "127.0.0.1",
) -> Iterator[int]:
    """A server on a free port of loopback; yields the port."""
    listener = socket.socket()
    listener.bind((host, 0))
    config = uvicorn.Config(
        app, ssl_certfile=certificate, ssl_keyfile=key, log_level="error", lifespan="off",
        ws="none", timeout_graceful_shutdown=2,
    )  # fmt: skip
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    deadline = time.monotonic() + 20
    while not server.started and time.monotonic() < deadline:
        time.sleep(0.01)
    assert server.started
    try:
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(10)
        listener.close()


@pytest.fixture
def coordinator(tmp_path: Path) -> Iterator[Coordinator]:
    home = make_coordinator(tmp_path / "coordinator", "localhost").home
    flower = Flower()
    app = Starlette(routes=routes(home, flower.register))
    with serving(app, home.certificate, home.key) as port:
        yield Coordinator(home, f"localhost:{port}", flower, Registry(home.registry))


def test_a_site_joins_and_both_sides_know_each_other(
    coordinator: Coordinator, tmp_path: Path
) -> None:
    rows, base = tmp_path / "rows.jsonl", tmp_path / "base"
    rows.write_text("{}\n")
    base.mkdir()
    joined = join(Joining(coordinator.invite(), coordinator.server, tmp_path / "s", rows, [base]))
    settings = joined.home.settings()
    assert (joined.name, settings.site.name) == ("north", "north")
    assert settings.site.server == coordinator.server
    assert settings.site.service == "localhost:9401"
    assert settings.data.train == str(rows)
    assert settings.base.folders == (str(base),)
    assert read_policy(joined.home.policy_file) == PolicySettings()
    token = joined.home.token.read_text()
    site = coordinator.registry.by_token(token)
    assert site is not None
    assert site.name == "north"
    public = joined.home.node_public_key.read_bytes()
    private = load_ssh_private_key(joined.home.node_key.read_bytes(), None)
    assert public_pem(private.public_key()) == public  # type: ignore[arg-type]
    assert coordinator.registry.by_public_key(public) == site
    # Flower compares keys byte by byte.
    assert coordinator.flower.nodes == {public: site.node_id}
    assert joined.home.ca_certificate.read_bytes() == coordinator.home.ca_certificate.read_bytes()
    if sys.platform != "win32":
        for path in (joined.home.node_key, joined.home.token, joined.home.settings_file):
            assert path.stat().st_mode & 0o777 == 0o600
        assert joined.home.path.stat().st_mode & 0o777 == 0o700
    left = [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert left == []


def test_a_code_is_good_for_one_key(coordinator: Coordinator, tmp_path: Path) -> None:
    code = coordinator.invite()
    join(Joining(code, coordinator.server, tmp_path / "a"))
    with pytest.raises(AccessError, match=r"the coordinator refuses: .* used already"):
        join(Joining(code, coordinator.server, tmp_path / "b"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "coordinator"]
    with pytest.raises(DeploymentError, match=r"holds .*nothing is overwritten; give --again"):
        join(Joining(coordinator.invite("south"), coordinator.server, tmp_path / "a"))


def test_a_lost_answer_is_asked_for_again_with_the_same_key(
    coordinator: Coordinator, tmp_path: Path
) -> None:
    code = coordinator.invite()
    coordinator.flower.fails = True  # after the registry has let the site in
    asked = Joining(code, coordinator.server, tmp_path / "a")
    with pytest.raises(DeploymentError, match=r"answered 503: .* give the same command again"):
        join(asked)
    assert not (tmp_path / "a").exists()
    coordinator.flower.fails = False
    joined = join(asked)
    site = coordinator.registry.site("north")
    assert coordinator.flower.nodes == {joined.home.node_public_key.read_bytes(): site.node_id}


def test_a_coordinator_that_died_in_a_join_is_set_right_when_it_starts(
    coordinator: Coordinator, tmp_path: Path
) -> None:
    coordinator.flower.fails = True
    with pytest.raises(DeploymentError):
        join(Joining(coordinator.invite(), coordinator.server, tmp_path / "a"))
    flower = coordinator.flower
    flower.fails = False
    reconcile(coordinator.registry, flower.register, flower.unregister)
    site = coordinator.registry.site("north")
    assert list(flower.nodes.values()) == [site.node_id]
    coordinator.registry.revoke("north")
    reconcile(coordinator.registry, flower.register, flower.unregister)
    assert flower.nodes == {}
    assert coordinator.registry.retired_nodes() == ()


def test_a_site_joins_anew_and_keeps_what_is_its_own(
    coordinator: Coordinator, tmp_path: Path
) -> None:
    first = join(Joining(coordinator.invite(), coordinator.server, tmp_path / "a")).home
    (first.state / "kept").write_text("optimiser")
    old_key, old_token = first.node_key.read_bytes(), first.token.read_text()
    code = coordinator.invite(again=True)
    join(Joining(code, coordinator.server, tmp_path / "a", again=True))
    assert first.node_key.read_bytes() != old_key
    assert (first.state / "kept").read_text() == "optimiser"
    assert coordinator.registry.by_token(old_token) is None
    assert coordinator.registry.by_token(first.token.read_text()) is not None
    assert not (tmp_path / ".a.joining").exists()
    wrong = coordinator.invite("south")
    with pytest.raises(AccessError, match="is the home of north, and the join code is for south"):
        join(Joining(wrong, coordinator.server, tmp_path / "a", again=True))
    with pytest.raises(DeploymentError, match=r"client.toml cannot be read"):
        join(Joining(wrong, coordinator.server, tmp_path / "none", again=True))


def test_another_authority_than_the_codes_is_not_believed(
    coordinator: Coordinator, tmp_path: Path
) -> None:
    """An impostor passes the coordinator's authority, or its own; it learns no secret."""
    impostor = make_authority("localhost")
    pair = make_server_certificate(impostor, "localhost")
    certificate, key = tmp_path / "x.crt", tmp_path / "x.key"
    certificate.write_bytes(pair.certificate)
    key.write_bytes(pair.key)
    seen: list[bytes] = []
    shown = [impostor.certificate]

    async def authority(_: Request) -> Response:
        return PlainTextResponse(shown[0])

    async def trap(request: Request) -> Response:
        seen.append(await request.body())
        return Response(status_code=500)

    app = Starlette(
        routes=[
            Route("/fedtune/v1/ca", authority),
            Route("/fedtune/v1/join", trap, methods=["POST"]),
        ]
    )
    code = coordinator.invite()
    with serving(app, certificate, key) as port:
        with pytest.raises(AccessError, match=r"another certificate authority .* stand between"):
            join(Joining(code, f"localhost:{port}", tmp_path / "a"))
        shown[0] = coordinator.home.ca_certificate.read_bytes()
        with pytest.raises(DeploymentError, match="its own authority does not vouch for"):
            join(Joining(code, f"localhost:{port}", tmp_path / "a"))
    assert seen == []


def test_a_certificate_that_does_not_fit_is_named(coordinator: Coordinator, tmp_path: Path) -> None:
    home = coordinator.home
    authority = KeyPair(home.ca_key.read_bytes(), home.ca_certificate.read_bytes())
    app = Starlette(routes=routes(home, coordinator.flower.register))
    past = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=900)
    ended = make_server_certificate(authority, "localhost", past)
    (tmp_path / "c").write_bytes(ended.certificate)
    (tmp_path / "k").write_bytes(ended.key)
    refused = pytest.raises(DeploymentError, match="whether the certificate has ended")
    with serving(app, tmp_path / "c", tmp_path / "k") as port, refused:
        join(Joining(coordinator.invite(), f"localhost:{port}", tmp_path / "a"))
    if sys.platform != "linux":
        return  # only Linux has a second loopback address without setting it up
    refused = pytest.raises(DeploymentError, match=r"is not made for 127\.0\.0\.2")
    with serving(app, home.certificate, home.key, host="127.0.0.2") as port, refused:
        join(Joining(coordinator.invite(), f"127.0.0.2:{port}", tmp_path / "a"))


def test_what_cannot_be_reached_is_said_in_a_line(coordinator: Coordinator, tmp_path: Path) -> None:
    code = coordinator.invite()

    def refusal(server: str, **options: bool) -> str:
        with pytest.raises(DeploymentError) as error:
            join(Joining(code, server, tmp_path / "a", **options))  # type: ignore[arg-type]
        assert "\n" not in str(error.value)
        return str(error.value)

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        closed = free.getsockname()[1]
    assert "cannot be reached" in refusal(f"localhost:{closed}")
    assert "check that the coordinator runs" in refusal(f"localhost:{closed}")
    assert "expected HOST:PORT" in refusal("localhost")
    assert "is not known" in refusal("nowhere.invalid:9400")
    assert "with or without --insecure" in refusal(coordinator.server, insecure=True)
    plain = Starlette(routes=routes(coordinator.home, coordinator.flower.register))
    with serving(plain) as port:
        assert "does not speak TLS" in refusal(f"localhost:{port}")
        joined = join(Joining(code, f"localhost:{port}", tmp_path / "b", insecure=True))
    assert joined.name == "north"
    with serving(Starlette(), coordinator.home.certificate, coordinator.home.key) as port:
        assert "is no coordinator of fedtune (404" in refusal(f"localhost:{port}")


def test_wrong_files_are_refused_before_anything_is_sent(tmp_path: Path) -> None:
    code = str(JoinCode(bytes(10), bytes(15)))
    with pytest.raises(DataError, match=r"expected a JSONL file at .*correct --data"):
        join(Joining(code, "localhost:1", tmp_path / "a", data=tmp_path / "none.jsonl"))
    with pytest.raises(ModelError, match="expected a base model's folder at"):
        join(Joining(code, "localhost:1", tmp_path / "a", bases=[tmp_path / "none"]))
    with pytest.raises(AccessError, match="group 3 of the join code"):
        join(Joining(code[:17] + "7" + code[18:], "localhost:1", tmp_path / "a"))
    assert list(tmp_path.iterdir()) == []


def test_a_hostile_coordinator_fills_no_memory(coordinator: Coordinator, tmp_path: Path) -> None:
    async def endless(_: Request) -> Response:
        return Response(b"x" * 1_000_000)

    app = Starlette(routes=[Route("/fedtune/v1/ca", endless)])
    home = coordinator.home
    refused = pytest.raises(DeploymentError, match="answered more than 65536 bytes")
    with serving(app, home.certificate, home.key) as port, refused:
        join(Joining(coordinator.invite(), f"localhost:{port}", tmp_path / "a"))


def test_the_commands_do_it_end_to_end(
    coordinator: Coordinator, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    home = str(coordinator.home.path)
    assert main(["server", "invite", "east", "--dir", home, "--json"]) == 0
    code = json.loads(capsys.readouterr().out)["code"]
    site = tmp_path / "site"
    command = ["client", "join", code, "--server", coordinator.server, "--dir", str(site)]
    assert main([*command, "--systemd", "--compose"]) == 0
    out = capsys.readouterr()
    assert "joined as east" in out.out
    assert "set data.train" in out.out
    assert out.err == ""
    assert (site / "service" / "fedtune-client.service").is_file()
    assert main(["server", "revoke", "east", "--dir", home]) == 0
    capsys.readouterr()
    assert main(["server", "sites", "--dir", home]) == 0
    assert "revoked" in capsys.readouterr().out
    assert main(command) == 2
    assert "nothing is overwritten" in capsys.readouterr().err
    assert coordinator.registry.by_token(SiteHome(site).token.read_text()) is None


def test_the_plain_way_is_warned_of_each_time(
    coordinator: Coordinator, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = Starlette(routes=routes(coordinator.home, coordinator.flower.register))
    with serving(plain) as port:
        arguments = ["client", "join", coordinator.invite(), "--server", f"localhost:{port}"]
        assert main([*arguments, "--dir", str(tmp_path / "a"), "--insecure"]) == 0
    assert "warning: --insecure: the join code and the site's token" in capsys.readouterr().err
