"""Who calls, and what they may: the operator, a site of the registry, or nobody.

What is not allowed in `RIGHTS` is refused, so that a new method is closed until somebody opens it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal, Protocol

from fedtune.errors import AccessError
from fedtune_server.operator_token import OperatorToken

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
