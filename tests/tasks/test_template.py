import re
from typing import Any

import pytest

from gatewise.errors import GatewiseError
from gatewise.tasks import Records, Template, default_template

LABELS = Records("label", [{"text": "a {odd} text", "label": "pos"}], ["neg", "pos"], "rows")
CHOICE = Records("choice", [{"question": "q?", "choices": ["one ", " two"], "answer": 1}], None, "rows")


def test_render_writes_fields_and_doubled_braces() -> None:
    row = {"text": "a {odd} text", "choices": ["one", "two"], "n": 3}
    assert Template("{{x}} {text} {n}:\n{choices}\nAnswer:  ").render(row) == "{x} a {odd} text 3:\none\ntwo\nAnswer:"


@pytest.mark.parametrize("prompt", ["{text", "text}", "{text.__class__}", "{text[0]}", "{}", "{text!r}", "{text:>9}", "{0}"])
def test_only_plain_field_names_are_allowed(prompt: str) -> None:
    with pytest.raises(GatewiseError, match=re.escape(repr(prompt))):
        Template(prompt)


def test_unknown_field_is_named_with_the_fields_there_are() -> None:
    with pytest.raises(GatewiseError, match=r"has \{sentence\}, but a row has text, label"):
        Template("{sentence}").check(LABELS)


def test_a_prompt_that_shows_nothing_of_the_row_is_refused() -> None:
    with pytest.raises(GatewiseError, match=r"'Text: \(text\)' shows nothing of the row; write its fields in braces: \{text\}$"):
        Template("Text: (text)").check(LABELS)
    with pytest.raises(GatewiseError, match=r"write its fields in braces: \{question\}, \{choices\}$"):
        Template("{{question}}").check(CHOICE)


@pytest.mark.parametrize(
    ("kind", "row"),
    [
        ("label", {"text": "a", "label": "pos"}),
        ("choice", {"question": "a", "choices": ["b", "c"], "answer": 0}),
        ("number", {"question": "a", "answer": "#### 1"}),
        ("generation", {"source": "a", "target": "b"}),
    ],
)
def test_a_prompt_that_gives_the_answer_away_is_refused(kind: Any, row: dict[str, Any]) -> None:
    field = list(row)[-1]
    records = Records(kind, [row], ["pos"] if kind == "label" else None, "rows")
    with pytest.raises(GatewiseError, match=rf"shows \{{{field}\}}, which is the answer"):
        Template("x {" + field + "}").check(records)


def test_candidates_and_target_begin_with_one_space() -> None:
    row = LABELS.rows[0]
    assert Template("{text}").candidates(LABELS, row) == [" neg", " pos"]
    words = Template("{text}", labels={"neg": " terrible", "pos": "great"})
    assert words.candidates(LABELS, row) == [" terrible", " great"]
    assert Template("{question}").candidates(CHOICE, CHOICE.rows[0]) == [" one", " two"]
    several = Records("generation", [{"source": "a", "targets": ["b ", "c"]}], None, "rows")
    assert Template("{source}").target(several, several.rows[0]) == " b"


def test_each_label_must_have_a_word() -> None:
    with pytest.raises(GatewiseError, match="no word for 'pos'; they have neg"):
        Template("{text}", labels={"neg": "bad"}).check(LABELS)


@pytest.mark.parametrize(
    ("kind", "row"),
    [
        ("label", {"text": "the input", "label": "pos"}),
        ("label", {"premise": "the input", "hypothesis": "and more", "label": "pos"}),
        ("choice", {"question": "the input", "choices": ["b", "c"], "answer": 0}),
        ("number", {"question": "the input", "answer": "#### 1"}),
        ("generation", {"source": "the input", "target": "b"}),
    ],
)
def test_default_template_fits_each_kind(kind: Any, row: dict[str, Any]) -> None:
    records = Records(kind, [row], ["pos"] if kind == "label" else None, "rows")
    template = default_template(records)
    template.check(records)
    prompt = template.render(row)
    assert "the input" in prompt
    assert ("and more" in prompt) == ("hypothesis" in row)
    assert prompt.endswith(":")
