"""Live and dead rank slots on stock PEFT LoRA layers: widen, prune, grow, compact.

A LoRA layer of capacity ``r_max`` has ``r_max`` slots. Slot i is row i of A (r_max, d_in) and column i of B (d_out, r_max); of a
convolution A is (r_max, d_in, *kernel) and B (d_out, r_max, 1, ...). It is *dead* when both are zero. A dead slot adds nothing to
the output, and because the gradient of each factor is multiplied by the other factor its gradient is exactly zero: it stays dead
without a mask, at stock LoRA's speed. Which slots live is read from the weights alone, so a checkpoint needs no second source of
truth.

Each expert of a stacked parameter (``target_parameters``) is a module with slots of its own, an ``Expert``, although PEFT keeps the
factors of all of them in one A (experts * r_max, d_in) and one B (d_out, r_max * experts).
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import MultiheadAttention, ParamWrapper
from torch import Tensor, nn

from gatewise.adapters.files import PEFT_PREFIX
from gatewise.adapters.lora import active_adapter, alphas, rank_settings, start_at_any_rank, takes_out_of_base
from gatewise.allocation import growth
from gatewise.allocation.growth import Place
from gatewise.errors import GatewiseError

logger = logging.getLogger(__name__)


class Expert:
    """One expert of a parameter that ``target_parameters`` names, or the whole of one that is not stacked.

    Everything but its slots is the LoRA layer's, which has all experts of the parameter.

    Attributes:
        layer: PEFT's layer.
        number: which expert.
    """

    def __init__(self, layer: ParamWrapper, number: int) -> None:
        self.layer, self.number = layer, number

    def __getattr__(self, name: str) -> Any:
        return getattr(self.layer, name)


def lora_layers(model: nn.Module, adapter: str | None = None) -> dict[str, LoraLinear]:
    """Every LoRA layer of an adapter whose ranks can be moved, by its path in the base model, in module order.

    Linear layers and GPT-2's ``Conv1D`` count, quantised ones too, and embeddings and convolutions. Convolutions in groups, each of
    which has ranks of its own, and ``nn.MultiheadAttention`` are left as they are. Of a stacked parameter each expert is there, an
    ``Expert``, by the path of the parameter and its number, such as "model.layers.0.mlp.experts.down_proj[2]". The type is
    nominal: all these have its attributes.
    """
    return _layers(model, active_adapter(model, adapter))


def _layers(model: nn.Module, name: str) -> dict[str, LoraLinear]:
    return {path: site for held_at, layer in _holders(model, name).items() for path, site in _modules_of(held_at, layer)}


def _modules_of(path: str, layer: LoraLinear) -> Iterator[tuple[str, LoraLinear]]:
    """The modules whose slots a LoRA layer holds: itself, or the experts of its parameter."""
    if not isinstance(layer, ParamWrapper):
        yield path, layer
        return
    for number in range(layer.num_experts):
        yield path if layer.num_experts == 1 else f"{path}[{number}]", cast(LoraLinear, Expert(layer, number))


def _holders(model: nn.Module, name: str) -> dict[str, LoraLinear]:
    """The LoRA layers that hold the slots of an adapter, by the path of the module or parameter they adapt."""
    # PEFT merges the factors of these for each pass, those of a LoRA layer inside too, and gives both the same rank.
    attention = tuple(f"{path}." for path, module in model.named_modules() if isinstance(module, MultiheadAttention))
    return {
        _path_of(path, module): cast(LoraLinear, module)
        for path, module in model.named_modules()
        if isinstance(module, LoraLayer) and _has_slots(module, name) and not f"{path}.".startswith(attention)
    }


def left_alone(model: nn.Module, adapter: str | None = None) -> list[str]:
    """Paths of what an adapter's LoRA layers adapt that ``lora_layers`` leaves out: no score reads it, and no budget counts it.

    Of ``nn.MultiheadAttention``, which has a LoRA layer inside, the path of the whole.
    """
    name = active_adapter(model, adapter)
    held = set(map(id, _holders(model, name).values()))
    return [
        _path_of(path, module)
        for path, module in model.named_modules()
        if isinstance(module, LoraLayer) and (name in module.lora_A or name in module.lora_embedding_A)
        if id(module) not in held and ".base_layer" not in path
    ]


def _path_of(path: str, layer: LoraLayer) -> str:
    """The path in the base model of what a LoRA layer at ``path`` adapts."""
    path = path.removeprefix(PEFT_PREFIX)
    if not isinstance(layer, ParamWrapper):
        return path
    return f"{path.replace('.base_layer', '')}.{layer.parameter_name}"  # the layers of several parameters lie in one another


def _has_slots(layer: LoraLayer, name: str) -> bool:
    if name in layer.lora_embedding_A:
        return True
    if name not in layer.lora_A:
        return False
    a, b = (getattr(held[name], "weight", None) for held in (layer.lora_A, layer.lora_B))
    return isinstance(a, nn.Parameter) and isinstance(b, nn.Parameter) and a.ndim > 1 and len(a) == b.shape[1]


def factors(layer: LoraLinear, adapter: str) -> tuple[nn.Parameter, nn.Parameter]:
    """A (r_max, d_in) and B (d_out, r_max) of a layer, the parameters themselves.

    Those of convolutions have a kernel, and those of an ``Expert`` hold its fellows too: see ``by_slot`` and ``places``.
    """
    if adapter in layer.lora_embedding_A:
        return layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
    return cast(nn.Parameter, layer.lora_A[adapter].weight), cast(nn.Parameter, layer.lora_B[adapter].weight)


def places(layer: LoraLinear, adapter: str, slots: Sequence[int] | Tensor) -> tuple[Place, Place]:
    """Where slots lie in A and in B."""
    a, b = factors(layer, adapter)
    index = torch.as_tensor(slots if isinstance(slots, Tensor) else list(slots), dtype=torch.long, device=a.device)
    if isinstance(layer, Expert):
        experts = layer.layer.num_experts
        rows, columns = index + layer.number * (len(a) // experts), index * experts + layer.number
        return Place(a, -2, rows), Place(b, -1, columns)
    return Place(a, -a.ndim, index), Place(b, 1 - b.ndim, index)


def all_places(model: nn.Module, adapter: str | None = None) -> dict[str, Callable[[Sequence[int]], tuple[Place, Place]]]:
    """Path -> what says where slots lie in A and in B, of every layer of ``lora_layers``."""
    name = active_adapter(model, adapter)
    return {path: partial(places, layer, name) for path, layer in _layers(model, name).items()}


def dead_places(model: nn.Module, adapter: str | None = None) -> list[Place]:
    """Where the dead slots of all layers lie in their factors, one place a factor."""
    name = active_adapter(model, adapter)
    found: dict[tuple[nn.Parameter, int], list[Tensor]] = {}
    for layer in _layers(model, name).values():
        for parameter, dim, index in places(layer, name, (~live_mask(layer, name)).nonzero().flatten()):
            found.setdefault((parameter, dim), []).append(index)
    return [Place(parameter, dim, torch.cat(indices)) for (parameter, dim), indices in found.items()]


def by_slot(layer: LoraLinear, adapter: str, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Two tensors of the shapes of A and B, as (r_max, numbers of a slot) each."""
    if isinstance(layer, Expert):
        experts = layer.layer.num_experts
        return a.unflatten(0, (experts, -1))[layer.number], b.unflatten(1, (-1, experts))[..., layer.number].T
    return a.flatten(1), b.transpose(0, 1).flatten(1)


