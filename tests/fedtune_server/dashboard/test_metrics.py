"""What Prometheus is told, and whether the Grafana board asks for nothing else."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client import REGISTRY, Gauge
from prometheus_client.parser import text_string_to_metric_families

from fedtune.deploy.homes import CoordinatorHome
from fedtune_server.dashboard.feed import Readings
from fedtune_server.dashboard.metrics import metrics_text, own_metrics
from fedtune_server.desk import telemetry

from .conftest import HOSTILE, FakeDesk

ROOT = Path(__file__).resolve().parents[3]
GRAFANA = ROOT / "examples" / "grafana"
Samples = dict[tuple[str, tuple[str, ...]], float]


def samples(desk: FakeDesk, certificate: Path = Path("no.crt")) -> Samples:
    """(name, values of the labels in the order of their names) -> value."""
    text = metrics_text(Readings(desk, certificate, Path("no.json"))).decode()
    names = [line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")]
    assert len(names) == len(set(names))
    return {
        (sample.name, tuple(sample.labels[key] for key in sorted(sample.labels))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_a_run_that_goes_on_is_told_in_numbers(told: FakeDesk) -> None:
    found = samples(told)
    expected = {
        "round": 2,
        "rounds": 12,
        "held_out_loss": 2.0,
        "train_loss": 1.95,
        "round_seconds": 15,
        "mean_round_seconds": 15,
        "planned_round_seconds": 20,
        "restarts_total": 0,
        "refusals_total": 1,
        "late_total": 1,
        "sent_bytes_total": 48_000_000,
        "received_bytes_total": 9_000_000,
    }
    for name, value in expected.items():
        assert found[f"fedtune_run_{name}", ("spring",)] == value, name
    assert found["fedtune_runs", ("running",)] == 1
    assert found["fedtune_runs", ("finished",)] == 1
    assert found["fedtune_alarms", ("offline",)] == 1


def test_sites_are_told_with_memory_bytes_and_speed(told: FakeDesk) -> None:
    found = samples(told)
    assert found["fedtune_site_online", ("south",)] == 1
    assert found["fedtune_site_online", ("east",)] == 0
    assert ("fedtune_site_online", ("west",)) not in found  # it has not joined yet
    assert found["fedtune_site_memory_bytes", ("south",)] == 1_250_000_000
    assert found["fedtune_site_step", ("south",)] == 7
    assert found["fedtune_site_link_download_bytes_per_second", ("south",)] == 2_400_000
    assert found["fedtune_site_memory_predicted_bytes", ("spring", "south")] == 1_400_000_000
    assert found["fedtune_site_download_bytes_total", ("spring", "north")] == 6_000_000
    assert found["fedtune_site_refusals_total", ("spring", HOSTILE)] == 1


def test_what_is_not_known_is_left_out(desk: FakeDesk) -> None:
    desk.add_run("spring")
    found = samples(desk)
    assert found["fedtune_run_round", ("spring",)] == 0
    assert ("fedtune_run_held_out_loss", ("spring",)) not in found


def test_without_runs_there_are_counts_alone(desk: FakeDesk) -> None:
    assert samples(desk)["fedtune_runs", ("running",)] == 0


def test_the_end_of_the_certificate_is_told(desk: FakeDesk, home: CoordinatorHome) -> None:
    found = samples(desk, home.certificate)
    assert found["fedtune_certificate_expiry_timestamp_seconds", ()] > 1.7e9


def test_the_file_for_the_health_port_holds_the_same_without_the_process(told: FakeDesk) -> None:
    """That port tells of its own process under the same names, and a name may stand once."""
    text = own_metrics(Readings(told, Path("no.crt"), Path("no.json"))).decode()
    found = {
        sample.name for each in text_string_to_metric_families(text) for sample in each.samples
    }
    assert all(name.startswith("fedtune_") for name in found)
    both = {name for name, _ in samples(told)}
    assert found == {name for name in both if name.startswith("fedtune_")}
    assert any(name.startswith("python_") for name in both)


def test_memory_of_a_site_that_is_gone_is_not_told(told: FakeDesk) -> None:
    there = replace(told.site_entries[3], online=False)
    told.site_entries[3] = there
    assert there.report is not None
    assert there.report.memory_bytes > 0
    assert ("fedtune_site_memory_bytes", ("south",)) not in samples(told)


def test_a_metric_that_the_process_has_too_is_told_once(told: FakeDesk) -> None:
    own = Gauge("fedtune_run_round", "of the desk itself", ["run"])
    try:
        own.labels("spring").set(99)
        assert samples(told)["fedtune_run_round", ("spring",)] == 2
    finally:
        REGISTRY.unregister(own)


# ---------------------------------------------------------------- Grafana


def told_names(told: FakeDesk, home: CoordinatorHome) -> set[str]:
    for metric in (telemetry.CALLS, telemetry.AUTH_REFUSALS, telemetry.SITES):
        metric.labels(*metric._labelnames)  # a family without a sample says no name
    names = {name for name, _ in samples(told, home.certificate)}
    return {n for n in names if n.startswith("fedtune_") and not n.endswith("_created")}


def asked_names(text: str) -> set[str]:
    return set(re.findall(r"\bfedtune_\w+", text))


def test_every_query_of_the_board_names_metrics_that_exist(
    told: FakeDesk, home: CoordinatorHome
) -> None:
    board = json.loads((GRAFANA / "fedtune.json").read_text(encoding="utf-8"))
    exist = told_names(told, home)
    for panel in board["panels"]:
        for target in panel["targets"]:
            asked = asked_names(target["expr"])
            assert asked, panel["title"]
            assert asked <= exist, panel["title"]
    for variable in board["templating"]["list"][1:]:
        assert asked_names(variable["query"]["query"]) <= exist


def test_the_boards_panels_lie_side_by_side() -> None:
    board = json.loads((GRAFANA / "fedtune.json").read_text(encoding="utf-8"))
    taken: set[tuple[int, int]] = set()
    for place in (panel["gridPos"] for panel in board["panels"]):
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken
        assert max(x for x, _ in cells) < 24
        taken |= cells


def test_the_page_lists_every_metric(told: FakeDesk, home: CoordinatorHome) -> None:
    page = ROOT / "docs" / "dashboard.md"
    text = page.read_text(encoding="utf-8")
    assert told_names(told, home) == asked_names(text.partition("## Metrics")[2])


@pytest.mark.parametrize("port", ["9402", "9403"])
def test_prometheus_asks_the_ports_that_are_the_defaults(port: str) -> None:
    fields = {"9402": "dashboard_port", "9403": "health_port"}
    text = (GRAFANA / "prometheus.yml").read_text(encoding="utf-8")
    line = next(each for each in text.splitlines() if port in each)
    assert "targets" in line
    assert fields[port] in text
