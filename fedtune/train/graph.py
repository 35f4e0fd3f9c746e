"""A micro-batch's gradients as a CUDA graph: launches are recorded once per form and replayed.

A step of a small model is some thousand launches of a few microseconds each, which Python issues
more slowly than a GPU works them off. A graph issues all of them with one call.

A graph reads and writes fixed addresses: the input buffer of its form, the factors, which it casts
and stacks itself at each replay, and their gradients. So the gradients are set to zero and never
dropped, and the factors of the next round are copied to where those of the last one were. All
graphs of a model share one pool of memory, because none of them runs beside another.
"""

from __future__ import annotations

import logging
import weakref
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from fedtune.errors import ModelError
from fedtune.kernels.workspace import workspaces_taken
from fedtune.lora.linear import Factors, attach, forget_stacks
from fedtune.model.attention import one_launch
from fedtune.model.backbone import Backbone
from fedtune.model.blocks import runs_blocks
from fedtune.model.loss import TokenisedSample, loss_sum, sums_together
from fedtune.quant.bnb import BnbInt8, BnbNf4
from fedtune.records import GraphUse, TaskName
from fedtune.train.form import Form, Inputs, fill, form_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_log = logging.getLogger(__name__)

MOST_FORMS: Final = 8
"""Graphs that are kept; the one whose use lies longest back goes first. A launch in a graph takes
some hundred bytes, and their tensors share memory, so the number bounds the recordings' worth
more than their size."""
_PRACTICE: Final = 2
"""Passes before the recording, in which libraries choose their algorithms and allocate."""
_HALVES: Final = (torch.bfloat16, torch.float16)


def why_not(backbone: Backbone, task: TaskName) -> str | None:
    """What stands against recording the steps of a backbone; None if nothing does.

    Hold its lock, with the factors and checkpointing of the round already set.
    """
    model = backbone.model
    if task != "causal-lm":
        return "only causal language modelling has a static form"
    if any(parameter.requires_grad for parameter in model.parameters()):
        return "parameters of the model itself are trained"
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        return "activations are recomputed"
    if any(isinstance(m.matrix, BnbInt8 | BnbNf4) for m in backbone.layers.values()):
        return "bitsandbytes unpacks matrices"
    if not sums_together(model) or not runs_blocks(model.base_model):
        return f"{type(model).__name__} does not run packed and by fused blocks"
    rotary = str(getattr(model.base_model.rotary_emb, "rope_type", "default"))
    if "dynamic" in rotary or rotary == "longrope":
        return f"rotary embeddings of type {rotary} look at the positions' values"
    return _why_not_here(model)


def _why_not_here(model: PreTrainedModel) -> str | None:
    """What stands against it where the model is, and in its dtype."""
    table = model.get_input_embeddings().weight
    if table.dtype not in _HALVES:
        return f"it computes in {str(table.dtype).removeprefix('torch.')}"
    if table.device.type != "cuda":
        return f"it is on {table.device.type}"
    head = table.new_empty(0, 1, model.base_model.layers[0].self_attn.head_dim)
    if not one_launch(head):
        return "FlashAttention does not take its heads on this GPU"
    return None


class StaticStep:
    """The gradients of one micro-batch, read from a fixed buffer and added to fixed ones.

    Attributes:
        inputs: parts of `buffer`, which `fill` writes.
    """

    def __init__(self, form: Form, trained: Sequence[Tensor]) -> None:
        self.form, self._trained = form, trained
        self.buffer = torch.zeros(form.words, dtype=torch.int64, device=trained[0].device)
        self.inputs = Inputs.within(self.buffer, form)

    def gradients(
        self, backbone: Backbone, lengths: Sequence[int]
    ) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """(summed loss, gradients of the scaled one in the factors)."""
        total = loss_sum(backbone.model, self.inputs.batch(lengths), "causal-lm").total
        # Not `backward`: its accumulation would keep to the stream of the first pass.
        found = torch.autograd.grad(total * self.inputs.scale, self._trained, allow_unused=True)
        return total.detach(), found

    def add(self, backbone: Backbone, lengths: Sequence[int]) -> Tensor:
        """Add the gradients to those that the factors hold; returns the summed loss, unscaled."""
        total, found = self.gradients(backbone, lengths)
        held, new = [], []
        for tensor, gradient in zip(self._trained, found, strict=True):
            if gradient is not None:
                assert tensor.grad is not None
                held.append(tensor.grad)
                new.append(gradient)
        torch._foreach_add_(held, new)
        return total


