"""The planner's bytes are those that messages have."""

from __future__ import annotations

import numpy as np
import pytest

from fedtune.coding import CODECS, CodecName
from fedtune.plan.load import Load
from fedtune.plan.traffic import WireCosts, download_bytes, upload_bytes, wire_costs
from fedtune.records import Dispatch, LoraFactors, MatrixShape
from fedtune.wire.feedback import encode_update
from fedtune.wire.tensors import pack_dispatch

SIZES = {
    "self_attn.q_proj": (64, 64),
    "self_attn.k_proj": (32, 64),
    "self_attn.v_proj": (32, 64),
    "self_attn.o_proj": (64, 64),
    "mlp.gate_proj": (172, 64),
    "mlp.up_proj": (172, 64),
    "mlp.down_proj": (64, 172),
}
"""Of stories260k, whose sides are far from multiples of a block."""
MATRICES = [
    MatrixShape(f"model.layers.{layer}.{name}", *sides, layer)
    for layer in range(5)
    for name, sides in SIZES.items()
]


def factors(rank: int, seed: int) -> dict[str, LoraFactors]:
    rng = np.random.default_rng(seed)
    decay = 0.8 ** np.arange(rank)
    return {
        m.name: LoraFactors(
            rng.standard_normal((rank, m.in_features)).astype(np.float32),
            (rng.standard_normal((m.out_features, rank)) * decay).astype(np.float32),
        )
        for m in MATRICES
    }


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("rank", [4, 16])
def test_a_planned_message_is_as_long_as_the_real_one_within_two_per_cent(
    codec: CodecName, rank: int
) -> None:
    elements = rank * sum(m.out_features + m.in_features for m in MATRICES)
    load = Load(1, 8, trained_elements=elements)
    wire = wire_costs(codec, codec, MATRICES)
    sent = Dispatch(trained=factors(rank, 0))
    down = len(pack_dispatch(sent, codec))
    up = len(encode_update(sent, factors(rank, 1), {}, codec)[0])
    assert download_bytes(load, wire) == pytest.approx(down, rel=0.02)
    assert upload_bytes(load, wire) == pytest.approx(up, rel=0.02)


def test_directions_have_codecs_of_their_own() -> None:
    wire = wire_costs("fp32", "q3", MATRICES)
    assert wire.down == 4.0
    assert 3.25 / 8 <= wire.up < 3.4 / 8
    assert not wire.feedback


@pytest.mark.parametrize(("up", "keeps"), [("fp32", False), ("q3", True)])
def test_only_a_codec_that_rounds_makes_the_device_keep_anything(
    up: CodecName, keeps: bool
) -> None:
    assert wire_costs("fp32", up, MATRICES, error_feedback=True).feedback is keeps


def test_without_a_model_a_number_costs_its_bits_and_a_share_of_a_scale() -> None:
    assert wire_costs("fp32", "q3", ()) == WireCosts(4.0, 3.25 / 8, 8)
