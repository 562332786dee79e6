"""A finished (or half-finished) adapter -> plain LoRA that needs no gatewise to load."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor

from gatewise.adapters.files import CONFIG_NAME, WEIGHTS_NAME, AdapterFile, Factors, read_adapter
from gatewise.adapters.lora import active_adapter, rank_settings
from gatewise.errors import GatewiseError
from gatewise.files import whole_folder, write_json

_COMPANIONS = ("allocation.json", "gatewise.json")


def to_lora(
    model_or_dir: PeftModel | str | Path,
    out: str | Path,
    padded: bool = False,
    adapter: str | None = None,
) -> Path:
    """Writes an adapter as plain LoRA at its true ranks. Works for any LoRA adapter and for checkpoints in mid-training.

    Args:
        model_or_dir: a ``PeftModel`` (left as it is), or the folder of a saved adapter; the base model is not needed.
        out: the folder to write; it must not exist or be empty.
        padded: fold each module's scaling into its B and pad all modules to the largest rank with ``r = lora_alpha``, for
            engines that reject or ignore ``rank_pattern`` and ``alpha_pattern``.
        adapter: which adapter of a ``PeftModel``; None for the active one.

    Returns:
        The folder written.

    Raises:
        GatewiseError: not a LoRA adapter, damaged files, no rank left, or ``out`` cannot be written.
    """
    with _folder_of(model_or_dir, adapter) as folder:
        file = read_adapter(folder)
        if file.config.get("target_parameters"):
            raise GatewiseError(
                "the adapter adapts stacked experts (target_parameters), whose factors hold many experts at once: "
                "it can be loaded as it is, but not exported at other ranks"
            )
        modules = [compacted for module in file.modules if (compacted := _compact(module)) is not None]
        if not modules:
            raise GatewiseError(f"{model_or_dir if not isinstance(model_or_dir, PeftModel) else 'the adapter'} has no live rank")
        tensors = dict(file.others)
        if padded:
            largest = max(len(module.a) for module in modules)
            for module in modules:
                if module.bias is not None:  # PEFT multiplies the whole of B by the scaling, its bias (lora_bias=True) too
                    tensors[module.bias] = _scaled(tensors[module.bias], module.scaling)
            modules = [_pad(module, largest) for module in modules]
        config = _config(file, modules)
        for module in modules:
            tensors |= zip(module.keys, (module.a.contiguous(), module.b.contiguous()), strict=True)
        with whole_folder(out) as part:
            save_file(tensors, part / WEIGHTS_NAME, metadata={"format": "pt"} | file.metadata)
            write_json(part / CONFIG_NAME, config)
            for name in _COMPANIONS:
                if (folder / name).is_file():
                    shutil.copyfile(folder / name, part / name)
    return Path(out)


@contextmanager
def _folder_of(model_or_dir: PeftModel | str | Path, adapter: str | None) -> Iterator[Path]:
    if not isinstance(model_or_dir, PeftModel):
        yield Path(model_or_dir)
        return
    name = active_adapter(model_or_dir, adapter)
    with tempfile.TemporaryDirectory() as folder:
        model_or_dir.save_pretrained(folder, selected_adapters=[name])
        yield Path(folder) / ("" if name == "default" else name)


def _compact(module: Factors) -> Factors | None:
    """The module at its true rank, or None if nothing of it is left."""
    live = module.live().nonzero().flatten()
    if not len(live):
        if not module.extra:
            return None
        live = torch.zeros(1, dtype=torch.long)  # a magnitude or bias needs its module: keep one slot, which is zero
    return replace(module, a=module.a[live], b=module.b[:, live])


def _pad(module: Factors, rank: int) -> Factors:
    missing = rank - len(module.a)
    a = torch.cat([module.a, module.a.new_zeros(missing, *module.a.shape[1:])])
    b = _scaled(module.b, module.scaling)
    b = torch.cat([b, b.new_zeros(b.shape[0], missing, *b.shape[2:])], dim=1)
    return replace(module, a=a, b=b, scaling=1.0)


def _scaled(tensor: Tensor, scaling: float) -> Tensor:
    return (tensor.float() * scaling).to(tensor.dtype)


def _config(file: AdapterFile, modules: list[Factors]) -> dict[str, Any]:
    ranks = {module.path: len(module.a) for module in modules}
    settings = rank_settings(ranks, {module.path: module.scaling for module in modules})
    config = file.config | settings | {"use_rslora": False, "inference_mode": True}
    if len(modules) < len(file.modules):
        # A name such as "q_proj" would bring back the modules that are gone.
        config["target_modules"] = sorted(ranks)
    return config
