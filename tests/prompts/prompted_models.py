"""Tiny base models of every supported family, with selective prompts that look trained."""

from typing import Any

import torch
from peft import PeftModel, get_peft_model
from tiny_models import VOCABULARY
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    M2M100Config,
    M2M100ForConditionalGeneration,
    MarianConfig,
    MarianMTModel,
    MBartConfig,
    MBartForConditionalGeneration,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    MT5Config,
    MT5ForConditionalGeneration,
    PegasusConfig,
    PegasusForConditionalGeneration,
    Phi3Config,
    Phi3ForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
    T5ForTokenClassification,
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
# Images of 8 by 8 points, each four tokens of the text.
_VISION = {
    "image_size": 8,
    "patch_size": 2,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vision_use_head": False,
}
_IMAGES = {
    "text_config": _DECODER | _GEMMA,
    "vision_config": _VISION,
    "mm_tokens_per_image": 4,
    "boi_token_index": VOCABULARY - 3,
    "eoi_token_index": VOCABULARY - 2,
    "image_token_index": VOCABULARY - 1,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
# The texts of the tests are longer than T5's largest distance.
_T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 16,
    "d_kv": 4,
    "d_ff": 24,
    "num_layers": LAYERS,
    "num_heads": 4,
    "num_labels": VOCABULARY,
    "dropout_rate": 0.0,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 6,
    "decoder_start_token_id": 0,
}
_BART = {
    "vocab_size": VOCABULARY,
    "d_model": 16,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
    **{
        f"{side}_{name}": size
        for side in ("encoder", "decoder")
        for name, size in (("layers", LAYERS), ("attention_heads", 2), ("ffn_dim", 24))
    },
    **dict.fromkeys(("dropout", "attention_dropout", "activation_dropout", "encoder_layerdrop", "decoder_layerdrop"), 0.0),
}

DECODERS = ["llama", "gemma3", "gemma3-images", "qwen2", "qwen3", "gpt2", "mistral", "mixtral", "phi", "phi3"]
SLIDING = ["qwen2-sliding", "gemma3-sliding", "mistral-sliding"]
"""Decoders all of whose layers have a window."""
ENCODERS = ["bert", "roberta", "bert-mlm", "roberta-mlm", "t5-tokens"]
ENCODER_DECODERS = ["t5", "bart", "mt5", "marian", "mbart", "pegasus", "m2m_100"]
CLASSIFIERS = ["bert", "roberta", "llama-classifier", "gpt2-classifier"]
FAMILIES = DECODERS + ENCODERS + ["llama-classifier", "gpt2-classifier"]
_MODELS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaForCausalLM, LlamaConfig, _DECODER),
    "gemma3": (Gemma3ForCausalLM, Gemma3TextConfig, _DECODER | _GEMMA),
    "gemma3-images": (Gemma3ForConditionalGeneration, Gemma3Config, _IMAGES),
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
    "mixtral": (MixtralForCausalLM, MixtralConfig, _DECODER | {"num_local_experts": 3, "num_experts_per_tok": 2}),
    "phi": (PhiForCausalLM, PhiConfig, {**_DECODER, "partial_rotary_factor": 0.5, "resid_pdrop": 0.0}),
    "phi3": (Phi3ForCausalLM, Phi3Config, _DECODER),
    "bert": (BertForSequenceClassification, BertConfig, _ENCODER),
    "roberta": (RobertaForSequenceClassification, RobertaConfig, _ENCODER),
    "bert-mlm": (BertForMaskedLM, BertConfig, _ENCODER),
    "roberta-mlm": (RobertaForMaskedLM, RobertaConfig, _ENCODER),
    "t5-tokens": (T5ForTokenClassification, T5Config, _T5),
    "t5": (T5ForConditionalGeneration, T5Config, _T5),
    "mt5": (MT5ForConditionalGeneration, MT5Config, _T5),
    "bart": (BartForConditionalGeneration, BartConfig, _BART),
    "marian": (MarianMTModel, MarianConfig, _BART),
    "mbart": (MBartForConditionalGeneration, MBartConfig, _BART),
    "pegasus": (PegasusForConditionalGeneration, PegasusConfig, _BART),
    "m2m_100": (M2M100ForConditionalGeneration, M2M100Config, _BART),
    "llama-classifier": (LlamaForSequenceClassification, LlamaConfig, _DECODER | {"num_labels": 3}),
    "gpt2-classifier": (GPT2ForSequenceClassification, GPT2Config, _GPT2 | {"num_labels": 3}),
}


def prompted_base(family: str, attention: str = "sdpa", **more: Any) -> Any:
    """A three-layer random model without dropout, its weights and embeddings as large as trained ones."""
    model_class, config_class, settings = _MODELS[family]
    base = model_class(config_class(**settings | more, attn_implementation=attention))
    for name, parameter in base.named_parameters():
        if parameter.ndim > 1:
            large = any(part in name for part in ("embed", ".wte", "relative_attention_bias", "EncDecAttention.o"))
            small = ".q." in name  # T5's, which does not divide its scores
            torch.nn.init.normal_(parameter, std=1.0 if large else 0.125 if small else 0.25)
    for module in base.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return base.eval()


def task_of(family: str) -> str | None:
    if family in CLASSIFIERS:
        return "SEQ_CLS"
    if family in ENCODER_DECODERS:
        return "SEQ_2_SEQ_LM"
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
