"""``fast_lora``: plain PEFT LoRA, unmerged, at nearly the speed of the bare base model, one adapter or a batch of several.

While PEFT's ``generate`` or ``forward`` runs, the LoRA layers have a forward of ours, which gathers the adapters' weights when it
first runs (products.py). Between calls the model is as PEFT made it, so that training, saving and copying know nothing of this, and
weights that have changed since are read anew. Whatever is not plain LoRA keeps PEFT's own forward, layer by layer.

PEFT tells layers the adapters of a mixed batch through hooks that it puts on them for the time of the call. A fast layer has none,
and its names are read from what would be its hook. Calls of several threads come one after the other.

Shapes: b batch, d hidden size, r rank.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from threading import RLock
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer, LoraModel
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from gatewise.errors import GatewiseError
from gatewise.internals.library_attributes import is_as_it_was
from gatewise.internals.torch_modules import called_directly, has_forward_hooks, is_plain
from gatewise.serving.products import BASE, Gathered, Part, Request, rows_side_by_side

# LoRA layers whose forward is base(x) and two products, by name: those on quantised bases exist only where their library does.
_LINEAR = {
    "Linear",
    "Linear4bit",
    "Linear8bitLt",
    "HqqLoraLinear",
    "TorchaoLoraLinear",
    "IncLoraLinear",
    "GPTQLoraLinear",
    "AwqLoraLinear",
    "AqlmLoraLinear",
    "EetqLoraLinear",
}

_ON_TUNER = "_enable_peft_forward_hooks"
Forward = Callable[..., Tensor]


class FastLora:
    """What ``fast_lora`` returns, in the manner of PyTorch's hook handles: it is on until ``remove()`` or the end of ``with``."""

    def __init__(self, tuner: LoraModel) -> None:
        self._tuner = tuner

    def remove(self) -> None:
        """Gives the model back to PEFT. Doing it again changes nothing."""
        self._tuner.__dict__.pop(_ON_TUNER, None)

    def __enter__(self) -> "FastLora":
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def fast_lora(model: nn.Module) -> FastLora:
    """Makes unmerged LoRA adapters fast in inference, above all in batches whose rows belong to different ones.

        fast_lora(model)                                                   # from here on
        model.generate(**inputs, adapter_names=["legal", "__base__", "medical"])

        with fast_lora(model): ...                                         # only inside
        handle = fast_lora(model); ...; handle.remove()                    # until then

    ``model.generate`` and ``model(...)`` then give what PEFT gives, up to rounding: in half precision the adapters are read in the
    precision of the base module's output, where PEFT computes with float32 copies. Adapters may differ in rank, scaling and target
    modules, and may be added, deleted, trained, activated or disabled at any time; each call reads the weights as they are.
    Several threads may call the model: their calls come one after the other. In bfloat16 on a CPU decoding is a little faster where
    Numba is installed, as the extra ``server`` has it.

    PEFT's own forward runs, with PEFT's own errors, in training mode, where gradients are on (call the model under
    ``torch.no_grad()``; ``generate`` does), while adapters are merged, under ``torch.compile``, and for every module where one of
    the adapters in use is more than two matrices: DoRA and other variants, ``lora_bias``, embeddings, convolutions, stacked
    experts, hooks on A or B, layers with a forward hook of Accelerate's.

    Args:
        model: a ``PeftModel`` with LoRA adapters.

    Raises:
        GatewiseError: the model is not one.
    """
    if not isinstance(model, PeftModel):
        raise GatewiseError(
            f"expected a PeftModel with LoRA adapters, got {type(model).__name__}: wrap the model with peft.get_peft_model or "
            "PeftModel.from_pretrained first"
        )
    tuner = model.base_model
    if type(tuner) is not LoraModel:
        kinds = ", ".join(sorted({str(config.peft_type).split(".")[-1] for config in model.peft_config.values()}))
        raise GatewiseError(f"expected LORA adapters, but the model's are {kinds}: this switch is for plain LoRA")
    tuner.__dict__.setdefault(_ON_TUNER, _Calls(tuner).open)
    return FastLora(tuner)


