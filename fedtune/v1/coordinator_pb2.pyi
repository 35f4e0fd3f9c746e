from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class StartRunRequest(_message.Message):
    __slots__ = ("config_json", "overwrite")
    CONFIG_JSON_FIELD_NUMBER: _ClassVar[int]
    OVERWRITE_FIELD_NUMBER: _ClassVar[int]
    config_json: str
    overwrite: bool
    def __init__(self, config_json: _Optional[str] = ..., overwrite: _Optional[bool] = ...) -> None: ...

class RunName(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class RunInfo(_message.Message):
    __slots__ = ("name", "run", "state", "round", "rounds", "updated", "restarts", "reason", "devices", "since", "bytes_sent", "bytes_received")
    NAME_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    ROUNDS_FIELD_NUMBER: _ClassVar[int]
    UPDATED_FIELD_NUMBER: _ClassVar[int]
    RESTARTS_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    DEVICES_FIELD_NUMBER: _ClassVar[int]
    SINCE_FIELD_NUMBER: _ClassVar[int]
    BYTES_SENT_FIELD_NUMBER: _ClassVar[int]
    BYTES_RECEIVED_FIELD_NUMBER: _ClassVar[int]
    name: str
    run: str
    state: str
    round: int
    rounds: int
    updated: str
    restarts: int
    reason: str
    devices: _containers.RepeatedScalarFieldContainer[str]
    since: str
    bytes_sent: int
    bytes_received: int
    def __init__(self, name: _Optional[str] = ..., run: _Optional[str] = ..., state: _Optional[str] = ..., round: _Optional[int] = ..., rounds: _Optional[int] = ..., updated: _Optional[str] = ..., restarts: _Optional[int] = ..., reason: _Optional[str] = ..., devices: _Optional[_Iterable[str]] = ..., since: _Optional[str] = ..., bytes_sent: _Optional[int] = ..., bytes_received: _Optional[int] = ...) -> None: ...

class ListRunsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListRunsReply(_message.Message):
    __slots__ = ("runs",)
    RUNS_FIELD_NUMBER: _ClassVar[int]
    runs: _containers.RepeatedCompositeFieldContainer[RunInfo]
    def __init__(self, runs: _Optional[_Iterable[_Union[RunInfo, _Mapping]]] = ...) -> None: ...

class WatchRunRequest(_message.Message):
    __slots__ = ("name", "after")
    NAME_FIELD_NUMBER: _ClassVar[int]
    AFTER_FIELD_NUMBER: _ClassVar[int]
    name: str
    after: int
    def __init__(self, name: _Optional[str] = ..., after: _Optional[int] = ...) -> None: ...

class RunEvent(_message.Message):
    __slots__ = ("line", "json")
    LINE_FIELD_NUMBER: _ClassVar[int]
    JSON_FIELD_NUMBER: _ClassVar[int]
    line: int
    json: str
    def __init__(self, line: _Optional[int] = ..., json: _Optional[str] = ...) -> None: ...

class ListSitesRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListSitesReply(_message.Message):
    __slots__ = ("sites",)
    SITES_FIELD_NUMBER: _ClassVar[int]
    sites: _containers.RepeatedCompositeFieldContainer[SiteInfo]
    def __init__(self, sites: _Optional[_Iterable[_Union[SiteInfo, _Mapping]]] = ...) -> None: ...

class SiteInfo(_message.Message):
    __slots__ = ("name", "state", "online", "last_seen", "status")
    NAME_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    ONLINE_FIELD_NUMBER: _ClassVar[int]
    LAST_SEEN_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    name: str
    state: str
    online: bool
    last_seen: str
    status: SiteStatus
    def __init__(self, name: _Optional[str] = ..., state: _Optional[str] = ..., online: _Optional[bool] = ..., last_seen: _Optional[str] = ..., status: _Optional[_Union[SiteStatus, _Mapping]] = ...) -> None: ...

class SiteLogsRequest(_message.Message):
    __slots__ = ("site", "tail", "follow")
    SITE_FIELD_NUMBER: _ClassVar[int]
    TAIL_FIELD_NUMBER: _ClassVar[int]
    FOLLOW_FIELD_NUMBER: _ClassVar[int]
    site: str
    tail: int
    follow: bool
    def __init__(self, site: _Optional[str] = ..., tail: _Optional[int] = ..., follow: _Optional[bool] = ...) -> None: ...

class LogLine(_message.Message):
    __slots__ = ("json",)
    JSON_FIELD_NUMBER: _ClassVar[int]
    json: str
    def __init__(self, json: _Optional[str] = ...) -> None: ...

class SiteStatus(_message.Message):
    __slots__ = ("state", "run", "round", "step", "steps", "memory_bytes", "memory_allowed_bytes", "bytes_down_today", "bytes_up_today", "link_down_bytes_per_s", "link_up_bytes_per_s", "last_refusal", "log_lines", "versions", "device")
    class VersionsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    STATE_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    MEMORY_ALLOWED_BYTES_FIELD_NUMBER: _ClassVar[int]
    BYTES_DOWN_TODAY_FIELD_NUMBER: _ClassVar[int]
    BYTES_UP_TODAY_FIELD_NUMBER: _ClassVar[int]
    LINK_DOWN_BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    LINK_UP_BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    LAST_REFUSAL_FIELD_NUMBER: _ClassVar[int]
    LOG_LINES_FIELD_NUMBER: _ClassVar[int]
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    state: str
    run: str
    round: int
    step: int
    steps: int
    memory_bytes: int
    memory_allowed_bytes: int
    bytes_down_today: int
    bytes_up_today: int
    link_down_bytes_per_s: float
    link_up_bytes_per_s: float
    last_refusal: str
    log_lines: _containers.RepeatedScalarFieldContainer[str]
    versions: _containers.ScalarMap[str, str]
    device: str
    def __init__(self, state: _Optional[str] = ..., run: _Optional[str] = ..., round: _Optional[int] = ..., step: _Optional[int] = ..., steps: _Optional[int] = ..., memory_bytes: _Optional[int] = ..., memory_allowed_bytes: _Optional[int] = ..., bytes_down_today: _Optional[int] = ..., bytes_up_today: _Optional[int] = ..., link_down_bytes_per_s: _Optional[float] = ..., link_up_bytes_per_s: _Optional[float] = ..., last_refusal: _Optional[str] = ..., log_lines: _Optional[_Iterable[str]] = ..., versions: _Optional[_Mapping[str, str]] = ..., device: _Optional[str] = ...) -> None: ...

class SiteOrder(_message.Message):
    __slots__ = ("stopped_runs",)
    STOPPED_RUNS_FIELD_NUMBER: _ClassVar[int]
    stopped_runs: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, stopped_runs: _Optional[_Iterable[str]] = ...) -> None: ...

