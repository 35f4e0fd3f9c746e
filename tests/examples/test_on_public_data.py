"""The shipped run files, on a real tiny model and real public data beside the repository."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from fedtune.cli.simulate import simulate_config
from fedtune.config import load_run_config
from fedtune.records import Event

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("example", "data", "sites"),
    [("e2e-restaurants", "e2e_nlg", 12), ("medquad-hospitals", "medquad", 9)],
)
def test_an_example_runs_on_public_data_and_lowers_the_loss(
    example: str, data: str, sites: int, shared_folder: Path, stories260k: Path, tmp_path: Path
) -> None:
    overrides = (
        f"model.path={stories260k}",
        f"data.train={shared_folder / 'data' / data / 'train.jsonl'}",
        f"outputs.folder={tmp_path / 'run'}",
        'outputs.exports=["merged"]',
        "run.rounds=2",
        "data.max_tokens=192",  # the tiny tokenizer takes several tokens a word
        "train.local_steps=2",
        "train.batch_size=8",
        "train.learning_rate=1e-2",
        "train.schedule=constant",
        "simulation.threads=1",
    )
    config = load_run_config(EXAMPLES / example / "run.toml", overrides)
    events: list[Event] = []
    folder = simulate_config(config, watch=events.append)
    fields = {event.kind: event.fields for event in events}
    planned = fields["planned"]["devices"]
    assert isinstance(planned, list)
    assert len(planned) == sites
    assert len({row["format"] for row in planned}) >= 2
    assert len({row["rank_max"] for row in planned}) == 3
    finished = fields["run_finished"]
    assert finished["held_out_loss_after"] < finished["held_out_loss_before"]  # type: ignore[operator]
    AutoModelForCausalLM.from_pretrained(folder / "exports" / "merged")
