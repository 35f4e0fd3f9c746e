"""Which path a device takes, and what is said of it."""

from __future__ import annotations

import logging

import pytest
import torch
from host import HostLauncher
from oracle import random_packed

from fedtune.errors import KernelError
from fedtune.kernels import dispatch

CPU = torch.device("cpu")


def test_the_cpu_takes_plain_torch_and_says_why() -> None:
    assert dispatch.launcher_of(torch.empty(0)) is None
    assert dispatch.paths()["cpu"] == "plain torch (there are no compiled kernels for cpu)"


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
