"""A new coordinator's home: keys, settings, an empty registry; and new keys for an old one.

The home names no place outside itself, so that it can be copied to another machine as it is. Only
the service files for systemd name where it lies.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedtune.deploy.addresses import check_host, join_address
from fedtune.deploy.certificates import (
    KeyPair,
    make_authority,
    make_server_certificate,
    read_certificate,
)
from fedtune.deploy.files import (
    PUBLIC_FILE,
    make_private_folder,
    new_home,
    write_private,
    write_with_mode,
)
from fedtune.deploy.homes import DEFAULT_PORT, CoordinatorHome, ServerSettings
from fedtune.deploy.operator import OperatorFile
from fedtune.deploy.service_files import ServiceKind, coordinator_files, write_service_files
from fedtune.deploy.tokens import new_token
from fedtune.errors import DeploymentError
from fedtune.sections.toml_text import file_lines

EMPTY_REGISTRY = b'{\n "version": 1,\n "sites": {},\n "retired_nodes": []\n}\n'

_HEAD = (
    "# How this coordinator is reached. Every key stands here with its default, but for the host;",
    "# it is read when the coordinator starts. Sites join with: fedtune server invite SITE",
    "",
)
_LAST_PORT = 65_535 - 3


@dataclass(frozen=True, slots=True)
class NewCoordinator:
    """What `init` has made.

    Attributes:
        home: where.
        files: paths under it, each with what it is for.
    """

    home: CoordinatorHome
    files: Sequence[tuple[str, str]]


def make_coordinator(
    folder: Path, host: str, port: int = DEFAULT_PORT, services: Sequence[ServiceKind] = ()
) -> NewCoordinator:
    """Make a coordinator's home: whole, or not at all.

    Args:
        folder: where; nothing may be there, or an empty folder.
        host: name or address that sites connect to.
        port: of the link; the service, the dashboard and health get the three behind it.
        services: which files to write for starting it at boot.

    Raises:
        DeploymentError: host or port are wrong, or something is in the folder.
        RunError: the disk is full or cannot be written.
    """
    host = check_host(host)
    if not 1 <= port <= _LAST_PORT:
        raise DeploymentError(f"expected a port in 1 to {_LAST_PORT}, found {port}")
    values: dict[str, object] = {
        "host": host,
        "port": port,
        "service_port": port + 1,
        "dashboard_port": port + 2,
        "health_port": port + 3,
    }
    settings = ServerSettings.model_validate(values)
    final = CoordinatorHome(folder)
    remedy = "choose another folder, or delete it first if it is no longer needed"
    with new_home(final.path, remedy) as staging:
        home = CoordinatorHome(staging)
        for inner in (home.ca_key.parent, home.queue, home.runs, home.flower, home.logs):
            make_private_folder(inner)
        authority = make_authority(host)
        _write_pair(authority, home.ca_certificate, home.ca_key)
        _write_pair(make_server_certificate(authority, host), home.certificate, home.key)
        _operator_file(settings, authority.certificate, new_token()).write(home.operator_file)
        write_private(home.registry, EMPTY_REGISTRY)
        text = "\n".join((*_HEAD, *file_lines(ServerSettings, values))) + "\n"
        write_private(home.settings_file, text.encode("utf-8"))
        service_files = coordinator_files(final.path, settings, services)
        write_service_files(home.path, service_files)
    return NewCoordinator(final, (*_PARTS, *((path, "service file") for path in service_files)))


_PARTS = (
    ("server.toml", "settings, each with its meaning"),
    ("operator.toml", "the operator's token: whoever has it commands the coordinator"),
    ("pki/", "certificate authority and server's key: private"),
    ("sites.json", "the sites that may take part: none yet"),
)


def rotate_certificate(home: CoordinatorHome) -> float:
    """Give the server a new key and certificate of the same authority; returns days it is valid.

    Sites see no difference. A coordinator that runs takes it for new connections within a minute.

    Raises:
        DeploymentError: the authority's key or the settings cannot be read.
        RunError: the disk is full or cannot be written.
    """
    host = home.settings().host
    pair = make_server_certificate(_authority(home), host)
    _write_pair(pair, home.certificate, home.key)
    end = read_certificate(pair.certificate, "the new certificate").not_valid_after_utc
    return (end - datetime.datetime.now(datetime.UTC)).total_seconds() / 86_400


def rotate_token(home: CoordinatorHome) -> None:
    """Give the operator a new token; the earlier one is void once the processes start anew.

    Raises:
        DeploymentError: the home is not whole.
        RunError: the disk is full or cannot be written.
    """
    settings = home.settings()
    authority = _read(home.ca_certificate)
    _operator_file(settings, authority, new_token()).write(home.operator_file)


def rotate_authority(home: CoordinatorHome) -> Path:
    """Give the coordinator a new authority, certificate and token; returns where the old are kept.

    Sites pin the authority that they joined with: each has to join anew.

    Raises:
        DeploymentError: the home is not whole.
        RunError: the disk is full or cannot be written.
    """
    settings = home.settings()
    stamp = f"{datetime.datetime.now(datetime.UTC):%Y%m%d-%H%M%S}"
    kept = home.ca_key.parent / f"old-{stamp}"
    make_private_folder(kept)
    for path in (home.ca_certificate, home.ca_key, home.certificate, home.key):
        content = _read(path)
        write_private(kept / path.name, content)
    authority = make_authority(settings.host)
    _write_pair(authority, home.ca_certificate, home.ca_key)
    _write_pair(make_server_certificate(authority, settings.host), home.certificate, home.key)
    _operator_file(settings, authority.certificate, new_token()).write(home.operator_file)
    return kept


def _operator_file(settings: ServerSettings, authority: bytes, token: str) -> OperatorFile:
    return OperatorFile(
        server=join_address(settings.host, settings.port),
        service=join_address(settings.host, settings.service_port),
        token=token,
        ca=authority.decode("ascii"),
    )


def _authority(home: CoordinatorHome) -> KeyPair:
    return KeyPair(_read(home.ca_key), _read(home.ca_certificate))


def _write_pair(pair: KeyPair, certificate: Path, key: Path) -> None:
    """The key first: after a crash between the two, `certificates.read_pair` says what to do."""
    write_private(key, pair.key)
    write_with_mode(certificate, pair.certificate, PUBLIC_FILE)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DeploymentError(
            f"{path} cannot be read ({error.strerror}); restore it from a backup, or name the "
            "coordinator's home"
        ) from None
