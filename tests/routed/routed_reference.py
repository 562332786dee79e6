"""MiLoRA from its formulas, slowly: a row at a time, gates in plain Python, and kept experts merged into a plain copy of the base.

Nothing here is shared with gatewise.routed but the adapter's numbers.
"""

import math
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers.pytorch_utils import Conv1D

LAYERS = {"llama": "model.layers", "gpt2": "transformer.h", "bert": "bert.encoder.layer"}
EXPERTS = {
    "llama": [
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    ],
    "gpt2": ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"],
    "bert": [
        "attention.self.query",
        "attention.self.key",
        "attention.self.value",
        "attention.output.dense",
        "intermediate.dense",
        "output.dense",
    ],
}


def pool(hidden: list[list[float]], pooler: str, w: list[float] | None) -> list[float]:
    """One vector of the prompt's hidden states, a list of tokens."""
    dims = range(len(hidden[0]))
    if pooler == "last":
        return hidden[-1]
    if pooler == "max":
        return [max(token[d] for token in hidden) for d in dims]
    if pooler == "mean":
        weights = [1 / len(hidden)] * len(hidden)
    else:
        scores = [math.exp(sum(token[d] * w[d] for d in dims)) for token in hidden]
        weights = [score / sum(scores) for score in scores]
    return [sum(weight * token[d] for weight, token in zip(weights, hidden, strict=True)) for d in dims]


def activate(x: float, activation: str, a: list[float], b: list[float]) -> float:
    """g(x); a_0 to a_6 and b_1 to b_5."""
    if activation == "identity":
        return x
    if activation == "relu":
        return max(x, 0.0)
    if activation == "gelu":
        return 0.5 * x * (1 + math.erf(x / math.sqrt(2)))
    return sum(a_j * x**j for j, a_j in enumerate(a)) / (1 + abs(sum(b_i * x**i for i, b_i in enumerate(b, start=1))))


def divided_by_rms(token: list[float]) -> list[float]:
    """A token's hidden state with a root mean square of one."""
    rms = math.sqrt(sum(x * x for x in token) / len(token) + 1e-6)
    return [x / rms for x in token]


def probabilities(
    hidden: list[list[float]], router: nn.Module, pooler: str, activation: str, normalize: bool = True
) -> list[float]:
    """softmax(g((pool(H) - c) / s) W_r), c and s of the prompts that were observed, if any were."""
    hidden = [divided_by_rms(token) for token in hidden] if normalize else hidden
    numbers = {name: parameter.detach().double().tolist() for name, parameter in router.named_parameters()}
    a = [value / 5**j for j, value in enumerate(numbers.get("numerator", []))]
    b = [value / 5**i for i, value in enumerate(numbers.get("denominator", []), start=1)]
    pooled = pool(hidden, pooler, numbers.get("pool"))
    if router.center_states and float(router.observed):
        s = math.sqrt(float(router.spread))
        pooled = [(x - c) / s for x, c in zip(pooled, router.center.double().tolist(), strict=True)]
    h = [activate(x, activation, a, b) for x in pooled]
    logits = [sum(w * x for w, x in zip(row, h, strict=True)) for row in numbers["weight"]]
    return [math.exp(logit) / sum(map(math.exp, logits)) for logit in logits]


def gates(p: list[float], k: int, normalize: bool) -> list[float]:
    """The k largest, divided by their sum or not; zero elsewhere."""
    kept = sorted(range(len(p)), key=lambda i: -p[i])[:k]
    total = sum(p[i] for i in kept) if normalize else 1.0
    return [p[i] / total if i in kept else 0.0 for i in range(len(p))]


def balance(rows: list[list[float]]) -> float:
    """m Σ f_i p̂_i over the prompts of a batch."""
    m, b = len(rows[0]), len(rows)
    f = [sum(max(range(m), key=lambda j: p[j]) == i for p in rows) / b for i in range(m)]
    return m * sum(f[i] * sum(p[i] for p in rows) / b for i in range(m))


def merged(model: PeftModel, family: str, prompt: torch.Tensor, adapter: str = "default") -> tuple[Any, list[list[float]], list]:
    """The plain base model that a prompt's choice of experts amounts to, its gates (l, m), and its probabilities (l, m).

    Layer by layer: what enters a layer depends on the experts that the layers below it keep.

    Args:
        prompt: (1, t) token ids of one prompt, without padding.
    """
    plain = plain_copy(model)
    made = []
    for index, layer in enumerate(plain.get_submodule(LAYERS[family])):
        hidden = entering(layer, partial(plain, input_ids=prompt))
        path = f"{LAYERS[family]}.{index}"
        made.append(merge_layer(model, adapter, layer, path, EXPERTS[family], hidden))
    return plain, [gate for gate, _ in made], [p for _, p in made]


def entering(layer: nn.Module, run: Callable[[], Any]) -> torch.Tensor:
    """(t, d): the hidden states that enter a layer when one row is run."""
    seen = []
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        run()
    handle.remove()
    return seen[0][0]


def merge_layer(
    model: PeftModel, adapter: str, layer: nn.Module, path: str, names: list[str], hidden: torch.Tensor
) -> tuple[list[float], list[float]]:
    """Merges what a layer keeps, routed by ``hidden`` (t, d), into the plain layer; its gates (m) and probabilities (m)."""
    config = model.peft_config[adapter]
    experts = {name: model.base_model.model.get_submodule(f"{path}.{name}") for name in names}
    experts = {name: expert for name, expert in experts.items() if adapter in getattr(expert, "lora_A", ())}
    router = next(iter(experts.values())).prompt_router[adapter]
    p = probabilities(hidden.double().tolist(), router, config.pooler, config.activation, config.normalize_states)
    gate = gates(p, config.top_k, config.normalize_gates)
    for (name, expert), value in zip(experts.items(), gate, strict=True):
        target = layer.get_submodule(name)
        delta = value * expert.scaling[adapter] * expert.lora_B[adapter].weight.detach() @ expert.lora_A[adapter].weight.detach()
        target.weight.data += (delta.T if isinstance(target, Conv1D) else delta).to(target.weight.dtype)
    return gate, p


def plain_copy(model: PeftModel) -> Any:
    """The base model without any adapter, apart from the given one."""
    return deepcopy(model).unload().eval()
