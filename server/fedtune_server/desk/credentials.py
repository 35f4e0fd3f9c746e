"""Who calls, and what they may: the operator, a site of the registry, or nobody.

What is not allowed in `RIGHTS` is refused, so that a new method is closed until somebody opens it.
"""

from __future__ import annotations

import hashlib
import hmac
import threading
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, Protocol

from fedtune.errors import AccessError

Role = Literal["operator", "site", "anyone"]

_RUNS = "/fedtune.v1.RunService/"
RIGHTS: Final[Mapping[str, frozenset[Role]]] = {
    **{
        _RUNS + name: frozenset[Role]({"operator"})
        for name in ("StartRun", "ListRuns", "StopRun", "ResumeRun", "WatchRun")
    },
    _RUNS + "ListSites": frozenset({"operator"}),
    _RUNS + "SiteLogs": frozenset({"operator"}),
    _RUNS + "GetRun": frozenset({"operator", "site"}),
    "/fedtune.v1.SiteService/Connect": frozenset({"site"}),
    "/fedtune.v1.ArtifactService/GetManifest": frozenset({"operator", "site"}),
    "/fedtune.v1.ArtifactService/Download": frozenset({"operator", "site"}),
    "/grpc.health.v1.Health/Check": frozenset({"anyone"}),
    "/grpc.health.v1.Health/Watch": frozenset({"operator"}),
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": frozenset({"operator"}),
}

_MOST_CHARACTERS = 512


class Site(Protocol):
    """What is needed of a site of the registry; a subset of `registry.RegisteredSite`."""

    @property
    def name(self) -> str: ...
    @property
    def state(self) -> str: ...


class SiteRegistry(Protocol):
    """What is asked of the registry; `fedtune_server.registry.Registry` answers it."""

    def sites(self) -> Mapping[str, Site]: ...
    def by_token(self, token: str) -> Site | None: ...


@dataclass(frozen=True, slots=True)
class Caller:
    """Who a call comes from.

    Attributes:
        name: of the site; `operator` or `anyone` otherwise.
    """

    role: Role
    name: str


class OperatorToken:
    """The operator's token as operator.toml has it now, so that a new one counts at once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._read_at: tuple[int, int] | None = None
        self._digest = b""

    def matches(self, token: str) -> bool:
        """Whether this is the operator's token; never where the file cannot be read."""
        with self._lock:
            self._refresh()
            digest = self._digest
        return bool(digest) and hmac.compare_digest(digest, _sha256(token))

    def _refresh(self) -> None:
        try:
            stat = self._path.stat()
            at = (stat.st_mtime_ns, stat.st_ino)
            if at == self._read_at:
                return
            token = tomllib.loads(self._path.read_text(encoding="utf-8")).get("token")
        except (OSError, ValueError):
            self._digest, self._read_at = b"", None
            return
        self._read_at = at
        self._digest = _sha256(token) if isinstance(token, str) and token else b""


class Gate:
    """Tells callers by their tokens."""

    def __init__(self, operator: OperatorToken, registry: SiteRegistry) -> None:
        self._operator, self._registry = operator, registry

    def admit(self, method: str, metadata: Mapping[str, str]) -> Caller:
        """The caller of a method, who may call it.

        Raises:
            AccessError: the token is missing, unknown or revoked, or gives no right to the method.
        """
        allowed = RIGHTS.get(method, frozenset())
        if "anyone" in allowed:
            return Caller("anyone", "anyone")
        caller = self._caller(metadata.get("authorization", ""))
        if caller.role not in allowed:
            raise AccessError(f"a {caller.role}'s token gives no right to call {method}")
        return caller

    def check_still_admitted(self, site: str) -> None:
        """Ask of a site that was admitted, and whose stream is open.

        Raises:
            AccessError: it has been revoked since.
        """
        found = self._registry.sites().get(site)
        if found is None or found.state != "enrolled":
            raise AccessError(f"site {site} is revoked at this coordinator")

    def _caller(self, header: str) -> Caller:
        scheme, _, token = header.partition(" ")
        if scheme.lower() != "bearer" or not 0 < len(token) <= _MOST_CHARACTERS:
            raise AccessError(
                "expected `authorization: Bearer TOKEN` in the call's metadata, found none"
            )
        if self._operator.matches(token):
            return Caller("operator", "operator")
        site = self._registry.by_token(token)
        if site is None:
            raise AccessError(
                "the token is neither the operator's nor an enrolled site's; ask for a new "
                "operator.toml, or join again with a code of: fedtune server invite SITE"
            )
        if site.state != "enrolled":
            raise AccessError(f"site {site.name} is {site.state} at this coordinator")
        return Caller("site", site.name)


def _sha256(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
