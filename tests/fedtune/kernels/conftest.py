"""The paths over which the tests of the kernels run: plain torch, C, and the compiled bodies."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # for the modules beside the tests

from host import HostLauncher, compile_for_host

from fedtune.kernels import dispatch
from fedtune.kernels.native import (
    Compiler,
    NativeKernels,
    NoCompilerError,
    find_compiler,
    load_native,
)

COMPILERS = ("cc", "gcc", "clang")


@pytest.fixture(scope="session")
def host(tmp_path_factory: pytest.TempPathFactory) -> HostLauncher:
    """The compiled bodies on the CPU."""
    library = compile_for_host(tmp_path_factory.mktemp("kernels"))
    if library is None:
        pytest.skip("g++ is not installed")
    return HostLauncher(library)


@pytest.fixture(scope="session")
def compiler() -> Compiler:
    """A C compiler of this machine."""
    if sys.platform == "win32":
        pytest.skip("there is no C path on Windows")
    try:
        return find_compiler(COMPILERS)
    except NoCompilerError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def native(compiler: Compiler, tmp_path_factory: pytest.TempPathFactory) -> NativeKernels:
    """The C path, as a device takes it."""
    return load_native((compiler.path,), tmp_path_factory.mktemp("native"))


@pytest.fixture(params=["torch", "c", "bodies", pytest.param("cuda", marks=pytest.mark.gpu)])
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
    fixture = {"c": "native", "bodies": "host"}.get(request.param)
    with dispatch.chosen(fixture and request.getfixturevalue(fixture), cpu):
        yield cpu
