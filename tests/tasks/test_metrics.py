import math
import sys
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import BertForMaskedLM, BertForSequenceClassification, LlamaForCausalLM, PreTrainedTokenizerFast

from gatewise import RoutedLoraConfig
from gatewise.errors import DivergedError, GatewiseError
from gatewise.losses import row_losses
from gatewise.tasks import PadCollator, Records, Template, encode, evaluate
from gatewise.tasks.metrics import METRICS, _judge_texts, generation_metrics, scored_candidates, worth, write_texts

WORDS = ["lamp", "good", "late parcel", "the bill is wrong", "灯", "nobody knows where it is and nobody knows why", "x"]
TEMPLATE = Template("Text: {text}\nLabel:")


def _labelled(labels: list[str], n: int = 21) -> Records:
    rows = [{"text": f"{WORDS[i % len(WORDS)]} {i}", "label": labels[i % len(labels)]} for i in range(n)]
    return Records("label", rows, labels, "rows")


def _choices() -> Records:
    options = ["good", "bad", "a very late parcel", "a very late lamp", "a", "12", "灯坏了"]
    rows = []
    for i in range(15):
        picked = [options[(i * 3 + k) % len(options)] for k in range(2 + i % 4)]
        rows.append({"question": WORDS[i % len(WORDS)], "choices": picked, "answer": i % len(picked)})
    return Records("choice", rows, None, "rows")


@torch.no_grad()
def _slow_metrics(
    model: nn.Module, tokenizer: PreTrainedTokenizerFast, records: Records, template: Template
) -> tuple[dict[str, float], list[list[float]]]:
    """One row and one candidate at a time: full logits, log softmax, sum. The labels are those of training, -100 on the prompt."""
    model.eval()
    hits = norm_hits = tokens = 0
    loss = 0.0
    found = []
    for row in records.rows:
        prompt = tokenizer(template.render(row))["input_ids"]
        scores, normed = [], []
        for text in template.candidates(records, row):
            answer = tokenizer(text)["input_ids"]
            labels = torch.tensor([[-100] * len(prompt) + answer])
            logits = model(torch.tensor([prompt + answer]), labels=labels).logits[0].log_softmax(dim=-1)
            scores.append(sum(float(logits[len(prompt) + k - 1, token]) for k, token in enumerate(answer)))
            normed.append(scores[-1] / len(answer))
        gold = records.labels.index(row["label"]) if records.labels else row["answer"]
        hits += scores.index(max(scores)) == gold
        norm_hits += normed.index(max(normed)) == gold
        loss -= scores[gold]
        tokens += round(scores[gold] / normed[gold])
        found.append(scores)
    n = len(records.rows)
    metrics = {"accuracy": hits / n, "loss": loss / tokens, "n": n}
    return metrics | ({"accuracy_norm": norm_hits / n} if records.kind == "choice" else {}), found


