"""A web server that takes a renewed certificate without a restart."""

from __future__ import annotations

import logging
import ssl
import time
from collections.abc import Callable
from pathlib import Path

import uvicorn

from fedtune.deploy.certificates import read_pair
from fedtune.errors import DeploymentError

LOOK_S = 30.0
"""How often it is looked whether there is a new certificate."""

_log = logging.getLogger("fedtune.certificate")


class RenewingServer(uvicorn.Server):
    """Serves new connections with the certificate that lies on the disk, once it is whole.

    Args:
        may_renew: asked before a new certificate is taken; False: the old one stays for now.
    """

    def __init__(
        self, config: uvicorn.Config, may_renew: Callable[[], bool] = lambda: True
    ) -> None:
        super().__init__(config)
        self._may_renew = may_renew
        self._seen, self._look_at = self._stamp(), 0.0

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second."""
        if time.monotonic() >= self._look_at:
            self._look_at = time.monotonic() + LOOK_S
            self.renew()
        return await super().on_tick(counter)

    def renew(self) -> None:
        """Take the certificate on the disk if it is another one than before, and whole."""
        stamp = self._stamp()
        if stamp == self._seen or self.config.ssl is None or not self._may_renew():
            return
        certificate, key = self._paths()
        try:
            # OpenSSL would already have taken the certificate when it finds that the key is wrong.
            read_pair(certificate, key)
            self.config.ssl.load_cert_chain(certificate, key)
        except (OSError, ssl.SSLError, DeploymentError) as error:  # it is being written
            _log.warning("the new certificate cannot be used yet: %s", error)
            return
        self._seen = stamp
        _log.info("a new certificate is used from now on")

    def _paths(self) -> tuple[Path, Path]:
        return Path(str(self.config.ssl_certfile)), Path(str(self.config.ssl_keyfile))

    def _stamp(self) -> tuple[tuple[int, int], ...]:
        """Changes when the certificate or its key is written."""
        return tuple(map(_written, self._paths()))


def _written(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except OSError:
        return 0, 0
    return status.st_mtime_ns, status.st_ino
