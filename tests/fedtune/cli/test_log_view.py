from __future__ import annotations

import io
import json

from fedtune.cli.log_view import log_view, record_text
from fedtune.deploy.logs import log_record


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_shows_one_line_per_record_and_a_file_one_object() -> None:
    record = log_record("link", "warning", "a node left", fields={"node": 7}, time_s=1e9)
    terminal, file, wanted = _Terminal(), io.StringIO(), _Terminal()
    log_view(False, terminal)(record)
    log_view(False, file)(record)
    log_view(True, wanted)(record)
    assert "link       warning: a node left  node=7" in record_text(record).plain
    assert terminal.getvalue().count("\n") == 1
    assert "a node left" in terminal.getvalue()
    assert json.loads(file.getvalue()) == record
    assert json.loads(wanted.getvalue()) == record


def test_long_lines_and_control_characters_stay_one_line() -> None:
    record = log_record("node", "info", "\x1b[2Jgone\nnext \u00e9 [bold]" + "x" * 500)
    terminal = _Terminal()
    log_view(False, terminal)(record)
    assert terminal.getvalue().count("\n") == 1
    assert "\\x1b[2Jgone\\nnext \u00e9 [bold]xxx" in record_text(record).plain


def test_a_record_that_lacks_all_is_shown() -> None:
    assert record_text({}).plain.startswith("--:--:--")
    assert record_text({"time": "yesterday", "fields": 3}).plain.startswith("--:--:--")
