"""The C path: every way of its source gives the bits of plain torch, on every compiler's terms."""

from __future__ import annotations

import platform
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from oracle import random_packed
from tolerances import DTYPES

from fedtune.errors import KernelError
from fedtune.kernels import launches, unpack
from fedtune.kernels import native as natives
from fedtune.kernels.native import Compiler, NativeKernels, build, library_name, load_native
from fedtune.kernels.packed import Bits, padded

FLAGS = {"any CPU": (), "AVX2": ("-march=haswell",), "this CPU": None}


@pytest.fixture(scope="module", params=FLAGS)
def way(
    request: pytest.FixtureRequest, compiler: Compiler, tmp_path_factory: pytest.TempPathFactory
) -> NativeKernels:
    """The source as compiled for one kind of CPU."""
    flags = FLAGS[request.param]
    if request.param == "AVX2":
        if platform.machine() not in ("x86_64", "AMD64"):
            pytest.skip("another kind of CPU")
        if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
            pytest.skip("this CPU has no AVX2")
    chosen = compiler if flags is None else replace(compiler, flags=flags)
    library = build(chosen, tmp_path_factory.mktemp("way"), openmp=False)
    return NativeKernels(library, request.param, uses_openmp=False)


def as_integers(values: torch.Tensor) -> torch.Tensor:
    return values.view(torch.int32 if values.dtype == torch.float32 else torch.int16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", [32, 64, 128])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_every_way_gives_the_bits_of_plain_torch(
    way: NativeKernels, bits: Bits, block: int, dtype: torch.dtype
) -> None:
    for shape in ((1, 1), (3, 85), (16, 16), (130, 257), (0, 7)):
        packed, _ = random_packed(bits, block, shape)
        expected = unpack.dequantise(packed, 0, torch.empty(shape, dtype=dtype))
        found = torch.full(shape, torch.nan, dtype=dtype)
        assert way.dequantise(packed, 0, found) is found
        assert torch.equal(as_integers(found), as_integers(expected))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_part_is_that_part_and_nothing_around_it_is_written(
    way: NativeKernels, bits: Bits, dtype: torch.dtype
) -> None:
    packed, _ = random_packed(bits, 64, (20, 600))
    whole = unpack.dequantise(packed, 0, torch.empty(padded(packed.weights), dtype=dtype))
    for first, count in ((256, 1), (512, 777), (11776, 256), (0, 0)):
        for before in (0, 3):
            room = torch.full((before + count + 9,), 7.0, dtype=dtype)
            part = room[before : before + count]
            way.dequantise(packed, first, part)
            assert torch.equal(part, whole[first : first + count])
            assert bool((room[:before] == 7).all())
            assert bool((room[before + count :] == 7).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_values_are_rounded_as_torch_rounds(way: NativeKernels, dtype: torch.dtype) -> None:
    # Levels from below the least number of float16 to beyond its largest, ties and both signs.
    sizes = torch.cat(
        [
            torch.tensor([0.0, 2**-25, 2**-24 * 1.5, 2**-14, 65504.0, 65519.0, 65520.0, 1e38]),
            torch.tensor([1 + 2**-11, 1 + 3 * 2**-11, 1 + 2**-8, 1 + 3 * 2**-8, 2 - 2**-12]),
            torch.tensor([torch.inf, 1e-38, 1e-45]),
            torch.randn(112, generator=torch.Generator().manual_seed(0)).exp().pow(8),
        ]
    )
    packed, _ = random_packed(8, 64, (1, 256))
    packed = replace(
        packed,
        codes=torch.arange(256).to(torch.uint8),
        codebook=torch.cat([sizes, -sizes]),
        scale_codes=torch.zeros(4, dtype=torch.uint8),
        scale_offset=torch.tensor(1.0),
    )
    found = way.dequantise(packed, 0, torch.empty(256, dtype=dtype))
    assert torch.equal(as_integers(found), as_integers(torch.cat([sizes, -sizes]).to(dtype)))


@pytest.mark.parametrize("uses_openmp", [True, False])
def test_any_number_of_threads_gives_the_same_bits(
    compiler: Compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uses_openmp: bool
) -> None:
    if uses_openmp and not natives._torch_has_libgomp():
        pytest.skip("torch has no OpenMP of its own")
    for name in ("OPENMP_WEIGHTS", "POOL_WEIGHTS"):
        monkeypatch.setattr(natives, name, 512)
    library = build(compiler, tmp_path, openmp=uses_openmp)
    unpacker = NativeKernels(library, "", uses_openmp=uses_openmp)
    packed, _ = random_packed(3, 32, (70, 113))
    expected = unpack.dequantise(packed, 256, torch.empty(7001))
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            found = torch.full((7001,), torch.nan)
            assert torch.equal(unpacker.dequantise(packed, 256, found), expected)
    finally:
        torch.set_num_threads(before)


def test_any_number_of_threads_gives_the_same_numbers(
    native: NativeKernels,
) -> None:
    if not native.launches():
        pytest.skip("torch has no OpenMP of its own")

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(0))

    def everything() -> list[torch.Tensor]:
        logits, gate, up, x = random(11, 7001), random(30, 5001), random(30, 5001), random(97, 800)
        targets, weights = torch.arange(11), torch.linspace(0.0, 2.0, 11)
        losses = launches.softmax_cross_entropy_(native, logits, targets, weights)
        product = launches.swiglu(native, gate, up)
        launches.swiglu_backward_(native, random(30, 5001), gate, up)
        norm, inverse = launches.rms_norm(native, x, random(800), 1e-5)
        back = launches.rms_norm_backward(native, random(97, 800), x, random(800), inverse)
        turned = launches.rotate_(native, random(97, 40, 20), random(97, 20), random(97, 20))
        return [losses, logits, product, gate, up, norm, inverse, back, turned]

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = everything()
        for threads in (2, 7):
            torch.set_num_threads(threads)
            for found, expected in zip(everything(), alone, strict=True):
                assert torch.equal(found, expected)
    finally:
        torch.set_num_threads(before)


