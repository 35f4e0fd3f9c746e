"""One device's side of a round: describe itself, train what the plan says, measure.

The agent trusts nothing that it is sent: tensors are checked against the plan, the plan against
the site's own memory, and the base by its digest. It holds the site's tokenised samples; the
backbone comes from a shelf that all agents of the process share.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch

from fedtune.data.samples import Sample, SampleBuilder, SampleSet, build_samples, site_labels
from fedtune.errors import ModelError, ProtocolError
from fedtune.evaluate.perplexity import EvaluationReport, held_out_loss
from fedtune.model.backbone import Backbone
from fedtune.model.load import dense_shapes, tensor_names
from fedtune.model.shapes import linear_matrices
from fedtune.model.source import base_digest, resolve_model
from fedtune.model.tokenizer import load_tokenizer, pad_id
from fedtune.records import (
    DevicePlan,
    Dispatch,
    GraphUse,
    LoraScale,
    MatrixShape,
    SiteReport,
    TaskName,
)
from fedtune.train.allocator import keep_what_fits
from fedtune.train.batches import stream
from fedtune.train.compute import compute_dtype
from fedtune.train.memory import OptimizerMemory
from fedtune.train.round import RoundResult, mount, train_round, unmount
from fedtune.wire.calibration import CalibrationInstruction, CalibrationReport
from fedtune.wire.feedback import encode_update
from fedtune.wire.messages import (
    EvaluateInstruction,
    EvaluateReport,
    TaskSpec,
    TrainInstruction,
    TrainReport,
)
from fedtune.wire.packing import tensors_digest
from fedtune.wire.tensors import unpack_dispatch
from fedtune_client.allowance import Allowance, idle_now
from fedtune_client.calibrate import Bench, calibrate
from fedtune_client.carried import Carried
from fedtune_client.clock import StepClock
from fedtune_client.shelves import make_room, shelf_of
from fedtune_client.site import SiteSettings
from fedtune_client.stopping import UNWATCHED, Watch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EVALUATION_BATCH = 32
"""Samples in one forward pass without gradients; chosen, little faster above it on two cores."""


class Order(Protocol):
    """What an instruction to train and one to evaluate have in common."""

    @property
    def run(self) -> str: ...
    @property
    def base_digest(self) -> str: ...
    @property
    def plan(self) -> DevicePlan: ...
    @property
    def tensors_digest(self) -> str: ...
    @property
    def scale(self) -> LoraScale: ...
    @property
    def labels(self) -> tuple[str, ...]: ...


@dataclass(frozen=True, slots=True)
class Measuring:
    """What an accepted instruction to evaluate comes down to.

    Attributes:
        held_out: samples to measure; may be none.
    """

    backbone: Backbone
    dispatch: Dispatch
    held_out: Sequence[Sample]


_RECORDED_SHARE = 1.5
"""Of the planned peak, what a device must allow before steps are recorded: the plan does not count
recordings. Measured on an H200 (docs/benchmarks.md): up to 1.31 of the peak without them."""


@dataclass(frozen=True, slots=True)
class Work(Measuring):
    """What an accepted instruction to train comes down to.

    Attributes:
        held_out: samples to measure before the round; none if it is not asked for.
        batches: one optimiser step's samples each.
        memory: what earlier rounds left of the optimiser; None: nothing is kept.
    """

    batches: Sequence[Sequence[Sample]]
    memory: OptimizerMemory | None


class Agent:
    """The device of one site.

    Args:
        site: its data, its copy of the base and its limits.
        watch: told of its steps, and asked before each pass whether it is still to work.

    Raises:
        ModelError: the base cannot be found.
    """

    def __init__(self, site: SiteSettings, watch: Watch = UNWATCHED) -> None:
        self._site, self._watch = site, watch
        self._folder = resolve_model(site.model_path, site.model_revision)
        self._tokenizer = _tokenizer(self._folder)
        self.pad_id = pad_id(self._tokenizer)
        self._samples: dict[tuple[str, ...], tuple[SampleSet, SampleSet]] = {}
        self._carried = Carried(site.state_folder)
        idle = site.idle or idle_now()
        self._allowance = Allowance(site.profile, site.measures_steps, idle)
        # Of a process that other sites share, nobody could say whose memory it is.
        self._idle_bytes = 0 if site.shares_backbone else idle.resident_bytes or 0

    @property
    def name(self) -> str:
        return self._site.profile.name

    @property
    def allowed_bytes(self) -> int:
        """Memory that a plan may take at this moment."""
        return self._allowance.bytes_now()

    def describe(self, spec: TaskSpec) -> SiteReport:
        """Answer the profile query.

        Raises:
            DataError: the site's data cannot be read.
        """
        rows = self._site.sites.site(self.name)
        labels: tuple[str, ...] = ()
        if self._task == "sequence-classification":
            labels = site_labels([*rows.train, *rows.held_out], self._site.data.label_field)
        train, held_out = self._tokenised(labels)
        limit = self._site.data.max_tokens
        return SiteReport(
            profile=self._allowance.profile_now(),
            base_digest=self._base_digest(),
            train_samples=len(train.samples),
            held_out_samples=len(held_out.samples),
            train_tokens=train.tokens,
            dense=_dense_shapes(self._folder, spec.task),
            labels=labels,
            warnings=train.warnings(self.name, limit),
        )

    def calibrate(
        self, order: CalibrationInstruction, packed: bytes
    ) -> tuple[CalibrationReport, bytes]:
        """Measure what a plan is made from; returns the report and the packed sums.

        Raises:
            ProtocolError: the instruction or its tensors do not fit each other or the site, or
                gradients are not finite.
        """
        bare = replace(
            order.plan,
            matrices=tuple(replace(m, rank=0, tail_rank=0) for m in order.plan.matrices),
        )
        work = self.accept_evaluation(
            EvaluateInstruction(
                order.run, 0, order.base_digest, bare, order.tensors_digest, labels=order.labels
            ),
            packed,
        )
        bench = Bench(
            backbone=work.backbone,
            dispatch=work.dispatch,
            batches=self._train_batches(order.plan, order.labels, order.seed, 0, order.batches),
            task=self._task,
            pad_id=self.pad_id,
            loss_scale=self._carried.loss_scale if self._half else None,
            before_pass=self._watch.check,
        )
        return calibrate(order, bench, self._idle_bytes if self._site.measures_steps else None)

    def train(self, order: TrainInstruction, packed: bytes) -> tuple[TrainReport, bytes]:
        """Train for one round; returns the report and the packed factors.

        Raises:
            ProtocolError: the instruction or its tensors do not fit each other or the site.
        """
        return self.perform(order, self.accept(order, packed))

    def perform(self, order: TrainInstruction, work: Work) -> tuple[TrainReport, bytes]:
        """Do what an accepted instruction asks for; returns the report and the packed factors."""
        metrics = self.measure(work)
        clock = StepClock() if self._site.measures_steps else None

        def stepped(index: int, loss: float) -> None:
            if clock is not None:
                clock(index, loss)
            self._watch.step(index + 1)

        result = train_round(
            work.backbone,
            work.batches,
            work.dispatch,
            order.plan,
            order.optimizer,
            task=self._task,
            pad_id=self.pad_id,
            memory=work.memory,
            loss_scale=self._carried.loss_scale if self._half else None,
            cuda_graph=self._graph_use(order.plan),
            after_step=stepped,
            before_pass=self._watch.check,
        )
        if clock is not None:
            free_bytes = float(self._allowance.bytes_now())
            metrics |= {"step_seconds": clock.step_seconds, "free_bytes": free_bytes}
        return self.report(order, work.dispatch, result, metrics)

    def _graph_use(self, plan: DevicePlan) -> GraphUse:
        """The site's choice; under `auto` no recording where its memory might not be there."""
        room = self._site.profile.budget_bytes >= _RECORDED_SHARE * plan.peak_bytes
        return "off" if self._site.cuda_graph == "auto" and not room else self._site.cuda_graph

    def accept(self, order: TrainInstruction, packed: bytes) -> Work:
        """Check an instruction to train, and have ready what it asks for.

        Raises:
            ProtocolError: as for `train`.
        """
        dispatch, backbone = self._accept(order, packed)
        self._carried.begin(order, self._half)
        plan = order.plan
        batches = self._train_batches(
            plan, order.labels, order.seed, (order.round - 1) * plan.local_steps, plan.local_steps
        )
        held_out = self._tokenised(order.labels)[1]
        return Work(
            backbone=backbone,
            dispatch=dispatch,
            batches=batches,
            memory=self._carried.optimizer,
            held_out=held_out.samples if order.evaluate else (),
        )

    def _train_batches(
        self, plan: DevicePlan, labels: tuple[str, ...], seed: int, first: int, count: int
    ) -> list[list[Sample]]:
        """Batches `first` .. `first + count` of the device's stream of training samples."""
        samples = self._within(self._tokenised(labels)[0].samples, plan.sequence_length, labels)
        if not samples:
            raise ProtocolError(f"{self.name}: there is no sample to train on; plan without it")
        size = plan.batch_size
        key = [seed, zlib.crc32(self.name.encode("utf-8"))]
        picked = stream(len(samples), key, first * size, count * size)
        return _batches(samples, picked, size)

    def report(
        self,
        order: TrainInstruction,
        sent: Dispatch,
        result: RoundResult,
        metrics: Mapping[str, float],
    ) -> tuple[TrainReport, bytes]:
        """What goes back after a round that started from `sent`, and the packed update beside it.

        What the device carries to its next round is kept first: once the report has left, the
        coordinator may not ask for the round again.

        Raises:
            ProtocolError: a value is not finite, or does not fit the instruction's codec.
        """
        tensors = self._encoded(order, sent, result)
        report = TrainReport(
            run=order.run,
            round=order.round,
            device=self.name,
            base_digest=order.base_digest,
            samples=result.samples,
            tokens=result.units,
            tensors_digest=tensors_digest(tensors),
            metrics={**metrics, **_train_metrics(result), **self._peak()},
        )
        self._carried.end(order)
        return report, tensors

    def _encoded(self, order: TrainInstruction, sent: Dispatch, result: RoundResult) -> bytes:
        """The packed update; what its codec takes is kept for the next one, if that is asked."""
        feedback = self._carried.feedback
        if feedback is None:
            return encode_update(sent, result.factors, result.dense, order.codec)[0]
        owed = feedback.at(order.round)
        tensors, lost = encode_update(sent, result.factors, result.dense, order.codec, owed)
        feedback.keep(order.round, lost)
        return tensors

    def evaluate(self, order: EvaluateInstruction, packed: bytes) -> EvaluateReport:
        """Held-out loss with the sent adapter.

        Raises:
            ProtocolError: as for `train`.
        """
        metrics = self.measure(self.accept_evaluation(order, packed))
        return EvaluateReport(order.run, order.round, self.name, metrics)

    def accept_evaluation(self, order: EvaluateInstruction, packed: bytes) -> Measuring:
        """Check an instruction to evaluate, and have ready what it asks for.

        Raises:
            ProtocolError: as for `train`.
        """
        dispatch, backbone = self._accept(order, packed)
        return Measuring(backbone, dispatch, self._tokenised(order.labels)[1].samples)

    def measure(self, work: Measuring) -> dict[str, float]:
        """Held-out metrics of the sent adapter; none without samples."""
        if not work.held_out:
            return {}
        backbone = work.backbone
        with backbone.lock:
            mounted = mount(backbone, work.dispatch, trainable=False)
            try:
                found = held_out_loss(
                    backbone.model,
                    work.held_out,
                    EVALUATION_BATCH,
                    self.pad_id,
                    self._task,
                    self._watch.check,
                )
            finally:
                unmount(backbone, mounted)
        return held_out_metrics(found)

    @property
    def _task(self) -> TaskName:
        classifying = self._site.data.format == "text-label"
        return "sequence-classification" if classifying else "causal-lm"

    @property
    def trains_side_by_side(self) -> bool:
        """Whether nothing in this site's training concerns more than its own rows of a pass.

        A task head is one parameter of the model, and a loss scale goes by all its gradients.
        """
        return self._task == "causal-lm" and self._compute != torch.float16

    @property
    def _torch_device(self) -> torch.device:
        return torch.device(self._site.profile.accelerator)

    @property
    def _half(self) -> bool:
        return self._compute == torch.float16

    @property
    def _compute(self) -> torch.dtype:
        asked = self._site.compute
        # The plan counts with what the profile said; measured anew it could come out otherwise.
        chosen = self._site.profile.compute if asked == "auto" else asked
        return compute_dtype(chosen, self._torch_device)

    def _tokenised(self, labels: tuple[str, ...]) -> tuple[SampleSet, SampleSet]:
        """Training and held-out samples; done once, and once more if the labels change."""
        if labels not in self._samples:
            rows = self._site.sites.site(self.name)
            builder = SampleBuilder(self._tokenizer, self._site.data, labels)
            self._samples = {
                labels: (build_samples(rows.train, builder), build_samples(rows.held_out, builder))
            }
        return self._samples[labels]

    def _within(
        self, samples: Sequence[Sample], length: int, labels: tuple[str, ...]
    ) -> Sequence[Sample]:
        """Samples cut to a plan's length; without those that then have nothing to learn from."""
        if length >= self._site.data.max_tokens:
            return samples
        data = self._site.data.model_copy(update={"max_tokens": length})
        builder = SampleBuilder(self._tokenizer, data, labels)
        return [cut for cut in map(builder.fit, samples) if cut is not None]

    def _accept(self, order: Order, packed: bytes) -> tuple[Dispatch, Backbone]:
        """Check an instruction, and have its tensors and its backbone ready."""
        if self._site.threads:
            # Counts for the calling thread only, and an engine may call from another each time.
            torch.set_num_threads(self._site.threads)
        plan, profile = order.plan, self._site.profile
        if order.base_digest != self._base_digest():
            raise ProtocolError(
                f"{self.name}: the instruction is for another base model "
                f"({order.base_digest[:12]}); copy the coordinator's model to this site"
            )
        if plan.device != self.name:
            raise ProtocolError(f"{self.name}: the instruction is for device {plan.device!r}")
        if profile.accelerator != "cpu" and not torch.cuda.is_available():
            raise ModelError(
                f"this site's profile says {profile.accelerator}, and torch finds no such device"
            )
        allowed = self._allowance.bytes_now()
        if plan.peak_bytes > allowed:
            raise ProtocolError(
                f"{self.name}: the plan needs {plan.peak_bytes} bytes and this site allows "
                f"{allowed}; plan again, or raise the site's memory limit"
            )
        if self._site.tune_allocator and not self._site.shares_backbone:
            keep_what_fits(plan.peak_bytes, profile.budget_bytes)
        if tensors_digest(packed) != order.tensors_digest:
            raise ProtocolError(
                f"{self.name}: the tensors do not have the sha256 they were sent with"
            )
        backbone = self.backbone(plan, order.labels)
        if profile.accelerator != "cpu":
            torch.cuda.reset_peak_memory_stats()
        dense = {
            name: tuple(len(order.labels) if axis == 0 else axis for axis in shape)
            for name, shape in _dense_shapes(self._folder, self._task).items()
        }
        dispatch = unpack_dispatch(packed, plan, _matrix_shapes(self._folder), dense, order.scale)
        return dispatch, backbone

    def _base_digest(self) -> str:
        cache = self._site.cache_folder
        return base_digest(self._folder, cache / "digests" if cache else None)

    def backbone(self, plan: DevicePlan, labels: tuple[str, ...]) -> Backbone:
        """The base with its matrices held as the plan says.

        Raises:
            ProtocolError: the plan names a format that the site does not support.
        """
        allowed = self._site.profile.formats
        for matrix in plan.matrices:
            if matrix.format not in allowed:
                raise ProtocolError(
                    f"{self.name}: the plan wants {matrix.name} as {matrix.format}, and this site "
                    f"supports {', '.join(allowed)}"
                )
        forms = {m.name: m.form for m in plan.matrices}
        shelf = shelf_of(
            self._folder,
            self._torch_device,
            self._site.shares_backbone,
            self._compute,
            self._site.cache_folder,
        )
        if not self._site.shares_backbone:
            room = self._allowance.bytes_now() - plan.peak_bytes
            make_room(room, shelf, shelf.key(self._task, labels, forms))
        return shelf.get(self._task, labels, forms)

    def _peak(self) -> dict[str, float]:
        """Most memory that the accelerator held in this round; a CPU does not tell."""
        if self._site.profile.accelerator == "cpu":
            return {}
        return {"peak_bytes": float(torch.cuda.max_memory_allocated())}


def held_out_metrics(found: EvaluationReport) -> dict[str, float]:
    """A measurement as it is reported."""
    metrics = {"held_out_loss": found.loss, "held_out_units": float(found.tokens)}
    if found.accuracy is not None:
        metrics["accuracy"] = found.accuracy
    return metrics


def _batches(samples: Sequence[Sample], picked: Sequence[int], size: int) -> list[list[Sample]]:
    chosen = [samples[index] for index in picked]
    return [chosen[start : start + size] for start in range(0, len(chosen), size)]


def _train_metrics(result: RoundResult) -> dict[str, float]:
    return {
        "train_loss": sum(result.losses) / len(result.losses),
        "train_units": float(result.units),
        "seconds": result.seconds,
    }


@lru_cache(maxsize=8)
def _tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """One tokenizer per process and base: reading it takes longer than a small site's rows."""
    return load_tokenizer(folder)


@lru_cache(maxsize=8)
def _matrix_shapes(folder: Path) -> Mapping[str, MatrixShape]:
    return linear_matrices(folder)


@lru_cache(maxsize=8)
def _dense_shapes(folder: Path, task: TaskName) -> Mapping[str, tuple[int, ...]]:
    return dense_shapes(folder, task, tensor_names(folder))
