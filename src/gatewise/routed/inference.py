"""What the modules of a request run while no gradients are asked for: the base module alone, or two gathered products beside it.

Once the prompt is read, all that the adapters will add is known (MiLoRA, arXiv 2410.18035). A module that no row keeps is its base
module from then on. For one that is kept, the A and B of all adapters that keep it are gathered once, with gates and scaling
(gatewise/fast/products.py), for the prompt and every token after it, so that no step loops over adapters.

Shapes: b batch, n rows of one adapter, t tokens, d_in and d_out sizes of a linear module.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from gatewise.serving import products
from gatewise.serving.direct import Detours, Run, direct
from gatewise.serving.products import Gathered, Part, is_plain

if TYPE_CHECKING:
    from gatewise.routed.layer import RoutedLinear, Share
    from gatewise.routed.request import Request


class Running:
    """The one thing that all routed modules of a model look at when they run: setting it sets them all.

    Attributes:
        runs: what each module runs in the pass that is open. Empty between passes, and in passes with gradients, where blocks hand
            out shares instead.
        alone: no adapter is in use in the pass, and every module is its base module.
        tokens: how many each row of the pass has.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """No such pass is open."""
        self.runs: Mapping[nn.Module, Run] = {}
        self.alone, self.tokens = False, 0


class Prepared:
    """A request's modules, prepared for inference. Its key-value cache keeps this, so that it goes when the cache goes.

    Args:
        era: the tracker's count of what may have changed adapters.

    Attributes:
        runs: by module. Layers are added when they first run.
        complete: all layers have been.
        detours: ways past the modules, made when they are first gone.
    """

    def __init__(self, request: "Request", era: int) -> None:
        self.request = request
        self._begin(era)

    def __deepcopy__(self, memo: object) -> "Prepared":
        # A copied cache goes on with the request that filled it.
        return self

    def __reduce__(self) -> tuple[type, tuple[()]]:
        # A pickled cache goes without: in another process there is no such request, and its next pass says so.
        return type(None), ()

    def add(self, modules: "Mapping[str, RoutedLinear]", parts: "Mapping[str, tuple[Share, ...]]") -> None:
        """One layer's modules, by path, and what was decided for them."""
        for name, module in modules.items():
            shares = parts.get(name)
            self.runs[module] = (
                Kept(module, shares, self.request, self._products) if shares else direct(cast(nn.Module, module.base_layer))
            )

    def refresh(self, era: int) -> None:
        """Weights are read anew if they have changed, by the same decision."""
        if era != self._era or any(isinstance(run, Kept) and run.is_stale() for run in self.runs.values()):
            self._begin(era)

    def steps(self) -> dict[nn.Module, Run]:
        """What each module runs for one more token a row, once all have run."""
        return {module: run.step() if isinstance(run, Kept) else run for module, run in self.runs.items()}

    def _begin(self, era: int) -> None:
        self.runs: dict[nn.Module, Run] = {}
        self.detours: Detours | None = None
        self.complete, self._era, self._products = False, era, products.Request(self.request.batch)


class Kept:
    """A module that some row keeps: the base module and the products of those who do, gathered when it first runs.

    Where A and B are more than two matrices (dropout that is on, hooks), and where gradients are asked for in the middle of the
    pass after all, it runs as in training.
    """

    def __init__(self, layer: "RoutedLinear", shares: "tuple[Share, ...]", request: "Request", gathering: products.Request) -> None:
        self._layer, self._shares, self._gathering = layer, shares, gathering
        self._batch, self._groups = request.batch, request.groups
        self._base = direct(cast(nn.Module, layer.base_layer))
        self._gathered: Gathered | None = None
        self._dtype: torch.dtype | None = None
        self._read: list[tuple[dict[str, nn.Parameter | None], Tensor, object]] = []
        self._scalings: list[tuple[str, float]] = []
        self._shape = torch.Size()

    def __call__(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        """base(x) and what was decided: (b, ..., d_out) from (b, ..., d_in), or both with b · t in front."""
        result: Tensor = self._base(x, *args, **kwargs)
        layer = self._layer
        if layer.disable_adapters:
            return result
        batch = self._batch
        flattened = len(x) != batch
        rows, ours = x, result
        if flattened:
            layer.check_flattened(x, batch, layer.running.tokens)
            rows, ours = x.unflatten(0, (batch, -1)), result.unflatten(0, (batch, -1))
        if result.dtype != self._dtype:  # at first, and when autocast comes or goes
            self._gather(rows, ours)
        if self._gathered is None or torch.is_grad_enabled():
            return layer.with_shares(x, result, self._shares, batch, layer.running.tokens)
        total = self._gathered.add(rows, ours)
        return total.flatten(0, 1) if flattened else total

    def step(self) -> Run:
        """What it comes to for one more token a row."""
        return self if self._gathered is None else self._gathered.step(self._base, self, self._shape)

    def is_stale(self) -> bool:
        """Whether weights or scaling are no longer those that were gathered."""
        return any(own["weight"] is not weight or _version(weight) != version for own, weight, version in self._read) or any(
            self._layer.scaling.get(adapter) != scaling for adapter, scaling in self._scalings
        )

    def _gather(self, x: Tensor, result: Tensor) -> None:
        layer, self._dtype, self._gathered = self._layer, result.dtype, None
        parts = []
        self._read, self._scalings = [], []
        for share in self._shares:
            first, second = cast(nn.Linear, layer.lora_A[share.adapter]), cast(nn.Linear, layer.lora_B[share.adapter])
            if not is_plain(layer.lora_dropout[share.adapter], first, second, x):
                return
            rows, scaling = self._groups[share.adapter], layer.scaling[share.adapter]
            # Rows that do not keep the module have a gate of zero: the layout is then the same in every module.
            everywhere = rows is None or len(rows) == self._batch
            parts.append(Part(first.weight, second.weight, scaling, None if everywhere else rows, share.gate))
            self._read += [(one._parameters, one.weight, _version(one.weight)) for one in (first, second)]
            self._scalings.append((share.adapter, scaling))
        self._shape = x.shape
        # A hook may have kept what the base module made.
        self._gathered = self._gathering.gather(parts, result, in_place=not cast(nn.Module, layer.base_layer)._forward_hooks)


def _version(weight: Tensor) -> object:
    """Changes with whatever is written into a weight, unless it is written through ``.data``."""
    return weight.data_ptr(), None if weight.is_inference() else weight._version
