"""Samples: which tokens a row becomes, which carry loss, and what happens to long ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedtune.data.rows import Row
from fedtune.data.samples import Sample, SampleBuilder, SampleSet, build_samples, site_labels
from fedtune.errors import DataError
from fedtune.model.tokenizer import load_tokenizer
from fedtune.settings import DataSection


class Words:
    """Splits at spaces; 1 begins and 2 ends; an encoder frames a text with 8 and 9."""

    chat_template: object = None

    def __init__(self, bos: int | None = 1, eos: int | None = 2) -> None:
        self.bos_token_id = bos
        self.eos_token_id = eos

    def encode(self, text: str, *, add_special_tokens: bool, **_: object) -> list[int]:
        words = [100 + int(word) for word in text.split()]
        return [8, *words, 9] if add_special_tokens else words

    def apply_chat_template(self, conversation: list[dict[str, str]], **_: object) -> str:
        raise AssertionError

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [str(i) for i in ids]


def row(**values: object) -> Row:
    return Row("f", 1, values)


def data(**values: Any) -> DataSection:  # Any: keys of several types
    return DataSection(train="t", **{"prompt_template": "0 {prompt}", **values})


def shown(sample: Sample | None) -> list[str]:
    """Tokens as texts, those with loss in brackets."""
    assert sample is not None
    assert sample.tokens.dtype == np.int32
    assert sample.loss_mask.dtype == np.bool_
    return [
        f"[{token}]" if learned else str(token)
        for token, learned in zip(sample.tokens, sample.loss_mask, strict=True)
    ]


PAIR = row(prompt="1 2", response="3 4 5")


def test_loss_falls_on_the_response_and_the_end() -> None:
    sample = SampleBuilder(Words(), data()).build(PAIR)
    assert shown(sample) == ["1", "100", "101", "102", "[103]", "[104]", "[105]", "[2]"]
    assert sample is not None
    assert (sample.label, sample.truncated, sample.loss_tokens) == (-1, False, 4)


def test_tokenizers_without_begin_or_end_tokens_work() -> None:
    sample = SampleBuilder(Words(None, None), data()).build(PAIR)
    assert shown(sample) == ["100", "101", "102", "[103]", "[104]", "[105]"]


def test_braces_in_prompt_and_template_stay_as_they_are() -> None:
    seen: list[str] = []

    class Recorder(Words):
        def encode(self, text: str, *, add_special_tokens: bool, **_: object) -> list[int]:
            seen.append(text)
            return [5]

    template = '{"q": "{prompt}"} {{}}'
    SampleBuilder(Recorder(), data(prompt_template=template)).build(row(prompt="{x}", response=""))
    assert seen[0] == '{"q": "{x}"} {{}}'


def test_truncation_cuts_the_response_on_the_right() -> None:
    sample = SampleBuilder(Words(), data(max_tokens=6)).build(PAIR)
    assert shown(sample) == ["1", "100", "101", "102", "[103]", "[104]"]
    assert sample is not None
    assert sample.truncated


def test_a_sample_that_keeps_no_loss_token_is_dropped() -> None:
    assert SampleBuilder(Words(), data(max_tokens=4)).build(PAIR) is None
    assert SampleBuilder(Words(), data(max_tokens=5)).build(PAIR) is not None


def test_long_samples_are_dropped_when_asked() -> None:
    builder = SampleBuilder(Words(), data(max_tokens=7, too_long="drop"))
    assert builder.build(PAIR) is None
    assert builder.build(row(prompt="1 2", response="3 4")) is not None


def test_loss_falls_on_all_text_but_the_first_token() -> None:
    section = data(format="text")
    assert shown(SampleBuilder(Words(), section).build(row(text="1 2"))) == [
        "1",
        "[101]",
        "[102]",
        "[2]",
    ]
    assert shown(SampleBuilder(Words(bos=None), section).build(row(text="1 2"))) == [
        "101",
        "[102]",
        "[2]",
    ]
    assert SampleBuilder(Words(), section).build(row(text=" ")) is None


def test_a_class_is_an_index_among_the_sorted_labels() -> None:
    builder = SampleBuilder(Words(), data(format="text-label"), ("no", "yes", "maybe"))
    sample = builder.build(row(text="1 2", label="no"))
    assert shown(sample) == ["8", "101", "102", "9"]
    assert sample is not None
    assert sample.label == 1


def test_truncation_keeps_an_encoders_special_tokens() -> None:
    section = data(format="text-label", max_tokens=5)
    sample = SampleBuilder(Words(), section, ("a",)).build(row(text="1 2 3 4 5", label="a"))
    assert shown(sample) == ["8", "101", "102", "103", "9"]
    assert sample is not None
    assert sample.truncated


def test_an_unknown_label_names_its_line() -> None:
    builder = SampleBuilder(Words(), data(format="text-label"), ("a", "b"))
    with pytest.raises(DataError, match="f:1: label 'c' is not among the labels of the run: a, b"):
        builder.build(row(text="1", label="c"))


def test_labels_of_a_site_are_sorted_names() -> None:
    rows = [row(label=value) for value in ("b", True, 3, "b", False)]
    assert site_labels(rows, "label") == ("3", "b", "false", "true")
    with pytest.raises(DataError, match="f:1: 'label' must be a text, an integer or true/false"):
        site_labels([row(label=[1])], "label")


def test_what_was_cut_and_left_out_is_counted() -> None:
    rows = [row(text=" ".join("1" * count)) for count in (0, 2, 8, 9)]
    kept = build_samples(rows, SampleBuilder(Words(), data(format="text", max_tokens=6)))
    assert (len(kept.samples), kept.truncated, kept.dropped_empty, kept.rows) == (3, 2, 1, 4)
    assert (kept.tokens, kept.loss_tokens) == (4 + 6 + 6, 3 + 5 + 5)
    section = data(format="text", max_tokens=6, too_long="drop")
    dropped = build_samples(rows, SampleBuilder(Words(), section))
    assert (len(dropped.samples), dropped.dropped_too_long, dropped.dropped_empty) == (1, 2, 1)
    assert dropped.warnings("north", 6) == (
        "site north: 2 of 4 samples left out, longer than data.max_tokens = 6",
        "site north: 1 of 4 samples left out, without text to learn",
    )
    assert kept.warnings("north", 6)[0] == "site north: 2 of 4 samples cut to data.max_tokens = 6"
    assert dropped.exclusion("north", 6) is None


def test_a_site_without_usable_samples_says_why() -> None:
    long = SampleSet((), dropped_too_long=3)
    assert long.exclusion("a", 8) == (
        "site a is left out: all of its 3 samples are longer than data.max_tokens = 8; raise it"
    )
    assert long.warnings("a", 8) == (long.exclusion("a", 8),)
    assert "none of its 2 rows holds a text" in str(
        SampleSet((), dropped_empty=2).exclusion("a", 8)
    )


def test_prompt_and_response_of_a_real_tokenizer_decode_to_the_row(stories260k: Path) -> None:
    pytest.importorskip("transformers")
    tokenizer = load_tokenizer(stories260k)
    section = DataSection(train="t", max_tokens=512)
    sample = SampleBuilder(tokenizer, section).build(row(prompt="Tom saw", response="a big dog."))
    assert sample is not None
    assert sample.tokens[0] == tokenizer.bos_token_id
    assert sample.tokens[-1] == tokenizer.eos_token_id
    learned = tokenizer.decode(sample.tokens[sample.loss_mask].tolist()[:-1])
    assert learned.strip() == "a big dog."


def test_truncation_agrees_with_an_encoders_own(minilm: Path) -> None:
    tokenizer = load_tokenizer(minilm)
    text = "A sentence that is rather long for so small a limit."
    section = DataSection(train="t", format="text-label", max_tokens=8)
    sample = SampleBuilder(tokenizer, section, ("x",)).build(row(text=text, label="x"))
    assert sample is not None
    assert sample.tokens.tolist() == tokenizer.encode(text, truncation=True, max_length=8)
    short = SampleBuilder(tokenizer, section, ("x",)).build(row(text="One.", label="x"))
    assert short is not None
    assert short.tokens.tolist() == tokenizer.encode("One.")
