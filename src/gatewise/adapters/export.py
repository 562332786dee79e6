"""Writes a trained or half-trained adapter as plain LoRA at its true ranks, which loads without gatewise."""

import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor

from gatewise.adapters.files import (
    ALLOCATION_FILE,
    CONFIG_FILE,
    NOTE_FILE,
    WEIGHTS_FILE,
    LoraAdapter,
    LoraModule,
    read_allocation,
    read_config,
    read_lora,
)
from gatewise.adapters.lora import active_adapter, rank_settings, start_at_any_rank, takes_out_of_base, target_settings
from gatewise.errors import GatewiseError
from gatewise.files import whole_folder, write_json

_LAYER = re.compile(r"\.\d+\.")
_MORE_THAN_LORA = ("kasa_config", "monteclora_config")  # they keep more numbers of each rank, or change the base model by the rank


def to_lora(
    model_or_dir: PeftModel | str | Path,
    out: str | Path,
    padded: bool = False,
    adapter: str | None = None,
    rank: int | None = None,
) -> Path:
    """Writes an adapter as plain LoRA at its true ranks. Works for any LoRA adapter and for checkpoints in mid-training.

    Args:
        model_or_dir: a ``PeftModel`` (left as it is), or the folder of a saved adapter; the base model is not needed.
        out: the folder to write; it must not exist or be empty.
        padded: fold each module's scaling into its B and pad all modules to the largest rank with ``r = lora_alpha``, for
            engines that reject or ignore ``rank_pattern`` and ``alpha_pattern``.
        adapter: which adapter of a ``PeftModel``; None for the active one.
        rank: pad to this rank, and write modules that rounds have left without ranks as zeros, so that adapters of different
            allocations have the same shapes: for hotswapping and weighted merging. Implies ``padded``.

    Returns:
        The folder written.

    Raises:
        GatewiseError: not a LoRA adapter, damaged files, no rank left, a ``rank`` that is too small, or ``out`` cannot be written.
    """
    with _folder_of(model_or_dir, adapter) as folder:
        check_plain_lora(folder)
        file = read_lora(folder)
        modules = [compacted for module in file.modules if (compacted := _compact(module, file)) is not None]
        if all(module.experts and not module.live().any() for module in modules):
            raise GatewiseError("the adapter has no live rank")
        if padded or rank is not None:
            largest = max(module.rank for module in modules)
            if rank is not None and rank < largest:
                raise GatewiseError(f"rank is {rank}, but the largest live rank is {largest}: give at least that")
            modules = [_pad(module, rank or largest) for module in modules]
            if rank is not None:
                modules += _without_ranks(folder, file, modules)
        tensors = dict(file.others)
        for module in modules:
            name_of_a, name_of_b = module.keys
            tensors |= {name_of_a: module.a.contiguous(), name_of_b: module.b.contiguous(), **module.others}
        with whole_folder(out) as part:
            save_file(tensors, part / WEIGHTS_FILE, metadata={"format": "pt"} | file.metadata)
            write_json(part / CONFIG_FILE, _config(file, modules, read_allocation(folder).ranks))
            for name in (NOTE_FILE, ALLOCATION_FILE):
                if (folder / name).is_file():
                    shutil.copyfile(folder / name, part / name)
            copy_tokenizer(folder, part)
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


def check_plain_lora(folder: Path) -> None:
    """Refuses an adapter of another kind than LoRA, or one that is only right at the rank that it was made with.

    Raises:
        GatewiseError: it is one.
    """
    config = read_config(folder)
    if config.get("peft_type") != "LORA":
        raise GatewiseError(f"{folder / CONFIG_FILE} is of peft_type {config.get('peft_type')!r}, expected 'LORA'")
    if takes_out_of_base(config.get("init_lora_weights")):
        raise GatewiseError(
            f"the adapter has init_lora_weights {config['init_lora_weights']!r}, for which PEFT changes the base model by the rank "
            "when it loads it: at other ranks it would be wrong. Convert it first: save_pretrained with "
            "path_initial_model_for_weight_conversion"
        )
    if more := [key for key in _MORE_THAN_LORA if config.get(key)]:
        raise GatewiseError(f"the adapter has {more[0]}, for which there is no plain LoRA: use it without exporting it")


