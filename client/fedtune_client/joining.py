"""How a site joins a federation: it proves the coordinator by the join code, then itself.

The coordinator's certificate authority is fetched over a connection that nothing vouches for, and
compared with the fingerprint in the code; from then on only that authority is believed. The site's
key is made here and never leaves. Its folder is filled beside its place until the coordinator has
answered, so that a repetition after a lost answer shows the same key.
"""

from __future__ import annotations

import base64
import contextlib
import shutil
import ssl
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedtune.deploy.addresses import join_address, split_address
from fedtune.deploy.certificates import NodeKey, fingerprint, make_node_key, prove
from fedtune.deploy.files import (
    PUBLIC_FILE,
    make_private_folder,
    move_home,
    refuse_filled,
    write_private,
    write_with_mode,
)
from fedtune.deploy.homes import SiteHome, SiteSettings
from fedtune.deploy.join_code import FINGERPRINT_BYTES, JoinCode, parse_join_code
from fedtune.deploy.policy_file import policy_template
from fedtune.deploy.service_files import ServiceKind, site_files, write_service_files
from fedtune.errors import AccessError, DataError, DeploymentError, ModelError
from fedtune.sections.toml_text import file_lines

_CA_PATH = "/fedtune/v1/ca"
_JOIN_PATH = "/fedtune/v1/join"
_MOST_BYTES = 65_536
_TIMEOUT_S = 20.0
_STAGING = ".joining"
_HEAD = (
    "# This site of a federation. Every key stands here; what `fedtune client join` was not told",
    "# has its default. It is read when the site starts.",
    "",
)


class _Answer(BaseModel):
    """What a coordinator says to a site that it lets in."""

    model_config = ConfigDict(extra="ignore", strict=True)

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    token: str = Field(pattern=r"^[A-Za-z0-9_-]{20,200}$", repr=False)
    service_port: int = Field(ge=1, le=65_535)


@dataclass(frozen=True, slots=True)
class Joining:
    """What a site is told on the command line.

    Attributes:
        code: the join code as typed.
        server: HOST:PORT of the coordinator's link.
        folder: where the site's home shall be.
        data: JSONL file of its rows; None: named later, in client.toml.
        bases: folders of base models on this machine.
        again: a home is there, and gets new keys; its settings, state and bases stay.
        insecure: speak without TLS.
        services: which files to write for starting the site at boot.
    """

    code: str = field(repr=False)
    server: str
    folder: Path
    data: Path | None = None
    bases: Sequence[Path] = ()
    again: bool = False
    insecure: bool = False
    services: Sequence[ServiceKind] = ()


@dataclass(frozen=True, slots=True)
class Joined:
    """A site that has joined."""

    name: str
    home: SiteHome
    services: Sequence[str]


def join(asked: Joining) -> Joined:
    """Join a federation.

    Raises:
        AccessError: the code is wrong, or the coordinator is not the one that it names, or refuses.
        DeploymentError: the coordinator cannot be reached, or something is in the folder.
        DataError: the data file is not there.
        ModelError: a base folder is not there.
        RunError: the disk is full or cannot be written.
    """
    code = parse_join_code(asked.code)
    host, port = split_address(asked.server, "--server")
    _check_files(asked)
    home = SiteHome(asked.folder)
    if asked.again:
        home.settings()  # refuses where there is none
    else:
        refuse_filled(home.path, "give --again to join anew with another key, or another --dir")
    staging = home.path.with_name(f".{home.path.name}{_STAGING}")
    key = _staged_key(staging)
    try:
        authority, answer = _enrol(code, join_address(host, port), key, insecure=asked.insecure)
    except AccessError:
        shutil.rmtree(staging, ignore_errors=True)  # this key will not be let in
        raise
    fresh = SiteHome(staging)
    write_with_mode(fresh.ca_certificate, authority, PUBLIC_FILE)
    write_private(fresh.token, answer.token.encode("ascii"))
    services = _settle(asked, home, staging, answer, host, port)
    return Joined(answer.name, home, services)


