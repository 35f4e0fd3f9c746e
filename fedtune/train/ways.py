"""What the named ways to train do around the steps of a round.

    way            what it changes                       where
    lora           nothing                               -
    allora         how far rows of B move                `rates`, in the optimiser
    s2ft           A fixed at chosen channels            `sparse`, before the steps
    greentrainer   which matrices train                  `choice`, after the first gradient

`lora.start` points fresh rows of A before the steps (`start`), and `layer_rate_decay` gives blocks
their learning rates (`rates`). All of them leave the product that a device starts with at what it
was sent.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedtune.errors import ModelError
from fedtune.lora.linear import Factors, attach
from fedtune.model.backbone import Backbone
from fedtune.model.loss import TokenisedSample
from fedtune.records import GraphUse, TaskName
from fedtune.train.choice import backward_costs, choose, importances, whole_cost
from fedtune.train.inputs import layer_inputs
from fedtune.train.sparse import pin_channels
from fedtune.train.start import fresh_directions, point_fresh
from fedtune.wire.messages import OptimizerSpec

_log = logging.getLogger(__name__)


class Course:
    """One device's way through a round.

    Args:
        factors: attached to the backbone's layers.
    """

    def __init__(
        self, backbone: Backbone, factors: Mapping[str, Factors], optimizer: OptimizerSpec
    ) -> None:
        self._backbone, self._factors = backbone, factors
        self._way, self._squared = optimizer.way, optimizer.name == "sgd"
        self._wide = optimizer.way.name == "greentrainer" and optimizer.way.flops_share < 1.0

    def begin(
        self, batch: Sequence[TokenisedSample], micro_batch: int, task: TaskName, pad_id: int
    ) -> None:
        """Choose rows of A before anything is trained.

        Args:
            batch: of the first step; looked at by choices that depend on data.
        """
        way = self._way
        if way.name != "s2ft" and way.start == "random":
            return
        looks = way.channels == "activation" if way.name == "s2ft" else way.start != "pissa"
        fresh = [
            name
            for name, pair in self._factors.items()
            if pair.trains and len(fresh_directions(pair))
        ]
        inputs: dict[str, Tensor] = {}
        if looks and fresh:
            inputs = layer_inputs(self._backbone, fresh, batch, micro_batch, task, pad_id)
        if way.name == "s2ft":
            pin_channels(self._factors, way.channels, self._weight, inputs, way.seed)
        else:
            point_fresh(self._factors, way.start, self._weight, inputs, way.seed)
        attach(self._backbone.layers, self._factors)  # what is trained of them may have changed

    def can_be_recorded(self, use: GraphUse) -> bool:
        """Whether the round's steps may be recorded: each trains the same A and B as the first.

        Raises:
            ModelError: `use` is `on`, and they may not.
        """
        if self._way.name not in ("s2ft", "greentrainer"):
            return True
        if use == "on":
            raise ModelError(
                f"the steps of {self._way.name} cannot be recorded as CUDA graphs, which hold what "
                'is trained fixed; set train.cuda_graph to "auto" or "off"'
            )
        return False

    def narrow(self) -> None:
        """After a gradient of all matrices, drop those that the budget leaves out; once."""
        if not self._wide:
            return
        found = importances(self._factors, squared=self._squared)
        if found is None:
            return  # the step will be skipped; the next gradient may do
        self._wide = False
        costs = backward_costs(self._backbone, self._factors)
        chosen = choose(found, costs, self._way.flops_share * whole_cost(costs))
        for name, pair in self._factors.items():
            if name not in chosen:
                for tensor in (pair.a, pair.b):
                    tensor.requires_grad_(False)
                    tensor.grad = None
        attach(self._backbone.layers, self._factors)
        _log.info("greentrainer: %d of %d matrices train", len(chosen), len(found))

    def _weight(self, name: str) -> Tensor:
        return self._backbone.layers[name].matrix.values(torch.float32)
