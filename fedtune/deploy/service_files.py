"""Files that start a coordinator or a site at boot: systemd units, and containers.

They are texts made from plain values and written once, for an operator to read, change and install.
Each container gets an init process (`--init`), because nobody else would wait for children whose
parent was killed; neither runs as root.
"""

from __future__ import annotations

import enum
import json
import re
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Final

from fedtune.deploy.files import PUBLIC_FILE, make_private_folder, write_with_mode
from fedtune.deploy.homes import ServerSettings
from fedtune.errors import DeploymentError

STOP_S: Final = 10
"""Seconds until systemd or Docker kills what was told to stop; our own processes take 5."""
WATCHDOG_S: Final = 60
_USER_ID: Final = 10_001
"""Of the user inside a container: above those that distributions hand out."""


class ServiceKind(enum.StrEnum):
    """What starts the service."""

    SYSTEMD = "systemd"
    DOCKER = "docker"
    COMPOSE = "compose"


def coordinator_files(
    home: Path, settings: ServerSettings, kinds: Sequence[ServiceKind]
) -> Mapping[str, str]:
    """Service files of a coordinator: path under its home -> text.

    Args:
        home: where the home will lie.

    Raises:
        DeploymentError: systemd cannot be told of this path.
    """
    ports = (settings.port, settings.service_port, settings.dashboard_port)
    return _files(
        "server", home, kinds, extra="", ports=ports, health_port=settings.health_port, reads=()
    )


def site_files(
    home: Path, health_port: int, kinds: Sequence[ServiceKind], reads: Sequence[Path] = ()
) -> Mapping[str, str]:
    """Service files of a site: path under its home -> text.

    Args:
        home: where the home will lie.
        health_port: of its health page, on loopback.
        reads: data and base models outside the home, which a container must be shown.

    Raises:
        DeploymentError: systemd cannot be told of this path.
    """
    return _files(
        "client", home, kinds, extra="[train]", ports=(), health_port=health_port, reads=reads
    )


def write_service_files(home: Path, files: Mapping[str, str]) -> None:
    """Write them under a home.

    Raises:
        RunError: the disk is full or cannot be written.
    """
    for name, text in files.items():
        path = home / name
        make_private_folder(path.parent)
        write_with_mode(path, text.encode("utf-8"), PUBLIC_FILE)


def _files(
    side: str,
    home: Path,
    kinds: Sequence[ServiceKind],
    *,
    extra: str,
    ports: Sequence[int],
    health_port: int,
    reads: Sequence[Path],
) -> Mapping[str, str]:
    files: dict[str, str] = {}
    if ServiceKind.SYSTEMD in kinds:
        files[f"service/fedtune-{side}.service"] = systemd_unit(side, home)
    if ServiceKind.DOCKER in kinds or ServiceKind.COMPOSE in kinds:
        files["service/Dockerfile"] = dockerfile(side, extra, health_port)
    if ServiceKind.COMPOSE in kinds:
        files["service/compose.yaml"] = compose_file(side, ports, reads)
    return files


def systemd_unit(side: str, home: Path) -> str:
    """A unit for a user of its own, which may write nothing but the home.

    Args:
        side: `server` or `client`.

    Raises:
        DeploymentError: the path holds a line break, which no unit can.
    """
    path = _unit_text(home)
    program = f"{_unit_text(Path(sys.executable))} -m fedtune {side} start {path}"
    name = "coordinator" if side == "server" else "site"
    # A site's GPU is a device, so that only a coordinator does without them.
    devices = "PrivateDevices=yes\n" if side == "server" else ""
    return f"""# Install: sudo cp THIS /etc/systemd/system/
#          sudo systemctl enable --now fedtune-{side}
# The home must belong to the user below: sudo chown -R fedtune: {_plain(home)}
[Unit]
Description=fedtune {name}
Wants=network-online.target
After=network-online.target
StartLimitIntervalSec=0

[Service]
Type=notify
NotifyAccess=main
User=fedtune
Environment={_unit_text_of(f"FEDTUNE_CACHE={_plain(home)}/cache")}
ExecStart={program}
Restart=always
RestartSec=5
RestartPreventExitStatus=78
WatchdogSec={WATCHDOG_S}
TimeoutStopSec={STOP_S}
KillMode=mixed
UMask=0077
NoNewPrivileges=yes
ProtectSystem=strict
ProtectHome=read-only
ReadWritePaths={path}
PrivateTmp=yes
{devices}ProtectKernelTunables=yes
ProtectKernelModules=yes
ProtectKernelLogs=yes
ProtectControlGroups=yes
ProtectClock=yes
ProtectHostname=yes
RestrictSUIDSGID=yes
RestrictRealtime=yes
RestrictNamespaces=yes
RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX
LockPersonality=yes
CapabilityBoundingSet=
SystemCallArchitectures=native

[Install]
WantedBy=multi-user.target
"""


