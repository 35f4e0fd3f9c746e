"""A model and data that need nothing beside the repository, and a run on them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fedtune.cli.simulate import simulate_config
from fedtune.config import parse_run_config
from fedtune.records import Event

Tree = dict[str, dict[str, object]]

COLOURS = ("red", "green", "blue", "white")
CLIENTS = ("north", "south", "east", "west")


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained Llama of 20 thousand parameters whose tokens are bytes."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<s>", "</s>", "<pad>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        initializer_range=0.2,  # embeddings stay frozen: smaller ones could not move a logit
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def colour_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """96 rows of four clients; each asks for colours, and the answer repeats them."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    rows = [
        {
            "prompt": f"{first} {second}",
            "response": f"{second} and {first}",
            "client": CLIENTS[(i + j) % len(CLIENTS)],
        }
        for i, first in enumerate(COLOURS * 2)
        for j, second in enumerate(COLOURS * 3)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def tree(tiny_llama: Path, colour_rows: Path, tmp_path: Path) -> Tree:
    """A run of four sites on three classes of devices; a test changes what it wants."""
    return {
        "run": {"name": "flow", "rounds": 2},
        "model": {"path": str(tiny_llama)},
        "data": {
            "train": str(colour_rows),
            "max_tokens": 40,
            "partition": {"by": "field", "field": "client"},
        },
        "fleet": {
            "server": {"count": 1, "memory": "32 MB", "formats": ["fp32"]},
            "laptop": {"count": 2, "memory": "1.5 MB", "formats": ["int8"], "rank_max": 4},
            "board": {"count": 1, "memory": "700 kB", "formats": ["nf4"], "upload": "8 kB"},
        },
        "lora": {"rank_max": 8, "rank_cap": 16},
        "train": {"local_steps": 2, "batch_size": 8, "learning_rate": 1e-2},
        "simulation": {"threads": 1},
        "outputs": {"folder": str(tmp_path / "run"), "exports": []},
    }


class Played:
    """A finished run: its folder and its events."""

    def __init__(self, folder: Path, events: list[Event]) -> None:
        self.folder, self.events = folder, events

    def all(self, kind: str) -> list[Mapping[str, object]]:
        return [event.fields for event in self.events if event.kind == kind]

    def one(self, kind: str) -> Mapping[str, object]:
        (fields,) = self.all(kind)
        return fields


@pytest.fixture
def play() -> Callable[[Tree], Played]:
    """Simulate a tree of settings and keep what happened."""

    def run(tree: Tree) -> Played:
        events: list[Event] = []
        folder = simulate_config(parse_run_config(tree, "test"), watch=events.append)
        return Played(folder, events)

    return run
