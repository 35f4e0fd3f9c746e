"""What the dashboard shows, as metrics for Prometheus.

Names follow Prometheus: base units, `_total` for what only grows. Metrics of a run are those of
the runs that go on, or of the newest if none does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from prometheus_client import generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import REGISTRY, Collector

from fedtune.deploy.certificates import certificate_end
from fedtune.export.device_view import plans_in_force
from fedtune.export.ledger_facts import LedgerFacts, number
from fedtune_server.dashboard.feed import Readings
from fedtune_server.dashboard.model import Deployment, seconds_per_round, traffic
from fedtune_server.desk.view import SiteEntry, SiteReport

_MOST_RUNS = 4

RUN_METRICS = {
    "round": "last round that was joined and saved",
    "rounds": "rounds that the run is to have",
    "held_out_loss": "held-out loss of the joined adapter, last measured",
    "train_loss": "training loss of the last round",
    "round_seconds": "seconds of the last round",
    "mean_round_seconds": "mean seconds of the last five rounds",
    "planned_round_seconds": "seconds of the last round's slowest device, by its plan",
}
RUN_COUNTERS = {
    "restarts": "times that the run's process was started again",
    "refusals": "updates that were refused",
    "late": "times that a round closed without a device that it had asked",
    "sent_bytes": "bytes to the sites, as Flower counts them",
    "received_bytes": "bytes from the sites, as Flower counts them",
}
SITE_METRICS = {
    "online": "1 if the site told of itself in the last half minute",
    "memory_bytes": "memory of the site's training process, while it is online",
    "memory_allowed_bytes": "memory that training may take at the site",
    "round": "round that the site works on",
    "step": "optimiser steps of this round that are done",
    "link_download_bytes_per_second": "measured speed of the site's link, to the site",
    "link_upload_bytes_per_second": "measured speed of the site's link, from the site",
}
DEVICE_METRICS = {
    "memory_predicted_bytes": "peak memory by the site's plan",
    "held_out_loss": "held-out loss on the site's own rows, last measured",
}
DEVICE_COUNTERS = {
    "download_bytes": "bytes of adapters to the site in the rounds of a run",
    "upload_bytes": "bytes of adapters from the site in the rounds of a run",
    "refusals": "updates of the site that were refused",
}


def metrics_text(readings: Readings) -> bytes:
    """Everything that this process tells Prometheus: of the runs, and of the process itself."""
    return generate_latest(_Both(BoardCollector(readings), REGISTRY))


def own_metrics(readings: Readings) -> bytes:
    """The same without the Python process, whose names the health port has for itself."""
    return generate_latest(_Named("fedtune_", _Both(BoardCollector(readings), REGISTRY)))


class _Both(Collector):
    """Two collectors as one; a name that both have is the first one's, as a name stands once."""

    def __init__(self, first: Collector, second: Collector) -> None:
        self._two = first, second

    def collect(self) -> Iterator[Metric]:
        seen: set[str] = set()
        for collector in self._two:
            for family in collector.collect():
                if family.name not in seen:
                    seen.add(family.name)
                    yield family


class _Named(Collector):
    """What of a collector has names that begin so."""

    def __init__(self, prefix: str, inner: Collector) -> None:
        self._prefix, self._inner = prefix, inner

    def collect(self) -> Iterator[Metric]:
        return (each for each in self._inner.collect() if each.name.startswith(self._prefix))


