"""`fedtune verify`: a finished run is proven, and whatever is changed in its folder is found."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fedtune.cli.main import main
from fedtune.cli.simulate import simulate_config
from fedtune.config import parse_run_config
from fedtune.records import Event
from fedtune.wire.checkpoint import read_checkpoint, write_checkpoint
from fedtune_server.ledger import Ledger

Verify = Callable[..., tuple[int, dict[str, tuple[str, str]]]]

LAST = "checkpoints/round-0002.safetensors"
MERGED = "exports/merged/model.safetensors"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, colour_rows: Path) -> Path:
    """A run of two rounds with a merged model and a PEFT adapter."""
    folder = tmp_path_factory.mktemp("verify") / "proven"
    tree = {
        "run": {"name": "proven", "rounds": 2},
        "model": {"path": str(tiny_llama)},
        "data": {"train": str(colour_rows), "max_tokens": 40},
        "fleet": {
            "large": {"count": 1, "memory": "32 MB", "formats": ["fp32"]},
            "small": {"count": 2, "memory": "2 MB", "formats": ["nf4"], "rank_max": 1},
        },
        "lora": {"rank_max": 2, "rank_cap": 4},
        "train": {"local_steps": 1, "batch_size": 4},
        "simulation": {"threads": 1},
        "outputs": {"folder": str(folder), "exports": ["merged", "peft"]},
    }
    simulate_config(parse_run_config(tree, "test"), watch=lambda event: None)
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of the run that a test may change."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture
def verify(run: Path, capsys: pytest.CaptureFixture[str]) -> Verify:
    """Exit code, and subject -> outcome and text, of the copy."""

    def call(*options: str) -> tuple[int, dict[str, tuple[str, str]]]:
        code = main(["verify", str(run), "--json", *options])
        tree = json.loads(capsys.readouterr().out)
        assert tree["ok"] == (code == 0)
        return code, {c["subject"]: (c["outcome"], c["text"]) for c in tree["checks"]}

    return call


def test_an_intact_run_is_proven_down_to_its_tensors(verify: Verify) -> None:
    code, checks = verify("--deep")
    assert code == 0
    assert {outcome for outcome, _ in checks.values()} == {"ok"}
    assert set(checks) >= {
        "ledger", "status.json", "config.json", "plan.json", "checkpoints", LAST,
        "checkpoints/round-0001.safetensors", "exports/merged", "exports/peft",
        "exports/merged made again", "exports/peft made again",
    }  # fmt: skip


def test_a_person_reads_a_line_per_check(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(run)]) == 0
    out = capsys.readouterr().out.splitlines()
    assert all(line.startswith("ok ") for line in out[:-1])
    assert out[-1] == "nothing is wrong"
    (run / LAST).unlink()
    assert main(["verify", str(run)]) == 2
    assert "wrong    checkpoints: expected one of round 2, found round 1" in capsys.readouterr().out


def test_it_needs_no_torch(verify: Verify, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    assert verify()[0] == 0


# ---------------------------------------------------------------- what is changed is found


def _edit_json(path: Path, change: Callable[[dict[str, dict[str, object]]], None]) -> None:
    tree = json.loads(path.read_text(encoding="utf-8"))
    change(tree)
    path.write_text(json.dumps(tree), encoding="utf-8")


def _change_loss(run: Path) -> None:
    path = run / "ledger.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"train_loss":', b'"train_loss":1', 1))


def _drop_line(run: Path) -> None:
    lines = (run / "ledger.jsonl").read_bytes().split(b"\n")
    (run / "ledger.jsonl").write_bytes(b"\n".join(lines[:9] + lines[10:]))


def _append_half(run: Path) -> None:
    with (run / "ledger.jsonl").open("ab") as file:
        file.write(b'{"seq"')


def _flip_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def _replace_checkpoint(run: Path) -> None:
    """Another adapter under a digest of its own, as a careful hand would do it."""
    found = read_checkpoint(run / LAST)
    first = next(iter(found.adapter.matrices.values()))
    first.sigma[...] *= np.float32(2)
    write_checkpoint(run / "checkpoints", found.adapter, found.extra, found.meta)


def _rename_checkpoint(run: Path) -> None:
    for suffix in ("", ".sha256"):
        old = run / "checkpoints" / f"round-0001.safetensors{suffix}"
        (run / f"{LAST}{suffix}").write_bytes(old.read_bytes())


def _plan_rank(tree: dict[str, dict[str, dict[str, object]]]) -> None:
    tree["classes"]["large"]["rank"] = 1


def _seal_plan(run: Path) -> None:
    """Change the plan and give it a checksum that fits."""
    from fedtune.plan.plan_file import checksum

    _edit_json(run / "plan.json", _plan_rank)  # type: ignore[arg-type]
    _edit_json(run / "plan.json", lambda tree: tree.update(checksum=checksum(tree)))  # type: ignore[call-arg]


TAMPERING: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "a number in the ledger": (_change_loss, "ledger", "hash is not that of the line"),
    "a line of the ledger": (_drop_line, "ledger", "lines are missing"),
    "an empty ledger": (
        lambda run: (run / "ledger.jsonl").write_bytes(b""),
        "ledger", "expected a line per event, found none",
    ),
    "no ledger": (lambda run: (run / "ledger.jsonl").unlink(), "ledger", "cannot be read"),
    "half a line behind the end": (
        _append_half, "ledger", "a half one",
    ),
    "the state": (
        lambda run: _edit_json(run / "status.json", lambda t: t.update(state="failed")),
        "status.json", "expected the state finished, found failed",
    ),
    "the round": (
        lambda run: _edit_json(run / "status.json", lambda t: t.update(round=1)),
        "status.json", "expected round 2, found 1",
    ),
    "no status": (lambda run: (run / "status.json").unlink(), "status.json", "no such file"),
    "the seed": (
        lambda run: _edit_json(run / "config.json", lambda t: t["run"].update(seed=9)),
        "config.json", "seed: expected 0, found 9",
    ),
    "no settings": (lambda run: (run / "config.json").unlink(), "config.json", "no such file"),
    "a rank of the plan": (
        lambda run: _edit_json(run / "plan.json", _plan_rank), "plan.json", "checksum",
    ),
    "a rank of a sealed plan": (_seal_plan, "plan.json", ": expected 2, found 1"),
    "no plan": (lambda run: (run / "plan.json").unlink(), "plan.json", "cannot be read"),
    "a bit of a checkpoint": (lambda run: _flip_byte(run / LAST), LAST, "is damaged"),
    "a checkpoint with its digest": (_replace_checkpoint, LAST, "of the ledger, found"),
    "another round's checkpoint": (_rename_checkpoint, LAST, "it holds round 1"),
    "no last checkpoint": (
        lambda run: (run / LAST).unlink(), "checkpoints", "expected one of round 2, found round 1",
    ),
    "no checkpoint": (
        lambda run: shutil.rmtree(run / "checkpoints"), "checkpoints", "round 2, found none",
    ),
    "a weight of the merged model": (
        lambda run: _flip_byte(run / MERGED), "exports/merged", f"{MERGED}: expected sha256",
    ),
    "a file more": (
        lambda run: (run / "exports/merged/modeling.py").write_text("import os"),
        "exports/merged", "exports/merged/modeling.py is not of the run",
    ),
    "a file less": (
        lambda run: (run / "exports/peft/adapter_config.json").unlink(),
        "exports/peft", "expected exports/peft/adapter_config.json, found no such file",
    ),
    "a whole export less": (
        lambda run: shutil.rmtree(run / "exports/merged"), "exports/merged", "no such file",
    ),
    "an export more": (
        lambda run: (run / "exports/model.onnx").write_bytes(b"onnx"),
        "exports/model.onnx", "expected none, found 1 file",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", TAMPERING)
def test_what_is_changed_is_found(run: Path, verify: Verify, what: str) -> None:
    tamper, subject, words = TAMPERING[what]
    tamper(run)
    code, checks = verify()
    assert code == 2
    outcome, text = checks[subject]
    assert outcome == "wrong"
    assert words in text
    others = {name for name, (outcome, _) in checks.items() if outcome == "wrong"} - {subject}
    assert not others, "only what was changed is called wrong"


def _cut(run: Path, kind: str, keep: bool = False) -> None:
    """End the ledger before, or behind, the last line of a kind, as a kill would."""
    lines = (run / "ledger.jsonl").read_bytes().splitlines(keepends=True)
    last = max(i for i, line in enumerate(lines) if f'"kind":"{kind}"'.encode() in line)
    (run / "ledger.jsonl").write_bytes(b"".join(lines[: last + keep]) + b'{"seq":')
    _edit_json(run / "status.json", lambda t: t.update(state="running", round=1))


def test_a_killed_run_is_right_as_far_as_it_came(run: Path, verify: Verify) -> None:
    _cut(run, "exported")
    code, checks = verify()
    assert code == 0
    assert "half a line follows" in checks["ledger"][1]
    assert checks["exports/merged"][0] == checks["exports/peft"][0] == "unproven"
    shutil.rmtree(run / "exports")
    assert {outcome for outcome, _ in verify()[1].values()} == {"ok"}
    assert verify("--deep")[1]["exports"][0] == "unproven"


def test_a_continued_run_has_the_rounds_that_it_was_continued_for(
    run: Path, verify: Verify
) -> None:
    with Ledger(run / "ledger.jsonl") as ledger:
        ledger(Event("run_resumed", {"round": 2, "rounds": 3}))
    assert verify()[1]["config.json"] == ("wrong", "rounds: expected 3, found 2")
    _edit_json(run / "config.json", lambda t: t["run"].update(rounds=3))
    assert verify()[1]["config.json"][0] == "ok"


def test_a_kill_between_a_checkpoint_and_its_line_is_no_fault(run: Path, verify: Verify) -> None:
    shutil.rmtree(run / "exports")
    _cut(run, "checkpoint_saved")
    code, checks = verify()
    assert code == 0
    assert checks[LAST] == ("unproven", "it is whole, and the ledger does not name it")
    _cut(run, "round_finished")  # but one of a round that the ledger does not have at all is
    code, checks = verify()
    assert code == 2
    assert checks["checkpoints"] == ("wrong", "expected one of round 1, found round 2")


def test_making_it_again_finds_other_weights(run: Path, verify: Verify) -> None:
    """The files may be others than the ledger's, as after `fedtune export`; the tensors may not."""
    tensors = load_file(run / MERGED)
    save_file(tensors, run / MERGED, {"format": "pt", "note": "written again"})
    code, checks = verify("--deep")
    assert checks["exports/merged"][0] == "wrong"
    assert checks["exports/merged made again"][0] == "ok"
    name = sorted(tensors)[0]
    tensors[name] = tensors[name].copy()
    tensors[name].reshape(-1)[0] += 1
    save_file(tensors, run / MERGED, {"format": "pt"})
    code, checks = verify("--deep")
    assert code == 2
    assert f"tensor {name} differs" in checks["exports/merged made again"][1]
    del tensors[name]
    save_file(tensors, run / MERGED, {"format": "pt"})
    assert f"tensor {name} is missing" in verify("--deep")[1]["exports/merged made again"][1]
    (run / MERGED).write_bytes(b"\xff" * 40)
    assert "cannot be read" in verify("--deep")[1]["exports/merged made again"][1]


def test_exports_written_again_are_those_of_the_ledger(
    run: Path, verify: Verify, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(run), "--format", "merged", "--format", "peft"]) == 0
    capsys.readouterr()
    code, checks = verify()
    assert code == 0, checks
