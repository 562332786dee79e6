"""PEFT's soft prompts on tiny models, and what such a model computes, run by hand."""

from typing import Any

import torch
from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model
from transformers import DynamicCache

TOKENS = 3


def soft_prompted(base: Any, kind: str, task: str = "CAUSAL_LM") -> Any:
    """The model with a random soft prompt of three tokens: "prompt" before the text, "prefix" before the keys of every layer."""
    config = (PromptTuningConfig if kind == "prompt" else PrefixTuningConfig)(num_virtual_tokens=TOKENS, task_type=task)
    return get_peft_model(base, config).eval()


def by_hand(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Logits of one text (t,) without padding: (t, V) of a decoder, (c,) of a classifier."""
    base, config = model.get_base_model(), model.active_peft_config
    weight = model.prompt_encoder["default"].embedding.weight
    if isinstance(config, PromptTuningConfig):
        embedded = torch.cat([weight, base.get_input_embeddings()(ids)])[None]
        logits = base(inputs_embeds=embedded).logits[0]
        return logits[TOKENS:] if logits.ndim == 2 else logits
    cache = DynamicCache(config=base.config)
    for layer, both in enumerate(weight.view(TOKENS, config.num_layers, 2, config.num_attention_heads, -1).unbind(1)):
        keys, values = (part.transpose(0, 1)[None] for part in both.unbind(1))
        cache.update(keys, values, layer)
    return base(input_ids=ids[None], past_key_values=cache).logits[0]
