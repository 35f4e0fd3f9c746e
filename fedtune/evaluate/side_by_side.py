"""The held-out losses of several simulated devices, from passes over the backbone they share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from fedtune.errors import DataError
from fedtune.evaluate.perplexity import EvaluationReport
from fedtune.lora.beside import attached_beside
from fedtune.lora.linear import Factors
from fedtune.model.backbone import Backbone
from fedtune.model.loss import Batch, TokenisedSample, loss_sums, loss_units, prepare
from fedtune.records import TaskName

_TASK: TaskName = "causal-lm"


@dataclass(frozen=True, slots=True)
class _Part:
    """Some samples of one device: one forward pass, if the device were alone."""

    device: int
    samples: Sequence[TokenisedSample]

    @property
    def tokens(self) -> int:
        return sum(len(sample.tokens) for sample in self.samples)


def held_out_losses(
    backbone: Backbone,
    devices: Sequence[Mapping[str, Factors]],
    samples: Sequence[Sequence[TokenisedSample]],
    batch_size: int,
    pad_id: int,
    pass_tokens: int,
) -> list[EvaluationReport]:
    """`held_out_loss` of each device, with the bits that it would have alone.

    Args:
        backbone: of a model that `sums_together`; hold its lock.
        devices: the factors of each.
        samples: of each.
        batch_size: samples of one device in one pass.
        pass_tokens: most tokens of a pass, unless one device's part alone has more.

    Raises:
        DataError: a device has no sample that carries loss.
    """
    units = [loss_units(own, _TASK) for own in samples]
    if 0 in units:
        raise DataError(f"none of the {len(samples[units.index(0)])} held-out samples carries loss")
    model, totals = backbone.model, [0.0] * len(devices)
    with attached_beside(backbone.layers, devices) as rows, torch.no_grad():
        for parts in _passes(samples, batch_size, pass_tokens):
            batches = [prepare(model, part.samples, pad_id, _TASK) for part in parts]
            rows.bounds = _bounds([part.device for part in parts], batches, len(devices))
            for part, found in zip(parts, loss_sums(model, batches), strict=True):
                totals[part.device] += found.total.item()
    return [
        EvaluationReport(total / count, count) for total, count in zip(totals, units, strict=True)
    ]


def _passes(
    samples: Sequence[Sequence[TokenisedSample]], batch_size: int, pass_tokens: int
) -> Iterator[list[_Part]]:
    """Every device's first part, then every second one, and so on, cut into passes."""
    ordered = [sorted(own, key=lambda sample: len(sample.tokens), reverse=True) for own in samples]
    for start in range(0, max(map(len, ordered)), batch_size):
        group: list[_Part] = []
        for device, own in enumerate(ordered):
            part = _Part(device, own[start : start + batch_size])
            if not part.samples:
                continue
            if group and sum(p.tokens for p in group) + part.tokens > pass_tokens:
                yield group
                group = []
            group.append(part)
        yield group


def _bounds(present: Sequence[int], batches: Sequence[Batch], devices: int) -> tuple[int, ...]:
    """Where each device's rows lie; those that are not in the pass have none."""
    sizes = [0] * devices
    for device, batch in zip(present, batches, strict=True):
        sizes[device] = batch.tokens.shape[1]
    return tuple(accumulate(sizes, initial=0))
