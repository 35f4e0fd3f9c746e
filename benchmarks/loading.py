"""Time and memory from a model folder to a quantised backbone, beside transformers' own loading.

    python benchmarks/loading.py [--quick] [--json]

Base: random bf16 weights in the shapes of Llama 3.2 1B (1.24 billion parameters, tied embeddings)
in shards of at most 600 MB, written to a temporary folder and so in the system's page cache. Each
line is a process of its own. Seconds count from after the imports to a model that can train;
growth is the peak of resident memory, mapped files included, over what the process held after its
imports. Allowed is what the backbone keeps, plus its largest adapted matrix in float32, plus 300
MB. The second start finds the packed matrices of the first. Embeddings are held in float32.

`--quick` takes a model of 65 million parameters, and leaves out the start without a cache.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from reporting import parse_arguments, print_json, publish, table

os.environ.setdefault("HF_HUB_OFFLINE", "1")

MARGIN_BYTES = 300_000_000
SHARD_BYTES = 600_000_000


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama."""

    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_value_heads: int

    def config(self) -> dict[str, object]:
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": self.vocabulary,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.key_value_heads,
            "tie_word_embeddings": True,
        }

    def tensors(self) -> dict[str, tuple[int, ...]]:
        narrow = self.hidden // self.heads * self.key_value_heads
        shapes: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (self.vocabulary, self.hidden),
            "model.norm.weight": (self.hidden,),
        }
        for layer in range(self.layers):
            block = {
                "self_attn.q_proj": (self.hidden, self.hidden),
                "self_attn.k_proj": (narrow, self.hidden),
                "self_attn.v_proj": (narrow, self.hidden),
                "self_attn.o_proj": (self.hidden, self.hidden),
                "mlp.gate_proj": (self.intermediate, self.hidden),
                "mlp.up_proj": (self.intermediate, self.hidden),
                "mlp.down_proj": (self.hidden, self.intermediate),
                "input_layernorm": (self.hidden,),
                "post_attention_layernorm": (self.hidden,),
            }
            shapes |= {f"model.layers.{layer}.{n}.weight": s for n, s in block.items()}
        return shapes


FULL = Shape(128_256, 2048, 8192, 16, 32, 8)
QUICK = Shape(32_000, 768, 3072, 6, 12, 4)


def write_folder(folder: Path, shape: Shape) -> None:
    """A Hugging Face folder of random weights; pieces of one long draw, to save time."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    pool = torch.randn(1 << 24, generator=generator).mul_(0.02).bfloat16()
    (folder / "config.json").write_text(json.dumps(shape.config()), encoding="utf-8")
    weight_map: dict[str, str] = {}
    shard: dict[str, Any] = {}
    left = shape.tensors()
    while left:
        name = next(iter(left))
        size = left.pop(name)
        numel = torch.Size(size).numel()
        start = int(torch.randint(0, 1 << 23, (), generator=generator))
        flat = torch.cat([pool[start:], *[pool] * (numel // pool.numel() + 1)])[:numel]
        shard[name] = flat.clone().reshape(size)
        if not left or sum(2 * t.numel() for t in shard.values()) > SHARD_BYTES:
            file = f"model-{len(set(weight_map.values())):05d}.safetensors"
            save_file(shard, folder / file, {"format": "pt"})
            weight_map |= dict.fromkeys(shard, file)
            shard = {}
    index = {"metadata": {}, "weight_map": weight_map}
    text = json.dumps(index)
    (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")


# ---------------------------------------------------------------- contenders


def load_ours(folder: Path, format_name: str, cache: Path | None) -> Mapping[str, float]:
    """Through the same shelf that a device uses."""
    import torch
    from transformers import LlamaForCausalLM

    from fedtune.model.backbone import BackboneShelf
    from fedtune.model.packed_cache import PackedCache
    from fedtune.model.shapes import read_shapes
    from fedtune.records import MatrixForm

    assert LlamaForCausalLM is not None  # imported before the clock starts
    clock = Clock()
    packed = PackedCache(cache / "packed", minimum_bytes=0) if cache else None
    shapes = read_shapes(folder, ("all-linear",), cache / "digests" if cache else None)
    forms = {matrix.name: MatrixForm(format_name) for matrix in shapes.matrices}  # type: ignore[arg-type]
    shelf = BackboneShelf(folder, torch.device("cpu"), keep_base=False, packed=packed)
    backbone = shelf.get("causal-lm", (), forms)
    found = clock.stop()
    rest = sum(p.numel() * p.element_size() for p in backbone.model.parameters())
    largest = max(4 * matrix.parameters for matrix in shapes.matrices)
    return found | {"kept": backbone.packed_bytes + rest, "largest": largest}


def load_transformers(folder: Path, format_name: str, cache: Path | None) -> Mapping[str, float]:
    """`from_pretrained`, in float32 or with bitsandbytes' NF4."""
    import torch
    from transformers import BitsAndBytesConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    options: dict[str, Any] = {}
    if format_name == "bnb":
        import bitsandbytes

        assert bitsandbytes.__version__
        options["device_map"] = "cpu"
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )
    clock = Clock()
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    found = clock.stop()
    kept = sum(p.numel() * p.element_size() for p in model.parameters())
    return found | {"kept": kept}


