"""The kernel bodies, compiled for the CPU: the launcher of the tests."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path
from struct import Struct

from fedtune.kernels.driver import FOLDER


class HostLauncher:
    """Runs each kernel with few threads, so that every team and thread has several turns.

    A read or write at an address that a GPU would refuse fails the test.
    """

    processors = 2
    most_teams = 3
    most_threads = 4

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        self.launched: list[str] = []

    def launch(
        self, name: str, teams: int, threads: int, layout: Struct, *arguments: float
    ) -> None:
        assert 1 <= teams <= 2**31 - 1
        assert 32 <= threads <= 1024
        assert threads % 32 == 0
        self.launched.append(name)
        packed = ctypes.create_string_buffer(layout.pack(*arguments), 512)
        function = getattr(self._library, name)
        function(
            ctypes.c_int64(min(teams, self.most_teams)),
            ctypes.c_int(min(threads, self.most_threads)),
            packed,
        )
        misaligned = ctypes.c_int.in_dll(self._library, "misaligned")
        found, misaligned.value = misaligned.value, 0
        assert found == 0, f"{name} read or wrote {found} times at an address that is not aligned"


def compile_for_host(folder: Path) -> Path | None:
    """Compile the bodies with g++; None where it is absent."""
    if shutil.which("g++") is None:
        return None
    library = folder / "kernels.so"
    flags = ["-std=c++20", "-O1", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off", "-pthread"]
    subprocess.run(
        ["g++", *flags, "-fPIC", "-shared", str(FOLDER / "kernels.cpp"), "-o", str(library)],
        check=True,
    )
    return library