def test_without_openmp_only_unpacking_has_threads(compiler: Compiler, tmp_path: Path) -> None:
    kernels = NativeKernels(build(compiler, tmp_path, openmp=False), "", uses_openmp=False)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert kernels.launches(torch.empty(0))
        assert not kernels.launches(torch.empty(0), torch.empty(0, dtype=torch.bfloat16))
        torch.set_num_threads(2)
        assert not kernels.launches(torch.empty(0))
    finally:
        torch.set_num_threads(before)


def test_a_share_is_exact_to_float32(way: NativeKernels) -> None:
    # The target has logit 0 and the rest of its row as little as a float32 exponential can hold.
    logits = torch.linspace(-90.0, 0.0, 4001).repeat(2, 1)
    exact = logits.double().softmax(1)
    targets = torch.tensor([4000, 0])
    exact[torch.arange(2), targets] -= 1.0
    losses = launches.softmax_cross_entropy_(way, logits, targets, torch.ones(2))
    torch.testing.assert_close(logits.double(), exact, rtol=4e-7, atol=1e-38)
    wide = torch.linspace(-90.0, 0.0, 4001).double().log_softmax(0)
    torch.testing.assert_close(losses.double(), -wide[targets], rtol=2e-7, atol=0.0)


def test_codes_need_not_lie_together_nor_at_an_even_byte(native: NativeKernels) -> None:
    packed, _ = random_packed(8, 64, (3, 100))
    expected = unpack.dequantise(packed, 0, torch.empty(300))
    apart = replace(packed, codes=torch.stack([packed.codes, packed.codes], 1)[:, 0])
    odd = replace(packed, codes=torch.cat([packed.codes[:1], packed.codes])[1:])
    for moved in (apart, odd):
        assert torch.equal(native.dequantise(moved, 0, torch.empty(300)), expected)


@pytest.mark.parametrize("first", [100, -256, 512])
def test_a_part_outside_the_matrix_is_refused(native: NativeKernels, first: int) -> None:
    packed, _ = random_packed(4, 64, (2, 200))
    with pytest.raises(KernelError, match="multiple of 256, and the matrix has 400"):
        native.dequantise(packed, first, torch.empty(256))


def test_other_dtypes_and_strides_are_refused(native: NativeKernels) -> None:
    packed, _ = random_packed(4, 64, (2, 200))
    with pytest.raises(KernelError, match=r"float32, bfloat16 or float16, got torch\.float64"):
        native.dequantise(packed, 0, torch.empty(256, dtype=torch.float64))
    with pytest.raises(KernelError, match="out must be contiguous"):
        native.dequantise(packed, 0, torch.empty(8, 8).t()[:, :4])


def test_a_second_process_compiles_nothing(
    compiler: Compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_native((compiler.path,), tmp_path)
    (kept,) = tmp_path.iterdir()  # and no file of the compiler's beside it
    made = kept.stat().st_mtime_ns
    commands: list[list[str]] = []
    run = subprocess.run

    def record(command: list[str], **options: object) -> object:
        commands.append(command)
        return run(command, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(subprocess, "run", record)
    load_native((compiler.path,), tmp_path)
    assert [command[-2] for command in commands] == ["-E"]
    assert kept.stat().st_mtime_ns == made


def test_another_cpu_or_source_makes_another_file(
    compiler: Compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = library_name(compiler, openmp=False)
    assert library_name(compiler, openmp=False) == first
    assert library_name(compiler, openmp=True) != first
    other_cpu = replace(compiler, macros=compiler.macros + "#define __NEW__ 1\n")
    assert library_name(other_cpu, openmp=False) != first
    for path in natives.FOLDER.iterdir():
        text = path.read_text(encoding="utf-8")
        (tmp_path / path.name).write_text(text, encoding="utf-8")
    monkeypatch.setattr(natives, "FOLDER", tmp_path)
    assert library_name(compiler, openmp=False) == first
    with (tmp_path / "unpack_plain.h").open("a", encoding="utf-8") as source:
        source.write("// changed\n")
    assert library_name(compiler, openmp=False) != first


def test_a_broken_file_in_the_cache_is_named(compiler: Compiler, tmp_path: Path) -> None:
    openmp = natives._torch_has_libgomp() and "__clang__" not in compiler.macros
    library = tmp_path / library_name(compiler, openmp=openmp)
    library.write_bytes(b"cut off")
    with pytest.raises(KernelError, match=r"kernels-\w+\.so cannot be loaded .*; delete it"):
        load_native((compiler.path,), tmp_path)


def test_a_cache_that_cannot_be_written_is_named(compiler: Compiler, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(KernelError, match="compiled C cannot be kept in"):
        build(compiler, tmp_path / "file" / "kernels", openmp=False)


@pytest.mark.skipif(sys.platform != "win32", reason="of Windows")
def test_windows_has_no_c_path(tmp_path: Path) -> None:
    with pytest.raises(KernelError, match="no C path on Windows"):
        load_native(("gcc",), tmp_path)
