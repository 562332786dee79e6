"""Live and dead rank slots on stock PEFT LoRA layers: widen, prune, grow, compact, and what the optimiser keeps of them.

A LoRA layer of capacity ``r_max`` has ``r_max`` slots. Slot i is row i of A (r_max, d_in) and column i of B (d_out, r_max). It is
*dead* when both are zero. A dead slot adds nothing to the output, and because the gradient of each factor is multiplied by the
other factor its gradient is exactly zero: it stays dead without a mask, at stock LoRA's speed. Which slots live is read from the
weights alone, so a checkpoint needs no second source of truth.

Each expert of a stacked parameter (``target_parameters``) is a module with slots of its own, an ``Expert``, although PEFT keeps the
factors of all of them in one A (experts * r_max, d_in) and one B (d_out, r_max * experts).

A pruned slot's optimiser state is cleared. A grown one starts with a state of zero, as any new parameter does. For SGD, Lion or
RMSprop that is all. Adam and its relatives also divide their running averages by 1 - beta^t, where t counts the steps of the whole
parameter, which is old: the slot would move several learning rates a step. So its running average of squares starts at the mean of
the live slots', and its steps are about as large as theirs. States in 8 bits (bitsandbytes) or of two averages (AdEMAMix) are not
rewritten: a module that grows begins them anew, and dead slots, which such an optimiser moves although they have no gradient, are
zeroed after each step.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import MultiheadAttention, ParamWrapper
from torch import Tensor, nn
from torch.optim import Optimizer

from gatewise.adapters.files import PEFT_PREFIX
from gatewise.adapters.lora import active_adapter, alphas, rank_settings, start_at_any_rank, takes_out_of_base, target_settings
from gatewise.errors import GatewiseError

logger = logging.getLogger(__name__)

_WORKING_VARIANTS = ("Dora", "ALora", "Velora")
"""How the names of PEFT's classes of variants begin whose ranks can be moved (read in PEFT 0.21: ``peft.tuners.lora.variants``)."""


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


# ---------------------------------------------------------------- which layers there are


def lora_layers(model: nn.Module, adapter: str | None = None) -> dict[str, LoraLinear]:
    """Every LoRA layer of an adapter whose ranks can be moved, by its path in the base model, in module order.

    Linear layers and GPT-2's ``Conv1D`` count, quantised ones too, and embeddings. Convolutions and ``nn.MultiheadAttention`` are
    left as they are. Of a stacked parameter each expert is there, an ``Expert``, by the path of the parameter and its number, such
    as "model.layers.0.mlp.experts.down_proj[2]". The type is nominal: all these have its attributes.
    """
    return layers_of(model, active_adapter(model, adapter))


def layers_of(model: nn.Module, name: str) -> dict[str, LoraLinear]:
    """``lora_layers`` of an adapter that is known to be there."""
    return {path: site for held_at, layer in _holders(model, name).items() for path, site in _modules_of(held_at, layer)}


def _modules_of(path: str, layer: LoraLinear) -> Iterator[tuple[str, LoraLinear]]:
    """The modules whose slots a LoRA layer holds: itself, or the experts of its parameter."""
    if not isinstance(layer, ParamWrapper):
        yield path, layer
        return
    for number in range(layer.num_experts):
        yield path if layer.num_experts == 1 else f"{path}[{number}]", cast(LoraLinear, Expert(layer, number))


def _targeted(model: nn.Module, name: str) -> dict[str, LoraLayer]:
    """Every layer of an adapter, of whatever kind, by the path in the base model of what it adapts."""
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, LoraLayer) and (name in module.lora_A or name in module.lora_embedding_A):
            path = path.removeprefix(PEFT_PREFIX)
            if isinstance(module, ParamWrapper):  # the layers of several parameters lie in one another
                path = f"{path.replace('.base_layer', '')}.{module.parameter_name}"
            found[path] = module
    return found


def _holders(model: nn.Module, name: str) -> dict[str, LoraLinear]:
    """The LoRA layers that hold the slots of an adapter, by the path of the module or parameter they adapt."""
    targeted = _targeted(model, name)
    # PEFT merges the factors of these for each pass, those of a LoRA layer inside too, and gives both the same rank.
    attention = tuple(f"{path}." for path, layer in targeted.items() if isinstance(layer, MultiheadAttention))
    return {
        path: cast(LoraLinear, layer)
        for path, layer in targeted.items()
        if name in layer.lora_embedding_A or isinstance(layer.lora_A[name], nn.Linear)
        if not f"{path}.".startswith(attention)
    }


