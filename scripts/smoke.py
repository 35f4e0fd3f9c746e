"""One short run of the main job through the installed command, for continuous integration.

    python scripts/smoke.py FOLDER

Uses the public model and data beside the repository when they are there, the embedded demo
otherwise, and checks that the run's outputs are on disk.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
OUTPUTS = ("ledger.jsonl", "metrics.jsonl", "report.html", "exports/merged/config.json")


def main() -> int:
    folder = Path(sys.argv[1]) / "run"
    fedtune = str(Path(sys.executable).parent / "fedtune")
    if SHARED.is_dir():
        command = [fedtune, "simulate", str(ROOT / "examples/e2e-restaurants/run.toml")]
        settings: tuple[str, ...] = (
            f"model.path={SHARED / 'models/stories260k'}",
            f"data.train={SHARED / 'data/e2e_nlg/train.jsonl'}",
            "run.rounds=2",
            "train.local_steps=2",
            f"outputs.folder={folder}",
        )
    else:
        settings = ("run.rounds=1", f"outputs.folder={folder}")
        command = [fedtune, "demo", "--folder", str(Path(sys.argv[1]) / "cache")]
    command += [part for setting in settings for part in ("--set", setting)]
    print(" ".join(command), flush=True)
    subprocess.run(command, check=True)
    missing = [name for name in OUTPUTS if not (folder / name).exists()]
    if missing:
        print(f"the run left no {', '.join(missing)} in {folder}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
