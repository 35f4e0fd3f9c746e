from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class TaskSpec(_message.Message):
    __slots__ = ("run", "task", "base_digest", "matrices", "seed")
    RUN_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    BASE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    MATRICES_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    run: str
    task: str
    base_digest: str
    matrices: _containers.RepeatedScalarFieldContainer[str]
    seed: int
    def __init__(self, run: _Optional[str] = ..., task: _Optional[str] = ..., base_digest: _Optional[str] = ..., matrices: _Optional[_Iterable[str]] = ..., seed: _Optional[int] = ...) -> None: ...

class DeviceProfile(_message.Message):
    __slots__ = ("name", "device_class", "cpu_threads", "memory_bytes", "accelerator", "accelerator_memory_bytes", "matmul_flops_per_s", "memory_bandwidth_bytes_per_s", "link_bytes_per_s", "formats", "versions", "compute")
    class MatmulFlopsPerSEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    class VersionsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    NAME_FIELD_NUMBER: _ClassVar[int]
    DEVICE_CLASS_FIELD_NUMBER: _ClassVar[int]
    CPU_THREADS_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    ACCELERATOR_FIELD_NUMBER: _ClassVar[int]
    ACCELERATOR_MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    MATMUL_FLOPS_PER_S_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BANDWIDTH_BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    LINK_BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    FORMATS_FIELD_NUMBER: _ClassVar[int]
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_FIELD_NUMBER: _ClassVar[int]
    name: str
    device_class: str
    cpu_threads: int
    memory_bytes: int
    accelerator: str
    accelerator_memory_bytes: int
    matmul_flops_per_s: _containers.ScalarMap[str, float]
    memory_bandwidth_bytes_per_s: float
    link_bytes_per_s: float
    formats: _containers.RepeatedScalarFieldContainer[str]
    versions: _containers.ScalarMap[str, str]
    compute: str
    def __init__(self, name: _Optional[str] = ..., device_class: _Optional[str] = ..., cpu_threads: _Optional[int] = ..., memory_bytes: _Optional[int] = ..., accelerator: _Optional[str] = ..., accelerator_memory_bytes: _Optional[int] = ..., matmul_flops_per_s: _Optional[_Mapping[str, float]] = ..., memory_bandwidth_bytes_per_s: _Optional[float] = ..., link_bytes_per_s: _Optional[float] = ..., formats: _Optional[_Iterable[str]] = ..., versions: _Optional[_Mapping[str, str]] = ..., compute: _Optional[str] = ...) -> None: ...

class DenseShape(_message.Message):
    __slots__ = ("name", "shape")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    name: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, name: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ...) -> None: ...

class SiteReport(_message.Message):
    __slots__ = ("profile", "base_digest", "train_samples", "held_out_samples", "train_tokens", "dense", "labels", "warnings", "devices")
    PROFILE_FIELD_NUMBER: _ClassVar[int]
    BASE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    TRAIN_SAMPLES_FIELD_NUMBER: _ClassVar[int]
    HELD_OUT_SAMPLES_FIELD_NUMBER: _ClassVar[int]
    TRAIN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    DENSE_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    WARNINGS_FIELD_NUMBER: _ClassVar[int]
    DEVICES_FIELD_NUMBER: _ClassVar[int]
    profile: DeviceProfile
    base_digest: str
    train_samples: int
    held_out_samples: int
    train_tokens: int
    dense: _containers.RepeatedCompositeFieldContainer[DenseShape]
    labels: _containers.RepeatedScalarFieldContainer[str]
    warnings: _containers.RepeatedScalarFieldContainer[str]
    devices: int
    def __init__(self, profile: _Optional[_Union[DeviceProfile, _Mapping]] = ..., base_digest: _Optional[str] = ..., train_samples: _Optional[int] = ..., held_out_samples: _Optional[int] = ..., train_tokens: _Optional[int] = ..., dense: _Optional[_Iterable[_Union[DenseShape, _Mapping]]] = ..., labels: _Optional[_Iterable[str]] = ..., warnings: _Optional[_Iterable[str]] = ..., devices: _Optional[int] = ...) -> None: ...

