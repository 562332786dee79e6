"""What serving engines must be told of LoRA adapters: ``serving.json``."""

import re
from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from gatewise.adapters.files import LoraAdapter

SERVING_FILE = "serving.json"
ROUTED, ROUTER = "ROUTED_LORA", "lora_router"
"""The type of routed adapters, and what stands in the names of their routers' tensors."""
CPU_LORA = "GATEWISE_CPU_LORA"
"""The environment variable that has the plug-in for vLLM multiply plain LoRA on processors too; ``gatewise serve`` sets it."""
NOT_SERVED = (
    "layer_replication", "megatron_config", "alora_invocation_tokens", "arrow_config", "velora_config", "monteclora_config",
    "use_bdlora", "kasa_config", "use_qalora",
)  # fmt: skip
"""Settings of LoRA that need more than the weights, or another base model."""
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM (0.32 and 0.33) takes as ``--max-lora-rank``."""

# What vLLM packs into one module, by the names in Transformers.
_PACKED = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "qkv_proj"),
    **dict.fromkeys(("gate_proj", "up_proj"), "gate_up_proj"),
    **dict.fromkeys(("in_proj_qkv", "in_proj_z"), "in_proj_qkvz"),
    **dict.fromkeys(("in_proj_b", "in_proj_a"), "in_proj_ba"),
}
# What stands before "layers." in vLLM, by Transformers' model_type of the base. In these models all that follows is called as in
# Transformers. Text models that are a part of one that also reads images can be served as either.
_TEXT, _WITH_IMAGES = ("model",), ("language_model.model",)
_BEFORE = {
    **dict.fromkeys(("gemma", "gemma2", "granite", "llama", "mistral", "phi3", "qwen2", "qwen3"), _TEXT),
    **dict.fromkeys(("gemma3", "llava", "mistral3", "qwen2_5_vl", "qwen2_vl", "qwen3_5", "qwen3_vl"), _WITH_IMAGES),
    **dict.fromkeys(("gemma3_text", "qwen3_5_text"), (*_TEXT, *_WITH_IMAGES)),
}
_LAYER = re.compile(r"model\.(?:language_model\.)?(layers\.\d+\.\w+)")


def serving_settings(adapter: LoraAdapter, model_type: str | None) -> dict[str, Any]:
    """What serving engines must be told of an adapter.

    vLLM runs its LoRA kernels on every module that any adapter could adapt, unless ``--lora-target-modules`` names those that are,
    and reserves room for ``--max-lora-rank``. A module that it is not told of loses its LoRA without a word. It takes no DoRA, no
    biases, no modules that were trained as a whole and nothing of ``NOT_SERVED``. A routed adapter needs gatewise beside vLLM, no
    graphs, and whole prompts, unless it chooses by the last token of a prompt that it otherwise leaves to the base model.

    Args:
        model_type: of the base model, as Transformers calls it. Where it is not known what vLLM calls the modules of such a model,
            they are given by kind, which holds in all layers.
    """
    paths = sorted(module.path for module in adapter.modules)
    rank = max(len(module.a) // (module.blocks if module.stacked else 1) for module in adapter.modules)
    declared = [adapter.config.get("r"), *(adapter.config.get("rank_pattern") or {}).values()]  # vLLM refuses more of these too
    rank = max(rank, *(one for one in declared if isinstance(one, int)), 1)
    others = [name for name in adapter.others if f".{ROUTER}." not in name]
    extra = any(module.others for module in adapter.modules) or bool(others) or any(map(adapter.config.get, NOT_SERVED))
    routed = adapter.config.get("peft_type") == ROUTED
    whole = routed and not leaves_prefixes_alone(adapter.config)
    return _settings(paths, rank, adapter.config.get("base_model_name_or_path"), model_type, extra, routed, whole)


def leaves_prefixes_alone(config: Mapping[str, Any]) -> bool:
    """Whether the base model reads the prompts of a routed adapter, up to the last token, by which alone it chooses.

    Such a prompt may be read in pieces, and its keys and values are anybody's.

    Args:
        config: the adapter's.
    """
    return (config.get("peft_type"), config.get("adapt"), config.get("pooler")) == (ROUTED, "after_prompt", "last")


def model_type_of(model: nn.Module) -> str | None:
    """What Transformers calls the kind of a base model, under an adapter or not; None for one that is not of Transformers."""
    return getattr(getattr(model, "config", None), "model_type", None)


def settings_together(settings: list[dict[str, Any]]) -> dict[str, Any]:
    """The settings of an engine that serves several adapters of one base."""
    modules = sorted({path for one in settings for path in one["modules"]})
    rank = max(one["largest_rank"] for one in settings)
    first = settings[0]
    extra, routed = any(one["vllm"] is None for one in settings), any(one["routed"] for one in settings)
    whole = any(one["whole_prompts"] for one in settings)
    return _settings(modules, rank, first["base_model"], first["model_type"], extra, routed, whole)


def _settings(
    modules: list[str], rank: int, base: str | None, model_type: str | None, extra: bool, routed: bool, whole_prompts: bool
) -> dict[str, Any]:
    allowed = next((one for one in VLLM_RANKS if one >= rank), None)
    vllm: dict[str, Any] | None = None
    if not extra and allowed is not None:
        names = sorted({name for path in modules for name in _vllm_names(path, model_type)})
        limits = [*(["--no-enable-chunked-prefill"] if whole_prompts else []), *(["--enforce-eager"] if routed else [])]
        arguments = ["--enable-lora", "--max-lora-rank", str(allowed), *limits, "--lora-target-modules", *names]
        vllm = {"max_lora_rank": allowed, "arguments": arguments}
    return {
        "format": 1, "base_model": base, "model_type": model_type, "modules": modules, "largest_rank": rank, "routed": routed,
        "whole_prompts": whole_prompts, "vllm": vllm,
    }  # fmt: skip


def is_told(path: str, told: Collection[str], model_type: str | None) -> bool:
    """Whether vLLM keeps the LoRA of a module where ``--lora-target-modules`` are those: by kind, or by all of its full names."""
    above, _, kind = path.rpartition(".")
    # Experts are one module in vLLM, whatever it is that each has within.
    kinds = {"experts"} if ".experts" in path else {kind, _PACKED.get(kind, kind)}
    if not kinds.isdisjoint(told):
        return True
    return any(
        {f"{owner}.{kind}", f"{owner}.{_PACKED.get(kind, kind)}"} <= set(told) for owner in _owners(above, model_type) or [above]
    )


def _owners(above: str, model_type: str | None) -> list[str]:
    """What the module above another one may be called in vLLM, as far as that is known."""
    before = _BEFORE.get(model_type or "", ())
    if before and (layer := _LAYER.fullmatch(above)):
        return [f"{one}.{layer[1]}" for one in before]
    if before and above.startswith(("model.visual.", "model.vision_tower.")):
        return [above.removeprefix("model.")]
    return []


def _vllm_names(path: str, model_type: str | None) -> list[str]:
    """What the module, or the one that it is packed into, may be called in vLLM. Names that a base does not have do nothing."""
    above, _, kind = path.rpartition(".")
    owners = _owners(above, model_type)
    if not owners:
        return ["experts"] if ".experts" in path else [kind]
    return [f"{owner}.{one}" for owner in owners for one in (kind, _PACKED.get(kind, kind))]
