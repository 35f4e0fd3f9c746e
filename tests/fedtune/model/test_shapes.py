"""Shapes from headers: which matrices can be adapted, and which files are refused."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from fedtune.errors import ModelError
from fedtune.model.shapes import (
    head_parameters,
    left_matrices,
    linear_matrices,
    read_header,
    read_headers,
    read_shapes,
)
from fedtune.records import ModelShapes

CONFIG = {
    "model_type": "llama",
    "hidden_size": 4,
    "intermediate_size": 6,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 10,
}
ALL = ("all-linear",)


def header_of(tensors: dict[str, tuple[int, ...]], dtype: str = "F32") -> tuple[bytes, int]:
    entries, offset = {}, 0
    for name, shape in tensors.items():
        size = 4
        for length in shape:
            size *= length
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text, offset


def write_model(
    folder: Path,
    tensors: dict[str, tuple[int, ...]],
    name: str = "model.safetensors",
    **config: object,
) -> Path:
    header, size = header_of(tensors)
    (folder / name).write_bytes(header + bytes(size))
    (folder / "config.json").write_text(json.dumps({**CONFIG, **config}), encoding="utf-8")
    return folder


def names(shapes: ModelShapes) -> list[str]:
    return [matrix.name for matrix in shapes.matrices]


def test_a_small_llama_has_seven_matrices_per_layer(stories260k: Path) -> None:
    shapes = read_shapes(stories260k, ALL)
    assert len(shapes.matrices) == 35
    assert (shapes.hidden_size, shapes.intermediate_size, shapes.layers) == (64, 172, 5)
    assert (shapes.attention_heads, shapes.vocabulary, shapes.model_type) == (8, 512, "llama")
    adapted = sum(matrix.parameters for matrix in shapes.matrices)
    assert adapted + shapes.other_parameters == 260_032
    down = shapes.by_name()["model.layers.3.mlp.down_proj"]
    assert (down.out_features, down.in_features, down.layer) == (64, 172, 3)


def test_an_encoder_without_prefix_has_six_matrices_per_layer(minilm: Path) -> None:
    shapes = read_shapes(minilm, ALL)
    assert len(shapes.matrices) == 36
    assert names(shapes)[:2] == [
        "encoder.layer.0.attention.output.dense",
        "encoder.layer.0.attention.self.key",
    ]
    adapted = sum(matrix.parameters for matrix in shapes.matrices)
    assert adapted == 6 * (4 * 384 * 384 + 2 * 384 * 1536)
    # 22.7 million float parameters; the integer `position_ids` is a buffer.
    assert adapted + shapes.other_parameters == 22_713_216


def test_ends_of_names_choose_matrices(stories260k: Path) -> None:
    shapes = read_shapes(stories260k, ("q_proj", "mlp.up_proj"))
    assert len(shapes.matrices) == 10
    assert {name.rsplit(".", 1)[1] for name in names(shapes)} == {"q_proj", "up_proj"}
    whole = read_shapes(stories260k, ALL)
    assert shapes.other_parameters > whole.other_parameters
    assert shapes.digest == whole.digest


def test_an_end_that_matches_nothing_lists_what_there_is(stories260k: Path) -> None:
    with pytest.raises(ModelError) as caught:
        read_shapes(stories260k, ("q_proj", "qproj"))
    text = str(caught.value)
    assert "ends in 'qproj'; did you mean 'q_proj'? valid: all-linear, mlp.down_proj," in text
    assert "\n" not in text


def test_what_is_left_is_named_once_for_all_blocks(stories260k: Path) -> None:
    shapes = read_shapes(stories260k, ALL)
    assert left_matrices(stories260k, shapes.matrices) == ("model.embed_tokens",)
    some = read_shapes(stories260k, ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj"))
    assert left_matrices(stories260k, some.matrices) == (
        "model.embed_tokens",
        "model.layers.N.mlp.down_proj",
        "model.layers.N.mlp.gate_proj",
    )


def test_an_end_is_a_whole_part_of_a_name(stories260k: Path) -> None:
    with pytest.raises(ModelError, match="ends in 'proj'"):
        read_shapes(stories260k, ("proj",))


def test_norms_embeddings_and_heads_are_not_linear(tmp_path: Path) -> None:
    tensors = {
        "model.layers.10.mlp.up.weight": (6, 4),
        "model.layers.2.mlp.up.weight": (6, 4),
        "model.layers.2.mlp.up.bias": (6,),
        "model.layers.2.q_norm.weight": (4, 4),
        "model.layers.2.ln_1.weight": (4, 4),
        "model.layers.2.conv.weight": (4, 4, 3),
        "model.layers.2.embed_positions.weight": (8, 4),
        "model.embed_tokens.weight": (10, 4),
        "lm_head.weight": (10, 4),
    }
    shapes = read_shapes(write_model(tmp_path, tensors), ALL)
    assert names(shapes) == ["model.layers.2.mlp.up", "model.layers.10.mlp.up"]
    assert shapes.matrices[1].layer == 10


@pytest.mark.parametrize("block", ["model.layers.1.", "encoder.layer.1.", "h.1.", "vit.blocks.1."])
def test_blocks_are_numbered_under_several_names(tmp_path: Path, block: str) -> None:
    shapes = read_shapes(write_model(tmp_path, {f"{block}fc.weight": (3, 4)}), ALL)
    assert [(m.name, m.layer) for m in shapes.matrices] == [(f"{block}fc", 1)]


def test_a_model_without_numbered_blocks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no weight matrices in numbered blocks"):
        read_shapes(write_model(tmp_path, {"fc.weight": (3, 4)}), ALL)


def test_shards_are_read_together(tmp_path: Path) -> None:
    write_model(tmp_path, {"layers.0.a.weight": (4, 4)}, "one.safetensors")
    write_model(tmp_path, {"layers.1.a.weight": (4, 4), "x": (2,)}, "two.safetensors")
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    shapes = read_shapes(tmp_path, ALL)
    assert names(shapes) == ["layers.0.a", "layers.1.a"]
    assert shapes.other_parameters == 2
    assert set(read_headers(tmp_path)) == {"layers.0.a.weight", "layers.1.a.weight", "x"}


def test_other_architectures_name_their_sizes_otherwise(tmp_path: Path) -> None:
    write_model(tmp_path, {"h.0.fc.weight": (16, 4)})
    config = {"model_type": "bloom", "n_embd": 4, "n_layer": 1, "n_head": 2, "vocab_size": 10}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    shapes = read_shapes(tmp_path, ALL)
    assert (shapes.hidden_size, shapes.attention_heads, shapes.layers) == (4, 2, 1)
    assert shapes.intermediate_size == 16
    (tmp_path / "config.json").write_text('{"model_type": "x"}', encoding="utf-8")
    with pytest.raises(ModelError, match=r"config\.json has no hidden_size"):
        read_shapes(tmp_path, ALL)


def test_the_shape_of_a_conv1d_is_that_of_what_it_computes(tmp_path: Path) -> None:
    tensors: dict[str, tuple[int, ...]] = {"h.0.mlp.c_fc.weight": (4, 16)}
    found = read_shapes(write_model(tmp_path, tensors, model_type="gpt2"), ALL).matrices[0]
    assert (found.out_features, found.in_features) == (16, 4)
    found = read_shapes(write_model(tmp_path, tensors, model_type="gptj"), ALL).matrices[0]
    assert (found.out_features, found.in_features) == (4, 16)


def test_experts_are_refused_and_what_is_left_is_named(tmp_path: Path) -> None:
    tensors = {
        "model.layers.0.self_attn.q_proj.weight": (4, 4),
        "model.layers.0.mlp.gate.weight": (2, 4),
        "model.layers.0.mlp.experts.0.up_proj.weight": (6, 4),
        "model.layers.0.mlp.experts.1.up_proj.weight": (6, 4),
    }
    folder = write_model(tmp_path, tensors)
    words = r"layers\.0\.mlp\.experts\.0\.up_proj and 1 others .* name the others instead: q_proj$"
    for targets in (ALL, ("up_proj",)):
        with pytest.raises(ModelError, match=words):
            read_shapes(folder, targets)
    assert names(read_shapes(folder, ("q_proj",))) == ["model.layers.0.self_attn.q_proj"]
    assert len(linear_matrices(folder)) == 4


def test_quantised_models_are_refused(tmp_path: Path) -> None:
    tensors: dict[str, tuple[int, ...]] = {"h.0.fc.weight": (3, 4)}
    with pytest.raises(ModelError, match="already quantised; take the full-precision model"):
        read_shapes(write_model(tmp_path, tensors, quantization_config={"bits": 4}), ALL)


def _entry(**fields: object) -> bytes:
    value = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **fields}
    text = json.dumps({"x": value}).encode()
    return len(text).to_bytes(8, "little") + text + bytes(8)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "cut off in its header"),
        (b"\x00" * 7, "cut off in its header"),
        ((1 << 40).to_bytes(8, "little") + b"{}", "cut off in its header"),
        ((2).to_bytes(8, "little") + b"{x", "its header is not JSON"),
        ((2).to_bytes(8, "little") + b"\xff\xff", "its header is not JSON"),
        ((2).to_bytes(8, "little") + b"[]", "its header is not an object"),
        (_entry()[:-1], "is cut off: expected"),
        (_entry() + b"x", "is too long: expected"),
        (_entry(dtype=5), "broken entry for 'x'"),
        (_entry(shape=[-2]), "broken entry for 'x'"),
        (_entry(shape=[True]), "broken entry for 'x'"),
        (_entry(shape=[1] * 9), "broken entry for 'x'"),
        (_entry(data_offsets=[0]), "broken entry for 'x'"),
        (_entry(data_offsets=None), "broken entry for 'x'"),
        (_entry(shape=[3]), "'x' has not the bytes that its shape"),
        (b"\x02\x00\x00\x00\x00\x00\x00\x00[" + b"]", "not an object"),
    ],
)
def test_a_broken_header_is_refused_in_one_line(tmp_path: Path, content: bytes, words: str) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    with pytest.raises(ModelError) as caught:
        read_header(file)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_headers_agree_with_the_library(stories260k: Path) -> None:
    from safetensors import safe_open

    ours = read_header(stories260k / "model.safetensors")
    with safe_open(stories260k / "model.safetensors", framework="numpy") as file:
        theirs = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    assert {name: entry.shape for name, entry in ours.items()} == theirs


def test_headers_alone_tell_bases_apart_and_leave_the_digest_of_the_weights_empty(
    tmp_path: Path,
) -> None:
    tensors = {"layers.0.up.weight": (6, 4), "layers.1.up.weight": (6, 4)}
    base = write_model(tmp_path, tensors)
    on_paper, whole = read_shapes(base, ALL, headers_only=True), read_shapes(base, ALL)
    assert on_paper.digest == ""
    assert replace(on_paper, digest=whole.digest) == whole
    file = base / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))
    assert read_shapes(base, ALL, headers_only=True).headers == whole.headers
    assert read_shapes(base, ALL).digest != whole.digest
    write_model(tmp_path, {"layers.0.up.weight": (6, 4), "layers.1.to.weight": (6, 4)})
    assert read_shapes(base, ALL, headers_only=True).headers != whole.headers
    write_model(tmp_path, tensors, rope_theta=5)
    assert read_shapes(base, ALL, headers_only=True).headers != whole.headers
    write_model(tmp_path, {**tensors, "norm.weight": (4,)})
    assert read_shapes(base, ALL, headers_only=True).headers != whole.headers


def test_no_weight_is_read_for_headers_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*_: object) -> str:
        raise AssertionError("weights are read")

    monkeypatch.setattr("fedtune.model.shapes.base_digest", forbidden)
    base = write_model(tmp_path, {"layers.0.up.weight": (6, 4)})
    assert read_shapes(base, ALL, headers_only=True).matrices


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert", "electra", "gpt2", "llama"])
@pytest.mark.parametrize("pooled", [True, False])
def test_the_head_has_as_many_parameters_as_transformers_gives_it(
    tmp_path: Path, kind: str, pooled: bool
) -> None:
    transformers = pytest.importorskip("transformers")
    from fedtune.model.load import dense_shapes, tensor_names

    sizes = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
    config = transformers.AutoConfig.for_model(kind, intermediate_size=12, vocab_size=10, **sizes)
    model = transformers.AutoModel.from_config(config)
    if hasattr(model, "pooler") and not pooled:
        model.pooler = None
    model.save_pretrained(tmp_path)
    shapes = dense_shapes(tmp_path, "sequence-classification", tensor_names(tmp_path))
    expected = sum(math.prod(axis or 5 for axis in shape) for shape in shapes.values())
    assert head_parameters(tmp_path, 5) == expected
