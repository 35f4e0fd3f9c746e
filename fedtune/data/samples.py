"""From a row to tokens: what the model reads, and which of it is predicted with loss.

The tokenizer comes in from outside, so that a coordinator can count and show samples without
importing a deep-learning library.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from jaxtyping import Bool, Int32

from fedtune.data.chat import render_spans
from fedtune.data.rows import Row
from fedtune.errors import DataError
from fedtune.settings import DataSection


class Tokenizer(Protocol):
    """What is needed of a tokenizer; those of `transformers` have it."""

    @property
    def bos_token_id(self) -> int | None: ...
    @property
    def eos_token_id(self) -> int | None: ...
    @property
    def chat_template(self) -> object: ...
    def encode(
        self,
        text: str,
        *,
        add_special_tokens: bool,
        truncation: bool = ...,
        max_length: int | None = ...,
        verbose: bool = ...,
    ) -> list[int]: ...
    def apply_chat_template(
        self,
        conversation: list[dict[str, str]],
        *,
        tokenize: bool,
        add_generation_prompt: bool,
    ) -> object: ...
    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]: ...
    def decode(self, token_ids: list[int]) -> str: ...


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """One row as the model reads it.

    Attributes:
        loss_mask: which tokens are predicted with loss (the token itself, not the position that
            predicts it); all False when classifying.
        label: index of the class; -1 when there is none.
        truncated: whether tokens were cut off on the right.
    """

    tokens: Int32[np.ndarray, " length"]
    loss_mask: Bool[np.ndarray, " length"]
    label: int = -1
    truncated: bool = False

    @property
    def loss_tokens(self) -> int:
        return int(self.loss_mask.sum())


@dataclass(frozen=True, slots=True)
class SampleSet:
    """The samples of some rows.

    Attributes:
        dropped_too_long: rows left out because of their length (`data.too_long = "drop"`, or
            nothing that carries loss was left after truncation).
        dropped_empty: rows left out because they hold nothing to learn from.
        truncated: samples that lost tokens and are kept.
    """

    samples: tuple[Sample, ...]
    dropped_too_long: int = 0
    dropped_empty: int = 0
    truncated: int = 0

    @property
    def rows(self) -> int:
        return len(self.samples) + self.dropped_too_long + self.dropped_empty

    @property
    def tokens(self) -> int:
        return sum(len(sample.tokens) for sample in self.samples)

    @property
    def loss_tokens(self) -> int:
        return sum(sample.loss_tokens for sample in self.samples)

    def exclusion(self, site: str, max_tokens: int) -> str | None:
        """Why a site with these training samples has to be left out; None when it can train."""
        if self.samples:
            return None
        if not self.dropped_too_long:
            return f"site {site} is left out: none of its {self.rows} rows holds a text to learn"
        return (
            f"site {site} is left out: all of its {self.rows} samples are longer than "
            f"data.max_tokens = {max_tokens}; raise it"
        )

    def warnings(self, site: str, max_tokens: int) -> tuple[str, ...]:
        """What a person should know of a site's samples, one line each."""
        excluded = self.exclusion(site, max_tokens)
        if excluded:
            return (excluded,)
        found = (
            (self.dropped_too_long, f"left out, longer than data.max_tokens = {max_tokens}"),
            (self.truncated, f"cut to data.max_tokens = {max_tokens}"),
            (self.dropped_empty, "left out, without text to learn"),
        )
        return tuple(
            f"site {site}: {count} of {self.rows} samples {what}" for count, what in found if count
        )


