"""The demo's text comes from the running Python, is prose, and is split by topic."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from pathlib import Path

import pytest

from fedtune.data import demo_text
from fedtune.data.demo_text import (
    BASE_TOPICS,
    SITE_TOPICS,
    DemoData,
    Row,
    demo_rows,
    topic_of,
    write_classification_data,
    write_demo_data,
)
from fedtune.errors import DataError


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return demo_rows()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, rows: list[Row]) -> DemoData:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo_text, "demo_rows", lambda: rows)
        return write_demo_data(tmp_path_factory.mktemp("data"))


def _source(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def _few_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_text, "_SMALLEST_CORPUS", 1)
    monkeypatch.setattr(demo_text, "_language_reference", lambda: iter(()))


def test_every_topic_has_hundreds_of_samples(rows: list[Row]) -> None:
    counts = Counter(row["topic"] for row in rows)
    assert set(counts) == {*BASE_TOPICS, *SITE_TOPICS}
    assert min(counts.values()) > 300


def test_no_text_comes_twice(rows: list[Row]) -> None:
    assert len({row["text"] for row in rows}) == len(rows)


def test_texts_are_short_ascii_prose(rows: list[Row]) -> None:
    for row in rows:
        assert 1 <= len(row["text"]) <= 420
        assert row["text"].isascii()
        assert ">>>" not in row["text"]


def test_the_modules_that_are_read_are_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _few_are_enough(monkeypatch)
    text = '"""This module is a module that must not be imported by a reader."""\nraise SystemExit'
    found = demo_rows(_source(tmp_path, {"explosive.py": text}))
    assert [row["module"] for row in found] == ["explosive"]
    assert "explosive" not in sys.modules


def test_the_order_is_that_of_names_and_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _few_are_enough(monkeypatch)
    sentence = '"""This is the text of the {} in the order of the file."""'
    source = (
        f"class B:\n    {sentence.format('class')}\n"
        f"    def z(self, one, *, two):\n        {sentence.format('method')}\n"
        f"def a():\n    {sentence.format('function')}\n"
    )
    files = {"queue.py": source, "json/__init__.py": sentence.format("package"), "json/a.txt": ""}
    found = demo_rows(_source(tmp_path, files))
    assert [(row["name"], row["topic"]) for row in found] == [
        ("queue.B", "concurrency"),
        ("queue.B.z", "concurrency"),
        ("queue.a", "concurrency"),
        ("json", "text"),
    ]
    assert found[1]["heading"] == "Help on function z in module queue:\nz(self, one, two)"


def test_tests_installed_packages_and_broken_files_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _few_are_enough(monkeypatch)
    text = '"""This is the text of a module in the folder of {}."""'
    files = {
        "good.py": text.format("good"),
        "broken.py": "def (",
        "site-packages/other/__init__.py": text.format("other"),
        "site-packages/__init__.py": "",
        "test/__init__.py": text.format("test"),
        "no_package/file.py": text.format("no package"),
    }
    assert [row["module"] for row in demo_rows(_source(tmp_path, files))] == ["good"]


@pytest.mark.parametrize(
    "block",
    [
        ">>> the_value = a_function_of_the_reader(in_the_example)",
        "funcdef ::= the name of the function in the grammar",
        "the key     the value     the meaning of it",
        "x = [y(z) for (z, w) in {1: 2, 3: 4}] if (a, b) != (c, d)",
        "Ein deutscher Satz steht hier ohne englische Worte",
        "caf\u00e9 is the name of the place in this sentence",
    ],
)
def test_what_is_not_english_prose_is_dropped(block: str) -> None:
    prose = "This is the paragraph of the text that is kept."
    assert list(demo_text._samples(f"{prose}\n\n{block}")) == [prose]


def test_curly_quotes_become_straight() -> None:
    text = "This is the \u201ctext\u201d of a reader\u2019s page \u2014 it is in the manual."
    assert list(demo_text._samples(text)) == [
        'This is the "text" of a reader\'s page -- it is in the manual.'
    ]


def test_long_text_is_cut_after_sentences() -> None:
    sentence = "This is one of the many sentences that are in the paragraph."
    samples = list(demo_text._samples(" ".join([sentence] * 20)))
    assert len(samples) > 2
    assert all(sample.endswith(".") and len(sample) <= 420 for sample in samples)
    assert sum(sample.count(sentence) for sample in samples) == 20


def test_a_python_without_sources_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds 0 passages of it; expected 200 or more"):
        demo_rows(tmp_path)


def test_no_module_has_two_topics() -> None:
    modules = [name for names in demo_text.TOPIC_MODULES.values() for name in names.split()]
    assert len(modules) == len(set(modules))
    assert topic_of("asyncio") == "concurrency"
    assert topic_of("tkinter") == "general"


def test_site_rows_ask_for_help_and_answer_it(data: DemoData) -> None:
    assert tuple(data.sites) == SITE_TOPICS
    for topic, path in data.sites.items():
        pages = _read(path)
        assert len(pages) == data.samples[topic] > 200
        for page in pages:
            assert re.fullmatch(r"help\([\w.]+\)", page["prompt"])
            assert re.match(r"Help on (module|class|function) [\w.]+", page["response"])
            assert page["response"].count("\n") >= 1
            assert len(page["prompt"]) + len(page["response"]) < 280


def test_the_base_sees_no_text_of_a_site(data: DemoData, rows: list[Row]) -> None:
    base = {row["text"] for row in _read(data.base)}
    assert base == {row["text"] for row in rows if row["topic"] in BASE_TOPICS}
    assert not any("Help on" in text for text in base)
    assert base.isdisjoint(row["text"] for row in rows if row["topic"] in SITE_TOPICS)


def test_writing_twice_gives_the_same_bytes(
    data: DemoData, rows: list[Row], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo_text, "demo_rows", lambda: list(rows))
    again = write_demo_data(tmp_path)
    for first, second in zip(data.sites.values(), again.sites.values(), strict=True):
        assert first.read_bytes() == second.read_bytes()
    assert not list(tmp_path.glob("*.part"))


def test_classification_rows_carry_their_topic_and_not_their_module(
    rows: list[Row], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo_text, "demo_rows", lambda: rows)
    count = write_classification_data(tmp_path / "new" / "topics.jsonl")
    found = _read(tmp_path / "new" / "topics.jsonl")
    assert len(found) == count > 2000
    assert {row["label"] for row in found} == set(SITE_TOPICS)
    assert all(set(row) == {"text", "label"} for row in found)


def _read(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
