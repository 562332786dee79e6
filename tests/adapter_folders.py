"""LoRA adapters on disk, written by hand."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file


def write_folder(
    folder: Path,
    tensors: dict[str, torch.Tensor],
    allocation: Any = None,
    **config: Any,
) -> Path:
    """An adapter folder by hand: module path -> factors are given as ``path.lora_A.weight`` without PEFT's prefix."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({f"base_model.model.{key}": value for key, value in tensors.items()}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8, **config}))
    if allocation is not None:
        (folder / "allocation.json").write_text(json.dumps(allocation))
    return folder


def random_factors(path: str, r: int = 4, d_in: int = 6, d_out: int = 5) -> dict[str, torch.Tensor]:
    return {f"{path}.lora_A.weight": torch.randn(r, d_in), f"{path}.lora_B.weight": torch.randn(d_out, r)}


def a_round(number: int, ranks: dict[str, int], **changes: Any) -> dict[str, Any]:
    entry = {"round": number, "step": 10 * number, "scores": {}, "pruned": {}, "grown": {}, "ranks": ranks}
    return {**entry, "loss_before": 1.5, "loss_after": 1.25, "seconds": 0.1, **changes}
