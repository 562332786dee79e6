"""Which prompt a forward belongs to: a new one, whose layers are to be routed, or one whose routing is already decided.

The routing is decided once, when the prompt is first encoded, and holds for every token after it (MiLoRA, arXiv 2410.18035). A
request is one batch of prompts with its decisions; a pass is one forward of the base model. A pass belongs to the request that
filled its key-value cache. So the cache carries the request with it: through beams, through copies, and apart from other caches. A
pass without cached tokens starts a request.

Shapes: b batch, t tokens, n rows of one adapter, m experts of a layer.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gatewise.errors import GatewiseError
from gatewise.internals.call_tracking import Call, CallTracker, cache_of, cached_tokens, text_inputs
from gatewise.serving import products
from gatewise.serving.products import BASE

Groups = dict[str, list[int] | None]
"""The adapters of a batch, each with its rows; None for all of them."""

_ON_CACHE = "_gatewise_request"


@dataclass(frozen=True)
class Decision:
    """What one adapter's router decided in one layer.

    Attributes:
        experts: (m), paths within the layer of the modules that it decided on.
        probabilities, gates: (b, m), zero in rows that the adapter does not serve.
    """

    experts: tuple[str, ...]
    probabilities: Tensor
    gates: Tensor


class Share(NamedTuple):
    """What one adapter adds in one module: to the ``rows`` (n) of a batch, None for all, each with its ``gate`` (n,)."""

    adapter: str
    rows: list[int] | None
    gate: Tensor


@dataclass(eq=False)
class Request:
    """A batch of prompts: where they lie (b, t), whose adapters serve them, and what was decided.

    Attributes:
        decided: path of the layer -> adapter -> decision.
        centrings: by layer and adapter, what a router took off in training: a layer that is run again decides as before, whatever
            prompts were observed since.
        products: what gathers the weights in inference.
        runs: what each module runs in inference; layers add theirs when they first run. They hold A and B as these were then.
        complete: all layers have.
    """

    tracker: "RequestTracker"
    prompt: Tensor
    groups: Groups
    training: bool
    decided: dict[str, dict[str, Decision]] = field(default_factory=dict)
    centrings: dict[tuple[str, str], Any] = field(default_factory=dict)
    products: Any = field(init=False)
    runs: dict[nn.Module, Callable[..., Tensor]] = field(default_factory=dict)
    complete: bool = False

    def __post_init__(self) -> None:
        self.products = products.Request(len(self.prompt))

    def __deepcopy__(self, memo: object) -> "Request":
        return self  # a copied cache goes on with the request that filled it


class Pass:
    """One forward of the base model. Not a dataclass: layers are given it as an argument, and of those FSDP makes new ones.

    Attributes:
        batch: rows.
        continues: the decisions are there already.
        is_inference: in evaluation mode and without gradients.
        is_settled: all that any module runs is known, so that layers have nothing to do.
        runs: what each module runs.
        seen: paths of the layers that were entered.
    """

    def __init__(self, request: Request, batch: int, continues: bool, is_inference: bool) -> None:
        self.request, self.batch, self.continues, self.is_inference = request, batch, continues, is_inference
        self.is_settled = not request.groups or (is_inference and request.complete)
        self.runs = request.runs if is_inference else {}
        self.seen: set[str] = set()


class RequestTracker(CallTracker):
    """Watches the base model's forwards and finds the request that each belongs to.

    Args:
        models, causal: as in ``CallTracker``.
        active: names of the adapters in use, none while they are disabled.
        finish: called with (request, arguments of the forward, output) when a pass in training ends; what it returns replaces the
            output.
    """

    def __init__(
        self,
        models: Sequence[nn.Module],
        causal: bool,
        active: Callable[[], Sequence[str]],
        finish: Callable[[Request, Mapping[str, Any], Any], Any],
    ) -> None:
        super().__init__(models, "routed adapters", "routers", causal, active)
        self._finish = finish

    def begin(self, arguments: Mapping[str, Any], module: Any) -> Pass:
        """The pass that a forward opens: of the request that its cache belongs to, or of a new one."""
        cache, inputs = cache_of(arguments), text_inputs(arguments, self.adapters)
        batch = len(inputs)
        groups, has_gradients = self._groups(batch), torch.is_grad_enabled()
        continues = bool(groups) and cached_tokens(cache) > 0
        if continues:
            request = self._request_of(cache, batch, groups)
        else:
            prompt = self._prompts(arguments, inputs, module.training and has_gradients) if groups else inputs[:, :0]
            request = Request(self, prompt, groups, module.training)
        if groups:
            self.now.last = replace(request, runs={})  # without the weights, which go when the cache goes
        return Pass(request, batch, continues, is_inference=not module.training and not has_gradients)

    def end(self, done: Pass, arguments: Mapping[str, Any], output: Any) -> Any:
        """The cache comes to know its request, and the training loss the load-balancing one."""
        request = done.request
        request.complete |= done.is_inference
        outputs = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple) else ()
        for value in (cache_of(arguments), *outputs):
            if hasattr(value, "get_seq_length"):
                setattr(value, _ON_CACHE, request if request.groups else None)
        return self._finish(request, arguments, output) if request.training else None

    def _groups(self, batch: int) -> Groups:
        active, call = self.active(), self.now.call or Call()
        if call.adapter_names is None or not active:
            return dict.fromkeys(active)
        names, given = call.adapter_names, call.rows or batch
        if len(names) != given:
            raise GatewiseError(f"adapter_names has {len(names)} names for a batch of {given} rows: give one name a row")
        by_row = [name for name in names for _ in range(batch // given)]  # several for each prompt with beams or samples
        return {name: [row for row, one in enumerate(by_row) if one == name] for name in dict.fromkeys(by_row) if name != BASE}

    def _prompts(self, arguments: Mapping[str, Any], inputs: Tensor, training: bool) -> Tensor:
        """The prompts, at least a token each. A row without one (plain language modelling) is its own."""
        text = self.read_text(arguments, inputs, training)
        prompt = torch.where(text.prompt.any(dim=1, keepdim=True), text.prompt, text.present)
        return prompt | ~prompt.any(dim=1, keepdim=True)

    def _request_of(self, cache: Any, batch: int, groups: Groups) -> Request:
        """The request that a cache with tokens carries, which must be of these adapters and of as many rows."""
        request: Request | None = getattr(cache, _ON_CACHE, None)
        if request is None or request.tracker is not self:
            raise GatewiseError(
                "the key-value cache holds tokens of a prompt that no routed adapter read: run the prompt through this model "
                "first, with its adapter active and an empty cache"
            )
        if len(request.prompt) != batch:
            raise GatewiseError(
                f"the key-value cache belongs to {len(request.prompt)} prompts, but the batch has {batch} rows: give the rows that "
                "filled it, or start with an empty cache"
            )
        if request.groups != groups:
            was, wanted = (" and ".join(map(repr, names)) or "none" for names in (request.groups, groups))
            raise GatewiseError(
                f"the key-value cache was filled with adapter {was}, but {wanted} is in use now: start with an empty cache after "
                "changing adapters"
            )
        return request


def regroup(cache: Any, parts: Sequence[tuple[Any, Sequence[int]]]) -> None:
    """A cache that was made of rows of others (itself among them) goes on with the decisions of these rows. For inference.

    Args:
        cache: keys and values of the rows of ``parts``, in order.
        parts: caches that one model has filled, each with the rows that are taken from it. Nothing, where no router read them.
    """
    filled = [(getattr(one, _ON_CACHE, None), list(rows)) for one, rows in parts]
    requests: list[tuple[Request, list[int]]] = [(request, rows) for request, rows in filled if request is not None]
    if not requests:
        return
    first, groups = requests[0][0], dict[str, list[int]]()
    for place, (request, row) in enumerate((request, row) for request, rows in requests for row in rows):
        for adapter, served in request.groups.items():
            if served is None or row in served:
                groups.setdefault(adapter, []).append(place)
    prompt = first.prompt.new_zeros(sum(len(rows) for _, rows in requests), 0)  # of which only the number of rows is still needed
    made = Request(first.tracker, prompt, {**groups}, training=False)
    for path in first.decided:
        made.decided[path] = {}
        for adapter in groups:
            own = [request.decided[path].get(adapter) for request, _ in requests]
            known = next((one for one in own if one is not None), None)
            if known is None:
                continue  # the adapter has no experts in this layer
            probabilities, gates = [], []
            for one, (_, rows) in zip(own, requests, strict=True):
                nothing = known.gates.new_zeros(len(rows), len(known.experts))
                probabilities.append(nothing if one is None else one.probabilities[rows])
                gates.append(nothing if one is None else one.gates[rows])
            made.decided[path][adapter] = Decision(known.experts, torch.cat(probabilities), torch.cat(gates))
    setattr(cache, _ON_CACHE, made)
