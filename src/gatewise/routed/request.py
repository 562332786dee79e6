"""Which prompt a forward belongs to: a new one, whose layers are to be routed, or one whose routing is already decided.

The routing is decided once, when the prompt is first encoded, and holds for every token after it (MiLoRA, arXiv 2410.18035). A
request is one batch of prompts with its decisions; a pass is one forward of the base model. A pass belongs to the request that
filled its key-value cache. So the cache carries the request with it, and what was prepared for it: through beams, through copies,
and apart from other caches. A pass without cached tokens starts a request.

In an encoder-decoder model the prompt is what the encoder reads, and a forward of the whole model is one request. Where the encoder
runs by itself first, as in ``generate``, that is a request for its layers, and what the decoder does with its output is another one
for the decoder's, whose ``source`` is the encoder's.

Packed rows hold several texts, and each is a prompt with decisions of its own.

An adapter with ``adapt="after_prompt"`` waits for the end of the prompt: in the pass that reads it, it acts from the prompt's last
token on. All before that is the base model's, whatever the adapter.

Shapes: b batch (of packed rows, their texts), t tokens, n rows of one adapter, m experts of a layer.
"""

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gatewise.errors import GatewiseError
from gatewise.internals.call_tracking import (
    Call,
    CallState,
    CallTracker,
    Packing,
    Text,
    cache_of,
    cached_tokens,
    read_by_encoder,
    text_inputs,
)
from gatewise.routed.config import RoutedLoraConfig
from gatewise.serving import products
from gatewise.serving.products import BASE

Groups = dict[str, list[int] | None]
"""The adapters of a batch, each with its rows; None for all of them."""


_ON_CACHE = "_gatewise_request"


@dataclass(frozen=True)
class Decision:
    """What one adapter's router decided in one layer.

    Attributes:
        rows: (n,), the rows of the batch that the adapter serves; None for all of them.
        experts: (m), paths within the layer of the modules that it decided on.
        probabilities, gates: (n, m).
    """

    adapter: str
    rows: Tensor | None
    experts: tuple[str, ...]
    probabilities: Tensor
    gates: Tensor


@dataclass(frozen=True)
class Share:
    """What one adapter adds in one module to the ``rows`` (n,) of a batch, None for all of them.

    Its gates ``gate`` are (n,), or (b, t) where packed rows have a gate for each of their texts.
    """

    adapter: str
    rows: Tensor | None
    gate: Tensor


Shares = tuple[Share, ...]


@dataclass(frozen=True)
class LayerDecision:
    """What was decided in one layer for a request.

    Attributes:
        decisions: by adapter.
        shares: by path within the layer, what that adds in each module that was an expert of any adapter then, in order.
    """

    decisions: tuple[Decision, ...]
    shares: Mapping[str, Shares]

    @classmethod
    def of(cls, decisions: Sequence[Decision], modules: Iterable[str], training: bool, packing: Packing | None) -> "LayerDecision":
        """The decisions with their shares: in training all, as data-parallel training demands, else of modules that a row keeps."""
        shares: dict[str, Shares] = dict.fromkeys(modules, ())
        for one in decisions:
            kept = [True] * len(one.experts) if training else (one.gates > 0).any(dim=0).tolist()
            gates = one.gates if packing is None else one.gates[packing.of_token.to(one.gates.device)]
            for column, name in enumerate(one.experts):
                if kept[column]:
                    shares[name] += (Share(one.adapter, one.rows, gates[..., column]),)
        return cls(tuple(decisions), shares)


@dataclass(eq=False)
class Request:
    """A batch of prompts: where they lie (b, t), whose adapters serve them, and what each layer has decided.

    Attributes:
        configs: of its adapters at its start. An adapter that was deleted has another one since, or none.
        decided: by the path of the layer.
        centrings: by layer and adapter, what a router took off in training: a layer that is run again decides as before, whatever
            prompts were observed since.
        call: in which it was started, None outside of PEFT's ``forward`` and of ``generate``.
        encodes: the encoder of an encoder-decoder model ran in its first pass.
        encoded: where that ran alone, what finds its last hidden states (b, t, d) as long as anybody keeps them.
        source: where it did not run, the request in which it had, whose rows this one may repeat; None if that is not known.
        packing: where the texts lie of rows that hold several.
    """

    tracker: "RequestTracker"
    prompt: Tensor
    groups: Groups
    training: bool
    configs: Mapping[str, RoutedLoraConfig]
    decided: dict[str, LayerDecision] = field(default_factory=dict)
    centrings: dict[tuple[str, str], Any] = field(default_factory=dict)
    call: Call | None = None
    encodes: bool = True
    encoded: Callable[[], Tensor | None] | None = None
    source: "Request | None" = None
    packing: Packing | None = None

    def all_decided(self) -> dict[str, LayerDecision]:
        """By the path of the layer, those of ``source`` first."""
        return {**(self.source.decided if self.source else {}), **self.decided}