@dataclass(frozen=True, slots=True)
class _Recorded:
    """A graph and what it must find when it runs.

    Attributes:
        total: where it writes the summed loss.
        taken: the workspaces that it uses.
    """

    step: StaticStep
    graph: torch.cuda.CUDAGraph
    total: Tensor
    taken: list[Tensor]


class StepGraphs:
    """The recorded steps of one backbone with factors of given shapes.

    Args:
        factors: those that the graphs read; they are on the backbone when a step is added.
        at_once: record a form when it is first seen, not when it is seen again.
        most: graphs that are kept.
    """

    def __init__(
        self, factors: Mapping[str, Factors], *, at_once: bool, most: int = MOST_FORMS
    ) -> None:
        self.factors, self.at_once, self._most = dict(factors), at_once, most
        self._trained = [
            tensor
            for _, pair in sorted(factors.items())
            if pair.trains
            for tensor in (pair.a, pair.b)
        ]
        self._seen: Counter[Form] = Counter()
        self._recorded: OrderedDict[Form, _Recorded] = OrderedDict()
        self._pool: Any = None  # torch's own type
        self._aside: torch.cuda.Stream | None = None
        self._given_up = False
        self.clear_gradients()

    @property
    def forms(self) -> tuple[Form, ...]:
        """Of the graphs that are held, the one that was used last at the end."""
        return tuple(self._recorded)

    def clear_gradients(self) -> None:
        """Have gradients of zero where the graphs add theirs."""
        for tensor in self._trained:
            if tensor.grad is None:
                tensor.grad = torch.zeros_like(tensor, memory_format=torch.contiguous_format)
            else:
                tensor.grad.zero_()

    def take(self, factors: Mapping[str, Factors]) -> bool:
        """Take over another round's values; False if they are of other shapes."""
        if factors.keys() != self.factors.keys():
            return False
        pairs = [(self.factors[name], new) for name, new in factors.items()]
        if any(_signature(held) != _signature(new) for held, new in pairs):
            return False
        with torch.no_grad():
            for held, new in pairs:
                for into, value in zip(_tensors(held), _tensors(new), strict=True):
                    into.copy_(value)
        self.clear_gradients()
        return True

    def add(
        self, backbone: Backbone, part: Sequence[TokenisedSample], pad_id: int, scale: float
    ) -> Tensor | None:
        """Add the gradients of a micro-batch to those that the factors hold.

        Args:
            scale: multiplies the summed loss before the backward pass.

        Returns:
            The summed loss, unscaled, until the next call; None if this micro-batch is to be
            computed without a graph.

        Raises:
            RuntimeError: the recording failed, and it is not to be done without.
        """
        form = form_of(part)
        recorded = self._recorded.get(form)
        if recorded is None and not self._is_due(form):
            return None
        # Pinned memory is given out again only when the copy from it is done.
        host = torch.empty(form.words, dtype=torch.int64, pin_memory=True)
        fill(host, part, form, pad_id, scale)
        if recorded is None:
            recorded = self._try_to_record(backbone, form, host)
            if recorded is None:
                return None
        self._recorded.move_to_end(form)
        recorded.step.buffer.copy_(host, non_blocking=True)
        recorded.graph.replay()
        return recorded.total

    def _is_due(self, form: Form) -> bool:
        self._seen[form] += 1
        return not self._given_up and (self.at_once or self._seen[form] > 1)

    def _try_to_record(self, backbone: Backbone, form: Form, host: Tensor) -> _Recorded | None:
        device = self._trained[0].device
        before = torch.cuda.current_stream(device)
        try:
            with torch.cuda.device(device):
                while len(self._recorded) >= self._most:
                    torch.cuda.synchronize()  # the oldest may still run
                    self._recorded.popitem(last=False)
                recorded = self._record(backbone, form, host)
        except RuntimeError as error:  # torch's own, out of memory among them
            torch.cuda.set_stream(before)  # torch leaves it at the recording's
            if self.at_once:
                raise
            self._given_up = True
            _log.warning("steps are no longer recorded, because it failed: %s", error)
            return None
        finally:
            # What was made while recording lies in the graph's memory.
            forget_stacks(backbone.layers.values())
        self._recorded[form] = recorded
        _log.info("recorded a step of %d tokens in %d segments", form.tokens, form.segments)
        return recorded

    def _record(self, backbone: Backbone, form: Form, host: Tensor) -> _Recorded:
        if self._aside is None or self._pool is None:
            self._aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            self._pool = torch.cuda.graph_pool_handle()
        step, lengths = StaticStep(form, self._trained), (form.longest,)
        step.buffer.copy_(host, non_blocking=True)
        # In the stream of the recording, because libraries keep their workspaces by stream.
        self._aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._aside):
            for _ in range(_PRACTICE):
                step.gradients(backbone, lengths)
        torch.cuda.current_stream().wait_stream(self._aside)
        # Casting and stacking belong into the graph: it must read the factors as they are then.
        forget_stacks(backbone.layers.values())
        graph = torch.cuda.CUDAGraph()
        with (
            workspaces_taken() as taken,
            torch.cuda.graph(
                graph, pool=self._pool, stream=self._aside, capture_error_mode="thread_local"
            ),
        ):
            total = step.add(backbone, lengths)
        return _Recorded(step, graph, total, taken)


