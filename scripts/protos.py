"""Regenerate `fedtune/v1` from `protos/`, or with --check say whether it is up to date."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PROTOS = sorted((ROOT / "protos").rglob("*.proto"))
SERVICES = [ROOT / "protos" / "fedtune" / "v1" / "coordinator.proto"]


def generate(target: Path) -> None:
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{ROOT / 'protos'}"]
    outputs = [f"--python_out={target}", f"--pyi_out={target}"]
    subprocess.run([*command, *outputs, *map(str, PROTOS)], check=True)
    stubs = [f"--grpc_python_out={target}"]
    subprocess.run([*command, *stubs, *map(str, SERVICES)], check=True)


def main() -> int:
    if "--check" not in sys.argv[1:]:
        generate(ROOT)
        return 0
    with tempfile.TemporaryDirectory() as name:
        generate(Path(name))
        stale = [
            str(fresh.relative_to(name))
            for fresh in sorted(Path(name).rglob("*_pb2*.py*"))
            if fresh.read_bytes() != (ROOT / fresh.relative_to(name)).read_bytes()
        ]
    if stale:
        print(f"generated code is out of date: {', '.join(stale)}; run: make protos")
        return 1
    print("generated code is up to date")
    return 0


if __name__ == "__main__":
    sys.exit(main())
