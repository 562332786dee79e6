"""The settings that vLLM needs for LoRA adapters: ``serving.json``."""

import re
from collections.abc import Collection
from typing import Any

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
}
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "granite", "phi3")
"""Base models, by Transformers' ``model_type``, that ``make test-serve`` compares with PEFT: vLLM calls their layers as it does."""
_LAYER = re.compile(r"model\.layers\.\d+\.\w+")


def serving_settings(adapter: LoraAdapter, model_type: str | None) -> dict[str, Any]:
    """The settings that vLLM needs for an adapter.

    vLLM runs its LoRA kernels on every module that any adapter could adapt, unless ``--lora-target-modules`` names those that are,
    and reserves room for ``--max-lora-rank``. A module that it is not told of loses its LoRA without a word. It takes no DoRA, no
    biases, no modules that were trained as a whole and nothing of ``NOT_SERVED``. A routed adapter needs gatewise beside vLLM, no
    graphs, and whole prompts.

    Args:
        model_type: of the base model, as Transformers calls it. Where it is not known what vLLM calls the modules of such a model,
            they are given by kind, which holds in all layers.
    """
    paths = sorted(module.path for module in adapter.modules)
    rank = max(module.rank for module in adapter.modules)
    declared = [adapter.config.get("r"), *(adapter.config.get("rank_pattern") or {}).values()]  # vLLM refuses more of these too
    rank = max(rank, *(one for one in declared if isinstance(one, int)), 1)
    others = [name for name in adapter.others if f".{ROUTER}." not in name]
    extra = (
        any(module.others or module.a.ndim > 2 for module in adapter.modules)
        or bool(others)
        or any(map(adapter.config.get, NOT_SERVED))
    )
    routed = adapter.config.get("peft_type") == ROUTED
    return _settings(paths, rank, adapter.config.get("base_model_name_or_path"), model_type, extra, routed)


def settings_together(settings: list[dict[str, Any]]) -> dict[str, Any]:
    """The settings of an engine that serves several adapters of one base."""
    modules = sorted({path for one in settings for path in one["modules"]})
    extra, routed = any(one["vllm"] is None for one in settings), any(one["routed"] for one in settings)
    rank = max(one["largest_rank"] for one in settings)
    return _settings(modules, rank, settings[0]["base_model"], settings[0]["model_type"], extra, routed)


def _settings(modules: list[str], rank: int, base: str | None, model_type: str | None, extra: bool, routed: bool) -> dict[str, Any]:
    allowed = next((one for one in VLLM_RANKS if one >= rank), None)
    vllm: dict[str, Any] | None = None
    if not extra and allowed is not None:
        names = sorted({name for path in modules for name in _vllm_names(path, model_type)})
        limits = ["--no-enable-chunked-prefill", "--enforce-eager"] if routed else []
        arguments = ["--enable-lora", "--max-lora-rank", str(allowed), *limits, "--lora-target-modules", *names]
        vllm = {"max_lora_rank": allowed, "arguments": arguments}
    return {
        "format": 1, "base_model": base, "model_type": model_type, "modules": modules, "largest_rank": rank, "routed": routed,
        "vllm": vllm,
    }  # fmt: skip


def keeps_lora(path: str, named: Collection[str]) -> bool:
    """Whether vLLM keeps the LoRA of a module if ``--lora-target-modules`` are ``named``: by kind, or by full names."""
    above, _, kind = path.rpartition(".")
    # Experts are one module in vLLM, whatever it is that each has within.
    kinds = {"experts"} if ".experts" in path else {kind, _PACKED.get(kind, kind)}
    return not kinds.isdisjoint(named) or {f"{above}.{kind}", f"{above}.{_PACKED.get(kind, kind)}"} <= set(named)


def _vllm_names(path: str, model_type: str | None) -> list[str]:
    """The names in vLLM of a module, or of the one that it is packed into. Names that a base does not have do nothing."""
    above, _, kind = path.rpartition(".")
    if model_type in FAMILIES and _LAYER.fullmatch(above):
        return [f"{above}.{one}" for one in (kind, _PACKED.get(kind, kind))]
    return ["experts"] if ".experts" in path else [kind]