class MatrixPlan(_message.Message):
    __slots__ = ("name", "rank", "tail_rank", "format", "block_size", "correction_rank")
    NAME_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    TAIL_RANK_FIELD_NUMBER: _ClassVar[int]
    FORMAT_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    CORRECTION_RANK_FIELD_NUMBER: _ClassVar[int]
    name: str
    rank: int
    tail_rank: int
    format: str
    block_size: int
    correction_rank: int
    def __init__(self, name: _Optional[str] = ..., rank: _Optional[int] = ..., tail_rank: _Optional[int] = ..., format: _Optional[str] = ..., block_size: _Optional[int] = ..., correction_rank: _Optional[int] = ...) -> None: ...

class DevicePlan(_message.Message):
    __slots__ = ("device", "matrices", "micro_batch", "batch_size", "sequence_length", "local_steps", "checkpointing", "first_trained_layer", "peak_bytes", "seconds", "download_bytes", "upload_bytes", "binding")
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    MATRICES_FIELD_NUMBER: _ClassVar[int]
    MICRO_BATCH_FIELD_NUMBER: _ClassVar[int]
    BATCH_SIZE_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_LENGTH_FIELD_NUMBER: _ClassVar[int]
    LOCAL_STEPS_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINTING_FIELD_NUMBER: _ClassVar[int]
    FIRST_TRAINED_LAYER_FIELD_NUMBER: _ClassVar[int]
    PEAK_BYTES_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    DOWNLOAD_BYTES_FIELD_NUMBER: _ClassVar[int]
    UPLOAD_BYTES_FIELD_NUMBER: _ClassVar[int]
    BINDING_FIELD_NUMBER: _ClassVar[int]
    device: str
    matrices: _containers.RepeatedCompositeFieldContainer[MatrixPlan]
    micro_batch: int
    batch_size: int
    sequence_length: int
    local_steps: int
    checkpointing: bool
    first_trained_layer: int
    peak_bytes: int
    seconds: float
    download_bytes: int
    upload_bytes: int
    binding: str
    def __init__(self, device: _Optional[str] = ..., matrices: _Optional[_Iterable[_Union[MatrixPlan, _Mapping]]] = ..., micro_batch: _Optional[int] = ..., batch_size: _Optional[int] = ..., sequence_length: _Optional[int] = ..., local_steps: _Optional[int] = ..., checkpointing: _Optional[bool] = ..., first_trained_layer: _Optional[int] = ..., peak_bytes: _Optional[int] = ..., seconds: _Optional[float] = ..., download_bytes: _Optional[int] = ..., upload_bytes: _Optional[int] = ..., binding: _Optional[str] = ...) -> None: ...

class OptimizerSpec(_message.Message):
    __slots__ = ("name", "learning_rate", "final_learning_rate", "weight_decay", "beta1", "beta2", "max_gradient_norm", "keep", "way", "proximal")
    NAME_FIELD_NUMBER: _ClassVar[int]
    LEARNING_RATE_FIELD_NUMBER: _ClassVar[int]
    FINAL_LEARNING_RATE_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_DECAY_FIELD_NUMBER: _ClassVar[int]
    BETA1_FIELD_NUMBER: _ClassVar[int]
    BETA2_FIELD_NUMBER: _ClassVar[int]
    MAX_GRADIENT_NORM_FIELD_NUMBER: _ClassVar[int]
    KEEP_FIELD_NUMBER: _ClassVar[int]
    WAY_FIELD_NUMBER: _ClassVar[int]
    PROXIMAL_FIELD_NUMBER: _ClassVar[int]
    name: str
    learning_rate: float
    final_learning_rate: float
    weight_decay: float
    beta1: float
    beta2: float
    max_gradient_norm: float
    keep: bool
    way: TrainingWay
    proximal: float
    def __init__(self, name: _Optional[str] = ..., learning_rate: _Optional[float] = ..., final_learning_rate: _Optional[float] = ..., weight_decay: _Optional[float] = ..., beta1: _Optional[float] = ..., beta2: _Optional[float] = ..., max_gradient_norm: _Optional[float] = ..., keep: _Optional[bool] = ..., way: _Optional[_Union[TrainingWay, _Mapping]] = ..., proximal: _Optional[float] = ...) -> None: ...

class TrainingWay(_message.Message):
    __slots__ = ("name", "start", "layer_rate_decay", "flops_share", "allora_eta", "channels", "seed")
    NAME_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    LAYER_RATE_DECAY_FIELD_NUMBER: _ClassVar[int]
    FLOPS_SHARE_FIELD_NUMBER: _ClassVar[int]
    ALLORA_ETA_FIELD_NUMBER: _ClassVar[int]
    CHANNELS_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    name: str
    start: str
    layer_rate_decay: float
    flops_share: float
    allora_eta: float
    channels: str
    seed: int
    def __init__(self, name: _Optional[str] = ..., start: _Optional[str] = ..., layer_rate_decay: _Optional[float] = ..., flops_share: _Optional[float] = ..., allora_eta: _Optional[float] = ..., channels: _Optional[str] = ..., seed: _Optional[int] = ...) -> None: ...

