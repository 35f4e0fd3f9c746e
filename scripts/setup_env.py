"""Make a virtual environment and install fedtune into it; standard library only.

    python scripts/setup_env.py --extra dev

torch comes first and alone. On Linux and Windows without an NVIDIA driver it is taken from torch's
own index of CPU wheels, because the default Linux wheel brings gigabytes of CUDA. Whoever has
configured pip (an index, a mirror, a folder of wheels) is served from there and nowhere else.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
MINIMUM_PYTHON = (3, 11)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", help="where to make it")
    parser.add_argument("--extra", default="demo", help="extra of the package, such as dev")
    parser.add_argument(
        "--torch-index", default="auto", help="auto, default, or an index's address"
    )
    arguments = parser.parse_args()
    if sys.version_info < MINIMUM_PYTHON:
        found = ".".join(map(str, sys.version_info[:3]))
        print(f"fedtune needs Python 3.11 or newer, found {found}", file=sys.stderr)
        return 2
    stamp = arguments.venv / f".installed-{arguments.extra}"
    newest = max((ROOT / name).stat().st_mtime for name in ("pyproject.toml", "constraints.txt"))
    if stamp.exists() and stamp.stat().st_mtime >= newest:
        return 0
    python = _make(arguments.venv)
    _install(python, *_torch_arguments(python, arguments.torch_index), "torch")
    _install(python, "--editable", f"{ROOT}[{arguments.extra}]")
    stamp.touch()
    return 0


def _make(folder: Path) -> Path:
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not python.exists():
        print(f"making a virtual environment in {folder}", flush=True)
        venv.create(folder, with_pip=True)
    return python


def _install(python: Path, *arguments: str) -> None:
    print("pip install", *arguments, flush=True)
    command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*command, "-c", str(ROOT / "constraints.txt"), *arguments], check=True)


def _torch_arguments(python: Path, choice: str) -> list[str]:
    if choice not in ("auto", "default"):
        return ["--index-url", choice]
    has_gpu = shutil.which("nvidia-smi") is not None
    if choice == "default" or has_gpu or sys.platform == "darwin" or _pip_is_configured(python):
        return []
    return ["--index-url", CPU_INDEX]


def _pip_is_configured(python: Path) -> bool:
    """Whether pip's own settings already say where packages come from."""
    listed = subprocess.run(
        [str(python), "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    )
    sources = ("index-url", "find-links")
    return any(
        source in line.split("=")[0] for line in listed.stdout.splitlines() for source in sources
    )


if __name__ == "__main__":
    try:
        sys.exit(main())
    except subprocess.CalledProcessError as error:
        print(f"this command failed: {' '.join(error.cmd)}", file=sys.stderr)
        sys.exit(error.returncode)
