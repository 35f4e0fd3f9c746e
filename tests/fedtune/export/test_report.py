from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path

import pytest

from fedtune.errors import RunError
from fedtune.export.report import write_report

KINDS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
KINDS += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
CLASSES = {
    "laptop": ("fp32", 4),
    "jetson-orin-nano": ("nf4", 8),
    "workstation-8gb": ("int8", 12),
    "h200": ("bf16", 32),
}
Event = dict[str, object]


def synthetic_run(devices: int = 3, rounds: int = 4, layers: int = 5) -> list[Event]:
    """The events of a run that never was, with every kind that a ledger can hold."""
    names = [f"site-{index:02d}" for index in range(devices)]
    events: list[Event] = [
        {
            "kind": "run_started",
            "run": "restaurants",
            "rounds": rounds,
            "devices": devices + 1,
            "rule": "delta",
            "seed": 7,
            "versions": {"fedtune": "0.1.0", "flwr": "1.41.0"},
        },
        {"kind": "site_excluded", "device": "site-empty", "reason": "no training samples"},
        *(
            {
                "kind": "site_reported",
                "device": name,
                "device_class": class_of(index),
                "train_samples": 90,
                "train_tokens": 12345,
            }
            for index, name in enumerate(names)
        ),
        {
            "kind": "leaves_device",
            "stage": "calibration",
            "tensors": [{"name": "model.layers.0.mlp.up_proj.left", "shape": [9], "bytes": 36}],
        },
        {
            "kind": "importance_found",
            "method": "spectrum",
            "source": "measured",
            "tokens": 23214,
            "top": {"model.layers.0.mlp.up_proj": 0.25},
        },
        {"kind": "planned", "devices": [plan(i, name, layers) for i, name in enumerate(names)]},
        {
            "kind": "leaves_device",
            "stage": "round",
            "tensors": [
                {"name": f"model.layers.{layer}.{kind}.a", "shape": [8, 64], "bytes": 2048}
                for layer in range(layers)
                for kind in KINDS
            ],
        },
    ]
    for number in range(1, rounds + 1):
        events += round_events(number, names)
    events += [
        {
            "kind": "replanned",
            "round": 2,
            "device": names[0],
            "cause": "memory",
            "reason": "12.0 MB of memory are free, the plan takes 34.6 MB",
            "change": "format int8 -> nf4, micro_batch 4 -> 1",
        },
        {"kind": "warning", "text": "site-00 has 3 samples longer than 256 tokens"},
        {
            "kind": "evaluated",
            "round": rounds,
            "held_out_loss": loss(rounds, 0),
            "devices": {name: loss(rounds, index) for index, name in enumerate(names)},
        },
        {
            "kind": "exported",
            "paths": {"merged": "exports/merged", "peft": "exports/peft"},
            "skipped": {"onnx": "torch.onnx cannot export MambaForCausalLM: no such operator"},
        },
        {
            "kind": "run_finished",
            "seconds": 754.2,
            "planned_seconds": 612.0,
            "held_out_loss_before": loss(0, 0),
            "held_out_loss_after": loss(rounds, 0),
        },
    ]
    return [{**event, "time": 1000.0 + index} for index, event in enumerate(events)]


def class_of(index: int) -> str:
    return list(CLASSES)[index % len(CLASSES)]


def loss(rounds: int, index: int) -> float:
    return 1.1 + 1.9 * math.exp(-rounds / 5) + 0.07 * math.sin(index * 2.1)


def plan(index: int, name: str, layers: int) -> Event:
    form, rank = CLASSES[class_of(index)]
    first = index % 3
    ranks = {
        f"model.layers.{layer}.{kind}": max(1, rank - at) if layer >= first else 0
        for layer in range(layers)
        for at, kind in enumerate(KINDS)
    }
    budget = 250_000_000 * (1 + index % 4)
    return {
        "device": name,
        "device_class": class_of(index),
        "format": form,
        "ranks": ranks,
        "rank_min": min(r for r in ranks.values() if r),
        "rank_max": rank,
        "trained_matrices": sum(r > 0 for r in ranks.values()),
        "micro_batch": 4,
        "local_steps": 3,
        "batch_size": 16,
        "sequence_length": 128,
        "checkpointing": index % 2 == 0,
        "peak_bytes": int(budget * (0.5 + 0.04 * (index % 12))),
        "budget_bytes": budget,
        "seconds": 2.5 + index,
        "download_bytes": 400_000,
        "upload_bytes": 380_000,
        "binding": "memory" if index % 2 else "round time of the slowest device",
    }


