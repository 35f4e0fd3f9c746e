from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from fedtune.cli import client_start, server_start


@pytest.mark.parametrize(
    ("module", "arguments", "home", "options"),
    [
        (server_start, [], "fedtune-server", {"dashboard": False, "insecure": False}),
        (
            server_start,
            ["there", "--dashboard", "--insecure", "--json"],
            "there",
            {"dashboard": True, "insecure": True},
        ),
        (client_start, [], "fedtune-site", {"insecure": False}),
        (client_start, ["here", "--insecure"], "here", {"insecure": True}),
    ],
)
def test_the_verb_starts_a_home_and_gives_its_exit_code_back(
    module: Any,
    arguments: list[str],
    home: str,
    options: dict[str, bool],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    called: list[tuple[Path, dict[str, Any]]] = []

    def fake(name: str) -> Any:
        assert name == module.__name__.rpartition(".")[2]

        def run(folder: Path, **more: Any) -> int:
            called.append((folder, more))
            return 78

        return run

    monkeypatch.setattr(module, "load_app", fake)
    app = typer.Typer()
    app.command()(module.start)
    result = CliRunner().invoke(app, arguments, standalone_mode=False)
    assert result.return_value == 78
    folder, more = called[0]
    assert folder == Path(home)
    assert callable(more.pop("view"))
    assert more == options
