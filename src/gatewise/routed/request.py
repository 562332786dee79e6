"""Which prompt a forward belongs to: a new one, whose layers are to be routed, or one whose routing is already decided.

The routing is decided once, when the prompt is first encoded, and holds for every token after it (MiLoRA, arXiv 2410.18035). A
request is one batch of prompts with its decisions; a pass is one forward of the base model. A pass belongs to the request that
filled its key-value cache. So the cache carries the request with it, and what was prepared for it: through beams, through copies,
and apart from other caches. A pass without cached tokens starts a request.

Shapes: b batch, t tokens, n rows of one adapter, m experts of a layer.
"""

import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from gatewise.errors import GatewiseError
from gatewise.internals.call_tracking import CallTracker, cache_of, cached_tokens, fitted, seen_by_the_last_token
from gatewise.losses import IGNORED, LossKind, before_first
from gatewise.routed.inference import Prepared, Running
from gatewise.serving.direct import Detours, Places

BASE = "__base__"
"""PEFT's name for rows of a mixed batch that no adapter serves."""


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
        era: how often adapters had come, gone or been trained by then.
        decided: by the index of the layer, whatever its block made of the decisions.
        centrings: by layer and adapter, what a router took off in training: a layer that is run again decides as before, whatever
            prompts were observed since.
    """

    owner: "RequestTracker"
    prompt: Tensor
    groups: Groups
    training: bool
    era: int = 0
    decided: dict[int, Any] = field(default_factory=dict)
    centrings: dict[tuple[int, str], Any] = field(default_factory=dict)

    @property
    def batch(self) -> int:
        return len(self.prompt)

    def __deepcopy__(self, memo: object) -> "Request":
        # A copied model has this as its last one too: decisions may have a graph, which cannot be copied.
        return self


@dataclass(eq=False)
class Pass:
    """One forward of the base model.

    Attributes:
        prepared: its request's modules.
        continues: the decisions are there already.
        is_inference: in evaluation mode and without gradients.
        is_settled: and all that any module runs is known.
        seen: the layers that have run.
    """

    prepared: Prepared
    continues: bool
    is_inference: bool
    is_settled: bool = False
    seen: set[int] = field(default_factory=set)

    @property
    def request(self) -> Request:
        return self.prepared.request


@dataclass(frozen=True)
class Call:
    """What PEFT's ``forward`` or ``generate`` was given: adapters by row, and the prompts' width and padding."""

    adapter_names: Sequence[str] | None = None
    width: int | None = None
    attention_mask: Tensor | None = None


class RequestTracker(CallTracker):
    """Watches the base model's forwards through hooks. ``current`` is the pass that runs, ``last`` the newest request.

    ``running`` tells the modules what they run in it.

    Args:
        watched: the Transformers models around the stack of layers, the outermost first; whichever is called opens the pass.
        kind: how the model's labels line up with its logits; only a causal model's labels tell prompt from answer.
        active: names of the adapters in use, none while they are disabled.
        finish: called with (pass, arguments of the forward, output) when a pass ends; what it returns replaces the output.
    """

    def __init__(
        self,
        watched: Sequence[nn.Module],
        kind: LossKind,
        active: Callable[[], Sequence[str]],
        finish: Callable[[Pass, Mapping[str, Any], Any], Any],
    ) -> None:
        self.current: Pass | None = None
        self.last: Request | None = None
        self.running = Running()
        self._kind, self._active, self._finish = kind, active, finish
        self._arguments: dict[str, Any] = {}
        self._call = Call()
        self._thread: int | None = None  # that of the call that is open
        self._holder: dict[str, int] = {}  # the thread of the call or, outside of one, of the forward that runs
        self._checked: Prepared | None = None
        self._era, self._deleted = 0, dict[str, int]()
        self._places: Places = {}
        self._open: Detours | None = None
        self._warned = False
        super().__init__(watched, "routed adapters")

    def adapters_changed(self, places: Places) -> None:
        """Requests that go on read their weights anew, and modules are in new places."""
        self._era += 1
        self._places = places

    def forget(self, adapter: str) -> None:
        """An adapter is deleted: requests that it serves cannot go on, and there is no last one any more if it served that."""
        self._deleted[adapter] = self._era
        if self.last is not None and adapter in self.last.groups:
            self.last = None

    @contextmanager
    def call(self, call: Call) -> Iterator[None]:
        """While open, forwards belong to this call of PEFT's ``forward`` or ``generate``.

        Raises:
            GatewiseError: another thread has a call open or runs a forward, whose gates the modules hold.
        """
        self._take()
        before = self._call, self._thread, self._checked
        self._call, self._thread, self._checked = call, threading.get_ident(), None
        try:
            yield
        finally:
            self._call, self._thread, self._checked = before
            # A forward that was stopped from the keyboard has not come to its end.
            self._close()
            self._leave()

    def _take(self) -> None:
        # In one step, because two threads may try at the same time.
        if self._holder.setdefault("thread", threading.get_ident()) != threading.get_ident():
            raise GatewiseError(
                "another thread is running this model, and a routed model serves one call at a time: put a lock around the calls, "
                "or the requests into one batch"
            )

    def _leave(self) -> None:
        if self._thread is None:
            self._holder.clear()

    def _close(self) -> None:
        self._opened_by, self.current, self._arguments = None, None, {}
        self.running.clear()
        if self._open is not None:
            self._open.close()
            self._open = None

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        place = self._place(module)
        self._take()
        if self._is_inside(place):
            return
        self._close()
        self._opened_by = place
        self._arguments = self._given(place, args, kwargs)
        self.current = self._pass(self._arguments, module.training)

    def _end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if not self._is_open_by(module):  # which another thread's forward that was refused is not
            return None
        done, arguments = self.current, self._arguments
        self._close()
        self._leave()
        if done is None or output is None:  # the forward failed
            return None
        done.prepared.complete |= done.is_inference
        if done.request.groups:
            outputs = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple) else ()
            for value in (cache_of(arguments), *outputs):
                if hasattr(value, "get_seq_length"):
                    setattr(value, _ON_CACHE, done.prepared)
        return self._finish(done, arguments, output)

    def _pass(self, arguments: Mapping[str, Any], training: bool) -> Pass:
        inputs = arguments.get("input_ids")
        inputs = arguments.get("inputs_embeds") if inputs is None else inputs
        if not isinstance(inputs, Tensor) or inputs.ndim < 2:
            raise GatewiseError(
                "routed adapters read prompts of text: the model was called without input_ids or inputs_embeds (b, t)"
            )
        batch, tokens = inputs.shape[:2]
        groups = self._groups(batch)
        cache = cache_of(arguments)
        continues = bool(groups and cached_tokens(cache))
        if continues:
            prepared = self._prepared_before(cache, batch, groups)
        else:
            prompt = self._prompt_of(arguments, inputs, groups, training)
            prepared = Prepared(Request(self, prompt, groups, training, self._era), self._era)
        if groups:
            self.last = prepared.request
        is_trained = training or torch.is_grad_enabled()
        running = Pass(prepared, continues, is_inference=not (is_trained or is_compiling()))
        if running.is_inference:
            if continues:
                self._refresh(prepared)
            running.is_settled = prepared.complete or not groups
            self.running.runs, self.running.alone, self.running.tokens = prepared.runs, not groups, tokens
            if running.is_settled and groups:
                self._open = prepared.detours = prepared.detours or Detours(self._places, prepared.steps())
                self._open.open()
        elif is_trained:
            self._era += 1  # weights may be trained next, by optimisers that leave no trace on them
        return running

    def _refresh(self, prepared: Prepared) -> None:
        """At the first of its passes in a call: looking at all weights takes as long as some of their products."""
        if self._thread is None or self._checked is not prepared:
            prepared.refresh(self._era)
            prepared.detours = None  # hooks may have come or gone
            self._checked = prepared if self._thread is not None else None

    def _groups(self, batch: int) -> Groups:
        active, names = self._active(), self._call.adapter_names
        if names is None or not active:
            return dict.fromkeys(active)
        groups: Groups = {}
        for row, name in enumerate(by_row(names, batch)):
            if name != BASE:
                rows = groups.setdefault(name, [])
                assert rows is not None
                rows.append(row)
        return groups

    def _prepared_before(self, cache: Any, batch: int, groups: Groups) -> Prepared:
        prepared: Prepared | None = getattr(cache, _ON_CACHE, None)
        if prepared is None or prepared.request.owner is not self:
            raise GatewiseError(
                "the key-value cache holds tokens of a prompt that no routed adapter read: run the prompt through this model "
                "first, with its adapter active and an empty cache"
            )
        request = prepared.request
        if request.batch != batch:
            raise GatewiseError(
                f"the key-value cache belongs to {request.batch} prompts, but the batch has {batch} rows: give the rows whose "
                "prompts filled it, or start with an empty cache"
            )
        if request.groups != groups:
            raise GatewiseError(
                f"the key-value cache was filled with adapter {_named(request.groups)}, but {_named(groups)} is in use now: "
                "start with an empty cache after changing adapters"
            )
        gone = [name for name in groups if self._deleted.get(name, -1) >= request.era]
        if gone:
            raise GatewiseError(
                f"the key-value cache was filled with adapter {' and '.join(map(repr, gone))}, which has been deleted since, "
                "whatever has its name now: start with an empty cache"
            )
        return prepared

    def _prompt_of(self, arguments: Mapping[str, Any], inputs: Tensor, groups: Groups, training: bool) -> Tensor:
        """Where the prompts of a new request lie (b, t)."""
        if not groups:
            return inputs[:, :0]  # nobody reads any
        tokens = inputs.shape[1]
        if cache_of(arguments) is not None and self._call.width is not None and tokens < self._call.width:
            raise GatewiseError(
                f"the prompt of {self._call.width} tokens was cut into chunks of {tokens}, but routing has to read all of it "
                "first: leave prefill_chunk_size out"
            )
        return self._prompt(arguments, inputs, training)

    def _prompt(self, arguments: Mapping[str, Any], inputs: Tensor, training: bool) -> Tensor:
        """Where the prompts lie (b, t): told, or before the first label, or what ``generate`` was given; never padding.

        Positions after an answer has begun are left out even where they have no label (the next turn of a chat): the decision must
        not see what it is used to predict. A row without any prompt (plain language modelling) is its own.
        """
        batch, tokens = inputs.shape[:2]
        present = self._present(arguments, inputs)
        labels = arguments.get("labels")
        if self._told is not None:
            prompt = present & fitted(self._told, batch, tokens).to(present.device)
        elif self._kind == "causal" and isinstance(labels, Tensor) and labels.shape == (batch, tokens):
            prompt = present & before_first(labels != IGNORED).to(present.device)
        else:
            prompt = present
            if self._call.width is not None:
                prompt = present & (torch.arange(tokens, device=present.device) < self._call.width)
            learns = training and torch.is_grad_enabled()
            if learns and self._kind == "causal" and not self._warned:
                self._warned = True
                warnings.warn(
                    "a routed adapter is trained without labels in the model's call, so whole rows are taken for prompts, answers "
                    "included: pass labels, or run the forward under model.prompt_positions(mask)",
                    stacklevel=2,
                )
            elif self._kind == "causal" and self._call.width is None and not (learns or is_compiling()):
                self._tell_of_answers(arguments, "routers")
        prompt = torch.where(prompt.any(dim=1, keepdim=True), prompt, present)
        return prompt | ~prompt.any(dim=1, keepdim=True)

    def _present(self, arguments: Mapping[str, Any], inputs: Tensor) -> Tensor:
        """Where a row has tokens (b, t)."""
        batch, tokens = inputs.shape[:2]
        mask: Any = arguments.get("attention_mask")
        if mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2):
            if self._call.width is None:
                raise GatewiseError("attention_mask is not of shape (b, t): routing needs to know which tokens are padding")
            # Inside `generate` with a static cache the model gets the mask of its attention instead of the one that was given.
            given = self._call.attention_mask
            mask = seen_by_the_last_token(mask, tokens) if given is None else given.repeat_interleave(batch // len(given), dim=0)
        if mask is None:
            _refuse_packed(arguments)
            return torch.ones(batch, tokens, dtype=torch.bool, device=inputs.device)
        return mask[:, -tokens:].to(inputs.device).bool()


def by_row(names: Sequence[str], rows: int) -> list[str]:
    """One name a row, where ``generate`` has made several rows (beams, samples) of each prompt.

    Raises:
        GatewiseError: there are not as many names as rows.
    """
    if not names or rows % len(names):
        raise GatewiseError(f"adapter_names has {len(names)} names for a batch of {rows} rows: give one name a row")
    return [name for name in names for _ in range(rows // len(names))]


def _refuse_packed(arguments: Mapping[str, Any]) -> None:
    positions = arguments.get("position_ids")
    starts_over = isinstance(positions, Tensor) and positions.ndim == 2 and bool((positions.diff(dim=1) < 0).any())
    if starts_over or arguments.get("cu_seq_lens_q") is not None:
        raise GatewiseError(
            "a row holds several packed samples, but a row is routed as one: train without packing and padding_free batches"
        )


def _named(groups: Groups) -> str:
    return " and ".join(map(repr, groups)) or "none"
