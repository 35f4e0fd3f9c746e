"""What one device computes in a step: all of a plan that its cost depends on."""

from __future__ import annotations

from dataclasses import dataclass

from fedtune.plan.weights import FLOAT_BYTES
from fedtune.records import TaskName


@dataclass(frozen=True, slots=True)
class Load:
    """What one device computes in a step, summed over its matrices.

    Attributes:
        first_trained_layer: the backward pass stops below it.
        trained_elements: sum of rank * (out + in).
        trained_ranks: sum of ranks.
        tail_elements: as `trained_elements`, of the frozen tail.
        tail_ranks: as `trained_ranks`, of the frozen tail.
        correction_elements: as `trained_elements`, of the pairs that repair the forms' errors.
        dense_parameters: parameters that are trained whole.
        whole_matrices: a product unpacks a whole matrix, as on an accelerator, not a panel of it.
        itemsize: bytes of one activation: 4 in float32, 2 in bfloat16 and float16.
    """

    micro_batch: int
    sequence_length: int
    checkpointing: bool = False
    first_trained_layer: int = 0
    trained_elements: int = 0
    trained_ranks: int = 0
    tail_elements: int = 0
    tail_ranks: int = 0
    correction_elements: int = 0
    dense_parameters: int = 0
    task: TaskName = "causal-lm"
    eager_attention: bool = False
    whole_matrices: bool = False
    itemsize: int = FLOAT_BYTES

    @property
    def tokens(self) -> int:
        """Most tokens of one forward pass; as many as it has if every sample is of full length."""
        return self.micro_batch * self.sequence_length
