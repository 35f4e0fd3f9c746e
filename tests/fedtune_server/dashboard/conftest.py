"""A coordinator's home with a certificate, and a desk whose records a test sets."""

from __future__ import annotations

import datetime
import ipaddress
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from fedtune.deploy.homes import CoordinatorHome
from fedtune.errors import RunError
from fedtune_server.desk.view import LedgerLine, Refusal, RunEntry, SiteEntry, SiteReport

TOKEN = "an-operator-token-of-tests"
HOSTILE = "<img src=x onerror=\"document.title='owned'\">"
T0 = datetime.datetime(2026, 11, 27, 10, 0, tzinfo=UTC)


@dataclass
class FakeDesk:
    """A `DeskView` whose answers are attributes; ledgers are written with `tell`."""

    runs_folder: Path
    run_entries: list[RunEntry] = field(default_factory=list)
    site_entries: list[SiteEntry] = field(default_factory=list)
    refused: list[Refusal] = field(default_factory=list)

    def runs(self) -> Sequence[RunEntry]:
        return list(self.run_entries)

    def sites(self) -> Sequence[SiteEntry]:
        return list(self.site_entries)

    def folder(self, name: str) -> Path:
        if name not in {run.name for run in self.run_entries}:
            raise RunError(f"no run is called {name}")
        return self.runs_folder / name

    def events(self, name: str, after: int = 0) -> Iterator[LedgerLine]:
        yield from ()

    def refusals(self) -> Sequence[Refusal]:
        return list(self.refused)

    def add_run(self, name: str, state: str = "running", **fields: object) -> RunEntry:
        values: dict[str, object] = {
            "name": name,
            "run": f"{name}-1a2b3c4d",
            "state": state,
            "round": 0,
            "rounds": 12,
            "since": T0.isoformat(),
            "updated": T0.isoformat(),
            "restarts": 0,
            "reason": "",
            "devices": (),
        }
        entry = RunEntry(**(values | fields))  # type: ignore[arg-type]
        self.run_entries.insert(0, entry)
        return entry

    def tell(self, name: str, kind: str, at_s: float, **fields: object) -> None:
        """Write a line of a run's ledger, `at_s` seconds after T0."""
        folder = self.runs_folder / name
        folder.mkdir(parents=True, exist_ok=True)
        time = (T0 + datetime.timedelta(seconds=at_s)).isoformat(timespec="milliseconds")
        line = json.dumps({"seq": 0, "time": time, "kind": kind, **fields, "prev": "", "hash": ""})
        with (folder / "ledger.jsonl").open("a", encoding="utf-8") as ledger:
            ledger.write(line + "\n")


def plan(device: str, **fields: object) -> dict[str, object]:
    """A device's entry in the event `planned`."""
    return {
        "device": device,
        "device_class": "laptop",
        "format": "nf4",
        "rank_min": 2,
        "rank_max": 16,
        "trained_matrices": 14,
        "micro_batch": 4,
        "peak_bytes": 1_400_000_000,
        "budget_bytes": 2_000_000_000,
        "seconds": 20.0,
        **fields,
    }


@pytest.fixture
def desk(tmp_path: Path) -> FakeDesk:
    return FakeDesk(tmp_path / "home" / "runs")


@pytest.fixture
def told(desk: FakeDesk) -> FakeDesk:
    """A run in its third round: one site reported, one works, one is late, one refused."""
    names = ("north", "south", "east", HOSTILE)
    desk.add_run("spring", round=2, devices=names, bytes_sent=48_000_000, bytes_received=9_000_000)
    desk.add_run("autumn", state="finished", round=12)
    tell = desk.tell
    tell("spring", "run_started", 0, run="spring-1a2b3c4d", rounds=12, devices=4)
    tell("spring", "planned", 5, makespan_seconds=20.0, devices=[plan(name) for name in names])
    for number in (1, 2):
        at = number * 100.0
        tell("spring", "round_started", at, round=number, devices=list(names))
        for index, name in enumerate(names):
            tell(
                "spring",
                "device_reported",
                at + 10 + index,
                round=number,
                device=name,
                staleness=0,
                loss_before=4.0 / number,
                train_loss=3.9 / number,
                download_bytes=2_000_000,
                upload_bytes=500_000,
                seconds=9.0,
                peak_bytes=None,
            )
        tell(
            "spring",
            "round_finished",
            at + 15,
            round=number,
            reported=4,
            refused=0,
            late=0,
            held_out_loss=4.0 / number,
            train_loss=3.9 / number,
            seconds=15.0,
            planned_seconds=20.0,
            download_bytes=8_000_000,
            upload_bytes=2_000_000,
        )
    tell("spring", "round_started", 300, round=3, devices=list(names))
    tell(
        "spring",
        "device_reported",
        312,
        round=3,
        device="north",
        staleness=0,
        loss_before=1.4,
        train_loss=1.3,
        download_bytes=2_000_000,
        upload_bytes=500_000,
        seconds=9.0,
    )
    tell("spring", "device_refused", 314, round=3, device=HOSTILE, reason=f"norm {HOSTILE}")
    tell("spring", "device_late", 330, round=3, device="east", seconds=30.0)
    seen = T0.isoformat(timespec="seconds")
    report = SiteReport(
        state="training",
        run="spring",
        round=3,
        step=7,
        steps=20,
        memory_bytes=1_250_000_000,
        memory_allowed_bytes=2_000_000_000,
        bytes_down_today=31_000_000,
        bytes_up_today=6_000_000,
        link_down_bytes_per_s=2_400_000.0,
        link_up_bytes_per_s=310_000.0,
        device="Linux, 8 cores, 16 GB",
    )
    waiting = SiteReport(state="waiting", run="spring", round=3, device=HOSTILE)
    desk.site_entries = [
        SiteEntry(HOSTILE, "enrolled", True, seen, waiting),
        SiteEntry("east", "enrolled", False, seen, waiting),
        SiteEntry("north", "enrolled", True, seen, waiting),
        SiteEntry("south", "enrolled", True, seen, report),
        SiteEntry("west", "invited", False, ""),
    ]
    desk.refused = [Refusal(seen, HOSTILE, "call", f"unknown token {HOSTILE}")]
    return desk


@pytest.fixture
def home(tmp_path: Path) -> CoordinatorHome:
    """A home with a certificate of 40 days and an operator's token."""
    made = CoordinatorHome(tmp_path / "home")
    write_certificate(made, days=40)
    made.operator_file.write_text(f'token = "{TOKEN}"\n', encoding="utf-8")
    return made


def write_certificate(home: CoordinatorHome, days: float) -> None:
    """A self-signed certificate for this machine."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(UTC)
    names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=400))
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .sign(key, hashes.SHA256())
    )
    home.certificate.parent.mkdir(parents=True, exist_ok=True)
    home.certificate.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    home.key.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )


@pytest.fixture
def renew(home: CoordinatorHome) -> Callable[[float], None]:
    return lambda days: write_certificate(home, days)
