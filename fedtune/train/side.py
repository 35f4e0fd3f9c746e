"""QST: a small network beside the frozen base, which no gradient passes through.

Each block of the base hands its hidden state to a side block of a fraction of its width; the last
side state, widened again, is added to the base's last hidden state. The base's norm and head after
it serve both. Nothing of the base's blocks is kept for the backward pass, whatever their depth.

The side network is trained whole and belongs to no matrix of the base. So it has no place in a
run: what a run joins are factors of the base's matrices and parameters that the base's own task
model has, and no merged model, PEFT adapter or ONNX file could hold it. It is a trainer for one
device, and `benchmarks/ways.py` compares it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from fedtune.errors import ModelError
from fedtune.model.backbone import Backbone
from fedtune.model.loss import TokenisedSample
from fedtune.model.shapes import block_of
from fedtune.records import Dispatch, TaskName
from fedtune.train.optimizer import RoundOptimizer
from fedtune.train.round import mount, unmount
from fedtune.train.step import accumulate
from fedtune.wire.messages import OptimizerSpec

REDUCTION: Final = 16
"""Hidden size of the base over that of the side network (QST, section 3.3)."""
_NARROWEST: Final = 8
"""Least width of a side network: tiny models would have none otherwise. Chosen."""


class SideNetwork(nn.Module):
    """A ladder of gated MLPs over the hidden states of a base.

    side_i = block_i(g_i down_i(h_i) + (1 - g_i) side_(i-1)), g_i = sigmoid(gate_i), and the base's
    last hidden state h_N becomes h_N + up(side_N). `up` starts at zero: so does the change.

    Args:
        hidden: size of the base's hidden states.
        blocks: of the base.
        width: of the side network; by default `hidden` over 16, and at least 8.

    Source:
        QST, arXiv 2401.07004, section 3. There the side blocks are transformer blocks, the ways
        down are two thin factors or pooling, and the last states are mixed by a learned share;
        here a side block looks at one token at a time, as the states that it is given have seen
        the others.
    """

    def __init__(
        self, hidden: int, blocks: int, generator: torch.Generator, width: int | None = None
    ) -> None:
        super().__init__()
        width = width or max(_NARROWEST, hidden // REDUCTION)

        def linear(inputs: int, outputs: int) -> nn.Parameter:
            drawn = torch.randn(outputs, inputs, generator=generator)
            return nn.Parameter(drawn / inputs**0.5)

        self.down = nn.ParameterList(linear(hidden, width) for _ in range(blocks + 1))
        self.gate = nn.ParameterList(nn.Parameter(torch.zeros(())) for _ in range(blocks))
        self.widen = nn.ParameterList(linear(width, 2 * width) for _ in range(blocks))
        self.narrow = nn.ParameterList(linear(2 * width, width) for _ in range(blocks))
        self.up = nn.Parameter(torch.zeros(hidden, width))

    def start(self, state: Float[Tensor, "*batch hidden"]) -> Float[Tensor, "*batch width"]:
        """The side state before the first block, from the embeddings."""
        first: Tensor = _unit(state.float()) @ self.down[0].t()
        return first

    def step(
        self,
        index: int,
        state: Float[Tensor, "*batch hidden"],
        side: Float[Tensor, "*batch width"],
    ) -> Float[Tensor, "*batch width"]:
        """The side state behind block `index` of the base, whose output is `state`."""
        share = self.gate[index].sigmoid()
        mixed = share * (_unit(state.float()) @ self.down[index + 1].t()) + (1 - share) * side
        inner = functional.silu(_unit(mixed) @ self.widen[index].t())
        found: Tensor = mixed + inner @ self.narrow[index].t()
        return found

    def finish(
        self, state: Float[Tensor, "*batch hidden"], side: Float[Tensor, "*batch width"]
    ) -> Float[Tensor, "*batch hidden"]:
        """The base's last hidden state with the side network's part."""
        return state + (side @ self.up.t()).to(state.dtype)


def _unit(x: Tensor) -> Tensor:
    """Root mean square 1: hidden states grow with depth, and differ between models."""
    return functional.rms_norm(x, (x.shape[-1],), eps=1e-6)


def side_network(backbone: Backbone, seed: int) -> SideNetwork:
    """A side network that fits a backbone; it changes nothing until it is trained."""
    generator = torch.Generator().manual_seed(seed)
    hidden = int(backbone.model.config.hidden_size)
    return SideNetwork(hidden, len(_blocks(backbone)), generator).to(backbone.model.device)


@contextmanager
def beside(backbone: Backbone, side: SideNetwork) -> Iterator[None]:
    """While it lasts, the backbone's model computes with the side network."""
    blocks = _blocks(backbone)
    held: list[Tensor] = []

    def before(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        state = arguments[0] if arguments else named["hidden_states"]
        held[:] = [side.start(state.detach())]

    def after(index: int) -> Callable[[nn.Module, Any, Any], Any]:
        def hook(_: nn.Module, arguments: Any, output: Any) -> Any:
            state = (output[0] if isinstance(output, tuple) else output).detach()
            held[0] = side.step(index, state, held[0])
            if index < len(blocks) - 1:
                return None
            state = side.finish(state, held[0])
            return (state, *output[1:]) if isinstance(output, tuple) else state

        return hook

    hooks = [blocks[0].register_forward_pre_hook(before, with_kwargs=True)]
    hooks += [block.register_forward_hook(after(i)) for i, block in enumerate(blocks)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def train_side(
    backbone: Backbone,
    side: SideNetwork,
    batches: Sequence[Sequence[TokenisedSample]],
    heads: Dispatch,
    optimizer: OptimizerSpec,
    *,
    micro_batch: int,
    task: TaskName,
    pad_id: int,
    after_step: Callable[[int, float], None] | None = None,
) -> dict[str, Tensor]:
    """Train a side network in place, and with it the task heads of a dispatch.

    Args:
        heads: their values to start from, in `dense`; it holds no factors.

    Returns:
        The heads by name, as trained.
    """
    with backbone.lock:
        mounted = mount(backbone, heads, trainable=True)
        try:
            named = {f"dense.side.{name}": p for name, p in side.named_parameters()}
            stepper = RoundOptimizer(mounted.trained() | named, optimizer, len(batches))
            with beside(backbone, side):
                for index, batch in enumerate(batches):
                    loss = accumulate(backbone, batch, micro_batch, task, pad_id)
                    stepper.step()
                    if after_step is not None:
                        after_step(index, loss)
            return {name: p.detach().clone() for name, p in mounted.dense.items()}
        finally:
            unmount(backbone, mounted)


def _blocks(backbone: Backbone) -> list[nn.Module]:
    """The base's blocks in order."""
    modules = {id(module): path for path, module in backbone.model.named_modules()}
    found: dict[int, nn.Module] = {}
    for name, layer in backbone.layers.items():
        index, path = block_of(name), modules[id(layer)].split(".")
        if str(index) not in path:
            raise ModelError(f"matrix {name} lies in no numbered block of the loaded model")
        block = ".".join(path[: path.index(str(index)) + 1])
        found[index] = backbone.model.get_submodule(block)
    return [found[index] for index in sorted(found)]
