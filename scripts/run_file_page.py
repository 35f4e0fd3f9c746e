"""Write docs/run-file.md from the config tree, or with --check say whether it is up to date.

Keys, meanings, ranges and defaults are read from the run file that `fedtune init` writes, so the
page, that file and the config cannot differ.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from fedtune.cli.run_file import TemplateName, render_run_file

PAGE = Path(__file__).resolve().parents[1] / "docs" / "run-file.md"
NO_DEFAULT = {
    "model.path": "required",
    "data.train": "this or `sites`",
    "fleet.NAME.count": "required",
    "fleet.NAME.memory": "this or `device`",
}
"""Keys that the template sets because a run needs them, and what the page says instead."""

HEAD = """# The run file

A run is one TOML file. `fedtune init run.toml` writes one with every key, its default and its
meaning; a key that is left out keeps its default. This page lists the same keys.

- Every key can be overridden: `--set section.key=value`, any number of times. The value is in
  TOML's form, or a plain text.
- An unknown key or a bad value is an error that names the key, what is allowed, and the nearest
  valid key.
- Sizes are numbers of bytes, or texts with a unit: `"8 GB"`, `"512 MiB"` (B, kB, MB, GB, KiB, MiB,
  GiB).
- Lists may be written as one text with commas: `--set outputs.exports=merged,peft`.
- Relative paths are relative to the run file, when something is there, else to the working folder.
- The whole effective configuration of a run is kept in its folder as `config.json`, which
  `fedtune simulate` reads, too.

This page is made from the code by `python scripts/run_file_page.py`."""

_SECTION = re.compile(r"\[(?P<name>[\w.]+)\]")
_KEY = re.compile(r"(?P<off># )?(?P<key>\w+) = (?P<value>.+)")


def render() -> str:
    """The page."""
    lines, comments, section = [HEAD], list[str](), ""
    seen: set[str] = set()
    for line in render_run_file(TemplateName.CAUSAL_LM).splitlines():
        header, key = _SECTION.fullmatch(line), _KEY.fullmatch(line)
        if header:
            section = re.sub(r"^fleet\..*", "fleet.NAME", header["name"])
            if section not in seen:
                lines += _heading(section, comments)
            seen.add(section)
            comments = []
        elif key:
            name = f"{section}.{key['key']}"
            if name not in seen:
                lines.append(_row(name, key["key"], key["value"], bool(key["off"]), comments))
            seen.add(name)
            comments = []
        elif line.startswith("#"):
            comments.append(line)
        else:
            # A blank line ends a comment, except the fleet's title, which stands above one.
            comments = comments if comments and "class of devices" in comments[0] else []
    return "\n".join(lines) + "\n"


def _heading(section: str, comments: list[str]) -> list[str]:
    return [
        f"\n## {section}\n",
        _text(comments) + "\n",
        "| Key | Default | Meaning |",
        "|---|---|---|",
    ]


def _row(name: str, key: str, value: str, off: bool, comments: list[str]) -> str:
    default = "none" if off else NO_DEFAULT.get(name, f"`{value}`")
    return f"| `{key}` | {default} | {_text(comments)} |"


def _text(comments: list[str]) -> str:
    text = " ".join(comment.lstrip("# ") for comment in comments)
    return text.replace("|", "\\|").replace("<", "&lt;").replace(">", "&gt;")


def main() -> int:
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(render(), encoding="utf-8", newline="\n")
        return 0
    if PAGE.read_text(encoding="utf-8") != render():
        print("docs/run-file.md is out of date; run: python scripts/run_file_page.py")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