CASES = {
    "single-token labels": (_labelled(["good", "bad", " is".strip()]), TEMPLATE),
    "single and multi-token labels": (
        _labelled(["good", "late lamp", "late parcel and lamp", "very bad", "灯坏了"]),
        TEMPLATE,
    ),
    "label words": (_labelled(["a", "b"]), Template("{text}", labels={"a": "good", "b": "wrong wrong"})),
    "choices": (_choices(), Template("Question: {question}\nAnswer:")),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_candidates_agree_with_one_at_a_time(
    llama: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, case: str, batch_size: int
) -> None:
    records, template = CASES[case]
    expected, scores = _slow_metrics(llama, tokenizer, records, template)
    assert 0 < expected["accuracy"] < 1
    answers: list[dict[str, Any]] = []
    assert evaluate(llama, tokenizer, records, template, batch_size=batch_size, answers=answers) == pytest.approx(
        expected, abs=1e-5
    )
    assert sum(answer["right"] for answer in answers) / len(records) == expected["accuracy"]
    for slow, answer in zip(scores, answers, strict=True):
        given = answer["log_likelihoods"]
        assert list(given.values() if records.labels else given) == pytest.approx(slow, abs=1e-3)
        assert given[answer["predicted"]] == max(given.values() if records.labels else given)


def test_few_logits_at_once_give_the_same(
    llama: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    records, template = CASES["choices"]
    expected = evaluate(llama, tokenizer, records, template)
    monkeypatch.setattr(sys.modules["gatewise.tasks.metrics"], "_MAX_LOGITS", 3 * len(tokenizer))
    seen: list[int] = []
    llama.lm_head.register_forward_hook(lambda module, args, output: seen.append(output.shape[1]))
    assert evaluate(llama, tokenizer, records, template) == pytest.approx(expected, abs=1e-5)
    longest = max(len(tokenizer(" " + text)["input_ids"]) for row in records.rows for text in row["choices"])
    assert max(seen) <= max(3, longest)


def test_single_token_labels_share_one_forward_and_one_logit_position_a_row(
    llama: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    records, _ = CASES["single-token labels"]
    assert all(len(tokenizer(" " + label)["input_ids"]) == 1 for label in records.labels or ())
    positions: list[int] = []
    llama.lm_head.register_forward_hook(lambda module, args, output: positions.append(output.shape[1]))
    steps: list[tuple[int, int]] = []
    evaluate(llama, tokenizer, records, TEMPLATE, batch_size=8, progress=lambda done, total: steps.append((done, total)))
    assert positions == [8, 8, 5]
    assert steps == [(8, 21), (16, 21), (21, 21)]


def test_a_choice_that_repeats_the_right_text_counts_as_right(llama: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    records = Records("choice", [{"question": "q", "choices": ["good", "good"], "answer": 1}], None, "rows")
    metrics = evaluate(llama, tokenizer, records)
    assert (metrics["accuracy"], metrics["accuracy_norm"]) == (1.0, 1.0)


def test_long_prompts_are_cut_to_what_the_model_takes(llama: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    records = Records("label", [{"text": "late " * 300 + "lamp", "label": "good"}], ["bad", "good"], "rows")
    widths: list[int] = []
    llama.model.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    evaluate(llama, tokenizer, records, TEMPLATE)
    evaluate(llama, tokenizer, records, TEMPLATE, max_length=20)
    assert widths == [126, 18]  # the last of 128 or 20 tokens are a label of one token, and the end


def test_training_mode_and_random_state_are_left_as_they_were(llama: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    records, _ = CASES["single-token labels"]
    expected, _ = _slow_metrics(llama, tokenizer, records, TEMPLATE)
    llama.train()
    llama.model.layers[0].eval()
    modes = [module.training for module in llama.modules()]
    state = torch.get_rng_state()
    assert evaluate(llama, tokenizer, records, TEMPLATE) == pytest.approx(expected, abs=1e-5)
    written = Records("generation", [{"source": "lamp", "target": "x"}], None, "rows")
    evaluate(llama, tokenizer, written, max_new_tokens=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in llama.modules()] == modes
    with pytest.raises(GatewiseError):
        evaluate(llama, tokenizer, records, Template("{nothing}"))
    assert [module.training for module in llama.modules()] == modes


# ---- sequence classifiers ----


@pytest.mark.parametrize("batch_size", [1, 5])
def test_classifier_agrees_with_one_at_a_time(
    bert: BertForSequenceClassification, tokenizer: PreTrainedTokenizerFast, batch_size: int
) -> None:
    records = _labelled(["a", "b", "c"])
    answers: list[dict[str, Any]] = []
    metrics = evaluate(bert.train(), tokenizer, records, batch_size=batch_size, answers=answers)
    assert bert.training
    bert.eval()
    losses = []
    for row, answer in zip(records.rows, answers, strict=True):
        with torch.no_grad():
            scores = bert(torch.tensor([tokenizer(row["text"])["input_ids"]])).logits[0].log_softmax(dim=-1)
        losses.append(-float(scores[records.labels.index(row["label"])]))
        assert answer["predicted"] == records.labels[int(scores.argmax())]
        assert answer["right"] == (answer["predicted"] == row["label"])
        assert list(answer["log_likelihoods"].values()) == pytest.approx(scores.tolist(), abs=1e-3)
    right = sum(answer["right"] for answer in answers) / len(records)
    assert metrics == pytest.approx({"accuracy": right, "loss": sum(losses) / len(records), "n": len(records)}, abs=1e-5)


def test_what_is_not_a_number_is_no_answer(
    bert: BertForSequenceClassification, llama: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    for model, head in ((bert, bert.classifier), (llama, llama.lm_head)):
        nn.init.constant_(head.weight, math.nan)
        with pytest.raises(DivergedError, match="is not finite"):  # by which a comparison knows a rate that is too high
            evaluate(model, tokenizer, _labelled(["good", "bad", "is"]))


def test_models_that_cannot_do_the_task_are_refused(
    bert: BertForSequenceClassification, llama: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    labelled, written = _labelled(["a", "b"]), Records("generation", [{"source": "lamp", "target": "x"}], None, "rows")
    for model, records, message in (
        (bert, labelled, "the model has 3 classes, but rows has the 2 labels a, b"),
        (bert, _choices(), "holds choice rows"),
        (BertForMaskedLM(bert.config), labelled, "BertForMaskedLM cannot be evaluated"),
        (llama.model, labelled, "LlamaModel cannot be evaluated"),
        (llama, written, "leaves no room in 128"),
    ):
        with pytest.raises(GatewiseError, match=message):
            evaluate(model, tokenizer, records, max_new_tokens=128)


# ---- writing ----


@torch.no_grad()
def _slow_greedy(model: Any, prompt: list[int], max_new_tokens: int, ends: set[int]) -> list[int]:
    ids = list(prompt)
    while len(ids) < len(prompt) + max_new_tokens:
        token = int(model(torch.tensor([ids])).logits[0, -1].argmax())
        if token in ends:
            break
        ids.append(token)
    return ids[len(prompt) :]


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_generation_agrees_with_a_loop_and_stops_at_the_end_token(
    llama: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, batch_size: int
) -> None:
    llama.eval()
    prompts = [tokenizer(f"Input: {word}\nOutput:")["input_ids"] for word in WORDS]
    free = [_slow_greedy(llama, prompt, 12, {2}) for prompt in prompts]
    # Some token that this model writes in the middle serves as its second end token.
    end = free[0][5]
    # A checkpoint's own defaults must not leak into the measurement.
    llama.generation_config.update(eos_token_id=[2, end], repetition_penalty=9.0, do_sample=True, temperature=2.0)
    expected = [_slow_greedy(llama, prompt, 12, {2, end}) for prompt in prompts]
    assert expected != free
    written = write_texts(llama, tokenizer, prompts, batch_size, 12)
    assert {len(ids) < 12 for ids in expected} == {True, False}
    assert written == [(tokenizer.decode(ids, skip_special_tokens=True), len(ids) < 12) for ids in expected]


def test_answers_may_be_as_long_as_the_right_ones(
    llama: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """16 tokens more than the longest, 64 at least, half of the positions at most; and what is cut is said."""
    llama.eval()
    given: list[int] = []
    generate = llama.generate

    def spied(*args: Any, **kwargs: Any) -> Any:
        given.append(kwargs["generation_config"].max_new_tokens)
        return generate(*args, **kwargs)

    monkeypatch.setattr(llama, "generate", spied)
    monkeypatch.setattr(llama.generation_config, "eos_token_id", None)
    monkeypatch.setattr(llama.config, "max_position_embeddings", 256)
    many = "late parcel " * 20
    length = len(tokenizer(many.strip(), add_special_tokens=False)["input_ids"])
    assert 64 < length + 16 < 128
    for right, most in (({"target": "x"}, 64), ({"targets": ["x", many]}, length + 16), ({"target": many * 4}, 128)):
        answers: list[dict[str, Any]] = []
        evaluate(llama, tokenizer, Records("generation", [{"source": "lamp", **right}], None, "rows"), answers=answers)
        assert given.pop() == most
        assert answers[0]["cut"]


def test_writing_ends_before_the_first_of_some_texts(llama, tokenizer):
    """As cutting the whole answer; and no row is asked for more tokens than the longest one needs."""
    llama.eval()
    prompts = [tokenizer(text)["input_ids"] for text in ("Text: the lamp", "good good", "x", "the bill is wrong and")]
    whole = [text for text, _ in write_texts(llama, tokenizer, prompts, 4, 24)]
    until = [text[len(text) // 2 :][:2] for text in whole[:3]]
    assert all(until)
    expected = [text[: min((text.index(one) for one in until if one in text), default=len(text))] for text in whole]
    assert expected != whole
    assert [text for text, _ in write_texts(llama, tokenizer, prompts, 3, 24, until=until)] == expected
    calls = []
    handle = llama.lm_head.register_forward_hook(lambda *_: calls.append(None))
    write_texts(llama, tokenizer, prompts[:1], 1, 24, until=until[:1])
    handle.remove()
    assert len(calls) < 24


@torch.no_grad()
def test_candidates_that_greedy_decoding_writes(llama, tokenizer):
    llama.eval()
    prompt = tokenizer("Text: the lamp")["input_ids"]
    written = []
    for _ in range(3):
        written.append(int(llama(torch.tensor([prompt + written])).logits[0, -1].argmax()))
    candidates = (tuple(written), (written[0],), (*written[:2], written[2] + 1), (written[0] + 1, *written[1:]))
    (found,) = scored_candidates(llama, tokenizer, [prompt], [candidates], 2)
    assert [is_greedy for _, is_greedy in found] == [True, True, False, False]


def test_bleu_and_rouge_take_the_best_of_the_references() -> None:
    rows = [
        {"source": "a", "targets": ["the lamp on the old table is broken", "somebody broke the lamp on the table"]},
        {"source": "b", "target": "the parcel came on a rainy Monday"},
    ]
    records = Records("generation", rows, None, "rows")
    perfect = generation_metrics(records, [" somebody broke the lamp on the table\nnoise", "the parcel came on a rainy Monday"])
    assert perfect == pytest.approx({"bleu": 100.0, "rougeL": 1.0, "n": 2})
    # One row is right and of the other one of seven words is left: precision 1, recall 1/7, F = 1/4.
    partly = generation_metrics(records, ["somebody broke the lamp on the table", "Monday"])
    assert partly["rougeL"] == pytest.approx((1 + 0.25) / 2)
    assert 0 < partly["bleu"] < 100


def test_all_lines_count_when_a_reference_has_several() -> None:
    records = Records("generation", [{"source": "a", "target": "one two three four\nfive six seven"}], None, "rows")
    assert generation_metrics(records, ["one two three four\nfive six seven\n"])["rougeL"] == 1.0
    assert generation_metrics(records, ["one two three four"])["rougeL"] < 1.0


def test_chinese_is_measured_by_character() -> None:
    """Nine characters against eight, of which seven in order are the same."""
    records = Records("generation", [{"source": "a", "target": "明天上午十点看牙医。"}], None, "rows")
    metrics = generation_metrics(records, ["明天上午九点看医"])
    assert metrics["rougeL"] == pytest.approx(2 * 7 / (8 + 9))
    assert 0 < metrics["bleu"] < 100


@pytest.mark.parametrize("written", ["", "\n\n", "###", "��"])
def test_metrics_of_empty_outputs_are_zero(written: str) -> None:
    rows = [{"source": "a", "target": "one two three four five"}, {"source": "b", "target": "six"}]
    assert generation_metrics(Records("generation", rows, None, "rows"), [written] * 2) == {"bleu": 0, "rougeL": 0, "n": 2}


def test_exact_compares_the_final_numbers() -> None:
    rows = [{"question": "q", "answer": f"so\n#### {number}"} for number in ("1,250", "4", "4", "7", "7")]
    written = [(" It is $1250.00.", True), ("4 apples and 5", True), ("#### 4 then 9", False), ("seven", True), ("", True)]
    metrics, answers = _judge_texts(Records("number", rows, None, "rows"), written)
    assert metrics == {"exact": 0.4, "n": 5}
    assert answers[2] == {"predicted": "#### 4 then 9", "cut": True, "right": True}


def _short(kind: str) -> Records:
    """Rows whose answers are right, half right or wrong, whatever a random model writes."""
    words = ["lamp", "a b c d e f g h", "the bill", "x"]
    rows: dict[str, list[dict[str, Any]]] = {
        "number": [{"question": word, "answer": f"#### {number}"} for number, word in enumerate(words)],
        "generation": [{"source": word, "target": word} for word in words],
        "chat": [{"messages": [{"role": "user", "content": w}, {"role": "assistant", "content": w}]} for w in words],
    }
    return Records(kind, rows[kind], None, "rows")  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", METRICS)
def test_the_first_metric_of_a_kind_is_the_mean_of_what_its_rows_are_worth(
    kind: str, llama: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = _labelled(["good", "bad"]) if kind == "label" else _choices() if kind == "choice" else _short(kind)
    written = [("2 b c", True), ("a b", True), ("bill 2", True), ("x 3", False)]
    monkeypatch.setattr("gatewise.tasks.metrics.write_texts", lambda *_, **__: written)
    monkeypatch.setattr(tokenizer, "chat_template", "{% for m in messages %}{{ m.content }}\n{% endfor %}")
    answers: list[dict[str, Any]] = []
    metrics = evaluate(llama, tokenizer, records, answers=answers)
    rows = [worth(answer) for answer in answers]
    assert 0 < metrics[METRICS[kind][0]] < 1
    assert sum(rows) / len(rows) == metrics[METRICS[kind][0]]
    if kind == "generation":  # "a b" of eight words: precision 1, recall 1/4
        assert rows == pytest.approx([0, 2 * 0.25 / 1.25, 0.5, 2 * 0.5 / 1.5])


# ---- adapters that are routed by their prompt: what is measured is what was trained ----


@pytest.fixture
def routed(llama: LlamaForCausalLM) -> PeftModel:
    """One whose decision from a prompt is another one with the answer in sight."""
    model = get_peft_model(llama, RoutedLoraConfig(r=2, top_k=1, init_lora_weights=False, task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "prompt_router" in name and name.endswith(("weight", "pool")):
            nn.init.normal_(parameter)
    return model.eval()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("batch_size", [1, 64])
def test_candidates_of_a_routed_adapter_are_scored_as_trained(
    routed: PeftModel, tokenizer: PreTrainedTokenizerFast, case: str, batch_size: int
) -> None:
    records, template = CASES[case]
    metrics = evaluate(routed, tokenizer, records, template, batch_size=batch_size)
    assert metrics == pytest.approx(_slow_metrics(routed, tokenizer, records, template)[0], abs=1e-5)
    data = PadCollator(tokenizer)(encode(records, tokenizer, template))
    data["labels"][data["labels"] == tokenizer.eos_token_id] = -100  # candidates are compared without their ends
    counts = (data["labels"] != -100).sum(dim=1)
    with torch.no_grad():
        assert metrics["loss"] == pytest.approx(float(routed(**data).loss), abs=1e-4)
        gates = routed.routing().gates
        sums, _ = row_losses(routed, data)
        assert metrics["loss"] == pytest.approx(float(sums.sum() / counts.sum()), abs=1e-4)
        torch.testing.assert_close(routed.routing().gates, gates)
        with routed.prompt_positions(data["attention_mask"]):
            routed(**data)
    assert bool((counts == 1).all()) or not torch.equal(routed.routing().gates > 0, gates > 0)


@pytest.mark.parametrize("kind", ["generation", "number"])
def test_a_routed_adapter_writes_as_trained(routed: PeftModel, tokenizer: PreTrainedTokenizerFast, kind: str) -> None:
    names = ("source", "target") if kind == "generation" else ("question", "answer")
    rows = [dict(zip(names, (word, f"{word} {i}"), strict=True)) for i, word in enumerate(WORDS)]
    records = Records(kind, rows, None, "rows")  # type: ignore[arg-type]
    features = encode(records, tokenizer, None)
    with torch.no_grad():
        routed(**PadCollator(tokenizer)(features))
    trained, written = routed.routing().gates, []
    routed.get_base_model().lm_head.register_forward_hook(lambda *_: written.append(1))
    evaluate(routed, tokenizer, records, max_new_tokens=4)
    assert len(written) > 1  # steps after the one that read the prompts
    longest_first = sorted(range(len(rows)), key=lambda row: -features[row]["labels"].count(-100))
    torch.testing.assert_close(routed.routing().gates, trained[longest_first])
