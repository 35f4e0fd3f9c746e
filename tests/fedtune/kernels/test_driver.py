"""The launcher against a driver library that records what it is called with."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import threading
from collections.abc import Iterator
from struct import Struct
from types import SimpleNamespace

import pytest
import torch

from fedtune.errors import KernelError
from fedtune.kernels import driver
from fedtune.kernels.driver import Driver

SOURCE = r"""
#include <cstring>
#include <string>
#include <vector>
using Word = unsigned long long;
static std::vector<std::string>* names = new std::vector<std::string>;
static thread_local void* current = nullptr;
static void* const primary = (void*)0x7fff00001234;
extern "C" {
Word launched[16];
char arguments[256];
int load_code = 0, launch_code = 0, needs_context = 0;
int cuInit(unsigned flags) { return flags; }
int cuDeviceGet(int* device, int ordinal) { *device = ordinal + 100; return 0; }
int cuDevicePrimaryCtxRetain(void** context, int device) {
    *context = primary;
    return device == 103 ? 0 : 101;
}
int cuCtxPushCurrent_v2(void* context) { current = context; return context == primary ? 0 : 1; }
int cuCtxPopCurrent_v2(void** context) { *context = current; current = nullptr; return 0; }
int cuCtxSetCurrent(void* context) { current = context; return 0; }
int cuModuleLoadData(void** module, const void* image) {
    *module = (void*)0x7fff00005678;
    if (current != primary || *(const unsigned*)image != 0xba55ed50u) return 200;
    return load_code;
}
int cuModuleGetFunction(void** function, void* module, const char* name) {
    names->push_back(name);
    *function = (void*)(0x7fff10000000 + names->size());
    return module == (void*)0x7fff00005678 ? 0 : 400;
}
int cuGetErrorName(int code, const char** text) {
    if (code == 999) return 1;
    *text = code == 209 ? "CUDA_ERROR_NO_BINARY_FOR_GPU" : "CUDA_ERROR_INVALID_VALUE";
    return 0;
}
int cuLaunchKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                   unsigned bz, unsigned shared, void* stream, void** values, void** extra) {
    if (needs_context && current != primary) return 201;
    Word got[] = {(Word)function, gx, gy, gz, bx, by, bz, shared, (Word)stream, (Word)extra};
    memcpy(launched, got, sizeof got);
    memcpy(arguments, values[0], sizeof arguments);
    return launch_code;
}
}
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    folder = tmp_path_factory.mktemp("driver")
    source, target = folder / "driver.cpp", folder / "driver.so"
    source.write_text(SOURCE, encoding="utf-8")
    subprocess.run(["g++", "-fPIC", "-shared", str(source), "-o", str(target)], check=True)
    return ctypes.CDLL(str(target))


@pytest.fixture
def gpu(library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> Iterator[ctypes.CDLL]:
    """The recording library in place of the driver's, and a device 3 that is current."""
    properties = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 3, False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda i: 0x7FFF2000_0000 + i, False)
    monkeypatch.setattr(driver.ctypes, "CDLL", lambda name: library)
    driver._library.cache_clear()
    for name in ("load_code", "launch_code", "needs_context"):
        ctypes.c_int.in_dll(library, name).value = 0
    yield library
    driver._library.cache_clear()


def set_flag(library: ctypes.CDLL, name: str, value: int) -> None:
    ctypes.c_int.in_dll(library, name).value = value


def launched(library: ctypes.CDLL) -> list[int]:
    return list((ctypes.c_uint64 * 10).in_dll(library, "launched"))


def test_a_launch_hands_over_every_argument_in_full_width(gpu: ctypes.CDLL) -> None:
    loaded = Driver(3)
    assert loaded.processors == 132
    layout = Struct("@PqfiP")
    values = (0x7FFF_0000_0010, -(2**40), 0.5, 7, 2**63 + 1)
    loaded.launch("swiglu_bf16", 2**31 - 1, 256, layout, *values)
    function, *grid_block_shared, stream, extra = launched(gpu)
    assert function == loaded._functions["swiglu_bf16"].value
    assert grid_block_shared == [2**31 - 1, 1, 1, 256, 1, 1, 0]
    assert stream == 0x7FFF2000_0003
    assert extra == 0
    found = bytes((ctypes.c_char * layout.size).in_dll(gpu, "arguments"))
    assert layout.unpack(found) == values


def test_every_kernel_has_its_own_function(gpu: ctypes.CDLL) -> None:
    functions = {f.value for f in Driver(3)._functions.values()}
    assert len(functions) == len(Driver(3)._functions) > 40


def test_a_thread_without_a_context_gets_the_devices_own(gpu: ctypes.CDLL) -> None:
    loaded, failures = Driver(3), []
    set_flag(gpu, "needs_context", 1)

    def launch() -> None:
        try:
            loaded.launch("swiglu_f32", 5, 32, Struct("@q"), 1)
        except KernelError as error:
            failures.append(error)

    thread = threading.Thread(target=launch)
    thread.start()
    thread.join()
    assert failures == []
    assert launched(gpu)[1] == 5


def test_a_refused_launch_names_kernel_size_and_error(gpu: ctypes.CDLL) -> None:
    loaded = Driver(3)
    set_flag(gpu, "launch_code", 1)
    with pytest.raises(
        KernelError, match="5 blocks of 4096 threads on cuda:3 failed: CUDA_ERROR_INV"
    ):
        loaded.launch("swiglu_f32", 5, 4096, Struct("@q"), 1)
    set_flag(gpu, "launch_code", 999)
    with pytest.raises(KernelError, match="on cuda:3 failed: CUDA error 999"):
        loaded.launch("swiglu_f32", 5, 4096, Struct("@q"), 1)


def test_a_gpu_without_code_is_refused_with_the_drivers_word(gpu: ctypes.CDLL) -> None:
    set_flag(gpu, "load_code", 209)
    with pytest.raises(
        KernelError, match="cuModuleLoadData failed on cuda:3: CUDA_ERROR_NO_BINARY_FOR_GPU"
    ):
        Driver(3)


def test_a_missing_driver_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(driver.ctypes, "CDLL", absent)
    driver._library.cache_clear()
    with pytest.raises(KernelError, match=r"the CUDA driver library \S+ cannot be loaded"):
        driver._library()
