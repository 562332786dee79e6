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
token on. All before that is the base model's, whatever the adapter. So where its routers need nothing but that token
(``pooler="last"``), a prompt may come in chunks, or begin in a cache that the base model has filled.

Shapes: b batch (of packed rows, their texts), t tokens, n rows of one adapter, m experts of a layer.
"""

import weakref
from collections.abc import Callable, Mapping, Sequence
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
from gatewise.internals.torch_modules import WeightSnapshot
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


@dataclass(eq=False)
class Request:
    """A batch of prompts: where they lie (b, t), whose adapters serve them, and what each layer has decided.

    Attributes:
        version: of the adapters at its start, see ``RequestTracker``.
        decided: by the path of the layer, whatever its layer made of the decisions.
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
    version: int = 0
    decided: dict[str, Any] = field(default_factory=dict)
    centrings: dict[tuple[str, str], Any] = field(default_factory=dict)
    call: Call | None = None
    encodes: bool = True
    encoded: Callable[[], Tensor | None] | None = None
    source: "Request | None" = None
    packing: Packing | None = None

    def all_decided(self) -> dict[str, Any]:
        """By the path of the layer, those of ``source`` first."""
        return {**(self.source.decided if self.source else {}), **self.decided}

    def __deepcopy__(self, memo: object) -> "Request":
        # A copied model has this as its last one too: decisions may have a graph, which cannot be copied.
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "call": None, "encoded": None}  # of this process


class PreparedRequest:
    """A request and what its modules run in inference. Its key-value cache keeps this, so that it goes when the cache goes.

    Attributes:
        runs: by module; layers add theirs when they first run.
        complete: all layers have.
        version: of the adapters whose weights the runs have.
        products: what gathers the weights.
        weights, scalings: what was gathered, to find out whether it has changed; scalings as (those of a module, adapter, value).
        checked_in: the call in which that was asked last.
    """

    def __init__(self, request: Request, version: int) -> None:
        self.request = request
        self.start_anew(version)

    def start_anew(self, version: int) -> None:
        """Layers prepare their modules again, by the same decisions."""
        self.runs: dict[nn.Module, Any] = {}
        self.complete, self.version, self.products = False, version, products.Request(len(self.request.prompt))
        self.weights: list[WeightSnapshot] = []
        self.scalings: list[tuple[Mapping[str, float], str, float]] = []
        self.checked_in: Call | None = None

    def refresh(self, version: int) -> None:
        """Weights are read anew if they have changed."""
        scaled = any(scaling.get(adapter) != value for scaling, adapter, value in self.scalings)
        if version != self.version or scaled or any(one.has_changed() for one in self.weights):
            self.start_anew(version)

    def __deepcopy__(self, memo: object) -> "PreparedRequest":
        # A copied cache goes on with the request that filled it. What modules run is its own: the copy may go on in another thread.
        made = PreparedRequest(self.request, self.version)
        made.runs, made.complete, made.products = dict(self.runs), self.complete, self.products
        return made

    def __reduce__(self) -> tuple[type, tuple[()]]:
        # A pickled cache goes without: in another process there is no such request, and its next pass says so.
        return type(None), ()


def regroup(cache: Any, parts: Sequence[tuple[Any, Sequence[int]]]) -> None:
    """A cache that was made of rows of others (itself among them) goes on with the decisions of these rows.

    Args:
        cache: keys and values of the rows of ``parts``, in order.
        parts: caches that one model has filled, each with the rows that are taken from it. Nothing, where no router read them.
    """
    taken = [(getattr(one, _ON_CACHE, None), rows) for one, rows in parts]
    requests = [(prepared.request, rows) for prepared, rows in taken if prepared is not None]
    if not requests:
        return
    tracker = requests[0][0].tracker
    setattr(cache, _ON_CACHE, PreparedRequest(_regrouped(requests), tracker.version))


def _regrouped(parts: Sequence[tuple["Request", Sequence[int]]]) -> "Request":
    """One request of rows of several, in order, with what was decided for them."""
    first, _ = parts[0]
    width = max(request.prompt.shape[1] for request, _ in parts)
    prompts = [F.pad(request.prompt[list(rows)], (width - request.prompt.shape[1], 0)) for request, rows in parts]
    groups: dict[str, list[int]] = {}
    start = 0
    for request, rows in parts:
        names = {row: name for name, places in request.groups.items() for row in (places or range(len(request.prompt)))}
        for place, row in enumerate(rows, start):
            if row in names:
                groups.setdefault(names[row], []).append(place)
        start += len(rows)
    decided = {
        path: made.regrouped([(request.decided[path], rows) for request, rows in parts]) for path, made in first.decided.items()
    }
    # One may be deleted, and loaded again by its name, between the beginnings of two requests of others.
    tracker = first.tracker
    gone = any(name in groups for request, _ in parts for name in tracker._gone(request))
    version = min(request.version for request, _ in parts) if gone else tracker.version
    return Request(tracker, torch.cat(prompts), dict(groups), False, version, decided)


