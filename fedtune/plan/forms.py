"""The form that a person wrote in a few characters; `fedtune.plan.describe` writes them."""

from __future__ import annotations

import difflib
import re
from typing import cast

from fedtune.records import BACKBONE_FORMATS, BLOCK_BITS, DEFAULT_BLOCK, FormatName, MatrixForm

BLOCK_SIZES = (32, 64, 128)
"""Blocks that a matrix can be quantised in (`fedtune.quant.codebooks`)."""
_FORM = re.compile(r"(?P<name>[a-z0-9-]+)(?:/(?P<block>\d{1,4}))?(?:\+(?P<rank>\d{1,4}))?")


def parse_form(text: str) -> MatrixForm:
    """The form that a text names; a block format without a block has one of 64.

    Raises:
        ValueError: it names none; the message goes behind the text.
    """
    found = _FORM.fullmatch(text.strip())
    if found is None or found["name"] not in BACKBONE_FORMATS:
        near = difflib.get_close_matches(text.split("/")[0], BACKBONE_FORMATS, n=1)
        hint = f", such as {near[0]}" if near else ""
        raise ValueError(
            f"expected FORMAT, FORMAT/BLOCK or FORMAT/BLOCK+RANK{hint}; formats: "
            f"{', '.join(BACKBONE_FORMATS)}"
        )
    name = cast(FormatName, found["name"])
    block, rank = int(found["block"] or 0), int(found["rank"] or 0)
    if name not in BLOCK_BITS:
        if block or rank:
            raise ValueError(f"{name} has neither blocks nor a pair that repairs it")
        return MatrixForm(name)
    block = block or DEFAULT_BLOCK
    if block not in BLOCK_SIZES:
        raise ValueError(f"expected a block of {', '.join(map(str, BLOCK_SIZES))}")
    return MatrixForm(name, block, rank)
