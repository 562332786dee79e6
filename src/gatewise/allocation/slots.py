"""Live and dead rank slots on stock PEFT LoRA layers: widen, prune, grow, compact.

A LoRA layer of capacity ``r_max`` has ``r_max`` slots. Slot i is row i of A (r_max, d_in) and column i of B (d_out, r_max); of a
convolution A is (r_max, d_in, *kernel) and B (d_out, r_max, 1, ...). It is *dead* when both are zero. A dead slot adds nothing to
the output, and because the gradient of each factor is multiplied by the other factor its gradient is exactly zero: it stays dead
without a mask, at stock LoRA's speed. Which slots live is read from the weights alone, so a checkpoint needs no second source of
truth.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import cast

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import MultiheadAttention, ParamWrapper
from torch import Tensor, nn

from gatewise.adapters.files import PEFT_PREFIX
from gatewise.adapters.lora import active_adapter, alphas, rank_settings, takes_out_of_base
from gatewise.allocation import growth
from gatewise.allocation.growth import Place
from gatewise.errors import GatewiseError

logger = logging.getLogger(__name__)


def lora_layers(model: nn.Module, adapter: str | None = None) -> dict[str, LoraLinear]:
    """Every LoRA layer of an adapter whose ranks can be moved, by its path in the base model, in module order.

    Linear layers and GPT-2's ``Conv1D`` count, quantised ones too, and embeddings and convolutions. Convolutions in groups, each of
    which has ranks of its own, and ``nn.MultiheadAttention`` are left as they are. The type is nominal: all these layers have its
    attributes.
    """
    return _layers(model, active_adapter(model, adapter))


def _layers(model: nn.Module, name: str) -> dict[str, LoraLinear]:
    # PEFT merges their factors for each pass, those of a LoRA layer inside too, and gives both the same rank.
    attention = tuple(f"{path}." for path, module in model.named_modules() if isinstance(module, MultiheadAttention))
    return {
        path.removeprefix(PEFT_PREFIX): cast(LoraLinear, module)
        for path, module in model.named_modules()
        if isinstance(module, LoraLayer) and _has_slots(module, name) and not f"{path}.".startswith(attention)
    }


def _has_slots(layer: LoraLayer, name: str) -> bool:
    if name in layer.lora_embedding_A:
        return True
    if name not in layer.lora_A or isinstance(layer, ParamWrapper):
        return False
    a, b = (getattr(held[name], "weight", None) for held in (layer.lora_A, layer.lora_B))
    return isinstance(a, nn.Parameter) and isinstance(b, nn.Parameter) and a.ndim > 1 and len(a) == b.shape[1]


def factors(layer: LoraLinear, adapter: str) -> tuple[nn.Parameter, nn.Parameter]:
    """A (r_max, d_in) and B (d_out, r_max) of a layer, the parameters themselves; with a kernel those of convolutions."""
    if adapter in layer.lora_embedding_A:
        return layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
    return cast(nn.Parameter, layer.lora_A[adapter].weight), cast(nn.Parameter, layer.lora_B[adapter].weight)


def places(layer: LoraLinear, adapter: str, slots: Sequence[int] | Tensor) -> tuple[Place, Place]:
    """Where slots lie in A and in B."""
    a, b = factors(layer, adapter)
    index = torch.as_tensor(slots if isinstance(slots, Tensor) else list(slots), dtype=torch.long, device=a.device)
    return Place(a, -a.ndim, index), Place(b, 1 - b.ndim, index)


def all_places(model: nn.Module, adapter: str | None = None) -> dict[str, Callable[[Sequence[int]], tuple[Place, Place]]]:
    """Path -> what says where slots lie in A and in B, of every layer of ``lora_layers``."""
    name = active_adapter(model, adapter)
    return {path: partial(places, layer, name) for path, layer in _layers(model, name).items()}


def dead_places(model: nn.Module, adapter: str | None = None) -> list[Place]:
    """Where the dead slots of all layers lie in their factors."""
    name = active_adapter(model, adapter)
    layers = _layers(model, name).values()
    return [place for one in layers for place in places(one, name, (~live_mask(one, name)).nonzero().flatten())]


def by_slot(layer: LoraLinear, adapter: str, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Two tensors of the shapes of A and B, as (r_max, numbers of a slot) each."""
    return a.flatten(1), b.transpose(0, 1).flatten(1)


