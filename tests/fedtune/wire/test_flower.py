"""A message in Flower's records comes out as it went in, and anything else is refused."""

from __future__ import annotations

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from fedtune.errors import ProtocolError
from fedtune.wire.flower import SMALL_BYTES, TENSORS_STYPE, TRAIN, from_record, to_record

TENSORS = bytes(range(200))


def config(**changes: object) -> ConfigRecord:
    return ConfigRecord({"version": 1, "kind": TRAIN, "body": b"body"} | changes)


def array(data: bytes = b"abc", dtype: str = "uint8", stype: str = TENSORS_STYPE) -> ArrayRecord:
    return ArrayRecord({"packed": Array(dtype, (len(data),), stype, data)})


LARGE = bytes(SMALL_BYTES + 1)


@pytest.mark.parametrize("tensors", [None, b"", TENSORS, LARGE[1:], LARGE])
def test_a_message_comes_out_as_it_went_in(tensors: bytes | None) -> None:
    assert from_record(to_record(TRAIN, b"body", tensors), TRAIN) == (b"body", tensors)


def test_all_tensors_travel_in_one_array() -> None:
    record = to_record(TRAIN, b"body", LARGE)
    assert [len(arrays) for arrays in record.array_records.values()] == [1]


def test_tensors_that_fit_one_post_travel_without_an_array() -> None:
    record = to_record(TRAIN, b"body", TENSORS)
    assert list(record.array_records) == []
    assert set(record["tensors"]) == {"packed"}


def test_tensors_of_a_small_message_still_come_as_an_array() -> None:
    assert from_record(RecordDict({"fedtune": config(), "tensors": array()}), TRAIN)[1] == b"abc"


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (RecordDict(), "the config record 'fedtune' is missing"),
        (RecordDict({"fedtune": MetricRecord({"a": 1})}), "the config record 'fedtune' is missing"),
        (
            RecordDict({"fedtune": config(), "more": MetricRecord({"a": 1})}),
            "unexpected record 'more'",
        ),
        (RecordDict({"fedtune": config(extra=1)}), "expected version, kind and body, got 'body', "),
        (RecordDict({"fedtune": config(version=2)}), "expected version 1, got '2'; install the"),
        (RecordDict({"fedtune": config(version=True)}), "expected version 1, got 'True'"),
        (RecordDict({"fedtune": config(kind="query.profile")}), "expected kind train.lora, got"),
        (RecordDict({"fedtune": config(body="text")}), "expected bytes as body, got str"),
        (RecordDict({"fedtune": config(body=bytes(16 * 2**20 + 1))}), "a body of at most"),
        (
            RecordDict({"fedtune": config(), "tensors": ConfigRecord({"packed": "text"})}),
            "expected packed tensors, as bytes, and nothing else",
        ),
        (
            RecordDict({"fedtune": config(), "tensors": ConfigRecord({"packed": b"", "a": 1})}),
            "expected packed tensors, as bytes, and nothing else",
        ),
        (
            RecordDict({"fedtune": config(), "tensors": ConfigRecord({"packed": LARGE})}),
            "expected at most 4194304 bytes of tensors without an array, got 4194305",
        ),
        (
            RecordDict({"fedtune": config(), "tensors": MetricRecord({"a": 1})}),
            "expected one array of packed tensors",
        ),
        (
            RecordDict({"fedtune": config(), "tensors": ArrayRecord([np.zeros(3)])}),
            "expected one array of packed tensors",
        ),
        (
            RecordDict({"fedtune": config(), "tensors": array(stype="numpy.ndarray")}),
            "expected array form fedtune.safetensors.v1, got 'numpy.ndarray'",
        ),
        (
            RecordDict({"fedtune": config(), "tensors": array(dtype="float32")}),
            r"expected uint8 array of shape \(3,\), got 'float32' \(3,\)",
        ),
        (
            RecordDict(
                {
                    "fedtune": config(),
                    "tensors": ArrayRecord({"packed": Array("uint8", (4,), TENSORS_STYPE, b"abc")}),
                }
            ),
            r"expected uint8 array of shape \(3,\), got 'uint8' \(4,\)",
        ),
    ],
)
def test_a_record_that_is_no_such_message_is_refused(record: RecordDict, words: str) -> None:
    with pytest.raises(ProtocolError, match=words):
        from_record(record, TRAIN)
