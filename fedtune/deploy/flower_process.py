"""What every process that runs Flower's code needs before Flower is imported, and how it ends.

Flower reports to telemetry.flower.ai, asks api.flower.ai for updates and may install packages; all
of it is read from the environment at its first import, and switched off here.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
from pathlib import Path

_SILENT = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "HF_HUB_OFFLINE": "1",
}
_PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy")
"""httpx would send what is meant for the coordinator to a proxy instead."""


def talk_to_the_coordinator_alone(flower_folder: Path) -> None:
    """Set this process's environment; call it before anything imports Flower.

    Args:
        flower_folder: Flower's own folder (FLWR_HOME).
    """
    os.environ.update(_SILENT)
    os.environ["FLWR_HOME"] = str(flower_folder)
    for name in _PROXIES:
        os.environ.pop(name, None)


def start_log(name: str, folder: Path) -> None:
    """Send what this process logs to the place where its supervisor wants it.

    Call it again once Flower is imported, which gives its loggers handlers and levels of its own.
    """
    # At a coordinator, Flower has a line per question of an operator's programs.
    logging.getLogger("flwr").setLevel(logging.WARNING if name == "link" else logging.INFO)
    for chatty in ("httpx", "httpcore", "alembic"):  # a line per request, of a poll per second
        logging.getLogger(chatty).setLevel(logging.WARNING)
    try:
        logs = importlib.import_module("fedtune.deploy.logs")
    except ModuleNotFoundError:
        logging.basicConfig(
            level=logging.INFO, format=f"%(asctime)s %(levelname)s {name} %(name)s: %(message)s"
        )
        return
    logs.configure(name, folder)


def leave(code: int) -> None:
    """End this process at once, whatever its threads do; what was logged is kept."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
