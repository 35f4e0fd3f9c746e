"""`fedtune status`: what a person and a program read of a run."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
from rich.console import Console

from fedtune.cli.main import main
from fedtune.cli.status_page import print_status
from fedtune.export.run_view import view_run
from fedtune.records import Event
from fedtune_server.ledger import Ledger


def report(number: int, device: str, loss: float) -> Event:
    fields = {"round": number, "device": device, "loss_before": loss, "train_loss": loss / 2}
    return Event("device_reported", fields)


def write_run(folder: Path, devices: int = 2) -> Path:
    """A run that was killed after two of three rounds."""
    folder.mkdir(parents=True)
    names = [f"site-{i}" for i in range(devices)]
    rows = [
        {"device": name, "device_class": "board", "format": "nf4", "rank_min": 1, "rank_max": 8}
        for name in names
    ]
    with Ledger(folder / "ledger.jsonl") as ledger:
        ledger(Event("run_started", {"run": "told-1", "rounds": 3, "devices": devices}))
        ledger(Event("site_excluded", {"device": "17", "reason": "no [red]base\x1b[31m"}))
        ledger(Event("planned", {"devices": rows, "makespan_seconds": 1.0}))
        for number, loss in ((1, 3.0), (2, 2.5)):
            ledger(Event("round_started", {"round": number, "devices": names}))
            for name in names[1:]:
                ledger(report(number, name, loss))
            reason = "norm [bold]too\x1b[31m\nlarge"
            fields = {"round": number, "device": names[0], "reason": reason}
            ledger(Event("device_refused", fields))
            entry = {"device": names[-1], "length": 1.0, "cosine": -0.25, "share": 1.0}
            ledger(Event("updates_compared", {"round": number, "devices": [entry]}))
            fields = {
                "round": number, "held_out_loss": loss, "seconds": 2.0, "dropped_energy": 0.125,
                "download_bytes": 2_000_000, "upload_bytes": 1_000_000,
            }  # fmt: skip
            ledger(Event("round_finished", fields))
        ledger(Event("warning", {"text": "3 samples are cut"}))
    return folder


def page(folder: Path, width: int = 120, encoding: str = "utf-8") -> str:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding, newline="\n")
    print_status(Console(file=stream, width=width, force_terminal=False), view_run(folder))
    stream.flush()
    return raw.getvalue().decode(encoding)


def test_a_person_sees_what_happened_and_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(tmp_path / "runs" / "told")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "torch", None)
    assert main(["status", "told"]) == 0
    out = capsys.readouterr().out
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert lines[0] == (
        "run told-1 stopped, round 2 of 3: it stopped without a word; run the same command again "
        "to continue"
    )
    assert "pace 2.0 s a round" in lines
    assert "traffic 4.0 MB to the devices, 2.0 MB back" in lines
    assert "cut off 12.50% by the rank cap in the last round, at most 12.50%" in lines
    assert "drift cosine with the joined update -0.25 to -0.25, mean -0.25" in lines
    assert "site-0 board nf4 1-8 - - - - - 2" in lines
    assert "site-1 board nf4 1-8 2 2.5000 1.2500 1.000 -0.25 -" in lines
    assert "round 2, site-0 refused: norm [bold]too [31m large" in lines
    assert "17 is left out: no [red]base [31m" in lines
    assert "1 warning: 3 samples are cut" in lines
    assert any(line.startswith("loss 3.0000 → 2.5000") for line in lines)
    assert "\x1b" not in out


def test_a_console_of_few_letters_gets_ascii(tmp_path: Path) -> None:
    shown = page(write_run(tmp_path / "run"), encoding="cp437")
    assert "3.0000 -> 2.5000  @_" in shown


def test_a_narrow_terminal_gets_fewer_columns_and_no_broken_lines(tmp_path: Path) -> None:
    shown = page(write_run(tmp_path / "run"), width=80)
    table = [line for line in shown.splitlines() if "site-1 " in line]
    assert [" ".join(line.split()) for line in table] == ["site-1 1-8 2 2.5000 -0.25 -"]


def test_of_many_devices_those_with_trouble_come_first(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", devices=50)
    with Ledger(folder / "ledger.jsonl") as ledger:
        ledger(Event("device_refused", {"round": 2, "device": "site-49", "reason": "late"}))
    shown = page(folder)
    rows = [line.split()[0] for line in shown.splitlines() if line.startswith(" site-")]
    assert rows[:2] == ["site-0", "site-49"]
    assert len(rows) == 30
    assert "and 20 more; --json has all" in shown


def test_json_is_one_object_with_every_device(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_run(tmp_path / "run", devices=40)
    assert main(["status", str(folder), "--json"]) == 0
    tree = json.loads(capsys.readouterr().out)
    assert (tree["state"], tree["round"], tree["rounds"]) == ("stopped", 2, 3)
    assert tree["held_out"] == [[0, 3.0], [1, 2.5]]
    assert len(tree["devices"]) == 40
    assert tree["devices"][0]["refused"] == 2
    assert tree["excluded"] == {"17": "no [red]base\x1b[31m"}


@pytest.mark.parametrize("verb", ["status", "verify"])
def test_a_folder_without_a_run_is_one_line_on_stderr(
    verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([verb, str(tmp_path)]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith(f"error: {tmp_path} is a folder without a run; ")
    assert shown.err.count("\n") == 1


def test_a_damaged_ledger_is_one_line_on_stderr(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "ledger.jsonl").write_bytes(b"hello\n")
    assert main(["status", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert "line 1 of" in err
    assert "check the ledger with: fedtune verify" in err
