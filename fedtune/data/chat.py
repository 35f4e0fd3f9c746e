"""Conversations rendered by a model's chat template, with the assistant's words marked.

Few templates mark what the assistant writes, so the marks come from rendering prefixes: what the
template adds for an assistant's turn, beyond the conversation before it with the generation
prompt open, is what the model has to write. The pieces are tokenised apart, as in generation:
there the prompt is tokenised first, too, and the model's own tokens follow it.
"""

from __future__ import annotations

from typing import Protocol

from fedtune.errors import DataError

try:  # Templates are jinja2 programs; it comes with transformers' chat templates, not with us.
    from jinja2 import TemplateError
except ImportError:  # pragma: no cover - then no template can be rendered either

    class TemplateError(Exception):  # type: ignore[no-redef]
        """Stands in for jinja2's error where jinja2 is absent."""


class ChatTokenizer(Protocol):
    """The part of a tokenizer that renders conversations."""

    @property
    def chat_template(self) -> object: ...
    def apply_chat_template(
        self,
        conversation: list[dict[str, str]],
        *,
        tokenize: bool,
        add_generation_prompt: bool,
    ) -> object: ...


def render_spans(
    tokenizer: ChatTokenizer, messages: list[dict[str, str]], place: str
) -> list[tuple[str, bool]]:
    """The rendered conversation in pieces: (text, whether the assistant wrote it).

    Joined, the pieces are the rendered conversation up to the end of the last assistant turn;
    what follows that turn teaches nothing and is left out.

    Args:
        messages: turns with `role` and `content`.
        place: file and line, for errors.

    Raises:
        DataError: the tokenizer has no chat template, the template refuses the conversation or
            rewrites earlier turns, or there is no assistant turn.
    """
    if not tokenizer.chat_template:
        raise DataError(
            "data.format 'messages' needs a tokenizer with a chat template, and the base model's "
            "has none; take an instruction-tuned base, or data.format 'prompt-response'"
        )
    turns = [i for i, turn in enumerate(messages) if turn["role"] == "assistant"]
    if not turns:
        raise DataError(f"{place}: the conversation has no turn of role 'assistant'")
    whole = _render(tokenizer, messages[: turns[-1] + 1], False, place)
    spans: list[tuple[str, bool]] = []
    done = 0
    for turn in turns:
        start = _start(tokenizer, messages, turn, whole, place)
        end = _end(tokenizer, messages, turn, whole, start, place)
        if start < done or end < start:
            raise DataError(
                f"{place}: the chat template changes what comes before turn {turn + 1} once "
                "others follow it, so the assistant's words cannot be told apart; give one "
                "assistant turn per row"
            )
        # Line breaks behind the end-of-turn token are layout; the model never has to write them.
        stop = start + len(whole[start:end].rstrip("\n"))
        spans += [(whole[done:start], False), (whole[start:stop], True)]
        done = stop
    return [(text, learned) for text, learned in spans if text]


def _start(
    tokenizer: ChatTokenizer, messages: list[dict[str, str]], turn: int, whole: str, place: str
) -> int:
    """Where the assistant's turn starts in the whole text; -1 when it cannot be told."""
    prompt = _render(tokenizer, messages[:turn], True, place)
    if prompt and whole.startswith(prompt):
        return len(prompt)
    # Some generation prompts open more than a finished turn holds (a thinking block, say); and a
    # conversation may start with the assistant.
    closed = _render(tokenizer, messages[:turn], False, place)
    content = messages[turn]["content"].strip()
    return whole.find(content, len(closed)) if whole.startswith(closed) else -1


def _end(
    tokenizer: ChatTokenizer,
    messages: list[dict[str, str]],
    turn: int,
    whole: str,
    start: int,
    place: str,
) -> int:
    """Where the assistant's turn ends in the whole text; -1 when it cannot be told."""
    content = messages[turn]["content"].strip()
    finished = _render(tokenizer, messages[: turn + 1], False, place)
    if whole.startswith(finished):
        return len(finished) if content in whole[start : len(finished)] else -1
    # Some templates render the last turn differently from the same turn in the middle.
    found = whole.find(content, start)
    if found < 0:
        return -1
    closing = finished[finished.rfind(content) + len(content) :]
    end = found + len(content)
    return end + len(closing) if whole.startswith(closing, end) else end


def _render(
    tokenizer: ChatTokenizer, messages: list[dict[str, str]], open_turn: bool, place: str
) -> str:
    if not messages:
        return ""
    try:
        text = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=open_turn
        )
    except (TemplateError, ValueError, TypeError, KeyError, IndexError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{place}: the chat template refuses the conversation: {reason}") from None
    return str(text)