class SampleBuilder:
    """Turns rows of one format into samples.

    Args:
        tokenizer: the base model's.
        data: the format, the keys and the longest length.
        labels: all classes, over all sites; a sample's label is the index among them, sorted.
    """

    def __init__(
        self, tokenizer: Tokenizer, data: DataSection, labels: tuple[str, ...] = ()
    ) -> None:
        self._tokenizer = tokenizer
        self._data = data
        self._labels = {name: index for index, name in enumerate(sorted(set(labels)))}
        builders: Mapping[str, Callable[[Row], Sample]] = {
            "prompt-response": self._prompt_response,
            "text": self._text,
            "messages": self._messages,
            "text-label": self._text_label,
        }
        self._tokenise = builders[data.format]

    def build(self, row: Row) -> Sample | None:
        """One sample; None when it is too long, or holds nothing to learn from.

        Raises:
            DataError: the row does not hold what its format needs, has a label that is not among
                the labels, or its conversation cannot be rendered.
        """
        return self.fit(self.tokenise(row))

    def tokenise(self, row: Row) -> Sample:
        """One sample at its full length."""
        return self._tokenise(row)

    def fit(self, sample: Sample) -> Sample | None:
        """A sample within `max_tokens`; None when it is too long or carries no loss."""
        if not self._has_target(sample):
            return None
        limit = self._data.max_tokens
        if len(sample.tokens) <= limit:
            return sample
        if self._data.too_long == "drop":
            return None
        cut = self._cut(sample, limit)
        return cut if self._has_target(cut) else None

    def _has_target(self, sample: Sample) -> bool:
        return sample.label >= 0 or bool(sample.loss_mask.any())

    def _cut(self, sample: Sample, limit: int) -> Sample:
        tokens, mask = sample.tokens[:limit], sample.loss_mask[:limit]
        if sample.label >= 0:
            # An encoder's text ends in a special token, which has to stay.
            tokens = tokens.copy()
            tail = self._special_tail(sample.tokens)
            if tail:
                tokens[-tail:] = sample.tokens[-tail:]
        return replace(sample, tokens=tokens, loss_mask=mask, truncated=True)

    def _special_tail(self, tokens: Int32[np.ndarray, " length"]) -> int:
        """How many tokens the tokenizer has added behind a text."""
        frame = self._tokenizer.encode("", add_special_tokens=True, verbose=False)
        tail = 0
        for ours, added in zip(reversed(tokens.tolist()), reversed(frame), strict=False):
            if ours != added:
                break
            tail += 1
        return tail

    def _encode(self, text: str) -> list[int]:
        # `verbose=False`: a text beyond the model's own limit is not worth a log line here.
        return self._tokenizer.encode(text, add_special_tokens=False, verbose=False)

    def _prompt_response(self, row: Row) -> Sample:
        data = self._data
        prompt = data.prompt_template.replace("{prompt}", row.text(data.prompt_field))
        # Tokenised apart: no token spans the border, and generation meets the same border.
        read = [*_token(self._tokenizer.bos_token_id), *self._encode(prompt)]
        written = self._encode(row.text(data.response_field))
        return _sample([(read, False), (written, True), (self._end(), True)])

    def _text(self, row: Row) -> Sample:
        text = self._encode(row.text(self._data.text_field))
        begin = _token(self._tokenizer.bos_token_id)
        # A text without a word would teach the model to say nothing.
        return _sample([(begin, False), (text, True), (self._end() if text else [], True)])

    def _messages(self, row: Row) -> Sample:
        messages = row.messages(self._data.messages_field)
        spans = render_spans(self._tokenizer, messages, row.place)
        return _sample([(self._encode(text), learned) for text, learned in spans])

    def _text_label(self, row: Row) -> Sample:
        name = row.label(self._data.label_field)
        if name not in self._labels:
            raise DataError(
                f"{row.place}: label {name!r} is not among the labels of the run: "
                f"{', '.join(self._labels) or 'none'}"
            )
        text = row.text(self._data.text_field)
        tokens = self._tokenizer.encode(text, add_special_tokens=True, verbose=False)
        return replace(_sample([(tokens, False)]), label=self._labels[name])

    def _end(self) -> list[int]:
        return _token(self._tokenizer.eos_token_id)


def build_samples(rows: Iterable[Row], builder: SampleBuilder) -> SampleSet:
    """Samples of rows, in their order, and how many were cut or left out.

    Raises:
        DataError: a row cannot become a sample; see `SampleBuilder.build`.
    """
    samples: list[Sample] = []
    too_long = empty = 0
    for row in rows:
        full = builder.tokenise(row)
        fitted = builder.fit(full)
        if fitted is not None:
            samples.append(fitted)
        elif full.label >= 0 or full.loss_mask.any():
            too_long += 1
        else:
            empty += 1
    truncated = sum(sample.truncated for sample in samples)
    return SampleSet(tuple(samples), too_long, empty, truncated)


def site_labels(rows: Iterable[Row], label_field: str) -> tuple[str, ...]:
    """The classes that occur in a site's rows, sorted.

    Raises:
        DataError: a label is missing or neither a text, an integer nor a boolean; names the line.
    """
    return tuple(sorted({row.label(label_field) for row in rows}))


def _token(token_id: int | None) -> list[int]:
    return [] if token_id is None else [token_id]


def _sample(pieces: Sequence[tuple[Sequence[int], bool]]) -> Sample:
    """Join pieces of tokens; the very first token has nothing before it to be predicted from."""
    tokens = [token for piece, _ in pieces for token in piece]
    mask = [learned for piece, learned in pieces for _ in piece]
    if mask:
        mask[0] = False
    return Sample(np.array(tokens, dtype=np.int32), np.array(mask, dtype=np.bool_))