def _compact(module: LoraModule, file: LoraAdapter) -> LoraModule | None:
    """The module at its true rank, or None if nothing of it is left."""
    if module.experts:  # they stay together, each with its own live slots first
        kept = module.live().sort(dim=1, descending=True, stable=True).indices[:, : max(1, int(module.live().sum(dim=1).max()))]
        rows, columns = (one.take_along_dim(kept[..., None], dim=1) for one in (module.rows, module.columns))
        return _stacked(module, rows, columns)
    base_layer = module.keys[0].rpartition(".lora_")[0] + ".base_layer."  # its bias, with bias="all" or "lora_only"
    live = module.live()[0].nonzero().flatten()
    if not len(live):
        if not module.others and not any(name.startswith(base_layer) for name in file.others):
            return None
        live = torch.zeros(1, dtype=torch.long)  # a magnitude or bias needs its module: keep one slot, which is zero
    return replace(module, a=module.a[live], b=module.b[:, live])


def _pad(module: LoraModule, rank: int) -> LoraModule:
    """The module with zeros up to ``rank`` and the scaling in B: PEFT multiplies all of B by it, B's bias (lora_bias) too."""
    scaling, missing = module.scaling, rank - module.rank
    if module.experts:
        rows, columns = (
            torch.cat([one, one.new_zeros(len(one), missing, one.shape[2])], dim=1)
            for one in (module.rows, _scaled(module.columns, scaling))
        )
        return replace(_stacked(module, rows, columns), scaling=1.0)
    b = _scaled(module.b, scaling)
    return replace(
        module,
        a=torch.cat([module.a, module.a.new_zeros(missing, *module.a.shape[1:])]),
        b=torch.cat([b, b.new_zeros(len(b), missing, *b.shape[2:])], dim=1),
        others={key: _scaled(one, scaling) if key.endswith(".lora_B.bias") else one for key, one in module.others.items()},
        scaling=1.0,
    )


def _without_ranks(folder: Path, file: LoraAdapter, modules: list[LoraModule]) -> list[LoraModule]:
    """The modules that are gone, as zeros of the shape that modules of their name have in other layers."""
    there = {module.path for module in modules}
    gone = [module.path for module in file.modules if module.path not in there]
    rounds = (path.partition("[")[0] for path in read_allocation(folder).ranks)  # which list the experts of a parameter
    gone += [path for path in rounds if path not in there and path not in gone]
    found = []
    for path in gone:
        like = {(one.a.shape, one.b.shape): one for one in modules if _LAYER.sub(".*.", one.path) == _LAYER.sub(".*.", path)}
        if len(like) != 1:
            raise GatewiseError(
                f"module {path} has no rank left, and its size cannot be told from other layers: leave rank out (--rank), and "
                "modules without ranks are left out too"
            )
        (one,) = like.values()
        keys = (one.keys[0].replace(one.path, path), one.keys[1].replace(one.path, path))
        found.append(replace(one, path=path, keys=keys, a=torch.zeros_like(one.a), b=torch.zeros_like(one.b), others={}))
    return found


def _stacked(module: LoraModule, rows: Tensor, columns: Tensor) -> LoraModule:
    """The module with these slots, (experts, r, d_in) and (experts, r, d_out), as PEFT stacks them."""
    return replace(module, a=rows.flatten(0, 1), b=columns.permute(2, 1, 0).flatten(1))


def _scaled(tensor: Tensor, scaling: float) -> Tensor:
    return (tensor.float() * scaling).to(tensor.dtype)


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copies the files of the tokenizer that an adapter brings along, if it does."""
    for pattern in (
        "tokenizer*",
        "special_tokens_map.json",
        "added_tokens.json",
        "chat_template*",
        "vocab*",
        "merges.txt",
        "*.model",
    ):
        for file in source.glob(pattern):
            shutil.copyfile(file, folder / file.name)


def _config(file: LoraAdapter, modules: list[LoraModule], earlier: Iterable[str]) -> dict[str, Any]:
    """The configuration of what is left of an adapter. ``earlier``: modules that it once had, some of which may be gone."""
    ranks = {module.path: module.rank for module in modules}
    settings = rank_settings(ranks, {module.path: module.scaling for module in modules})
    config = file.config | settings | {"use_rslora": False, "inference_mode": True}
    config["init_lora_weights"] = start_at_any_rank(config.get("init_lora_weights"))
    before = {module.path for module in file.modules}
    if ranks.keys() != before:
        # A name such as "q_proj" would bring back modules that are gone, and full paths would leave out those that come as zeros.
        left = {module.path for module in modules if not module.experts}
        # A list of names matches every module that ends so, and all of these were adapted. Which modules a regular expression
        # leaves out is in no file.
        config |= target_settings(left, [*before, *earlier], whole=isinstance(config.get("target_modules"), str))
    return config
