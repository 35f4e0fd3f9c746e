"""A run with every optimiser: FedProx on devices, FedAdam and error feedback on the server."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fedtune.wire.checkpoint import latest_checkpoint, read_checkpoint

Tree = dict[str, dict[str, Any]]


def test_the_loss_falls_with_all_of_them_and_none_gets_more_than_the_cap(
    tree: Tree, play: Callable[[Tree], Any]
) -> None:
    tree["run"]["rounds"] = 3
    tree["lora"] = {"rank_max": 8, "rank_cap": 3}
    tree["train"]["proximal"] = 0.1
    tree["aggregate"] = {
        "optimizer": "adam", "server_step": 0.003, "momentum": 0.5, "keep_dropped": True
    }  # fmt: skip
    played = play(tree)
    finished = played.one("run_finished")
    assert finished["held_out_loss_after"] < finished["held_out_loss_before"]
    path = latest_checkpoint(played.folder / "checkpoints")
    assert path is not None
    saved = read_checkpoint(path)
    assert max(matrix.rank for matrix in saved.adapter.matrices.values()) == 3
    assert max(matrix.rank for matrix in saved.extra["dropped"].matrices.values()) == 3
    assert max(matrix.rank for matrix in saved.extra["momentum"].matrices.values()) == 3
