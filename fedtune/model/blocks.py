"""The blocks of Llama-shaped models, made to run by `fused` steps where nothing is unusual.

`fuse` gives a loaded model's norms, attentions and gated MLPs another class each: a subclass of
the one they have, with another `forward`. Names, parameters, hooks and copies stay what they were,
nothing of the library is changed for other models, and the inherited `forward` is there for every
call that is out of the ordinary: generation with a cache, padded batches, weights that are trained
whole, layers that are not adapted.

`run_blocks` runs such a model from its embeddings to its last norm, with none of the library's
steps in between, which on a small model take as long as the arithmetic.

A norm that stands before an attention or an MLP hands its input on untouched; the module behind
it applies the norm inside its own step, so that the norm's output need not be kept.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from jaxtyping import Float, Int
from torch import Tensor, nn

from fedtune.lora.linear import AdaptedLinear
from fedtune.model.attention import Segments, packed_attention
from fedtune.model.fused import (
    Activation,
    Norm,
    Rotation,
    gated_product,
    normed,
    normed_and_turned,
    normed_products,
)
from fedtune.model.packing import Seen

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_log = logging.getLogger(__name__)

_ACTIVATIONS: Final[dict[str, Activation]] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
}


@dataclass(frozen=True, slots=True)
class _Family:
    """What is known of a model's blocks.

    Attributes:
        prefix: of its class names.
        offset: of its norms' weights.
        plain_body: the model is embeddings, blocks and a norm, with nothing in between.
    """

    prefix: str
    offset: float = 0.0
    plain_body: bool = True


_FAMILIES: Final = {
    "llama": _Family("Llama"),
    "mistral": _Family("Mistral"),
    "qwen2": _Family("Qwen2"),
    "qwen3": _Family("Qwen3"),
    "gemma": _Family("Gemma", offset=1.0, plain_body=False),
}
"""By the config's model_type: blocks of norm, attention, norm, gated MLP, read and compared."""


def fuse(model: PreTrainedModel) -> int:
    """Let a model's blocks run by fused steps; returns how many do. Safe to call again.

    Call it once its matrices are adapted. The results are those of the model's own modules up to
    rounding.
    """
    family = _FAMILIES.get(model.config.model_type)
    if family is None:
        return 0
    fused = sum(_fuse_block(block, family) for block in list(model.modules()))
    for module in list(model.modules()):
        if type(module).__name__ == f"{family.prefix}RMSNorm":
            _become(module, _FusedNorm, offset=family.offset)
    _log.info("%s: %d blocks run by fused steps", type(model).__name__, fused)
    return fused


def run_blocks(
    body: PreTrainedModel,
    tokens: Int[Tensor, "1 tokens"],
    positions: Int[Tensor, "1 tokens"],
    where: Segments,
) -> Float[Tensor, "1 tokens hidden"] | None:
    """The last hidden states of packed samples; None where the model's own forward is needed.

    Equal bit for bit to the model's own: the same blocks in the same order.

    Args:
        body: the `base_model` of a model that `packs`.
    """
    blocks = _plain_blocks(body)
    if blocks is None:
        return None
    hidden: Tensor = body.get_input_embeddings()(tokens)
    embeddings = body.get_submodule("rotary_emb")(hidden, positions)
    for block in blocks:
        if block.gradient_checkpointing and block.training:
            hidden = block._gradient_checkpointing_func(
                partial(_run_block, block, embeddings, where), hidden
            )
        else:
            hidden = _run_block(block, embeddings, where, hidden)
    found: Tensor = body.get_submodule("norm")(hidden)
    return found


def runs_blocks(body: PreTrainedModel) -> bool:
    """Whether `run_blocks` runs this body."""
    return _plain_blocks(body) is not None


def _run_block(
    block: Any,  # transformers is untyped
    embeddings: tuple[Tensor, Tensor],
    where: Segments,
    hidden: Tensor,
) -> Tensor:
    # The norms are inside the two parts.
    attended, _ = block.self_attn.forward(hidden, embeddings, segments=where)
    hidden = hidden + attended
    found: Tensor = hidden + block.mlp.forward(hidden)
    return found


def _plain_blocks(body: Any) -> list[Any] | None:  # transformers is untyped
    """The blocks of a model that is fused throughout and that nobody listens to."""
    family = _FAMILIES.get(body.config.model_type)
    if family is None or not family.plain_body or type(body).__name__ != f"{family.prefix}Model":
        return None
    blocks = list(body.layers)
    if len(blocks) != body.config.num_hidden_layers or _has_hooks(body):
        return None
    for block in blocks:
        attention, mlp = block.self_attn, block.mlp
        if not isinstance(attention, _FusedAttention) or not isinstance(mlp, _FusedMlp):
            return None
        before = (attention.norm_before, mlp.norm_before)
        if any(_has_hooks(module) for module in (block, attention, mlp, *before)):
            return None
    return blocks


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def _fuse_block(block: nn.Module, family: _Family) -> bool:
    prefix = family.prefix
    if type(block).__name__ != f"{prefix}DecoderLayer":
        return False
    parts = {
        "self_attn": f"{prefix}Attention",
        "mlp": f"{prefix}MLP",
        "input_layernorm": f"{prefix}RMSNorm",
        "post_attention_layernorm": f"{prefix}RMSNorm",
    }
    if {name: type(child).__name__ for name, child in block.named_children()} != parts:
        return False
    attention, mlp = block.get_submodule("self_attn"), block.get_submodule("mlp")
    activation = _activation(mlp)
    if activation is None:
        return False
    before, between = (block.get_submodule(name) for name in list(parts)[2:])
    for norm in (before, between):
        _become(norm, _FusedNorm, offset=family.offset, deferred=True)
    _become(attention, _FusedAttention, norm_before=before)
    _become(mlp, _FusedMlp, norm_before=between, activation=activation)
    return True