def join_site(
    code: str,
    server: str,
    folder: Path,
    *,
    data: Path | None,
    bases: Sequence[Path],
    again: bool,
    insecure: bool,
    services: Sequence[ServiceKind],
) -> Joined:
    """`join` for the command line, which knows this package by its entry points alone."""
    return join(Joining(code, server, folder, data, bases, again, insecure, services))


def _check_files(asked: Joining) -> None:
    if asked.data is not None and not asked.data.is_file():
        raise DataError(f"expected a JSONL file at {asked.data}, found none; correct --data")
    for base in asked.bases:
        if not base.is_dir():
            raise ModelError(
                f"expected a base model's folder at {base}, found none; correct --base"
            )


def _staged_key(staging: Path) -> NodeKey:
    """The key of an earlier try whose answer was lost, or a new one."""
    make_private_folder(staging)
    home = SiteHome(staging)
    if home.node_key.is_file() and home.node_public_key.is_file():
        return NodeKey(home.node_key.read_bytes(), home.node_public_key.read_bytes())
    key = make_node_key()
    write_private(home.node_key, key.private)
    write_with_mode(home.node_public_key, key.public, PUBLIC_FILE)
    return key


def _settle(
    asked: Joining, home: SiteHome, staging: Path, answer: _Answer, host: str, port: int
) -> Sequence[str]:
    """Bring what was staged to the site's home; returns the service files, under the home."""
    fresh = SiteHome(staging)
    if asked.again:
        known = home.settings().site.name
        if known != answer.name:
            shutil.rmtree(staging, ignore_errors=True)
            raise AccessError(
                f"{home.path} is the home of {known}, and the join code is for {answer.name}; "
                f"ask for a code: fedtune server invite {known} --again"
            )
        for name in ("node.key", "node.pub", "ca.crt", "token"):
            mode = (staging / name).stat().st_mode & 0o777
            write_with_mode(home.path / name, (staging / name).read_bytes(), mode)
        shutil.rmtree(staging, ignore_errors=True)
        return ()
    values = _values(asked, answer, host, port)
    text = "\n".join((*_HEAD, *file_lines(SiteSettings, values))) + "\n"
    write_private(fresh.settings_file, text.encode("utf-8"))
    write_private(fresh.policy_file, policy_template().encode("utf-8"))
    for inner in (fresh.state, fresh.bases, fresh.logs):
        make_private_folder(inner)
    reads = [path.absolute() for path in (*asked.bases, *([asked.data] if asked.data else []))]
    services = site_files(home.path, fresh.settings().site.health_port, asked.services, reads)
    write_service_files(staging, services)
    move_home(staging, home.path, "it was made meanwhile; give --again to use it")
    return list(services)


def _values(asked: Joining, answer: _Answer, host: str, port: int) -> dict[str, object]:
    values: dict[str, object] = {
        "site.name": answer.name,
        "site.server": join_address(host, port),
        "site.service": join_address(host, answer.service_port),
        "base.folders": tuple(str(base.absolute()) for base in asked.bases),
    }
    if asked.data is not None:
        values["data.train"] = str(asked.data.absolute())
    return values


# ---------------------------------------------------------------- the coordinator


def _enrol(code: JoinCode, server: str, key: NodeKey, *, insecure: bool) -> tuple[bytes, _Answer]:
    """The coordinator's authority (PEM), and its answer."""
    scheme = "http" if insecure else "https"
    with _reaching(server), _client(scheme, server, _trusting_nobody()) as stranger:
        authority = _read(stranger, "GET", _CA_PATH)
    seen = fingerprint(authority)
    if seen[:FINGERPRINT_BYTES] != code.authority:
        raise AccessError(
            f"{server} shows another certificate authority (SHA-256 {seen.hex()[:16]}...) than the "
            "join code names: somebody may stand between; if the coordinator's authority was "
            "changed, ask for a new code, otherwise do not go on"
        )
    # Told to a coordinator that the code vouches for, and in one form, whatever it sent.
    pinned = ssl.create_default_context(cadata=authority.decode("ascii"))
    pinned.minimum_version = ssl.TLSVersion.TLSv1_2
    request = {
        "version": 1,
        "secret": code.secret.hex(),
        "public_key": key.public.decode("ascii"),
        "proof": base64.b64encode(prove(key.private, code.secret, seen)).decode("ascii"),
    }
    with _reaching(server), _client(scheme, server, pinned) as known:
        answer = _read(known, "POST", _JOIN_PATH, request)
    try:
        return authority, _Answer.model_validate_json(answer)
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        key_name = ".".join(str(part) for part in first["loc"])
        raise DeploymentError(
            f"{server} answered what no coordinator of this version does: {key_name}: "
            f"{first['msg']}; use the same version of fedtune on both sides"
        ) from None