def costs(model: nn.Module, adapter: str | None = None) -> dict[str, int]:
    """Path -> the numbers of one of its ranks, a row of A and a column of B: d_in + d_out of a linear layer."""
    name = active_adapter(model, adapter)
    of_slots = {path: by_slot(layer, name, *factors(layer, name)) for path, layer in _layers(model, name).items()}
    return {path: rows.shape[1] + columns.shape[1] for path, (rows, columns) in of_slots.items()}


def set_slots(layer: LoraLinear, adapter: str, rows: Tensor, columns: Tensor) -> None:
    """Writes all slots of a layer: the numbers of its A and B as ``by_slot`` gives them."""
    a, b = (factor.detach() for factor in factors(layer, adapter))
    if isinstance(layer, Expert):
        experts = layer.layer.num_experts
        a.unflatten(0, (experts, -1))[layer.number].copy_(rows)
        b.unflatten(1, (-1, experts))[..., layer.number].copy_(columns.T)
        return
    a.copy_(rows.view(a.shape))
    b.copy_(columns.view(b.shape[1], b.shape[0], *b.shape[2:]).transpose(0, 1))


def carries_more_than_ranks(layer: LoraLinear, adapter: str) -> bool:
    """Whether a LoRA layer changes its base module even without ranks: DoRA's magnitude, or a bias on B."""
    variant = layer.lora_variant.get(adapter)
    # aLoRA is plain LoRA from some token on: without ranks it changes nothing.
    changes = variant is not None and not type(variant).__name__.startswith("ALora")
    return changes or (adapter in layer.lora_B and layer.lora_B[adapter].bias is not None)