class PreparedRequest:
    """A request and what its modules run in inference. Its key-value cache keeps this, so that it goes when the cache goes.

    Attributes:
        runs: by module; layers add theirs when they first run. They hold A and B as these were then.
        complete: all layers have.
        products: what gathers the weights.
    """

    def __init__(self, request: Request) -> None:
        self.request, self.complete = request, False
        self.runs: dict[nn.Module, Any] = {}
        self.products = products.Request(len(request.prompt))

    def __deepcopy__(self, memo: object) -> "PreparedRequest":
        return self  # a copied cache goes on with the request that filled it

    def __reduce__(self) -> tuple[type, tuple[()]]:
        # A pickled cache goes without: in another process there is no such request, and its next pass says so.
        return type(None), ()


def regroup(cache: Any, parts: Sequence[tuple[Any, Sequence[int]]]) -> None:
    """A cache that was made of rows of others (itself among them) goes on with the decisions of these rows. For inference.

    Args:
        cache: keys and values of the rows of ``parts``, in order.
        parts: caches that one model has filled, each with the rows that are taken from it. Nothing, where no router read them.
    """
    filled = [(getattr(one, _ON_CACHE, None), rows) for one, rows in parts]
    requests = [(prepared.request, rows) for prepared, rows in filled if prepared is not None]
    if not requests:
        return
    width = max(request.prompt.shape[1] for request, _ in requests)
    prompts = [F.pad(request.prompt[list(rows)], (width - request.prompt.shape[1], 0)) for request, rows in requests]
    groups: dict[str, list[int]] = {}
    configs: dict[str, RoutedLoraConfig] = {}
    start = 0
    for request, rows in requests:
        configs = {**request.configs, **configs}  # the older ones: an adapter that was deleted since stays known for it
        names = {row: name for name, places in request.groups.items() for row in (places or range(len(request.prompt)))}
        for place, row in enumerate(rows, start):
            if row in names:
                groups.setdefault(names[row], []).append(place)
        start += len(rows)
    first = requests[0][0]
    decided = {path: _regrouped([(request.decided[path], rows) for request, rows in requests]) for path in first.decided}
    made = Request(first.tracker, torch.cat(prompts), dict(groups), False, {name: configs[name] for name in groups}, decided)
    setattr(cache, _ON_CACHE, PreparedRequest(made))


def _regrouped(parts: Sequence[tuple[LayerDecision, Sequence[int]]]) -> LayerDecision:
    """What was decided for rows of several batches, which now are one: one decision an adapter, with the rows of all batches."""
    found: dict[str, list[tuple[Decision, list[int], list[int]]]] = {}  # its places among its own rows, and in the new batch
    start = 0
    for made, rows in parts:
        for one in made.decisions:
            own = {row: place for place, row in enumerate(range(len(one.gates)) if one.rows is None else one.rows.tolist())}
            pairs = [(own[row], place) for place, row in enumerate(rows, start) if row in own]
            if pairs:
                found.setdefault(one.adapter, []).append((one, [pair[0] for pair in pairs], [pair[1] for pair in pairs]))
        start += len(rows)
    decisions = []
    for adapter, taken in found.items():
        probabilities, gates = (torch.cat([getattr(one, name)[at] for one, at, _ in taken]) for name in ("probabilities", "gates"))
        places = torch.tensor([place for _, _, places in taken for place in places], device=gates.device)
        decisions.append(Decision(adapter, places, taken[0][0].experts, probabilities, gates))
    return LayerDecision.of(decisions, [name for made, _ in parts for name in made.shares], training=False, packing=None)