def _trusting_nobody() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def _client(scheme: str, server: str, context: ssl.SSLContext) -> httpx.Client:
    # No proxy and no certificates of the environment: the code names the one to speak with.
    return httpx.Client(
        base_url=f"{scheme}://{server}",
        verify=context,
        timeout=_TIMEOUT_S,
        trust_env=False,
        follow_redirects=False,
        # A packed answer could be larger than its bytes say.
        headers={"accept-encoding": "identity"},
    )


def _read(
    client: httpx.Client, method: str, path: str, content: dict[str, object] | None = None
) -> bytes:
    """The body of an answer, of a bounded size.

    Raises:
        AccessError: it is a refusal; the message has the coordinator's reason.
        DeploymentError: it is no answer of a coordinator.
    """
    with client.stream(method, path, json=content) as response:
        body = b""
        for part in response.iter_raw():
            body += part
            if len(body) > _MOST_BYTES:
                raise DeploymentError(
                    f"{client.base_url} answered more than {_MOST_BYTES} bytes, which no "
                    "coordinator does; correct --server"
                )
        status = response.status_code
    if status == httpx.codes.OK:
        return body
    reason = _reason(body)
    if status == httpx.codes.FORBIDDEN:
        raise AccessError(f"the coordinator refuses: {reason}")
    if status == httpx.codes.NOT_FOUND:
        raise DeploymentError(
            f"{client.base_url.host}:{client.base_url.port} is no coordinator of fedtune (404 for "
            f"{path}); correct --server"
        )
    raise DeploymentError(f"the coordinator answered {status}: {reason}")


def _reason(body: bytes) -> str:
    """The reason of a refusal, in one printable line; the bytes are hostile until proven."""
    try:
        text = httpx.Response(200, content=body).json()["reason"]
    except (ValueError, KeyError, TypeError):
        text = body.decode("utf-8", errors="replace")
    line = " ".join(str(text).split())[:400]
    return "".join(character for character in line if character.isprintable()) or "without a reason"


@contextlib.contextmanager
def _reaching(server: str) -> Iterator[None]:
    """Say of a connection that fails what to look at."""
    try:
        yield
    except httpx.ConnectError as error:
        raise DeploymentError(_connection_words(server, error)) from None
    except httpx.TimeoutException:
        raise DeploymentError(
            f"{server} did not answer within {_TIMEOUT_S:g} s; check the address, and that a "
            "firewall lets this machine reach it"
        ) from None
    except httpx.HTTPError as error:
        raise DeploymentError(
            f"{server} does not speak as a coordinator does ({_one_line(error)}); check --server, "
            "and whether it was started with or without --insecure"
        ) from None


def _connection_words(server: str, error: httpx.ConnectError) -> str:
    words = _one_line(error)
    low = words.lower()
    if "hostname mismatch" in low or "ip address mismatch" in low:
        return (
            f"the coordinator's certificate is not made for {server.rpartition(':')[0]}; use the "
            "name that `fedtune server init --host` was given"
        )
    if "certificate verify failed" in low:
        return (
            f"{server} shows a certificate that its own authority does not vouch for ({words}); "
            "check this machine's clock, and whether the certificate has ended: fedtune server "
            "rotate"
        )
    if "wrong version number" in low or "record layer" in low or "unexpected eof" in low:
        return (
            f"{server} does not speak TLS; check the port, and only if the coordinator was "
            "started with --insecure, give --insecure here, too"
        )
    if "name or service" in low or "getaddrinfo" in low or "nodename" in low:
        return f"the host of {server} is not known on this machine's network; check its name"
    return (
        f"{server} cannot be reached ({words}); check that the coordinator runs (fedtune server "
        "start), its port, and firewalls between"
    )


def _one_line(error: Exception) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:200]
