"""What the documentation says is run, listed or linked: each page against the code and the disk.

A block that follows a line `<!-- run -->` is run: `$ fedtune ...` lines of a console block in this
process, python blocks as they are. The pages' commands work on `base` (a model folder),
`rows.jsonl` and, after the quickstart, `runs/first`; the tests lay these out in a new folder.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from fedtune.catalogue import CATALOGUE
from fedtune.cli.main import main
from fedtune.settings import RunConfig
from fedtune_server.run_folder import _FILES, _WHOLE_FOLDERS

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
SIDE_PAGES = (ROOT / "server" / "README.md", ROOT / "client" / "README.md")
SOURCES = ("fedtune", "server/fedtune_server", "client/fedtune_client")
PAGES = (
    "quickstart",
    "watch",
    "data",
    "devices-and-plans",
    "aggregation",
    "defences",
    "traffic",
    "rounds",
    "simulation",
    "exports",
    "run-folder",
    "resume",
)
"""The pages with blocks to run."""

_PEFT_WARNS = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
"""PEFT reads an attribute that transformers has renamed."""

_BLOCK = re.compile(
    r"^<!-- run -->\n```(?P<language>\w+)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)
_FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\((?P<target>[^)\s]+)\)")
_CODE = re.compile(r"`([^`]+)`")


@dataclass(frozen=True)
class Block:
    page: str
    line: int
    language: str
    text: str


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(page: Path) -> list[Block]:
    text = read(page)
    return [
        Block(page.stem, text.count("\n", 0, found.start()) + 1, found["language"], found["text"])
        for found in _BLOCK.finditer(text)
    ]


def commands(text: str) -> list[list[str]]:
    """The `$` lines of a console block as arguments, each with the lines that continue it."""
    joined = re.sub(r"\\\n\s*", "", text)
    return [shlex.split(line[2:]) for line in joined.splitlines() if line.startswith("$ ")]


def table_rows(text: str, heading: str) -> list[list[str]]:
    """The cells of the tables between a heading and the next one of its level."""
    level = heading.split(" ")[0]
    _, found, rest = text.partition(f"{heading}\n")
    assert found, f"no heading {heading!r}"
    section = re.split(rf"^{level} ", rest, maxsplit=1, flags=re.MULTILINE)[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines]
    return [[cell.strip() for cell in row] for row in rows if set("".join(row)) - set("-: ")]


# ---------------------------------------------------------------- what can be run


def test_every_page_with_blocks_to_run_is_run() -> None:
    marked = {page.stem for page in (README, *DOCS) if "<!-- run -->" in read(page)}
    assert marked == set(PAGES)
    for page in (README, *DOCS):
        assert len(blocks(page)) == read(page).count("<!-- run -->"), page.name


@_PEFT_WARNS
@pytest.mark.parametrize("page", PAGES)
def test_the_blocks_run(page: str, first_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = blocks(ROOT / "docs" / f"{page}.md")
    assert found
    for block in found:
        if page != "quickstart" or block.language == "python":  # the fixture ran the others
            _run(block)
    capsys.readouterr()


@_PEFT_WARNS
def test_the_three_exports_give_the_same_logits(first_run: Path) -> None:
    import numpy as np

    # One scope for all blocks of the page: each leaves its logits under a name of its own.
    scope: dict[str, object] = {}
    for block in blocks(ROOT / "docs" / "exports.md"):
        if block.language == "python":
            exec(compile(block.text, block.page, "exec"), scope)
    merged, peft = (
        np.asarray(scope[name].detach().numpy())  # type: ignore[attr-defined]
        for name in ("merged_logits", "peft_logits")
    )
    onnx = np.asarray(scope["onnx_logits"])
    np.testing.assert_allclose(peft, merged, atol=1e-3)
    np.testing.assert_allclose(onnx, merged, atol=1e-3)


def test_every_event_of_a_run_has_exactly_its_documented_fields(first_run: Path) -> None:
    documented = _documented_events()
    own = {"seq", "time", "kind", "prev", "hash"}
    lines = (first_run / "ledger.jsonl").read_text(encoding="utf-8").splitlines()
    for entry in map(json.loads, lines):
        assert set(entry) - own == documented[entry["kind"]], entry["kind"]


def test_every_row_of_the_plan_has_exactly_its_documented_fields(first_run: Path) -> None:
    text = read(ROOT / "docs" / "run-folder.md")
    sentence = text.partition("An entry of `devices` of `planned`")[2].partition(":")[2]
    listed = set(_CODE.findall(sentence.partition("(what limited it")[0]))
    lines = (first_run / "ledger.jsonl").read_text(encoding="utf-8").splitlines()
    (planned,) = (event for event in map(json.loads, lines) if event["kind"] == "planned")
    for row in planned["devices"]:
        assert set(row) == listed


def test_the_plans_page_lists_every_key_of_an_entry(first_run: Path) -> None:
    rows = table_rows(read(ROOT / "docs" / "devices-and-plans.md"), "## Edit a plan")[1:]
    listed = {key for row in rows for key in _CODE.findall(row[0])}
    plan = json.loads((first_run / "plan.json").read_text(encoding="utf-8"))
    for entry in plan["classes"].values():
        assert set(entry) <= listed
    assert listed <= {*entry, *plan}


def test_everything_in_a_finished_folder_is_documented(first_run: Path) -> None:
    text = read(ROOT / "docs" / "run-folder.md")
    for path in sorted(first_run.iterdir()):
        assert f"`{path.name}" in text, path.name


@pytest.fixture
def first_run(made_once: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The run folder that the quickstart leaves; the working folder is the one above `runs`."""
    monkeypatch.chdir(made_once)
    return made_once / "runs" / "first"


