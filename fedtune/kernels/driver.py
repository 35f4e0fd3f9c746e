"""Load the compiled kernels into a GPU and launch them: the CUDA driver, called with ctypes.

The driver library comes with the graphics driver, so that nothing is compiled or linked on a
user's machine, and one pure-Python wheel serves every platform. `cuda/kernels.fatbin` holds
machine code of several GPU generations, and PTX, of which the driver makes code for newer ones.

A kernel takes one struct (`cuda/*.h`); a `struct.Struct` in native alignment packs it. A launch
allocates nothing on the GPU, waits for nothing and goes to torch's current stream, so that a CUDA
graph can record it.
"""

from __future__ import annotations

import ctypes
import json
import sys
import threading
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from struct import Struct
from typing import Any, Protocol

import torch

from fedtune.errors import KernelError

FOLDER = Path(__file__).parent / "cuda"
FATBIN = FOLDER / "kernels.fatbin"
RECORD = FOLDER / "kernels.json"
LARGEST_ARGUMENTS = 512
"""Bytes of the largest struct of arguments; CUDA allows 4096."""

_INVALID_CONTEXT = 201  # CUDA_ERROR_INVALID_CONTEXT: this thread has not used CUDA yet


class Launcher(Protocol):
    """Runs a compiled kernel: on a GPU, or in the tests on the CPU."""

    @property
    def processors(self) -> int:
        """Multiprocessors of the device."""
        ...

    def launch(
        self, name: str, teams: int, threads: int, layout: Struct, *arguments: float
    ) -> None:
        """Start a kernel on the current stream.

        Args:
            name: of the kernel in `cuda/kernels.h`.
            teams: blocks; at least 1.
            threads: of a block; a multiple of 32.
            layout: of the kernel's struct of arguments.
            arguments: fields of that struct; pointers are integers.
        """
        ...


class Driver:
    """The kernels, loaded for one GPU."""

    def __init__(self, device_index: int) -> None:
        """Load every kernel.

        Raises:
            KernelError: the driver library is missing, or holds no code for this GPU.
        """
        torch.cuda.init()  # type: ignore[no-untyped-call]
        self._index = device_index
        properties = torch.cuda.get_device_properties(device_index)
        self.processors = int(properties.multi_processor_count)
        self._library = _library()
        self._context = self._primary_context()
        self._scratch = threading.local()
        self._current_stream = _stream_reader(device_index)
        # torch's own function first asks whether CUDA is initialised, which it is.
        self._current_device = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)
        self._launch = self._library.cuLaunchKernel
        record = json.loads(RECORD.read_text(encoding="utf-8"))
        image = FATBIN.read_bytes()
        self._call("cuCtxPushCurrent_v2", self._context)
        try:
            module = ctypes.c_void_p()
            self._call("cuModuleLoadData", ctypes.byref(module), ctypes.c_char_p(image))
            # All of them now: a kernel that loads at its first use can break a graph's recording.
            self._functions = {name: self._function(module, name) for name in record["kernels"]}
        finally:
            self._call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))

    def launch(
        self, name: str, teams: int, threads: int, layout: Struct, *arguments: float
    ) -> None:
        """Start a kernel on torch's current stream of this GPU.

        Raises:
            KernelError: CUDA refuses the launch.
        """
        scratch = self._scratch
        try:
            buffer, pointers = scratch.buffer, scratch.pointers
        except AttributeError:
            buffer = scratch.buffer = ctypes.create_string_buffer(LARGEST_ARGUMENTS)
            pointers = scratch.pointers = (ctypes.c_void_p * 1)(ctypes.addressof(buffer))
        layout.pack_into(buffer, 0, *arguments)
        if self._current_device() == self._index:  # entering a context costs as much as a launch
            code = self._start(self._functions[name], teams, threads, pointers)
        else:
            with torch.cuda.device(self._index):
                code = self._start(self._functions[name], teams, threads, pointers)
        if code != 0:
            raise KernelError(
                f"launching {name} with {teams} blocks of {threads} threads on cuda:{self._index} "
                f"failed: {self._error_name(code)}"
            )

    def _start(
        self, function: ctypes.c_void_p, teams: int, threads: int, pointers: ctypes.Array[Any]
    ) -> int:
        stream = self._current_stream()
        code: int = self._launch(function, teams, 1, 1, threads, 1, 1, 0, stream, pointers, None)
        if code == _INVALID_CONTEXT:
            self._call("cuCtxSetCurrent", self._context)
            code = self._launch(function, teams, 1, 1, threads, 1, 1, 0, stream, pointers, None)
        return code

    def _primary_context(self) -> ctypes.c_void_p:
        device, context = ctypes.c_int(), ctypes.c_void_p()
        self._call("cuInit", ctypes.c_uint(0))
        self._call("cuDeviceGet", ctypes.byref(device), ctypes.c_int(self._index))
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        return context

    def _function(self, module: ctypes.c_void_p, name: str) -> ctypes.c_void_p:
        function = ctypes.c_void_p()
        self._call("cuModuleGetFunction", ctypes.byref(function), module, name.encode())
        return function

    def _call(self, function: str, *arguments: object) -> None:
        code = getattr(self._library, function)(*arguments)
        if code != 0:
            raise KernelError(f"{function} failed on cuda:{self._index}: {self._error_name(code)}")

    def _error_name(self, code: int) -> str:
        text = ctypes.c_char_p()
        self._library.cuGetErrorName(ctypes.c_int(code), ctypes.byref(text))
        return text.value.decode() if text.value else f"CUDA error {code}"


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL:
    name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        library = ctypes.CDLL(name)
    except OSError as error:
        raise KernelError(f"the CUDA driver library {name} cannot be loaded: {error}") from None
    library.cuLaunchKernel.argtypes = [
        ctypes.c_void_p,  # function
        *[ctypes.c_uint] * 6,  # blocks and threads, in three dimensions each
        ctypes.c_uint,  # dynamic shared memory
        ctypes.c_void_p,  # stream
        ctypes.c_void_p,  # addresses of the arguments
        ctypes.c_void_p,  # extra
    ]
    return library


def _stream_reader(device_index: int) -> Callable[[], int]:
    """What gives the handle of torch's current stream, in a tenth of the public way's time."""
    raw = getattr(torch._C, "_cuda_getCurrentRawStream", None)
    if raw is not None:
        return partial(raw, device_index)
    return lambda: int(torch.cuda.current_stream(device_index).cuda_stream)