def _activation(mlp: nn.Module) -> Activation | None:
    config: Any = mlp.config  # transformers' configs are untyped
    return _ACTIVATIONS.get(str(getattr(config, "hidden_act", None)))


def _become(module: nn.Module, kind: type[nn.Module], **attributes: object) -> None:
    """Make a module one of `kind` that is still of its own class, too."""
    module.__class__ = _joined(kind, type(module))
    for name, value in attributes.items():
        # Not through nn.Module: a norm stays the child of its block alone.
        object.__setattr__(module, name, value)


_joined_classes: dict[tuple[type, type], type[nn.Module]] = {}


def _joined(kind: type[nn.Module], own: type[nn.Module]) -> type[nn.Module]:
    """One class for each pair, so that modules of one kind stay of one class."""
    key = (kind, own)
    if key not in _joined_classes:
        _joined_classes[key] = type(f"Fused{own.__name__}", key, {})
    return _joined_classes[key]


class _FusedNorm(nn.Module):
    """A norm in one step; a deferred one is applied by the module behind it."""

    weight: nn.Parameter
    eps: Any  # the name that one family gives it
    variance_epsilon: Any  # and the others
    offset: float
    deferred: bool = False

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states if self.deferred else self.now(hidden_states)

    def now(self, hidden_states: Tensor) -> Tensor:
        """The norm itself."""
        if self.weight.requires_grad:
            found: Tensor = super().forward(hidden_states)
            return found
        return normed(hidden_states, self.facts)

    @property
    def facts(self) -> Norm:
        epsilon = self.variance_epsilon if hasattr(self, "variance_epsilon") else self.eps
        return Norm(self.weight, float(epsilon), self.offset)


class _FusedAttention(nn.Module):
    """Norm, q, k, v and rotation in one step; then attention inside each sample."""

    # Declared, not set: a class attribute would hide a child of that name.
    norm_before: _FusedNorm
    q_proj: Any  # adapted, or whatever the model has
    k_proj: Any
    v_proj: Any
    o_proj: Any
    config: Any  # transformers' configs are untyped
    head_dim: int
    sliding_window: int | None
    scaling: float

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: object = None,
        segments: Segments | None = None,
        seen: Seen | None = None,
        **other: Any,
    ) -> tuple[Tensor, Tensor | None]:
        layers = [self.q_proj, self.k_proj, self.v_proj]
        if segments is None or past_key_values is not None or not _run_fused(layers, self):
            if segments is not None:
                other = {**other, "segments": segments, "seen": seen}
            return super().forward(  # type: ignore[no-any-return]
                hidden_states=self.norm_before.now(hidden_states),
                position_embeddings=position_embeddings,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                **other,
            )
        window = self._window()
        if seen is not None:
            seen.windows.append(window)
        query, key, value = self._heads(hidden_states, layers, position_embeddings)
        out = packed_attention(query, key, value, segments, self.scaling, window)
        return self.o_proj(out.flatten(1)[None]), None

    def _heads(
        self, x: Tensor, layers: list[AdaptedLinear], embeddings: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values as (tokens, heads, dim)."""
        cos, sin = (part[0] for part in embeddings)
        norms = [getattr(self, name) for name in ("q_norm", "k_norm") if hasattr(self, name)]
        rotation = Rotation(cos, sin, outputs=0 if norms else 2, dim=self.head_dim)
        found = normed_products(x, self.norm_before.facts, layers, rotation)
        query, key, value = (y.view(x.shape[1], -1, self.head_dim) for y in found)
        if norms:
            one = Rotation(cos, sin, outputs=1, dim=self.head_dim)
            query = normed_and_turned(query, norms[0].facts, one)
            key = normed_and_turned(key, norms[1].facts, one)
        return query, key, value

    def _window(self) -> int | None:
        if hasattr(self, "sliding_window"):  # Qwen: set for the layers that have one
            return self.sliding_window
        if self.config.model_type == "mistral":
            return getattr(self.config, "sliding_window", None)
        return None


class _FusedMlp(nn.Module):
    """Norm, gate and up in one step; activation and down in another."""

    norm_before: _FusedNorm
    activation: Activation
    gate_proj: Any  # adapted, or whatever the model has
    up_proj: Any
    down_proj: Any

    def forward(self, x: Tensor) -> Tensor:
        layers = [self.gate_proj, self.up_proj, self.down_proj]
        if not _run_fused(layers, self):
            found: Tensor = super().forward(self.norm_before.now(x))
            return found
        gate, up = normed_products(x, self.norm_before.facts, layers[:2])
        return gated_product(gate, up, self.activation, layers[2])


def _run_fused(layers: list[Any], module: Any) -> bool:
    """Whether all layers are adapted ones, and nothing is trained that the steps hold frozen."""
    norms = (module.norm_before, getattr(module, "q_norm", None), getattr(module, "k_norm", None))
    return all(
        isinstance(layer, AdaptedLinear)
        and not (layer.bias is not None and layer.bias.requires_grad)
        for layer in layers
    ) and not any(norm is not None and norm.weight.requires_grad for norm in norms)