def _tensors(pair: Factors) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return pair.a, pair.b, pair.tail_a, pair.tail_b


def _signature(pair: Factors) -> tuple[object, ...]:
    """What a graph takes for granted of factors, besides their place."""
    return (pair.scale, pair.trains, *((t.shape, t.dtype, t.device) for t in _tensors(pair)))


_kept: weakref.WeakKeyDictionary[PreTrainedModel, StepGraphs] = weakref.WeakKeyDictionary()
"""The graphs of each loaded model, from round to round; they hold no part of the model."""


def step_graphs(
    backbone: Backbone, factors: Mapping[str, Factors], task: TaskName, use: GraphUse
) -> StepGraphs | None:
    """What records the steps of a round; None if there is nothing to record.

    Hold the backbone's lock. Afterwards `StepGraphs.factors` are on the backbone: equal to the
    given ones, and those of an earlier round wherever that one's graphs serve again.

    Raises:
        ModelError: `use` is `on`, and the backbone's steps cannot be recorded.
    """
    if use == "off":
        return None
    reason = why_not(backbone, task)
    if reason is not None:
        if use == "on":
            raise ModelError(
                f"the step cannot be recorded as a CUDA graph, because {reason}; set "
                'train.cuda_graph to "auto" or "off"'
            )
        _log.info("steps are not recorded as CUDA graphs, because %s", reason)
        return None
    graphs = _kept.get(backbone.model)
    if graphs is None or not graphs.take(factors):
        _kept.pop(backbone.model, None)
        graphs = _kept[backbone.model] = StepGraphs(factors, at_once=use == "on")
    graphs.at_once = use == "on"
    attach(backbone.layers, graphs.factors)
    return graphs


def forget_graphs(backbone: Backbone) -> None:
    """Give the memory of a backbone's graphs back."""
    _kept.pop(backbone.model, None)
