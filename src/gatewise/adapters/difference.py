"""An adapter of any kind as plain LoRA: what its file holds where that is exact, else the difference that it makes to the weights.

LoRA, with rank stabilisation and patterns, and AdaLoRA are B A already. Whatever else PEFT merges into the weights of linear layers
and embeddings is a difference D = W' - W, whose largest singular values and vectors are the factors: DoRA, LoHa, LoKr, OFT, BOFT,
IA3, VeRA and others, starts that change the base model (PiSSA, OLoRA), modules trained as a whole, trained rows of tokens.
What cannot be so is refused: what depends on the prompt, and changes of anything but these weights.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from gatewise.adapters.data_options import DataOptions
from gatewise.adapters.files import (
    PEFT_PREFIX,
    LoraAdapter,
    LoraModule,
    read_config,
    read_lora,
    read_note,
    read_tensors,
    weights_of,
)
from gatewise.adapters.lora import takes_out_of_base, target_settings
from gatewise.errors import GatewiseError, reason_of, some
from gatewise.losses import labelled_microbatches, loss_kind, mean_loss, scored
from gatewise.models.device import pick_device
from gatewise.models.loading import HEADS
from gatewise.progress import quiet

MOST_RANKS = 64
"""Of a difference, where nothing is said about ranks."""

_BASE_WEIGHT = re.compile(r"\.(?:base_layer|original_module)\.weight$")
# Settings of LoRA with which B A is not all that is added.
_MORE_THAN_LORA = (
    "use_dora", "lora_bias", "trainable_token_indices", "kasa_config", "monteclora_config", "arrow_config", "use_qalora",
    "use_bdlora", "alora_invocation_tokens",
)  # fmt: skip
_NO_WEIGHTS = (
    "PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT", "ADAPTION_PROMPT", "CARTRIDGE",
    "SELECTIVE_PROMPT",
)  # fmt: skip
_WITH_HEAD = ("SEQ_CLS", "FEATURE_EXTRACTION")


@dataclass(frozen=True)
class Plain:
    """An adapter as plain LoRA.

    Attributes:
        file: what is to be written.
        lost: by module, how far its weights are from those of the adapter: |D - B A| / |D| in the Frobenius norm. Empty where the
            file's own factors are kept.
    """

    file: LoraAdapter
    lost: dict[str, float] = field(default_factory=dict)


def plain_lora(
    folder: Path,
    model: Callable[[], PeftModel] | None = None,
    *,
    base: str | Path | None = None,
    device: str = "cpu",
    rank: int | None = None,
    keep: float | None = None,
    say: Callable[[str], None] | None = None,
) -> Plain:
    """Reads an adapter of any kind as plain LoRA. The base model is loaded only where the adapter is more than B A.

    Args:
        folder: where it is saved.
        model: makes a copy of the model that it was saved from, with this adapter active, if it is at hand. With some starts of
            LoRA the file alone does not tell what the base model lost.
        base: the base model, if not the one that the adapter names.
        rank, keep: most ranks of a module, and the share of the energy (the sum of squares) of its difference that is kept. Without
            either, at most ``MOST_RANKS`` are.
        say: told in a line what happens now.

    Raises:
        GatewiseError: the adapter cannot be plain LoRA, a file is damaged, or the base model cannot be loaded.
    """
    if keep is not None and not 0 < keep <= 1:
        raise GatewiseError(f"keep is {keep}, expected a share of the energy in (0, 1], such as 0.9999")
    config = read_config(folder)
    _check_kind(folder, config)
    if config.get("peft_type") in ("LORA", "ADALORA") and not _more(config):
        file = read_lora(folder)
        whole = _whole_tensors(config, file.others)
        if len(whole) == len(file.others) and not any(module.others for module in file.modules):
            file = _without_base_weights(folder, file, base, say)
            if not any(_BASE_WEIGHT.search(name) for name in file.others):
                return Plain(_folded(file) if config["peft_type"] == "ADALORA" else file)
    from gatewise.adapters.loading import (
        load_adapter,
        load_base,
    )  # here and below: LoRA is written without the packages for recipes

    unknown = str(config.get("init_lora_weights")).lower().startswith(("corda", "lora_ga", "pissa_niter"))
    if model is None and unknown:  # the last is a singular value decomposition that draws at random
        raise GatewiseError(
            f"the adapter {folder} has init_lora_weights {config['init_lora_weights']!r}, which took something out of the base "
            "model that is in no file: save it with save_pretrained(..., path_initial_model_for_weight_conversion=...), or give "
            "gatewise.export.to_lora the model that was trained"
        )
    if say:
        say(f"loading the base model of {folder} twice in float32, to take the difference of its weights")
        if quantization := read_note(folder).get("quantization"):
            say(
                f"note: it was trained on weights in {quantization}, and the difference is that to the weights as they are in the "
                f"base model's files: beside those, and in {quantization} too, answers may differ a little"
            )
    place = pick_device(device)
    before: nn.Module = load_base(folder, base=base, dtype=torch.float32)[0]
    # A model at hand may be of another precision or quantised, and all its weights then differ from those in the base's files.
    if model and unknown:
        adapted = model()
        before = before.to(adapted.dtype)
    else:
        adapted = load_adapter(folder, base=base, dtype=torch.float32)[0]
    before = before.to(place, torch.float32)
    return _difference(folder, config, before, _merged(folder, before, adapted.to(place, torch.float32).eval()), rank, keep)


def _check_kind(folder: Path, config: dict[str, Any]) -> None:
    kind = str(config.get("peft_type"))
    if kind == "ROUTED_LORA":
        raise GatewiseError(
            f"the adapter {folder} is of type ROUTED_LORA (MiLoRA): which of its modules are kept depends on the prompt, so no "
            "plain LoRA does the same. Serve it with gatewise serve, or with gatewise as vLLM's plug-in"
        )
    if kind in _NO_WEIGHTS:
        raise GatewiseError(
            f"the adapter {folder} is of type {kind}: it adds prompt tokens, not weights, so it cannot be LoRA. Load it with PEFT"
        )
    if config.get("layer_replication"):
        raise GatewiseError(f"the adapter {folder} has layer_replication: LoRA on the base model's own layers cannot do the same")


def _more(config: dict[str, Any]) -> bool:
    """Whether a configuration says that an adapter is more than B A on the base model as it is."""
    start = config.get("init_lora_weights")
    return (
        any(config.get(name) for name in _MORE_THAN_LORA)
        or config.get("bias", "none") != "none"
        or takes_out_of_base(start)
        or str(start).lower() == "lora_ga"
    )


def _whole_tensors(config: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of an adapter's file the tensors that plain LoRA has as well: the head of a model that does not write text, which was trained
    as a whole, and base weights that PEFT put there."""
    whole = (*HEADS, *(config.get("modules_to_save") or ())) if config.get("task_type") in _WITH_HEAD else ()
    return {
        name: tensor
        for name, tensor in tensors.items()
        if _BASE_WEIGHT.search(name) or any(f".{module}." in f".{name}" for module in whole)
    }


