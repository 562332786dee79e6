"""Writes a trained or half-trained adapter as plain LoRA at its true ranks, which loads without gatewise."""

import copy
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor

from gatewise.adapters.difference import plain_lora, plain_module
from gatewise.adapters.files import (
    ALLOCATION_FILE,
    CONFIG_FILE,
    NOTE_FILE,
    VOCABULARY,
    WEIGHTS_FILE,
    LoraAdapter,
    LoraModule,
    base_of,
    read_allocation,
    read_config,
    read_lora,
)
from gatewise.adapters.lora import active_adapter, rank_settings, start_at_any_rank, takes_out_of_base, target_settings
from gatewise.errors import GatewiseError
from gatewise.files import check_new_folder, whole_folder, write_json

EXPORT_FILE = "export.json"
_LAYER = re.compile(r"\.\d+\.")
_MORE_THAN_LORA = ("kasa_config", "monteclora_config")  # they keep more numbers of each rank, or change the base model by the rank


def to_lora(
    model_or_dir: PeftModel | str | Path,
    out: str | Path,
    padded: bool = False,
    adapter: str | None = None,
    rank: int | None = None,
    *,
    plain: bool = True,
    keep: float | None = None,
    base: str | Path | None = None,
    device: str = "cpu",
    say: Callable[[str], None] | None = None,
) -> Path:
    """Writes an adapter of any kind as plain LoRA at its true ranks. Works for checkpoints in mid-training, too.

    LoRA (rank-stabilised, with patterns) and AdaLoRA are written as they are, without the base model. Of other kinds the difference
    that they make to the base model's weights is written: see ``gatewise.adapters.difference``. ``export.json`` in the new folder
    then says for each module which share of its difference is lost.

    Args:
        model_or_dir: a ``PeftModel`` (left as it is), or the folder of a saved adapter.
        out: the folder to write; it must not exist or be empty.
        padded: fold each module's scaling into its B and pad all modules to the largest rank with ``r = lora_alpha``, for
            engines that reject or ignore ``rank_pattern`` and ``alpha_pattern``.
        adapter: which adapter of a ``PeftModel``; None for the active one.
        rank: cut differences to this rank, pad to it, and write modules that rounds have left without ranks as zeros, so that
            adapters of different allocations have the same shapes: for hotswapping and weighted merging. Implies ``padded``.
        plain: False takes dead ranks away and nothing else, and refuses what is not LoRA: DoRA's magnitudes, biases, and modules
            that were trained as a whole stay, which PEFT loads and other engines do not.
        keep: the share of the energy (the sum of squares) of each module's difference that is kept, such as 0.9999. Without it and
            ``rank``, a difference keeps at most 64 ranks.
        base: the base model, if not the one that the adapter names.
        device: where differences are taken: "auto", "cpu", "cuda", "cuda:1" or "mps".
        say: told in a line what happens, and what is lost.

    Returns:
        The folder written.

    Raises:
        GatewiseError: the adapter cannot be plain LoRA, damaged files, no rank left, a ``rank`` that is too small, or ``out``
            cannot be written.
    """
    check_new_folder(out)
    with _folder_of(model_or_dir, adapter, any_kind=plain) as folder:
        if plain:
            found = plain_lora(
                folder, _copied(model_or_dir, adapter), base=base, device=device, rank=rank, keep=keep, say=say
            )  # fmt: skip
            file, lost = found.file, found.lost
        else:
            check_plain_lora(folder)
            file, lost = read_lora(folder), {}
        if say and keep is not None and not lost:
            say("keep changes nothing: this adapter is written exactly; gatewise compress makes a smaller one")
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
        stacks = plain and any(one.path.endswith(_STACKS) for one in modules)
        experts = _names_of_experts(folder, model_or_dir, base, say) if stacks else None
        settings: dict[str, Any] = {}
        if experts is not None:
            modules, settings = _apart(modules, experts)
        tensors = dict(file.others)
        for module in modules:
            name_of_a, name_of_b = module.keys
            tensors |= {name_of_a: module.a.contiguous(), name_of_b: module.b.contiguous(), **module.others}
        with whole_folder(out) as part:
            save_file(tensors, part / WEIGHTS_FILE, metadata={"format": "pt"} | file.metadata)
            write_json(part / CONFIG_FILE, _config(file, modules, read_allocation(folder).ranks) | settings)
            if lost:
                ranks = {module.path: module.rank for module in modules}
                told = {path: {"rank": ranks[path], "lost": one} for path, one in lost.items() if path in ranks}
                write_json(part / EXPORT_FILE, {"format": 1, "from": str(read_config(folder)["peft_type"]), "modules": told})
            # The ranks that rounds have left are not those of a difference.
            for name in (NOTE_FILE, *(() if lost else (ALLOCATION_FILE,))):
                if (folder / name).is_file():
                    shutil.copyfile(folder / name, part / name)
            copy_tokenizer(folder, part)
        if say and lost:
            worst = max(lost, key=lambda path: lost[path])
            more = " (for less, give more ranks, with --rank or --keep)" if lost[worst] > 0.01 else ""
            say(f"largest share of a difference that is lost: {lost[worst]:.2g}, in {worst}{more}; {EXPORT_FILE} has them all")
    return Path(out)


