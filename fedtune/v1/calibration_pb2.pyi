from fedtune.v1 import fedtune_pb2 as _fedtune_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class CalibrationInstruction(_message.Message):
    __slots__ = ("run", "base_digest", "plan", "method", "rank", "batches", "seed", "tensors_digest", "labels", "measure_step")
    RUN_FIELD_NUMBER: _ClassVar[int]
    BASE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    METHOD_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    BATCHES_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    TENSORS_DIGEST_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    MEASURE_STEP_FIELD_NUMBER: _ClassVar[int]
    run: str
    base_digest: str
    plan: _fedtune_pb2.DevicePlan
    method: str
    rank: int
    batches: int
    seed: int
    tensors_digest: str
    labels: _containers.RepeatedScalarFieldContainer[str]
    measure_step: bool
    def __init__(self, run: _Optional[str] = ..., base_digest: _Optional[str] = ..., plan: _Optional[_Union[_fedtune_pb2.DevicePlan, _Mapping]] = ..., method: _Optional[str] = ..., rank: _Optional[int] = ..., batches: _Optional[int] = ..., seed: _Optional[int] = ..., tensors_digest: _Optional[str] = ..., labels: _Optional[_Iterable[str]] = ..., measure_step: _Optional[bool] = ...) -> None: ...

class CalibrationReport(_message.Message):
    __slots__ = ("run", "device", "base_digest", "method", "samples", "units", "tokens", "passes", "seconds", "step_seconds", "step_peak_bytes", "tensors_digest")
    RUN_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    BASE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    METHOD_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    UNITS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    PASSES_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    STEP_SECONDS_FIELD_NUMBER: _ClassVar[int]
    STEP_PEAK_BYTES_FIELD_NUMBER: _ClassVar[int]
    TENSORS_DIGEST_FIELD_NUMBER: _ClassVar[int]
    run: str
    device: str
    base_digest: str
    method: str
    samples: int
    units: int
    tokens: int
    passes: int
    seconds: float
    step_seconds: float
    step_peak_bytes: int
    tensors_digest: str
    def __init__(self, run: _Optional[str] = ..., device: _Optional[str] = ..., base_digest: _Optional[str] = ..., method: _Optional[str] = ..., samples: _Optional[int] = ..., units: _Optional[int] = ..., tokens: _Optional[int] = ..., passes: _Optional[int] = ..., seconds: _Optional[float] = ..., step_seconds: _Optional[float] = ..., step_peak_bytes: _Optional[int] = ..., tensors_digest: _Optional[str] = ...) -> None: ...