def _without_base_weights(
    folder: Path, file: LoraAdapter, base: str | Path | None, say: Callable[[str], None] | None
) -> LoraAdapter:
    """Leaves out the base weights that PEFT put into a file, where they are the base model's.

    Raises:
        GatewiseError: the base model, which is needed to compare them, cannot be loaded.
    """
    there = {name: tensor for name, tensor in file.others.items() if _BASE_WEIGHT.search(name)}
    if not there:
        return file
    from gatewise.adapters.loading import load_base

    if say:
        say(f"loading the base model of {folder}, as the adapter's file has base weights ({next(iter(there))}) to compare")
    model = load_base(folder, base=base, dtype=next(iter(there.values())).dtype)[0]
    own = dict(model.named_parameters(remove_duplicate=False))
    for name, tensor in there.items():
        weight = own.get(_BASE_WEIGHT.sub(".weight", name).removeprefix(PEFT_PREFIX))
        if weight is None or weight.shape != tensor.shape or not torch.equal(tensor, weight):
            return file
    return replace(file, others={name: tensor for name, tensor in file.others.items() if name not in there})


def _folded(file: LoraAdapter) -> LoraAdapter:
    """AdaLoRA's B E A with E in A, and without the singular values that its rounds have masked."""
    modules = []
    for module in file.modules:
        assert module.diagonal is not None
        left = module.diagonal.flatten().nonzero().flatten()
        if len(left):
            a, b = (module.a.float() * module.diagonal.float()).to(module.a.dtype)[left], module.b[:, left]
            modules.append(replace(plain_module(module.path, a, b), scaling=module.scaling))
    if not modules:
        raise GatewiseError("the adapter has no live rank")
    return LoraAdapter(
        _config(file.config, [one.path for one in modules], [one.path for one in file.modules]), modules, file.others, file.metadata
    )