def round_events(number: int, names: Sequence[str]) -> list[Event]:
    refused = names[1] if number == 2 else ""
    events: list[Event] = [{"kind": "round_started", "round": number, "devices": list(names)}]
    for index, name in enumerate(names):
        if name == refused:
            reason = "norm of layers.3.q_proj is 1e9, the limit is 100"
            events.append(
                {"kind": "device_refused", "round": number, "device": name, "reason": reason}
            )
            continue
        events.append(
            {
                "kind": "device_reported",
                "round": number,
                "device": name,
                "loss_before": loss(number - 1, index) if number % 2 else None,
                "train_loss": loss(number - 1, index) - 0.2,
                "samples": 80,
                "tokens": 4000,
                "download_bytes": 400_000 + 90_000 * index,
                "upload_bytes": 380_000 + 90_000 * index,
                "seconds": 2.4 + index,
                "peak_bytes": 140_000_000 if index % 2 else None,
            }
        )
    return [
        *events,
        {
            "kind": "round_finished",
            "round": number,
            "reported": len(names) - bool(refused),
            "refused": int(bool(refused)),
            "held_out_loss": loss(number - 1, 0),
            "train_loss": loss(number - 1, 0) - 0.2,
            "seconds": 9.0 + number % 3,
            "download_bytes": 1_200_000,
            "upload_bytes": 1_100_000,
            "dropped_energy": 0.0123,
        },
    ]


def write_ledger(folder: Path, events: Sequence[Event], tail: str = "") -> None:
    text = "".join(json.dumps(event) + "\n" for event in events)
    (folder / "ledger.jsonl").write_text(text + tail, encoding="utf-8")


def report_of(folder: Path, events: Sequence[Event], tail: str = "") -> str:
    write_ledger(folder, events, tail)
    return write_report(folder).read_text(encoding="utf-8")


class _Balance(HTMLParser):
    """Fails on a tag that is not closed in order."""

    VOID = ("meta",)

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID and tag != "br":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def assert_well_formed(page: str) -> None:
    parser = _Balance()
    parser.feed(page)
    parser.close()
    assert parser.open == []


def test_the_page_is_whole_and_fetches_nothing(tmp_path: Path) -> None:
    page = report_of(tmp_path, synthetic_run())
    assert_well_formed(page)
    assert not re.search(r"<script|<link|<img|src=|href=|url\(|@import|https?://", page)
    assert [path.name for path in tmp_path.glob("*.html*")] == ["report.html"]


def test_the_header_shows_the_loss_before_and_after(tmp_path: Path) -> None:
    page = report_of(tmp_path, synthetic_run(rounds=4))
    before, after = loss(0, 0), loss(4, 0)
    assert f"<b>{before:.4f}</b><small>held-out loss before" in page
    assert f"<b>{after:.4f}</b><small>held-out loss after ({after / before - 1:+.1%})" in page
    assert 'class="chip finished">finished<' in page
    assert "12 min 34 s" in page


def test_a_rounds_held_out_loss_is_that_of_the_round_before(tmp_path: Path) -> None:
    page = report_of(tmp_path, synthetic_run(rounds=4))
    for rounds in range(5):
        assert f"<title>all devices, {rounds}: {loss(rounds, 0):.4g}</title>" in page
    assert f"<title>site-00, 2: {loss(2, 0):.4g}</title>" in page  # measured in round 3
    assert f"<title>site-00, 1: {loss(0, 0) - 0.2:.4g}</title>" in page  # training loss


def test_the_plan_shows_ranks_limits_and_what_was_measured(tmp_path: Path) -> None:
    page = report_of(tmp_path, synthetic_run())
    assert "<title>site-01: model.layers.1.self_attn.k_proj: rank 7</title>" in page
    assert "<title>site-01: model.layers.0.self_attn.q_proj: frozen</title>" in page
    assert '270 MB of 500 MB<div class="track" title="54% of the budget">' in page
    assert "<small class='soft'>measured 140 MB</small>" in page
    assert "round time of the slowest device" in page
    assert "<code>self_attn.q_proj</code>, <code>self_attn.k_proj</code>" in page


def test_the_plan_says_what_the_ranks_follow_and_how_many_steps_a_device_takes(
    tmp_path: Path,
) -> None:
    page = report_of(tmp_path, synthetic_run())
    assert "Ranks follow importance: spectrum, measured on 23\N{NARROW NO-BREAK SPACE}214" in page
    assert "Most gain: <code>model.layers.0.mlp.up_proj</code> 25.0%." in page
    assert "3 local steps" in page


def test_what_was_measured_once_is_no_part_of_what_a_round_sends(tmp_path: Path) -> None:
    """A run that fails before round 1 has no other list."""
    page = report_of(tmp_path, [e for e in synthetic_run() if e.get("stage") != "round"])
    assert "What leaves a device in a round" not in page


def test_bytes_of_a_device_are_the_sums_over_its_rounds(tmp_path: Path) -> None:
    page = report_of(tmp_path, synthetic_run(devices=2, rounds=4))
    # site-01 was refused once: three rounds of 490 kB down and 470 kB up
    row = '<td>site-01</td><td class="n">1.47 MB</td><td class="n">1.41 MB</td>'
    assert row in page
    assert "What leaves a device in a round: 35 tensors, 71.7 kB" in page


