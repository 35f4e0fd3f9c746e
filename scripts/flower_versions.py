"""Run the contract tests against every release of Flower in the declared range.

`python scripts/flower_versions.py [--deployment] [VERSION ...]`; default: the versions that the
package index has within `flwr>=...` of pyproject.toml. Each gets a virtual environment of its own
in a temporary folder (about 400 MB, a minute or two), which is removed afterwards. With
--deployment the tests with real processes run, too.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTS = ("tests/fedtune/test_flwr_compat.py", "tests/fedtune_server/link")
TOOLS = ("pytest", "jaxtyping")


def requirements() -> list[str]:
    """What the base package needs, as pyproject.toml says it."""
    tree = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return list(tree["project"]["dependencies"])


def declared_range() -> str:
    """Such as `>=1.41,<1.43`."""
    (found,) = [line for line in requirements() if re.match(r"flwr\b", line)]
    return found.removeprefix("flwr")


def released(bounds: str) -> list[str]:
    """The versions within bounds that the package index has, oldest first."""
    from packaging.specifiers import SpecifierSet
    from packaging.version import Version

    command = [sys.executable, "-m", "pip", "index", "versions", "flwr"]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    (line,) = [line for line in text.splitlines() if line.startswith("Available versions:")]
    names = line.partition(":")[2].replace(" ", "").split(",")
    return sorted(SpecifierSet(bounds).filter(names), key=Version)


def passes(version: str, tests: list[str]) -> bool:
    """Whether the tests pass with one version, in an environment made for it."""
    with tempfile.TemporaryDirectory(prefix=f"flwr-{version}-") as name:
        folder = Path(name)
        venv.create(folder / "venv", with_pip=True)
        scripts = "Scripts" if os.name == "nt" else "bin"
        python = str(folder / "venv" / scripts / "python")
        install = [python, "-m", "pip", "install", "--quiet", *requirements(), *TOOLS]
        subprocess.run([*install, f"flwr=={version}"], check=True)
        path = os.pathsep.join(str(ROOT / part) for part in ("", "server", "client"))
        environment = {**os.environ, "PYTHONPATH": path, "FLWR_HOME": str(folder / "flwr")}
        command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
        return subprocess.run(command, env=environment, cwd=ROOT, check=False).returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("versions", nargs="*")
    parser.add_argument("--deployment", action="store_true", help="real processes, too")
    options = parser.parse_args()
    tests = [*TESTS, *(["tests/deployment/test_link.py"] if options.deployment else [])]
    outcomes = {
        version: passes(version, tests)
        for version in options.versions or released(declared_range())
    }
    for version, good in outcomes.items():
        print(f"flwr {version}: {'passes' if good else 'FAILS'}")
    return 0 if outcomes and all(outcomes.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
