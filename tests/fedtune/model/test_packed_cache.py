"""A second start maps what the first one packed, and only ever the very same bytes."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from fedtune.model import backbone as backbone_module
from fedtune.model import packed_cache as packed_cache_module
from fedtune.model.backbone import BackboneShelf
from fedtune.model.packed_cache import Finished, PackedCache, content_digest
from fedtune.model.shapes import read_shapes
from fedtune.quant.correction import store_corrected
from fedtune.quant.storage import StoredMatrix, store
from fedtune.records import BACKBONE_FORMATS, FormatName, MatrixForm

BASE = "ab" * 32
PACKED = [name for name in BACKBONE_FORMATS if name not in ("fp32", "bf16", "fp16")]
TOKENS = torch.arange(3, 40)[None]
CPU = torch.device("cpu")


@pytest.fixture
def cache(tmp_path: Path) -> PackedCache:
    return PackedCache(tmp_path / "packed", minimum_bytes=0)


def forms_and_matrices(
    name: FormatName = "q4",
) -> tuple[dict[str, MatrixForm], dict[str, StoredMatrix]]:
    """Two matrices, one of them of a shape that fills no block."""
    generator = torch.Generator().manual_seed(0)
    forms = {"layers.0.up": MatrixForm(name), "layers.0.down": MatrixForm(name)}
    shapes = {"layers.0.up": (24, 16), "layers.0.down": (5, 7)}
    return forms, {
        key: store(torch.randn(shapes[key], generator=generator), form)
        for key, form in forms.items()
    }


def test_the_pair_that_repairs_a_matrix_is_read_with_it(cache: PackedCache) -> None:
    forms = {"layers.0.up": MatrixForm("q2", 0, 2), "layers.0.down": MatrixForm("q2")}
    weight = torch.randn(24, 16, generator=torch.Generator().manual_seed(0))
    matrix, pair = store_corrected(weight, forms["layers.0.up"])
    assert pair is not None
    matrices = {"layers.0.up": matrix, "layers.0.down": store(weight, forms["layers.0.down"])}
    cache.write(BASE, forms, Finished(matrices, {"layers.0.up": pair}))
    found = cache.read(BASE, forms)
    assert found is not None
    assert found.pairs.keys() == {"layers.0.up"}
    assert torch.equal(found.pairs["layers.0.up"].product(), pair.product())
    assert torch.equal(
        found.matrices["layers.0.up"].values(torch.float32), matrix.values(torch.float32)
    )


def files(cache: PackedCache) -> list[Path]:
    return sorted(cache.folder.glob("*.safetensors"))


@pytest.mark.parametrize("name", PACKED)
def test_what_was_written_is_read_to_the_bit(cache: PackedCache, name: FormatName) -> None:
    forms, matrices = forms_and_matrices(name)
    cache.write(BASE, forms, Finished(matrices))
    found = cache.read(BASE, forms)
    assert found is not None
    assert found.matrices.keys() == matrices.keys()
    for key, matrix in found.matrices.items():
        assert (matrix.format, matrix.shape) == (name, matrices[key].shape)
        assert torch.equal(matrix.values(torch.float32), matrices[key].values(torch.float32))
        assert matrix.bytes == matrices[key].bytes


def test_another_base_form_or_matrix_is_another_file(cache: PackedCache) -> None:
    forms, matrices = forms_and_matrices()
    cache.write(BASE, forms, Finished(matrices))
    assert cache.read("cd" * 32, forms) is None
    assert cache.read(BASE, dict.fromkeys(forms, MatrixForm("q4", 32))) is None
    assert cache.read(BASE, {"layers.0.up": forms["layers.0.up"]}) is None
    assert cache.read(BASE, dict(reversed(forms.items()))) is not None


def test_another_layout_is_another_file(
    cache: PackedCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    forms, matrices = forms_and_matrices()
    cache.write(BASE, forms, Finished(matrices))
    monkeypatch.setattr(packed_cache_module, "LAYOUT", packed_cache_module.LAYOUT + 1)
    assert cache.read(BASE, forms) is None


def test_tensors_are_mapped_and_writing_to_one_leaves_the_file_alone(cache: PackedCache) -> None:
    forms, matrices = forms_and_matrices()
    cache.write(BASE, forms, Finished(matrices))
    found = cache.read(BASE, forms)
    assert found is not None
    before = content_digest(files(cache)[0])
    for matrix in found.matrices.values():
        matrix.tensors()["codes"].zero_()
    assert content_digest(files(cache)[0]) == before
    if os.path.exists("/proc/self/maps"):
        assert str(files(cache)[0]) in Path("/proc/self/maps").read_text(encoding="utf-8")


def test_the_file_is_safetensors_with_every_tensor_at_a_multiple_of_its_width(
    cache: PackedCache,
) -> None:
    forms, matrices = forms_and_matrices()
    cache.write(BASE, forms, Finished(matrices))
    with safe_open(files(cache)[0], framework="pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    assert len(tensors) == sum(len(matrix.tensors()) for matrix in matrices.values())
    assert all(tensor.data_ptr() % tensor.element_size() == 0 for tensor in tensors.values())


@pytest.mark.parametrize("spoil", ["cut", "changed", "empty"])
def test_a_spoiled_file_is_deleted_with_one_line(
    cache: PackedCache, spoil: str, caplog: pytest.LogCaptureFixture
) -> None:
    forms, matrices = forms_and_matrices()
    cache.write(BASE, forms, Finished(matrices))
    path = files(cache)[0]
    content = bytearray(path.read_bytes())
    if spoil == "changed":
        content[-1] ^= 1
    path.write_bytes({"cut": content[:-9], "changed": content, "empty": b""}[spoil])
    with caplog.at_level(logging.WARNING):
        assert cache.read(BASE, forms) is None
    assert files(cache) == []
    (record,) = caplog.records
    assert "is deleted and made anew: its content has changed" in record.getMessage()


def test_a_file_that_says_what_it_is_but_holds_something_else_is_deleted(
    cache: PackedCache,
) -> None:
    forms, matrices = forms_and_matrices()
    cache.write(BASE, forms, Finished(matrices))
    key = files(cache)[0].name.split(".")[0]
    files(cache)[0].unlink()
    other = cache.folder / "other"
    other.write_bytes(b"no tensors")
    other.rename(cache.folder / f"{key}.{content_digest(other)}.safetensors")
    assert cache.read(BASE, forms) is None
    assert files(cache) == []


def test_a_part_of_a_file_is_never_in_its_place(
    cache: PackedCache, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    forms, matrices = forms_and_matrices()

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with caplog.at_level(logging.WARNING):
        cache.write(BASE, forms, Finished(matrices))
    assert list(cache.folder.iterdir()) == []
    (record,) = caplog.records
    assert "packed matrices are not kept in" in record.getMessage()
    assert "No space left" in record.getMessage()


def test_a_folder_that_cannot_be_made_is_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    cache = PackedCache(tmp_path / "file" / "packed", minimum_bytes=0)
    forms, matrices = forms_and_matrices()
    assert cache.read(BASE, forms) is None
    with caplog.at_level(logging.WARNING):
        cache.write(BASE, forms, Finished(matrices))
    assert len(caplog.records) == 1


def test_a_full_disk_is_left_alone(
    cache: PackedCache, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    forms, matrices = forms_and_matrices()
    size = sum(matrix.bytes for matrix in matrices.values())
    usage = SimpleNamespace(free=2 * size - 1)
    monkeypatch.setattr(packed_cache_module.shutil, "disk_usage", lambda folder: usage)
    cache.write(BASE, forms, Finished(matrices))
    assert files(cache) == []
    assert "there is no room" in caplog.text


def test_small_sets_are_not_kept(tmp_path: Path) -> None:
    forms, matrices = forms_and_matrices()
    PackedCache(tmp_path / "packed").write(BASE, forms, Finished(matrices))
    assert not (tmp_path / "packed").exists()


def test_the_files_used_last_are_kept(cache: PackedCache) -> None:
    forms, matrices = forms_and_matrices()
    bases = [f"{index:02x}" * 32 for index in range(packed_cache_module._KEPT_FILES + 1)]
    for index, base in enumerate(bases):
        cache.write(base, forms, Finished(matrices))
        if index == 1:
            for path in files(cache):
                os.utime(path, (0, 0))
            assert cache.read(bases[0], forms) is not None  # used again, so newer than the next
    held = [cache.read(base, forms) is not None for base in bases]
    assert held == [True, False, *[True] * (len(bases) - 2)]


def test_a_digest_covers_every_piece_and_their_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed_cache_module, "_PIECE_BYTES", 4096)
    monkeypatch.setattr(packed_cache_module, "_READ_BYTES", 1024)
    path = tmp_path / "file"
    content = os.urandom(10_000)
    swapped = content[4096:8192] + content[:4096] + content[8192:]
    seen = set()
    for part in (content, swapped, content[:-1], content[:-1] + b"?", content[:4096], b""):
        path.write_bytes(part)
        seen.add(content_digest(path))
    assert len(seen) == 6


# ---------------------------------------------------------------- with a shelf


def logits(folder: Path, cache: PackedCache | None, name: FormatName) -> Tensor:
    forms = {m.name: MatrixForm(name) for m in read_shapes(folder, ("all-linear",)).matrices}
    shelf = BackboneShelf(folder, CPU, keep_base=False, packed=cache)
    with torch.no_grad():
        found: Tensor = shelf.get("causal-lm", (), forms).model(input_ids=TOKENS).logits
    return found


def test_a_second_start_reads_no_matrix_of_the_base(
    tiny_llama: Path, cache: PackedCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = logits(tiny_llama, None, "q4")
    assert torch.equal(logits(tiny_llama, cache, "q4"), expected)
    assert len(files(cache)) == 1

    def refuse(*arguments: object) -> None:
        raise AssertionError("a matrix was quantised again")

    monkeypatch.setattr(backbone_module, "store_corrected", refuse)
    assert torch.equal(logits(tiny_llama, cache, "q4"), expected)


def test_floats_are_not_kept_a_second_time(tiny_llama: Path, cache: PackedCache) -> None:
    logits(tiny_llama, cache, "bf16")
    assert not cache.folder.exists()


def test_a_spoiled_file_is_made_anew(tiny_llama: Path, cache: PackedCache) -> None:
    expected = logits(tiny_llama, cache, "q4")
    (path,) = files(cache)
    path.write_bytes(path.read_bytes()[:-1])
    assert torch.equal(logits(tiny_llama, cache, "q4"), expected)
    assert content_digest(files(cache)[0]) == files(cache)[0].name.split(".")[1]