def left_alone(model: nn.Module, adapter: str) -> list[str]:
    """Paths of what an adapter's LoRA layers adapt that ``lora_layers`` leaves out: no score reads it, and no budget counts it.

    Of ``nn.MultiheadAttention``, which has a LoRA layer inside, the path of the whole.
    """
    movable = _holders(model, adapter)
    return [path for path in _targeted(model, adapter) if path not in movable and ".base_layer" not in path]


def check_movable(model: nn.Module, name: str) -> None:
    """Refuses an adapter of a variant of LoRA that was not tried, and one whose layers share their ranks.

    Raises:
        GatewiseError: there is such a layer.
    """
    for path, any_layer in _targeted(model, name).items():
        variant = type(any_layer.lora_variant.get(name)).__name__
        if name in any_layer.lora_variant and not variant.startswith(_WORKING_VARIANTS):
            raise GatewiseError(
                f"{path} has LoRA of the variant {variant}, whose ranks cannot be moved: leave it out of the LoraConfig"
            )
    owners: dict[int, str] = {}
    for path, layer in _holders(model, name).items():
        for factor in factors(layer, name):
            if factor.device.type != "meta" and owners.setdefault(factor.data_ptr(), path) != path:
                raise GatewiseError(
                    f"{path} and {owners[factor.data_ptr()]} share their LoRA factors (ensure_weight_tying), whose ranks cannot be "
                    "moved apart: leave ensure_weight_tying out, or one of the two out of target_modules"
                )


def carries_more_than_ranks(layer: LoraLinear, adapter: str) -> bool:
    """True if a LoRA layer changes its base module even without ranks: by DoRA's magnitude, or a bias on B."""
    variant = layer.lora_variant.get(adapter)
    # aLoRA is plain LoRA from some token on: without ranks it changes nothing.
    changes = variant is not None and not type(variant).__name__.startswith("ALora")
    return changes or (adapter in layer.lora_B and layer.lora_B[adapter].bias is not None)


def keep_a_rank(model: PeftModel, name: str) -> bool:
    """True if every module must keep a rank in rounds: one with a magnitude or a trained bias stays in the adapter without ranks,
    and is written with a rank of zeros, which no budget would count."""
    layers = [layer for layer in _holders(model, name).values() if not isinstance(layer, ParamWrapper)]
    return any(_stays_without_ranks(model, layer, name) for layer in layers)


def _stays_without_ranks(model: PeftModel, layer: LoraLinear, name: str) -> bool:
    # PEFT trains the biases of the base modules that have LoRA, and saves them only there.
    own_biases = cast(LoraConfig, model.peft_config[name]).bias == "lora_only"
    has_bias = getattr(layer.get_base_layer(), "bias", None) is not None
    return carries_more_than_ranks(layer, name) or (own_biases and has_bias) or isinstance(layer, ParamWrapper)


# ---------------------------------------------------------------- the slots of a layer


def factors(layer: LoraLinear, adapter: str) -> tuple[nn.Parameter, nn.Parameter]:
    """A (r_max, d_in) and B (d_out, r_max) of a layer, the parameters themselves.

    Those of an ``Expert`` have the slots of the other experts too: see ``by_slot``.
    """
    if adapter in layer.lora_embedding_A:
        return layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
    return cast(nn.Parameter, layer.lora_A[adapter].weight), cast(nn.Parameter, layer.lora_B[adapter].weight)


def _number_and_experts(layer: LoraLinear) -> tuple[int, int]:
    """Which of how many modules that share one A and one B a layer is."""
    return (layer.number, layer.layer.num_experts) if isinstance(layer, Expert) else (0, 1)


def _view(layer: LoraLinear, tensor: Tensor, of_b: int) -> Tensor:
    """A layer's slots in a tensor that has those of its factor, A or B, along the same dimension: slots first. It is a view."""
    number, experts = _number_and_experts(layer)
    if of_b:
        return tensor.unflatten(-1, (-1, experts))[..., number].movedim(-1, 0)
    return tensor.unflatten(0, (experts, -1))[number]


