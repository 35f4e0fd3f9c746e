"""The run file, read once at the edge: from TOML and `--set` to a frozen `RunConfig`.

`load_run_config` is the only place that reads a run file; the other functions here are the only
ones that read the environment. Unknown keys and bad values are one-line errors that name the file,
the key, the value, what is allowed and the nearest valid key.
"""

from __future__ import annotations

import difflib
import json
import os
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, TypeAlias, cast, get_args

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from fedtune.errors import ConfigError, one_line
from fedtune.settings import DeviceClassSection, PartitionSection, RunConfig, Section

KernelPath: TypeAlias = Literal["auto", "c", "torch"]


def load_run_config(
    path: Path, overrides: Sequence[str] = (), options: Mapping[str, str] | None = None
) -> RunConfig:
    """Read a run file (`.toml`, or the `config.json` of a run folder) and apply overrides.

    Paths inside the file are relative to the file's folder where something is there, else to the
    working folder; paths in overrides to the working folder.

    Args:
        path: the run file.
        overrides: `section.key=value`, the value in TOML's form or a plain text.
        options: key -> what to name in an error instead of `--set`, where another option of the
            command line gave its override.

    Raises:
        ConfigError: the file is missing, not TOML, or holds an unknown key or a bad value.
    """
    tree = _read_tree(path)
    _anchor_paths(tree, path.parent)
    for override in overrides:
        _apply_override(tree, override)
    given = {override.partition("=")[0].strip(): "--set" for override in overrides}
    return _validate(tree, str(path), given | dict(options or {}))


def parse_run_config(tree: Mapping[str, object], source: str) -> RunConfig:
    """Validate a tree of plain values.

    Args:
        tree: sections of keys, as TOML gives them.
        source: what to call the tree in an error, usually a file name.

    Raises:
        ConfigError: an unknown key or a bad value; the message names the first.
    """
    return _validate(tree, source, {})


def _validate(tree: Mapping[str, object], source: str, given: Mapping[str, str]) -> RunConfig:
    """`given`: keys that did not come from the source -> what they came from."""
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        blamed = given.get(key, source)
        raise ConfigError(one_line(f"{blamed}: {_describe(first)}")) from None


def _read_tree(path: Path) -> dict[str, object]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8"
        ) from None
    except OSError as error:
        raise ConfigError(
            f"run file {path} cannot be read ({error.strerror}); write one with: fedtune init"
        ) from None
    form = "JSON" if path.suffix == ".json" else "TOML"
    try:
        tree = json.loads(text) if form == "JSON" else tomllib.loads(text)
    except RecursionError:
        raise ConfigError(f"{path} is not valid {form}: it is nested too deeply") from None
    except ValueError as error:  # also of numbers with thousands of digits
        raise ConfigError(one_line(f"{path} is not valid {form}: {error}")) from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold a JSON object of sections, found a {_kind(tree)}")
    return tree


def _kind(value: object) -> str:
    names = {list: "list", str: "text", bool: "boolean", int: "number", float: "number"}
    return names.get(type(value), "null")


def _anchor_paths(tree: dict[str, object], folder: Path) -> None:
    """Make what a file names beside itself absolute, so that it holds from anywhere."""

    def anchored(text: object) -> object:
        if isinstance(text, str) and text and os.path.exists(folder / text):
            return str((folder / text).resolve())
        return text

    data, model, plan = tree.get("data"), tree.get("model"), tree.get("plan")
    importance = tree.get("importance")
    if isinstance(data, dict):
        for key in ("train", "test"):
            if key in data:
                data[key] = anchored(data[key])
        if isinstance(data.get("sites"), dict):
            data["sites"] = {name: anchored(value) for name, value in data["sites"].items()}
    named = ((model, "path"), (plan, "distortion"), (plan, "file"), (importance, "file"))
    for section, key in named:
        if isinstance(section, dict) and key in section:
            section[key] = anchored(section[key])