def keep_a_rank(model: nn.Module, adapter: str | None = None) -> bool:
    """Whether no module of an adapter may lose its last rank in rounds: those with a magnitude or a trained bias stay in it without
    ranks, and are written with a rank of zeros, which no budget would count."""
    name = active_adapter(model, adapter)
    layers = (layer for layer in _holders(model, name).values() if not isinstance(layer, ParamWrapper))
    return any(_stays_without_ranks(cast(PeftModel, model), layer, name) for layer in layers)


def stay_without_ranks(model: PeftModel, adapter: str | None = None) -> list[str]:
    """Paths of what stays in an adapter when it has no live rank: see ``compact``."""
    name = active_adapter(model, adapter)
    return [path for path, layer in _holders(model, name).items() if _stays_without_ranks(model, layer, name)]


def _stays_without_ranks(model: PeftModel, layer: LoraLinear, name: str) -> bool:
    # PEFT trains the biases of the base modules that have LoRA, and saves them only there.
    own_biases = cast(LoraConfig, model.peft_config[name]).bias == "lora_only"
    has_bias = getattr(layer.get_base_layer(), "bias", None) is not None
    return carries_more_than_ranks(layer, name) or (own_biases and has_bias) or isinstance(layer, ParamWrapper)


def live_mask(layer: LoraLinear, adapter: str) -> Tensor:
    """(r_max,) bool: which slots of a layer live. Dead means that the row of A and the column of B are both zero."""
    a, b = (factor.detach() != 0 for factor in factors(layer, adapter))
    rows, columns = by_slot(layer, adapter, a, b)
    return rows.any(dim=1) | columns.any(dim=1)


def capacity(layer: LoraLinear, adapter: str) -> int:
    """How many slots a layer has."""
    return len(factors(layer, adapter)[0]) // (layer.layer.num_experts if isinstance(layer, Expert) else 1)


def all_factors(layers: Mapping[str, LoraLinear], adapter: str) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
    """Path -> A and B."""
    return {path: factors(layer, adapter) for path, layer in layers.items()}


