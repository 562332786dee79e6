"""Tiny base models and adapters on them, saved as folders."""

from pathlib import Path

import torch
from peft import LoraConfig, TaskType, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast

from gatewise.models import load_model

IDS = torch.tensor([[1, 5, 9, 2, 7, 3]])


def tiny_tokenizer(*, pad: bool = False) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "<eos>": 1, "good": 2, "bad": 3, "<pad>": 4}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="<eos>")
    if pad:
        tokenizer.pad_token = "<pad>"
    return tokenizer


def llama_config(**changes: object) -> LlamaConfig:
    settings = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    settings |= {"num_attention_heads": 2, "num_key_value_heads": 2, "eos_token_id": 1, "tie_word_embeddings": True}
    return LlamaConfig(**(settings | changes))  # type: ignore[arg-type]


def bert_config(**changes: int) -> BertConfig:
    settings = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    return BertConfig(**(settings | {"num_attention_heads": 2} | changes))


def saved(model: PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def adapter_of(base: str | Path, out: Path, **settings: object) -> torch.Tensor:
    """Save an adapter with random weights; the logits of the adapted model."""
    task = TaskType(settings.pop("task_type", TaskType.CAUSAL_LM))
    labels = settings.pop("num_labels", None)
    model = load_model(base, task="classification" if labels else "causal", num_labels=labels)  # type: ignore[arg-type]
    config = LoraConfig(task_type=task, r=3, target_modules=settings.pop("target_modules", "all-linear"), **settings)
    adapted = get_peft_model(model, config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        logits = adapted(IDS).logits
    adapted.save_pretrained(out, save_embedding_layers=False)
    return logits
