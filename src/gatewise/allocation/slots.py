"""Live and dead rank slots on stock PEFT LoRA layers: widen, prune, grow, compact.

A LoRA layer of capacity ``r_max`` has ``r_max`` slots. Slot i is row i of A (r_max, d_in) and column i of B (d_out, r_max).
It is *dead* when both are zero. A dead slot adds nothing to the output, and because the gradient of each factor is
multiplied by the other factor its gradient is exactly zero: it stays dead without a mask, at stock LoRA's speed.
Which slots live is read from the weights alone, so a checkpoint needs no second source of truth.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import cast

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn

from gatewise.adapters.files import PEFT_PREFIX
from gatewise.adapters.lora import active_adapter, alphas, rank_settings, takes_out_of_base
from gatewise.allocation import growth
from gatewise.errors import GatewiseError

logger = logging.getLogger(__name__)


def lora_layers(model: nn.Module, adapter: str | None = None) -> dict[str, LoraLinear]:
    """Every linear LoRA layer of an adapter, by its path in the base model, in module order.

    Linear and GPT-2's ``Conv1D`` bases count, quantised ones too. Embedding and convolution layers and the stacked experts of
    mixtures (``target_parameters``) have no rank rows of this kind and are left as they are. The type is nominal: layers on
    quantised bases have the same attributes.
    """
    return _layers(model, active_adapter(model, adapter))


def _layers(model: nn.Module, name: str) -> dict[str, LoraLinear]:
    return {
        path.removeprefix(PEFT_PREFIX): cast(LoraLinear, module)
        for path, module in model.named_modules()
        if isinstance(module, LoraLayer)
        and not isinstance(module, ParamWrapper)
        and isinstance(getattr(module.lora_A[name], "weight", None) if name in module.lora_A else None, nn.Parameter)
        and module.lora_A[name].weight.ndim == 2
    }


def factors(layer: LoraLinear, adapter: str) -> tuple[nn.Parameter, nn.Parameter]:
    """A (r_max, d_in) and B (d_out, r_max) of a layer, the parameters themselves."""
    return cast(nn.Parameter, layer.lora_A[adapter].weight), cast(nn.Parameter, layer.lora_B[adapter].weight)


def all_factors(model: nn.Module, adapter: str | None = None) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
    """Path -> A and B, of every layer of ``lora_layers``."""
    name = active_adapter(model, adapter)
    return {path: factors(layer, name) for path, layer in _layers(model, name).items()}


def carries_more_than_ranks(layer: LoraLinear, adapter: str) -> bool:
    """Whether a LoRA layer changes its base module even without ranks: DoRA's magnitude, or a bias on B."""
    return adapter in layer.lora_variant or layer.lora_B[adapter].bias is not None


def live_mask(layer: LoraLinear, adapter: str) -> Tensor:
    """(r_max,) bool: which slots of a layer live. Dead means that the row of A and the column of B are both zero."""
    a, b = factors(layer, adapter)
    return (a.detach() != 0).any(dim=1) | (b.detach() != 0).any(dim=0)


def live_slots(layer: LoraLinear, adapter: str) -> list[int]:
    """The indices of a layer's live slots, ascending."""
    return [int(i) for i in live_mask(layer, adapter).nonzero().flatten().tolist()]


def ranks(model: nn.Module, adapter: str | None = None) -> dict[str, int]:
    """Path -> number of live ranks."""
    name = active_adapter(model, adapter)
    return {path: int(live_mask(layer, name).sum()) for path, layer in _layers(model, name).items()}


