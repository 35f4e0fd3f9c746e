"""A coordinator whose sites are one site of another: over real links, the same result as flat.

Two coordinators and three sites are eleven processes: `python -m scripts.soak levels` runs this
file, as pytest does without `-m "not slow"`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedtune.cli.simulate import simulate_config
from fedtune.config import parse_run_config
from fedtune.wire.checkpoint import latest_checkpoint, read_checkpoint
from tests.deployment.conftest import real_sites

ALONE, GROUPED, GROUP = ("south",), ("east", "north"), "region"
ROUND_S = 120.0
"""Longest that a round may take on a machine that does other work, too."""

_SMOOTH = {"optimizer": "sgd", "learning_rate": 0.5}
"""AdamW divides by the size of gradients: where they are next to zero it makes differences of 1e-7
that a sum in another order leaves in the first round to 1e-4 in the second."""

Tree = dict[str, Any]

pytestmark = [
    pytest.mark.soak,
    pytest.mark.deployment,
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX"),
]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """Each site's own rows."""
    folder, words = tmp_path_factory.mktemp("rows"), ("red", "green", "blue", "white")
    files = {}
    for at, site in enumerate((*ALONE, *GROUPED)):
        lines = [
            json.dumps({"prompt": f"{words[i % 4]} {words[(i + at) % 4]}", "response": words[at]})
            for i in range(24 + 8 * at)
        ]
        files[site] = folder / f"{site}.jsonl"
        files[site].write_text("\n".join(lines) + "\n", encoding="utf-8")
    return files


def tree(base: Path, name: str, **sections: Any) -> Tree:
    """What all run files have in common."""
    return {
        "run": {"name": name, "rounds": 2},
        "model": {"path": str(base)},
        "data": {"max_tokens": 40},
        "lora": {"rank_max": 4, "rank_cap": 8, "tail_rank": 0},
        "importance": {"method": "uniform"},
        "plan": {"steps": "equal"},
        "train": {"local_steps": 2, "batch_size": 4, "compute": "fp32", **_SMOOTH},
        "outputs": {"exports": []},
        **sections,
    }


def site_class(count: int) -> Tree:
    return {"count": count, "memory": "64 MB", "formats": ["fp32"], "rank": 4}


@pytest.fixture(scope="module")
def flat(
    tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, rows: Mapping[str, Path]
) -> Mapping[str, np.ndarray]:
    """What three sites of one coordinator come to, in a simulation: matrix -> its product."""
    folder = tmp_path_factory.mktemp("flat") / "run"
    settings = tree(
        tiny_llama,
        "flat",
        data={"sites": {site: str(path) for site, path in rows.items()}, "max_tokens": 40},
        fleet={"site": site_class(3)},
        simulation={"threads": 1},
        outputs={"folder": str(folder), "exports": []},
    )
    simulate_config(parse_run_config(settings, "test"), watch=lambda event: None)
    return products(folder)


def products(folder: Path) -> Mapping[str, np.ndarray]:
    newest = latest_checkpoint(folder / "checkpoints")
    assert newest is not None
    matrices = read_checkpoint(newest).adapter.matrices
    return {name: np.asarray(m.u * m.sigma) @ m.v.T for name, m in matrices.items()}


@pytest.fixture(scope="module")
def levels(
    tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, rows: Mapping[str, Path]
) -> Iterator[tuple[Any, Any]]:
    """The coordinator above, with a site and a group; and the group's, with two sites."""
    harness, folder = real_sites(), tmp_path_factory.mktemp("levels")
    above_rows = {**{site: rows[site] for site in ALONE}, GROUP: rows[ALONE[0]]}
    with ExitStack() as stack:

        def coordinator(name: str, its_rows: Mapping[str, Path]) -> Any:
            (folder / name).mkdir()
            made = harness.Federation(folder / name, tiny_llama, its_rows)
            stack.enter_context(made)
            made.start_server()  # holds its ports before others are looked for
            for site in its_rows:
                made.join(site)
                if site != GROUP:
                    made.set(site, formats=["fp32"])
            return made

        below = coordinator("below", {site: rows[site] for site in GROUPED})
        above = coordinator("above", above_rows)
        above.set(GROUP, device_class="group", coordinator=str(below.home))
        below.hand_in(
            tree(
                tiny_llama,
                "region",
                fleet={"site": site_class(2)},
                deployment={"sites": list(GROUPED), "deadline_s": 120, "group": GROUP},
            )
        )
        for federation in (below, above):
            for site in federation.rows:
                federation.start_site(site, wait=False)
        for federation in (below, above):
            for site in federation.rows:
                federation.wait_for_site(site)
        yield above, below


def upper_run(base: Path, name: str) -> Tree:
    group = {"count": 1, "memory": "1 GB", "rank": 16, "devices_max": 2}
    return tree(
        base,
        name,
        fleet={"site": site_class(1), "group": group},
        deployment={"sites": [*ALONE, GROUP], "deadline_s": 120},
    )


def assert_equal(found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, product in expected.items():
        assert np.linalg.norm(product) > 0, name
        error = np.linalg.norm(found[name] - product) / np.linalg.norm(product)
        assert error < 1e-5, f"{name}: {error:.2e}"


def test_a_group_over_real_links_comes_to_the_result_of_all_sites_at_one_coordinator(
    levels: tuple[Any, Any], flat: Mapping[str, np.ndarray], tiny_llama: Path
) -> None:
    above, below = levels
    name = above.hand_in(upper_run(tiny_llama, "two-levels"))
    ended = above.wait_until_ended(name, 5 * ROUND_S)
    assert (ended["state"], ended["round"]) == ("finished", 2), ended
    assert [event["reported"] for event in above.events(name, "round_finished")] == [2, 2]
    assert [event["reported"] for event in below.events("region", "round_finished")] == [2, 2]
    assert_equal(products(above.run_folder(name)), flat)


@pytest.mark.parametrize("who", ["the group's run", "the executor of the group's site"])
def test_a_process_that_is_killed_in_a_round_changes_nothing(
    levels: tuple[Any, Any], flat: Mapping[str, np.ndarray], tiny_llama: Path, who: str
) -> None:
    above, below = levels
    before = len(below.events("region", "round_started"))
    name = above.hand_in(upper_run(tiny_llama, who.replace(" ", "-").replace("'", "")))
    wait_for = real_sites().wait_for
    wait_for("a round", lambda: len(below.events("region", "round_started")) > before, ROUND_S)
    if who == "the group's run":
        below.server.child("--task").kill()
    else:
        above.sites[GROUP].child("fedtune_client.executor").kill()
    ended = above.wait_until_ended(name, 5 * ROUND_S)
    assert (ended["state"], ended["round"]) == ("finished", 2), ended
    assert [event["reported"] for event in above.events(name, "round_finished")] == [2, 2]
    assert_equal(products(above.run_folder(name)), flat)
