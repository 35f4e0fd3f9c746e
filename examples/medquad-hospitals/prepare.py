"""Turn the MedQuAD archive into JSONL, one health institute per site.

    python prepare.py                      # downloads the archive first
    python prepare.py MedQuAD-master.zip   # reads one that is already here

Needs nothing but Python. Kept are the nine institutes whose answers are in the archive, answers
of at most 1,200 characters, and at most 620 rows per institute, so that no site drowns the others.

Source: https://github.com/abachaa/MedQuAD, CC BY 4.0; Ben Abacha and Demner-Fushman (2019),
https://doi.org/10.1186/s12859-019-3119-4.
"""

from __future__ import annotations

import io
import json
import sys
import urllib.request
import xml.etree.ElementTree as ElementTree
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

URL = "https://github.com/abachaa/MedQuAD/archive/refs/heads/master.zip"
LONGEST_ANSWER = 1200
MOST_ROWS = 620


def questions_of(document: bytes) -> Iterator[dict[str, str]]:
    """Rows of prompt, response, client (the institute) and the kind of question."""
    root = ElementTree.fromstring(document)
    for pair in root.iter("QAPair"):
        question, answer = pair.find("Question"), pair.find("Answer")
        if question is None or answer is None:
            continue
        prompt, response = (" ".join((part.text or "").split()) for part in (question, answer))
        if prompt and response and len(response) <= LONGEST_ANSWER:
            yield {
                "prompt": prompt,
                "response": response,
                "client": root.get("source", ""),
                "qtype": question.get("qtype", ""),
            }


def rows_of(archive: zipfile.ZipFile) -> list[dict[str, str]]:
    """The rows of all documents in the order of their names, each question once per institute."""
    rows: list[dict[str, str]] = []
    seen: set[tuple[str, str]] = set()
    kept: Counter[str] = Counter()
    for name in sorted(archive.namelist()):
        if not name.endswith(".xml"):
            continue
        for row in questions_of(archive.read(name)):
            key = (row["client"], row["prompt"])
            if key not in seen and kept[row["client"]] < MOST_ROWS:
                seen.add(key)
                kept[row["client"]] += 1
                rows.append(row)
    return rows


def main() -> None:
    if len(sys.argv) > 1:
        content = Path(sys.argv[1]).read_bytes()
    else:
        with urllib.request.urlopen(URL, timeout=300) as answer:
            content = answer.read()
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        rows = rows_of(archive)
    path = Path(__file__).resolve().parent / "data" / "train.jsonl"
    path.parent.mkdir(exist_ok=True)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(lines, encoding="utf-8", newline="\n")
    for client, count in Counter(row["client"] for row in rows).most_common():
        print(f"{client:20} {count:5} rows")
    print(f"{path}: {len(rows)} rows")


if __name__ == "__main__":
    main()