class _Calls:
    """Stands in for the context manager that PEFT opens around every ``generate`` and ``forward``.

    As an attribute of the tuner it goes before the method of its class. Bound methods of objects can be copied and pickled, so the
    model still can be.
    """

    def __init__(self, tuner: LoraModel) -> None:
        self._tuner = tuner
        self._forwards: Mapping[nn.Module, Forward] = {}  # that layers have now, by the innermost call
        self._turn = RLock()  # PEFT tells layers their adapters by hooks, which hold for all threads

    def __getstate__(self) -> dict[str, Any]:
        return {"tuner": self._tuner}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["tuner"])  # type: ignore[misc]

    @contextmanager
    def open(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """The layers run fast while open. Calls inside of a call (a logits processor's) come before it and give it back."""
        theirs = getattr(type(self._tuner), _ON_TUNER)(self._tuner, *args, **kwargs)
        if torch.compiler.is_compiling():
            with theirs:
                yield
            return
        mixed = kwargs.get("adapter_names") is not None
        with ExitStack() as stack:
            stack.enter_context(self._turn)
            layers = []
            if not self._tuner.training and kwargs.get("alora_offsets") is None:
                layers = self._free_layers()
            names: dict[nn.Module, Sequence[str]] = {}
            with _names_instead_of_hooks(layers if mixed else [], names):
                stack.enter_context(theirs)
            batches = {id(one): _Batch(one) for one in names.values()}
            active = _Batch(None)  # whose adapters serve all rows
            forwards = {layer: _forward(layer, active) for layer in layers if not mixed}
            forwards |= {layer: _forward(layer, batches[id(own)]) for layer, own in names.items()}
            stack.callback(self._put, self._forwards)
            self._put(forwards)
            stack.enter_context(rows_side_by_side(self._tuner.model))
            yield

    def _free_layers(self) -> list[nn.Module]:
        """Layers whose forward is not somebody else's, such as Accelerate's hooks give it."""
        layers = [module for module in self._tuner.modules() if _is_linear(module)]
        return [layer for layer in layers if "forward" not in layer.__dict__ or layer in self._forwards]

    def _put(self, forwards: Mapping[nn.Module, Forward]) -> None:
        """Layers have these forwards from here on, and PEFT's where there is none."""
        for layer in self._forwards:
            layer.__dict__.pop("forward", None)
        for layer, forward in forwards.items():
            layer.__dict__["forward"] = forward
        self._forwards = forwards


@contextmanager
def _names_instead_of_hooks(layers: Sequence[nn.Module], names: dict[nn.Module, Sequence[str]]) -> Iterator[None]:
    """While open, PEFT's hooks with adapter names go into ``names``: each would cost more than its layer's products.

    The last ones count: PEFT gives an encoder names of its own after the others.
    """

    def register(layer: nn.Module, hook: Any, **settings: Any) -> RemovableHandle:
        names[layer] = hook.keywords["adapter_names"]
        return RemovableHandle(OrderedDict())

    for layer in layers:
        layer.__dict__["register_forward_pre_hook"] = partial(register, layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.__dict__["register_forward_pre_hook"]


class _Batch:
    """The rows of a call: PEFT's ``names`` by row (None: the active adapters serve all), ``rows`` by name, and their request."""

    def __init__(self, names: Sequence[str] | None) -> None:
        self.names = names
        self.rows: dict[str, list[int]] = {}
        for row, name in enumerate(names or ()):
            if name != BASE:
                self.rows.setdefault(name, []).append(row)
        self.request = Request(None if names is None else len(names))


def _forward(layer: Any, batch: _Batch) -> Forward:
    """The forward that a layer has during one call."""
    module: nn.Module = layer.base_layer
    base = called_directly(module)
    theirs, is_unchanged = type(layer).forward, is_as_it_was(layer)
    names, rows = batch.names, None if batch.names is None else len(batch.names)
    parts: list[Part] | None = []
    gathered: Gathered | None = None
    known = False

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        nonlocal parts, gathered, known
        if not known:
            known, parts = True, _parts(layer, batch, x)
        if (
            parts is None
            or not is_unchanged()
            or (rows is not None and x.shape[0] != rows)
            or args
            or kwargs
            or torch.is_grad_enabled()
            or torch.compiler.is_compiling()
        ):
            if names is not None:
                kwargs.setdefault("adapter_names", names)
            return theirs(layer, x, *args, **kwargs)
        result: Tensor = base(x)
        if not parts:
            return result
        if gathered is None or gathered.dtype != result.dtype:
            # A hook may have kept what the base module made.
            gathered = batch.request.gather(parts, result, in_place=not has_forward_hooks(module))
        return gathered.add(x, result)

    return forward


def _parts(layer: Any, batch: _Batch, x: Tensor) -> list[Part] | None:
    """What is added in a layer; None if it is more than two matrices for an adapter."""
    made = []
    if layer.disable_adapters:  # for PEFT before any names
        return []
    for name in layer.active_adapters if batch.names is None else batch.rows:
        if name in layer.lora_A:
            if name in layer.lora_variant or not is_plain(layer.lora_dropout[name], layer.lora_A[name], layer.lora_B[name], x):
                return None
            rows = batch.rows.get(name)
            everywhere = batch.names is not None and rows is not None and len(rows) == len(batch.names)
            first, second = layer.lora_A[name].weight, layer.lora_B[name].weight
            made.append(Part(first, second, layer.scaling[name], None if everywhere else rows))
    return made


def _is_linear(module: nn.Module) -> bool:
    kind = type(module)
    return isinstance(module, LoraLayer) and kind.__name__ in _LINEAR and kind.__module__.startswith("peft.tuners.lora.")