def by_slot(layer: LoraLinear, adapter: str, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Two tensors of the shapes of A and B, as (r_max, d_in) and (r_max, d_out): the numbers of each slot. They are views."""
    return _view(layer, a, 0), _view(layer, b, 1)


def set_slots(layer: LoraLinear, adapter: str, rows: Tensor, columns: Tensor) -> None:
    """Writes the first slots of a layer, as many as are given: the numbers of its A and B as ``by_slot`` gives them."""
    for now, new in zip(by_slot(layer, adapter, *(one.detach() for one in factors(layer, adapter))), (rows, columns), strict=True):
        now[: len(new)] = new


def live_mask(layer: LoraLinear, adapter: str) -> Tensor:
    """(r_max,) bool: which slots of a layer live. Dead means that the row of A and the column of B are both zero."""
    rows, columns = by_slot(layer, adapter, *(factor.detach() for factor in factors(layer, adapter)))
    return (rows != 0).any(dim=1) | (columns != 0).any(dim=1)


def live_slots(layer: LoraLinear, adapter: str) -> list[int]:
    """The indices of a layer's live slots, ascending."""
    return live_mask(layer, adapter).nonzero().flatten().tolist()


def dead_slots(layer: LoraLinear, adapter: str) -> Tensor:
    """The indices of a layer's dead slots, ascending."""
    return (~live_mask(layer, adapter)).nonzero().flatten()


def capacity(layer: LoraLinear, adapter: str) -> int:
    """How many slots a layer has."""
    return len(factors(layer, adapter)[0]) // _number_and_experts(layer)[1]


def capacities(layers: Mapping[str, LoraLinear], adapter: str) -> dict[str, int]:
    """Path -> slots."""
    return {path: capacity(layer, adapter) for path, layer in layers.items()}


def costs(layers: Mapping[str, LoraLinear], adapter: str) -> dict[str, int]:
    """Path -> the numbers of one of its ranks, a row of A and a column of B: d_in + d_out."""
    return {path: a.shape[1] + len(b) for path, (a, b) in ((path, factors(layer, adapter)) for path, layer in layers.items())}


def ranks(model: nn.Module, adapter: str | None = None) -> dict[str, int]:
    """Path -> number of live ranks."""
    name = active_adapter(model, adapter)
    return live_ranks(layers_of(model, name), name)


def live_ranks(layers: Mapping[str, LoraLinear], adapter: str) -> dict[str, int]:
    """Path -> number of live ranks."""
    return {path: int(live_mask(layer, adapter).sum()) for path, layer in layers.items()}


# ---------------------------------------------------------------- pruning and growing


def prune(layer: LoraLinear, adapter: str, slots: Sequence[int] | Tensor, optimizer: Optimizer | None = None) -> None:
    """Kills slots: zeroes their row of A and column of B and clears the optimiser's moments for them.

    Also zeroes slots that are dead again after a step of an optimiser that moves what has no gradient.
    """
    for of_b, factor in enumerate(factors(layer, adapter)):
        _view(layer, factor.data, of_b)[slots] = 0
    if optimizer is not None:
        _clear(layer, adapter, slots, optimizer)


def grow(layer: LoraLinear, adapter: str, n: int, generator: torch.Generator, optimizer: Optimizer | None = None) -> list[int]:
    """Brings the ``n`` lowest dead slots to life as LoRA starts a rank: a random row of A, a zero column of B.

    The function is unchanged and gradient flows into B. The row is drawn as PEFT draws A (Kaiming uniform with a = sqrt(5),
    that is uniform in +-1/sqrt(d_in)) from ``generator``, a CPU generator, so that a resumed run draws the same numbers.
    PEFT starts embeddings the other way round, with A at zero and B normal, and so does this.

    Raises:
        ValueError: the layer has fewer than ``n`` dead slots.
    """
    dead = dead_slots(layer, adapter)[:n]
    if len(dead) < n:
        raise ValueError(f"{n} ranks to grow but only {len(dead)} dead slots")
    alive = [(one, live_mask(one, adapter)) for one in _sharing(layer)] if optimizer is not None else []
    a, b = (factor.data for factor in factors(layer, adapter))
    rows, columns = by_slot(layer, adapter, a, b)
    if adapter in layer.lora_embedding_B:
        columns[dead] = torch.randn(len(b), n, generator=generator).T.to(b)
    else:
        rows[dead] = ((torch.rand(n, a.shape[1], generator=generator) * 2 - 1) * a.shape[1] ** -0.5).to(a)
    if optimizer is not None:
        _clear(layer, adapter, dead, optimizer)
        _start_in_optimizer(layer, adapter, dead, alive, optimizer)
    return dead.tolist()


def _sharing(layer: LoraLinear) -> list[LoraLinear]:
    """The modules that share a layer's A and B, and so what the optimiser keeps of them: the experts of a parameter."""
    if not isinstance(layer, Expert):
        return [layer]
    return [cast(LoraLinear, Expert(layer.layer, number)) for number in range(layer.layer.num_experts)]


# Running averages of squares, by the names that optimisers give them ("state2" is bitsandbytes'). Adafactor keeps the mean of those
# of each row and of each column: Transformers drops the dimension that it averages over, torch keeps it with size 1.
_SQUARES = ("exp_avg_sq", "max_exp_avg_sq", "state2", "exp_avg_sq_B")
_FACTORED_SQUARES = (("exp_avg_sq_row", "row_var"), ("exp_avg_sq_col", "col_var"))


def _kept_of(factor: nn.Parameter, optimizer: Optimizer) -> tuple[Any, dict[str, Any]]:
    """What an optimiser keeps of a factor, and by what: the factor itself or, as PEFT's LoRA-FA keeps B, the layer's name."""
    for group in getattr(optimizer, "param_groups", ()):
        for name, one in zip(group.get("names", ()), group["params"], strict=False):
            if one is factor and "lora_B" in name:
                key = name[: name.find("lora")] + "lora"
                return key, optimizer.state.get(key, {})
    return factor, optimizer.state.get(factor, {})


def _clear(layer: LoraLinear, adapter: str, slots: Sequence[int] | Tensor, optimizer: Optimizer) -> None:
    """Sets to zero what the optimiser keeps of these slots, and their gradient: a dead slot then stays dead."""
    for of_b, factor in enumerate(factors(layer, adapter)):
        for value in (factor.grad, *_kept_of(factor, optimizer)[1].values()):
            if isinstance(value, Tensor) and value.shape == factor.shape and value.is_floating_point():
                _view(layer, value, of_b)[slots.to(value.device) if isinstance(slots, Tensor) else slots] = 0


def _start_in_optimizer(
    layer: LoraLinear, adapter: str, grown: Tensor, alive: Sequence[tuple[LoraLinear, Tensor]], optimizer: Optimizer
) -> None:
    """Gives grown slots, whose weights are in place, the optimiser state that their training starts from.

    Args:
        alive: the modules that share A and B, each with the (r_max,) mask of its slots that lived before.
    """
    for of_b, factor in enumerate(factors(layer, adapter)):
        key, state = _kept_of(factor, optimizer)
        squares = [key for key in (*_SQUARES, *_FACTORED_SQUARES[of_b]) if key in state]
        tensors = [value for value in state.values() if isinstance(value, Tensor)]
        # AdEMAMix stacks two averages in one.
        unwritten = any(value.dtype == torch.uint8 or value.ndim > factor.ndim for value in tensors)
        # Without a mean to take, the optimiser makes this parameter's state anew.
        if unwritten or (squares and not any(bool(mask.any()) for _, mask in alive)):
            del optimizer.state[key]
            continue
        for square in squares:
            place = state[square].device  # of an optimiser that pages, not that of the factor
            live = torch.cat([_view(one, state[square], of_b)[mask.to(place)] for one, mask in alive])
            along = -1 if of_b else 0  # in memory as in the factor, so that the sum is taken in the same order
            _view(layer, state[square], of_b)[grown.to(place)] = live.movedim(0, along).contiguous().mean(along)


# ---------------------------------------------------------------- more room, and none that is not used


def widen(model: PeftModel, r_max: int | None = None, adapter: str | None = None) -> dict[str, int]:
    """Gives every LoRA layer ``r_max`` slots, the added ones dead. The function computed does not change.

    Call it before the optimiser exists: the parameters are replaced. The scaling stays what it was (alpha / r of the
    adapter as it was made), and the adapter's config is rewritten so that a checkpoint is a valid plain LoRA adapter.

    Args:
        r_max: slots a layer; None doubles each layer's rank.

    Returns:
        Path -> slots.

    Raises:
        GatewiseError: a layer already has more ranks than ``r_max``.
    """
    name = adapter or active_adapter(model)
    for path, layer in _holders(model, name).items():
        modules = [module for _, module in _modules_of(path, layer)]
        old = capacity(modules[0], name)
        new = 2 * old if r_max is None else int(r_max)
        if new < old:
            raise GatewiseError(f"r_max is {new} but {path} already has rank {old}: give an r_max of at least {old}")
        if new > old:
            _move_slots(layer, name, modules, [list(range(old))] * len(modules), new)
    write_config(model, name)
    return capacities(layers_of(model, name), name)


def _move_slots(layer: LoraLinear, name: str, modules: Sequence[LoraLinear], kept: Sequence[Sequence[int]], slots: int) -> None:
    """Gives a LoRA layer new factors of ``slots`` slots a module: those ``kept`` of each module first, then zeros."""
    a, b = (factor.detach() for factor in factors(layer, name))
    values = [[own[list(some)] for own in by_slot(module, name, a, b)] for module, some in zip(modules, kept, strict=True)]
    _set_factors(layer, name, a.new_zeros(len(modules) * slots, a.shape[1]), b.new_zeros(len(b), len(modules) * slots))
    for module, (rows, columns) in zip(modules, values, strict=True):
        set_slots(module, name, rows, columns)


def _set_factors(layer: LoraLinear, adapter: str, a: Tensor, b: Tensor) -> None:
    new_a, new_b = (
        nn.Parameter(new, requires_grad=old.requires_grad) for old, new in zip(factors(layer, adapter), (a, b), strict=True)
    )
    layer.r[adapter] = len(a) // (layer.num_experts if isinstance(layer, ParamWrapper) else 1)
    if adapter in layer.lora_embedding_A:
        layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter] = new_a, new_b
        return
    down, up = layer.lora_A[adapter], layer.lora_B[adapter]
    down.weight, up.weight = new_a, new_b
    down.out_features = up.in_features = len(a)  # type: ignore[assignment]


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
    name = adapter or active_adapter(model)
    if not any(bool(live_mask(layer, name).any()) for layer in layers_of(model, name).values()):
        raise GatewiseError(f"adapter {name!r} has no live rank left in any module: there is nothing to save")
    kept: dict[str, int] = {}
    gone = False
    for path, layer in _holders(model, name).items():
        modules = dict(_modules_of(path, layer))
        live = [live_slots(module, name) for module in modules.values()]
        most = max(map(len, live))
        if not most and not _stays_without_ranks(model, layer, name):
            _remove_layer(model, path, name)
            gone = True
            continue
        # A module that must stay keeps a slot, which is zero.
        if max(most, 1) < capacity(next(iter(modules.values())), name):
            _move_slots(layer, name, list(modules.values()), live, max(most, 1))
        kept |= dict.fromkeys(modules, max(most, 1))
    write_config(model, name, spell_out=gone)
    return kept