@pytest.fixture(scope="module")
def made_once(
    tmp_path_factory: pytest.TempPathFactory,
    stories260k: Path,
    e2e_rows: list[dict[str, object]],
) -> Path:
    folder = tmp_path_factory.mktemp("docs")
    _lay_out(folder, stories260k, e2e_rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for block in blocks(ROOT / "docs" / "quickstart.md"):
            if block.language == "console":
                _run(block)
    return folder


def _lay_out(folder: Path, model: Path, rows: list[dict[str, object]]) -> None:
    """A model and 40 rows of each of four clients, under the names that the pages use."""
    shutil.copytree(model, folder / "base")
    clients = sorted({str(row["client"]) for row in rows})[:4]
    chosen = [[row for row in rows if row["client"] == client][:40] for client in clients]
    lines = [json.dumps(row) + "\n" for part in chosen for row in part]
    (folder / "rows.jsonl").write_text("".join(lines), encoding="utf-8")


def _run(block: Block) -> None:
    where = f"docs/{block.page}.md:{block.line}"
    if block.language == "python":
        exec(compile(block.text, where, "exec"), {"__name__": "docs"})
        return
    found = commands(block.text)
    assert found, f"{where}: no command"
    for name, *arguments in found:
        assert name == "fedtune", f"{where}: only fedtune's own commands are run, found {name}"
        assert main(arguments) == 0, f"{where}: fedtune {' '.join(arguments)}"


# ---------------------------------------------------------------- what must exist


@pytest.mark.parametrize(
    "page", [README, *DOCS, *SIDE_PAGES], ids=lambda page: str(page.relative_to(ROOT))
)
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    for link in _LINK.finditer(_FENCE.sub("", read(page))):
        target, _, anchor = link["target"].partition("#")
        if "://" in target:
            continue
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), link["target"]
        if anchor:
            assert anchor in _anchors(path), link["target"]