class BoardCollector(Collector):
    """Reads the deployment at each scrape."""

    def __init__(self, readings: Readings) -> None:
        self._readings = readings

    def describe(self) -> Iterable[Metric]:
        """Nothing: a description would take a whole look."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """Every metric, in no order."""
        first = self._readings.deployment("")
        active = [run.name for run in first.runs if run.state in ("running", "stopping")]
        names = active[:_MOST_RUNS] or ([first.shown.name] if first.shown else [])
        shown = [self._readings.deployment(name) for name in names]
        yield from _of_runs(shown)
        yield from _of_sites(first.sites)
        yield from _of_devices(shown)
        yield from _of_all(first, shown)
        end = certificate_end(self._readings.certificate)
        if end is not None:
            name = "fedtune_certificate_expiry_timestamp_seconds"
            yield GaugeMetricFamily(name, "when the certificate ends", end.timestamp())


def _of_all(first: Deployment, shown: Sequence[Deployment]) -> Iterator[Metric]:
    states = Counter(run.state for run in first.runs)
    family = GaugeMetricFamily("fedtune_runs", "runs in each state", labels=["state"])
    for state in ("queued", "running", "stopping", "stopped", "finished", "failed"):
        family.add_metric([state], states[state])
    yield family
    alarms: Counter[str] = Counter()
    causes = {(each.name, each.text) for one in shown or [first] for each in one.attention}
    for name, _ in causes:
        alarms[name] += 1
    family = GaugeMetricFamily("fedtune_alarms", "causes for attention", labels=["alarm"])
    for name, count in sorted(alarms.items()):
        family.add_metric([name], count)
    yield family


def _of_runs(shown: Sequence[Deployment]) -> Iterator[Metric]:
    values = [(one.shown.name, _run_values(one)) for one in shown if one.shown is not None]
    for key, text in RUN_METRICS.items():
        family = GaugeMetricFamily(f"fedtune_run_{key}", text, labels=["run"])
        for name, found in values:
            _add(family, [name], found[key])
        yield family
    for key, text in RUN_COUNTERS.items():
        counter = CounterMetricFamily(f"fedtune_run_{key}", text, labels=["run"])
        for name, found in values:
            _add(counter, [name], found[key])
        yield counter


def _run_values(one: Deployment) -> dict[str, float | None]:
    run, facts = one.shown, one.reading.facts or LedgerFacts()
    assert run is not None
    last = facts.rounds[max(facts.rounds)] if facts.rounds else {}
    curve = facts.held_out()
    kinds = Counter(line.get("kind") for line in one.reading.lines)
    return {
        "round": run.round,
        "rounds": run.rounds,
        "held_out_loss": curve[-1][1] if curve else None,
        "train_loss": number(last, "train_loss"),
        "round_seconds": number(last, "seconds"),
        "mean_round_seconds": seconds_per_round(facts),
        "planned_round_seconds": number(last, "planned_seconds"),
        "restarts": run.restarts,
        "refusals": kinds["device_refused"],
        "late": kinds["device_late"],
        "sent_bytes": run.bytes_sent,
        "received_bytes": run.bytes_received,
    }


def _of_sites(sites: Sequence[SiteEntry]) -> Iterator[Metric]:
    for key, text in SITE_METRICS.items():
        family = GaugeMetricFamily(f"fedtune_site_{key}", text, labels=["site"])
        for site in sites:
            if site.state == "enrolled":
                _add(family, [site.name], _site_values(site)[key])
        yield family


def _site_values(site: SiteEntry) -> dict[str, float | None]:
    told = site.report or SiteReport()
    return {
        "online": float(site.online),
        "memory_bytes": told.memory_bytes if site.online else None,
        "memory_allowed_bytes": told.memory_allowed_bytes,
        "round": told.round,
        "step": told.step,
        "link_download_bytes_per_second": told.link_down_bytes_per_s or None,
        "link_upload_bytes_per_second": told.link_up_bytes_per_s or None,
    }


def _of_devices(shown: Sequence[Deployment]) -> Iterator[Metric]:
    labels = ["run", "site"]
    values = [
        ([one.shown.name, device], found)
        for one in shown
        if one.shown is not None
        for device, found in _device_values(one).items()
    ]
    for key, text in DEVICE_METRICS.items():
        family = GaugeMetricFamily(f"fedtune_site_{key}", text, labels=labels)
        for names, found in values:
            _add(family, names, found[key])
        yield family
    for key, text in DEVICE_COUNTERS.items():
        counter = CounterMetricFamily(f"fedtune_site_{key}", text, labels=labels)
        for names, found in values:
            _add(counter, names, found[key])
        yield counter


def _device_values(one: Deployment) -> dict[str, dict[str, float | None]]:
    facts = one.reading.facts or LedgerFacts()
    sums, plans = traffic(facts), plans_in_force(facts)
    return {
        view.device: {
            "memory_predicted_bytes": number(plans.get(view.device, {}), "peak_bytes"),
            "held_out_loss": view.held_out_loss,
            "download_bytes": sums.get(view.device, (0.0, 0.0))[0],
            "upload_bytes": sums.get(view.device, (0.0, 0.0))[1],
            "refusals": view.refused,
        }
        for view in one.reading.devices
    }


def _add(
    family: GaugeMetricFamily | CounterMetricFamily, labels: list[str], value: float | None
) -> None:
    """A value that is known; an unknown one is left out, as Prometheus wants it."""
    if value is not None:
        family.add_metric(labels, value)
