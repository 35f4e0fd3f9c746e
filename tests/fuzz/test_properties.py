"""What holds of every tensor and every record, by inputs that hypothesis makes up and shrinks."""

from __future__ import annotations

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from fedtune.coding import CODECS, CodecName, coded_bytes
from fedtune.errors import ProtocolError, one_line
from fedtune.wire.codecs import encode, rounded
from fedtune.wire.flower import TENSORS_STYPE, TRAIN, from_record
from fedtune.wire.packing import pack_tensors, packed_shapes, unpack_tensors

common = settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
SHAPES = arrays.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=70)
NUMBERS = st.floats(-6e4, 6e4, width=32)


@common
@given(st.data(), st.sampled_from(CODECS))
def test_a_tensor_keeps_its_shape_and_its_bytes_are_as_many_as_said(
    data: st.DataObject, codec: CodecName
) -> None:
    values = data.draw(arrays.arrays(np.float32, SHAPES, elements=NUMBERS))
    assert len(encode(values, codec)) == coded_bytes(codec, values.shape)
    arrived = rounded(values, codec)
    assert arrived.shape == values.shape
    assert np.isfinite(arrived).all()
    if codec == "fp32":
        np.testing.assert_array_equal(arrived, values)


@common
@given(st.dictionaries(st.text(max_size=20), SHAPES, max_size=4), st.sampled_from(CODECS))
def test_packed_tensors_have_the_names_that_were_packed(
    shapes: dict[str, tuple[int, ...]], codec: CodecName
) -> None:
    packed = pack_tensors(
        {name: np.ones(shape, np.float32) for name, shape in shapes.items()}, codec
    )
    assert packed_shapes(packed) == {name: shapes[name] for name in sorted(shapes)}
    assert set(unpack_tensors(packed, shapes)) == set(shapes)


@common
@given(st.binary(max_size=300))
def test_bytes_that_are_no_tensors_are_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        unpack_tensors(data, {"a": (2, 2)})


VALUES = st.one_of(
    st.sampled_from([1, TRAIN, b"body"]),
    st.integers(-(2**63), 2**64 - 1),
    st.floats(),
    st.text(max_size=20),
    st.binary(max_size=20),
)
CONFIGS = st.dictionaries(st.sampled_from(["version", "kind", "body", "x"]), VALUES, max_size=4)


@common
@given(CONFIGS, st.binary(max_size=20), st.sampled_from(["uint8", "float32"]), st.integers(0, 40))
def test_a_record_is_a_message_or_refused(
    config: dict[str, object], data: bytes, dtype: str, length: int
) -> None:
    array = Array(dtype, (length,), TENSORS_STYPE, data)
    record = RecordDict(
        {"fedtune": ConfigRecord(config), "tensors": ArrayRecord({"packed": array})}  # type: ignore[arg-type]
    )
    good = config.get("version") == 1 and type(config["version"]) is int
    good = good and config.get("kind") == TRAIN and type(config.get("body")) is bytes
    if not good or len(config) != 3 or dtype != "uint8" or length != len(data):
        with pytest.raises(ProtocolError):
            from_record(record, TRAIN)
        return
    body, packed = from_record(record, TRAIN)
    assert (config["version"], config["kind"], body, packed) == (1, TRAIN, config["body"], data)


@common
@given(st.text(max_size=400), st.integers(10, 300))
def test_a_quoting_message_is_one_printable_line(text: str, longest: int) -> None:
    line = one_line(text, longest)
    assert line.isprintable()
    assert len(line) <= longest
