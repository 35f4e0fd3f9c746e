"""Samples of any length in one row of tokens, without padding and without seeing each other.

The row's positions begin anew with each sample, and attention stays inside it; every other part of
such a model treats tokens one by one. The results are those of separate samples, and nothing is
computed for padding.

Whether a model is of that kind is found out by trying, not from a list of names: two short samples
are run apart and packed, once per loaded model. A model packs when every layer came by here, every
sliding window arrived with it, and the hidden states agree. The others (ALiBi, state-space and
convolution layers, encoders) are padded, and a log line says so.

`transformers` lets an attention function be registered by name. Ours is used in its place, and
does what theirs does when it is called without segments (generation, padded batches).
"""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fedtune.model.attention import Segments, packed_attention, segments

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_log = logging.getLogger(__name__)

ATTENTION_NAME: Final = "fedtune_packed"
_CHECK_LENGTHS: Final = (5, 3)
_UNKNOWN: Final = ("s_aux", "position_bias", "cache")
"""Arguments of attention functions that change the result and that ours does not know."""

_verdicts: weakref.WeakKeyDictionary[PreTrainedModel, bool] = weakref.WeakKeyDictionary()


@dataclass(slots=True)
class Seen:
    """What reached the attention function during a check."""

    windows: list[int | None] = field(default_factory=list)


class _NotPackable(Exception):
    """The model asks the attention for something that ours does not do."""


def packs(model: PreTrainedModel) -> bool:
    """Whether a causal model gives packed samples the results of separate ones; tried once.

    The trial leaves the model's attention function replaced by ours if the answer is yes. Hold the
    model's lock.
    """
    if model not in _verdicts:
        reason = _why_not(model)
        _verdicts[model] = reason is None
        name = type(model).__name__
        if reason is None:
            _log.info("%s: samples are packed into one row, without padding", name)
        else:
            _log.info("%s: samples are padded, because %s", name, reason)
    return _verdicts[model]


def run_packed(
    model: PreTrainedModel,
    tokens: Int[Tensor, "1 tokens"],
    positions: Int[Tensor, "1 tokens"],
    where: Segments,
    **extra: Any,
) -> Any:  # the models' output classes are untyped
    """Run a model, or its body, over packed samples.

    Args:
        model: a model that `packs`, or its `base_model`.
        extra: handed through to the attention function.
    """
    # A mask of four dimensions is passed on as it is. No mask is built, no bound is looked for on
    # the device, and the attention function takes the bounds from `segments`.
    no_mask = torch.empty(1, 1, 1, 1, dtype=torch.bool, device=tokens.device)
    return model(
        input_ids=tokens,
        position_ids=positions,
        attention_mask=no_mask,
        use_cache=False,
        segments=where,
        **extra,
    )


def restarting(lengths: tuple[int, ...]) -> Int[Tensor, "1 tokens"]:
    """Positions that count from zero in each sample."""
    return torch.cat([torch.arange(length) for length in lengths])[None]


# ---------------------------------------------------------------- the trial

_REFUSALS = (
    _NotPackable,
    TypeError,
    ValueError,
    RuntimeError,
    AttributeError,
    LookupError,
    AssertionError,
)


def _why_not(model: PreTrainedModel) -> str | None:
    """None when the model packs; else what stands against it, for the log."""
    kinds = set(getattr(model.config, "layer_types", None) or ())
    if unknown := kinds - {"full_attention", "sliding_attention"}:
        return f"it has layers of {', '.join(sorted(unknown))}"
    before = model.config._attn_implementation
    if before not in ("sdpa", "eager", ATTENTION_NAME):  # ours: a copy of a model that packs
        return f"its attention is {before}"
    _register()
    seen = Seen()
    try:
        with torch.no_grad(), _evaluation(model):
            apart, tokens = _apart(model)
            model.config._attn_implementation = ATTENTION_NAME
            together = _together(model, tokens, seen)
    except _REFUSALS as error:
        # Whatever a model's own code raises means the same: it is not made for this. If the model
        # is broken, the padded pass that follows raises again.
        model.config._attn_implementation = before
        return f"it does not run packed ({type(error).__name__}: {_first_line(error)})"
    reason = _difference(model, apart, together, seen)
    if reason is not None:
        model.config._attn_implementation = before
    return reason


