"""One round on one device: start from what was sent, take the planned steps, give it back.

The same code serves every device; what differs is the plan (ranks, formats, micro-batch) and the
backbone it was given. Gradients accumulate over micro-batches as sums and are divided once, so the
micro-batch changes memory and time, never the mathematics.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fedtune.errors import ProtocolError
from fedtune.lora.linear import Factors, attach, detach
from fedtune.model.backbone import Backbone
from fedtune.model.loss import TokenisedSample, loss_units
from fedtune.records import DevicePlan, Dispatch, FloatArray, GraphUse, LoraFactors, TaskName
from fedtune.train.compute import LossScale
from fedtune.train.graph import step_graphs
from fedtune.train.memory import OptimizerMemory
from fedtune.train.optimizer import RoundOptimizer
from fedtune.train.proximal import make_proximal
from fedtune.train.rates import layer_shares
from fedtune.train.step import accumulate
from fedtune.train.ways import Course
from fedtune.wire.messages import OptimizerSpec


@dataclass(frozen=True, slots=True)
class RoundResult:
    """What a device has after its steps.

    Attributes:
        losses: mean loss per unit of each optimiser step's batch, before that step.
        units: tokens (or samples, when classifying) that carried loss.
    """

    factors: Mapping[str, LoraFactors]
    dense: Mapping[str, FloatArray]
    samples: int
    units: int
    losses: tuple[float, ...]
    seconds: float


@dataclass(frozen=True, slots=True)
class Mounted:
    """A device's tensors on a backbone: what is trained, and how to read it back."""

    factors: Mapping[str, Factors]
    dense: Mapping[str, nn.Parameter]

    def trained(self) -> dict[str, Tensor]:
        """Name, as on the wire -> trained tensor, in a fixed order."""
        found = trained_tensors(self.factors)
        return found | {f"dense.{name}": self.dense[name] for name in sorted(self.dense)}


def trained_tensors(factors: Mapping[str, Factors]) -> dict[str, Tensor]:
    """Name, as on the wire -> tensor, of every A and B that trains, in a fixed order."""
    found: dict[str, Tensor] = {}
    for name, pair in sorted(factors.items()):
        both = {f"{name}.a": pair.a, f"{name}.b": pair.b}
        found |= {key: tensor for key, tensor in both.items() if tensor.requires_grad}
    return found


def mount(backbone: Backbone, dispatch: Dispatch, *, trainable: bool) -> Mounted:
    """Put a device's factors and dense values on a backbone; hold its lock while it is used.

    Raises:
        ProtocolError: the dispatch names a matrix that the backbone does not adapt, or holds a
            tensor of another shape.
        ModelError: the model has no dense parameter of that name.
    """
    factors = device_factors(backbone, dispatch, trainable=trainable)
    dense = {name: backbone.parameter(name) for name in sorted(dispatch.dense)}
    for name, parameter in dense.items():
        sent = tuple(dispatch.dense[name].shape)
        if sent != tuple(parameter.shape):
            raise ProtocolError(
                f"the coordinator sent {name} of shape {sent}, expected {tuple(parameter.shape)}"
            )
    # From here on the backbone changes; all that can be refused has been.
    attach(backbone.layers, factors)
    for name, parameter in dense.items():
        with torch.no_grad():
            parameter.copy_(torch.tensor(dispatch.dense[name]))
        parameter.requires_grad_(trainable)
    return Mounted(factors, dense)


def device_factors(
    backbone: Backbone, dispatch: Dispatch, *, trainable: bool
) -> dict[str, Factors]:
    """A device's factors as tensors where the backbone is, of every matrix that it was sent.

    Raises:
        ProtocolError: as for `mount`.
    """
    unknown = (set(dispatch.trained) | set(dispatch.tail)) - set(backbone.layers)
    if unknown:
        raise ProtocolError(
            f"the coordinator sent factors for {sorted(unknown)[0]}, which this backbone does "
            "not adapt"
        )
    device = next(backbone.model.parameters()).device
    names = sorted(set(dispatch.trained) | set(dispatch.tail))
    return {
        name: _factors(
            backbone.layers[name].out_features,
            backbone.layers[name].in_features,
            dispatch.trained.get(name),
            dispatch.tail.get(name),
            device,
            trainable,
        )
        for name in names
    }


def unmount(backbone: Backbone, mounted: Mounted) -> None:
    """Leave the backbone bare and frozen for the next device."""
    detach(backbone.layers)
    for parameter in mounted.dense.values():
        parameter.requires_grad_(False)
        parameter.grad = None


