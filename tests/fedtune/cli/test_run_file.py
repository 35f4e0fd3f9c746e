"""The run file that `init` writes: whole, loadable, and no different from the defaults."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel

from fedtune.cli.main import main
from fedtune.cli.run_file import TemplateName, render_run_file, write_run_file
from fedtune.config import load_run_config, parse_run_config
from fedtune.errors import ConfigError
from fedtune.settings import DeviceClassSection, RunConfig


def keys_of(section: type[BaseModel], path: str) -> Iterator[tuple[str, str]]:
    for name, field in section.model_fields.items():
        annotation = field.annotation
        if name == "fleet":
            yield from keys_of(DeviceClassSection, "fleet.laptop")
        elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
            yield from keys_of(annotation, f"{path}.{name}".lstrip("."))
        else:
            yield path, name


def sections_of(text: str) -> dict[str, str]:
    parts = re.split(r"^\[([\w.]+)\]$", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@pytest.mark.parametrize("template", TemplateName)
def test_every_key_of_the_config_stands_in_the_file_with_a_comment(template: TemplateName) -> None:
    sections = sections_of(render_run_file(template))
    for section, key in keys_of(RunConfig, ""):
        lines = sections[section].splitlines()
        place = [i for i, line in enumerate(lines) if re.match(rf"(# )?{key} = ", line)]
        assert len(place) == 1, f"{section}.{key} stands {len(place)} times"
        assert lines[place[0] - 1].startswith("#"), f"{section}.{key} has no comment"


@pytest.mark.parametrize("template", TemplateName)
def test_the_file_says_what_the_defaults_are(template: TemplateName, tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    write_run_file(path, template)
    written = load_run_config(path)
    model = {"path": written.model.path, "task": written.model.task}
    data = {key: getattr(written.data, key) for key in ("train", "format", "max_tokens")}
    fleet = {
        name: {"count": section.count, "memory": section.memory}
        for name, section in written.fleet.items()
    }
    assert written == parse_run_config({"model": model, "data": data, "fleet": fleet}, "test")


def test_commented_examples_are_valid(tmp_path: Path) -> None:
    text = render_run_file(TemplateName.CAUSAL_LM)
    opened = text.replace("# sites = ", "sites = ").replace("# format = ", "format = ")
    opened = opened.replace('train = "train.jsonl"', 'train = ""')
    config = parse_run_config(tomllib.loads(opened), "test")
    assert set(config.data.sites) == {"north", "south"}
    assert config.fleet["laptop"].format == "nf4"


def test_comments_give_range_and_choices() -> None:
    text = render_run_file(TemplateName.CAUSAL_LM)
    assert "# highest rank that a device trains (>= 1, <= 1024)\nrank_max = 16\n" in text
    assert (
        "# rule of a local step; `adamw-8bit` needs bitsandbytes (adamw | adamw-8bit | sgd)\n"
        in text
    )
    assert "# budget of one training process on the device, bytes (such as 8 GB or 512 MiB)" in text
    assert max(len(line) for line in text.splitlines()) <= 100


def test_a_file_that_exists_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text("mine", encoding="utf-8")
    with pytest.raises(ConfigError, match="exists and is not overwritten"):
        write_run_file(path, TemplateName.CAUSAL_LM)
    assert path.read_text(encoding="utf-8") == "mine"
    with pytest.raises(ConfigError, match="cannot be written"):
        write_run_file(tmp_path / "none" / "run.toml", TemplateName.CAUSAL_LM)


def test_the_verb_writes_the_template_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["init"]) == 0
    assert capsys.readouterr().out.startswith("wrote run.toml; ")
    assert main(["init", "other.toml", "--template", "classification"]) == 0
    assert load_run_config(Path("run.toml")).model.task == "causal-lm"
    assert load_run_config(Path("other.toml")).model.task == "sequence-classification"
    assert main(["init"]) == 2