class Pass:
    """One forward of the base model.

    Not a dataclass: layers are given it as an argument, and of those FSDP makes new ones.

    Attributes:
        batch, tokens: rows, and tokens of each.
        continues: the decisions are there already, those of an encoder's layers only where it ran before.
        is_inference: in evaluation mode, without gradients and without packed texts.
        is_settled: and all that any module runs is known, so that layers have nothing to do.
        adapted: by adapter that waits for the end of the prompt, where it acts in its rows (n, t); none in a pass that goes on.
        seen: the layers that have run.
        masks: of attention, that keep packed texts apart.
    """

    def __init__(self, prepared: PreparedRequest, inputs: Tensor, continues: bool, adapted: Mapping[str, Tensor]) -> None:
        self.request, self.prepared = prepared.request, prepared
        self.batch, self.tokens = inputs.shape[:2]
        self.continues, self.adapted = continues, adapted
        self.is_inference = self.is_settled = False
        self.seen: set[str] = set()
        self.masks: list[Any] = []


def from_last(prompt: Tensor) -> Tensor:
    """(b, t): the last position of each prompt (b, t), and all after it."""
    after = prompt.flip(1).cumsum(dim=1).flip(1) - prompt.long()
    return after == 0


class RoutingState(CallState):
    """What is being done with a routed model. All routed modules of the model look at this one object when they run.

    Attributes:
        current: the ``Pass`` that is open.
        runs: what each module runs now: in inference for the whole pass, with gradients while its layer runs.
        base_only: no adapter is in use in the pass, and every module is its base module.
        last: the newest request.
    """

    of_pass: ClassVar[tuple[str, ...]] = (*CallState.of_pass, "runs", "base_only")
    current: Pass | None = None
    runs: Mapping[nn.Module, Callable[..., Tensor]] = {}
    base_only: bool = False
    last: Request | None = None


