"""What machines do to a run, and that its result stays; `scripts/soak` has the long list.

The file's name comes before `test_federation`, whose last tests end the federation that both share.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.deployment.federated import ROUND_S, deployed, result

pytestmark = [
    pytest.mark.deployment,
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX"),
]


def test_a_site_and_the_coordinator_killed_amid_rounds_change_nothing(
    federation: Any, expected: tuple[Path, Mapping[str, Any]]
) -> None:
    name = federation.hand_in(deployed(expected, "befallen"))
    killed = []
    federation.wait_for_event(name, "round_started", lambda event: event["round"] == 1, 2 * ROUND_S)
    killed += federation.sites["north"].tree()
    federation.sites["north"].kill()
    federation.start_site("north", wait=False)
    federation.wait_for_event(name, "round_started", lambda event: event["round"] == 2, 2 * ROUND_S)
    killed += federation.server.tree()
    federation.server.kill()
    federation.start_server()
    ended = federation.wait_until_ended(name, 5 * ROUND_S)
    assert (ended["state"], ended["round"]) == ("finished", 3), ended
    assert result(federation.run_folder(name)) == result(expected[0])
    assert federation.events(name, "run_resumed")
    _, alive = psutil.wait_procs(killed, timeout=0)
    assert alive == []