def _copied(model_or_dir: PeftModel | str | Path, adapter: str | None) -> Callable[[], PeftModel] | None:
    """Makes a copy of a model that is to stay as it is, with an adapter active; None for a folder."""
    if not isinstance(model_or_dir, PeftModel):
        return None
    model = model_or_dir

    def make() -> PeftModel:
        copied = copy.deepcopy(model)
        copied.set_adapter(adapter or copied.active_adapter)
        return copied

    return make


@contextmanager
def _folder_of(model_or_dir: PeftModel | str | Path, adapter: str | None, any_kind: bool) -> Iterator[Path]:
    if not isinstance(model_or_dir, PeftModel):
        yield Path(model_or_dir)
        return
    name = active_adapter(model_or_dir, adapter, any_kind)
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


# What engines call the matrices of an expert, and the module that has them, for kinds of base models in which it was tried. PEFT
# reads these names as well; Transformers stacks gate and up in "gate_up_proj", the others in "down_proj".
_EXPERTS = {
    "mixtral": ("block_sparse_moe", "w1", "w3", "w2"),
    **dict.fromkeys(("qwen2_moe", "qwen3_moe", "olmoe"), ("mlp", "gate_proj", "up_proj", "down_proj")),
}
_STACKS = (".experts.gate_up_proj", ".experts.down_proj")


def _names_of_experts(
    folder: Path, model_or_dir: PeftModel | str | Path, base: str | Path | None, say: Callable[[str], None] | None
) -> tuple[str, ...] | None:
    from gatewise.models.loading import load_config

    kind = model_or_dir.config.model_type if isinstance(model_or_dir, PeftModel) else None
    if kind is None and (name := base or base_of(folder)):
        with suppress(GatewiseError):  # whose base model is not at hand
            kind = str(load_config(name).model_type)
    if kind not in _EXPERTS and say:
        say(
            f"the experts stay stacked, as PEFT saves them: how engines call those of {kind or 'a base model that is not at hand'} "
            "is not known here; vLLM takes them so for gpt_oss and Qwen3-VL-MoE"
        )
    return _EXPERTS.get(kind or "")


def _apart(modules: list[LoraModule], names: tuple[str, ...]) -> tuple[list[LoraModule], dict[str, Any]]:
    """Stacked experts as a module each, and what the configuration has to say of them.

    vLLM wants all matrices of all experts of a layer, at one rank. PEFT, which stacks them again, takes that of gate and up from
    the configuration's ``r``, so that they have the largest of all modules.
    """
    rank = max(module.rank for module in modules)
    above, gate, up, down = names
    stacked: list[LoraModule] = []
    others: list[LoraModule] = []  # a parameter may also be a matrix, such as a router's
    for module in modules:
        (stacked if module.path.endswith(_STACKS) else others).append(module)
    apart: list[LoraModule] = []
    layers: dict[str, dict[str, tuple[Tensor, Tensor]]] = {}
    for module in (_pad(one, rank) for one in stacked):
        path, _, kind = module.path.rpartition(".")
        layers.setdefault(path, {})[kind] = module.rows, module.columns.mT  # (e, r, d_in) and (e, d_out, r)
    for path, found in layers.items():
        like, turned = next(iter(found.values())), "gate_up_proj" not in found
        if len(found) == 1:  # B of zeros for the other one
            outputs, inputs = like[1].shape[1], like[0].shape[2]
            sizes = (outputs, 2 * inputs) if turned else (outputs // 2, inputs)
            a, b = like[0].new_zeros(len(like[0]), rank, sizes[0]), like[1].new_zeros(len(like[1]), sizes[1], rank)
            found["gate_up_proj" if turned else "down_proj"] = a, b
        (a, b), (a_down, b_down) = found["gate_up_proj"], found["down_proj"]
        b_gate, b_up = b.chunk(2, dim=1)
        place = f"{path.rpartition('.experts')[0].rpartition('.')[0]}.{above}.experts"
        for name, rows, columns in ((gate, a, b_gate), (up, a, b_up), (down, a_down, b_down)):
            apart += [plain_module(f"{place}.{at}.{name}", rows[at].clone(), columns[at].clone()) for at in range(len(rows))]
    targets = [*(module.path for module in others if not module.experts), *(f"experts.{name}" for name in (gate, up, down))]
    matrices = sorted(module.path for module in others if module.experts)
    return apart + others, {"target_modules": sorted(targets), "target_parameters": matrices or None}


def _scaled(tensor: Tensor, scaling: float) -> Tensor:
    return (tensor.float() * scaling).to(tensor.dtype)


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copies the files of the tokenizer that an adapter brings along, if it does."""
    patterns = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*", *VOCABULARY)
    for file in {file for pattern in patterns for file in source.glob(pattern) if file.is_file()}:
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
