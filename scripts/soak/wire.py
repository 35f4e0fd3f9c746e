"""A wire between a site and its coordinator that can be cut, slowed and drawn out.

It passes the bytes of TCP connections on. While it is cut, connections stay open and hear nothing,
as when a cable is pulled; what was on its way arrives once it is whole again.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from dataclasses import dataclass
from types import TracebackType

PIECE_BYTES = 16_384


@dataclass
class Shape:
    """What a wire does to bytes; may be changed while it is in use.

    Attributes:
        bytes_per_s: in each direction, over all of the wire's connections; 0: unlimited.
        delay_s: one way.
        cut: nothing passes.
    """

    bytes_per_s: float = 0.0
    delay_s: float = 0.0
    cut: bool = False


class Wire:
    """Listens on loopback and passes on to another port there.

    Attributes:
        port: that a site is to connect to.
        passed_bytes: in both directions.
    """

    def __init__(self, target: int, shape: Shape | None = None) -> None:
        self.shape = shape or Shape()
        self.port = 0
        self.passed_bytes = 0
        self._target = target
        self._loop = asyncio.new_event_loop()
        self._free_at = [0.0, 0.0]  # up and down, by the loop's clock
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def __enter__(self) -> Wire:
        self._thread.start()
        if not self._ready.wait(10) or not self.port:
            raise OSError("the wire does not listen")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._server = self._loop.run_until_complete(
            asyncio.start_server(self._connected, "127.0.0.1", 0, limit=PIECE_BYTES)
        )
        self.port = self._server.sockets[0].getsockname()[1]
        self._ready.set()
        self._loop.run_forever()
        self._server.close()
        for task in (tasks := asyncio.all_tasks(self._loop)):
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        for writer in self._writers:
            writer.transport.abort()
        self._loop.run_until_complete(asyncio.sleep(0))  # which is when transports close
        self._loop.close()

    async def _connected(self, near: asyncio.StreamReader, back: asyncio.StreamWriter) -> None:
        self._writers.add(back)
        await self._whole()
        try:
            far, forth = await asyncio.open_connection("127.0.0.1", self._target, limit=PIECE_BYTES)
        except OSError:
            back.close()
            return
        self._writers.add(forth)
        with contextlib.suppress(asyncio.CancelledError):  # streams of Python 3.11 would tell of it
            await asyncio.gather(self._pass(near, forth, 0), self._pass(far, back, 1))
            self._writers -= {back, forth}

    async def _pass(
        self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, way: int
    ) -> None:
        """Pass on until one end closes."""
        held: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(64)
        reader = self._loop.create_task(self._read(source, held, way))
        with contextlib.suppress(OSError):
            while True:
                at, piece = await held.get()
                await asyncio.sleep(max(0.0, at - self._loop.time()))
                await self._whole()
                if not piece:
                    break
                sink.write(piece)
                await sink.drain()
                self.passed_bytes += len(piece)
        reader.cancel()
        with contextlib.suppress(OSError):
            sink.close()

    async def _read(
        self, source: asyncio.StreamReader, held: asyncio.Queue[tuple[float, bytes]], way: int
    ) -> None:
        while True:
            try:
                piece = await source.read(PIECE_BYTES)
            except OSError:
                piece = b""
            now = self._loop.time()
            if self.shape.bytes_per_s:
                self._free_at[way] = max(now, self._free_at[way]) + (
                    len(piece) / self.shape.bytes_per_s
                )
                now = self._free_at[way]
            await held.put((now + self.shape.delay_s, piece))
            if not piece:
                return

    async def _whole(self) -> None:
        while self.shape.cut:
            await asyncio.sleep(0.05)
