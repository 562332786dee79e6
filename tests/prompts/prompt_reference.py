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
def mask_of(prompts: int, tokens: int, causal: bool, window: int | None, images: tuple[int, ...] = ()) -> Tensor:
    """What is added to scores (1, 1, p + t, p + t), cell by cell. ``images``: which one a token is part of, 0 for none."""
    size = prompts + tokens
    mask = torch.zeros(size, size)
    for i in range(size):
        for j in range(size):
            seen = j <= i if causal else True
            if images and min(i, j) >= prompts and images[i - prompts] == images[j - prompts] > 0:
                seen = True  # an image sees all of itself
            if window is not None and i >= prompts and j >= prompts:
                seen = seen and i - j < window
            if not seen:
                mask[i, j] = torch.finfo(torch.float32).min
    return mask[None, None]


def bucket(distance: int, config: Any) -> int:
    """T5's number for how far a key lies behind a query (Raffel et al., 2020), of a text that is read in both directions."""
    half = config.relative_attention_num_buckets // 2
    exact, far = half // 2, abs(distance)
    side = half if distance > 0 else 0
    if far < exact:
        return side + far
    steps = math.log(far / exact) / math.log(config.relative_attention_max_distance / exact) * (half - exact)
    return side + min(half - 1, exact + int(steps))


def relative_biases(table: Tensor, prompts: int, tokens: int, config: Any) -> Tensor:
    """T5's position biases (1, heads, p + t, p + t) from a table (buckets, heads), cell by cell, the prompt at positions −p..−1."""
    places = range(-prompts, tokens)
    rows = [torch.stack([table[bucket(key - query, config)] for key in places]) for query in places]
    return torch.stack(rows).permute(2, 0, 1)[None]


def numbered_images(ids: Tensor, token: int) -> tuple[int, ...]:
    """Which image a token is part of, from one, 0 for none: images are runs of the one token."""
    numbers, images, before = [], 0, False
    for one in ids.tolist():
        images += one == token and not before
        before = one == token
        numbers.append(images if before else 0)
    return tuple(numbers)


def last_hidden(
    base: Any,
    model: PeftModel,
    ids: Tensor,
    read: int | None = None,
    gates: Any = None,
    adapter: str = "default",
    pixels: Tensor | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """Hidden states (t, d) of one text ``ids`` (t,) above the last layer, and those below each layer.

    Args:
        read: how many tokens are the prompt that generators read; None for all.
        gates: layer -> a, in place of the adapter's own; below the first that is not zero there is no prompt.
        pixels: (images, 3, height, width) of the text's images.
    """
    config: Any = model.peft_config[adapter]
    numbers = adapter_numbers(model, adapter)
    inner, kind = getattr(base.base_model, "language_model", base.base_model), base.config.model_type
    is_bert, is_t5 = kind in ("bert", "roberta"), kind in ("t5", "mt5")
    crosses = is_t5 or base.config.is_encoder_decoder
    causal = not is_bert and not crosses
    layers = inner.get_submodule("h" if kind == "gpt2" else "layers" if causal else f"encoder.{_LAYERS.get(kind, 'layers')}")
    hidden = _embedded(base, inner, ids, kind)[0]
    images = () if pixels is None else numbered_images(ids, base.config.image_token_id)
    if pixels is not None:
        seen = base.base_model.multi_modal_projector(base.base_model.vision_tower(pixels).last_hidden_state)
        hidden[ids == base.config.image_token_id] = seen.flatten(0, 1)
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
                balanced = not is_bert and kind not in ("bart", "marian") if config.balanced is None else config.balanced
                share = config.tau * torch.as_tensor(a, dtype=new.dtype)
                prompt = mixture(propagated, new, share, balanced and prompt is not None)
        length = 0 if prompt is None else len(prompt)
        both = hidden if prompt is None else torch.cat([prompt, hidden])
        layer_type = getattr(base.config.get_text_config(), "layer_types", [None] * len(layers))[index]
        windowed = layer_type == "sliding_attention" or kind == "mistral"
        window = base.config.get_text_config().sliding_window if windowed else None
        mask = mask_of(length, len(ids), causal, window, images).to(both.dtype)
        if is_t5:
            table = layers[0].layer[0].SelfAttention.relative_attention_bias.weight
            out = layer(both[None], position_bias=relative_biases(table, length, len(ids), base.config))
        elif kind == "gpt2":
            out = layer(both[None], None, mask)
        elif causal:
            positions = torch.arange(len(both))[None]
            extra = (layer_type,) if kind in ("gemma3", "gemma3_text") else ()
            out = layer(both[None], attention_mask=mask, position_embeddings=inner.rotary_emb(both[None], positions, *extra))
        else:
            out = layer(both[None], mask)
        both = out[0] if isinstance(out, Tensor) else out[0][0]
        prompt, hidden = (both[:length] if length else None), both[length:]
    return hidden, below


def logits(base: Any, model: PeftModel, ids: Tensor, **settings: Any) -> Tensor:
    """(t, V) of a language model or a classifier of tokens, (c,) of a classifier."""
    hidden = last_hidden(base, model, ids, **settings)[0]
    inner, kind = getattr(base.base_model, "language_model", base.base_model), base.config.model_type
    name = type(base).__name__
    if name == "T5ForTokenClassification":
        return base.classifier(inner.encoder.final_layer_norm(hidden))
    if kind in ("bert", "roberta"):
        if "MaskedLM" in name:
            return (base.cls if kind == "bert" else base.lm_head)(hidden[None])[0]
        return (base.classifier(inner.pooler(hidden[None])) if kind == "bert" else base.classifier(hidden[None]))[0]
    norm = {"gpt2": "ln_f", "phi": "final_layernorm"}.get(kind, "norm")
    hidden = inner.get_submodule(norm)(hidden)
    if "SequenceClassification" in name:
        return base.score(hidden[-1])
    return base.lm_head(hidden)


def decoded(base: Any, model: PeftModel, ids: Tensor, written: Tensor, **settings: Any) -> Tensor:
    """Logits (n, V) of an encoder-decoder model for what its decoder reads (n,): it sees the encoder's text, and no prompts."""
    hidden = last_hidden(base, model, ids, **settings)[0]
    norm = next((one for name, one in base.get_encoder().named_children() if name in ("final_layer_norm", "layer_norm")), None)
    hidden = hidden if norm is None else norm(hidden)
    return base(encoder_outputs=(hidden[None],), decoder_input_ids=written[None]).logits[0]


_LAYERS = {"bert": "layer", "roberta": "layer", "t5": "block", "mt5": "block"}


def _embedded(base: Any, inner: Any, ids: Tensor, kind: str) -> Tensor:
    if kind == "gpt2":
        return inner.wte(ids[None]) + inner.wpe(torch.arange(len(ids))[None])
    if kind in ("bert", "roberta"):
        return inner.embeddings(input_ids=ids[None])
    if hasattr(inner, "encoder"):
        return inner.encoder(input_ids=ids[None], output_hidden_states=True).hidden_states[0]
    return inner.embed_tokens(ids[None])
