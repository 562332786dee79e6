"""Adapters on disk: the names of their files, and the one reader of all of them."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gatewise.adapters.lora import PEFT_PREFIX
from gatewise.errors import GatewiseError

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"


# PEFT's names of the two factors: A has the ranks along its first axis, B along its second, whatever the kind of layer.
_FACTORS = {".lora_A.weight": "A", ".lora_B.weight": "B", ".lora_embedding_A": "A", ".lora_embedding_B": "B"}


@dataclass(frozen=True)
class Factors:
    """One module of an adapter on disk.

    Attributes:
        path: the module's path in the base model.
        a: (r, d_in ...) first factor.
        b: (d_out, r ...) second factor.
        scaling: what B A is multiplied by.
        keys: the names of a and b in the file.
        bias: the name of B's bias in the file, or None.
        extra: whether the module also has a trained magnitude (DoRA) or bias.
    """

    path: str
    a: Tensor
    b: Tensor
    scaling: float
    keys: tuple[str, str]
    bias: str | None
    extra: bool

    def live(self) -> Tensor:
        """(r,) bool: slots that are not zero in both factors."""
        return (self.a != 0).flatten(1).any(dim=1) | (self.b.transpose(0, 1) != 0).flatten(1).any(dim=1)


@dataclass(frozen=True)
class AdapterFile:
    """A LoRA adapter as it lies on disk: its config, its modules and all tensors that are not factors."""

    config: dict[str, Any]
    modules: list[Factors]
    others: dict[str, Tensor]
    metadata: dict[str, str]


def read_adapter(folder: str | Path) -> AdapterFile:
    """Reads a LoRA adapter from its folder, without its base model.

    Raises:
        GatewiseError: a file is missing or damaged, or the adapter is not LoRA.
    """
    folder = Path(folder)
    config = read_config(folder)
    tensors: dict[str, Tensor] = {}
    path = folder / WEIGHTS_NAME
    if not path.is_file():
        hint = " (adapter_model.bin is a pickle and is not read; save it again with PEFT)" if (
            folder / "adapter_model.bin"
        ).is_file() else ""  # fmt: skip
        raise GatewiseError(f"{folder} has no {WEIGHTS_NAME}{hint}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError) as error:
        raise GatewiseError(f"{path} is damaged or cut off ({error}): copy or save the adapter again") from error
    factors: dict[str, dict[str, str]] = {}
    for key in tensors:
        for ending, factor in _FACTORS.items():
            if key.endswith(ending):
                factors.setdefault(key.removesuffix(ending).removeprefix(PEFT_PREFIX), {})[factor] = key
    modules = []
    for module, keys in factors.items():
        if keys.keys() != {"A", "B"}:
            raise GatewiseError(f"{path} has only factor {next(iter(keys))} of module {module}: save the adapter again")
        bias = keys["B"].removesuffix("weight") + "bias"
        bias_key = bias if bias in tensors else None
        extra = bias_key is not None or any(k.startswith(f"{PEFT_PREFIX}{module}.lora_magnitude") for k in tensors)
        a, b = tensors[keys["A"]], tensors[keys["B"]]
        modules.append(Factors(module, a, b, scaling_of(config, module), (keys["A"], keys["B"]), bias_key, extra))
    if not modules:
        raise GatewiseError(f"{path} has no LoRA factors: expected names ending in lora_A.weight and lora_B.weight")
    taken = {key for module in modules for key in module.keys}
    return AdapterFile(config, modules, {k: v for k, v in tensors.items() if k not in taken}, metadata)


_UNLIKE_LORA = {
    **dict.fromkeys(("SELECTIVE_PROMPT", "PROMPT_TUNING", "PREFIX_TUNING"), "whose prompts change no weights"),
    "ROUTED_LORA": "which chooses modules by the prompt",
}


def read_config(folder: str | Path) -> dict[str, Any]:
    """The ``adapter_config.json`` of a LoRA adapter.

    Raises:
        GatewiseError: it is missing, not JSON, or of another PEFT type.
    """
    path = Path(folder) / CONFIG_NAME
    if not path.is_file():
        raise GatewiseError(f"{folder} is not an adapter: it has no {CONFIG_NAME}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise GatewiseError(f"{path} is not valid JSON ({error}): save the adapter again") from error
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind in _UNLIKE_LORA:
        raise GatewiseError(f"{path} is of peft_type {kind!r}, {_UNLIKE_LORA[kind]}, so that no LoRA is like it: use it as it is")
    if kind != "LORA":
        raise GatewiseError(f"{path} is of peft_type {kind!r}, expected 'LORA'")
    return dict(config)


def scaling_of(config: dict[str, Any], path: str) -> float:
    """What PEFT multiplies B A of a module by, from the config: alpha / r, or alpha / sqrt(r) with rsLoRA, by its patterns."""
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    r = ranks.get(get_pattern_key(list(ranks), path), config.get("r", 8))  # PEFT's own defaults
    alpha = alphas.get(get_pattern_key(list(alphas), path), config.get("lora_alpha", 8))
    return float(alpha / (r**0.5 if config.get("use_rslora") else r))


NOTE_FILE = "gatewise.json"
