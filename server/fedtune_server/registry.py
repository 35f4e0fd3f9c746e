"""Which sites a coordinator knows: invited, enrolled or revoked, in one file that processes share.

Whoever is not in it has no right to anything. The file `sites.json` is replaced as a whole under a
lock, and read again when it has changed, so that what the command line does is known at once to
the processes that serve sites. Of secrets and tokens it holds SHA-256 alone.
"""

from __future__ import annotations

import datetime
import difflib
import hashlib
import hmac
import os
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from filelock import FileLock, Timeout
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, ValidationError

from fedtune.deploy.certificates import fingerprint, public_pem, read_public_key
from fedtune.deploy.coordinator_home import EMPTY_REGISTRY as EMPTY_REGISTRY
from fedtune.deploy.files import write_private
from fedtune.deploy.homes import CoordinatorHome
from fedtune.deploy.join_code import FINGERPRINT_BYTES, JoinCode, new_secret
from fedtune.deploy.tokens import new_token, token_digest
from fedtune.errors import AccessError, DeploymentError

SITE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
"""Names become file names: no separators, and short enough for every file system."""
DEFAULT_DAYS = 7.0
MOST_DAYS = 90.0

_LOCK_S = 10.0
"""A change takes milliseconds; whoever waits this long waits for a process that hangs."""
_UNLUCKY = frozenset(
    {"con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in range(1, 10))}
)
"""Names that Windows keeps for devices, with any ending."""

State = Literal["invited", "enrolled", "revoked"]
# JSON's numbers lose digits of Flower's 64-bit ids in many programs.
_NodeId = Annotated[
    int | None,
    BeforeValidator(lambda value: int(value) if isinstance(value, str) else value),
    PlainSerializer(lambda value: None if value is None else str(value)),
]


class RegisteredSite(BaseModel):
    """A site of the registry.

    Attributes:
        name: as its operator called it.
        state: invited: a join code waits for it; enrolled: it may take part; revoked: it may not.
        public_key: PEM; empty before it joined.
        node_id: Flower's number of it; None before Flower knows it.
        token_sha256: of the token that it shows to the gRPC service, hex; empty before it joined.
        secret_sha256: of the last join code's secret, hex.
        code_used: the last join code was used, and is good for nothing but its repetition.
        expires_at: of the last join code. All times are UTC.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=rf"^{SITE_NAME.pattern}$")
    state: State
    public_key: str = ""
    node_id: _NodeId = None
    token_sha256: str = ""
    secret_sha256: str = ""
    code_used: bool = False
    invited_at: datetime.datetime
    expires_at: datetime.datetime
    enrolled_at: datetime.datetime | None = None
    revoked_at: datetime.datetime | None = None


class _Content(BaseModel):
    """The file: sites by name, and nodes that Flower still has to forget."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[1] = 1
    sites: Mapping[str, RegisteredSite] = {}
    retired_nodes: tuple[Annotated[int, BeforeValidator(int), PlainSerializer(str)], ...] = ()


@dataclass(frozen=True, slots=True)
class Enrolled:
    """What a site gets when it joins.

    Attributes:
        name: the site's.
        token: for the gRPC service; shown this once.
        node_id: Flower's number of it; None: Flower has to be told of it.
    """

    name: str
    token: str = field(repr=False)
    node_id: int | None


@dataclass(frozen=True, slots=True)
class _View:
    """The file as it was read, with what is looked up in it."""

    stamp: tuple[int, int, int]
    content: _Content
    by_key: Mapping[str, RegisteredSite]
    by_token: Mapping[str, RegisteredSite]
    by_node: Mapping[int, str]


class Registry:
    """The sites of one coordinator; any number of processes and threads may hold one."""

    def __init__(self, path: Path) -> None:
        """Open the registry of a coordinator's home.

        Args:
            path: `sites.json`; the CA certificate, which join codes name, lies beside it.
        """
        self._path = path.absolute()
        self._view: _View | None = None
        # One lock per change: the object that is shared between threads is the mutex.
        self._mutex = threading.RLock()

    # ------------------------------------------------------------ reading

    def sites(self) -> Mapping[str, RegisteredSite]:
        """All sites by name.

        Raises:
            DeploymentError: the registry cannot be read.
        """
        return self._current().content.sites

    def site(self, name: str) -> RegisteredSite:
        """One site.

        Raises:
            AccessError: it is unknown; the message has the nearest name.
        """
        sites = self.sites()
        if name in sites:
            return sites[name]
        near = difflib.get_close_matches(name, sites, n=1)
        hint = (
            f"did you mean {near[0]}?" if near else "`fedtune server sites` lists those there are"
        )
        raise AccessError(f"site {name!r} is unknown; {hint}")

    def by_public_key(self, key: str | bytes) -> RegisteredSite | None:
        """The site that a public key was last enrolled for, revoked or not; None: unknown.

        Args:
            key: PEM, as Flower's header carries it.
        """
        text = key.decode("utf-8", errors="replace") if isinstance(key, bytes) else key
        return self._current().by_key.get(text.strip())

    def by_token(self, token: str) -> RegisteredSite | None:
        """The enrolled site whose token this is; None: nobody's, or one that was taken back."""
        return self._current().by_token.get(token_digest(token))

    def name_of_node(self, node_id: int) -> str | None:
        """The site that Flower knows under a number, revoked or not."""
        return self._current().by_node.get(node_id)

    def retired_nodes(self) -> tuple[int, ...]:
        """Flower's numbers of sites that were revoked or got another key, and that it still has."""
        return self._current().content.retired_nodes

    # ------------------------------------------------------------ changing

    def invite(
        self,
        name: str,
        days: float = DEFAULT_DAYS,
        *,
        again: bool = False,
        now: datetime.datetime | None = None,
    ) -> JoinCode:
        """Register a site, and make the code that it joins with; an earlier code is void.

        Args:
            name: of the site; letters, digits, `.`, `_` and `-`.
            days: until the code expires; > 0, at most 90.
            again: the site is enrolled or revoked and shall join anew, with another key. The key
                that an enrolled site has is good until then.
            now: the time; None: the clock's.

        Raises:
            AccessError: the site is enrolled or revoked, and `again` is not given.
            DeploymentError: the name or the days are wrong, or the home lacks its certificate.
        """
        _check_name(name)
        if not 0 < days <= MOST_DAYS:
            raise DeploymentError(f"expected days in 0 to {MOST_DAYS:g}, found {days:g}")
        authority = self._authority()
        secret = new_secret()
        start = now or _now()
        with self._changing() as change:
            known = change.content.sites.get(name)
            _check_may_be_invited(known, name, change.content.sites, again=again)
            fresh = {
                "secret_sha256": hashlib.sha256(secret).hexdigest(),
                "code_used": False,
                "invited_at": start,
                "expires_at": start + datetime.timedelta(days=days),
            }
            if known is None or known.state == "invited":
                change.put(RegisteredSite(name=name, state="invited", **fresh))
            elif known.state == "enrolled":
                change.put(known.model_copy(update=fresh))
            else:
                change.put(RegisteredSite(name=name, state="invited", **fresh))
        return JoinCode(secret, authority)

    def enrol(
        self, secret: bytes, public_key: str | bytes, now: datetime.datetime | None = None
    ) -> Enrolled:
        """Let the site of a join code in, under its key.

        The same code with the same key may come again before it expires, because an answer can be
        lost on the way; the site gets another token then, and the earlier one is void.

        Args:
            secret: of the join code.
            public_key: the site's, PEM.
            now: the time; None: the clock's.

        Raises:
            AccessError: the code is unknown, expired, or used with another key; or the key is
                that of another site.
            DeploymentError: the key is not one of a site.
        """
        raw = public_key.encode() if isinstance(public_key, str) else public_key
        key = public_pem(read_public_key(raw)).decode("ascii").strip()
        time = now or _now()
        with self._changing() as change:
            site = _site_of_code(change.content.sites, secret)
            if time > site.expires_at:
                raise AccessError(
                    f"the join code of {site.name} expired at {site.expires_at:%Y-%m-%d %H:%M} "
                    f"UTC; ask for a new one: fedtune server invite {site.name}"
                )
            if site.code_used and site.public_key != key:
                raise AccessError(
                    f"the join code of {site.name} was used already, with another key; if that was "
                    f"not you, tell the operator: fedtune server revoke {site.name}"
                )
            for other in change.content.sites.values():
                if other.public_key == key and (other.name != site.name or not site.code_used):
                    raise AccessError(
                        f"this key was enrolled before, for {other.name}; join with a new key"
                    )
            if site.node_id is not None and site.public_key != key:
                change.retire(site.node_id)
            token = new_token()
            node_id = site.node_id if site.public_key == key else None
            change.put(
                site.model_copy(
                    update={
                        "state": "enrolled",
                        "public_key": key,
                        "node_id": node_id,
                        "token_sha256": token_digest(token),
                        "code_used": True,
                        "enrolled_at": time,
                        "revoked_at": None,
                    }
                )
            )
        return Enrolled(site.name, token, node_id)

    def revoke(self, name: str, now: datetime.datetime | None = None) -> RegisteredSite:
        """Take all rights from a site, at once; its key stays known as a revoked one.

        Raises:
            AccessError: the site is unknown or revoked already.
        """
        with self._changing() as change:
            site = self.site(name)
            if site.state == "revoked":
                raise AccessError(f"site {name} was revoked already, at {site.revoked_at:%Y-%m-%d}")
            if site.node_id is not None:
                change.retire(site.node_id)
            revoked = site.model_copy(
                update={
                    "state": "revoked",
                    "token_sha256": "",
                    "secret_sha256": "",
                    "code_used": True,
                    "revoked_at": now or _now(),
                }
            )
            change.put(revoked)
        return revoked

    def set_node(self, name: str, node_id: int) -> None:
        """Keep the number under which Flower knows a site.

        Raises:
            AccessError: the site is unknown.
        """
        if self.site(name).node_id == node_id:  # at every reconnection: nothing to write
            return
        with self._changing() as change:
            site = self.site(name)
            if site.state == "revoked":  # it was revoked while Flower was told of it
                change.retire(node_id)
            change.put(site.model_copy(update={"node_id": node_id}))

    def forget_node(self, node_id: int) -> None:
        """Flower has forgotten a node that was retired."""
        with self._changing() as change:
            change.forget(node_id)

    # ------------------------------------------------------------ the file

    def _authority(self) -> bytes:
        path = CoordinatorHome(self._path.parent).ca_certificate
        try:
            return fingerprint(path.read_bytes())[:FINGERPRINT_BYTES]
        except OSError as error:
            raise DeploymentError(
                f"the CA certificate {path} cannot be read ({error.strerror}); restore it from a "
                "backup, or make a coordinator with: fedtune server init"
            ) from None

    def _current(self) -> _View:
        with self._mutex:
            try:
                stamp = _stamp(self._path)
                if self._view is None or self._view.stamp != stamp:
                    self._view = _read(self._path)
            except OSError as error:
                raise DeploymentError(
                    f"the registry {self._path} cannot be read ({error.strerror}): nobody is let "
                    "in; restore it from a backup"
                ) from None
            return self._view

    @contextmanager
    def _changing(self) -> Iterator[_Change]:
        """Change the file alone; nothing is written where the block raises."""
        with self._mutex:
            lock = FileLock(self._path.with_name(self._path.name + ".lock"), timeout=_LOCK_S)
            try:
                lock.acquire()
            except Timeout:
                raise DeploymentError(
                    f"{self._path} has been locked by another process for {_LOCK_S:g} s; end that "
                    "process, then try again"
                ) from None
            except OSError as error:
                raise DeploymentError(
                    f"{self._path} cannot be locked ({error.strerror}); run this as the user that "
                    "the home belongs to"
                ) from None
            try:
                self._view = None
                change = _Change(self._current().content)
                yield change
                text = change.content.model_dump_json(indent=1) + "\n"
                write_private(self._path, text.encode("utf-8"))
                self._view = None
            finally:
                lock.release()


class _Change:
    """The content of the file on its way to the next."""

    def __init__(self, content: _Content) -> None:
        self.content = content

    def put(self, site: RegisteredSite) -> None:
        sites = {**self.content.sites, site.name: site}
        self.content = self.content.model_copy(update={"sites": sites})

    def retire(self, node_id: int) -> None:
        nodes = tuple(dict.fromkeys((*self.content.retired_nodes, node_id)))
        self.content = self.content.model_copy(update={"retired_nodes": nodes})

    def forget(self, node_id: int) -> None:
        nodes = tuple(node for node in self.content.retired_nodes if node != node_id)
        self.content = self.content.model_copy(update={"retired_nodes": nodes})


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


def _stamp(path: Path) -> tuple[int, int, int]:
    """What changes when a file is replaced."""
    status = os.stat(path)
    return status.st_mtime_ns, status.st_ino, status.st_size


def _read(path: Path) -> _View:
    stamp = _stamp(path)  # before the bytes: a change between them is seen at the next look
    try:
        content = _Content.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise DeploymentError(
            f"the registry {path} is damaged ({key}: {first['msg']}): nobody is let in; restore "
            "it from a backup"
        ) from None
    sites = content.sites.values()
    return _View(
        stamp,
        content,
        by_key={site.public_key: site for site in sites if site.public_key},
        by_token={
            site.token_sha256: site
            for site in sites
            if site.state == "enrolled" and site.token_sha256
        },
        by_node={site.node_id: site.name for site in sites if site.node_id is not None},
    )


def _site_of_code(sites: Mapping[str, RegisteredSite], secret: bytes) -> RegisteredSite:
    digest = hashlib.sha256(secret).hexdigest()
    found = None
    for site in sites.values():  # all of them, so that the time tells nothing
        if site.secret_sha256 and hmac.compare_digest(site.secret_sha256, digest):
            found = site
    if found is None:
        raise AccessError(
            "this join code is unknown: it was replaced, taken back, or is of another coordinator; "
            "ask for a new one: fedtune server invite SITE"
        )
    return found


def _check_name(name: str) -> None:
    if not SITE_NAME.fullmatch(name) or name.split(".")[0].lower() in _UNLUCKY:
        raise DeploymentError(
            "expected a site's name of at most 64 letters, digits, '.', '_' and '-', of which a "
            f"letter or digit first, and none that Windows keeps for devices; found {name[:80]!r}"
        )


def _check_may_be_invited(
    known: RegisteredSite | None,
    name: str,
    sites: Mapping[str, RegisteredSite],
    *,
    again: bool,
) -> None:
    if known is not None:
        if known.state != "invited" and not again:
            raise AccessError(
                f"site {name} is {known.state} already; to let it join anew with another key: "
                f"fedtune server invite {name} --again"
            )
        return
    if again:
        near = difflib.get_close_matches(name, sites, n=1)
        hint = f"did you mean {near[0]}?" if near else "leave --again out for a new site"
        raise AccessError(f"site {name!r} is unknown; {hint}")
    twins = [other for other in sites if other.lower() == name.lower()]
    if twins:  # their files would be one on Windows and macOS
        raise DeploymentError(f"site {name!r} differs from {twins[0]!r} by case alone; rename it")
