"""Download the E2E restaurant descriptions and write them as JSONL, one restaurant per site.

    python prepare.py            # writes data/train.jsonl and data/test.jsonl beside this file

Needs nothing but Python. The development set is the training data here (4,672 rows about 20
restaurants), because its restaurants are few and well filled.

Source: https://github.com/tuetschek/e2e-dataset, CC BY-SA 4.0; Novikova, Dusek and Rieser (2017),
https://arxiv.org/abs/1706.09254.
"""

from __future__ import annotations

import csv
import io
import json
import re
import urllib.request
from collections.abc import Iterator
from pathlib import Path

URL = "https://raw.githubusercontent.com/tuetschek/e2e-dataset/v1.0.0"
FILES = {"train.jsonl": "devset.csv", "test.jsonl": "testset_w_refs.csv"}


def rows_of(text: str) -> Iterator[dict[str, str]]:
    """Rows of prompt (what is to be said), response (a person's sentence) and client."""
    for row in csv.DictReader(io.StringIO(text)):
        name = re.search(r"name\[([^\]]+)\]", row["mr"])
        if name is not None:
            yield {"prompt": row["mr"], "response": row["ref"], "client": name[1]}


def main() -> None:
    folder = Path(__file__).resolve().parent / "data"
    folder.mkdir(exist_ok=True)
    for name, source in FILES.items():
        with urllib.request.urlopen(f"{URL}/{source}", timeout=60) as answer:
            rows = list(rows_of(answer.read().decode("utf-8-sig")))
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / name).write_text(lines, encoding="utf-8", newline="\n")
        print(f"{folder / name}: {len(rows)} rows, {len({r['client'] for r in rows})} restaurants")


if __name__ == "__main__":
    main()