class TrainInstruction(_message.Message):
    __slots__ = ("run", "round", "base_digest", "plan", "optimizer", "seed", "tensors_digest", "evaluate", "scale", "labels", "codec", "scaling", "error_feedback")
    RUN_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    BASE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    OPTIMIZER_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    TENSORS_DIGEST_FIELD_NUMBER: _ClassVar[int]
    EVALUATE_FIELD_NUMBER: _ClassVar[int]
    SCALE_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    CODEC_FIELD_NUMBER: _ClassVar[int]
    SCALING_FIELD_NUMBER: _ClassVar[int]
    ERROR_FEEDBACK_FIELD_NUMBER: _ClassVar[int]
    run: str
    round: int
    base_digest: str
    plan: DevicePlan
    optimizer: OptimizerSpec
    seed: int
    tensors_digest: str
    evaluate: bool
    scale: float
    labels: _containers.RepeatedScalarFieldContainer[str]
    codec: str
    scaling: str
    error_feedback: bool
    def __init__(self, run: _Optional[str] = ..., round: _Optional[int] = ..., base_digest: _Optional[str] = ..., plan: _Optional[_Union[DevicePlan, _Mapping]] = ..., optimizer: _Optional[_Union[OptimizerSpec, _Mapping]] = ..., seed: _Optional[int] = ..., tensors_digest: _Optional[str] = ..., evaluate: _Optional[bool] = ..., scale: _Optional[float] = ..., labels: _Optional[_Iterable[str]] = ..., codec: _Optional[str] = ..., scaling: _Optional[str] = ..., error_feedback: _Optional[bool] = ...) -> None: ...

class TrainReport(_message.Message):
    __slots__ = ("run", "round", "device", "base_digest", "samples", "tokens", "metrics", "tensors_digest", "devices", "held_samples")
    class MetricsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    RUN_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    BASE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    TENSORS_DIGEST_FIELD_NUMBER: _ClassVar[int]
    DEVICES_FIELD_NUMBER: _ClassVar[int]
    HELD_SAMPLES_FIELD_NUMBER: _ClassVar[int]
    run: str
    round: int
    device: str
    base_digest: str
    samples: int
    tokens: int
    metrics: _containers.ScalarMap[str, float]
    tensors_digest: str
    devices: int
    held_samples: int
    def __init__(self, run: _Optional[str] = ..., round: _Optional[int] = ..., device: _Optional[str] = ..., base_digest: _Optional[str] = ..., samples: _Optional[int] = ..., tokens: _Optional[int] = ..., metrics: _Optional[_Mapping[str, float]] = ..., tensors_digest: _Optional[str] = ..., devices: _Optional[int] = ..., held_samples: _Optional[int] = ...) -> None: ...

class EvaluateInstruction(_message.Message):
    __slots__ = ("run", "round", "base_digest", "plan", "tensors_digest", "scale", "labels", "scaling")
    RUN_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    BASE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    TENSORS_DIGEST_FIELD_NUMBER: _ClassVar[int]
    SCALE_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    SCALING_FIELD_NUMBER: _ClassVar[int]
    run: str
    round: int
    base_digest: str
    plan: DevicePlan
    tensors_digest: str
    scale: float
    labels: _containers.RepeatedScalarFieldContainer[str]
    scaling: str
    def __init__(self, run: _Optional[str] = ..., round: _Optional[int] = ..., base_digest: _Optional[str] = ..., plan: _Optional[_Union[DevicePlan, _Mapping]] = ..., tensors_digest: _Optional[str] = ..., scale: _Optional[float] = ..., labels: _Optional[_Iterable[str]] = ..., scaling: _Optional[str] = ...) -> None: ...

class EvaluateReport(_message.Message):
    __slots__ = ("run", "round", "device", "metrics")
    class MetricsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    RUN_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    run: str
    round: int
    device: str
    metrics: _containers.ScalarMap[str, float]
    def __init__(self, run: _Optional[str] = ..., round: _Optional[int] = ..., device: _Optional[str] = ..., metrics: _Optional[_Mapping[str, float]] = ...) -> None: ...