def plain_module(path: str, a: Tensor, b: Tensor, embedding: bool = False) -> LoraModule:
    """A module with these factors, under the names that PEFT gives them."""
    ends = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A.weight", "lora_B.weight")
    keys = (f"{PEFT_PREFIX}{path}.{ends[0]}", f"{PEFT_PREFIX}{path}.{ends[1]}")
    return LoraModule(path, a, b, keys, 1.0, None, None, {})


def _config(config: dict[str, Any], paths: list[str], others: list[str]) -> dict[str, Any]:
    """A plain configuration in place of an adapter's, which targets these modules and none of ``others``."""
    kept = ("base_model_name_or_path", "revision", "task_type", "auto_mapping", "fan_in_fan_out", "peft_version")
    written = LoraConfig().to_dict() | {name: config[name] for name in kept if name in config} | {"peft_type": "LORA"}
    if config.get("task_type") in _WITH_HEAD:
        written["modules_to_save"] = config.get("modules_to_save")
    return written | target_settings(paths, others)


# ---------------------------------------------------------------- the difference


@torch.no_grad()
def _merged(folder: Path, before: nn.Module, adapted: PeftModel) -> nn.Module:
    """The base model with the adapter in its weights.

    Raises:
        GatewiseError: PEFT cannot merge it, or the merged model does not answer as the adapter does.
    """
    seen: set[int] = set()
    for module in adapted.modules():  # merging into a weight that two modules share would change the other one too
        for name, weight in list(module.named_parameters(recurse=False)):
            if id(weight) in seen:
                setattr(module, name, nn.Parameter(weight.detach().clone(), requires_grad=False))
            seen.add(id(weight))
    device = next(adapted.parameters()).device
    size = before.get_input_embeddings().num_embeddings  # type: ignore[operator]
    ids = torch.randint(size, (2, 16), generator=torch.Generator().manual_seed(0)).to(device)
    expected = adapted(input_ids=ids).logits
    with quiet():
        try:
            merged = adapted.merge_and_unload()
        except Exception as error:  # each kind of adapter has a reason of its own
            raise GatewiseError(
                f"the adapter {folder} cannot be merged into the weights of its base model, so no plain LoRA does the same: "
                f"{reason_of(error)}"
            ) from error
    found, plain = merged(input_ids=ids).logits, before(input_ids=ids).logits
    if not float((found - expected).abs().max()) <= 0.01 * float((expected - plain).abs().max()) + 1e-4 * float(
        expected.abs().max()
    ):
        raise GatewiseError(
            f"the adapter {folder} does more than its merged weights do (what it adds depends on the text), so no plain LoRA does "
            "the same"
        )
    return merged


@torch.no_grad()
def _difference(
    folder: Path, config: dict[str, Any], before: nn.Module, merged: nn.Module, rank: int | None, keep: float | None
) -> Plain:
    tensors, metadata = read_tensors(weights_of(folder))
    others = _whole_tensors(config, {name: tensor for name, tensor in tensors.items() if not _BASE_WEIGHT.search(name)})
    own = {module.path: module for module in read_lora(folder).modules} if config.get("peft_type") == "LORA" else {}
    after = dict(merged.named_parameters(remove_duplicate=False))
    whole = {name.removeprefix(PEFT_PREFIX) for name in others}
    modules: list[LoraModule] = []
    lost: dict[str, float] = {}
    beyond: list[str] = []
    for path, module in before.named_modules():
        for name, weight in module.named_parameters(recurse=False):
            full = f"{path}.{name}"
            if full in whole:
                continue
            now = after.get(full)
            if now is None or now.shape != weight.shape:
                raise GatewiseError(
                    f"the adapter {folder} gives {full} another size than the base model has: add the tokens to both first"
                )
            delta = now.float() - weight.float()
            floor = torch.finfo(torch.float32).eps * float(now.abs().max()) * (math.sqrt(len(delta)) + math.sqrt(delta[0].numel()))
            if not bool(delta.any()):
                continue
            by_columns = isinstance(module, Conv1D | nn.Embedding)
            kept = own.get(path if name == "weight" else full)
            if kept is not None and float((_product(kept, delta, by_columns) - delta).norm()) <= floor + 1e-4 * float(delta.norm()):
                modules.append(replace(kept, others={}))
                lost[kept.path] = 0.0
            elif name == "weight" and isinstance(module, nn.Linear | Conv1D | nn.Embedding):
                factors = _factors(delta.mT if by_columns else delta, floor, rank, keep)
                if factors is not None:
                    modules.append(plain_module(path, factors[0], factors[1], isinstance(module, nn.Embedding)))
                    lost[path] = factors[2]
            elif float(delta.norm()) > floor:
                beyond.append(full)
    if beyond:
        raise GatewiseError(
            f"the adapter {folder} changes {some(beyond, 3)}, which LoRA on linear layers and embeddings cannot: that would be "
            "lost. Merge the adapter into the base model instead (PEFT's merge_and_unload)"
        )
    if not modules:
        raise GatewiseError(f"the adapter {folder} changes no weight of its base model")
    paths = [module.path for module in modules if not module.experts]
    written = _config(config, paths, [path for path, _ in before.named_modules()])
    if any(module.experts for module in modules):
        written["target_parameters"] = config["target_parameters"]
    written["fan_in_fan_out"] = any(isinstance(before.get_submodule(path), Conv1D) for path in paths)
    return Plain(LoraAdapter(written, modules, others, metadata), lost)


