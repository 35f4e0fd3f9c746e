"""English text that every Python carries, cut into samples by topic; the demo's only data.

Two sources, both read from disk without importing anything but `pydoc_data.topics` (one literal
of text): the documentation strings in the standard library's source files, and the chapters of
the language reference. A sample is a paragraph or a few, without doctests, tables and code. The
topic of a documentation string is that of its top-level module; the words differ from one Python
version to the next, the topics do not.

The base of the demo is trained on plain text of the topics in `BASE_TOPICS`. Each of the other
topics is a site, whose rows ask for a page of help (`help(queue.Queue.get)`) and answer it. So the
base reads the language of the sites, and knows neither their subjects nor the form of a page.
"""

from __future__ import annotations

import ast
import importlib
import json
import os
import re
import sysconfig
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeAlias

from fedtune.errors import DataError

Row: TypeAlias = dict[str, str]

LANGUAGE: Final = "language"
GENERAL: Final = "general"
BASE_TOPICS: Final = (GENERAL, LANGUAGE)
"""What the demo's base is trained on: the language reference, and modules of no site's topic."""

TOPIC_MODULES: Final[Mapping[str, str]] = {
    "concurrency": "asyncio concurrent contextvars multiprocessing queue sched selectors "
    "subprocess threading _threading_local _weakrefset asyncore asynchat signal",
    "files": "bz2 compression filecmp fileinput fnmatch genericpath glob gzip io lzma mailbox "
    "ntpath os pathlib posixpath _pyio shutil stat tarfile tempfile zipapp zipfile zipimport dbm "
    "shelve pickle pickletools wave aifc sunau plistlib linecache netrc",
    "network": "cgi cgitb email ftplib html http imaplib ipaddress mimetypes nntplib poplib smtpd "
    "smtplib socket socketserver ssl telnetlib urllib uuid webbrowser wsgiref xmlrpc",
    "numbers": "_pydatetime _pydecimal _pylong _strptime bisect calendar colorsys datetime "
    "fractions heapq numbers random secrets statistics zoneinfo",
    "testing": "bdb cProfile doctest faulthandler logging pdb profile profiling pstats timeit "
    "trace traceback tracemalloc unittest warnings",
    "text": "_markupbase base64 codecs configparser csv difflib gettext json locale "
    "pprint quopri re sre_compile sre_parse string stringprep textwrap tokenize tomllib xml",
}
"""Topic of a site -> the top-level modules whose documentation is that site's data."""

SITE_TOPICS: Final = tuple(TOPIC_MODULES)

_SKIPPED_FOLDERS: Final = (
    "__phello__ __pycache__ _pyrepl dist-packages encodings ensurepip idle_test idlelib "
    "lib-dynload lib2to3 pydoc_data site-packages test tests turtledemo"
)
_SHORTEST: Final = 40
"""Characters; shorter documentation strings ("Internal function.") say nothing of their topic."""
_LONGEST: Final = 420
"""Characters of one sample; about 128 tokens of the demo's own tokenizer."""
_LONGEST_PAGE: Final = 130
"""Characters of a page's text, and of its prompt and heading together. Chosen: all pages
then fit 128 tokens, so the demo shows no warning about samples that were cut."""
_LONGEST_START: Final = 180
"""Characters of a text that is to be classified."""
_SMALLEST_CORPUS: Final = 200
"""Samples; every full Python has over 3000, so fewer means that the sources were stripped."""
_TYPEWRITER: Final = str.maketrans(
    {0x2018: "'", 0x2019: "'", 0x201C: '"', 0x201D: '"', 0x2013: "-", 0x2014: "--", 0x2026: "..."}
)
"""Curly quotes and long dashes -> ASCII; the language reference is full of them."""
_COMMON_WORDS: Final = (
    "a an and are as at be by can for from has if in is it may not of on or set that the this to "
    "used when which with you"
)


@dataclass(frozen=True, slots=True)
class DemoData:
    """Where `write_demo_data` put the text.

    Attributes:
        base: text for the base, one sample a line (JSONL, key `text`).
        sites: site name -> its JSONL file; keys `prompt` and `response`.
        samples: site name -> number of rows.
    """

    base: Path
    sites: Mapping[str, Path]
    samples: Mapping[str, int]


