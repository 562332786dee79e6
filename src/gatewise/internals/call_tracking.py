"""What a Transformers model is called with, and which of it is the prompt: for adapters that read a text before the layers run.

A ``CallTracker`` puts hooks on the model and has its ``generate`` say what it was given. MiLoRA's routers (gatewise.routed) and
SPT's prompt generators (gatewise.prompts) both find their prompts here.

Shapes: b batch, t tokens.
"""

import inspect
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from threading import RLock
from typing import Any, ClassVar, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_compiling, is_exporting
from transformers import GenerationMixin

from gatewise.errors import GatewiseError
from gatewise.internals.class_swap import ObjectMixin, add_mixin, remove_mixin
from gatewise.internals.layer_stack import forward_arguments
from gatewise.internals.library_attributes import attention_implementation
from gatewise.losses import prompts_by_labels, text_starts

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Call:
    """A call of PEFT's ``forward``, or of ``generate``.

    Attributes:
        adapter_names: PEFT's, one for each row that was given.
        rows, width: of ``generate``'s prompts; the width is None outside of it.
        attention_mask: that of ``generate``'s prompts (rows, width).
    """

    adapter_names: Sequence[str] | None = None
    rows: int = 1
    width: int | None = None
    attention_mask: Tensor | None = None

    def by_row(self, given: Tensor, batch: int) -> Tensor:
        """What was given for each prompt, for each of the rows (beams, samples) that ``generate`` has made of it."""
        return given if self.width is None else given.repeat_interleave(batch // self.rows, dim=0)

    def names_by_row(self, batch: int) -> list[str]:
        """``adapter_names`` for each of the rows, which are several for each prompt where ``generate`` made beams or samples.

        Raises:
            GatewiseError: there are not as many names as rows or, inside ``generate``, as prompts.
        """
        names, given = self.adapter_names or (), batch if self.width is None else self.rows
        if len(names) != given:
            raise GatewiseError(f"adapter_names has {len(names)} names for a batch of {given} rows: give one name a row")
        return [name for name in names for _ in range(batch // given)]


@dataclass(frozen=True, eq=False)
class Packing:
    """Where the n texts lie of rows that hold several, one after the other.

    Attributes:
        of_token: (b, t), the number of each token's text, from 0 over all rows.
        places: (n, w), where the tokens of each text are among all b · t; anywhere beyond its end.
        there: (n, w), true up to its end.
        by_kernel: the attention's kernel keeps texts apart, and gets no mask.
    """

    of_token: Tensor
    places: Tensor
    there: Tensor
    by_kernel: bool

    def apart(self, rows: Tensor) -> Tensor:
        """(n, w, ...) of (b, t, ...): each text in a row of its own, anything beyond its end."""
        return rows.flatten(0, 1)[self.places.to(rows.device)]

    def together(self, apart: Tensor) -> Tensor:
        """(b, t) of (n, w): the texts in their rows again."""
        made = apart.new_zeros(self.of_token.numel())
        there, places = self.there.to(apart.device), self.places.to(apart.device)
        made[places[there]] = apart[there]
        return made.view(self.of_token.shape)

    def is_kept_by(self, mask: Any) -> bool:
        """Whether no token sees one of another text in an attention with this mask (b, h, t, t)."""
        of_token = self.of_token
        if self.by_kernel:
            return mask is None
        if not isinstance(mask, Tensor) or mask.ndim != 4 or mask.shape[2:] != (of_token.shape[1],) * 2:
            return False
        seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        others = of_token.unsqueeze(2) != of_token.unsqueeze(1)
        return not bool((seen & others.unsqueeze(1).to(seen.device)).any())


@dataclass(frozen=True)
class Text:
    """A batch: ``present`` (b, t) is true at its tokens, ``prompt`` (b, t) at those that are prompt; a row may have none.

    Of packed rows both are (n, w), a text in a row of its own.
    """

    present: Tensor
    prompt: Tensor
    packing: Packing | None = None


class CallState:
    """What is being done with a tracked model, by the thread whose turn it is. A copy, pickled or not, begins anew.

    A subclass names its attributes with the values that they have before anything was set.

    Attributes:
        call: the call that is open.
        prompt: where ``prompt_positions`` says that prompts lie (b, t).
        current: the pass that is open: whatever the tracker's ``begin`` made of a forward.
        opened_by: which of the watched models' forward that is.
        arguments: of this forward, by name.
        of_pass: the attributes that a pass sets, which go when it ends.
        turn: held while a call is open, and while prompts lie where somebody said.
    """

    of_pass: ClassVar[tuple[str, ...]] = ("current", "opened_by", "arguments")
    call: Call | None = None
    prompt: Tensor | None = None
    current: Any = None
    opened_by: int | None = None
    arguments: Mapping[str, Any] = {}

    def __init__(self) -> None:
        self.turn = RLock()

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(self), ()

    def close(self) -> None:
        """No pass is open."""
        for name in self.of_pass:
            self.__dict__.pop(name, None)


class CallTracker:
    """Watches the forwards of a model and of the models inside it. A subclass says what happens when one begins and ends.

    Args:
        models: the Transformers models around the stacks of layers, the outermost first; whichever is called opens the pass.
        state: what passes keep.
        adapters, readers: what the adapters and what reads the prompt are called in messages.
        causal: whether the model writes answers, so that labels tell prompt from answer.

    Attributes:
        adapters, readers: as given.
        unpacks: the adapters can read several texts a row.
    """

    unpacks: ClassVar[bool] = False

    def __init__(self, models: Sequence[nn.Module], state: CallState, adapters: str, readers: str, causal: bool) -> None:
        self.now = state
        self._models, self.adapters, self.readers, self._causal = list(models), adapters, readers, causal
        self._warned_of_answers = False
        self._names = [forward_arguments(module) for module in models]
        inside = [set(module.modules()) for module in models]
        self._inner = [{place for place, one in enumerate(models) if one in parts} for parts in inside]
        self._handles = [
            handle
            for module in models
            for handle in (
                module.register_forward_pre_hook(self._begin, with_kwargs=True),
                module.register_forward_hook(self._end, always_call=True),
            )
        ]
        if isinstance(models[0], GenerationMixin):
            models[0].call_tracker = self  # type: ignore[assignment]
            add_mixin(models[0], TrackedGeneration)

    def remove(self) -> None:
        """Takes hooks and the tracked ``generate`` off."""
        for handle in self._handles:
            handle.remove()
        if isinstance(self._models[0], TrackedGeneration):
            del self._models[0].call_tracker
            remove_mixin(self._models[0])

    # ---- for subclasses ----

    @property
    def is_at_work(self) -> bool:
        """Whether an adapter is in use."""
        raise NotImplementedError

    def begin(self, arguments: Mapping[str, Any], module: Any) -> Any:
        """The pass that a forward opens, from its arguments by name; None for none."""
        raise NotImplementedError

    def end(self, done: Any, arguments: Mapping[str, Any], output: Any, module: Any) -> Any:
        """The pass that a module's forward opened has ended without a fault. The output becomes what this returns, unless None."""
        raise NotImplementedError

    # ---- calls and passes ----

    @contextmanager
    def call(self, call: Call) -> Iterator[None]:
        """While open, forwards belong to this call, and calls of other threads wait."""
        with self.now.turn:
            before, self.now.call = self.now.call, call
            try:
                yield
            finally:
                self.now.call = before
                self.now.close()  # a forward that was stopped from the keyboard has not come to its end

    @contextmanager
    def prompt_positions(self, prompt: Tensor) -> Iterator[None]:
        """``call``, in which texts have their prompts where ``prompt`` (b, t) is true; columns it lacks are none of it."""
        with self.now.turn:
            before, self.now.prompt = self.now.prompt, prompt
            try:
                yield
            finally:
                self.now.prompt = before

    # torch.compile would run what it traces here in another order than the layers, which then find no pass or one of another call.
    @torch.compiler.disable
    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        place = next((index for index, one in enumerate(self._models) if one is module), None)
        if place is None:
            raise GatewiseError(
                f"{self.adapters} do not run in replicas (nn.DataParallel): use one process a device, as torchrun does"
            )
        now = self.now
        if is_exporting() and self.is_at_work:
            raise GatewiseError(
                f"the model was given to torch.export, but {self.adapters} decide by each text what is run, which no exported "
                "graph can do: use the model as it is, or export it with its adapters switched off"
            )
        # An outer model's forward runs the inner ones. The same or another one again is a new pass: the last was interrupted.
        if now.opened_by is not None and now.opened_by != place and place in self._inner[now.opened_by]:
            return
        now.close()
        now.opened_by = place
        now.arguments = {**dict(zip(self._names[place], args, strict=False)), **kwargs}
        now.current = self.begin(now.arguments, module)

    @torch.compiler.disable
    def _end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        now = self.now
        if now.opened_by is None or self._models[now.opened_by] is not module:
            return None
        done, arguments = now.current, now.arguments
        now.close()
        # There is no output if the forward failed.
        return None if done is None or output is None else self.end(done, arguments, output, module)

    # ---- prompts ----

    def read_text(self, arguments: Mapping[str, Any], inputs: Tensor, training: bool) -> Text:
        """Where the tokens lie, and the prompts: never padding.

        In a causal model the prompt is what ``prompt_positions`` says or, else, what stands before the first label that is not -100
        or, else, what ``generate`` was given or, else, everything. Positions after an answer has begun are left out even where they
        have no label (the next turn of a chat): nobody may read what it is used to predict. What classifier-free guidance compares
        a prompt with is one by itself. In other models the whole text is the prompt.

        The same for each of several texts in a row.

        Args:
            inputs: the ids or embeddings, see ``text_inputs``.
            training: whether the model learns from this forward.

        Raises:
            GatewiseError: shapes that do not fit, packed rows that these adapters cannot read, or a prompt in chunks.
        """
        starts = text_starts(arguments, *inputs.shape[:2])
        if starts is not None:
            return self._read_packed(arguments, starts.to(inputs.device), training)
        call, cache = self.now.call or Call(), cache_of(arguments)
        batch, tokens = inputs.shape[:2]
        if cache is not None and call.width is not None and tokens < call.width:
            raise GatewiseError(
                f"the prompt of {call.width} tokens was cut into chunks of {tokens}, but {self.readers} have to read all of it "
                "first: leave prefill_chunk_size out"
            )
        present, labels = self._present(arguments, inputs, call), arguments.get("labels")
        if call.width is not None and arguments.get("use_cache") and cache is None:
            return Text(present, present)  # of guidance: only for that `generate` leaves it to the model to make a cache
        if self.now.prompt is not None:
            given = fitted(call.by_row(self.now.prompt, batch), batch, tokens)
            return Text(present, present & given.to(present.device))
        if not self._causal:
            return Text(present, present)
        if isinstance(labels, Tensor) and labels.shape == (batch, tokens):
            return Text(present, present & prompts_by_labels(labels).to(present.device))
        if training:
            self._refuse_to_learn_answers()
        elif call.width is None and not self._warned_of_answers and not is_compiling() and seems_to_hold_answers(arguments):
            self._warned_of_answers = True
            logger.warning(
                "a decoder with %s was called without labels, so its %s read the whole text, and an answer in it too: to score "
                "answers give labels that are -100 before them, or call it under model.prompt_positions(mask)",
                self.adapters,
                self.readers,
            )
        width = tokens if call.width is None else call.width
        return Text(present, present & (torch.arange(tokens, device=present.device) < width))

    def _read_packed(self, arguments: Mapping[str, Any], starts: Tensor, training: bool) -> Text:
        """``read_text`` of several texts a row."""
        if not (self.unpacks and self._causal):
            raise GatewiseError(
                f"a row holds several packed samples, but {self.adapters} read one text a row: train without packing and "
                "padding_free batches"
            )
        model, labels = self._models[-1], arguments.get("labels")
        by_kernel = "flash" in attention_implementation(model) and all(map(_is_attention, _kinds_of_layers(model)))
        packing = packing_of(starts, by_kernel and len(starts) == 1)
        if self.now.prompt is not None:
            prompt = fitted(self.now.prompt, *starts.shape)
        elif isinstance(labels, Tensor) and labels.shape == starts.shape:
            prompt = prompts_by_labels(labels, starts)
        else:
            prompt = torch.ones_like(starts)
            if training:
                self._refuse_to_learn_answers()
        return Text(packing.there, packing.there & packing.apart(prompt.to(starts.device)), packing)

    def _refuse_to_learn_answers(self) -> NoReturn:
        raise GatewiseError(
            f"a decoder with {self.adapters} was trained without labels in its call, so that its {self.readers} would read the "
            "answers: pass labels with -100 before the answer (label_smoothing_factor and compute_loss_func have the Trainer keep "
            "them back: leave these out), or run the forward under model.prompt_positions(mask)"
        )

    def _present(self, arguments: Mapping[str, Any], inputs: Tensor, call: Call) -> Tensor:
        """Where a row has tokens (b, t)."""
        batch, tokens = inputs.shape[:2]
        mask: Any = arguments.get("attention_mask")
        if mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2):
            if call.width is None:
                raise GatewiseError(f"attention_mask is not of shape (b, t): {self.adapters} need to know which tokens are padding")
            # Inside `generate` with a static cache the model gets the mask of its attention instead of the one that was given.
            given = call.attention_mask
            mask = seen_by_the_last_token(mask, tokens) if given is None else call.by_row(given, batch)
        if mask is None:
            return torch.ones(batch, tokens, dtype=torch.bool, device=inputs.device)
        return mask[:, -tokens:].to(inputs.device).bool()


class TrackedGeneration(ObjectMixin, nn.Module):
    """Has a model's ``generate`` tell its tracker what it was given. PEFT's ``generate`` comes through here, too."""

    call_tracker: CallTracker

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own, which its ``generate_batch`` calls too.

        Raises:
            GatewiseError: an adapter is in use.
        """
        tracker = self.call_tracker
        if tracker.is_at_work:
            raise GatewiseError(
                f"continuous batching (generate_batch) was started, which packs many texts into one row, but {tracker.adapters} "
                "read one text a row: call generate with a padded batch"
            )
        return super().init_continuous_batching(*args, **kwargs)  # type: ignore[misc]

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own.

        Raises:
            GatewiseError: classifier-free guidance without a cache.
        """
        tracker = self.call_tracker
        given = {**dict(zip(("inputs", "generation_config"), args, strict=False)), **kwargs}
        if given.get("guidance_scale") not in (None, 1) and given.get("use_cache") is False and tracker.is_at_work:
            raise GatewiseError(
                f"guidance_scale was given with use_cache=False, where {tracker.readers} cannot tell the negative prompt from the "
                "answer: leave use_cache out"
            )
        encoded = given.get("encoder_outputs")
        named = (None if encoded is None else encoded[0], *(given.get(name) for name in ("inputs_embeds", "input_ids", "inputs")))
        prompts = next((one for one in named if isinstance(one, Tensor) and one.ndim > 1), None)
        mask = given.get("attention_mask")
        # Without a prompt it begins with one token of its own.
        rows, width = (1, 1) if prompts is None else prompts.shape[:2]
        mask = mask if prompts is not None and isinstance(mask, Tensor) and mask.ndim == 2 else None
        outer = tracker.now.call or Call()  # PEFT's generate, around this one, knows the adapters' names
        with tracker.call(replace(outer, rows=rows, width=width, attention_mask=mask)):
            return super().generate(*args, **kwargs)  # type: ignore[misc]


def read_by_encoder(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Of a forward of an encoder-decoder model, of its encoder or of its decoder: what the encoder reads.

    Where it has read before and its last hidden states were given, these are the ``inputs_embeds``.
    """
    states, name = arguments.get("encoder_hidden_states"), "encoder_attention_mask"
    if states is None:
        encoded, name = arguments.get("encoder_outputs"), "attention_mask"
        states = None if encoded is None else encoded[0]
    if states is None:
        return {key: arguments.get(key) for key in ("input_ids", "inputs_embeds", "attention_mask")}
    return {"inputs_embeds": states, "attention_mask": arguments.get(name)}


def text_inputs(arguments: Mapping[str, Any], adapters: str) -> Tensor:
    """The ids (b, t) or embeddings (b, t, d) of a forward.

    Raises:
        GatewiseError: there are none, or several texts a row.
    """
    ids, embeddings = arguments.get("input_ids"), arguments.get("inputs_embeds")
    inputs, dimensions = (ids, 2) if ids is not None else (embeddings, 3)
    if not isinstance(inputs, Tensor) or inputs.ndim != dimensions:
        raise GatewiseError(
            f"{adapters} read one text a row: the model was called without input_ids or inputs_embeds, of shape (b, t) or (b, t, d)"
        )
    return inputs


def packing_of(starts: Tensor, by_kernel: bool) -> Packing:
    """Where texts lie that begin where ``starts`` (b, t) is true, as it is in the first column."""
    of_token = starts.flatten().cumsum(dim=0) - 1
    lengths = of_token.bincount()
    along = torch.arange(len(of_token), device=starts.device)
    columns = along - (lengths.cumsum(dim=0) - lengths)[of_token]
    there = torch.arange(int(lengths.max()), device=starts.device) < lengths.unsqueeze(1)
    places = torch.zeros_like(there, dtype=torch.long).index_put((of_token, columns), along)
    return Packing(of_token.view(starts.shape), places, there, by_kernel)


def cache_of(arguments: Mapping[str, Any]) -> Any:
    """The key-value cache among a forward's arguments, under the name of this or of older versions of Transformers."""
    cache = arguments.get("cache")
    return arguments.get("past_key_values") if cache is None else cache


def cached_tokens(cache: Any) -> int:
    """How many tokens a cache holds, 0 for None.

    Raises:
        GatewiseError: it is not a Cache of Transformers.
    """
    if cache is None:
        return 0
    if not hasattr(cache, "get_seq_length"):
        raise GatewiseError(
            f"past_key_values is a {type(cache).__name__}: expected a Cache of Transformers, such as DynamicCache()"
        )
    return int(cache.get_seq_length())


def keeps_a_state(model: Any) -> bool:
    """Whether a model keeps its past in a recurrent state (Mamba, RWKV), where no cached tokens can be counted."""
    kinds = _kinds_of_layers(model)
    return (bool(kinds) and not any(map(_is_attention, kinds))) or "state" in inspect.signature(type(model).forward).parameters


def _kinds_of_layers(model: Any) -> Sequence[str]:
    """Those that the model's configuration names, if it does."""
    return getattr(model.config.get_text_config(), "layer_types", None) or ()


def _is_attention(kind: str) -> bool:
    return kind.endswith("attention") and kind != "linear_attention"


def seems_to_hold_answers(arguments: Mapping[str, Any]) -> bool:
    """Whether a call without labels, outside ``generate``, looks like one that scores a text, not one that goes on after a prompt.

    Who goes on gives a cache or asks for one, or wants the last logits alone.
    """
    inputs = arguments.get("input_ids")
    inputs = arguments.get("inputs_embeds") if inputs is None else inputs
    kept = arguments.get("logits_to_keep")
    goes_on = cache_of(arguments) is not None or arguments.get("use_cache") is True or (isinstance(kept, int) and kept == 1)
    return not goes_on and isinstance(inputs, Tensor) and inputs.shape[1] > 1


def fitted(prompt: Tensor, batch: int, tokens: int) -> Tensor:
    """Prompt positions (b, up to t) as (b, t), false where columns are missing.

    Raises:
        GatewiseError: they are of another batch, or of longer rows.
    """
    if prompt.ndim != 2 or len(prompt) != batch or prompt.shape[1] > tokens:
        raise GatewiseError(f"prompt positions of shape {tuple(prompt.shape)} were given for a batch of shape ({batch}, {tokens})")
    return F.pad(prompt.bool(), (0, tokens - prompt.shape[1]), value=False)


def seen_by_the_last_token(mask: Any, tokens: int) -> Tensor | None:
    """The tokens (b, t) of a prompt that its last one attends to or, but for a sliding window, would: all that are no padding."""
    if isinstance(mask, Mapping):
        mask = next(iter(mask.values()))
    if not isinstance(mask, Tensor):
        return None
    # Whatever the window, a token is in it itself, and padding is attended to by nobody.
    itself = mask[:, 0, :tokens, :tokens].diagonal(dim1=-2, dim2=-1)
    return itself if itself.dtype == torch.bool else itself == 0