def _apply_override(tree: dict[str, object], override: str) -> None:
    key, separator, text = override.partition("=")
    parts = [part.strip() for part in key.split(".")]
    if not separator or not all(parts):
        raise ConfigError(f"--set needs section.key=value, got {override!r}")
    node = tree
    for depth, part in enumerate(parts[:-1], start=1):
        below = node.setdefault(part, {})
        if not isinstance(below, dict):
            raise ConfigError(
                f"--set {override}: {'.'.join(parts[:depth])} is a value, not a section"
            )
        node = below
    # The two sources of data exclude each other; naming one on the command line drops the other.
    data = tree.get("data")
    if isinstance(data, dict) and parts[0] == "data" and len(parts) > 1:
        dropped = {"train": "sites", "sites": "train"}.get(parts[1])
        if dropped is not None:
            data.pop(dropped, None)
    node[parts[-1]] = _override_value(parts, text.strip())


def _override_value(parts: Sequence[str], text: str) -> object:
    """Read a value in TOML's form; a plain text where that fails or where a text is wanted."""
    try:
        value: object = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
    section = _section_at(parts[:-1])
    field = section.model_fields.get(parts[-1]) if section else None
    wants_text = field is not None and field.annotation is str
    return text if wants_text and not isinstance(value, str) else value


SUPERVISOR_VARIABLE = "FEDTUNE_SUPERVISOR"
"""Set by a supervisor for the processes that it starts."""


def is_supervised() -> bool:
    """Whether a supervisor started this process, and keeps what it writes to its error stream."""
    return bool(os.environ.get(SUPERVISOR_VARIABLE, ""))


def service_manager() -> tuple[str, str, str]:
    """What systemd has set: NOTIFY_SOCKET, WATCHDOG_USEC and WATCHDOG_PID; empty where it did not.

    Source: sd_notify(3), sd_watchdog_enabled(3).
    """
    names = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")
    address, watchdog_us, watchdog_pid = (os.environ.get(name, "") for name in names)
    return address, watchdog_us, watchdog_pid


def inherited_environment() -> dict[str, str]:
    """This process's environment for one that it starts, without what is meant for it alone."""
    ours = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", SUPERVISOR_VARIABLE)
    return {name: value for name, value in os.environ.items() if name not in ours}


def operator_file_from_environment() -> Path | None:
    """The operator file that `FEDTUNE_OPERATOR` names, if it names one."""
    named = os.environ.get("FEDTUNE_OPERATOR", "")
    return Path(named) if named else None


def cache_folder() -> Path:
    """Where files that can be made again are kept, such as the demo's base model.

    `FEDTUNE_CACHE` where it is set, else the platform's folder for a user's caches.
    """
    chosen = os.environ.get("FEDTUNE_CACHE", "")
    if chosen:
        return Path(chosen)
    if sys.platform == "win32":
        local = os.environ.get("LOCALAPPDATA", "")
        return (Path(local) if local else Path.home() / "AppData" / "Local") / "fedtune" / "cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "fedtune"
    shared = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(shared) if shared else Path.home() / ".cache") / "fedtune"


def coordinator_home() -> Path:
    """The coordinator's home that a process of a deployment works for.

    Raises:
        ConfigError: `FEDTUNE_COORDINATOR_HOME` is not set; the process was not started by
            `fedtune server start`.
    """
    chosen = os.environ.get("FEDTUNE_COORDINATOR_HOME", "")
    if not chosen:
        raise ConfigError(
            "FEDTUNE_COORDINATOR_HOME is not set; fedtune server start sets it for its processes"
        )
    return Path(chosen)


def kernel_path() -> KernelPath:
    """Which path kernels take: `FEDTUNE_KERNELS` where it is set, else `auto`.

    `auto` takes the fastest that runs on a device. `c` wants compiled C on the CPU, and an error
    where that cannot be. `torch` wants plain torch, on GPUs too.

    Raises:
        ConfigError: the variable holds something else.
    """
    chosen = os.environ.get("FEDTUNE_KERNELS", "") or "auto"
    for path in get_args(KernelPath):
        if chosen == path:
            return cast(KernelPath, path)
    raise ConfigError(
        f"FEDTUNE_KERNELS must be auto, c or torch, got {chosen!r}; change or unset it"
    )