def test_the_run_file_page_is_what_the_code_says() -> None:
    path = ROOT / "scripts" / "run_file_page.py"
    spec = importlib.util.spec_from_file_location("run_file_page", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert read(ROOT / "docs" / "run-file.md") == module.render(), "python scripts/run_file_page.py"


def test_the_run_file_page_lists_every_key() -> None:
    text = read(ROOT / "docs" / "run-file.md")
    minimal = {
        "model": {"path": "base"},
        "data": {"train": "rows.jsonl"},
        "fleet": {"NAME": {"count": 1, "memory": 1}},
    }
    for path, keys in _sections(RunConfig.model_validate(minimal).model_dump(), ""):
        listed = {row[0].strip("`") for row in table_rows(text, f"## {path}")[1:]}
        assert listed == keys, path


def test_the_folder_page_lists_every_file_of_a_run() -> None:
    text = read(ROOT / "docs" / "run-folder.md")
    cells = " ".join(row[0] for row in table_rows(text, "## Files"))
    for pattern in (*_FILES, *_WHOLE_FOLDERS):
        if pattern.endswith((".partial", ".old")):
            continue  # what a killed process leaves; removed by the next
        fixed = re.split(r"[*]|events\.", pattern)[0]
        assert fixed in cells, pattern


def test_the_folder_page_lists_every_event_with_its_fields() -> None:
    documented, emitted = _documented_events(), dict(_emitted_events())
    assert set(documented) == set(emitted)
    for kind, fields in emitted.items():
        if fields is not None:
            assert documented[kind] == fields, kind


def test_the_devices_page_lists_the_catalogue() -> None:
    text = read(ROOT / "docs" / "devices-and-plans.md").partition("\n## Probe a machine")[0]
    rows = table_rows(text, "### Devices by name")[1:]
    listed = {name: row[2].strip("`") for row in rows for name in _CODE.findall(row[0])}
    assert listed == {name: entry.compute for name, entry in CATALOGUE.items()}


def test_the_table_of_stages_names_folders_that_exist() -> None:
    rows = table_rows(read(README), "## Where things are")
    folders = [folder for row in rows[1:] for folder in _CODE.findall(row[1])]
    assert len(folders) >= 12
    for folder in folders:
        assert (ROOT / folder).exists(), folder
    packages = {
        path.name for path in (ROOT / "fedtune").iterdir() if (path / "__init__.py").exists()
    }
    named = {folder.split("/")[1] for folder in folders if folder.startswith("fedtune/")}
    assert packages - {"kernels", "importance", "v1"} <= named


def test_the_readme_names_every_extra() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    listed = {row[0].strip("`") for row in table_rows(read(README), "## Installing")[1:]}
    assert listed == {"none", *project["optional-dependencies"]}


def _sections(tree: dict[str, object], path: str) -> Iterator[tuple[str, set[str]]]:
    """Every section of a config tree with its plain keys."""
    below = {
        key: value for key, value in tree.items() if isinstance(value, dict) and key != "sites"
    }
    if set(tree) - set(below):
        yield path, set(tree) - set(below)
    for key, value in below.items():
        yield from _sections(value, f"{path}.{key}".lstrip("."))


def _anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", _FENCE.sub("", read(page)), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in headings}


def _documented_events() -> dict[str, set[str]]:
    rows = table_rows(read(ROOT / "docs" / "run-folder.md"), "## Events")[1:]
    return {row[0].strip("`"): set(_CODE.findall(_without_notes(row[2]))) for row in rows}


def _without_notes(cell: str) -> str:
    """A cell of fields without its explanations, which may quote other fields."""
    return re.sub(r": a list.*|\([^()]*\)", "", cell)


def _emitted_events() -> Iterator[tuple[str, set[str] | None]]:
    """Every kind that the sources emit; its fields where they stand in the call itself."""
    for folder in SOURCES:
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(read(path))):
                if not (isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Event"):
                    continue
                kind, fields = node.args
                assert isinstance(kind, ast.Constant), f"{path}:{node.lineno}"
                names = None
                if isinstance(fields, ast.Dict):
                    names = {str(ast.literal_eval(key)) for key in fields.keys if key is not None}
                yield str(kind.value), names
