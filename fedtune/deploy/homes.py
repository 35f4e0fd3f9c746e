"""The folders that a coordinator and a site live in: what lies where, and their settings.

    coordinator                              site
    server.toml                              client.toml  policy.toml
    pki/ca.crt ca.key server.crt server.key  ca.crt  node.key  node.pub  token
    operator.toml   (address, CA, token)     state/   what devices carry from round to round
    sites.json      (the registry)           bases/DIGEST/   downloaded base models
    queue/NAME.json (runs that are wanted)   logs/
    runs/NAME/      (run folders)
    flower/         (FLWR_HOME, state.db)
    logs/
    groups/SITE/    (questions of the level above: docs/hierarchy.md)

Private keys and tokens are readable by their owner alone.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import Field, ValidationError

from fedtune.deploy.setting_errors import first_error
from fedtune.errors import DeploymentError, one_line
from fedtune.sections.section import Bytes, Section

DEFAULT_PORT = 9400

_T = TypeVar("_T", bound=Section)


class LimitsSection(Section):
    """What one peer may ask of the coordinator's link."""

    requests_per_s: float = Field(50.0, gt=0, description="requests of one site, on average")
    burst: int = Field(400, ge=1, description="requests of one site at once")
    body_bytes: Bytes = Field(16_000_000, description="largest body of one request")
    download_bytes_per_s: Bytes = Field(
        0, description="bandwidth of all downloads together; 0: no limit"
    )


class ServerSettings(Section):
    """`server.toml`: how a coordinator is reached.

    Attributes:
        host: name or address that sites connect to, and that the certificate is made for.
    """

    host: str = Field(min_length=1, description="name or address that sites connect to")
    bind: str = Field("0.0.0.0", description="address that is listened on")
    port: int = Field(DEFAULT_PORT, ge=1, le=65535, description="of Flower's link, HTTPS")
    service_port: int = Field(DEFAULT_PORT + 1, ge=1, le=65535, description="of fedtune's gRPC")
    dashboard_port: int = Field(DEFAULT_PORT + 2, ge=1, le=65535, description="of the dashboard")
    health_port: int = Field(
        DEFAULT_PORT + 3, ge=1, le=65535, description="of health and metrics, on loopback alone"
    )
    behind_proxy: bool = Field(
        False,
        description="a proxy on this machine passes requests on; the peers that it names count",
    )
    bases: tuple[str, ...] = Field((), description="folders of base models that sites may download")
    limits: LimitsSection = LimitsSection()


class SiteSection(Section):
    """Who the site is, and where its coordinator is."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="the site's name")
    server: str = Field(description="HOST:PORT of the coordinator's link")
    service: str = Field(description="HOST:PORT of the coordinator's gRPC service")
    health_port: int = Field(9410, ge=1, le=65535, description="of health and metrics, loopback")
    node_port: int = Field(9411, ge=1, le=65535, description="of Flower's node, loopback")


class SiteDataSection(Section):
    """The rows that the site trains on, and never sends."""

    train: str = Field("", description="JSONL file of the site's rows")


class SiteBaseSection(Section):
    """Where the site's copy of the base model is."""

    folders: tuple[str, ...] = Field((), description="folders of base models on this machine")
    download: bool = Field(True, description="ask the coordinator for a base that is not here")


class SiteDeviceSection(Section):
    """What training may take of this machine; what is left out is measured."""

    device_class: str = Field("site", description="name of a class in the run file's [fleet]")
    memory: Bytes = Field(0, description="memory that training may take; 0: what is free")
    threads: int = Field(0, ge=0, description="torch threads; 0: all cores")
    accelerator: Literal["auto", "cpu", "cuda"] = Field("auto", description="where to compute")
    formats: tuple[str, ...] = Field((), description="backbone formats; empty: those that run")


class SiteGroupSection(Section):
    """A site that stands for a group: a coordinator on this machine, with sites of its own."""

    coordinator: str = Field(
        "",
        description="home of that coordinator; empty: the site trains itself (docs/hierarchy.md)",
    )


class SiteSettings(Section):
    """`client.toml`: one site."""

    site: SiteSection
    data: SiteDataSection = SiteDataSection()
    base: SiteBaseSection = SiteBaseSection()
    device: SiteDeviceSection = SiteDeviceSection()
    group: SiteGroupSection = SiteGroupSection()


class CoordinatorHome:
    """Where a coordinator keeps its files; the paths exist only where something made them."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()

    @property
    def settings_file(self) -> Path:
        return self.path / "server.toml"

    @property
    def ca_certificate(self) -> Path:
        return self.path / "pki" / "ca.crt"

    @property
    def ca_key(self) -> Path:
        return self.path / "pki" / "ca.key"

    @property
    def certificate(self) -> Path:
        return self.path / "pki" / "server.crt"

    @property
    def key(self) -> Path:
        return self.path / "pki" / "server.key"

    @property
    def operator_file(self) -> Path:
        """Address, CA and token in one file, to copy to an operator's machine."""
        return self.path / "operator.toml"

    @property
    def registry(self) -> Path:
        return self.path / "sites.json"

    @property
    def queue(self) -> Path:
        """Folder of the runs that are wanted, one JSON file each."""
        return self.path / "queue"

    @property
    def runs(self) -> Path:
        return self.path / "runs"

    def group(self, site: str) -> Path:
        """Where the site of the level above that this coordinator is asks its run."""
        return self.path / "groups" / site

    @property
    def flower(self) -> Path:
        """Flower's own folder (FLWR_HOME), with its database."""
        return self.path / "flower"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    def settings(self) -> ServerSettings:
        """What `server.toml` says.

        Raises:
            DeploymentError: it is not there or not right.
        """
        return _read(self.settings_file, ServerSettings, "fedtune server init --host NAME")


class SiteHome:
    """Where a site keeps its files."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()

    @property
    def settings_file(self) -> Path:
        return self.path / "client.toml"

    @property
    def policy_file(self) -> Path:
        return self.path / "policy.toml"

    @property
    def ca_certificate(self) -> Path:
        return self.path / "ca.crt"

    @property
    def node_key(self) -> Path:
        """The site's private key, which never leaves it."""
        return self.path / "node.key"

    @property
    def node_public_key(self) -> Path:
        return self.path / "node.pub"

    @property
    def token(self) -> Path:
        """What the site shows to the coordinator's gRPC service."""
        return self.path / "token"

    @property
    def state(self) -> Path:
        return self.path / "state"

    @property
    def bases(self) -> Path:
        return self.path / "bases"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    def settings(self) -> SiteSettings:
        """What `client.toml` says.

        Raises:
            DeploymentError: it is not there or not right.
        """
        return _read(
            self.settings_file, SiteSettings, "fedtune client join CODE --server HOST:PORT"
        )


def _read(path: Path, section: type[_T], made_by: str) -> _T:
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DeploymentError(
            f"{path} cannot be read ({error.strerror}); name the folder that it is in, or make one "
            f"with: {made_by}"
        ) from None
    except (ValueError, RecursionError) as error:  # also numbers of thousands of digits
        raise DeploymentError(f"{path} is not valid TOML: {one_line(str(error))}") from None
    try:
        return section.model_validate(tree)
    except ValidationError as error:
        raise DeploymentError(f"{path}: {first_error(error, section)}") from None
