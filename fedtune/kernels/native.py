"""Kernels in C for a CPU, where the device has a C compiler.

The package holds the source alone (`cpu/`), so that one pure-Python wheel serves every platform.
The first process that needs it compiles it for this CPU, in two seconds or so, and keeps the result
in the user's cache, under a name made of the source and of all that the compiler says of itself
and of the CPU: another compiler, CPU or version of the source makes another file. Weights are
unpacked to the same bits on every path; the others, for float32 alone, give what plain torch gives
up to its rounding. They take the arguments of the CUDA kernels (`launches`).
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from struct import Struct

import torch
from torch import Tensor

from fedtune.errors import KernelError
from fedtune.kernels.packed import GROUP, PackedWeights, padded

FOLDER = Path(__file__).parent / "cpu"
SOURCES = ("cross_entropy.c", "dequantise.c", "rms_norm.c", "rotate.c", "swiglu.c")
COMPILE_S = 120.0
"""How long a compiler may take; it takes about two seconds on an idle core."""
OPENMP_WEIGHTS = 1 << 16
"""Weights for each thread of OpenMP's, at least: some 5 us of work, as long as it takes to start.
Chosen."""
POOL_WEIGHTS = 1 << 20
"""The same for threads of our own, which take ten times as long to start. Chosen."""
_FLAGS = (
    "-x",
    "c",
    "-std=c11",
    "-O3",
    "-ffp-contract=off",
    "-fno-trapping-math",
    "-fno-math-errno",
)
_LIBRARY_FLAGS = ("-fPIC", "-shared", "-fvisibility=hidden")
_FOR_THIS_CPU = (("-march=native",), ("-mcpu=native",), ())
"""How compilers are asked for all that this CPU can do; the first that one understands is taken."""
_LAUNCHED = {
    "cross_entropy_f32": "cross_entropy_f32",
    "rms_norm_f32_f32": "rms_norm_f32",
    "rms_norm_short_f32_f32": "rms_norm_f32",
    "rms_norm_backward_f32_f32": "rms_norm_backward_f32",
    "rms_norm_backward_short_f32_f32": "rms_norm_backward_f32",
    "rotate_f32_f32": "rotate_f32",
    "swiglu_f32": "swiglu_f32",
    "swiglu_backward_f32": "swiglu_backward_f32",
}
"""A kernel's name in `launches` -> the function that does its work here."""
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_VECTORS = {"__AVX512F__": "AVX-512", "__AVX2__": "AVX2"}


class NoCompilerError(KernelError):
    """This device has no C compiler, or none that is of use here."""


@dataclass(frozen=True, slots=True)
class Compiler:
    """A C compiler, and what it makes of this CPU.

    Attributes:
        path: of the program.
        flags: that make code for this CPU.
        macros: all that it defines before it reads a source: its version and the CPU's features.
    """

    path: str
    flags: tuple[str, ...]
    macros: str

    @property
    def vectors(self) -> str:
        """The widest vectors that the source has a way for."""
        found = [name for macro, name in _VECTORS.items() if f"#define {macro} " in self.macros]
        return found[0] if found else "no vectors of its own"


