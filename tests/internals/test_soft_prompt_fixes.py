"""PEFT's prompt and prefix tuning: losses and measurements against models that are run by hand, one row at a time."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_base
from tiny_prompts import by_hand, soft_prompted
from tiny_run import byte_tokenizer, write_base
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForSequenceClassification

from gatewise.losses import labelled_logits, prompt_length, row_losses
from gatewise.tasks import default_template, evaluate, load_records
from gatewise.tasks.metrics import most_positions, scored_candidates


def soft(family: str, kind: str, base: Any = None) -> Any:
    """A tiny model with a random soft prompt."""
    torch.manual_seed(3)
    base = base or (decoder_classifier() if family == "llama-classifier" else tiny_base(family))
    return soft_prompted(base, kind, "SEQ_CLS" if family in ("bert", "llama-classifier") else "CAUSAL_LM")


def decoder_classifier() -> Any:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "num_labels": 3}
    return LlamaForSequenceClassification(LlamaConfig(vocab_size=60, pad_token_id=0, **sizes))


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("rows", [1, 5])
def test_losses_of_a_decoder(batch, family, kind, rows):
    model, data = soft(family, kind), batch(family, rows=rows)
    with torch.no_grad():
        sums, counts = row_losses(model, data)
    for row in range(rows):
        length = int(data["attention_mask"][row].sum())
        logits = by_hand(model, data["input_ids"][row, :length]).log_softmax(dim=-1)
        labels = data["labels"][row]
        terms = [-logits[i - 1, labels[i]] for i in range(1, length) if labels[i] != -100]
        assert counts[row] == len(terms)
        torch.testing.assert_close(sums[row], torch.stack(terms).sum())


def test_all_positions_of_one_row(batch):
    """As many labels as positions, which the logits of a whole sequence have too."""
    model, data = soft("llama", "prompt"), batch(rows=1)
    data.pop("labels")
    with torch.no_grad():
        got = labelled_logits(model, data, torch.ones_like(data["input_ids"], dtype=torch.bool))
        torch.testing.assert_close(got, by_hand(model, data["input_ids"][0]))


@pytest.mark.parametrize(("family", "kind"), [("bert", "prompt"), ("bert", "prefix"), ("llama-classifier", "prefix")])
def test_losses_of_a_classifier(batch, family, kind):
    model, data = soft(family, kind), batch("bert")
    with torch.no_grad():
        sums, counts = row_losses(model, data)
    assert counts.tolist() == [1] * 5
    lengths = data["attention_mask"].sum(dim=1).tolist()
    assert len(set(lengths)) > 1
    for row, length in enumerate(lengths):
        # Without padding nothing is hidden from an encoder, so no mask is needed.
        logits = by_hand(model, data["input_ids"][row, :length])
        torch.testing.assert_close(sums[row], -logits.log_softmax(dim=-1)[data["labels"][row]])


def test_gradients_reach_the_prefix_and_the_head_only(batch):
    model = soft("bert", "prefix").train()
    row_losses(model, batch("bert"))[0].sum().backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None and bool(p.grad.abs().sum() > 0)}
    assert reached == {
        "prompt_encoder.default.embedding.weight",
        "base_model.classifier.modules_to_save.default.weight",
        "base_model.classifier.modules_to_save.default.bias",
    }


def test_switched_off_it_takes_no_positions():
    model = soft("llama", "prefix")
    assert prompt_length(model) == 3
    with model.disable_adapter():
        assert prompt_length(model) == 0


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_candidates(kind):
    model, tokenizer = soft("llama", kind, AutoModelForCausalLM.from_config(byte_config())), byte_tokenizer()
    prompts = [[5, 6, 7, 8], [9, 10]]
    candidates = [((11,), (11, 12, 13)), ((14,), (15, 16))]
    with torch.no_grad():
        got = [[score for score, _ in row] for row in scored_candidates(model, tokenizer, prompts, candidates, batch_size=2)]
        for row, (prompt, texts) in enumerate(zip(prompts, candidates, strict=True)):
            for column, text in enumerate(texts):
                logits = by_hand(model, torch.tensor([*prompt, *text])).log_softmax(dim=-1)
                wanted = sum(float(logits[len(prompt) - 1 + i, token]) for i, token in enumerate(text))
                assert got[row][column] == pytest.approx(wanted, abs=1e-4)


def byte_config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(byte_tokenizer()),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.6,
        max_position_embeddings=96,
    )


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_what_is_written_does_not_depend_on_the_batch(kind, tmp_path: Path, monkeypatch):
    """It is what comes out without padding and without a cache, token by token."""
    torch.manual_seed(5)
    model, tokenizer = soft("llama", kind, AutoModelForCausalLM.from_config(byte_config())), byte_tokenizer()
    sources = ["ab", "cdefg", "hi", "xyz uvw"]
    lines = [json.dumps({"source": text, "target": "x"}) for text in sources]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines), encoding="utf-8")
    written: list[str] = []
    module = sys.modules["gatewise.tasks.metrics"]  # the package has a function of that name
    monkeypatch.setattr(module, "_judge_texts", lambda _, texts: (written.extend(text for text, _ in texts) or {}, []))
    evaluate(model, tokenizer, load_records(str(tmp_path / "rows.jsonl")), batch_size=4, max_new_tokens=6)
    records = load_records(str(tmp_path / "rows.jsonl"))
    template = default_template(records)
    assert len(written) == 4
    for row, text in zip(records.rows, written, strict=True):
        ids = [*tokenizer(template.render(row))["input_ids"]]
        start = len(ids)
        with torch.no_grad():
            while len(ids) < start + 6 and (len(ids) == start or ids[-1] != 2):
                ids.append(int(by_hand(model, torch.tensor(ids))[-1].argmax()))
        assert text == tokenizer.decode([token for token in ids[start:] if token > 2])


def test_the_prompt_takes_positions(tmp_path: Path):
    base = AutoModelForCausalLM.from_pretrained(write_base(tmp_path / "llama"))
    assert most_positions(base) == 96
    model = soft("llama", "prompt", base)
    assert (prompt_length(model), most_positions(model)) == (3, 93)