def carries_more_than_ranks(layer: LoraLinear, adapter: str) -> bool:
    """Whether a LoRA layer changes its base module even without ranks: DoRA's magnitude, or a bias on B."""
    return adapter in layer.lora_variant or (adapter in layer.lora_B and layer.lora_B[adapter].bias is not None)


def live_mask(layer: LoraLinear, adapter: str) -> Tensor:
    """(r_max,) bool: which slots of a layer live. Dead means that the row of A and the column of B are both zero."""
    a, b = (factor.detach() != 0 for factor in factors(layer, adapter))
    rows, columns = by_slot(layer, adapter, a, b)
    return rows.any(dim=1) | columns.any(dim=1)


def capacity(layer: LoraLinear, adapter: str) -> int:
    """How many slots a layer has."""
    return len(factors(layer, adapter)[0])


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
        GatewiseError: a layer already has more ranks than ``r_max``, layers share their ranks, or the adapter has stacked experts,
            whose rank follows from the config that widening rewrites.
    """
    name = active_adapter(model, adapter)
    if any(isinstance(module, ParamWrapper) and name in module.lora_A for module in model.modules()):
        raise GatewiseError(
            f"adapter {name!r} adapts the stacked experts of a mixture (target_parameters), whose ranks cannot be moved: "
            "name the linear modules in target_modules instead of 'all-linear'"
        )
    layers = _layers(model, name)
    _check_not_tied(layers, name)
    slots: dict[str, int] = {}
    for path, layer in layers.items():
        a, b = factors(layer, name)
        old = len(a)
        new = 2 * old if r_max is None else r_max if isinstance(r_max, int) else r_max[path]
        if new < old:
            raise GatewiseError(f"r_max is {new} but {path} already has rank {old}: give an r_max of at least {old}")
        slots[path] = new
        if new > old:
            wide_a = a.new_zeros(new, *a.shape[1:])
            wide_b = b.new_zeros(len(b), new, *b.shape[2:])
            wide_a[:old], wide_b[:, :old] = a.detach(), b.detach()
            _set_factors(layer, name, wide_a, wide_b)
    _write_config(model, name)
    return slots


def _check_not_tied(layers: Mapping[str, LoraLinear], name: str) -> None:
    """With ``ensure_weight_tying`` the LoRA of an LM head is that of the embedding, transposed."""
    owners: dict[int, str] = {}
    for path, layer in layers.items():
        for factor in factors(layer, name):
            if factor.device.type != "meta" and owners.setdefault(factor.data_ptr(), path) != path:
                raise GatewiseError(
                    f"{path} and {owners[factor.data_ptr()]} share their LoRA factors (ensure_weight_tying), whose ranks cannot be "
                    "moved apart: leave ensure_weight_tying out, or one of the two out of target_modules"
                )


def prune(layer: LoraLinear, adapter: str, slots: Sequence[int], optimizer: torch.optim.Optimizer | None = None) -> None:
    """Kills slots: zeroes their row of A and column of B and clears the optimiser's moments for them."""
    if not slots:
        return
    where = places(layer, adapter, slots)
    with torch.no_grad():
        for parameter, dim, index in where:
            parameter.index_fill_(dim, index, 0)
    growth.clear(where, optimizer)


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
    PEFT starts embeddings the other way round, with A at zero and B normal, and so does this.
    With Adam, ``growth.YoungSlots`` must follow the optimiser's next steps, or the new ranks take steps that are too large.

    Raises:
        ValueError: the layer has fewer than ``n`` dead slots.
    """
    if n <= 0:
        return []
    mask = live_mask(layer, adapter)
    dead = [int(i) for i in (~mask).nonzero().flatten().tolist()[:n]]
    if len(dead) < n:
        raise ValueError(f"{n} ranks to grow but only {len(dead)} dead slots")
    grown = places(layer, adapter, dead)
    (a, along_a, rows), (b, along_b, columns) = grown
    with torch.no_grad():
        if adapter in layer.lora_embedding_B:
            b.index_copy_(along_b, columns, torch.randn(len(b), n, generator=generator).to(b))
        else:
            drawn = torch.rand(n, *a.shape[1:], generator=generator) * 2 - 1
            a.index_copy_(along_a, rows, (drawn * a[0].numel() ** -0.5).to(a))
    growth.start(grown, places(layer, adapter, mask.nonzero().flatten()), optimizer)
    return dead


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
        has_bias = getattr(layer.get_base_layer(), "bias", None) is not None
        if not slots and not carries_more_than_ranks(layer, name) and not (own_biases and has_bias):
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
        if path not in rank:  # layers that keep what they have read it from the same config
            rank[path], scaling[path] = module.r[name], module.scaling[name]
            module.use_rslora[name] = False
    alpha = alphas(rank, scaling)
    for path, layer in layers.items():
        # alpha / sqrt(r) would change with the rank; from here on the scaling is alpha / r with the same value.
        layer.use_rslora[name] = False
        layer.r[name], layer.lora_alpha[name] = rank[path], alpha[path]
    if takes_out_of_base(config.init_lora_weights) or config.init_lora_weights == "lora_ga":
        logger.warning(
            "adapter %r was made with init_lora_weights=%r, which changed the base weights: it belongs to the base model as it is "
            "now, not to a fresh copy. Save that too (model.unload().save_pretrained) and load the adapter on it",
            name, config.init_lora_weights,
        )  # fmt: skip
    if config.init_lora_weights not in (True, False, None, "gaussian", "eva"):
        config.init_lora_weights = True  # or loading would change the base weights again, by other ranks, or ask for an even rank
    config.use_rslora = False
    for key, value in rank_settings(rank, scaling).items():
        setattr(config, key, value)


def _set_factors(layer: LoraLinear, adapter: str, a: Tensor, b: Tensor) -> None:
    new_a, new_b = (
        nn.Parameter(new.contiguous(), requires_grad=old.requires_grad)
        for old, new in zip(factors(layer, adapter), (a, b), strict=True)
    )
    layer.r[adapter] = len(a)
    if adapter in layer.lora_embedding_A:
        layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter] = new_a, new_b
        return
    down, up = layer.lora_A[adapter], layer.lora_B[adapter]
    down.weight, up.weight = new_a, new_b
    of_a, of_b = ("out_features", "in_features") if isinstance(down, nn.Linear) else ("out_channels", "in_channels")
    setattr(down, of_a, len(a))
    setattr(up, of_b, len(a))


def _remove_layer(model: PeftModel, path: str, adapter: str) -> None:
    """Puts the base module back in the place of a LoRA layer without ranks, and takes it out of the config's targets."""
    parent_path, _, child = (PEFT_PREFIX + path).rpartition(".")
    parent = model.get_submodule(parent_path)
    layer = getattr(parent, child)
    others = [name for name in layer.active_adapters if name != adapter]
    layer.set_adapter(others)  # first, or deleting the adapter would make another one active here and nowhere else
    layer.delete_adapter(adapter)
    in_use = bool(layer.lora_A or layer.lora_embedding_A)  # by other adapters
    if not in_use:
        setattr(parent, child, layer.base_layer)
    # Names such as "q_proj" stand for many modules: once one of them is gone the targets must be spelled out.
    cast(LoraConfig, model.peft_config[adapter]).target_modules = set(_targeted(model, adapter))  # type: ignore[assignment]
    everyone = cast(list[str], model.base_model.targeted_module_names)  # of all adapters together
    if not in_use and path in everyone:
        everyone.remove(path)


def _targeted(model: PeftModel, adapter: str) -> dict[str, LoraLayer]:
    """Every layer of an adapter, of whatever kind, by path."""
    return {
        path.removeprefix(PEFT_PREFIX): module
        for path, module in model.named_modules()
        if isinstance(module, LoraLayer) and (adapter in module.lora_A or adapter in module.lora_embedding_A)
    }
