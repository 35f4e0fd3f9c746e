"""The launchers over which the tests of the kernels run."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for the modules beside the tests

from host import HostLauncher, compile_for_host


@pytest.fixture(scope="session")
def host(tmp_path_factory: pytest.TempPathFactory) -> HostLauncher:
    """The compiled bodies on the CPU."""
    library = compile_for_host(tmp_path_factory.mktemp("kernels"))
    if library is None:
        pytest.skip("g++ is not installed")
    return HostLauncher(library)
