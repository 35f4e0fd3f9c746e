"""What one device computes in a step: all of a plan that its cost depends on."""

from __future__ import annotations

from dataclasses import dataclass

from fedtune.plan.weights import FLOAT_BYTES, correction_elements
from fedtune.records import DevicePlan, ModelShapes, TaskName


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
        keeps_start: what is trained is kept as it was at the start of the round too (FedProx).
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
    keeps_start: bool = False

    @property
    def tokens(self) -> int:
        """Most tokens of one forward pass; as many as it has if every sample is of full length."""
        return self.micro_batch * self.sequence_length


def load_of_plan(
    plan: DevicePlan,
    shapes: ModelShapes,
    *,
    task: TaskName = "causal-lm",
    dense_parameters: int = 0,
    eager_attention: bool = False,
    whole_matrices: bool = False,
    itemsize: int = FLOAT_BYTES,
    keeps_start: bool = False,
) -> Load:
    """What a device computes in a step under a finished plan; see `Load` for the rest.

    Raises:
        KeyError: the plan has a matrix that the model does not have.
    """
    by_name = shapes.by_name()
    sides = {name: shape.out_features + shape.in_features for name, shape in by_name.items()}
    return Load(
        micro_batch=plan.micro_batch,
        sequence_length=plan.sequence_length,
        checkpointing=plan.checkpointing,
        first_trained_layer=plan.first_trained_layer,
        trained_elements=sum(m.rank * sides[m.name] for m in plan.matrices),
        trained_ranks=sum(m.rank for m in plan.matrices),
        tail_elements=sum(m.tail_rank * sides[m.name] for m in plan.matrices),
        tail_ranks=sum(m.tail_rank for m in plan.matrices),
        correction_elements=sum(
            correction_elements(by_name[m.name], m.form) for m in plan.matrices
        ),
        dense_parameters=dense_parameters,
        task=task,
        eager_attention=eager_attention,
        whole_matrices=whole_matrices,
        itemsize=itemsize,
        keeps_start=keeps_start,
    )
