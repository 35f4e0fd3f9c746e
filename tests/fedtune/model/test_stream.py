"""A base is built without its matrices, and they are found again where transformers puts them."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from fedtune.errors import ModelError
from fedtune.model import backbone as backbone_module
from fedtune.model import stream as stream_module
from fedtune.model.backbone import BackboneShelf
from fedtune.model.load import load_base
from fedtune.model.shapes import read_shapes
from fedtune.model.stream import BaseTensors, Skeleton, stream_base
from fedtune.records import FormatName, MatrixForm

TOKENS = torch.arange(3, 40)[None]
CPU = torch.device("cpu")


@pytest.fixture
def copied(tiny_llama: Path, tmp_path: Path) -> Path:
    """A copy of the base that a test may spoil."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "copied"))


def forms(folder: Path, name: FormatName = "fp32") -> dict[str, MatrixForm]:
    shapes = read_shapes(folder, ("all-linear",))
    return {matrix.name: MatrixForm(name) for matrix in shapes.matrices}


def stream(folder: Path, *absent: str, dtype: torch.dtype = torch.float32) -> Skeleton:
    return stream_base(folder, BaseTensors(folder), "causal-lm", (), absent, dtype)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=TOKENS).logits
    return found


def test_writing_to_a_mapped_tensor_leaves_the_file_alone(copied: Path) -> None:
    before = (copied / "model.safetensors").read_bytes()
    tensors = BaseTensors(copied)
    name = "model.layers.0.mlp.up_proj.weight"
    tensor = tensors.read(name)
    tensor.fill_(7.0)
    assert (copied / "model.safetensors").read_bytes() == before
    assert not torch.equal(tensors.read(name), tensor)
    assert tuple(tensor.shape) == tensors.shapes[name]


def test_what_is_absent_is_never_read(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    read = BaseTensors.read
    monkeypatch.setattr(
        BaseTensors, "read", lambda self, name: (seen.append(name), read(self, name))[1]
    )
    absent = forms(tiny_llama)
    skeleton = stream(tiny_llama, *absent)
    assert set(seen) == {n for n in BaseTensors(tiny_llama).shapes} - {
        f"{n}.weight" for n in absent
    }
    assert skeleton.lost == ()


def test_a_skeleton_is_frozen_and_in_evaluation_mode(tiny_llama: Path) -> None:
    model = stream(tiny_llama, *forms(tiny_llama)).model
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not any(module.training for module in model.modules())
    assert model.config.name_or_path == str(tiny_llama)


def test_a_head_is_drawn_alike_each_time_and_leaves_the_callers_numbers_alone(
    tiny_bert: Path,
) -> None:
    heads = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        expected = torch.rand(3)
        torch.manual_seed(seed)
        model = stream_base(
            tiny_bert, BaseTensors(tiny_bert), "sequence-classification", ("a", "b"), ()
        ).model
        assert torch.equal(torch.rand(3), expected)
        heads.append(model.get_parameter("classifier.weight"))
    assert torch.equal(*heads)
    assert heads[0].std() > 0


def test_a_half_precision_base_stays_so(tiny_llama: Path) -> None:
    skeleton = stream(tiny_llama, *forms(tiny_llama), dtype=torch.bfloat16)
    assert skeleton.lost == ()
    assert {p.dtype for p in skeleton.model.parameters()} == {torch.bfloat16}


# ---------------------------------------------------------------- refusals


def test_a_folder_that_lacks_weights_is_refused(copied: Path) -> None:
    stored = load_file(copied / "model.safetensors")
    del stored["model.layers.1.mlp.up_proj.weight"]
    save_file(stored, copied / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks weights that LlamaForCausalLM needs: model\.lay"):
        stream(copied)


def test_a_matrix_of_another_shape_than_the_config_says_is_refused(copied: Path) -> None:
    config = (copied / "config.json").read_text(encoding="utf-8")
    spoiled = config.replace('"intermediate_size": 64', '"intermediate_size": 96')
    assert spoiled != config
    (copied / "config.json").write_text(spoiled, encoding="utf-8")
    with pytest.raises(ModelError, match=r"cannot be loaded for causal-lm: ") as caught:
        stream(copied, *forms(copied))
    assert "\n" not in str(caught.value)


def test_a_file_that_is_cut_off_is_refused(copied: Path) -> None:
    weights = copied / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelError, match="is cut off"):
        stream(copied)


def test_a_file_that_has_gone_is_refused(copied: Path) -> None:
    tensors = BaseTensors(copied)
    (copied / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"model\.safetensors cannot be read"):
        tensors.read("model.norm.weight")


class TiedLlama(LlamaForCausalLM):  # type: ignore[misc]  # the library is untyped
    """Two linear layers of a block share one matrix."""

    _tied_weights_keys = {  # noqa: RUF012  transformers reads it so
        "model.layers.0.self_attn.k_proj.weight": "model.layers.0.self_attn.q_proj.weight"
    }


def test_a_matrix_that_two_layers_share_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = LlamaConfig(
        vocab_size=99,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        tie_word_embeddings=True,
    )
    TiedLlama(config).save_pretrained(tmp_path)

    class Auto:
        from_config = TiedLlama

    monkeypatch.setattr(stream_module, "auto_class", lambda task: Auto)
    words = r"is tied: .*q_proj and .*k_proj share it"
    with pytest.raises(ModelError, match=words):
        stream(tmp_path, "model.layers.0.self_attn.q_proj")


# ---------------------------------------------------------------- what transformers computes with


def test_a_matrix_that_is_computed_with_is_taken_from_the_whole_base(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # As a conversion of transformers would: what is in the model is not what is in the file.
    name = "model.layers.0.mlp.up_proj"
    chosen = forms(tiny_llama)
    stream = backbone_module.stream_base

    def lossy(*arguments: object) -> Skeleton:
        found = stream(*arguments)  # type: ignore[arg-type]
        del found.places[name]
        return Skeleton(found.model, found.places, (name,))

    def doubled(*arguments: object) -> nn.Module:
        model = load_base(*arguments)  # type: ignore[arg-type]
        with torch.no_grad():
            model.get_parameter(f"{name}.weight").mul_(2)
        return model

    monkeypatch.setattr(backbone_module, "stream_base", lossy)
    monkeypatch.setattr(backbone_module, "load_base", doubled)
    shelf = BackboneShelf(tiny_llama, CPU, keep_base=True)
    with caplog.at_level("INFO", logger="fedtune.model.backbone"):
        found = shelf.get("causal-lm", (), chosen)
    expected = doubled(tiny_llama, "causal-lm")
    torch.testing.assert_close(logits(found.model), logits(expected), rtol=1e-4, atol=1e-4)
    lines = [line for line in caplog.messages if "the base is read as a whole" in line]
    assert lines == [
        f"LlamaForCausalLM computes with {name} while it loads; "
        "the base is read as a whole, unquantised"
    ]
