"""Limits of control groups, on trees laid out as kernels lay them out."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedtune.devices.control_groups import MemoryLimit, memory_limits, processor_quota
from fedtune.devices.memory import free_memory
from fedtune.devices.processor import usable_cores

MOUNT_1 = "32 31 0:29 {top} /sys/fs/cgroup/{name} rw,relatime shared:9 - cgroup cgroup rw,{name}\n"
MOUNT_2 = "29 23 0:26 {top} /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"


def lay_out(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root


def version_2(root: Path, group: str, groups: dict[str, dict[str, str]], top: str = "/") -> Path:
    files = {
        f"sys/fs/cgroup{name.rstrip('/')}/{file}": text
        for name, held in groups.items()
        for file, text in held.items()
    }
    return lay_out(
        root,
        {
            "proc/self/cgroup": f"0::{group}\n",
            "proc/self/mountinfo": "1 0 8:1 / / rw - ext4 /dev/sda rw\n" + MOUNT_2.format(top=top),
            **files,
        },
    )


STAT = "anon 300\nfile 700\nfile_mapped 50\ninactive_file 400\nactive_file 250\n"


def test_file_cache_counts_as_free_and_mapped_files_do_not(tmp_path: Path) -> None:
    held = {
        "memory.max": "2000\n",
        "memory.high": "max\n",
        "memory.current": "1000\n",
        "memory.stat": STAT + "slab_reclaimable 40\n",
    }
    root = version_2(tmp_path, "/user.slice/job", {"/user.slice/job": held})
    (limit,) = memory_limits(root)
    assert limit == MemoryLimit(2000, 1000 - (400 + 250 - 50) - 40)
    assert limit.free_bytes == 1640


def test_the_lower_of_two_limits_of_a_group_holds(tmp_path: Path) -> None:
    held = {"memory.max": "2000", "memory.high": "1500", "memory.current": "100"}
    (limit,) = memory_limits(version_2(tmp_path, "/job", {"/job": held}))
    assert limit == MemoryLimit(1500, 100)


def test_the_groups_around_are_limits_as_well(tmp_path: Path) -> None:
    groups = {
        "/slice/job": {"memory.max": "max", "memory.current": "10", "cpu.max": "max 100000"},
        "/slice": {"memory.max": "900", "memory.current": "500", "cpu.max": "150000 100000"},
        "/": {"memory.max": "max", "memory.current": "600", "cpu.max": "400000 100000"},
    }
    root = version_2(tmp_path, "/slice/job", groups)
    assert memory_limits(root) == [MemoryLimit(900, 500)]
    assert processor_quota(root) == 1.5


def test_a_container_that_names_its_group_from_the_hosts_root_is_found(tmp_path: Path) -> None:
    held = {"memory.max": "800", "memory.current": "300", "cpu.max": "50000 100000"}
    root = version_2(tmp_path, "/docker/abc/init", {"/": held}, top="/docker/abc")
    assert memory_limits(root) == [MemoryLimit(800, 300)]
    assert processor_quota(root) == 0.5


def test_a_container_that_sees_another_root_is_found(tmp_path: Path) -> None:
    held = {"memory.max": "800", "memory.current": "300"}
    root = version_2(tmp_path, "/somewhere/else", {"/": held}, top="/docker/abc")
    assert memory_limits(root) == [MemoryLimit(800, 300)]


def version_1(root: Path, **files: str) -> Path:
    """Memory and processor as systemd lays them out, the names tied as in `cpu,cpuacct`."""
    mounts = MOUNT_1.format(top="/", name="memory") + MOUNT_1.format(top="/", name="cpu,cpuacct")
    return lay_out(
        root,
        {
            "proc/self/cgroup": "9:memory:/job\n4:cpu,cpuacct:/job\n0::/\n",
            "proc/self/mountinfo": mounts + MOUNT_2.format(top="/"),
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": "999999\n",
            **files,
        },
    )


def test_version_1_has_a_tree_for_each_resource(tmp_path: Path) -> None:
    stat = "cache 1\ntotal_inactive_file 400\ntotal_active_file 250\ntotal_mapped_file 50\n"
    root = version_1(
        tmp_path,
        **{
            "sys/fs/cgroup/memory/job/memory.limit_in_bytes": "2000\n",
            "sys/fs/cgroup/memory/job/memory.usage_in_bytes": "1000\n",
            "sys/fs/cgroup/memory/job/memory.stat": stat,
            "sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_quota_us": "250000\n",
            "sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_period_us": "100000\n",
        },
    )
    assert memory_limits(root) == [MemoryLimit(2000, 400)]
    assert processor_quota(root) == 2.5


def test_minus_one_and_the_largest_number_are_no_limits(tmp_path: Path) -> None:
    root = version_1(
        tmp_path,
        **{
            "sys/fs/cgroup/memory/job/memory.limit_in_bytes": "9223372036854771712\n",
            "sys/fs/cgroup/memory/job/memory.usage_in_bytes": "1000\n",
            "sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_period_us": "100000\n",
        },
    )
    assert memory_limits(root) == []
    assert processor_quota(root) is None


def test_without_control_groups_there_are_no_limits(tmp_path: Path) -> None:
    assert memory_limits(tmp_path) == []
    assert processor_quota(tmp_path) is None


@pytest.mark.parametrize("text", ["", "nonsense", "0::relative\n", "x:memory:/job\n"])
def test_files_that_say_something_else_are_no_limits(tmp_path: Path, text: str) -> None:
    lay_out(tmp_path, {"proc/self/cgroup": text, "proc/self/mountinfo": "1 2 3\n - \nx - cgroup\n"})
    assert memory_limits(tmp_path) == []


def test_a_full_group_leaves_nothing(tmp_path: Path) -> None:
    held = {"memory.max": "800", "memory.current": "900"}
    (limit,) = memory_limits(version_2(tmp_path, "/", {"/": held}))
    assert limit.free_bytes == 0


def test_the_tightest_group_limits_free_memory(tmp_path: Path) -> None:
    groups = {
        "/slice/job": {"memory.max": "5000", "memory.current": "10"},
        "/slice": {"memory.max": "3000", "memory.current": "500"},
    }
    found = free_memory(version_2(tmp_path, "/slice/job", groups))
    assert (found.free_bytes, found.limit) == (2500, "control group")


@pytest.mark.parametrize(
    ("quota", "cores"), [("50000", 1), ("190000", 1), ("300000", 3), ("6400000", 8)]
)
def test_a_quota_is_rounded_down_to_whole_cores(
    tmp_path: Path, quota: str, cores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)), raising=False)
    assert usable_cores(version_2(tmp_path, "/", {"/": {"cpu.max": f"{quota} 100000"}})) == cores
