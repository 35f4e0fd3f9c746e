"""The operator's token, as `operator.toml` has it now: a new one counts at once."""

from __future__ import annotations

import hashlib
import hmac
import threading
import tomllib
from pathlib import Path

from fedtune.errors import DeploymentError


class OperatorToken:
    """Read anew when its file has changed; any thread may ask.

    Args:
        path: `operator.toml` of the coordinator's home.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._seen: tuple[int, int] | None = None
        self._digest = b""

    def read(self) -> str:
        """The token itself, for the coordinator's own requests.

        Raises:
            DeploymentError: the file is not there or holds none.
        """
        try:
            token = tomllib.loads(self._path.read_text(encoding="utf-8")).get("token")
        except (OSError, ValueError, RecursionError) as error:
            raise DeploymentError(
                f"{self._path} cannot be read ({error}); make it with: fedtune server init"
            ) from None
        if not isinstance(token, str) or not token:
            raise DeploymentError(f'{self._path}: expected token = "...", found none')
        return token

    def matches(self, token: str) -> bool:
        """Whether this is the operator's; in constant time, and never without a readable file."""
        with self._lock:
            self._refresh()
            digest = self._digest
        return bool(digest and token) and hmac.compare_digest(digest, _sha256(token))

    def _refresh(self) -> None:
        try:
            found = self._path.stat()
            seen = (found.st_mtime_ns, found.st_ino)
            if seen == self._seen:
                return
            self._digest = _sha256(self.read())
            self._seen = seen
        except (OSError, DeploymentError):
            self._digest, self._seen = b"", None


def _sha256(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
