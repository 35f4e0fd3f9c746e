"""Held-out losses of several devices in one pass are those of each alone, bit for bit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from fedtune.errors import DataError
from fedtune.records import MatrixForm

torch = pytest.importorskip("torch")


@dataclass(frozen=True)
class Sample:
    tokens: np.ndarray
    loss_mask: np.ndarray
    label: int = 0


def samples(seed: int, lengths: Sequence[int], loss: bool = True) -> list[Sample]:
    rng = np.random.default_rng(seed)
    return [Sample(rng.integers(3, 500, n).astype(np.int32), np.full(n, loss)) for n in lengths]


HELD_OUT = [samples(0, [9, 30, 4, 17, 5]), samples(1, [12]), samples(2, [8, 8, 21, 40])]


@pytest.fixture(scope="module")
def backbone(stories260k: Path):  # type: ignore[no-untyped-def]
    from fedtune.model.backbone import BackboneShelf
    from fedtune.model.shapes import read_shapes

    shapes = read_shapes(stories260k, ("all-linear",))
    shelf = BackboneShelf(stories260k, torch.device("cpu"), keep_base=False)
    return shelf.get("causal-lm", (), {m.name: MatrixForm("q4", 64) for m in shapes.matrices})


@pytest.fixture(scope="module")
def devices(backbone):  # type: ignore[no-untyped-def]
    """Factors of three devices, of different ranks and on different matrices."""
    from fedtune.lora.linear import Factors

    generator = torch.Generator().manual_seed(5)
    found = []
    for rank, names in ((4, list(backbone.layers)), (2, list(backbone.layers)[:9]), (7, [])):
        factors = {}
        for name in names:
            layer = backbone.layers[name]
            a = torch.randn(rank, layer.in_features, generator=generator) / 8
            b = torch.randn(layer.out_features, rank, generator=generator) / 8
            nothing = torch.zeros(0, layer.in_features), torch.zeros(layer.out_features, 0)
            factors[name] = Factors(a, b, *nothing, 2.0)
        found.append(factors)
    return found


@pytest.mark.parametrize("pass_tokens", [1, 60, 4096])
@pytest.mark.parametrize("batch_size", [2, 32])
def test_every_device_gets_the_loss_that_it_has_alone(  # type: ignore[no-untyped-def]
    backbone, devices, batch_size: int, pass_tokens: int
) -> None:
    from fedtune.evaluate.perplexity import held_out_loss
    from fedtune.evaluate.side_by_side import held_out_losses
    from fedtune.lora.linear import attach, detach

    alone = []
    for factors, own in zip(devices, HELD_OUT, strict=True):
        attach(backbone.layers, factors)
        alone.append(held_out_loss(backbone.model, own, batch_size))
        detach(backbone.layers)
    assert len({report.loss for report in alone}) == 3
    found = held_out_losses(backbone, devices, HELD_OUT, batch_size, 0, pass_tokens)
    assert found == alone
    assert all(layer.factors is None for layer in backbone.layers.values())


def test_a_pass_has_as_many_devices_as_its_tokens_allow(  # type: ignore[no-untyped-def]
    backbone, devices, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedtune.evaluate import side_by_side

    passes: list[int] = []
    real = side_by_side.loss_sums

    def count(model, batches):  # type: ignore[no-untyped-def]
        passes.append(sum(batch.tokens.shape[1] for batch in batches))
        return real(model, batches)

    monkeypatch.setattr(side_by_side, "loss_sums", count)
    side_by_side.held_out_losses(backbone, devices, HELD_OUT, 2, 0, 60)
    assert max(passes) <= 61  # the third device's first part alone has 61
    assert sum(passes) == sum(len(s.tokens) for own in HELD_OUT for s in own)
    assert len(passes) < 6  # parts in all


def test_a_device_without_loss_is_refused(backbone, devices) -> None:  # type: ignore[no-untyped-def]
    from fedtune.evaluate.side_by_side import held_out_losses

    silent = [*HELD_OUT[:2], samples(3, [5, 6], loss=False)]
    with pytest.raises(DataError, match="none of the 2 held-out samples carries loss"):
        held_out_losses(backbone, devices, silent, 2, 0, 60)