def write_config(model: PeftModel, name: str, spell_out: bool = False) -> None:
    """Writes what the layers really are into the adapter's ``LoraConfig``: r, alpha and their patterns.

    Args:
        spell_out: name each module that is targeted, for names such as "q_proj" stand for many, of which one is gone.
    """
    config = cast(LoraConfig, model.peft_config[name])
    layers = _holders(model, name)
    rank = {path: layer.r[name] for path, layer in layers.items()}
    scaling = {path: layer.scaling[name] for path, layer in layers.items()}
    targeted = _targeted(model, name)
    for path, module in targeted.items():
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
    settings = rank_settings(rank, scaling)
    if spell_out:
        left = {path for path, layer in targeted.items() if not isinstance(layer, ParamWrapper)}
        settings |= target_settings(left, (path.removeprefix(PEFT_PREFIX) for path, _ in model.named_modules()))
    for key, value in settings.items():
        setattr(config, key, set(value) if isinstance(value, list) else value)


def _remove_layer(model: PeftModel, path: str, adapter: str) -> None:
    """Puts the base module back in the place of a LoRA layer without ranks."""
    parent_path, _, child = (PEFT_PREFIX + path).rpartition(".")
    parent = model.get_submodule(parent_path)
    layer = getattr(parent, child)
    others = [name for name in layer.active_adapters if name != adapter]
    layer.set_adapter(others)  # first, or deleting the adapter would make another one active here and nowhere else
    layer.delete_adapter(adapter)
    in_use = bool(layer.lora_A or layer.lora_embedding_A)  # by other adapters
    if not in_use:
        setattr(parent, child, layer.base_layer)
    everyone = cast(list[str], model.base_model.targeted_module_names)  # of all adapters together
    if not in_use and path in everyone:
        everyone.remove(path)
