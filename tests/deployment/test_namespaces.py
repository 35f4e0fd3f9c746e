"""A coordinator and three sites in network namespaces, over links that are late, lossy and slow."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from scripts.soak.cable import Link
from scripts.soak.netem import network, why_not
from tests.deployment.conftest import real_sites
from tests.deployment.federated import ROUND_S, SITES, deployed, result

pytestmark = [pytest.mark.deployment, pytest.mark.slow]

LINKS = {
    "east": Link(delay_ms=100, jitter_ms=10),
    "north": Link(delay_ms=5, loss_percent=2),
    "south": Link(rate="1mbit"),
}


@pytest.fixture(scope="module")
def federation(
    tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, rows: Mapping[str, Path]
) -> Iterator[Any]:
    if reason := why_not():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("namespaces")
    with (
        network(("coordinator", *SITES), LINKS) as net,
        real_sites().federation(folder, tiny_llama, rows, places=net) as started,
    ):
        yield started


def test_over_bad_links_the_result_is_that_of_a_simulation(
    federation: Any, expected: tuple[Path, Mapping[str, Any]]
) -> None:
    name = federation.hand_in(deployed(expected, "distant"))
    ended = federation.wait_until_ended(name, 5 * ROUND_S)
    assert (ended["state"], ended["round"]) == ("finished", 3), ended
    assert result(federation.run_folder(name)) == result(expected[0])
    assert federation.stop_all() < 5.0
    assert federation.other_hosts() == []