def _apart(model: PreTrainedModel) -> tuple[Tensor, list[Tensor]]:
    device = model.device
    generator = torch.Generator().manual_seed(1)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    tokens = [
        torch.randint(vocabulary, (1, length), generator=generator).to(device)
        for length in _CHECK_LENGTHS
    ]
    hidden = [
        model.base_model(input_ids=part, use_cache=False).last_hidden_state[0] for part in tokens
    ]
    return torch.cat(hidden), tokens


def _together(model: PreTrainedModel, tokens: list[Tensor], seen: Seen) -> Tensor:
    positions = restarting(_CHECK_LENGTHS).to(model.device)
    where = segments(_CHECK_LENGTHS, model.device)
    output = run_packed(model.base_model, torch.cat(tokens, dim=1), positions, where, seen=seen)
    hidden: Tensor = output.last_hidden_state
    return hidden[0]


def _difference(
    model: PreTrainedModel,
    apart: Float[Tensor, "tokens hidden"],
    together: Float[Tensor, "tokens hidden"],
    seen: Seen,
) -> str | None:
    config = model.config
    layers = config.num_hidden_layers
    if len(seen.windows) != layers:
        return f"{len(seen.windows)} of its {layers} layers are attention that can be packed"
    kinds = getattr(config, "layer_types", None)
    windowed = getattr(config, "sliding_window", None) is not None
    if kinds:
        sliding = [kind == "sliding_attention" for kind in kinds]
    else:
        sliding = [windowed and getattr(config, "use_sliding_window", True)] * layers
    if any(need and window is None for need, window in zip(sliding, seen.windows, strict=True)):
        return "its sliding window does not reach the attention function"
    # Wrong attention differs in the first digits; rounding, in the last. eps ** 0.5 lies between.
    tolerance = torch.finfo(apart.dtype).eps ** 0.5 * float(apart.abs().max())
    worst = float((apart - together).abs().max())
    if not worst <= tolerance:
        return f"packed samples differ from separate ones by {worst:.2g}"
    return None


@contextlib.contextmanager
def _evaluation(model: PreTrainedModel) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:100] if lines else "no message"


# ---------------------------------------------------------------- the function transformers calls


def _register() -> None:
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, _attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, sdpa_mask)


def _attention(
    module: torch.nn.Module,
    query: Float[Tensor, "batch heads tokens dim"],
    key: Float[Tensor, "batch kv_heads tokens dim"],
    value: Float[Tensor, "batch kv_heads tokens dim"],
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    segments: Segments | None = None,
    seen: Seen | None = None,
    **other: Any,
) -> tuple[Float[Tensor, "batch tokens heads dim"], None]:
    """Attention in the form that transformers' models call."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if segments is None:
        return _as_transformers(
            module, query, key, value, attention_mask, dropout, scale, softcap, other
        )
    if seen is not None:
        seen.windows.append(sliding_window)
        if any(other.get(name) is not None for name in _UNKNOWN):
            raise _NotPackable(f"its attention has {', '.join(n for n in _UNKNOWN if n in other)}")
        if not getattr(module, "is_causal", True) or other.get("is_causal") is False:
            raise _NotPackable("its attention looks ahead")
    if dropout:
        raise _NotPackable("its attention has dropout")
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (tokens, heads, dim)
    out = packed_attention(q, k, v, segments, scale, sliding_window, softcap)
    return out[None], None


def _as_transformers(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    scale: float,
    softcap: float | None,
    other: dict[str, Any],
) -> tuple[Tensor, None]:
    """What the model would have computed before its attention function was replaced."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if softcap is None:
        out, _ = sdpa_attention_forward(
            module, query, key, value, mask, dropout=dropout, scaling=scale, **other
        )
        return out, None
    groups = query.shape[1] // key.shape[1]
    grouped = query.reshape(len(query), key.shape[1], groups, *query.shape[2:])
    scores = grouped @ key.unsqueeze(2).transpose(-1, -2)
    scores = (scores * (scale / softcap)).tanh() * softcap
    if mask is None:
        length, total = scores.shape[-2:]
        ones = torch.ones(length, total, dtype=torch.bool, device=query.device)
        mask = ones.tril_(total - length)[None, None]
    scores = scores.masked_fill(~mask.unsqueeze(2), float("-inf"))
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value.unsqueeze(2)).flatten(1, 2).transpose(1, 2), None
