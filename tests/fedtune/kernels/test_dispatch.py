"""Which path a device takes, and what is said of it."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import pytest
import torch
from host import HostLauncher
from oracle import random_packed

from fedtune.errors import ConfigError, KernelError
from fedtune.kernels import dispatch
from fedtune.kernels.native import Compiler

CPU = torch.device("cpu")
BROKEN_COMPILER = """#!/bin/sh
for word in "$@"; do
    if [ "$word" = -E ]; then echo '#define __STDC__ 1'; exit 0; fi
done
echo 'x.c: In function f:' >&2
echo 'x.c:1: error: no headers' >&2
exit 1
"""


@pytest.fixture
def undecided(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """As in a fresh process that finds the compiler of this machine and an empty cache."""
    monkeypatch.setattr(dispatch, "_LAUNCHERS", {})
    monkeypatch.setattr(dispatch, "_NATIVE", {})
    monkeypatch.setattr(dispatch, "_WHY_TORCH", {})
    monkeypatch.setenv("FEDTUNE_CACHE", str(tmp_path))
    monkeypatch.setenv("FEDTUNE_KERNELS", "")
    return monkeypatch


def unpacked_on_the_cpu() -> torch.Tensor:
    packed, _ = random_packed(4, 64, (2, 256))
    return dispatch.dequantise(packed, 0, torch.empty(512))


def test_the_cpu_unpacks_with_c_where_there_is_a_compiler(
    undecided: pytest.MonkeyPatch, compiler: Compiler, caplog: pytest.LogCaptureFixture
) -> None:
    undecided.setenv("CC", compiler.path)
    with caplog.at_level(logging.INFO, "fedtune.kernels.dispatch"):
        assert dispatch.launcher_of(torch.empty(0)) is None
        unpacked_on_the_cpu()
    name = f"compiled C ({Path(compiler.path).name}, {compiler.vectors})"
    assert dispatch.path_of(CPU) == dispatch.paths()["cpu"] == name
    assert caplog.messages == [f"kernels on cpu: {name}"]
    with dispatch.chosen(None, CPU):
        assert dispatch.path_of(CPU) == "plain torch (asked for)"
    assert dispatch.path_of(CPU) == name


def test_a_cpu_without_a_compiler_takes_plain_torch_with_one_line(
    undecided: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    undecided.setattr(dispatch, "c_compilers", lambda: ("no-such-compiler",))
    with caplog.at_level(logging.INFO, "fedtune.kernels.dispatch"):
        unpacked_on_the_cpu()
        unpacked_on_the_cpu()
    why = "no C compiler among no-such-compiler"
    if sys.platform == "win32":
        why = "there is no C path on Windows"
    assert caplog.messages == [f"kernels on cpu: plain torch ({why})"]


@pytest.mark.skipif(sys.platform == "win32", reason="there is no C path on Windows")
def test_a_compiler_that_fails_is_warned_of_in_one_line(
    undecided: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    broken = tmp_path / "cc"
    broken.write_text(BROKEN_COMPILER, encoding="utf-8")
    broken.chmod(0o755)
    undecided.setattr(dispatch, "c_compilers", lambda: (str(broken),))
    with caplog.at_level(logging.WARNING, "fedtune.kernels.dispatch"):
        unpacked_on_the_cpu()
    assert caplog.messages == [
        f"no compiled C on this CPU, which is slower: {broken} failed: x.c:1: error: no headers"
    ]


def test_plain_torch_can_be_asked_for(undecided: pytest.MonkeyPatch) -> None:
    undecided.setenv("FEDTUNE_KERNELS", "torch")
    assert dispatch.path_of(CPU) == "plain torch (FEDTUNE_KERNELS asks for it)"


def test_c_can_be_demanded(undecided: pytest.MonkeyPatch) -> None:
    undecided.setenv("FEDTUNE_KERNELS", "c")
    undecided.setattr(dispatch, "c_compilers", lambda: ("no-such-compiler",))
    with pytest.raises(KernelError, match=r"no C compiler|no C path"):
        unpacked_on_the_cpu()


def test_another_path_is_refused(undecided: pytest.MonkeyPatch) -> None:
    undecided.setenv("FEDTUNE_KERNELS", "fast")
    with pytest.raises(ConfigError, match="must be auto, c or torch, got 'fast'"):
        unpacked_on_the_cpu()


def test_a_launcher_is_used_where_it_is_chosen_and_only_as_long(host: HostLauncher) -> None:
    packed, _ = random_packed(4, 64, (2, 256))
    host.launched.clear()
    with dispatch.chosen(host, CPU):
        dispatch.dequantise(packed, 0, torch.empty(512))
        assert dispatch.paths()["cpu"] == "compiled CUDA kernels"
    dispatch.dequantise(packed, 0, torch.empty(512))
    assert host.launched == ["dequantise_4_f32"]


def test_a_gpu_whose_kernels_do_not_load_takes_plain_torch_with_one_line(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(index: int) -> None:
        raise KernelError(f"no code for cuda:{index}")

    gpu = torch.device("cuda", 7)
    monkeypatch.setattr(dispatch, "_LAUNCHERS", {})
    monkeypatch.setattr(dispatch, "Driver", refuse)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with caplog.at_level(logging.INFO, "fedtune.kernels.dispatch"):
        assert dispatch._choose(gpu) is None
        assert dispatch._choose(gpu) is None
    assert caplog.messages == ["kernels on cuda:7: plain torch (no code for cuda:7)"]
