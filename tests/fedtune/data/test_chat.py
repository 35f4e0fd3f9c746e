"""Conversations: the assistant's words, and only those, carry loss, under several templates."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedtune.data.chat import render_spans
from fedtune.data.rows import Row
from fedtune.data.samples import SampleBuilder
from fedtune.errors import DataError
from fedtune.model.tokenizer import load_tokenizer
from fedtune.settings import DataSection

jinja2 = pytest.importorskip("jinja2")

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}<s>[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content | trim }} </s>{% endif %}{% endfor %}"
)
THINKS_LAST = (  # As Qwen3: an empty thinking block before the last answer only.
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if loop.last and m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PROMPT_THINKS = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
SYSTEM_MOVES = "{% for m in messages %}{{ messages | length }}:{{ m.content }};{% endfor %}"

TALK = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "Uno."},
    {"role": "user", "content": "Two?"},
    {"role": "assistant", "content": "Dos.\nYes."},
    {"role": "user", "content": "Bye."},
]


class Template:
    """A tokenizer that can only render."""

    def __init__(self, template: str) -> None:
        self.chat_template: object = template

    def apply_chat_template(
        self, conversation: list[dict[str, str]], *, tokenize: bool, add_generation_prompt: bool
    ) -> str:
        assert not tokenize
        environment = jinja2.Environment(trim_blocks=False, keep_trailing_newline=True)
        environment.globals["raise_exception"] = _refuse
        return str(
            environment.from_string(self.chat_template).render(
                messages=conversation, add_generation_prompt=add_generation_prompt
            )
        )


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def learned(template: str, messages: list[dict[str, str]]) -> list[str]:
    return [text for text, yes in render_spans(Template(template), messages, "f:1") if yes]


def test_answers_carry_loss_with_their_end_of_turn() -> None:
    assert learned(CHATML, TALK) == ["Uno.<|im_end|>", "Dos.\nYes.<|im_end|>"]
    assert learned(LLAMA2, TALK[1:]) == [" Uno. </s>", " Dos.\nYes. </s>"]


def test_the_pieces_join_to_the_conversation_up_to_the_last_answer() -> None:
    spans = render_spans(Template(CHATML), TALK, "f:1")
    whole = Template(CHATML).apply_chat_template(
        TALK[:5], tokenize=False, add_generation_prompt=False
    )
    assert "".join(text for text, _ in spans) == whole.rstrip("\n")
    assert spans[0] == (
        "<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\nOne?<|im_end|>\n"
        "<|im_start|>assistant\n",
        False,
    )


def test_a_last_turn_that_is_rendered_differently_is_marked_as_it_stands() -> None:
    assert learned(THINKS_LAST, TALK) == [
        "Uno.<|im_end|>",
        "<think>\n\n</think>\n\nDos.\nYes.<|im_end|>",
    ]


def test_a_generation_prompt_that_opens_more_than_the_turn_holds_is_no_obstacle() -> None:
    assert learned(PROMPT_THINKS, TALK) == ["Uno.<|im_end|>", "Dos.\nYes.<|im_end|>"]


def test_a_conversation_may_start_with_the_assistant() -> None:
    assert learned(CHATML, [{"role": "assistant", "content": "Hello."}]) == ["Hello.<|im_end|>"]


def test_a_template_that_rewrites_earlier_turns_is_refused() -> None:
    with pytest.raises(DataError, match="f:1: the chat template changes what comes before turn 3"):
        learned(SYSTEM_MOVES, TALK)


def test_a_conversation_without_an_answer_is_refused() -> None:
    with pytest.raises(DataError, match="f:1: the conversation has no turn of role 'assistant'"):
        learned(CHATML, TALK[:2])


def test_what_the_template_refuses_is_one_line() -> None:
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no\nsystem') }}{% endif %}"
    with pytest.raises(DataError, match=r"^f:1: the chat template refuses .*: no system$"):
        learned(template, TALK)


def test_a_tokenizer_without_a_template_is_refused() -> None:
    with pytest.raises(DataError, match="needs a tokenizer with a chat template"):
        learned("", TALK)


def test_tokens_of_answers_carry_loss_under_a_real_tokenizer(stories260k: Path) -> None:
    pytest.importorskip("transformers")
    tokenizer = load_tokenizer(stories260k)
    tokenizer.chat_template = CHATML
    data = DataSection(train="t", format="messages", max_tokens=512)
    sample = SampleBuilder(tokenizer, data).build(Row("f", 1, {"messages": TALK}))
    assert sample is not None
    edges = [0, *(i + 1 for i in range(len(sample.tokens) - 1) if _edge(sample.loss_mask, i))]
    spans = [
        tokenizer.decode(sample.tokens[start:end].tolist()).strip()
        for start, end in zip(edges, [*edges[1:], len(sample.tokens)], strict=True)
        if sample.loss_mask[start]
    ]
    assert spans == ["Uno.<|im_end|>", "Dos.\nYes.<|im_end|>"]


def _edge(mask: object, i: int) -> bool:
    return bool(mask[i] != mask[i + 1])  # type: ignore[index]
