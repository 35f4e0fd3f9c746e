"""What a connection that is not made says to a person."""

from __future__ import annotations

import grpc
import pytest

from fedtune.deploy.channel import spoken


class Unavailable:
    def __init__(self, words: str) -> None:
        self._words = words

    def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.UNAVAILABLE

    def details(self) -> str:
        return self._words


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        ("SSL routines:OPENSSL_internal:WRONG_VERSION_NUMBER", "give --insecure, too"),
        ("OPENSSL_internal:CERTIFICATE_VERIFY_FAILED: unable", "let sites join with --again"),
        ("Connection refused", "is it started, and is the address right?"),
    ],
)
def test_a_connection_that_fails_says_what_to_do(words: str, remedy: str) -> None:
    text = str(spoken(Unavailable(words), "fl.example.org:9401"))
    assert text.startswith(f"the coordinator at fl.example.org:9401 does not answer ({words}); ")
    assert text.endswith(remedy)
