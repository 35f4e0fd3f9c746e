"""The operator file, and addresses as people write them."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedtune.deploy.addresses import check_host, join_address, split_address
from fedtune.deploy.operator import OperatorFile, find_operator_file
from fedtune.deploy.tokens import new_token, same_token, token_digest
from fedtune.errors import DeploymentError

FILE = OperatorFile("localhost:9400", "[::1]:9401", "secret-token", "-----BEGIN\nx\n-----END\n")


def test_it_is_read_as_it_was_written_and_shows_no_secret(tmp_path: Path) -> None:
    FILE.write(tmp_path / "operator.toml")
    found = OperatorFile.read(tmp_path / "operator.toml")
    assert (found.server, found.service, found.token) == (FILE.server, FILE.service, FILE.token)
    assert found.ca.strip() == FILE.ca.strip()
    assert "secret-token" not in repr(found)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("server = 1", "expected a text under server, found int"),
        (
            'server = "a:1"\nservice = "a:2"\nca = "x"',
            "expected a text under token, found",
        ),
        ('server = "a"\nservice = "a:2"\nca = "x"\ntoken = "t"', "server: expected HOST:PORT"),
        ("server =", "is not valid TOML"),
    ],
)
def test_what_is_no_operator_file_is_refused(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "o.toml").write_text(text)
    with pytest.raises(DeploymentError, match=words) as refusal:
        OperatorFile.read(tmp_path / "o.toml")
    assert "\n" not in str(refusal.value)


def test_it_is_found_where_the_user_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEDTUNE_OPERATOR", raising=False)
    assert find_operator_file(None) == Path("fedtune-server/operator.toml")
    monkeypatch.setenv("FEDTUNE_OPERATOR", "there.toml")
    assert find_operator_file(None) == Path("there.toml")
    assert find_operator_file(Path("given.toml")) == Path("given.toml")
    with pytest.raises(DeploymentError, match="--coordinator FILE or FEDTUNE_OPERATOR"):
        OperatorFile.read(Path("no-such-operator.toml"))


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("a.example:1", "a.example", 1),
        ("[::1]:65535", "::1", 65535),
        ("10.0.0.5:80", "10.0.0.5", 80),
    ],
)
def test_addresses_come_apart_and_together(text: str, host: str, port: int) -> None:
    assert split_address(text, "it") == (host, port)
    assert join_address(host, port) == text


@pytest.mark.parametrize(
    "text", ["", "a", "a:", ":1", "a:0", "a:65536", "::1:80", "a b:1", "a:\u0661"]
)
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(DeploymentError, match=r"it: expected HOST:PORT, such as"):
        split_address(text, "it")


def test_hosts_are_names_or_addresses() -> None:
    assert check_host("[::1]") == "::1"
    assert check_host("fed.example.org.") == "fed.example.org."


def test_tokens_are_long_and_compared_whole() -> None:
    token = new_token()
    assert len(token) == 43
    assert token != new_token()
    assert same_token(token, token)
    assert not same_token(token[:-1], token)
    assert not same_token("ä\udc80", token)
    assert len(token_digest(token)) == 64
