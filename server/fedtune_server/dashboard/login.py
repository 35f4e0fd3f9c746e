"""Who may see the dashboard: a token once, then a signed cookie; and how often one may try.

A cookie is `expiry.nonce.mac`. Its key comes from the token, so a session outlives a restart of
the coordinator, and a new token ends every session. Signing out is remembered until the cookie
would have expired.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
import tomllib
from collections import OrderedDict, deque
from collections.abc import Callable
from pathlib import Path

from fedtune.deploy.homes import CoordinatorHome
from fedtune.errors import DeploymentError

SESSION_S = 12 * 3600
TOKEN_FILE = "dashboard.token"
"""In the coordinator's home: a token for people who may look and not steer."""

_MOST_TOKEN = 512
_MOST_PEERS = 1024
_MOST_SIGNED_OUT = 4096


def read_tokens(home: CoordinatorHome) -> tuple[str, ...]:
    """The tokens that open the dashboard: its own, if there is one, and the operator's.

    Raises:
        DeploymentError: there is none.
    """
    found = [_own_token(home.path / TOKEN_FILE), _operator_token(home.operator_file)]
    tokens = tuple(token for token in found if token)
    if not tokens:
        raise DeploymentError(
            f"the dashboard needs a token and found none in {home.operator_file} or "
            f"{home.path / TOKEN_FILE}; make the first with: fedtune server init"
        )
    return tokens


def _own_token(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return ""
    except (OSError, UnicodeDecodeError) as error:
        raise DeploymentError(f"{path} cannot be read as a token: {error}") from None


def _operator_token(path: Path) -> str:
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return ""  # it was moved to the operator's machine
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise DeploymentError(f"{path} cannot be read: {' '.join(str(error).split())}") from None
    token = tree.get("token")
    return token if isinstance(token, str) else ""


class Attempts:
    """Counts wrong tokens of each address and of all together.

    Args:
        of_one: wrong tokens that one address may give within `window_s`.
        of_all: the same for all addresses together.
        now: seconds of a clock that never goes back.
    """

    def __init__(
        self,
        of_one: int = 5,
        of_all: int = 100,
        window_s: float = 60.0,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._of_one, self._of_all, self._window_s, self._now = of_one, of_all, window_s, now
        self._wrong: OrderedDict[str, deque[float]] = OrderedDict()
        self._all: deque[float] = deque()

    def wait_s(self, peer: str) -> float:
        """Seconds until this address may try again; 0: now."""
        now = self._now()
        own = self._wrong.get(peer, deque())
        waits = (self._wait(own, self._of_one, now), self._wait(self._all, self._of_all, now))
        return max(waits)

    def wrong(self, peer: str) -> None:
        """This address gave a wrong token."""
        self._all.append(self._now())
        self._wrong.setdefault(peer, deque()).append(self._now())
        self._wrong.move_to_end(peer)
        while len(self._wrong) > _MOST_PEERS:
            self._wrong.popitem(last=False)

    def _wait(self, times: deque[float], allowed: int, now: float) -> float:
        while times and now - times[0] >= self._window_s:
            times.popleft()
        return times[-allowed] + self._window_s - now if len(times) >= allowed else 0.0


class Doorkeeper:
    """Checks tokens and the cookies that they were exchanged for.

    Args:
        tokens: reads the tokens that are good now; a new one counts at once.
        now: seconds since 1970.
    """

    def __init__(
        self, tokens: Callable[[], tuple[str, ...]], now: Callable[[], float] = time.time
    ) -> None:
        self._tokens, self._now = tokens, now
        self._signed_out: OrderedDict[str, None] = OrderedDict()

    def accepts(self, token: str) -> bool:
        """Whether this is one of the tokens; the time it takes does not depend on how alike."""
        return self._digest_of(token) is not None

    def sign_in(self, token: str) -> str | None:
        """A cookie's value for a good token; None for another."""
        digest = self._digest_of(token)
        if digest is None:
            return None
        content = f"{int(self._now()) + SESSION_S}.{secrets.token_urlsafe(18)}"
        return f"{content}.{_mac(digest, content)}"

    def knows(self, cookie: str) -> bool:
        """Whether a cookie is of a session that goes on."""
        content, _, mac = cookie.rpartition(".")
        expiry, _, nonce = content.partition(".")
        if len(cookie) > _MOST_TOKEN or not nonce or not _is_number(expiry):
            return False
        good = [_same(_mac(d, content), mac) for d in self._all()]
        return any(good) and int(expiry) > self._now() and nonce not in self._signed_out

    def sign_out(self, cookie: str) -> None:
        """End the session of a cookie."""
        if self.knows(cookie):
            self._signed_out[cookie.split(".")[1]] = None
            while len(self._signed_out) > _MOST_SIGNED_OUT:
                self._signed_out.popitem(last=False)

    def _digest_of(self, token: str) -> bytes | None:
        given = _sha256(token[:_MOST_TOKEN])
        same = [digest for digest in self._all() if hmac.compare_digest(digest, given)]
        return same[0] if same else None

    def _all(self) -> list[bytes]:
        return [_sha256(token) for token in self._tokens()]


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 12


def _sha256(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def _mac(key: bytes, content: str) -> str:
    message = b"fedtune dashboard session\n" + content.encode("utf-8", "surrogatepass")
    return hmac.new(key, message, hashlib.sha256).hexdigest()


def _same(mac: str, given: str) -> bool:
    return hmac.compare_digest(mac.encode(), given.encode("utf-8", "surrogatepass"))