def demo_rows(stdlib: Path | None = None) -> list[Row]:
    """Every sample, in the order of the file names and of the lines in each file.

    Args:
        stdlib: folder of the standard library's source; default: that of the running Python.

    Returns:
        Rows with the keys `text` (English, one line a paragraph), `topic`, `module` (top-level
        name), `name` (what the text describes, such as `queue.Queue.get`) and `heading` (of its
        page of help; empty for the second sample of one page and on). No two rows have the same
        text.

    Raises:
        DataError: the folder holds next to no documentation, as in a Python without sources.
    """
    folder = stdlib or Path(sysconfig.get_paths()["stdlib"])
    rows: dict[str, Row] = {}
    for entry in _documentation(folder):
        module = entry.name.split(".")[0]
        _add(rows, entry, module, topic_of(module))
    if len(rows) < _SMALLEST_CORPUS:
        raise DataError(
            f"the demo's text is the standard library's own documentation, and {folder} holds "
            f"{len(rows)} passages of it; expected {_SMALLEST_CORPUS} or more: use a Python with "
            "its .py files"
        )
    for entry in _language_reference():
        _add(rows, entry, "pydoc_data", LANGUAGE)
    return list(rows.values())


def topic_of(module: str) -> str:
    """Topic of a top-level module: that of a site, or `general`."""
    for topic, modules in TOPIC_MODULES.items():
        if module in modules.split():
            return topic
    return GENERAL


def write_demo_data(folder: Path) -> DemoData:
    """Write the base's text and one prompt/response file per site.

    A site's prompt is `help(queue.Queue.get)`, the response the page of help: what it is, in which
    module, its parameters, and what its documentation says. The files are the same, byte for byte,
    for the same Python.

    Args:
        folder: created where missing; files of the same names are replaced.

    Raises:
        DataError: as `demo_rows`.
    """
    rows = demo_rows()
    folder.mkdir(parents=True, exist_ok=True)
    base = folder / "base.jsonl"
    write_rows(base, [{"text": row["text"]} for row in rows if row["topic"] in BASE_TOPICS])
    sites = {topic: folder / f"{topic}.jsonl" for topic in SITE_TOPICS}
    samples = {}
    for topic, path in sites.items():
        pages = [page for row in rows if row["topic"] == topic and (page := _page(row))]
        write_rows(path, pages)
        samples[topic] = len(pages)
    return DemoData(base, sites, samples)


def write_classification_data(path: Path) -> int:
    """Write one `text`/`label` row per sample of the sites' topics; the label is the topic.

    A text is the first sentences of a sample: they say what something is, and fit 64 tokens.

    Returns:
        How many rows were written.

    Raises:
        DataError: as `demo_rows`.
    """
    labels: dict[str, str] = {}
    for row in demo_rows():
        text = next(_pieces(row["text"], _LONGEST_START), "")
        if row["topic"] in SITE_TOPICS and len(text) >= _SHORTEST:
            labels.setdefault(text, row["topic"])
    path.parent.mkdir(parents=True, exist_ok=True)
    write_rows(path, [{"text": text, "label": topic} for text, topic in labels.items()])
    return len(labels)


def write_rows(path: Path, rows: list[Row]) -> None:
    """Write rows as JSON lines, through a temporary name, so that the file is whole or absent."""
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text(lines, encoding="utf-8", newline="\n")
    part.replace(path)


# ---------------------------------------------------------------- reading


@dataclass(frozen=True, slots=True)
class _Entry:
    """One documentation string, what it belongs to, and the head of its page of help."""

    name: str
    heading: str
    documentation: str


def _add(rows: dict[str, Row], entry: _Entry, module: str, topic: str) -> None:
    heading = entry.heading
    for text in _samples(entry.documentation):
        row = {"text": text, "topic": topic, "module": module, "name": entry.name}
        rows.setdefault(text, {**row, "heading": heading})
        heading = ""


