"""Tiny base models of every supported family, with selective prompts that look trained."""

from typing import Any

import torch
from peft import PeftModel, get_peft_model
from tiny_models import VOCABULARY
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaForSequenceClassification,
    TrainingArguments,
)

from gatewise import SelectivePromptConfig

LAYERS = 3
_DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_ENCODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_labels": 3,
    "pad_token_id": 0,
    "max_position_embeddings": 40,
}
_GPT2 = {
    "vocab_size": VOCABULARY,
    "n_embd": 16,
    "n_layer": LAYERS,
    "n_head": 2,
    "n_positions": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Gemma's window is smaller than the texts of the tests, and one of its three layers sees everything.
_GEMMA = {
    "sliding_window": 4,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "query_pre_attn_scalar": 4,
    "tie_word_embeddings": False,
}
DECODERS = ["llama", "gemma3", "qwen2", "qwen3", "gpt2", "mistral"]
SLIDING = ["qwen2-sliding", "gemma3-sliding", "mistral-sliding"]
"""Decoders all of whose layers have a window."""
ENCODERS = ["bert", "roberta", "bert-mlm", "roberta-mlm"]
CLASSIFIERS = ["bert", "roberta", "llama-classifier", "gpt2-classifier"]
FAMILIES = DECODERS + ENCODERS + ["llama-classifier", "gpt2-classifier"]
_MODELS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaForCausalLM, LlamaConfig, _DECODER),
    "gemma3": (Gemma3ForCausalLM, Gemma3TextConfig, _DECODER | _GEMMA),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, _DECODER),
    "qwen2-sliding": (
        Qwen2ForCausalLM,
        Qwen2Config,
        _DECODER | {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0},
    ),
    "gemma3-sliding": (Gemma3ForCausalLM, Gemma3TextConfig, _DECODER | _GEMMA | {"layer_types": ["sliding_attention"] * LAYERS}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, _DECODER),
    "gpt2": (GPT2LMHeadModel, GPT2Config, _GPT2),
    "mistral": (MistralForCausalLM, MistralConfig, _DECODER | {"sliding_window": None}),
    "mistral-sliding": (MistralForCausalLM, MistralConfig, _DECODER | {"sliding_window": 4}),
    "bert": (BertForSequenceClassification, BertConfig, _ENCODER),
    "roberta": (RobertaForSequenceClassification, RobertaConfig, _ENCODER),
    "bert-mlm": (BertForMaskedLM, BertConfig, _ENCODER),
    "roberta-mlm": (RobertaForMaskedLM, RobertaConfig, _ENCODER),
    "llama-classifier": (LlamaForSequenceClassification, LlamaConfig, _DECODER | {"num_labels": 3}),
    "gpt2-classifier": (GPT2ForSequenceClassification, GPT2Config, _GPT2 | {"num_labels": 3}),
}


def prompted_base(family: str, attention: str = "sdpa", **more: Any) -> Any:
    """A three-layer random model without dropout, its weights and embeddings as large as trained ones."""
    model_class, config_class, settings = _MODELS[family]
    base = model_class(config_class(**settings | more, attn_implementation=attention))
    for name, parameter in base.named_parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=1.0 if "embed" in name or ".wte" in name else 0.25)
    for module in base.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return base.eval()


def task_of(family: str) -> str | None:
    if family in CLASSIFIERS:
        return "SEQ_CLS"
    return "CAUSAL_LM" if family in DECODERS + SLIDING else None


def prompt_config(family: str = "llama", **settings: Any) -> SelectivePromptConfig:
    return SelectivePromptConfig(**{"num_prompt_tokens": 3, "bottleneck": 4, "task_type": task_of(family), **settings})


def open_gates(model: PeftModel) -> PeftModel:
    """Gives gates values of their own."""
    for name, parameter in model.named_parameters():
        if ".spt_gate_logit." in name:
            torch.nn.init.normal_(parameter, std=1.5)
    return model


def prompted(family: str = "llama", attention: str = "sdpa", **settings: Any) -> PeftModel:
    """A tiny model in evaluation mode with selective prompts."""
    return open_gates(get_peft_model(prompted_base(family, attention), prompt_config(family, **settings))).eval()


def hyper(family: str = "bert", **settings: Any) -> Any:
    """A network to be searched, the same each time."""
    torch.manual_seed(0)
    return get_peft_model(prompted_base(family), prompt_config(family, **settings))


def arguments(path: Any, kind: Any = TrainingArguments, **more: Any) -> Any:
    """Of a search of four steps."""
    settings = {"max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "report_to": [], "use_cpu": True}
    return kind(path, **{**settings, "save_strategy": "no", "disable_tqdm": True, "logging_steps": 2, **more})


def stopped(kind: Any) -> Any:
    """A Trainer that is interrupted after three steps."""

    class Stopped(kind):
        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            if self.state.global_step == 3:
                raise KeyboardInterrupt
            return super().training_step(*args, **kwargs)

    return Stopped
