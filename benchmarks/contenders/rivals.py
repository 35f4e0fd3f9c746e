"""LoRA training as Hugging Face transformers, PEFT and bitsandbytes do it, in a bare loop."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from contenders.workloads import LEARNING_RATE, RANK, SCALE, TARGETS, Sample, first_factors, pad

# PEFT asks for recomputation by names that transformers has changed.
warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*", category=FutureWarning)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class PeftTrainer:
    """A PEFT model over a base, which takes one AdamW step per batch.

    Adapters are held in fp32, as PEFT does by itself.
    """

    def __init__(self, base: Any) -> None:  # transformers is untyped
        self.model = _adapted(base)
        self.device = next(base.parameters()).device
        self.restart()

    def restart(self) -> None:
        """Put the factors that all start from, and forget the optimiser's state."""
        modules = {
            name.removeprefix("base_model.model."): module
            for name, module in self.model.named_modules()
            if hasattr(module, "lora_A") and "default" in module.lora_A
        }
        sizes = {name: (m.out_features, m.in_features) for name, m in modules.items()}
        with torch.no_grad():
            for name, (a, b) in first_factors(sizes).items():
                modules[name].lora_A["default"].weight.copy_(torch.from_numpy(a))
                modules[name].lora_B["default"].weight.copy_(torch.from_numpy(b))
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0)

    def set_checkpointing(self, on: bool) -> None:
        """Recompute each block's activations in the backward pass, or keep them."""
        if on:
            self.model.enable_input_require_grads()
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            self.model.gradient_checkpointing_disable()

    def loss(self, batch: Sequence[Sample]) -> torch.Tensor:
        """Mean loss of a padded batch over the tokens that carry it."""
        padded = pad(batch)
        tokens, present, labels = (
            torch.from_numpy(array).to(self.device)
            for array in (padded.tokens, padded.present, padded.labels)
        )
        # Without padding, no mask: attention then takes its faster path.
        mask = None if padded.present.all() else present
        output: torch.Tensor = self.model(
            input_ids=tokens, attention_mask=mask, labels=labels, use_cache=False
        ).loss
        return output

    def step(self, batch: Sequence[Sample]) -> float:
        """Train on a batch and give its loss before the step."""
        loss = self.loss(batch)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())


def from_folder(folder: Path, weights: str, compute: str) -> PeftTrainer:
    """A trainer over a model folder, loaded as transformers loads it.

    Args:
        weights: `nf4` (bitsandbytes, QLoRA's own settings) or `dense`.
        compute: `fp32` or `bf16`, of products and activations.
    """
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    dtype = DTYPES[compute]
    extra = {}
    if weights == "nf4":
        extra["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    return PeftTrainer(
        AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, attn_implementation="sdpa", device_map={"": "cpu"}, **extra
        )
    )


def quantise(base: Any) -> Any:  # transformers is untyped
    """Put bitsandbytes' NF4 layers into a model in memory, as transformers does on loading."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    settings = {"compress_statistics": True, "quant_type": "nf4"}
    for path, module in list(base.named_modules()):
        if not isinstance(module, nn.Linear) or path.rpartition(".")[2] not in TARGETS:
            continue
        weight = module.weight.data
        layer = Linear4bit(
            module.in_features,
            module.out_features,
            bias=False,
            compute_dtype=weight.dtype,
            device="meta",
            **settings,
        )
        layer.weight = Params4bit(weight, requires_grad=False, **settings)
        base.set_submodule(path, layer.to(weight.device))
    base.is_loaded_in_4bit = True
    return base


def _adapted(base: Any) -> Any:  # transformers and peft are untyped
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(
        r=RANK,
        lora_alpha=round(SCALE * RANK),
        target_modules=list(TARGETS),
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(base, settings)
    model.train()
    return model
