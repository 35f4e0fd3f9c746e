"""The paths over which the tests of the kernels run: plain torch, and the compiled bodies."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # for the modules beside the tests

from host import HostLauncher, compile_for_host

from fedtune.kernels import dispatch


@pytest.fixture(scope="session")
def host(tmp_path_factory: pytest.TempPathFactory) -> HostLauncher:
    """The compiled bodies on the CPU."""
    library = compile_for_host(tmp_path_factory.mktemp("kernels"))
    if library is None:
        pytest.skip("g++ is not installed")
    return HostLauncher(library)


@pytest.fixture(params=["torch", "bodies", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Where a test makes its tensors; `dispatch` takes one path there during the test."""
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("there is no CUDA device")
        gpu = torch.device("cuda", 0)
        assert dispatch.launcher_of(torch.empty(0, device=gpu)) is not None, dispatch.paths()
        yield gpu
        torch.cuda.synchronize()
        return
    cpu = torch.device("cpu")
    launcher = request.getfixturevalue("host") if request.param == "bodies" else None
    with dispatch.chosen(launcher, cpu):
        yield cpu