class Clock:
    """Seconds, and the growth of resident memory at its peak, from here on (Linux)."""

    def __init__(self) -> None:
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # VmHWM starts anew
        self._before = _resident("VmRSS")
        self._started = time.perf_counter()

    def stop(self) -> dict[str, float]:
        seconds = time.perf_counter() - self._started
        return {"seconds": seconds, "growth": _resident("VmHWM") - self._before}


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


CONTENDERS = (
    ("first", "ours, nf4, first start", load_ours, True),
    ("second", "ours, nf4, second start", load_ours, True),
    ("uncached", "ours, nf4, without a cache", load_ours, False),
    ("bnb", "transformers + bitsandbytes NF4", load_transformers, "bnb"),
    ("float32", "transformers, float32", load_transformers, "fp32"),
)


def main() -> int:
    arguments = parse_arguments(__doc__ or "")
    shape = QUICK if arguments.quick else FULL
    rows: list[dict[str, object]] = []
    figures: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as name:
        folder, cache = Path(name) / "base", Path(name) / "cache"
        folder.mkdir()
        write_folder(folder, shape)
        for key, text, load, how in CONTENDERS:
            if arguments.quick and key == "uncached":
                continue
            ours = load is load_ours
            form = "nf4" if ours else str(how)
            # A process of its own, so that no line profits from what another left in memory.
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                found = pool.submit(load, folder, form, cache if ours and how else None).result()
            allowed = found["kept"] + found.get("largest", 0.0) + MARGIN_BYTES
            rows.append(
                {
                    "loaded by": text,
                    "seconds": f"{found['seconds']:.2f}",
                    "kept, MB": f"{found['kept'] / 1e6:,.0f}",
                    "growth at the peak, MB": f"{found['growth'] / 1e6:,.0f}",
                    "allowed, MB": f"{allowed / 1e6:,.0f}" if ours else "-",
                    "share of allowed": f"{found['growth'] / allowed:.2f}" if ours else "-",
                }
            )
            print(f"{text}: {found['seconds']:.1f} s", flush=True)
            figures[f"{key}_seconds"] = round(found["seconds"], 3)
            figures[f"{key}_growth_bytes"] = int(found["growth"])
            if ours:
                ratio = round(found["growth"] / allowed, 4)
                figures["load_peak_ratio"] = max(ratio, figures.get("load_peak_ratio", 0.0))  # type: ignore[call-overload]
    print(table(rows))
    if not arguments.quick:
        publish("Loading", "python benchmarks/loading.py", _PREFACE + table(rows))
    if arguments.json:
        print_json(figures)
    return 0


_PREFACE = (__doc__ or "").split("\n\n", 2)[2].split("\n\n`--quick`")[0] + "\n\n"


if __name__ == "__main__":
    sys.exit(main())