class Pass:
    """One forward of the base model.

    Not a dataclass: layers are given it as an argument, and of those FSDP makes new ones.

    Attributes:
        continues: the decisions are there already, those of an encoder's layers only where it ran before.
        is_inference: in evaluation mode, without gradients and without packed texts.
        is_settled: and all that any module runs is known, so that layers have nothing to do.
        adapted: by adapter that waits for the end of the prompt, where it acts in its rows (n, t); none in a pass that goes on.
        window: where anything acts, for all adapters together; None where two that share rows differ in that.
        seen: the layers that have run.
        masks: of attention, that keep packed texts apart.
    """

    def __init__(
        self,
        request: Request,
        prepared: PreparedRequest,
        continues: bool,
        *,
        is_inference: bool,
        is_settled: bool,
        adapted: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.request, self.prepared, self.continues = request, prepared, continues
        self.is_inference, self.is_settled = is_inference, is_settled
        self.adapted: Mapping[str, Tensor] = adapted or {}
        self.window = window_of(request.groups, self.adapted, len(request.prompt)) if self.adapted and is_inference else None
        self.seen: set[str] = set()
        self.masks: list[Any] = []


@dataclass(frozen=True)
class Window:
    """Where adapters act in a pass that reads prompts: from the column ``start`` on and there where ``where`` (b, t) is true, or
    everywhere if it is None."""

    start: int
    where: Tensor | None


def window_of(groups: Groups, adapted: Mapping[str, Tensor], batch: int) -> Window | None:
    """The window of adapters of which some wait, see ``Pass``; None if adapters that serve the same rows act at other places."""
    shared = len(groups) > 1 and any(rows is None for rows in groups.values())
    if shared and adapted.keys() != groups.keys():
        return None
    like = next(iter(adapted.values()))
    where = like.new_zeros(batch, like.shape[1])
    served: list[int] = []
    for adapter, rows in groups.items():
        places = list(range(batch)) if rows is None else rows
        where[places] = adapted.get(adapter, like.new_ones(()))
        served += places
    start = int(where.any(dim=0).to(torch.uint8).argmax())
    return Window(start, None if bool(where[served, start:].all()) else where)


def from_last(prompt: Tensor) -> Tensor:
    """(b, t): the last position of each prompt (b, t), and all after it."""
    after = prompt.flip(1).cumsum(dim=1).flip(1) - prompt.long()
    return after == 0


class RoutingState(CallState):
    """What a thread is doing with a routed model. All routed modules of the model look at this one object when they run.

    Attributes:
        current: the ``Pass`` that is open.
        runs: what each module runs now: in inference for the whole pass, with gradients while its layer runs.
        base_only: no adapter is in use in the pass, and every module is its base module.
        tokens: how many each row of the pass has.
        last: the newest request of the thread.
    """

    of_pass: ClassVar[tuple[str, ...]] = (*CallState.of_pass, "runs", "base_only", "tokens")
    current: Pass | None = None
    runs: Mapping[nn.Module, Callable[..., Tensor]] = {}
    base_only: bool = False
    tokens: int = 0
    last: Request | None = None


class RequestTracker(CallTracker):
    """Watches the base model's forwards and finds the request that each belongs to.

    It counts versions of the adapters: one more whenever they may have changed.

    Args:
        models, causal: as in ``CallTracker``.
        encoders: those of an encoder-decoder model's that hold the encoder alone; none of another model.
        active: names of the adapters in use, none while they are disabled.
        configs: their configurations.
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
        configs: Callable[[str], RoutedLoraConfig],
        finish: Callable[[Request, Mapping[str, Any], Any], Any],
    ) -> None:
        super().__init__(models, RoutingState(), "routed adapters", "routers", causal)
        self._encoders, self._active, self._configs, self._finish = list(encoders), active, configs, finish
        self._version, self._deleted = 0, dict[str, int]()
        self._newest: Request | None = None

    @property
    def is_at_work(self) -> bool:
        """Whether an adapter is in use."""
        return bool(self._active())

    @property
    def last(self) -> Request | None:
        """The newest request of this thread or, if it has none, of all; None if an adapter that served it was deleted."""
        request = self.now.last or self._newest
        return None if request is None or self._gone(request) else request

    @property
    def version(self) -> int:
        """Of the adapters, as they are now."""
        return self._version

    def adapters_changed(self) -> None:
        """Requests that go on read their weights anew."""
        self._version += 1

    def forget(self, adapter: str) -> None:
        """An adapter is deleted: requests that it serves cannot go on, even if another comes to have its name."""
        self._deleted[adapter] = self._version

    def begin(self, arguments: Mapping[str, Any], module: Any) -> Pass:
        """The pass that a forward opens: of the request that its cache belongs to, or of a new one."""
        now, cache = self.now, cache_of(arguments)
        arguments = read_by_encoder(arguments) if self._encoders else arguments
        inputs = text_inputs(arguments, "routed adapters")
        groups, training, has_gradients = self._groups(len(inputs)), module.training, torch.is_grad_enabled()
        cached = cached_tokens(cache) if groups or hasattr(cache, _ON_CACHE) else 0
        if not cached and hasattr(cache, _ON_CACHE):
            delattr(cache, _ON_CACHE)  # it was emptied, and is filled anew
        in_parts = self._reads_in_parts(groups) and not hasattr(cache, _ON_CACHE)
        if in_parts and self._ends_later(cache, cached + inputs.shape[1]):
            groups = {}
        continues = bool(groups and cached) and not in_parts
        runs_encoder = bool(self._encoders) and "input_ids" in arguments
        if continues:
            prepared = self._prepared_before(cache, len(inputs), groups)
        else:
            prompt, packing = inputs[:, :0], None  # nobody reads any
            if groups:
                text = self.read_text(arguments, inputs, training and has_gradients, in_parts)
                prompt, packing = self._prompts(text, groups), text.packing
                if packing is not None and any(rows is not None for rows in groups.values()):
                    raise GatewiseError(
                        "adapter_names was given for rows that hold several packed samples: give each text a row of its own, padded"
                    )
            source = self._encoded_by(inputs) if self._encoders and not runs_encoder else None
            encodes = runs_encoder or not self._encoders
            request = Request(
                self, prompt, groups, training, self._version, call=now.call, encodes=encodes, source=source, packing=packing
            )
            prepared = PreparedRequest(request, self._version)
        request = prepared.request
        adapted = {} if continues else self._adapted(request)
        if groups:
            now.last = self._newest = request
        if training or has_gradients or request.packing is not None:
            self._version += 1  # weights may be trained next, by optimisers that leave no trace on them
            return Pass(request, prepared, continues, is_inference=False, is_settled=False, adapted=adapted)
        # At the first pass in a call: looking at all weights takes as long as some of their products.
        if continues and (now.call is None or prepared.checked_in is not now.call):
            prepared.refresh(self._version)
            prepared.checked_in = now.call
        now.runs, now.base_only, now.tokens = prepared.runs, not groups, inputs.shape[1]
        is_settled = not groups or (prepared.complete and (request.encodes or not runs_encoder))
        return Pass(request, prepared, continues, is_inference=True, is_settled=is_settled, adapted=adapted)

    def end(self, done: Pass, arguments: Mapping[str, Any], output: Any, module: Any) -> Any:
        """The cache comes to know its request, and the training loss the load-balancing one."""
        done.prepared.complete |= done.is_inference
        if done.request.groups:
            outputs = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple) else ()
            for value in (cache_of(arguments), *outputs):
                if hasattr(value, "get_seq_length"):
                    setattr(value, _ON_CACHE, done.prepared)
            if module in self._encoders:
                done.request.encoded = weakref.ref(output[0])
        return self._finish(done.request, arguments, output) if done.request.training else None

    def learns_without_labels(self) -> None:
        """Refused.

        Raises:
            GatewiseError: always.
        """
        raise GatewiseError(
            "a routed adapter was trained without labels in the model's call, so that its routers would read the answers: pass "
            "labels with -100 before the answer (label_smoothing_factor and compute_loss_func have the Trainer keep them back: "
            "leave these out), or run the forward under model.prompt_positions(mask)"
        )

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

    # ---- adapters that wait for the end of the prompt ----

    def _waits(self, adapter: str) -> bool:
        return self._configs(adapter).adapt == "after_prompt"

    def _reads_in_parts(self, groups: Groups) -> bool:
        """Whether all adapters of a batch need nothing of its prompts but their last tokens."""
        return bool(groups) and all(self._waits(one) and self._configs(one).pooler == "last" for one in groups)

    def _ends_later(self, cache: Any, tokens: int) -> bool:
        """Whether a chunk, with which a cache comes to hold ``tokens``, is not the last one of the prompt given to ``generate``."""
        call = self.now.call
        return cache is not None and call is not None and call.width is not None and tokens < call.width

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

    def _adapted(self, request: Request) -> dict[str, Tensor]:
        """See ``Pass``."""
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
        if gone := self._gone(request):
            raise GatewiseError(
                f"the key-value cache was filled with adapter {' and '.join(map(repr, gone))}, which has been deleted since, "
                "whatever has its name now: start with an empty cache"
            )
        return prepared

    def _gone(self, request: Request) -> list[str]:
        """The adapters of a request that have been deleted since."""
        return [name for name in request.groups if self._deleted.get(name, -1) >= request.version]
