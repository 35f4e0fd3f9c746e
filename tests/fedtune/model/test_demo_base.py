"""The demo's base is built whole or not at all, once, and any tool can load it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedtune.errors import DataError, ModelError
from fedtune.model.demo_base import (
    DemoBase,
    DemoRecipe,
    build_demo_base,
    learning_rate_factor,
    read_demo_base,
)
from fedtune.model.shapes import read_shapes
from fedtune.model.thread_choice import threads_restored

TINY = DemoRecipe(
    vocabulary=300,
    hidden=32,
    intermediate=64,
    layers=2,
    heads=2,
    window=32,
    batch=4,
    steps=40,
    warm_up=4,
    held_out_stride=10,
)
TEXTS = [
    f"The {thing} of a {place} returns the {thing} that was put into the {place} first."
    for thing in ("item", "name", "value", "lock", "file", "size")
    for place in ("queue", "table", "folder", "list", "stream", "tree", "cache", "heap")
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> DemoBase:
    return build_demo_base(tmp_path_factory.mktemp("demo") / "base", TEXTS, recipe=TINY)


def test_training_lowers_the_held_out_loss_far_below_chance(base: DemoBase) -> None:
    assert base.steps == TINY.steps
    assert base.held_out_loss < 3.0  # chance is ln(300) = 5.7


def test_the_folder_loads_as_a_tied_llama_with_its_tokenizer(base: DemoBase) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base.folder)
    model = AutoModelForCausalLM.from_pretrained(base.folder)
    assert model.config.model_type == "llama"
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.num_parameters() == base.parameters
    assert len(tokenizer) == model.config.vocab_size
    special = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    assert len(special) == 3
    text = "Any text, also \u00fc\u4e2d, is some tokens."
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_every_matrix_of_the_blocks_can_be_adapted(base: DemoBase) -> None:
    assert len(read_shapes(base.folder, ("all-linear",)).matrices) == 7 * TINY.layers


def test_the_same_build_is_not_done_again(base: DemoBase) -> None:
    steps: list[float] = []
    again = build_demo_base(
        base.folder, TEXTS, recipe=TINY, progress=lambda share, loss: steps.append(share)
    )
    assert again == base
    assert not steps


def test_other_text_or_another_seed_builds_anew(tmp_path: Path) -> None:
    short = replace(TINY, steps=2)
    keys = set()
    for texts, seed in ((TEXTS, 0), (TEXTS[:-1], 0), (TEXTS, 1)):
        build_demo_base(tmp_path / "base", texts, recipe=short, seed=seed)
        keys.add(json.loads((tmp_path / "base" / "demo.json").read_text(encoding="utf-8"))["key"])
    assert len(keys) == 3


def test_the_same_seed_gives_the_same_weights(tmp_path: Path) -> None:
    short = replace(TINY, steps=3)
    weights = []
    for name in ("one", "two"):
        folder = build_demo_base(tmp_path / name, TEXTS, recipe=short, seed=5).folder
        weights.append(AutoModelForCausalLM.from_pretrained(folder).state_dict())
        torch.manual_seed(len(name) + len(weights))  # the global generator must not matter
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, msg=name)


def test_the_global_generator_and_the_threads_are_left_as_they_were(tmp_path: Path) -> None:
    with threads_restored():
        torch.set_num_threads(2)  # two steps would leave one
        torch.manual_seed(11)
        before = torch.get_rng_state()
        build_demo_base(tmp_path / "base", TEXTS, recipe=replace(TINY, steps=2))
        assert torch.equal(torch.get_rng_state(), before)
        assert torch.get_num_threads() == 2


def test_the_time_limit_ends_the_training_and_still_leaves_a_base(tmp_path: Path) -> None:
    base = build_demo_base(tmp_path / "base", TEXTS, recipe=TINY, seconds=1e-3)
    assert 0 < base.steps < TINY.steps
    assert read_demo_base(base.folder) == base


def test_a_build_that_is_cut_off_leaves_nothing(tmp_path: Path) -> None:
    def interrupt(share: float, loss: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_demo_base(tmp_path / "base", TEXTS, recipe=TINY, progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_progress_rises_to_the_end(tmp_path: Path) -> None:
    seen: list[float] = []
    short = replace(TINY, steps=4)
    build_demo_base(
        tmp_path / "base", TEXTS, recipe=short, progress=lambda share, loss: seen.append(share)
    )
    assert seen == sorted(seen)
    assert len(seen) == 4
    assert seen[-1] == 1.0


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(ModelError, match="holds files that are no demo base"):
        build_demo_base(tmp_path, TEXTS, recipe=TINY)
    assert (tmp_path / "notes.txt").read_text(encoding="utf-8") == "mine"


def test_too_little_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="needs text for 4 or more windows of 32 tokens, found 0"):
        build_demo_base(tmp_path / "base", TEXTS[:2], recipe=TINY)


def test_the_learning_rate_rises_and_then_falls_to_a_twentieth() -> None:
    rates = [learning_rate_factor(step, step / 100, 10) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9]
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert learning_rate_factor(100, 1.0, 10) == pytest.approx(0.05)
