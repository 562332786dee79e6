"""Quantised base layers: which they are, and how they are held to computing as in training.

Some of them compute otherwise in evaluation, and stay so when training goes on:

- On a CPU with AVX512-BF16, bitsandbytes' ``Linear4bit`` packs its weight anew at its first forward that is neither of training nor
  for a gradient. Its scales are then rounded to bfloat16, no gradient flows through it to the layers below, and PEFT merges noise
  into it. It unpacks before it is saved, only then, and wrongly where its scales are not quantised.
- bitsandbytes' ``Linear8bitLt`` rounds its input to 8 bits.
- GPT-QModel's layers for the CPU do all their life what their first forward was: one of evaluation has no gradient.

Read in bitsandbytes 0.50 and gptqmodel 7.6.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_PACKED_DTYPES = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.float8_e4m3fn, torch.float8_e5m2)
_COMPUTE_BY_MODE = ("bitsandbytes.nn", "gptqmodel.nn_modules")


def is_quantised(module: nn.Module) -> bool:
    """Whether a module itself, not one inside it, has quantised weights."""
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


@contextmanager
def computing_as_in_training(model: nn.Module) -> Iterator[None]:
    """While open, quantised layers compute as in training, whatever mode the model is in. They have no dropout."""
    modes = [(layer, layer.training) for layer in _layers_by_mode(model)]
    for layer, _ in modes:
        _unpack(layer)
        layer.training = True
    try:
        yield
    finally:
        for layer, mode in modes:
            layer.training = mode


def _layers_by_mode(model: nn.Module) -> list[Any]:
    return [one for one in model.modules() if any(kind.__module__.startswith(_COMPUTE_BY_MODE) for kind in type(one).__mro__)]


def _unpack(layer: Any) -> None:
    state: Any = getattr(getattr(layer, "weight", None), "quant_state", None)
    if getattr(state, "packing_format_for_cpu", False):
        layer.state_dict()  # which unpacks the weight in place
        if state.absmax.ndim == 2:  # but leaves scales that are not quantised themselves as packing turned them
            state.absmax = state.absmax.T.reshape(-1).to(torch.float32)