def capacities(layers: Mapping[str, LoraLinear], adapter: str) -> dict[str, int]:
    """Path -> slots."""
    return {path: capacity(layer, adapter) for path, layer in layers.items()}


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
        r_max: slots a layer, one number or a number per path; None doubles each layer's rank. The experts of a parameter all get
            as many as the one that is to have most.

    Returns:
        Path -> slots.

    Raises:
        GatewiseError: a layer already has more ranks than ``r_max``, or layers share their ranks.
    """
    name = active_adapter(model, adapter)
    layers = _holders(model, name)
    check_not_tied(model, name)
    slots: dict[str, int] = {}
    for held_at, layer in layers.items():
        modules = dict(_modules_of(held_at, layer))
        old = capacity(next(iter(modules.values())), name)
        new = 2 * old if r_max is None else r_max if isinstance(r_max, int) else max(r_max[path] for path in modules)
        if new < old:
            raise GatewiseError(f"r_max is {new} but {held_at} already has rank {old}: give an r_max of at least {old}")
        slots |= dict.fromkeys(modules, new)
        if new > old:
            _move_slots(layer, name, list(modules.values()), [list(range(old))] * len(modules), new)
    _write_config(model, name)
    return slots


def _move_slots(layer: LoraLinear, name: str, modules: Sequence[LoraLinear], kept: Sequence[Sequence[int]], slots: int) -> None:
    """Gives a LoRA layer new factors of ``slots`` slots a module: those ``kept`` of each module first, then zeros."""
    old = [places(module, name, some) for module, some in zip(modules, kept, strict=True)]
    a, b = factors(layer, name)
    new_a, new_b = a.new_zeros(len(modules) * slots, *a.shape[1:]), b.new_zeros(len(b), len(modules) * slots, *b.shape[2:])
    values = [tuple(place.parameter.detach().index_select(place.dim, place.indices) for place in both) for both in old]
    _set_factors(layer, name, new_a, new_b)
    with torch.no_grad():
        for module, some, both in zip(modules, kept, values, strict=True):
            for (parameter, dim, index), value in zip(places(module, name, range(len(some))), both, strict=True):
                parameter.index_copy_(dim, index, value)


def check_not_tied(model: nn.Module, name: str) -> None:
    """Refuses an adapter whose layers share ranks: ``ensure_weight_tying`` gives an LM head those of the embedding, transposed.

    Raises:
        GatewiseError: there are some.
    """
    owners: dict[int, str] = {}
    for path, layer in _holders(model, name).items():
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
    growth.start(grown, _alive_before(layer, adapter, mask), optimizer)
    return dead


def _alive_before(layer: LoraLinear, adapter: str, mask: Tensor) -> tuple[Place, Place]:
    """Where a layer's slots lie that ``mask`` has as live; of an expert, its fellows' too, for the optimiser keeps one state."""
    if not isinstance(layer, Expert):
        return places(layer, adapter, mask.nonzero().flatten())
    found = []
    for number in range(layer.layer.num_experts):
        fellow = cast(LoraLinear, Expert(layer.layer, number))
        live = mask if number == layer.number else live_mask(fellow, adapter)
        found.append(places(fellow, adapter, live.nonzero().flatten()))
    (a, dim_a, _), (b, dim_b, _) = found[0]
    rows, columns = (torch.cat([both[side].indices for both in found]) for side in (0, 1))
    return Place(a, dim_a, rows), Place(b, dim_b, columns)


def compact(model: PeftModel, adapter: str | None = None) -> dict[str, int]:
    """Rewrites every layer to its true rank, drops layers left with none, and writes the patterns into the config.

    Every module keeps the scaling of training, so alpha / r is the same for all of them when it was before. A module without a
    live rank becomes its base module again and leaves ``target_modules``; with DoRA, a LoRA bias or ``bias="lora_only"`` it keeps
    one (zero) rank, because its magnitude or bias was trained too. The experts of a parameter stay together, at the rank of the one
    that has most: PEFT knows one rank for all of them. The others have zeros after their live ranks.

    Returns:
        Path -> rank of the modules that are left, as PEFT counts it.

    Raises:
        GatewiseError: no live rank is left anywhere.
    """
    name = active_adapter(model, adapter)
    if not any(live_slots(layer, name) for layer in _layers(model, name).values()):
        raise GatewiseError(f"adapter {name!r} has no live rank left in any module: there is nothing to save")
    kept: dict[str, int] = {}
    for path, layer in _holders(model, name).items():
        modules = dict(_modules_of(path, layer))
        live = [live_slots(module, name) for module in modules.values()]
        most = max(map(len, live))
        if not most and not _stays_without_ranks(model, layer, name):
            _remove_layer(model, path, name)
            continue
        # A module that must stay keeps a slot, which is zero.
        if max(most, 1) < capacity(next(iter(modules.values())), name):
            _move_slots(layer, name, list(modules.values()), live, max(most, 1))
        kept |= dict.fromkeys(modules, max(most, 1))
    _write_config(model, name)
    return kept


def _write_config(model: PeftModel, name: str) -> None:
    """Writes what the layers really are into the adapter's ``LoraConfig``: r, alpha and their patterns."""
    config = cast(LoraConfig, model.peft_config[name])
    layers = _holders(model, name)
    rank = {path: layer.r[name] for path, layer in layers.items()}
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
    config.init_lora_weights = start_at_any_rank(config.init_lora_weights)
    config.use_rslora = False
    for key, value in rank_settings(rank, scaling).items():
        setattr(config, key, value)


def _set_factors(layer: LoraLinear, adapter: str, a: Tensor, b: Tensor) -> None:
    new_a, new_b = (
        nn.Parameter(new.contiguous(), requires_grad=old.requires_grad)
        for old, new in zip(factors(layer, adapter), (a, b), strict=True)
    )
    layer.r[adapter] = len(a) // (layer.num_experts if isinstance(layer, ParamWrapper) else 1)
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
    targeted = _targeted(model, adapter)
    left = {path for path, layer in targeted.items() if not isinstance(layer, ParamWrapper)}
    cast(LoraConfig, model.peft_config[adapter]).target_modules = left  # type: ignore[assignment]
    everyone = cast(list[str], model.base_model.targeted_module_names)  # of all adapters together
    if not in_use and path in everyone:
        everyone.remove(path)


def _targeted(model: PeftModel, adapter: str) -> dict[str, LoraLayer]:
    """Every layer of an adapter, of whatever kind, by the path of what it adapts."""
    return {
        _path_of(path, module): module
        for path, module in model.named_modules()
        if isinstance(module, LoraLayer) and (adapter in module.lora_A or adapter in module.lora_embedding_A)
    }