def c_compilers() -> tuple[str, ...]:
    """Names or paths of C compilers, the first choice first: `CC` and `CXX` where they are set."""
    chosen = (os.environ.get("CC", ""), os.environ.get("CXX", ""))
    return tuple(dict.fromkeys(name for name in (*chosen, "cc", "gcc", "clang", "g++") if name))


def is_insecure() -> bool:
    """Whether `--insecure` started this site: it talks to its coordinator without TLS."""
    return os.environ.get("FEDTUNE_INSECURE", "") == "1"


# ---------------------------------------------------------------- refusing


def _describe(error: ErrorDetails) -> str:
    """One line for one pydantic error: key, value, what is allowed, nearest valid key."""
    location = tuple(str(part) for part in error["loc"])
    key = ".".join(location)
    if error["type"] == "extra_forbidden":
        return f"unknown key {key}; {_hint(location)}"
    if error["type"] == "missing":
        return f"missing key {key}; {_purpose(location)}"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error" and isinstance(error["input"], dict):
        return message
    value = repr(error["input"])
    value = value if len(value) <= 60 else f"{value[:57]}..."
    return f"{key} = {value}: expected {_expected(error, message)}"


def _expected(error: ErrorDetails, message: str) -> str:
    kind = error["type"]
    if kind in ("model_type", "dict_type", "model_attributes_type"):
        return f"a section, written as [{'.'.join(str(part) for part in error['loc'])}]"
    if kind in ("tuple_type", "list_type"):
        return "a list, or a text with commas"
    if kind in ("too_short", "string_too_short"):
        return f"at least {error['ctx']['min_length']} of them" if kind == "too_short" else "a text"
    if kind == "string_pattern_mismatch":
        return "letters, digits, '.', '_' and '-', of which a letter or digit first"
    if kind == "string_type":
        return "a text"
    message = message.removeprefix("Input should be ")
    return f"a value {message}" if message.startswith(("greater", "less")) else message


def _hint(location: tuple[str, ...]) -> str:
    """The nearest valid key, the section that the key belongs to, or all valid keys."""
    name = location[-1]
    section = _section_at(location[:-1])
    valid = list(section.model_fields) if section else []
    near = difflib.get_close_matches(name.replace("-", "_"), valid, n=1, cutoff=0.6)
    elsewhere = [f"{path}.{name}" for path, keys in _sections() if name in keys]
    if near and not (elsewhere and section is RunConfig):
        return f"did you mean {near[0]}?"
    if elsewhere:
        return f"did you mean {' or '.join(elsewhere)}?"
    return f"valid keys: {', '.join(valid)}"


def _purpose(location: tuple[str, ...]) -> str:
    section = _section_at(location[:-1])
    field = section.model_fields.get(location[-1]) if section else None
    if field is not None and field.description:
        return field.description
    return {
        "model": "add a [model] section with path",
        "data": "add a [data] section with train or sites",
        "fleet": "add at least one [fleet.NAME] section with count and memory",
    }.get(location[-1], "it has no default")


def _sections() -> Iterator[tuple[str, list[str]]]:
    """Every section that holds plain keys, with them."""
    for name, field in RunConfig.model_fields.items():
        section = DeviceClassSection if name == "fleet" else field.annotation
        assert isinstance(section, type)
        assert issubclass(section, Section)
        yield ("fleet.NAME" if name == "fleet" else name), list(section.model_fields)
    yield "data.partition", list(PartitionSection.model_fields)


def _section_at(location: Sequence[str]) -> type[Section] | None:
    """The section class that a key path leads to."""
    section: type[Section] = RunConfig
    parts = list(location)
    while parts:
        part = parts.pop(0)
        if section is RunConfig and part == "fleet":
            if not parts:
                return None
            parts.pop(0)
            section = DeviceClassSection
            continue
        field = section.model_fields.get(part)
        if field is None or not isinstance(field.annotation, type):
            return None
        if not issubclass(field.annotation, Section):
            return None
        section = field.annotation
    return section
