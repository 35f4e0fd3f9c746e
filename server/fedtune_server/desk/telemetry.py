"""What the desk counts, for Prometheus; nothing leaves the machine by itself."""

from __future__ import annotations

from pathlib import Path

from prometheus_client import Counter, Gauge

CALLS = Counter("fedtune_grpc_calls", "gRPC calls by method and status code", ["method", "code"])
AUTH_REFUSALS = Counter("fedtune_auth_refusals", "gRPC calls that were refused", ["reason"])
SERVED_BYTES = Counter("fedtune_download_bytes", "bytes of artifacts that were sent")
SITES = Gauge("fedtune_sites", "sites by state", ["state"])
SITES_ONLINE = Gauge("fedtune_sites_online", "sites that told of themselves in the last 30 s")


def write_metrics(path: Path, text: bytes) -> None:
    """Replace a file with metrics in Prometheus' text form.

    A full disk costs the metrics and nothing else; the file that was there stays.
    """
    temporary = path.with_name(f".{path.name}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(text)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