def _product(module: LoraModule, like: Tensor, by_columns: bool) -> Tensor:
    """A LoRA module's B A, as the weight has it; of stacked experts, which PEFT tells by their sizes, in one of the two ways."""
    rows, columns = (one.to(like.device, torch.float32) for one in (module.rows, module.columns))
    product = (columns.mT @ rows) * module.scaling
    if module.experts:
        return product if product.shape == like.shape else product.mT
    return product[0].mT if by_columns else product[0]


def _factors(delta: Tensor, floor: float, rank: int | None, keep: float | None) -> tuple[Tensor, Tensor, float] | None:
    """A, B and the share of a difference (d_out, d_in) that they leave out; None where it is nothing but rounding.

    Args:
        floor: singular values below are rounding.
    """
    rows, columns = delta.any(1).nonzero().flatten(), delta.any(0).nonzero().flatten()  # of embeddings few are trained
    left, values, right = torch.linalg.svd(delta[rows][:, columns], full_matrices=False)
    total = int((values > floor).sum())
    if not total:
        return None
    energy = values.double().square().cumsum(0)
    enough = total if keep is None else int((energy < keep * energy[-1]).sum()) + 1
    kept = min(total, enough, rank or (MOST_RANKS if keep is None else total))
    roots = values[:kept].sqrt()
    a, b = delta.new_zeros(kept, delta.shape[1]), delta.new_zeros(delta.shape[0], kept)
    a[:, columns], b[rows] = roots[:, None] * right[:kept], left[:, :kept] * roots
    return a.cpu(), b.cpu(), math.sqrt(max(0.0, 1 - float(energy[kept - 1] / energy[-1])))


# ---------------------------------------------------------------- on data


@dataclass(frozen=True)
class Compared:
    """An adapter beside what was made of it, on data.

    Attributes:
        logits: the largest difference of a logit, where an answer's tokens are predicted.
        before, after: the mean loss (nats a token).
    """

    logits: float
    before: float
    after: float


def compare(adapter: str | Path, exported: str | Path, data: str, options: DataOptions = DataOptions()) -> Compared:
    """Runs an adapter and its export on rows, both in float32.

    Raises:
        GatewiseError: adapter, base model and data cannot be read or do not fit each other.
    """
    from gatewise.adapters.loading import load_adapter, read_data
    from gatewise.tasks import PadCollator
    from gatewise.tasks.metrics import encoded, measuring

    records, template, max_length = read_data(Path(adapter), data, options)
    device = pick_device(options.device)
    model, tokenizer, _ = load_adapter(adapter, base=options.base, dtype=torch.float32, device=device)
    features = encoded(model, tokenizer, records, template, max_length)
    batch = {key: value.to(device) for key, value in PadCollator(tokenizer)(features).items()}
    parts = labelled_microbatches([batch], 2048, loss_kind(model))
    other, _, _ = load_adapter(exported, base=options.base, dtype=torch.float32, device=device)
    with measuring(model), measuring(other), torch.no_grad():  # part by part: logits of all rows would fill the memory
        gaps = [float((scored(other, part).logits - scored(model, part).logits).abs().max()) for part in parts]
        return Compared(max(gaps), mean_loss(model, parts), mean_loss(other, parts))
