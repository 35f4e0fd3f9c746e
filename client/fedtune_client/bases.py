"""The base models that are on a site, found by their digests, or downloaded once."""

from __future__ import annotations

import logging
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedtune.errors import FedtuneError, ModelError
from fedtune.model.source import base_digest

Progress = Callable[[int, int], None]
"""Told of bytes that are there, and of all bytes."""
Fetch = Callable[[str, Path, Progress], None]
"""Downloads the base of a digest into a folder; continues what is there already."""

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Download:
    done: threading.Event
    have_bytes: int = 0
    all_bytes: int = 0
    failed: str = ""

    @property
    def percent(self) -> int:
        return min(100, 100 * self.have_bytes // self.all_bytes) if self.all_bytes else 0


class Bases:
    """A site's base models.

    Args:
        folders: of base models, or folders of such folders.
        kept: where downloads go, under their digests; it goes first.
        fetch: None: nothing is downloaded.
        remembered: folder of digests that were computed before; None: they are not kept.
    """

    def __init__(
        self,
        folders: Sequence[Path],
        kept: Path,
        fetch: Fetch | None,
        remembered: Path | None = None,
    ) -> None:
        self._folders, self._kept, self._fetch = tuple(folders), kept, fetch
        self._remembered = remembered
        self._found: dict[str, Path] = {}
        self._downloads: dict[str, _Download] = {}
        self._lock = threading.Lock()

    def folder(self, digest: str, wait_s: float = 0.0) -> Path:
        """The folder of the base with a digest; its download is begun if it is not here.

        Args:
            wait_s: longest to wait for a download; it goes on in the background.

        Raises:
            ModelError: it is neither here nor downloaded yet; or what was downloaded is another.
        """
        found = self._find(digest)
        if found is not None:
            return found
        if self._fetch is None:
            places = ", ".join(str(folder) for folder in self._folders) or "none given"
            raise ModelError(
                f"base {digest[:12]} is not on this site (looked in base.folders: {places}); copy "
                "the coordinator's model there, or set base.download = true in client.toml"
            )
        download = self._begin(digest, self._fetch)
        download.done.wait(wait_s)
        found = self._find(digest) if download.done.is_set() else None
        if found is not None:
            return found
        if download.failed:
            raise ModelError(f"base {digest[:12]} cannot be downloaded: {download.failed}")
        raise ModelError(
            f"base {digest[:12]} is being downloaded ({download.percent} %); this site joins when "
            "it is here"
        )

    @property
    def downloading(self) -> bool:
        with self._lock:
            return any(not each.done.is_set() for each in self._downloads.values())

    def _find(self, digest: str) -> Path | None:
        known = self._found.get(digest)
        for folder in self._candidates(digest) if known is None else (known,):
            try:
                found = base_digest(folder, self._remembered)
            except ModelError as error:
                _log.warning("a folder of base.folders is left out: %s", error)
                continue
            self._found[found] = folder
            if found == digest:
                return folder
        self._found.pop(digest, None)
        return None

    def _candidates(self, digest: str) -> Iterator[Path]:
        own = self._kept / digest
        if own.is_dir():
            yield own
        for folder in self._folders:
            if (folder / "config.json").is_file():
                yield folder
            elif folder.is_dir():
                yield from sorted(p for p in folder.iterdir() if (p / "config.json").is_file())

    def _begin(self, digest: str, fetch: Fetch) -> _Download:
        with self._lock:
            running = self._downloads.get(digest)
            if running is not None and not running.done.is_set():
                return running
            download = self._downloads[digest] = _Download(threading.Event())
        arguments = (digest, fetch, download)
        threading.Thread(target=self._run, args=arguments, name="base", daemon=True).start()
        return download

    def _run(self, digest: str, fetch: Fetch, download: _Download) -> None:
        partial = self._kept / f"{digest}.incomplete"

        def progress(have: int, total: int) -> None:
            download.have_bytes, download.all_bytes = have, total

        try:
            partial.mkdir(parents=True, exist_ok=True)
            fetch(digest, partial, progress)
            found = base_digest(partial)
            if found != digest:
                shutil.rmtree(partial)
                raise ModelError(f"what the coordinator gave has the digest {found[:12]}")
            partial.rename(self._kept / digest)
            _log.info("base %s was downloaded", digest[:12])
        except FedtuneError as error:
            download.failed = str(error)
        except Exception as error:  # the edge of a thread: told to whoever asks for the base
            download.failed = f"{type(error).__name__}: {error}"
            _log.exception("the download of base %s failed", digest[:12])
            raise
        finally:
            if download.failed:
                _log.warning("base %s: %s", digest[:12], download.failed)
            download.done.set()
