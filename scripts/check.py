"""Format, lint, types, layers, generated code, kernels; every check runs, the worst decides."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
CHECKS = (
    ("ruff", "format", "--check", "."),
    ("ruff", "check", "."),
    ("mypy", "fedtune", "server/fedtune_server", "client/fedtune_client"),
    ("lint-imports",),
    ("python", "scripts/protos.py", "--check"),
    ("python", "scripts/kernels.py", "--check"),
)


def main() -> int:
    failed = []
    for name, *arguments in CHECKS:
        print(f"--- {name} {' '.join(arguments)}", flush=True)
        finished = subprocess.run([str(BIN / name), *arguments], cwd=ROOT, check=False)
        if finished.returncode != 0:
            failed.append(name)
    if failed:
        print(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
