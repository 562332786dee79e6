"""What the modules of an adapter cost in time, measured on the machine at hand.

A LoRA layer runs two more products than its base layer. In a decoding step most of what they cost is not arithmetic, and depends on
the machine. So it is measured: each kind of layer with and without its adapter, on the input that it gets in a step.
"""

import statistics
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gatewise.adapters.lora import active_adapter
from gatewise.allocation.slots import Expert, lora_layers
from gatewise.compress.order import Cost, stays_whole
from gatewise.errors import GatewiseError
from gatewise.internals.library_attributes import adapters_off
from gatewise.losses import base_of, loss_kind
from gatewise.tasks.metrics import measuring

_TEXT = 32  # tokens that are read before the step, or all that a classifier reads
_REPEATS = 15
_LEAST = 1e-9  # seconds: what is no slower with its adapter still counts as a module


def check_timed(model: nn.Module) -> None:
    """Raises GatewiseError for a model of which no step is known that could be timed."""
    base = base_of(model)
    if loss_kind(model) == "seq2seq" or base.main_input_name != "input_ids":
        raise GatewiseError(
            f"time is measured on a step of a model that writes or classifies texts, without an encoder beside it, and this is "
            f"{type(base).__name__}: ask for modules, which are what costs time, or parameters"
        )


def seconds_a_step(model: nn.Module, repeats: int = _REPEATS) -> float:
    """Seconds of a forward pass as in serving: one more token of one text, or for a classifier one short text."""
    with measuring(model):
        return _median(_step(model), repeats, next(model.parameters()).device)


def time_costs(model: nn.Module, adapter: str | None = None) -> dict[str, Cost]:
    """Path -> seconds that a module's LoRA adds to a step, whatever its rank. Layers of like shape are measured once."""
    name = active_adapter(model, adapter)
    layers = lora_layers(model, name)
    inputs: dict[int, tuple[Any, ...]] = {}
    own: dict[str, nn.Module] = {path: layer.layer if isinstance(layer, Expert) else layer for path, layer in layers.items()}
    calls: Counter[int] = Counter()  # a layer that several blocks share runs several times a step
    measured: dict[Any, float] = {}
    found: dict[str, Cost] = {}

    def look(layer: nn.Module, args: tuple[Any, ...]) -> None:
        inputs[id(layer)] = args
        calls[id(layer)] += 1

    with measuring(model):
        step = _step(model)
        hooks = [one.register_forward_pre_hook(look) for one in set(own.values())]
        try:
            step()
        finally:
            for hook in hooks:
                hook.remove()
        for path, layer in own.items():
            args = inputs.get(id(layer))
            if args is None:  # no step runs it
                found[path] = Cost(_LEAST, 0.0, stays_whole(layers[path], name))
                continue
            shape = (type(layer), *(tuple(one.shape) for one in args if isinstance(one, Tensor)), *_sizes(layer))
            if shape not in measured:
                measured[shape] = _extra_seconds(layer, args)
            found[path] = Cost(max(measured[shape] * calls[id(layer)], _LEAST), 0.0, stays_whole(layers[path], name))
    return found


def _sizes(layer: nn.Module) -> list[tuple[int, ...]]:
    return [tuple(parameter.shape) for parameter in layer.parameters()]


def _step(model: Any) -> Callable[[], object]:
    ids = torch.ones(1, _TEXT, dtype=torch.long, device=next(model.parameters()).device)
    if loss_kind(model) != "causal":
        return lambda: model(input_ids=ids)
    cache = getattr(model(input_ids=ids, use_cache=True), "past_key_values", None)
    if cache is None:  # such a model reads all of the text for each new token
        return lambda: model(input_ids=ids)

    # The cache grows by a token each time, of the few that are measured.
    return lambda: model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)


def _extra_seconds(layer: nn.Module, args: tuple[Any, ...]) -> float:
    device = next(layer.parameters()).device
    with_adapter = _median(lambda: layer(*args), _REPEATS, device)
    with adapters_off(layer):
        return with_adapter - _median(lambda: layer(*args), _REPEATS, device)


def _median(run: Callable[[], object], repeats: int, device: torch.device) -> float:
    times = []
    for _ in range(repeats + 2):  # the first two warm up
        began = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    return statistics.median(times[2:])