class ManifestRequest(_message.Message):
    __slots__ = ("run", "base_digest")
    RUN_FIELD_NUMBER: _ClassVar[int]
    BASE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    run: str
    base_digest: str
    def __init__(self, run: _Optional[str] = ..., base_digest: _Optional[str] = ...) -> None: ...

class Manifest(_message.Message):
    __slots__ = ("name", "files")
    NAME_FIELD_NUMBER: _ClassVar[int]
    FILES_FIELD_NUMBER: _ClassVar[int]
    name: str
    files: _containers.RepeatedCompositeFieldContainer[ArtifactFile]
    def __init__(self, name: _Optional[str] = ..., files: _Optional[_Iterable[_Union[ArtifactFile, _Mapping]]] = ...) -> None: ...

class ArtifactFile(_message.Message):
    __slots__ = ("path", "size", "sha256")
    PATH_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    path: str
    size: int
    sha256: str
    def __init__(self, path: _Optional[str] = ..., size: _Optional[int] = ..., sha256: _Optional[str] = ...) -> None: ...

class DownloadRequest(_message.Message):
    __slots__ = ("of", "path", "offset")
    OF_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    of: ManifestRequest
    path: str
    offset: int
    def __init__(self, of: _Optional[_Union[ManifestRequest, _Mapping]] = ..., path: _Optional[str] = ..., offset: _Optional[int] = ...) -> None: ...

class Chunk(_message.Message):
    __slots__ = ("offset", "data", "sha256")
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    offset: int
    data: bytes
    sha256: bytes
    def __init__(self, offset: _Optional[int] = ..., data: _Optional[bytes] = ..., sha256: _Optional[bytes] = ...) -> None: ...
