"""How a home is doing, for programs: over HTTP on loopback, and in a file.

    GET /health    200 where all processes are up, else 503; a JSON object
    GET /metrics   Prometheus text: one set of figures per process, and what is registered

`HOME/logs/supervisor.json` holds the same object as /health, for verbs on the same machine. Other
processes of a home put their own metrics in files, which /metrics appends.
"""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import socketserver
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
from prometheus_client import REGISTRY, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from fedtune.deploy.supervisor import Report

_MOST_AT_ONCE = 8
_PATIENCE_S = 5.0
_MOST_METRICS_BYTES = 1_000_000
_FRESH_S = 60.0
"""Metrics of a process that has not written for so long are those of one that is gone."""
_LOOPBACK_NAMES = ("127.0.0.1", "localhost", "[::1]")


@dataclass(frozen=True, slots=True)
class Identity:
    """What does not change while a supervisor lives.

    Attributes:
        name: `coordinator`, or the site's name.
        certificate_days: days until the certificate ends, as it lies on the disk now; None: there
            is none.
        metric_files: files that other processes keep in Prometheus's text form.
    """

    name: str
    version: str
    certificate_days: Callable[[], float | None] = lambda: None
    metric_files: Sequence[Path] = ()


def health_object(report: Report, identity: Identity) -> dict[str, Any]:
    """What /health says, as JSON values."""
    days = identity.certificate_days()
    return {
        "name": identity.name,
        "state": report.state,
        "pid": os.getpid(),
        "version": identity.version,
        "since": _iso(report.since_s),
        "certificate_days_left": None if days is None else round(days, 2),
        "children": {
            child.name: {
                "state": child.state,
                "pid": child.pid,
                "restarts": child.restarts,
                "crash_loop": child.crash_loop,
                "since": _iso(child.since_s),
                "last_exit": child.last_exit,
                "last_error": child.last_error[:1000],
            }
            for child in report.children
        },
    }


def write_status(path: Path, report: Report, identity: Identity) -> None:
    """Replace the status file; a disk that is full leaves the old one."""
    partial = path.with_name(f"{path.name}.partial")
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(health_object(report, identity)) + "\n", encoding="utf-8")
        os.replace(partial, path)


def _iso(moment_s: float) -> str:
    return datetime.fromtimestamp(moment_s, UTC).isoformat(timespec="seconds")


class _Figures(Collector):
    """One set of figures per process, measured when they are asked for."""

    def __init__(self, report: Report, identity: Identity) -> None:
        self._report = report
        self._identity = identity

    def collect(self) -> Iterable[Metric]:
        up = GaugeMetricFamily("fedtune_child_up", "1: the process does its work", labels=["child"])
        starts = CounterMetricFamily(
            "fedtune_child_restarts", "times the process was started again", labels=["child"]
        )
        memory = GaugeMetricFamily(
            "fedtune_child_resident_bytes",
            "resident memory of the process and those below it",
            labels=["child"],
        )
        cpu = CounterMetricFamily(
            "fedtune_child_cpu_seconds",
            "processor time of the process and those below it",
            labels=["child"],
        )
        for child in self._report.children:
            up.add_metric([child.name], float(child.state == "up"))
            starts.add_metric([child.name], child.restarts)
            if child.pid is not None:
                resident_bytes, cpu_s = _usage(child.pid)
                memory.add_metric([child.name], resident_bytes)
                cpu.add_metric([child.name], cpu_s)
        yield from (up, starts, memory, cpu)
        days = self._identity.certificate_days()
        if days is not None:
            yield GaugeMetricFamily(
                "fedtune_certificate_remaining_seconds",
                "time until the certificate ends",
                value=days * 86_400,
            )


def _usage(pid: int) -> tuple[float, float]:
    """Resident bytes and CPU seconds of a process and those below it; 0 where it is gone."""
    resident_bytes = cpu_s = 0.0
    with contextlib.suppress(psutil.Error, OSError):
        top = psutil.Process(pid)
        for process in (top, *top.children(recursive=True)):
            with contextlib.suppress(psutil.Error, OSError):
                resident_bytes += process.memory_info().rss
                times = process.cpu_times()
                cpu_s += times.user + times.system
    return resident_bytes, cpu_s


def metrics_text(report: Report, identity: Identity) -> bytes:
    """What /metrics says."""
    figures = CollectorRegistry(auto_describe=False)
    figures.register(_Figures(report, identity))
    parts = [generate_latest(figures), generate_latest(REGISTRY)]
    for path in identity.metric_files:
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime < _FRESH_S:
                with path.open("rb") as file:
                    content = file.read(_MOST_METRICS_BYTES + 1)
                if len(content) <= _MOST_METRICS_BYTES:
                    parts.append(content.rstrip(b"\n") + b"\n")
    return b"".join(parts)


class _Handler(http.server.BaseHTTPRequestHandler):
    """Two paths, read-only, for programs of this machine."""

    server: _Server
    timeout = _PATIENCE_S
    server_version = "fedtune"
    sys_version = ""

    def do_GET(self) -> None:
        host = self.headers.get("Host", "").rpartition(":")[0] or self.headers.get("Host", "")
        if host not in _LOOPBACK_NAMES:  # a web page that has another name point at loopback
            self._answer(403, "text/plain", b"ask for this machine by the name localhost\n")
        elif self.path == "/health":
            found = health_object(self.server.report(), self.server.identity)
            status = 200 if found["state"] == "healthy" else 503
            self._answer(status, "application/json", json.dumps(found).encode() + b"\n")
        elif self.path == "/metrics":
            text = metrics_text(self.server.report(), self.server.identity)
            self._answer(200, "text/plain; version=0.0.4; charset=utf-8", text)
        else:
            self._answer(404, "text/plain", b"there are /health and /metrics\n")

    do_HEAD = do_GET

    def _answer(self, status: int, kind: str, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format: str, *arguments: object) -> None:
        """A question every few seconds is not worth a line."""


class _Server(socketserver.ThreadingMixIn, http.server.HTTPServer):
    daemon_threads = True
    block_on_close = False
    allow_reuse_address = os.name != "nt"

    def __init__(self, port: int, report: Callable[[], Report], identity: Identity) -> None:
        self.report = report
        self.identity = identity
        self._places = threading.BoundedSemaphore(_MOST_AT_ONCE)
        super().__init__(("127.0.0.1", port), _Handler)

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # HTTPServer's would look its name up in the DNS
        self.server_name, self.server_port = "localhost", self.server_address[1]

    def process_request(self, request: Any, client_address: Any) -> None:  # as socketserver has it
        if self._places.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Who asked is gone."""


class HealthServer:
    """Answers on loopback while it is entered.

    Args:
        port: 0: any free one.
        report: the state of now; called by several threads.

    Raises:
        OSError: the port is taken.
    """

    def __init__(self, port: int, report: Callable[[], Report], identity: Identity) -> None:
        self._server = _Server(port, report, identity)
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.25,), daemon=True
        )

    @property
    def port(self) -> int:
        return int(self._server.server_port)

    def __enter__(self) -> HealthServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
