"""Every way to train goes from the run file to a merged model, over unequal devices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fedtune.wire.checkpoint import latest_checkpoint, read_checkpoint

Tree = dict[str, dict[str, object]]
Play = Callable[[Tree], Any]  # tests/flow/conftest.py; test folders are not importable packages
CHANGES: dict[str, Tree] = {
    "allora": {"train": {"way": "allora"}},
    "decay": {"train": {"layer_rate_decay": 0.5}},
    "rslora": {"lora": {"scaling": "rank-stabilised"}},
    "eva": {"lora": {"start": "eva"}},
    "corda": {"lora": {"start": "corda"}},
    "pissa": {"lora": {"start": "pissa"}},
    "s2ft": {"train": {"way": "s2ft"}},
    "greentrainer": {"train": {"way": "greentrainer", "flops_share": 0.4}},
}


def played(play: Play, tree: Tree, changes: Tree) -> Any:
    return play({name: {**section, **changes.get(name, {})} for name, section in tree.items()})


def products(run: Any) -> dict[str, np.ndarray[Any, Any]]:
    path = latest_checkpoint(run.folder / "checkpoints")
    assert path is not None
    adapter = read_checkpoint(path).adapter
    return {name: low_rank.product() for name, low_rank in adapter.matrices.items()}


@pytest.mark.parametrize("key", CHANGES)
def test_a_run_by_this_way_learns_and_no_device_is_refused(
    play: Play, tree: Tree, key: str
) -> None:
    run = played(play, tree, CHANGES[key])
    assert run.all("device_refused") == []
    losses = [event["held_out_loss"] for event in run.all("round_finished")]
    assert run.one("evaluated")["held_out_loss"] < losses[0]


def test_s2ft_over_unequal_devices_changes_no_other_channels(play: Play, tree: Tree) -> None:
    """Ranks of at most 8, on backbones of three formats."""
    for product in products(played(play, tree, CHANGES["s2ft"])).values():
        largest = np.abs(product).max(axis=0)
        assert (largest > 1e-4 * largest.max()).sum() <= 8
