"""A tiny base model with a tokenizer, data and a recipe on disk: what a run needs, in a folder of the test's own."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tiny_models import random_adapter
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
)

from gatewise.runs.trainer import RecipeTrainer

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}

NAMED: dict[str, Any] = {"id2label": {0: "bad", 1: "good"}, "label2id": {"bad": 0, "good": 1}}


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<s>", "</s>", *letters])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        model_input_names=["input_ids", "attention_mask"],
    )


def write_base(folder: Path, family: str = "llama", **changes: Any) -> Path:
    """A random two-layer "llama", "bert" or "roberta" with its tokenizer; encoders name their classes as ``write_rows`` does."""
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    sizes = SIZES | {"vocab_size": len(tokenizer), "max_position_embeddings": 96, "pad_token_id": 0} | changes
    model_class, config_class, own = {
        "llama": (LlamaForCausalLM, LlamaConfig, {}),
        "bert": (BertModel, BertConfig, NAMED),
        "roberta": (RobertaModel, RobertaConfig, NAMED),
    }[family]
    model_class(config_class(**own | sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_rows(path: Path, count: int, seed: int = 0) -> Path:
    """Labelled texts; the last word gives the label away."""
    draw = random.Random(seed)
    lines = []
    for number in range(count):
        good = draw.random() < 0.5
        text = f"{'very ' * draw.randrange(3)}{number} {'nice' if good else 'poor'}"
        lines.append(json.dumps({"text": text, "label": "good" if good else "bad"}))
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def write_recipe(folder: Path, method: str = "lora", family: str = "llama", **changes: Any) -> Path:
    """A recipe of eight steps with everything it names beside it; ``changes`` replace whole sections, or take one out (None)."""
    if not (folder / family).exists():
        write_base(folder / family, family)
        write_rows(folder / "train.jsonl", 26, seed=1)
        write_rows(folder / "dev.jsonl", 10, seed=2)
    tree: dict[str, Any] = {
        "method": method,
        "model": family,
        "data": {
            "train": "train.jsonl",
            "dev": "dev.jsonl",
            "held_out": 0 if method == "spt" else 6,
            "max_length": 64,
        },
        "peft": {"r": 2, "lora_alpha": 4, "lora_dropout": 0.1},
        "training": {"max_steps": 8, "batch_size": 4, "learning_rate": 0.01, "log_every": 2, "save_every": 2},
    }
    if family != "llama":
        tree["task"] = "classification"
    if method in ("alora", "pi-lora"):
        tree["allocation"] = {"rounds": 2, "first_round": 3, "recover": 3}
    if method == "adalora":
        tree["adalora"] = {"init_r": 3, "tinit": 1, "tfinal": 2}
    if method == "milora":
        tree["routing"] = {"top_k": 2, "activation_every": 2, "activation_learning_rate": 0.01}
    if method in ("spt", "prompt-tuning", "prefix-tuning"):
        del tree["peft"]
        tree["prompts"] = {"num_prompt_tokens": 3}
    if method == "spt":
        tree["prompts"] = {"num_prompt_tokens": 3, "bottleneck": 4}
        tree["search"] = {"keep": 1, "max_steps": 6}
    path = folder / f"{method}.yaml"
    path.write_text(json.dumps({name: section for name, section in (tree | changes).items() if section}), encoding="utf-8")
    return path


def write_adapter(folder: Path, base: Path, **settings: Any) -> Path:
    """A LoRA adapter for a base that `write_base` wrote, as PEFT saves it, with B drawn as if it were trained."""
    bert = "Bert" in (base / "config.json").read_text(encoding="utf-8")
    auto: Any = AutoModelForSequenceClassification if bert else AutoModelForCausalLM
    settings = {"r": 3, "lora_alpha": 6, "target_modules": "all-linear", "task_type": "SEQ_CLS" if bert else "CAUSAL_LM"} | settings
    torch.manual_seed(1)
    model = get_peft_model(auto.from_pretrained(base), LoraConfig(**settings))
    random_adapter(model).save_pretrained(str(folder), save_embedding_layers=False)
    return folder


def stop_at(monkeypatch: pytest.MonkeyPatch, call: int, how: BaseException) -> None:
    """Makes the loss of the ``call``-th batch end the training as ``how`` says."""
    original, calls = RecipeTrainer.compute_loss, []

    def compute_loss(self: RecipeTrainer, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == call:
            raise how
        return original(self, *args, **kwargs)

    monkeypatch.setattr(RecipeTrainer, "compute_loss", compute_loss)


def weights(adapter: Path) -> dict[str, torch.Tensor]:
    return load_file(adapter / "adapter_model.safetensors")


def assert_same_adapter(one: Path, other: Path) -> None:
    mine, theirs = weights(one), weights(other)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
