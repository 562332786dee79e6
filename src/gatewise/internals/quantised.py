"""How a model is evaluated as it is trained: quantised base layers, layers that keep no activations, and half precision.

Some quantised layers compute otherwise in evaluation, and stay so when training goes on:

- On a CPU with AVX512-BF16, bitsandbytes' ``Linear4bit`` packs its weight anew at its first forward that is neither of training nor
  for a gradient. Its scales are then rounded to bfloat16, no gradient flows through it to the layers below, and PEFT merges noise
  into it. It unpacks before it is saved, only then, and wrongly where its scales are not quantised.
- bitsandbytes' ``Linear8bitLt`` rounds its input to 8 bits.
- GPT-QModel's layers for the CPU do all their life what their first forward was: one of evaluation has no gradient.

Read in bitsandbytes 0.50 and gptqmodel 7.6.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from gatewise.errors import GatewiseError
from gatewise.processes import is_sharded

_PACKED_DTYPES = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.float8_e4m3fn, torch.float8_e5m2)
_COMPUTE_BY_MODE = ("bitsandbytes.nn", "gptqmodel.nn_modules")


def is_quantised(module: nn.Module) -> bool:
    """True if a module itself, not one inside it, has quantised weights."""
    return any(map(_holds_quantised_numbers, [*module.parameters(recurse=False), *module.buffers(recurse=False)]))


def _holds_quantised_numbers(tensor: Tensor) -> bool:
    """bitsandbytes and torchao have parameters of their own types, GPTQ and AWQ pack into integers."""
    of_its_own = isinstance(tensor, nn.Parameter) and type(tensor) is not nn.Parameter
    return of_its_own or hasattr(tensor, "quant_state") or tensor.dtype in _PACKED_DTYPES


def never_pack(model: nn.Module) -> None:
    """Unpacks bitsandbytes' 4-bit weights that are packed, and has all of them stay as they were quantised."""
    for layer in _layers_by_mode(model):
        _unpack(layer)
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False


def check_gradients(model: nn.Module, adapter: str) -> None:
    """Refuses quantised base layers of an adapter's linear LoRA through which no gradient passes.

    Raises:
        GatewiseError: there is such a layer.
    """
    # Not at the top: this file is read while PEFT itself is being imported (see registry.py).
    from peft.tuners.lora import LoraLayer

    looked_at: set[tuple[type, type]] = set()
    for path, layer in model.named_modules():
        if not isinstance(layer, LoraLayer) or adapter not in layer.lora_A:
            continue
        base = layer.get_base_layer()
        kinds = type(base), type(getattr(base, "weight", None))
        if kinds in looked_at or not is_quantised(base) or is_sharded(model):
            continue
        looked_at.add(kinds)
        if not _passes_gradients(base, layer.in_features, getattr(model, "dtype", torch.float32)):
            raise GatewiseError(
                f"{path.removeprefix('base_model.model.')} is quantised so ({kinds[0].__name__}, {kinds[1].__name__}) that no "
                "gradient passes to the layers below, which would neither learn nor be scored: take weight-only quantisation, and "
                "do not evaluate the model before"
            )


def _passes_gradients(base: Any, width: Any, dtype: torch.dtype) -> bool:
    device = next((tensor.device for tensor in [*base.parameters(), *base.buffers()]), torch.device("cpu"))
    if device.type == "meta":  # offloaded: Accelerate brings the weights when the layer runs
        return True
    with torch.enable_grad():
        return bool(base(torch.ones(1, 1, width, dtype=dtype, device=device, requires_grad=True)).requires_grad)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """While open, a model is in evaluation, but for quantised layers, which compute as in training and have no dropout.

    Layers under gradient checkpointing keep no activations here either: they look at their own mode, and have no dropout of their
    own. Every module's mode is as before when it closes.
    """
    modes = [(module, module.training) for module in model.modules()]
    quantised, recomputed = _layers_by_mode(model), _recomputed_layers(model)
    model.eval()
    for layer in quantised:
        _unpack(layer)
    for layer in [*quantised, *recomputed]:
        layer.training = True
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def half_precision(model: nn.Module) -> list[Tensor]:
    """The weights and buffers of a model in half precision, each once, without those of quantised modules.

    A quantised module's packed weights may call themselves bfloat16, and its scales, which may be buffers, belong to them.
    """
    found: dict[int, Tensor] = {}
    kinds = (torch.bfloat16, torch.float16)
    for module in model.modules():
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if any(tensor.dtype in kinds for tensor in own) and not is_quantised(module):
            found |= {id(tensor): tensor for tensor in own if tensor.dtype in kinds}
    return list(found.values())


def original_forward(model: Any) -> Callable[..., Any] | None:
    """A model's forward without the autocast that Accelerate put into it; None where it put none."""
    kept: Callable[..., Any] | None = model.__dict__.get("_original_forward")
    return kept


def _recomputed_layers(model: nn.Module) -> list[nn.Module]:
    """The layers in training whose activations are computed again in the backward pass, and that drop nothing out themselves.

    Not those of re-entrant checkpointing, which takes no gradients by ``torch.autograd.grad``, and not those whose own code, unlike
    that of the modules inside them, asks whether it is training: it drops out.
    """
    return [
        layer
        for layer in model.modules()
        if isinstance(layer, GradientCheckpointingLayer)
        and layer.training
        and layer.gradient_checkpointing
        and not getattr(layer._gradient_checkpointing_func, "keywords", {}).get("use_reentrant", True)
        and not _asks_for_mode(type(layer))
    ]


def _asks_for_mode(kind: type) -> bool:
    """True if a method of a layer's class reads ``self.training``."""
    between = kind.__mro__[: kind.__mro__.index(GradientCheckpointingLayer)]
    own = (inspect.unwrap(one) for cls in between for one in vars(cls).values() if inspect.isfunction(one))
    return any("training" in one.__code__.co_names for one in own)


def _layers_by_mode(model: nn.Module) -> list[Any]:
    return [one for one in model.modules() if any(kind.__module__.startswith(_COMPUTE_BY_MODE) for kind in type(one).__mro__)]


def _unpack(layer: Any) -> None:
    state: Any = getattr(getattr(layer, "weight", None), "quant_state", None)
    if getattr(state, "packing_format_for_cpu", False):
        layer.state_dict()  # which unpacks the weight in place
        if state.absmax.ndim == 2:  # but leaves scales that are not quantised themselves as packing turned them
            state.absmax = state.absmax.T.reshape(-1).to(torch.float32)
