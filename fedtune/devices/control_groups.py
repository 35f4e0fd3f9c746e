"""The limits that Linux control groups put on this process: memory and processor time.

A container and a systemd service are control groups, and so are the groups around them; each may
have a limit, and all of them hold. Version 1 has a tree per resource, version 2 one tree for all.
On other systems, and where nothing is mounted, there are no limits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final, Literal

_UNLIMITED: Final = 2**60
"""Version 1 writes no limit as the largest multiple of a page below 2^63."""
Resource = Literal["memory", "cpu"]


@dataclass(frozen=True, slots=True)
class _Tree:
    """Where one resource is accounted: this process's folder and all around it, inside first."""

    version: Literal[1, 2]
    folders: tuple[Path, ...]


@dataclass(frozen=True, slots=True)
class MemoryLimit:
    """A group's limit, and what of it is in use and cannot be had back.

    Attributes:
        used_bytes: without the file cache that the kernel drops when memory is short. Pages of
            files that are mapped count as used: they are programs and libraries that run.
    """

    limit_bytes: int
    used_bytes: int

    @property
    def free_bytes(self) -> int:
        return max(0, self.limit_bytes - self.used_bytes)


def memory_limits(root: Path = Path("/")) -> list[MemoryLimit]:
    """The memory limits of all groups that this process is in.

    Args:
        root: the root of the file system.

    Source:
        Linux, Documentation/admin-guide/cgroup-v2.rst (memory.max, memory.high, memory.stat) and
        cgroup-v1/memory.rst, section 5.2 (the `total_` figures count the groups below).
    """
    tree = _tree(root, "memory")
    if tree is None:
        return []
    read = _memory_v1 if tree.version == 1 else _memory_v2
    return [limit for folder in tree.folders if (limit := read(folder)) is not None]


def processor_quota(root: Path = Path("/")) -> float | None:
    """How many processors' time this process may use; None: no limit.

    Args:
        root: the root of the file system.
    """
    tree = _tree(root, "cpu")
    if tree is None:
        return None
    read = _quota_v1 if tree.version == 1 else _quota_v2
    return min((quota for folder in tree.folders if (quota := read(folder))), default=None)


# ---------------------------------------------------------------- one group


def _memory_v2(folder: Path) -> MemoryLimit | None:
    limits = [_number(folder / name) for name in ("memory.max", "memory.high")]
    found = [limit for limit in limits if limit is not None]
    used = _number(folder / "memory.current")
    if not found or used is None:
        return None
    stat = _table(folder / "memory.stat")
    cache = stat.get("inactive_file", 0) + stat.get("active_file", 0) - stat.get("file_mapped", 0)
    cache = max(0, cache) + stat.get("slab_reclaimable", 0)
    return MemoryLimit(min(found), max(0, used - cache))


def _memory_v1(folder: Path) -> MemoryLimit | None:
    limit, used = (_number(folder / f"memory.{n}_in_bytes") for n in ("limit", "usage"))
    if limit is None or used is None or limit >= _UNLIMITED:
        return None
    stat = _table(folder / "memory.stat")
    cache = stat.get("total_inactive_file", 0) + stat.get("total_active_file", 0)
    return MemoryLimit(limit, max(0, used - max(0, cache - stat.get("total_mapped_file", 0))))


def _quota_v2(folder: Path) -> float | None:
    quota, _, period = _text(folder / "cpu.max").partition(" ")
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() else None


def _quota_v1(folder: Path) -> float | None:
    quota, period = (_number(folder / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
    return quota / period if quota is not None and period else None


# ---------------------------------------------------------------- where the groups are


def _tree(root: Path, resource: Resource) -> _Tree | None:
    """The tree that accounts a resource; version 1 goes first, for it may lack in version 2."""
    groups = _groups(root)
    mounts = list(_mounts(root))
    for version, kind in ((1, "cgroup"), (2, "cgroup2")):
        key = resource if version == 1 else ""
        for mount in mounts:
            if mount.kind == kind and key in groups and (version == 2 or resource in mount.options):
                folders = tuple(_around(root, mount, groups[key]))
                return _Tree(1 if version == 1 else 2, folders)
    return None


def _groups(root: Path) -> Mapping[str, str]:
    """Resource -> this process's group; the single one of version 2 under the empty name."""
    groups: dict[str, str] = {}
    for line in _text(root / "proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        resources, _, path = rest.partition(":")
        if number.isdigit() and path.startswith("/"):
            groups |= dict.fromkeys(resources.split(","), path)
    return groups


@dataclass(frozen=True, slots=True)
class _Mount:
    """A mounted tree of groups; `top` is the group that is seen as its root."""

    kind: str
    top: str
    folder: str
    options: frozenset[str]


def _mounts(root: Path) -> Iterator[_Mount]:
    """See proc_pid_mountinfo(5)."""
    for line in _text(root / "proc/self/mountinfo").splitlines():
        before, separator, after = line.partition(" - ")
        fields, types = before.split(), after.split()
        if separator and len(fields) > 4 and len(types) > 2 and types[0].startswith("cgroup"):
            yield _Mount(types[0], fields[3], fields[4], frozenset(types[2].split(",")))


def _around(root: Path, mount: _Mount, group: str) -> Iterator[Path]:
    """The group's folder and those around it, up to the mount.

    A container may see its own group as the mount's root while `/proc/self/cgroup` names it from
    the host's: then what both have in common is cut off, and what is not there is left out.
    """
    top, path = PurePosixPath(mount.top), PurePosixPath(group)
    inside = path.relative_to(top) if path.is_relative_to(top) else PurePosixPath()
    base = root / mount.folder.lstrip("/")
    for part in (inside, *inside.parents):
        folder = base / part
        if folder.is_dir():
            yield folder


# ---------------------------------------------------------------- files


def _text(path: Path) -> str:
    """A file's text; empty where there is none or it may not be read."""
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def _number(path: Path) -> int | None:
    """A file's number; None for `max`, for `-1`, and where there is none."""
    text = _text(path)
    return int(text) if text.isdigit() else None


def _table(path: Path) -> dict[str, int]:
    pairs = (line.split() for line in _text(path).splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdigit()}