def _page(row: Row) -> Row | None:
    """A row's page of help; None when it is not the start of a page, or too long for one."""
    text = next(_pieces(row["text"], _LONGEST_PAGE), "")
    prompt, head = f"help({row['name']})", row["heading"]
    if not head or not text or len(prompt) + len(head) > _LONGEST_PAGE:
        return None
    return {"prompt": prompt, "response": f"{head}\n{text}"}


def _documentation(stdlib: Path) -> Iterator[_Entry]:
    """Yield the documentation strings of everything in the folder."""
    for path in _source_files(stdlib):
        try:
            tree = ast.parse(path.read_bytes())
        except SyntaxError:  # templates and deliberately broken files
            continue
        parts = path.relative_to(stdlib).with_suffix("").parts
        module = ".".join(part for part in parts if part != "__init__")
        documentation = ast.get_docstring(tree)
        if documentation:
            yield _Entry(module, f"Help on module {module}:", documentation)
        yield from _documented(tree.body, module, module)


def _source_files(stdlib: Path) -> Iterator[Path]:
    for folder, below, files in os.walk(stdlib):
        below[:] = sorted(name for name in below if name not in _SKIPPED_FOLDERS.split())
        if Path(folder) == stdlib:
            below[:] = [name for name in below if (stdlib / name / "__init__.py").exists()]
        for name in sorted(files):
            if name.endswith(".py") and not name.startswith("_sysconfigdata"):
                yield Path(folder, name)


def _documented(statements: list[ast.stmt], outer: str, module: str) -> Iterator[_Entry]:
    for node in statements:
        if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        name = f"{outer}.{node.name}"
        documentation = ast.get_docstring(node)
        if documentation:
            yield _Entry(name, _heading(node, module), documentation)
        if isinstance(node, ast.ClassDef):
            yield from _documented(node.body, name, module)


def _heading(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, module: str) -> str:
    if isinstance(node, ast.ClassDef):
        return f"Help on class {node.name} in module {module}:\nclass {node.name}"
    arguments = node.args
    names = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    head = f"Help on function {node.name} in module {module}:"
    return f"{head}\n{node.name}({', '.join(names)})"


def _language_reference() -> Iterator[_Entry]:
    """Yield the chapters of the language reference that `help()` shows."""
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ImportError:  # some distributions package it apart from the rest
        return
    for name, chapter in sorted(topics.items()):
        yield _Entry(name, f"Help on {name}:", chapter)


# ---------------------------------------------------------------- cleaning


def _samples(documentation: str) -> Iterator[str]:
    """Cut one documentation string into samples of at most `_LONGEST` characters."""
    sample = ""
    documentation = documentation.translate(_TYPEWRITER)
    for block in re.split(r"\n\s*\n", documentation):
        paragraph = " ".join(block.split())
        if not _is_english(block, paragraph):
            continue
        for piece in _pieces(paragraph, _LONGEST):
            if sample and len(sample) + len(piece) >= _LONGEST:
                yield sample
                sample = ""
            sample = f"{sample}\n{piece}" if sample else piece
    if len(sample) >= _SHORTEST:
        yield sample


def _pieces(paragraph: str, longest: int) -> Iterator[str]:
    """Cut a text after the ends of sentences; a sentence that is too long is left out."""
    piece = ""
    for sentence in re.split(r"(?<=[.!?:;])(?= )|(?=\n)", paragraph):
        if piece and len(piece) + len(sentence) > longest:
            yield piece
            piece = ""
        piece = f"{piece}{sentence}" if piece else sentence.strip()
        if len(piece) > longest:
            piece = ""
    if piece:
        yield piece


def _is_english(block: str, paragraph: str) -> bool:
    """Whether a block reads as prose: not a doctest, a grammar, a table, a rule or code."""
    if not paragraph.isascii() or re.search(r">>>|::=|^\s*[-=+*~#|]{4,}|[|+]\s*$", block, re.M):
        return False
    if len(re.findall(r"\S {3,}\S", block)) > 1:
        return False
    letters = sum(c.isalpha() or c == " " for c in paragraph)
    words = re.findall(r"[a-z]+", paragraph.lower())
    common_words = _COMMON_WORDS.split()
    common = sum(word in common_words for word in words)
    return letters >= 0.8 * len(paragraph) and len(words) >= 4 and common >= 0.1 * len(words)