def widen(model: PeftModel, r_max: int | Mapping[str, int] | None = None, adapter: str | None = None) -> dict[str, int]:
    """Gives every LoRA layer ``r_max`` slots, the added ones dead. The function computed does not change.

    Call it before the optimiser exists: the parameters are replaced. The scaling stays what it was (alpha / r of the
    adapter as it was made), and the adapter's config is rewritten so that a checkpoint is a valid plain LoRA adapter.

    Args:
        r_max: slots a layer, one number or a number per path; None doubles each layer's rank.

    Returns:
        Path -> slots.

    Raises:
        GatewiseError: a layer already has more ranks than ``r_max``, or the adapter has stacked experts, whose rank follows
            from the config that widening rewrites.
    """
    name = active_adapter(model, adapter)
    if any(isinstance(module, ParamWrapper) and name in module.lora_A for module in model.modules()):
        raise GatewiseError(
            f"adapter {name!r} adapts the stacked experts of a mixture (target_parameters), whose ranks cannot be moved: "
            "name the linear modules in target_modules instead of 'all-linear'"
        )
    capacity: dict[str, int] = {}
    for path, layer in _layers(model, name).items():
        a, b = factors(layer, name)
        old = a.shape[0]
        new = 2 * old if r_max is None else r_max if isinstance(r_max, int) else r_max[path]
        if new < old:
            raise GatewiseError(f"r_max is {new} but {path} already has rank {old}: give an r_max of at least {old}")
        capacity[path] = new
        if new > old:
            wide_a = a.new_zeros(new, a.shape[1])
            wide_b = b.new_zeros(b.shape[0], new)
            wide_a[:old], wide_b[:, :old] = a.detach(), b.detach()
            _set_factors(layer, name, wide_a, wide_b)
    _write_config(model, name)
    return capacity


def prune(layer: LoraLinear, adapter: str, slots: Sequence[int], optimizer: torch.optim.Optimizer | None = None) -> None:
    """Kills slots: zeroes their row of A and column of B and clears the optimiser's moments for them."""
    if not slots:
        return
    a, b = factors(layer, adapter)
    index = torch.as_tensor(list(slots), device=a.device)
    with torch.no_grad():
        a[index] = 0
        b[:, index] = 0
    growth.clear((a, b), index, optimizer)


def grow(
    layer: LoraLinear,
    adapter: str,
    n: int,
    generator: torch.Generator,
    optimizer: torch.optim.Optimizer | None = None,
) -> list[int]:
    """Brings the ``n`` lowest dead slots to life as LoRA starts a rank: a random row of A, a zero column of B.

    The function is unchanged and gradient flows into B. The row is drawn as PEFT draws A (Kaiming uniform with a = sqrt(5),
    that is uniform in +-1/sqrt(d_in)) from ``generator``, a CPU generator, so that a resumed run draws the same numbers.
    With Adam, ``growth.YoungSlots`` must follow the optimiser's next steps, or the new ranks take steps that are too large.

    Raises:
        ValueError: the layer has fewer than ``n`` dead slots.
    """
    if n <= 0:
        return []
    mask = live_mask(layer, adapter)
    dead = (~mask).nonzero().flatten().tolist()[:n]
    if len(dead) < n:
        raise ValueError(f"{n} ranks to grow but only {len(dead)} dead slots")
    a, b = factors(layer, adapter)
    bound = a.shape[1] ** -0.5
    rows = (torch.rand(n, a.shape[1], generator=generator) * 2 - 1) * bound
    index = torch.as_tensor(dead, device=a.device)
    with torch.no_grad():
        a[index] = rows.to(a)
    growth.start((a, b), index, mask.nonzero().flatten(), optimizer)
    return [int(i) for i in dead]


def compact(model: PeftModel, adapter: str | None = None) -> dict[str, int]:
    """Rewrites every layer to its true rank, drops layers left with none, and writes the patterns into the config.

    Every module keeps the scaling of training, so alpha / r is the same for all of them when it was before. A module without a
    live rank becomes its base module again and leaves ``target_modules``; with DoRA, a LoRA bias or ``bias="lora_only"`` it keeps
    one (zero) rank, because its magnitude or bias was trained too.

    Returns:
        Path -> rank of the modules that are left.

    Raises:
        GatewiseError: no live rank is left anywhere.
    """
    name = active_adapter(model, adapter)
    layers = _layers(model, name)
    if not any(live_slots(layer, name) for layer in layers.values()):
        raise GatewiseError(f"adapter {name!r} has no live rank left in any module: there is nothing to save")
    # PEFT trains the biases of the base modules that have LoRA, and saves them only there.
    own_biases = cast(LoraConfig, model.peft_config[name]).bias == "lora_only"
    kept: dict[str, int] = {}
    for path, layer in layers.items():
        slots = live_slots(layer, name)
        if not slots and not carries_more_than_ranks(layer, name) and not (own_biases and layer.get_base_layer().bias is not None):
            _remove_layer(model, path, name)
            continue
        # A module that must stay for its magnitude or bias keeps its first slot, which is zero.
        slots = slots or [0]
        a, b = factors(layer, name)
        if len(slots) < len(a):
            _set_factors(layer, name, a.detach()[slots], b.detach()[:, slots])
        kept[path] = len(slots)
    _write_config(model, name)
    return kept