class RequestTracker(CallTracker):
    """Watches the base model's forwards and finds the request that each belongs to.

    Args:
        models, causal: as in ``CallTracker``.
        encoders: those of an encoder-decoder model's that hold the encoder alone; none of another model.
        active: names of the adapters in use, none while they are disabled.
        configs: of all adapters, by name.
        finish: called with (request, arguments of the forward, output) when a pass in training ends; what it returns replaces the
            output.
    """

    now: RoutingState
    unpacks = True

    def __init__(
        self,
        models: Sequence[nn.Module],
        encoders: Sequence[nn.Module],
        causal: bool,
        active: Callable[[], Sequence[str]],
        configs: Mapping[str, Any],
        finish: Callable[[Request, Mapping[str, Any], Any], Any],
    ) -> None:
        super().__init__(models, RoutingState(), "routed adapters", "routers", causal)
        self._encoders, self._active, self._configs, self._finish = list(encoders), active, configs, finish

    @property
    def is_at_work(self) -> bool:
        """Whether an adapter is in use."""
        return bool(self._active())

    @property
    def last(self) -> Request | None:
        """The newest request; None if there is none, or if an adapter that served it was deleted."""
        request = self.now.last
        return None if request is None or self._deleted(request) else request

    def begin(self, arguments: Mapping[str, Any], module: Any) -> Pass:
        """The pass that a forward opens: of the request that its cache belongs to, or of a new one."""
        now, cache = self.now, cache_of(arguments)
        arguments = read_by_encoder(arguments) if self._encoders else arguments
        inputs = text_inputs(arguments, "routed adapters")
        batch = len(inputs)
        groups, training, has_gradients = self._groups(batch), module.training, torch.is_grad_enabled()
        runs_encoder = bool(self._encoders) and "input_ids" in arguments
        continues = bool(groups) and cached_tokens(cache) > 0
        if continues:
            prepared = self._prepared_before(cache, batch, groups)
        else:
            prompt, packing = inputs[:, :0], None  # nobody reads any
            if groups:
                text = self.read_text(arguments, inputs, training and has_gradients)
                prompt, packing = self._prompts(text, groups), text.packing
                if packing is not None and any(rows is not None for rows in groups.values()):
                    raise GatewiseError(
                        "adapter_names was given for rows that hold several packed samples: give each text a row of its own, padded"
                    )
            request = Request(self, prompt, groups, training, {name: self._configs[name] for name in groups}, call=now.call)
            request.packing, request.encodes = packing, runs_encoder or not self._encoders
            request.source = None if request.encodes else self._encoded_by(inputs)
            prepared = PreparedRequest(request)
        request = prepared.request
        if groups:
            now.last = request
        made = Pass(prepared, inputs, continues, {} if continues else self._adapted(request))
        # Packed texts have a gate for each token, which the gathered products do not know.
        if not training and not has_gradients and request.packing is None:
            made.is_inference, now.runs, now.base_only = True, prepared.runs, not groups
            made.is_settled = not groups or (prepared.complete and (request.encodes or not runs_encoder))
        return made

    def end(self, done: Pass, arguments: Mapping[str, Any], output: Any, module: Any) -> Any:
        """The cache comes to know its request, and the training loss the load-balancing one."""
        request = done.request
        done.prepared.complete |= done.is_inference
        outputs = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple) else ()
        for value in (cache_of(arguments), *outputs):
            if hasattr(value, "get_seq_length"):
                setattr(value, _ON_CACHE, done.prepared if request.groups else None)
        if request.groups and module in self._encoders:
            request.encoded = weakref.ref(output[0])
        return self._finish(request, arguments, output) if request.training else None

    def _groups(self, batch: int) -> Groups:
        active, call = self._active(), self.now.call or Call()
        if call.adapter_names is None or not active:
            return dict.fromkeys(active)
        groups: Groups = {}
        for row, name in enumerate(call.names_by_row(batch)):
            if name != BASE:
                rows = groups.setdefault(name, [])
                assert rows is not None
                rows.append(row)
        return groups

    def _prompts(self, text: Text, groups: Groups) -> Tensor:
        """The prompts, at least a token each. A row without one (plain language modelling) is its own: all of it or, for an adapter
        that waits for the end of the prompt, the first token."""
        whole, first = text.present.clone(), text.present & (text.present.cumsum(dim=1) == 1)
        for adapter, rows in groups.items():
            if self._waits(adapter):
                places = slice(None) if rows is None else rows
                whole[places] = first[places]
        prompt = torch.where(text.prompt.any(dim=1, keepdim=True), text.prompt, whole)
        return prompt | ~prompt.any(dim=1, keepdim=True)

    def _waits(self, adapter: str) -> bool:
        return bool(self._configs[adapter].adapt == "after_prompt")

    def _adapted(self, request: Request) -> dict[str, Tensor]:
        """Where the adapters act that wait for the end of the prompt, see ``Pass``."""
        found = {}
        for adapter, rows in request.groups.items():
            if self._waits(adapter):
                where = from_last(request.prompt if rows is None else request.prompt[rows])
                found[adapter] = where if request.packing is None else request.packing.together(where)
        return found

    def _encoded_by(self, states: Tensor) -> Request | None:
        """The request of the encoder that has made these states or, in the same ``generate``, those that they repeat."""
        last, call = self.now.last, self.now.call
        if last is not None and last.encoded is None:
            last = last.source
        if last is None or last.encoded is None or len(states) % len(last.prompt):
            return None
        return last if last.encoded() is states or (call is not None and last.call is call) else None

    def _prepared_before(self, cache: Any, batch: int, groups: Groups) -> PreparedRequest:
        """What a cache with tokens carries, which must be of these adapters and of as many rows."""
        prepared: PreparedRequest | None = getattr(cache, _ON_CACHE, None)
        if prepared is None or prepared.request.tracker is not self:
            raise GatewiseError(
                "the key-value cache holds tokens of a prompt that no routed adapter read: run the prompt through this model "
                "first, with its adapter active and an empty cache"
            )
        request = prepared.request
        rows = len(request.prompt)
        if rows != batch:
            raise GatewiseError(
                f"the key-value cache belongs to {rows} prompts, but the batch has {batch} rows: give the rows whose "
                "prompts filled it, or start with an empty cache"
            )
        if request.groups != groups:
            was, wanted = (" and ".join(map(repr, names)) or "none" for names in (request.groups, groups))
            raise GatewiseError(
                f"the key-value cache was filled with adapter {was}, but {wanted} is in use now: start with an empty cache after "
                "changing adapters"
            )
        if deleted := self._deleted(request):
            raise GatewiseError(
                f"the key-value cache was filled with adapter {' and '.join(map(repr, deleted))}, which has been deleted since, "
                "whatever has its name now: start with an empty cache"
            )
        return prepared

    def _deleted(self, request: Request) -> list[str]:
        """The adapters of a request that have been deleted since."""
        return [name for name, config in request.configs.items() if self._configs.get(name) is not config]