def train_round(
    backbone: Backbone,
    batches: Sequence[Sequence[TokenisedSample]],
    dispatch: Dispatch,
    plan: DevicePlan,
    optimizer: OptimizerSpec,
    *,
    task: TaskName,
    pad_id: int,
    memory: OptimizerMemory | None = None,
    loss_scale: LossScale | None = None,
    cuda_graph: GraphUse = "off",
    after_step: Callable[[int, float], None] | None = None,
    before_pass: Callable[[], None] | None = None,
) -> RoundResult:
    """Train a device's adapter for one round.

    Args:
        batches: one optimiser step's samples each; as many as `plan.local_steps`.
        memory: what the device's earlier rounds left of the optimiser; it takes what this one
            leaves. None: begin and end without.
        loss_scale: for a backbone that computes in float16; None: losses are not scaled.
        cuda_graph: whether to record the steps on a GPU and replay them; `auto` where it can be
            done, for micro-batches whose form comes again.
        after_step: called with the step's index and loss; may raise to stop the round.
        before_pass: called before every micro-batch; may raise to stop the round.

    Raises:
        ModelError: `cuda_graph` is `on`, and the backbone's steps cannot be recorded.
        ProtocolError: the dispatch does not fit the backbone.
    """
    started = time.perf_counter()
    with backbone.lock:
        mounted = mount(backbone, dispatch, trainable=True)
        try:
            set_checkpointing(backbone, plan.checkpointing)
            course = Course(backbone, mounted.factors, optimizer)
            course.begin(batches[0], plan.micro_batch, task, pad_id)
            graphs = None
            if course.can_be_recorded(cuda_graph):
                graphs = step_graphs(backbone, mounted.factors, task, cuda_graph)
            if graphs is not None:
                mounted = replace(mounted, factors=graphs.factors)
            stepper = RoundOptimizer(
                mounted.trained(),
                optimizer,
                len(batches),
                memory=memory,
                loss_scale=loss_scale,
                rate_shares=layer_shares(backbone.layers, optimizer.way.layer_rate_decay),
                keeps_gradients=graphs is not None,
                proximal=make_proximal(mounted.factors, mounted.dense, optimizer.proximal),
            )
            losses, units = [], 0
            for index, batch in enumerate(batches):
                factor = 1.0 if loss_scale is None else loss_scale.value
                loss = accumulate(
                    backbone, batch, plan.micro_batch, task, pad_id, factor, graphs, before_pass
                )
                course.narrow()
                stepper.step()
                losses.append(loss)
                units += loss_units(batch, task)
                if after_step is not None:
                    after_step(index, loss)
            stepper.keep()
            factors = read_back(mounted.factors, dispatch)
            dense = {name: _array(p) for name, p in mounted.dense.items()}
        finally:
            set_checkpointing(backbone, False)
            unmount(backbone, mounted)
    samples = sum(len(batch) for batch in batches)
    seconds = time.perf_counter() - started
    return RoundResult(factors, dense, samples, units, tuple(losses), seconds)


def _factors(
    out_features: int,
    in_features: int,
    trained: LoraFactors | None,
    tail: LoraFactors | None,
    device: torch.device,
    trainable: bool,
) -> Factors:
    def pair(source: LoraFactors | None) -> tuple[Tensor, Tensor]:
        if source is None:
            return torch.zeros(0, in_features), torch.zeros(out_features, 0)
        return torch.tensor(source.a), torch.tensor(source.b)

    a, b = (t.float().to(device) for t in pair(trained))
    tail_a, tail_b = (t.float().to(device) for t in pair(tail))
    for sent_a, sent_b in ((a, b), (tail_a, tail_b)):
        if sent_a.shape[1] != in_features or sent_b.shape[0] != out_features:
            raise ProtocolError(
                f"the coordinator sent factors for a {sent_b.shape[0]}x{sent_a.shape[1]} matrix, "
                f"found {out_features}x{in_features}"
            )
    trains = trainable and trained is not None
    a.requires_grad_(trains)
    b.requires_grad_(trains)
    source = trained or tail
    assert source is not None
    return Factors(a, b, tail_a, tail_b, source.scale)


def read_back(factors: Mapping[str, Factors], dispatch: Dispatch) -> dict[str, LoraFactors]:
    """The trained factors as they travel."""
    return {
        name: LoraFactors(_array(factors[name].a), _array(factors[name].b), sent.scale)
        for name, sent in sorted(dispatch.trained.items())
    }


def _array(tensor: Tensor) -> FloatArray:
    array: FloatArray = tensor.detach().to("cpu", torch.float32).numpy().copy()
    return array


def set_checkpointing(backbone: Backbone, on: bool) -> None:
    """Recompute each block's activations in the backward pass instead of keeping them.

    On an accelerator a recomputed block keeps its dense matrices for the backward pass, which
    follows at once: two unpackings of each instead of three, for the bytes of one dense block.
    """
    model = backbone.model
    for layer in backbone.layers.values():
        layer.keeps_values = on and model.device.type != "cpu"
    if on:
        model.activation_checkpointing_enable({"use_reentrant": False})
        # It also makes the embeddings' output require gradients, for reentrant checkpointing
        # only, and would drag backpropagation below the first trained layer.
        model.disable_input_require_grads()
        for module in model.modules():
            if getattr(module, "gradient_checkpointing", False):
                # transformers checkpoints only in training mode. The flag of the block alone: its
                # parts stay in evaluation mode, because some read it to switch dropout on.
                module.training = True
    elif model.is_activation_checkpointing:
        model.activation_checkpointing_disable()
        model.eval()