def _write_config(model: PeftModel, name: str) -> None:
    """Writes what the layers really are into the adapter's ``LoraConfig``: r, alpha and their patterns."""
    config = cast(LoraConfig, model.peft_config[name])
    layers = _layers(model, name)
    rank = {path: len(factors(layer, name)[0]) for path, layer in layers.items()}
    scaling = {path: layer.scaling[name] for path, layer in layers.items()}
    for path, module in _targeted(model, name).items():
        if path not in rank:  # embeddings and convolutions keep what they have, but read it from the same config
            rank[path], scaling[path] = module.r[name], module.scaling[name]
            module.use_rslora[name] = False
    alpha = alphas(rank, scaling)
    for path, layer in layers.items():
        # alpha / sqrt(r) would change with the rank; from here on the scaling is alpha / r with the same value.
        layer.use_rslora[name] = False
        layer.r[name], layer.lora_alpha[name] = rank[path], alpha[path]
    if takes_out_of_base(config.init_lora_weights):
        logger.warning(
            "adapter %r was made with init_lora_weights=%r, which changed the base weights: it belongs to the base model as it is "
            "now, not to a fresh copy. Save that too (model.unload().save_pretrained) and load the adapter on it",
            name, config.init_lora_weights,
        )  # fmt: skip
        config.init_lora_weights = True  # or the base weights would be changed again, by other ranks
    config.use_rslora = False
    for key, value in rank_settings(rank, scaling).items():
        setattr(config, key, value)


def _set_factors(layer: LoraLinear, adapter: str, a: Tensor, b: Tensor) -> None:
    down, up = cast(nn.Linear, layer.lora_A[adapter]), cast(nn.Linear, layer.lora_B[adapter])
    for module, weight in ((down, a), (up, b)):
        module.weight = nn.Parameter(weight.contiguous(), requires_grad=module.weight.requires_grad)
    down.out_features = up.in_features = layer.r[adapter] = len(a)


def _remove_layer(model: PeftModel, path: str, adapter: str) -> None:
    """Puts the base module back in the place of a LoRA layer without ranks, and takes it out of the config's targets."""
    parent_path, _, child = (PEFT_PREFIX + path).rpartition(".")
    parent = model.get_submodule(parent_path)
    layer = getattr(parent, child)
    others = [name for name in layer.active_adapters if name != adapter]
    layer.set_adapter(others)  # first, or deleting the adapter would make another one active here and nowhere else
    layer.delete_adapter(adapter)
    if not layer.lora_A:  # other adapters may still use this layer
        setattr(parent, child, layer.base_layer)
    # Names such as "q_proj" stand for many modules: once one of them is gone the targets must be spelled out.
    cast(LoraConfig, model.peft_config[adapter]).target_modules = sorted(_targeted(model, adapter))
    everyone = cast(list[str], model.base_model.targeted_module_names)  # of all adapters together
    if not layer.lora_A and path in everyone:
        everyone.remove(path)


def _targeted(model: PeftModel, adapter: str) -> dict[str, LoraLayer]:
    """Every layer of an adapter, of whatever kind, by path."""
    return {
        path.removeprefix(PEFT_PREFIX): module
        for path, module in model.named_modules()
        if isinstance(module, LoraLayer) and (adapter in module.lora_A or adapter in module.lora_embedding_A)
    }
