"""Tokenizers are read from disk; without transformers the extra to install is named."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fedtune.errors import MissingExtraError, ModelError
from fedtune.model.tokenizer import load_tokenizer, pad_id


def test_a_folder_with_a_tokenizer_gives_it(stories260k: Path) -> None:
    pytest.importorskip("transformers")
    tokenizer = load_tokenizer(stories260k)
    assert tokenizer.decode(tokenizer.encode("Once upon a time")[1:]).strip() == "Once upon a time"


def test_a_folder_without_a_tokenizer_is_one_line(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    with pytest.raises(ModelError, match="no tokenizer can be read from") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def test_without_transformers_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'fedtune\[train\]'"):
        load_tokenizer(tmp_path)


def test_padding_falls_back_to_the_end_token_and_then_to_any() -> None:
    def of(pad: int | None, end: int | None) -> Any:  # Any: stands in for a tokenizer
        return SimpleNamespace(pad_token_id=pad, eos_token_id=end)

    assert [pad_id(of(0, 2)), pad_id(of(None, 2)), pad_id(of(None, None))] == [0, 2, 0]