def test_refusals_warnings_and_outputs_are_told(tmp_path: Path) -> None:
    page = report_of(tmp_path, synthetic_run())
    assert "<td>2</td><td>site-01</td><td>norm of layers.3.q_proj is 1e9" in page
    assert "<td>before</td><td>site-empty</td><td>no training samples</td>" in page
    assert "site-00 has 3 samples longer than 256 tokens" in page
    assert "<td>peft</td><td>exports/peft</td>" in page
    assert "<td>onnx</td><td>skipped: torch.onnx cannot export Mamba" in page


def test_new_plans_are_told_with_their_reason(tmp_path: Path) -> None:
    page = report_of(tmp_path, synthetic_run())
    assert "<h2>New plans</h2>" in page
    assert "<td>2</td><td>site-00</td><td>12.0 MB of memory are free, the plan takes" in page
    assert "<td>format int8 -&gt; nf4, micro_batch 4 -&gt; 1</td>" in page
    assert "<h2>New plans</h2>" not in report_of(tmp_path, synthetic_run()[:5])
    assert "by their plans</dt><dd>10 min 12 s</dd>" in page


def test_names_of_devices_cannot_write_into_the_page(tmp_path: Path) -> None:
    hostile = '<img src=x onerror="alert(1)">'
    text = json.dumps(synthetic_run()).replace("site-01", json.dumps(hostile)[1:-1])
    page = report_of(tmp_path, json.loads(text))
    assert "<img" not in page
    assert_well_formed(page)


def test_many_devices_are_coloured_by_class(tmp_path: Path) -> None:
    page = report_of(tmp_path, synthetic_run(devices=14, layers=32))
    legend = re.findall(r'<li><i class="c\d"></i>([^<]+)</li>', page)
    assert legend == list(CLASSES)
    assert page.count('<g class="line c') == 28  # held-out and training


def test_an_unfinished_run_has_a_report(tmp_path: Path) -> None:
    events = synthetic_run()
    for length in range(len(events)):
        page = report_of(tmp_path, events[:length], tail='{"kind": "round_fin')
        assert_well_formed(page)
        assert "not finished" in page


def test_a_continued_run_tells_each_round_once(tmp_path: Path) -> None:
    events = synthetic_run(devices=2, rounds=4)
    again = [event for event in events if event.get("round") == 4 or event["kind"] == "run_started"]
    split = next(i for i, e in enumerate(events) if e["kind"] == "evaluated")
    twice = events[:split] + again + events[split:]
    assert report_of(tmp_path, twice) == report_of(tmp_path, events)


def test_the_test_loss_of_base_and_merged_model_is_shown(tmp_path: Path) -> None:
    tested: Event = {"kind": "tested", "rows": 9, "base_loss": 2.5, "merged_loss": 1.25}
    page = report_of(tmp_path, [*synthetic_run(), tested])
    assert "<b>1.2500</b><small>test loss of the merged model, of the base 2.5000<" in page


def test_exports_that_lie_in_the_folder_are_listed(tmp_path: Path) -> None:
    (tmp_path / "exports").mkdir()
    (tmp_path / "exports" / "model.onnx").write_bytes(b"")
    page = report_of(tmp_path, synthetic_run())
    assert "<td>onnx</td><td>exports/model.onnx</td>" in page
    assert "skipped" not in page


def test_a_failed_run_says_why(tmp_path: Path) -> None:
    failed: Event = {"kind": "run_failed", "reason": "only 1 of 3 devices reported"}
    page = report_of(tmp_path, [*synthetic_run()[:-3], failed])
    assert 'class="chip failed">failed<' in page
    assert "only 1 of 3 devices reported" in page


def test_a_missing_or_damaged_ledger_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"ledger\.jsonl cannot be read.*name the folder of a run"):
        write_report(tmp_path)
    write_ledger(tmp_path, [], tail='{"kind"\n{"kind": "warning", "text": "x"}\n')
    with pytest.raises(RunError, match=r"line 1 of .*ledger\.jsonl is not JSON"):
        write_report(tmp_path)
    write_ledger(tmp_path, [], tail="[1]\n")
    with pytest.raises(RunError, match=r"line 1 of .* is not a JSON object: \[1\]"):
        write_report(tmp_path)


def test_the_report_needs_no_torch() -> None:
    code = "import sys, fedtune.export.report, fedtune.wire.checkpoint; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "flwr"} & set(done.stdout.split())


def test_drift_between_devices_is_a_curve_and_a_table(tmp_path: Path) -> None:
    entries = [
        {"device": "site-00", "length": 1.0, "cosine": 0.8125, "share": 0.5},
        {"device": "site-01", "length": 1.0, "cosine": None, "share": 0.5},
    ]
    compared: Event = {"kind": "updates_compared", "round": 2, "devices": entries}
    page = report_of(tmp_path, [*synthetic_run(), compared])
    assert_well_formed(page)
    drift = page[page.index("Drift between devices") :]
    assert "<title>site-00, 2: 0.8125</title>" in drift
    assert '<td>2</td><td class="n">0.8125</td>' in drift
    assert "Drift between devices" not in report_of(tmp_path, synthetic_run())
