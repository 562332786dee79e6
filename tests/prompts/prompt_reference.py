"""SPT from its formulas, slowly: one text at a time, without padding or cache, prompts concatenated by hand around plain layers.

Nothing here is shared with gatewise.prompts but the adapter's numbers. Rotary positions count from the first prompt token.
"""

import copy
import math
from functools import cache
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn


def plain_copy(model: PeftModel) -> Any:
    """The base model alone, with the modules that the active adapter saves in place of its own."""
    return copy.deepcopy(model).unload()


def adapter_numbers(model: PeftModel, adapter: str = "default") -> dict[int, dict[str, Tensor]]:
    """Layer -> parameter name -> value, "gate" among them if there is one."""
    found: dict[int, dict[str, Tensor]] = {}
    for path, value in model.named_parameters():
        parts = path.split(".")
        if "selective_prompt" not in parts or adapter not in parts:
            continue
        layer = int(parts[parts.index("selective_prompt") - 1])
        found.setdefault(layer, {})["gate" if "spt_gate_logit" in parts else parts[-1]] = value
    return found


def matrix(numbers: dict[str, Tensor], name: str) -> Tensor:
    """A projection; a PHM one as an explicit sum of Kronecker products."""
    if name in numbers:
        return numbers[name]
    a, b = numbers[f"{name}_a"], numbers[f"{name}_b"]
    total: Tensor = sum(torch.kron(a[i], b[i]) for i in range(len(a)))  # type: ignore[assignment]
    return total


def generated(hidden: Tensor, numbers: dict[str, Tensor], config: Any) -> Tensor:
    """p^new (l, d) of the hidden states (k, d) that are read."""
    tokens = [h / torch.sqrt((h * h).mean() + 1e-6) if config.normalize_states else h for h in hidden]
    activation = {"gelu": nn.functional.gelu, "relu": torch.relu, "tanh": torch.tanh, "identity": lambda x: x}[config.activation]
    projected = [matrix(numbers, "down") @ h for h in tokens]
    prompt = []
    for j in range(config.num_prompt_tokens):
        first = math.floor(j * len(tokens) / config.num_prompt_tokens)
        last = math.ceil((j + 1) * len(tokens) / config.num_prompt_tokens)
        pooled: Any = sum(projected[first:last]) / (last - first)
        prompt.append(matrix(numbers, "up") @ activation(pooled))
    return torch.stack(prompt)


def mixture(propagated: Tensor, new: Tensor, share: Tensor, balanced: bool) -> Tensor:
    """p (l, d) of p^propagated and p^new; balanced, token by token by their directions."""
    if not balanced:
        return (1 - share) * propagated + share * new
    tokens = []
    for old, fresh in zip(propagated, new, strict=True):
        sizes = [((p * p).mean() + 1e-6) ** 0.5 for p in (old, fresh)]
        size = torch.exp((1 - share) * sizes[0].log() + share * sizes[1].log())
        tokens.append(size * ((1 - share) * old / sizes[0] + share * fresh / sizes[1]))
    return torch.stack(tokens)


@cache
def mask_of(prompts: int, tokens: int, causal: bool, window: int | None) -> Tensor:
    """What is added to scores (1, 1, p + t, p + t), cell by cell."""
    size = prompts + tokens
    mask = torch.zeros(size, size)
    for i in range(size):
        for j in range(size):
            seen = j <= i if causal else True
            if window is not None and i >= prompts and j >= prompts:
                seen = seen and i - j < window
            if not seen:
                mask[i, j] = torch.finfo(torch.float32).min
    return mask[None, None]


def last_hidden(
    base: Any,
    model: PeftModel,
    ids: Tensor,
    read: int | None = None,
    gates: Any = None,
    adapter: str = "default",
) -> tuple[Tensor, list[Tensor]]:
    """Hidden states (t, d) of one text ``ids`` (t,) above the last layer, and those below each layer.

    Args:
        read: how many tokens are the prompt that generators read; None for all.
        gates: layer -> a, in place of the adapter's own; below the first that is not zero there is no prompt.
    """
    config: Any = model.peft_config[adapter]
    numbers = adapter_numbers(model, adapter)
    inner, kind = base.base_model, base.config.model_type
    causal = kind not in ("bert", "roberta")
    layers = inner.h if kind == "gpt2" else inner.layers if causal else inner.encoder.layer
    hidden = _embedded(inner, ids, kind)[0]
    prompt: Tensor | None = None
    below = []
    for index, layer in enumerate(layers):
        below.append(hidden)
        if index in numbers:
            logit = numbers[index].get("gate")
            a: Any = 1.0 if logit is None else torch.sigmoid(logit)
            a = a if gates is None else gates[index]
            new = generated(hidden[:read], numbers[index], config)
            propagated = torch.zeros_like(new) if prompt is None else prompt
            if prompt is not None or a != 0:
                balanced = causal if config.balanced is None else config.balanced
                share = config.tau * torch.as_tensor(a, dtype=new.dtype)
                prompt = mixture(propagated, new, share, balanced and prompt is not None)
        length = 0 if prompt is None else len(prompt)
        both = hidden if prompt is None else torch.cat([prompt, hidden])
        layer_type = getattr(base.config, "layer_types", [None] * len(layers))[index]
        windowed = layer_type == "sliding_attention" or kind == "mistral"
        window = base.config.sliding_window if windowed else None
        mask = mask_of(length, len(ids), causal, window).to(both.dtype)
        if kind == "gpt2":
            out = layer(both[None], None, mask)
        elif causal:
            positions = torch.arange(len(both))[None]
            extra = (layer_type,) if kind == "gemma3_text" else ()
            out = layer(both[None], attention_mask=mask, position_embeddings=inner.rotary_emb(both[None], positions, *extra))
        else:
            out = layer(both[None], mask)
        both = out[0] if isinstance(out, Tensor) else out[0][0]
        prompt, hidden = (both[:length] if length else None), both[length:]
    return hidden, below


def logits(base: Any, model: PeftModel, ids: Tensor, **settings: Any) -> Tensor:
    """(t, V) of a language model or a classifier of tokens, (c,) of a classifier."""
    hidden = last_hidden(base, model, ids, **settings)[0]
    inner, kind, name = base.base_model, base.config.model_type, type(base).__name__
    if kind in ("bert", "roberta"):
        if "MaskedLM" in name:
            return (base.cls if kind == "bert" else base.lm_head)(hidden[None])[0]
        return (base.classifier(inner.pooler(hidden[None])) if kind == "bert" else base.classifier(hidden[None]))[0]
    hidden = (inner.ln_f if kind == "gpt2" else inner.norm)(hidden)
    if "SequenceClassification" in name:
        return base.score(hidden[-1])
    return base.lm_head(hidden)


def _embedded(inner: Any, ids: Tensor, kind: str) -> Tensor:
    if kind == "gpt2":
        return inner.wte(ids[None]) + inner.wpe(torch.arange(len(ids))[None])
    if kind in ("bert", "roberta"):
        return inner.embeddings(input_ids=ids[None])
    return inner.embed_tokens(ids[None])