class NativeKernels:
    """The compiled sources, loaded."""

    def __init__(self, library: Path, description: str, *, uses_openmp: bool) -> None:
        """Load a shared object that `build` made.

        Args:
            description: of the compiler and the CPU, for people.
            uses_openmp: it divides its work by itself, among torch's own threads.

        Raises:
            KernelError: it cannot be loaded.
        """
        try:
            loaded = ctypes.CDLL(str(library))
            self._dequantise = loaded.fedtune_dequantise
            self._launched = {name: getattr(loaded, own) for name, own in _LAUNCHED.items()}
        except (OSError, AttributeError) as error:
            raise KernelError(
                f"{library} cannot be loaded ({error}); delete it to have it made again"
            ) from None
        pointer, long, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
        self._dequantise.argtypes = [
            pointer,  # codes
            long,  # byte at which the plane of third bits starts
            pointer,  # scale codes
            pointer,  # scale steps
            pointer,  # scale offset
            pointer,  # codebook
            pointer,  # out
            long,  # first weight
            long,  # weights
            *[number] * 4,  # bits, block, dtype, threads
        ]
        self._dequantise.restype = None
        for function in self._launched.values():
            function.argtypes, function.restype = [ctypes.c_char_p, number], None
        self.description = description
        self._uses_openmp = uses_openmp

    def dequantise(self, packed: PackedWeights, first: int, out: Tensor) -> Tensor:
        """See `fedtune.kernels.reference.dequantise`; with as many threads as torch has.

        Raises:
            KernelError: the part is not one of this matrix, or `out` cannot take it.
        """
        count, dtype = out.numel(), _DTYPES.get(out.dtype)
        if first % GROUP or not 0 <= first <= first + count <= padded(packed.weights):
            raise KernelError(
                f"weights {first} to {first + count} cannot be unpacked: the first must be a "
                f"multiple of {GROUP}, and the matrix has {packed.weights}"
            )
        if dtype is None or not out.is_contiguous():
            raise KernelError(
                "out must be contiguous and float32, bfloat16 or float16, got "
                f"{out.dtype} with strides {out.stride()}"
            )
        codes, scale_codes, steps = packed.codes, packed.scale_codes, packed.scale_steps
        if not (codes.is_contiguous() and scale_codes.is_contiguous() and steps.is_contiguous()):
            codes, scale_codes = codes.contiguous(), scale_codes.contiguous()
            steps = steps.contiguous()
        source = (
            codes.data_ptr(),
            codes.numel() // 3 * 2 if packed.bits == 3 else 0,
            scale_codes.data_ptr(),
            steps.data_ptr(),
            packed.scale_offset.data_ptr(),
            packed.codebook.data_ptr(),
        )
        kind = (packed.bits, packed.block, dtype)
        target, threads = out.data_ptr(), torch.get_num_threads()
        if self._uses_openmp:
            threads = max(1, min(threads, count // OPENMP_WEIGHTS))
            self._dequantise(*source, target, first, count, *kind, threads)
            return out
        size = out.element_size()

        def unpack(start: int, end: int) -> None:
            self._dequantise(*source, target + start * size, first + start, end - start, *kind, 1)

        _divide(unpack, count, GROUP, min(threads, count // POOL_WEIGHTS))
        return out

    def launches(self, *tensors: Tensor) -> bool:
        """Whether kernels other than unpacking run here on these tensors: plain torch if not.

        They have threads from OpenMP alone.
        """
        float32 = torch.float32
        return all(tensor.dtype is float32 for tensor in tensors) and (
            self._uses_openmp or torch.get_num_threads() == 1
        )

    @property
    def processors(self) -> int:
        """Threads that work at once."""
        return torch.get_num_threads()

    def launch(
        self, name: str, teams: int, threads: int, layout: Struct, *arguments: float
    ) -> None:
        """Run a kernel, as `fedtune.kernels.driver.Launcher` says; teams are not needed here."""
        self._launched[name](layout.pack(*arguments), torch.get_num_threads())


def _divide(work: Callable[[int, int], None], count: int, grain: int, threads: int) -> None:
    """Do what is from 0 up to `count`, in as many parts as there are threads.

    Args:
        grain: each part begins at a multiple of it.
    """
    if threads < 2:
        work(0, count)
        return
    share = -(-count // threads // grain) * grain
    starts = range(0, count, share)
    ends = [min(start + share, count) for start in starts]
    # A call of ctypes lets other threads run. All parts are waited for, and errors raised.
    list(_pool(os.getpid(), threads).map(work, starts, ends))


@lru_cache(maxsize=1)
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """Threads that stay; a process that was forked has none of its parent's."""
    return ThreadPoolExecutor(threads, thread_name_prefix="fedtune-kernels")


# ---------------------------------------------------------------- building


def load_native(compilers: Sequence[str], cache: Path) -> NativeKernels:
    """The compiled source, made first where the cache does not hold it.

    Args:
        compilers: names or paths of C compilers; the first that is there is taken.
        cache: where the shared object is kept; made if it is missing.

    Raises:
        NoCompilerError: there is no compiler, or the platform has no C path.
        KernelError: the compiler fails, or what it made cannot be kept or loaded.
    """
    if sys.platform == "win32":
        # GCC does not align vectors on the stack there (GCC bug 54412).
        raise NoCompilerError("there is no C path on Windows")
    compiler = find_compiler(compilers)
    openmp = _torch_has_libgomp() and "#define __clang__ " not in compiler.macros
    description = f"{Path(compiler.path).name}, {compiler.vectors}"
    library = build(compiler, cache, openmp=openmp)
    return NativeKernels(library, description, uses_openmp=openmp)


def find_compiler(names: Sequence[str]) -> Compiler:
    """The first of these compilers that is installed and runs.

    Raises:
        NoCompilerError: none is.
    """
    for name in names:
        path = shutil.which(name)
        if path is None:
            continue
        for flags in _FOR_THIS_CPU:
            asked = _run([path, *_FLAGS, *flags, "-dM", "-E", "-"])
            if asked.returncode == 0 and asked.stdout:
                return Compiler(path, flags, asked.stdout)
    raise NoCompilerError(f"no C compiler among {', '.join(names)}")


def build(compiler: Compiler, cache: Path, *, openmp: bool) -> Path:
    """The shared object, compiled unless the cache holds it.

    Raises:
        KernelError: the compiler fails, or the cache cannot be written to.
    """
    flags = _all_flags(compiler, openmp)
    sources = [str(FOLDER / name) for name in SOURCES]
    library = cache / library_name(compiler, openmp=openmp)
    if library.is_file():
        return library
    try:
        # Code runs from here: nobody else may write to it.
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            made = Path(folder) / library.name
            finished = _run([compiler.path, *flags, *sources, "-lm", "-o", str(made)])
            if finished.returncode != 0:
                raise KernelError(f"{compiler.path} failed: {_first_error(finished.stderr)}")
            os.replace(made, library)  # at once: another process may be loading it
    except OSError as error:
        raise KernelError(f"compiled C cannot be kept in {cache}: {error.strerror}") from None
    return library


def library_name(compiler: Compiler, *, openmp: bool) -> str:
    """A name for what this compiler makes of this source: a digest of both is in it."""
    digest = hashlib.sha256("\0".join([compiler.macros, *_all_flags(compiler, openmp)]).encode())
    for path in sorted(FOLDER.iterdir()):
        if path.suffix in (".c", ".h"):
            digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return f"kernels-{digest.hexdigest()[:32]}.so"


def _all_flags(compiler: Compiler, openmp: bool) -> list[str]:
    return [*_FLAGS, *_LIBRARY_FLAGS, *compiler.flags, *(["-fopenmp"] if openmp else [])]


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=COMPILE_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 1, "", f"no end after {COMPILE_S:.0f} s")
    except OSError as error:
        return subprocess.CompletedProcess(command, 1, "", str(error))


def _first_error(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return next((line for line in lines if "error" in line.lower()), (lines or ["no words"])[0])


def _torch_has_libgomp() -> bool:
    """Whether OpenMP's threads will be torch's: a library of this name is loaded only once."""
    return (Path(torch.__file__).parent / "lib" / "libgomp.so.1").is_file()