def dockerfile(side: str, extra: str, health_port: int) -> str:
    """An image of the installed version; the home comes in as a volume at /home/fedtune/home.

    Args:
        side: `server` or `client`.
        extra: of the package, with brackets, such as `[train]`; empty: none.
    """
    check = (
        f"import urllib.request as r; r.urlopen('http://127.0.0.1:{health_port}/health', timeout=4)"
    )
    return f"""# Build: docker build -t fedtune-{side} .
# Run:   docker run --init --read-only --tmpfs /tmp -v HOME:/home/fedtune/home fedtune-{side}
# Without internet: put the wheels that it needs into the folder wheels beside this file, and
# build with --build-arg PIP_NO_INDEX=1.
FROM python:3.11-slim
ARG PIP_NO_INDEX
COPY Dockerfile wheel[s] /wheels/
RUN pip install --no-cache-dir --find-links /wheels 'fedtune{extra}=={version("fedtune")}' \\
 && useradd --uid {_USER_ID} --create-home fedtune
USER fedtune
ENV PYTHONUNBUFFERED=1 FEDTUNE_CACHE=/home/fedtune/home/cache
VOLUME ["/home/fedtune/home"]
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s CMD {json.dumps(["python", "-c", check])}
ENTRYPOINT ["fedtune", "{side}", "start", "/home/fedtune/home"]
"""


def compose_file(side: str, ports: Sequence[int], reads: Sequence[Path]) -> str:
    """A compose file beside the Dockerfile, in the folder `service` of the home.

    Args:
        side: `server` or `client`.
        ports: that sites and operators reach.
        reads: files and folders outside the home that the service reads, at the same paths.
    """
    volumes = ["../:/home/fedtune/home", *(f"{path}:{path}:ro" for path in reads)]
    lines = [
        f"# Start: docker compose up -d   (the home must belong to user {_USER_ID}:",
        f"#   sudo chown -R {_USER_ID} ..)",
        "services:",
        f"  {side}:",
        "    build: .",
        f"    image: fedtune-{side}:{version('fedtune')}",
        "    init: true",
        "    restart: unless-stopped",
        f"    stop_grace_period: {STOP_S}s",
        "    read_only: true",
        "    cap_drop: [ALL]",
        '    security_opt: ["no-new-privileges:true"]',
        "    tmpfs: [/tmp]",
        "    volumes:",
        *(f"      - {json.dumps(volume)}" for volume in volumes),
    ]
    if ports:
        lines += ["    ports:", *(f'      - "{port}:{port}"' for port in ports)]
    return "\n".join(lines) + "\n"


def _unit_text(path: Path) -> str:
    return _unit_text_of(_plain(path))


def _unit_text_of(text: str) -> str:
    """One word of a unit: quoted, and with systemd's own signs doubled."""
    text = text.replace("%", "%%")
    if re.fullmatch(r"[A-Za-z0-9@_./+:,%=-]+", text):
        return text
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("$", "$$")
    return f'"{escaped}"'


def _plain(path: Path) -> str:
    text = str(path)
    if any(ord(character) < 32 for character in text):
        raise DeploymentError(f"expected a path without line breaks, found {text!r}")
    return text
