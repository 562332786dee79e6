"""Whole runs on conversations with a tiny model: training, what is noted, measuring, scoring, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tiny_run import write_base, write_recipe
from transformers import AutoTokenizer

from gatewise.adapters.files import read_note
from gatewise.adapters.loading import load_with_data
from gatewise.compress.rows import rows_for
from gatewise.errors import GatewiseError
from gatewise.inspection import score_adapter
from gatewise.runs import run
from gatewise.runs.measure import measure_adapter
from gatewise.runs.recipe import load_recipe

TEMPLATE = "{% for m in messages %}<s>{{ m.role[0] }} {{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}<s>a {% endif %}"


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    base = write_base(tmp_path / "llama")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(base)
    for name, count in (("train", 14), ("dev", 6)):
        lines = []
        for number in range(count):
            asked = [
                {"role": "user", "content": f"{name} {number}"},
                {"role": "assistant", "content": "yes" if number % 2 else "no"},
            ]
            again = [{"role": "user", "content": "so"}, {"role": "assistant", "content": f"{number}"}]
            lines.append(json.dumps({"messages": asked + again * (number % 3)}))
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    return tmp_path


def train(folder: Path, method: str, *overrides: str, **changes: Any) -> run.RunResult:
    small = {"max_steps": 3, "batch_size": 4, "learning_rate": 0.01}
    path = write_recipe(folder, method, training=small, **changes)
    return run.train(load_recipe(path, overrides), folder / method, console=Console(quiet=True), overwrite=True)


@pytest.mark.parametrize(("method", "assistant"), [("lora", "all"), ("milora", "last")])
def test_what_was_trained_on_conversations_is_measured_so(method: str, assistant: str, recipe: Path) -> None:
    """A method that reads the prompt trains last answers: before an earlier one it would have read another prompt."""
    result = train(recipe, method)
    note = read_note(result.adapter)
    assert (note["template"], note["chat_template"], note["assistant"]) == (None, TEMPLATE, assistant)
    after = result.metrics["dev"]["after"]
    assert after.keys() == {"loss", "bleu", "rougeL", "n"}
    (recipe / "llama" / "chat_template.jinja").unlink()  # the note has it
    assert measure_adapter(result.adapter, str(recipe / "dev.jsonl"), console=Console(quiet=True)) == pytest.approx(after, rel=1e-5)
    if method == "lora":
        (recipe / "labels.jsonl").write_text('{"text": "x", "label": "no"}\n{"text": "y", "label": "yes"}\n')
        with pytest.raises(GatewiseError, match=r"holds label rows, but .* was trained on conversations: give rows with messages"):
            measure_adapter(result.adapter, str(recipe / "labels.jsonl"))
        importance = score_adapter(result.adapter, str(recipe / "dev.jsonl"), score="taylor", rows=4)
        assert importance.rows == 4
        loaded = load_with_data(result.adapter, str(recipe / "dev.jsonl"))
        dealt = rows_for(loaded, None, None, None, 2, print)  # as gatewise compress does
        assert (dealt.measure, len(dealt.scored), len(dealt.held_out)) == ("loss", 1, 5)


@pytest.mark.parametrize(
    ("method", "changes", "sentence"),
    [
        (
            "lora",
            {"template.prompt": "{text}"},
            r"template.prompt was given, but .*train.jsonl holds conversations, which the chat",
        ),
        ("milora", {"data.assistant": "all"}, "data.assistant is all, but what milora trains decides by the prompt"),
        ("lora", {"model": "bare"}, "the tokenizer of .*bare has no chat template: take a model that was trained to chat"),
        (
            "lora",
            {"data.max_length": "8"},
            "14 of 14 conversations of .*train.jsonl do not fit into 8 tokens even with a single turn",
        ),
        ("lora", {"data.train": "labels.jsonl"}, "data.dev .* holds chat rows, but data.train .* holds label rows"),
    ],
)
def test_what_does_not_go_together_is_refused(method: str, changes: dict[str, str], sentence: str, recipe: Path) -> None:
    write_base(recipe / "bare")
    (recipe / "labels.jsonl").write_text('{"text": "x", "label": "a"}\n{"text": "y", "label": "b"}\n')
    overrides = [f"{key}={recipe / value if (recipe / value).exists() else value}" for key, value in changes.items()]
    with pytest.raises(GatewiseError, match=sentence):
        train(recipe, method, *overrides)
    assert not (recipe / method).exists()
