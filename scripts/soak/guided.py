"""One reader under atheris, which keeps inputs that reach new lines; where atheris is installed.

    python -m scripts.soak.guided READER CORPUS [libFuzzer's options]

It is run as a process of its own, because libFuzzer ends its process, and wants the core's code
instrumented as it is imported.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from scripts.soak.results import Result, Tell

_TRIED = re.compile(rb"Done (\d+) in|^#(\d+)\s", re.MULTILINE)


def main(arguments: list[str]) -> None:
    name, corpus, *options = arguments
    import atheris

    with atheris.instrument_imports(include=["fedtune"]):
        from scripts.soak.fuzz import try_one
        from scripts.soak.targets import all_targets

    (target,) = (t for t in all_targets(Path(tempfile.mkdtemp())) if t.name == name)
    for i, seed in enumerate(target.seeds):
        (Path(corpus) / f"seed-{i}").write_bytes(seed)

    def one(data: bytes) -> None:
        wrong, _, _ = try_one(target, data)
        if wrong:
            raise SystemError(wrong)

    atheris.Setup([sys.argv[0], *options, corpus], one)
    atheris.Fuzz()


def play(seconds: float, folder: Path, tell: Tell) -> None:
    """Every reader for an equal share of the time."""
    if importlib.util.find_spec("atheris") is None:
        tell(Result("guided", "all", "skipped", 0.0, "atheris is not installed"))
        return
    from scripts.soak.targets import all_targets

    with tempfile.TemporaryDirectory() as scratch:
        # Of the services, nothing but protobuf's own parsing is behind these.
        known = [target.name for target in all_targets(Path(scratch))]
        names = [name for name in known if not name.startswith("service ")]
    share = max(1, int(seconds / len(names)))
    for name in names:
        began = time.monotonic()
        corpus = folder / "corpus" / name.replace(" ", "-")
        corpus.mkdir(parents=True, exist_ok=True)
        found = folder / "findings"
        found.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "scripts.soak.guided", name, str(corpus)]
        options = [f"-max_total_time={share}", "-rss_limit_mb=2048", "-timeout=20"]
        options += [f"-artifact_prefix={found}/{corpus.name}-", "-max_len=8192"]
        ran = subprocess.run([*command, *options], capture_output=True, check=False)
        seconds_taken = time.monotonic() - began
        counts = [int(a or b) for a, b in _TRIED.findall(ran.stderr)]
        numbers = {"inputs": float(max(counts, default=0))}
        if ran.returncode:
            words = ran.stderr.decode("utf-8", "replace")
            line = next((x for x in words.splitlines() if "SystemError" in x), words[-300:])
            tell(Result("guided", name, "failed", seconds_taken, f"{line}; see {found}", numbers))
        else:
            words = f"{int(numbers['inputs'])} inputs"
            tell(Result("guided", name, "passed", seconds_taken, words, numbers))


if __name__ == "__main__":
    main(sys.argv[1:])
