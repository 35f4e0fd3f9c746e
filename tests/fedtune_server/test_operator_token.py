"""The operator's token is the file's, whenever it is asked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedtune.errors import DeploymentError
from fedtune_server.operator_token import OperatorToken


def test_the_token_is_that_of_the_file_now(tmp_path: Path) -> None:
    path = tmp_path / "operator.toml"
    token = OperatorToken(path)
    assert not token.matches("one")
    path.write_text('token = "one"', encoding="utf-8")
    assert token.read() == "one"
    assert token.matches("one")
    assert not token.matches("two")
    assert not token.matches("")
    path.unlink()
    assert not token.matches("one")


@pytest.mark.parametrize("text", ["", "token = 5", 'token = ""', "token =", "a = 1" + "0" * 5000])
def test_a_file_without_a_token_lets_nobody_in(tmp_path: Path, text: str) -> None:
    path = tmp_path / "operator.toml"
    path.write_text('token = "one"', encoding="utf-8")
    token = OperatorToken(path)
    assert token.matches("one")
    new = tmp_path / "new"
    new.write_text(text, encoding="utf-8")
    new.replace(path)
    assert not any(map(token.matches, ("one", "", "5")))
    with pytest.raises(DeploymentError, match=r"operator\.toml"):
        token.read()
