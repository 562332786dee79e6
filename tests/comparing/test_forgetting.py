"""What was forgotten: the mean KL on the neutral text, of adapters of every kind as they are used."""

from importlib import resources
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from tiny_run import byte_tokenizer, write_adapter, write_base, write_recipe
from transformers import AutoModelForCausalLM

from gatewise.comparing.forgetting import forgotten
from gatewise.files import write_json
from gatewise.runs.recipe import load_recipe
from gatewise.runs.run import train


def test_it_is_the_mean_divergence_of_the_next_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gatewise.comparing.forgetting._TOKENS", 250)  # so that pieces differ in length
    base = write_base(tmp_path / "llama", initializer_range=0.3, max_position_embeddings=300)
    adapter = write_adapter(tmp_path / "adapter", base)
    text = (resources.files("gatewise") / "samples" / "neutral.txt").read_text(encoding="utf-8")
    pieces = [byte_tokenizer()(piece, return_tensors="pt")["input_ids"][:, :250] for piece in text.strip().split("\n\n")]
    before = AutoModelForCausalLM.from_pretrained(base)
    after = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter))
    with torch.no_grad():
        p, q = (torch.cat([model(piece).logits[0, 15:] for piece in pieces]).double().softmax(dim=-1) for model in (before, after))
    assert len({piece.shape[1] for piece in pieces}) > 5
    expected = float((p * (p / q).log()).sum(dim=-1).mean())
    assert expected > 0.1
    assert forgotten(adapter) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("method", ["milora", "spt", "prefix-tuning"])
def test_what_reads_a_prompt_or_is_one_is_used_as_on_other_text(method: str, tmp_path: Path) -> None:
    small = {"max_steps": 2, "batch_size": 2, "learning_rate": 0.1}
    recipe = write_recipe(tmp_path, method, training=small, **({"search": {"keep": 1, "max_steps": 2}} if method == "spt" else {}))
    result = train(load_recipe(recipe), tmp_path / "out", console=Console(quiet=True), measured=(), before=False)
    found = forgotten(result.adapter)
    assert found is not None
    assert 1e-6 < found < 10


def test_rounding_is_not_forgotten(tmp_path: Path) -> None:
    base = write_base(tmp_path / "llama", initializer_range=0.3)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=2, task_type="CAUSAL_LM"))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.constant_(weight, 1e-4)
    model.save_pretrained(str(tmp_path / "small"), save_embedding_layers=False)
    write_json(tmp_path / "small" / "gatewise.json", {"dtype": "bfloat16"})
    found = forgotten(tmp_path / "small")
    assert found is not None
    assert 0 < found < 2e-6


def test_nothing_is_forgotten_by_a_fresh_adapter_or_told_of_a_classifier(tmp_path: Path) -> None:
    base = write_base(tmp_path / "llama")
    fresh = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=2, task_type="CAUSAL_LM"))
    fresh.save_pretrained(str(tmp_path / "fresh"), save_embedding_layers=False)
    assert forgotten(tmp_path / "fresh") == 0
    assert forgotten(write_adapter(tmp_path / "classifier", write_base(tmp_path / "bert", "bert"))) is None
