"""A supervisor in a process of its own, for tests: `supervised.py HOME HEALTH_PORT CHILDREN`.

CHILDREN: a JSON object, name -> program text for `python -c`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from fedtune.cli.log_view import log_view
from fedtune.deploy.back_off import Waits
from fedtune.deploy.health import Identity
from fedtune.deploy.home_run import HomeRun, run_home
from fedtune.deploy.keeper import Child
from fedtune.errors import DeploymentError


def main(home: Path, health_port: int, programs: dict[str, str]) -> int:
    children = [
        Child(name, (sys.executable, "-S", "-c", program)) for name, program in programs.items()
    ]
    waits = Waits(first_s=0.05, longest_s=0.1)
    run = HomeRun(
        home, home / "logs", Identity("test", "1"), children, {}, health_port, waits=waits
    )
    try:
        return run_home(run, log_view(json_lines=True))
    except DeploymentError as error:
        print(error)
        return 2


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3])))
