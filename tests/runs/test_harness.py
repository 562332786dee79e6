"""lm-evaluation-harness on adapters: the same numbers as ``gatewise eval``, and as one call of the model for each continuation."""

import json
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from routed_models import routed_config, trained_routers
from tiny_models import random_adapter
from tiny_run import write_base
from typer.testing import CliRunner

from gatewise import SelectivePromptConfig
from gatewise.adapters.loading import load_adapter
from gatewise.cli.main import app
from gatewise.models import load_model

TaskManager = pytest.importorskip("lm_eval.tasks").TaskManager

QUESTIONS = [
    ("Which of these can you ride?", ["a bicycle", "a cloud", "the letter q"], 0),
    ("Where do parcels wait?", ["on the moon", "at the depot", "in a song"], 1),
    ("What is cold?", ["fire", "a stove", "ice", "tea"], 2),
    ("Who repairs lamps?", ["an electrician", "a lamp", "nobody, ever"], 0),
    ("How many is a dozen?", ["ten", "twelve"], 1),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters on a tiny base model, rows, and tasks over them."""
    root = tmp_path_factory.mktemp("harness")
    base = write_base(root / "base", max_position_embeddings=160)
    for number, kind in enumerate(("plain", "routed", "prompts")):
        torch.manual_seed(number)
        if kind == "prompts":
            config: Any = SelectivePromptConfig(task_type="CAUSAL_LM", num_prompt_tokens=3, prompt_layers=[1], bottleneck=4)
        else:
            plain = LoraConfig(r=3, lora_alpha=6, target_modules="all-linear", task_type="CAUSAL_LM")
            config = routed_config() if kind == "routed" else plain
        model = get_peft_model(load_model(base), config)
        random_adapter(model, scale=1.5)
        if kind == "routed":
            trained_routers(model)
        model.save_pretrained(root / kind, save_embedding_layers=False)
    rows = [{"question": question, "choices": choices, "answer": answer} for question, choices, answer in QUESTIONS]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"validation": str(root / "rows.jsonl")}},
        "validation_split": "validation",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "metadata": {"version": 1.0},
    }
    choices = {"output_type": "multiple_choice", "doc_to_target": "{{answer}}", "doc_to_choice": "{{choices}}"}
    writing = {"output_type": "generate_until", "doc_to_target": "{{choices[answer]}}", "metric_list": [mean("exact_match")]}
    rolling = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{question}}"}
    bits = {"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False}
    tasks = {
        "own_choices": {**choices, "metric_list": [mean("acc"), mean("acc_norm")]},
        "own_writing": {**writing, "generation_kwargs": {"until": ["e"], "max_gen_toks": 12}},
        "own_drawing": {**writing, "generation_kwargs": {"until": ["e"], "do_sample": True, "temperature": 0.7}},
        "own_texts": {**rolling, "metric_list": [bits]},
        "own_lost": {**choices, "dataset_kwargs": {"data_files": {"validation": str(root / "none.jsonl")}}},
    }
    (root / "tasks").mkdir()
    for name, own in tasks.items():
        (root / "tasks" / f"{name}.yaml").write_text(json.dumps({**common, "task": name, **own}))
    return root


@pytest.fixture
def evaluated(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Any]:
    """evaluated("plain", "--data", ...) -> the result of `gatewise eval` on the CPU."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.setenv("COLUMNS", "120")
    # The thousands of tasks that come with it take seconds to list.
    monkeypatch.setattr("gatewise.runs.harness.TaskManager", partial(TaskManager, include_defaults=False))

    def run(adapter: str, *words: Any) -> Any:
        given = ["eval", folder / adapter, "--base", folder / "base", "--device", "cpu", *words]
        return CliRunner().invoke(app, [str(word) for word in given])

    return run


def mean(metric: str) -> dict[str, Any]:
    return {"metric": metric, "aggregation": "mean", "higher_is_better": True}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("adapter", ["plain", "routed", "prompts"])
def test_choices_are_scored_as_by_eval(adapter: str, folder: Path, evaluated: Callable[..., Any], tmp_path: Path) -> None:
    """Row by row: `acc` is `accuracy`, and `acc_norm` divides by the letters of a choice where `accuracy_norm` has its tokens."""
    own, theirs = tmp_path / "own.jsonl", tmp_path / "theirs.jsonl"
    metrics = json.loads(evaluated(adapter, "--data", folder / "rows.jsonl", "--out", own, "--json").stdout)
    words = ("--harness", "own_choices", "--harness-tasks", folder / "tasks", "--out", theirs, "--json")
    result = evaluated(adapter, *words)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["results"]["own_choices"]["acc,none"] == metrics["accuracy"]
    assert found["n-samples"]["own_choices"]["effective"] == len(QUESTIONS)
    by_row = {row["doc_id"]: row for row in lines(theirs)}
    for number, row in enumerate(lines(own)):
        scores = [score for score, _ in by_row[number]["filtered_resps"]]
        assert scores == pytest.approx(row["log_likelihoods"], abs=1e-4)
        assert by_row[number]["acc"] == row["right"]
        by_letter = [score / len(choice) for score, choice in zip(scores, row["choices"], strict=True)]
        assert by_row[number]["acc_norm"] == (by_letter.index(max(by_letter)) == row["answer"])
    assert "own_choices" in evaluated(adapter, *words[:-1]).stdout


def test_an_adapter_of_conversations_is_asked_in_its_chat_template(
    folder: Path, evaluated: Callable[..., Any], tmp_path: Path
) -> None:
    text = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    shutil.copytree(folder / "plain", tmp_path / "chat")
    (tmp_path / "chat" / "gatewise.json").write_text(json.dumps({"chat_template": text}))
    words = ("--harness", "own_writing", "--harness-tasks", folder / "tasks", "--limit", "1", "--out", tmp_path / "said.jsonl")
    result = evaluated(tmp_path / "chat", *words, "--harness-shots", "1")
    assert result.exit_code == 0, result.output
    asked = lines(tmp_path / "said.jsonl")[0]["arguments"][0][0]
    last = re.escape(f"<user>Question: {QUESTIONS[0][0]}\nAnswer:<assistant>")
    assert re.fullmatch(rf"<user>Question: .*<assistant>.*{last}", asked, re.DOTALL)


@pytest.mark.parametrize("adapter", ["plain", "routed", "prompts"])
def test_the_model_asked_directly(adapter: str, folder: Path) -> None:
    """Each continuation in a call of its own, with labels to tell prompt from answer; a context that is read to its last space."""
    from lm_eval.api.instance import Instance

    from gatewise.runs.harness import HarnessModel

    model, tokenizer, _ = load_adapter(folder / adapter, base=folder / "base")
    asked = HarnessModel(model, tokenizer, batch_size=3)
    pairs = [("Where is the ", "lamp"), ("Where is the ", "bill, then"), ("x", " y"), ("", "nothing before"), ("a" * 300, " b")]
    requests = [Instance("loglikelihood", {}, pair, 0) for pair in pairs]
    with torch.no_grad():
        for (context, continuation), (score, _) in zip(pairs, asked.loglikelihood(requests), strict=True):
            stripped = context.rstrip()
            answer = tokenizer.encode(context[len(stripped) :] + continuation)
            prompt = tokenizer.encode(stripped)[-(161 - len(answer)) :] or [tokenizer.bos_token_id]
            if adapter == "prompts":  # which take three positions
                prompt = prompt[-(161 - 3 - len(answer)) :]
            ids = torch.tensor([[*prompt, *answer]])
            labels = torch.tensor([[-100] * len(prompt) + answer])
            logits = model(ids, labels=labels).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            expected = float(logits.gather(1, torch.tensor(answer)[:, None]).sum())
            assert score == pytest.approx(expected, abs=1e-3), (context, continuation)


def test_whole_texts_have_no_prompt(folder: Path, evaluated: Callable[..., Any]) -> None:
    """bits per byte = -log2 P / bytes, over all texts; refused where an adapter decides by its prompt."""
    words = ("--harness", "own_texts", "--harness-tasks", folder / "tasks", "--json")
    found = json.loads(evaluated("plain", *words).stdout)["results"]["own_texts"]["bits_per_byte,none"]
    model, tokenizer, _ = load_adapter(folder / "plain", base=folder / "base")
    nats = size = 0.0
    for text, *_ in QUESTIONS:
        ids = [tokenizer.bos_token_id, *tokenizer.encode(text)]
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        nats -= float(logits.gather(1, torch.tensor(ids[1:])[:, None]).sum())
        size += len(text.encode())
    assert found == pytest.approx(nats / size / torch.tensor(2.0).log().item(), rel=1e-4)
    refused = evaluated("routed", *words)
    assert refused.exit_code == 2
    assert "own_texts measures the probability of whole texts, which have no prompt" in refused.stderr


def test_shots_and_patterns(folder: Path, evaluated: Callable[..., Any], tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    given = ("--harness-tasks", folder / "tasks", "--harness-shots", 1, "--limit", 2, "--out", out, "--json")
    found = json.loads(evaluated("plain", "--harness", "own_cho*", *given).stdout)
    assert found["n-shot"] == {"own_choices": 1}
    rows = lines(out)
    assert len(rows) == 2
    assert all(row["arguments"][0][0].count("Question: ") == 2 for row in rows)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--harness own_choises", "lm_eval has no task own_choises"),
        ("--harness own_lost", "own_lost cannot be measured"),
        ("--harness own_drawing", "own_drawing wants answers that are drawn, and gatewise writes the most probable"),
        ("--harness own_choices --labels a,b", "--labels does not go with --harness"),
        ("--harness own_choices --data rows.jsonl", "give either --data or --harness"),
    ],
)
def test_what_is_refused(words: str, said: str, folder: Path, evaluated: Callable[..., Any]) -> None:
    result = evaluated("plain", *words.split(), "--harness-tasks", folder / "tasks")
    assert result.exit_code == 2, result.output
    assert result.stderr.strip().splitlines()[-1].startswith("error: ")
    assert said in result.stderr
    assert result.stdout == ""
