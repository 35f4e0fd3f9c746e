"""Join codes: a line to read out, by which coordinator and site know each other.

    FT1-7K2MQ-0B8XW-...          a version, then ten groups of five characters

The ten groups carry a secret of 80 bits, which the coordinator knows, and 120 bits of the SHA-256
of its certificate authority, by which the site knows the coordinator. The alphabet is Crockford's
base32 (no I, L, O, U; they are read as what they look like). The fifth character of each group
checks the four before it and the group's place: any one wrong character, any two that are swapped
and any two groups that are swapped are found, and the group is named.

The check is a sum in the field of 32 elements with the powers of a generator as weights, as in the
checksums of Reed-Solomon codes: a change of one place changes it, and so does a swap of two.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Final

from fedtune.errors import AccessError

SECRET_BYTES: Final = 10
FINGERPRINT_BYTES: Final = 15
"""120 bits: nobody makes a second certificate that has them."""

_VERSION: Final = "FT1"
_ALPHABET: Final = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
_READ_AS: Final = str.maketrans("ILO", "110")
_GROUPS: Final = 10
_DATA: Final = 4
"""Characters of a group that carry the code; one more checks them."""
_POLYNOMIAL: Final = 0b100101
"""x^5 + x^2 + 1, primitive over two elements, so that 2 generates the field of 32."""


@dataclass(frozen=True, slots=True)
class JoinCode:
    """What an operator tells a site.

    Attributes:
        secret: 10 bytes, which prove that the site is invited.
        authority: first 15 bytes of the SHA-256 of the coordinator's CA certificate.
    """

    secret: bytes
    authority: bytes

    def __post_init__(self) -> None:
        assert len(self.secret) == SECRET_BYTES
        assert len(self.authority) == FINGERPRINT_BYTES

    def __str__(self) -> str:
        number = int.from_bytes(self.secret + self.authority, "big")
        count = _GROUPS * _DATA
        values = [(number >> (5 * (count - 1 - i))) & 31 for i in range(count)]
        groups = [values[i : i + _DATA] for i in range(0, count, _DATA)]
        texts = [
            "".join(_ALPHABET[value] for value in (*group, _check(group, place)))
            for place, group in enumerate(groups)
        ]
        return "-".join((_VERSION, *texts))

    def __repr__(self) -> str:
        return "JoinCode(secret=..., authority=...)"  # a secret does not belong in logs


def new_secret() -> bytes:
    """A random secret."""
    return secrets.token_bytes(SECRET_BYTES)


def parse_join_code(text: str) -> JoinCode:
    """Read a join code as a person typed it: any case, with or without hyphens and spaces.

    Raises:
        AccessError: it is not one; the message names the group that is wrong.
    """
    plain = "".join(text.upper().split()).replace("-", "")
    if not plain.startswith(_VERSION):
        raise AccessError(
            f"expected a join code, which starts with {_VERSION}-; found {text.strip()[:12]!r}: "
            "type it as `fedtune server invite` printed it"
        )
    body = plain[len(_VERSION) :].translate(_READ_AS)
    size = _DATA + 1
    if len(body) != _GROUPS * size:
        raise AccessError(
            f"expected {_GROUPS} groups of {size} characters behind {_VERSION}-, found "
            f"{len(body)} characters where {_GROUPS * size} belong: some are left out or doubled"
        )
    number = 0
    for place in range(_GROUPS):
        group = body[place * size : (place + 1) * size]
        values = [_ALPHABET.find(character) for character in group]
        if min(values) < 0 or _check(values[:_DATA], place) != values[_DATA]:
            raise AccessError(
                f"group {place + 1} of the join code is typed wrongly: found {group!r}; compare "
                "it with what `fedtune server invite` printed"
            )
        for value in values[:_DATA]:
            number = number << 5 | value
    content = number.to_bytes(SECRET_BYTES + FINGERPRINT_BYTES, "big")
    return JoinCode(content[:SECRET_BYTES], content[SECRET_BYTES:])


def _check(values: list[int], place: int) -> int:
    """Sum of 2^(i+1) times the i-th value, and 2^6 times the place, in the field of 32."""
    total = 0
    for power, value in enumerate((*values, place), start=1):
        for _ in range(power):
            value <<= 1
            if value & 32:
                value ^= _POLYNOMIAL
        total ^= value
    return total
