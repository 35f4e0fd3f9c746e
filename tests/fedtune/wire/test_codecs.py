"""Each codec takes the bytes it says, loses what its bits allow, and refuses what is not finite."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.coding import BLOCK_CODECS, CODECS, CodecName, coded_bytes
from fedtune.errors import ProtocolError
from fedtune.wire.codecs import decode, encode, rounded

SHAPES = [(16, 64), (172, 8), (3, 130), (130, 130), (5,), (1, 1), (), (0, 7), (2, 3, 70)]


def gaussian(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def error(values: np.ndarray, codec: CodecName) -> float:
    return float(np.linalg.norm(rounded(values, codec) - values) / np.linalg.norm(values))


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_tensor_takes_its_bytes_and_keeps_its_shape(
    codec: CodecName, shape: tuple[int, ...]
) -> None:
    data = encode(gaussian(shape), codec)
    assert len(data) == coded_bytes(codec, shape)
    found = decode(b"???" + data, 3, codec, shape)
    assert found.shape == shape
    assert found.dtype == np.float32
    assert found.flags.owndata or found.base is not None
    found[...] = 7.0  # its own memory


@pytest.mark.parametrize(
    ("codec", "most"),
    [
        ("fp32", 0.0),
        ("fp16", 3e-4),
        ("bf16", 2e-3),
        ("int8", 7e-3),
        ("q4", 0.088),
        ("q3", 0.178),
        ("q2", 0.342),
    ],
)
def test_what_a_gaussian_matrix_loses(codec: CodecName, most: float) -> None:
    """The figures of Lloyd's levels in `fedtune.wire.codecs`; NormalFloat's 4 bits lose 9.2 %."""
    for shape in ((64, 256), (256, 64)):
        assert error(gaussian(shape), codec) <= most
    assert most == 0 or error(gaussian((64, 256)), codec) > most / 2


@pytest.mark.parametrize("codec", BLOCK_CODECS)
def test_a_weak_direction_is_held_as_precisely_as_a_strong_one(codec: CodecName) -> None:
    """Columns of B differ by six orders of magnitude, as singular values do."""
    plain = gaussian((256, 4), 1)
    sigma = np.array([1e3, 1.0, 1e-3, 0.0], np.float32)
    found = rounded(plain * sigma, codec)
    for column in range(3):
        lost = found[:, column] / sigma[column] - plain[:, column]
        assert np.linalg.norm(lost) <= 0.4 * np.linalg.norm(plain[:, column])
        alone = error(plain[:, column], codec)
        assert np.linalg.norm(lost) / np.linalg.norm(plain[:, column]) == pytest.approx(
            alone, rel=0.1
        )
    np.testing.assert_array_equal(found[:, 3], 0.0)


@pytest.mark.parametrize("codec", CODECS)
def test_zeros_stay_zeros(codec: CodecName) -> None:
    np.testing.assert_array_equal(rounded(np.zeros((4, 70), np.float32), codec), 0.0)


@pytest.mark.parametrize("codec", CODECS)
def test_numbers_are_read_by_value_whatever_their_strides(codec: CodecName) -> None:
    values = gaussian((70, 6))
    np.testing.assert_array_equal(rounded(np.asfortranarray(values), codec), rounded(values, codec))


def test_bfloat16_rounds_as_torch_does() -> None:
    rng = np.random.default_rng(0)
    values = rng.integers(0, 2**32, 20_000, dtype=np.uint32).view(np.float32)
    values = values[np.isfinite(values) & (np.abs(values) < 3e38)]
    ties = (np.arange(200, dtype=np.uint32) * 0x8000 + 0x3F800000).view(np.float32)
    values = np.concatenate([values, ties])
    expected = torch.from_numpy(values).to(torch.bfloat16).to(torch.float32).numpy()
    np.testing.assert_array_equal(rounded(values, "bf16"), expected)


@pytest.mark.parametrize("codec", ["fp16", "bf16"])
def test_rounding_twice_is_rounding_once(codec: CodecName) -> None:
    once = rounded(gaussian((8, 64)), codec)
    np.testing.assert_array_equal(rounded(once, codec), once)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_number_that_is_not_finite_is_not_sent(codec: CodecName, value: float) -> None:
    bad = gaussian((2, 70))
    bad[1, 69] = value
    with pytest.raises(ProtocolError, match=f"w: expected finite {codec} values"):
        encode(bad, codec, "w")


@pytest.mark.parametrize(("codec", "value"), [("fp16", 7e4), ("bf16", 3.4e38)])
def test_a_number_too_large_for_a_codec_is_refused_and_not_made_infinite(
    codec: CodecName, value: float
) -> None:
    with pytest.raises(ProtocolError, match=r"the largest is .* wire\.up to fp32"):
        rounded(np.array([value], np.float32), codec)


@pytest.mark.parametrize("codec", BLOCK_CODECS)
def test_huge_and_tiny_numbers_come_back_finite(codec: CodecName) -> None:
    most = np.full((1, 70), np.finfo(np.float32).max)
    assert (rounded(most, codec) > 2e38).all()  # a scale may be cut there, never infinite
    for size in (1e37, 1e-37):
        values = gaussian((4, 64)) * np.float32(size)
        assert error(values.astype(np.float64) / size, codec) == pytest.approx(
            float(np.linalg.norm((rounded(values, codec) - values) / size))
            / float(np.linalg.norm(values / size)),
            rel=0.05,
        )


@pytest.mark.parametrize("codec", BLOCK_CODECS)
@pytest.mark.parametrize("scale", [0x7F80, 0xFF80, 0x7FC1], ids=["inf", "-inf", "nan"])
def test_a_scale_that_is_not_finite_is_refused(codec: CodecName, scale: int) -> None:
    data = bytearray(encode(gaussian((2, 128)), codec))
    data[4:6] = scale.to_bytes(2, "little")
    with pytest.raises(ProtocolError, match="tensor w: expected finite scales, got nan or inf"):
        decode(bytes(data), 0, codec, (2, 128), "w")


@pytest.mark.parametrize("shape", [(9, 130), (130, 9)])
def test_each_direction_may_have_bits_of_its_own(shape: tuple[int, ...]) -> None:
    values = gaussian(shape)
    bits = (0, 8, 1, 2, 0, 3, 4, 5, 6)
    data = encode(values, "q3", bits=bits)
    assert len(data) == coded_bytes("q3", shape, bits)
    found = decode(b"?" + data, 1, "q3", shape, bits=bits)
    lines, back = (a if shape[0] == 9 else a.T for a in (values, found))
    lost = np.linalg.norm(back - lines, axis=1) / np.linalg.norm(lines, axis=1)
    order = np.argsort(bits, kind="stable")
    assert (np.diff(lost[order]) <= 0).all()
    np.testing.assert_array_equal(back[0], 0.0)
    assert lost[1] < 0.01


def test_equal_bits_for_all_are_those_of_the_codec() -> None:
    values = gaussian((6, 100))
    assert encode(values, "q3", bits=(3,) * 6) == encode(values, "q3")


@settings(max_examples=150, deadline=None)
@given(st.binary(min_size=40, max_size=40), st.sampled_from(BLOCK_CODECS))
def test_any_bytes_decode_to_finite_numbers_or_are_refused(data: bytes, codec: CodecName) -> None:
    shape = {"int8": (38,), "q4": (2, 36), "q3": (2, 48), "q2": (4, 32)}[codec]
    assert coded_bytes(codec, shape) == 40
    try:
        found = decode(data, 0, codec, shape)
    except ProtocolError:
        return
    assert found.shape == shape
    assert np.isfinite(found).all()
