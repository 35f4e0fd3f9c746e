"""What a run would work on: its sites in numbers, its model, and a few samples as tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

from fedtune.cli.simulable import need_simulated_fleet
from fedtune.config import cache_folder
from fedtune.data.rows import Row
from fedtune.data.samples import SampleBuilder, SampleSet, Tokenizer, build_samples, site_labels
from fedtune.data.sites import Site, open_sites
from fedtune.devices.simulated import simulated_profiles
from fedtune.errors import DataError
from fedtune.model.shapes import left_matrices, read_shapes
from fedtune.model.source import resolve_model
from fedtune.model.tokenizer import load_tokenizer
from fedtune.records import ModelShapes
from fedtune.settings import RunConfig


@dataclass(frozen=True, slots=True)
class SiteSummary:
    """One site in numbers.

    Attributes:
        device_class: of the device that the site would have in a simulation.
        tokens: of one pass over the training samples; None when nothing was tokenised.
        longest: tokens of the longest training sample.
    """

    name: str
    device_class: str
    train_rows: int
    held_out_rows: int
    tokens: int | None = None
    longest: int | None = None


@dataclass(frozen=True, slots=True)
class ShownSample:
    """One sample, as the model reads it.

    Attributes:
        pieces: its text, cut where loss starts and ends; whether the piece carries loss.
    """

    place: str
    site: str
    tokens: tuple[str, ...]
    loss_mask: tuple[bool, ...]
    pieces: tuple[tuple[str, bool], ...]
    label: str
    truncated: bool


@dataclass(frozen=True, slots=True)
class Inspection:
    """All of it.

    Attributes:
        left: what of the model holds a matrix and is not adapted; N stands for a block's number.
    """

    folder: Path
    shapes: ModelShapes
    sites: tuple[SiteSummary, ...]
    labels: tuple[str, ...]
    samples: tuple[ShownSample, ...]
    warnings: tuple[str, ...]
    left: tuple[str, ...]


def inspect_run(config: RunConfig, shown: int) -> Inspection:
    """Open what a run names, as the run would.

    Args:
        config: the run.
        shown: how many samples to show, one per site; 0 leaves out all that needs the tokenizer.

    Raises:
        FedtuneError: the data, the sites or the model cannot be used.
    """
    need_simulated_fleet(config)
    sites = open_sites(config.data, devices=config.devices, seed=config.run.seed)
    folder = resolve_model(config.model.path, config.model.revision)
    shapes = read_shapes(folder, config.lora.targets, cache_folder() / "digests")
    profiles = simulated_profiles(config.fleet, sites.declared, config.run.seed)
    opened = [sites.site(name) for name in sites.names]
    labels = _labels(config, opened)
    tokenizer: Tokenizer | None = load_tokenizer(folder) if shown else None
    summaries: list[SiteSummary] = []
    samples: list[ShownSample] = []
    warnings = [*sites.warnings, *_held_out_warning(config, opened)]
    for site in opened:
        device_class = profiles[site.name].device_class
        summary = SiteSummary(site.name, device_class, len(site.train), len(site.held_out))
        if tokenizer is not None:
            builder = SampleBuilder(tokenizer, config.data, labels)
            built = build_samples(site.train, builder)
            warnings += built.warnings(site.name, config.data.max_tokens)
            summary = _with_tokens(summary, built)
            if built.samples and len(samples) < shown:
                samples.append(_show(site, builder, tokenizer, labels))
        summaries.append(summary)
    if tokenizer is not None and not any(summary.tokens for summary in summaries):
        raise DataError(f"no site has a sample to train on; {warnings[-1]}")
    left = left_matrices(folder, shapes.matrices)
    return Inspection(
        folder, shapes, tuple(summaries), labels, tuple(samples), tuple(warnings), left
    )


def _labels(config: RunConfig, sites: Sequence[Site]) -> tuple[str, ...]:
    if config.model.task != "sequence-classification":
        return ()
    field = config.data.label_field
    found = {label for site in sites for label in site_labels(_rows(site), field)}
    if len(found) < 2:
        raise DataError(
            f"classification needs at least two labels under data.label_field = {field!r}, found "
            f"{', '.join(found)}"
        )
    return tuple(sorted(found))


def _rows(site: Site) -> tuple[Row, ...]:
    return (*site.train, *site.held_out)


def _held_out_warning(config: RunConfig, sites: Sequence[Site]) -> list[str]:
    if config.data.held_out_fraction == 0 or any(site.held_out for site in sites):
        return []
    return ["no site holds out a row: all have too few; there will be no held-out loss"]


def _with_tokens(summary: SiteSummary, built: SampleSet) -> SiteSummary:
    longest = max((len(sample.tokens) for sample in built.samples), default=0)
    return replace(summary, tokens=built.tokens, longest=longest)


def _show(
    site: Site, builder: SampleBuilder, tokenizer: Tokenizer, labels: tuple[str, ...]
) -> ShownSample:
    """The site's first row that becomes a sample."""
    row, sample = next(
        (row, sample) for row in site.train if (sample := builder.build(row)) is not None
    )
    ids, mask = sample.tokens.tolist(), sample.loss_mask.tolist()
    pairs = zip(ids, mask, strict=True)
    return ShownSample(
        place=row.place,
        site=site.name,
        tokens=tuple(tokenizer.convert_ids_to_tokens(ids)),
        loss_mask=tuple(mask),
        pieces=tuple(
            (str(tokenizer.decode([token for token, _ in group])), learned)
            for learned, group in groupby(pairs, key=lambda pair: pair[1])
        ),
        label=labels[sample.label] if sample.label >= 0 else "",
        truncated=sample.truncated,
    )
