"""What a Transformers model is called with, and which of it is the prompt: for adapters that read the prompt before the layers run.

A ``CallTracker`` puts hooks on the model and has its ``generate`` say what it was given. MiLoRA's routers (gatewise.routed) and
SPT's prompt generators (gatewise.prompts) both find their prompts here.

Shapes: b batch, t tokens.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from threading import RLock
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_compiling
from transformers import GenerationMixin

from gatewise.errors import GatewiseError
from gatewise.internals.class_swap import ObjectMixin, add_mixin, remove_mixin
from gatewise.internals.layer_stack import forward_arguments
from gatewise.losses import prompts_by_labels

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Call:
    """A call of PEFT's ``forward``, or of ``generate``.

    Attributes:
        adapter_names: PEFT's, one for each row that was given.
        rows, width: of ``generate``'s prompts; None outside of it.
        attention_mask: that of ``generate``'s prompts (rows, width).
    """

    adapter_names: Sequence[str] | None = None
    rows: int | None = None
    width: int | None = None
    attention_mask: Tensor | None = None

    def by_row(self, given: Tensor, batch: int) -> Tensor:
        """Repeats what was given for each prompt for each of the rows (beams, samples) that ``generate`` has made of it."""
        return given if self.rows is None else given.repeat_interleave(batch // self.rows, dim=0)


@dataclass(frozen=True)
class Text:
    """A batch: ``present`` (b, t) is true at its tokens, ``prompt`` (b, t) at those that are prompt; a row may have none."""

    present: Tensor
    prompt: Tensor


class CallState:
    """What is being done with a tracked model, by the thread whose turn it is. A copy of it, pickled or not, begins anew.

    Attributes:
        call: the call that is open.
        prompt: where ``prompt_positions`` says that prompts lie (b, t).
        current: the pass that is open: whatever the tracker's ``begin`` made of a forward.
        opened_by: which of the watched models' forward that is.
        arguments: of this forward, by name.
        last: the newest request of a routed model.
        turn: held while a call is open, and while ``prompt_positions`` is.
    """

    def __init__(self) -> None:
        self.turn = RLock()
        self.call: Call | None = None
        self.prompt: Tensor | None = None
        self.last: Any = None
        self.close()

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(self), ()

    def close(self) -> None:
        """Ends the pass."""
        self.current: Any = None
        self.opened_by: int | None = None
        self.arguments: Mapping[str, Any] = {}


class CallTracker:
    """Watches the forwards of a model and of the models inside it. A subclass says what happens when one begins and ends.

    Args:
        models: the Transformers models around the layers, the outermost first; whichever is called opens the pass.
        adapters, readers: what the adapters and what reads the prompt are called in messages.
        causal: whether the model writes answers, so that labels tell prompt from answer.
        active: tells what is in use: something false if no adapter is.
    """

    def __init__(self, models: Sequence[nn.Module], adapters: str, readers: str, causal: bool, active: Callable[[], Any]) -> None:
        self.now, self.adapters, self.readers, self.active = CallState(), adapters, readers, active
        self._models, self._causal, self._warned_of_answers = list(models), causal, False
        self._names = [forward_arguments(module) for module in models]
        self._handles = []
        for module in models:
            self._handles.append(module.register_forward_pre_hook(self._begin, with_kwargs=True))
            self._handles.append(module.register_forward_hook(self._end, always_call=True))
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

    def begin(self, arguments: Mapping[str, Any], module: Any) -> Any:
        """The pass that a forward opens, from its arguments by name; None for none."""

    def end(self, done: Any, arguments: Mapping[str, Any], output: Any) -> Any:
        """Called when a pass has ended without a fault. The output becomes what this returns, unless None."""

    # ---- calls and passes ----

    @contextmanager
    def call(self, call: Call | None) -> Iterator[None]:
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
        """While open, texts have their prompts where ``prompt`` (b, t) is true; columns it lacks are none of it."""
        with self.call(self.now.call):
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
        # An outer model's forward runs the inner ones. The same or another one again is a new pass: the last was interrupted.
        if now.opened_by is not None and place > now.opened_by:
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
        return None if done is None or output is None else self.end(done, arguments, output)

    # ---- prompts ----

    def read_text(self, arguments: Mapping[str, Any], inputs: Tensor, training: bool) -> Text:
        """Where the tokens lie, and the prompts: never padding.

        In a causal model the prompt is what ``prompt_positions`` says or, else, what stands before the first label that is not -100
        or, else, what ``generate`` was given or, else, everything. Positions after an answer has begun are left out even where they
        have no label (the next turn of a chat): nobody may read what it is used to predict. In other models the whole text is the
        prompt.

        Args:
            inputs: the ids or embeddings, see ``text_inputs``.
            training: whether the model learns from this forward.

        Raises:
            GatewiseError: shapes that do not fit, packed rows, a prompt in chunks, or answers that cannot be told from prompts.
        """
        call, labels = self.now.call or Call(), arguments.get("labels")
        batch, tokens = inputs.shape[:2]
        width = tokens if call.width is None else call.width
        if is_packed(arguments):
            raise GatewiseError(
                f"a row holds several packed samples, but {self.adapters} read one text a row: train without packing and "
                "padding_free batches"
            )
        if tokens < width:
            raise GatewiseError(
                f"the prompt of {width} tokens was cut into chunks of {tokens}, but {self.readers} have to read all of it first: "
                "leave prefill_chunk_size out"
            )
        present = self._present(arguments, inputs, call)
        if self.now.prompt is not None:
            prompt = call.by_row(self.now.prompt, batch)
            if prompt.ndim != 2 or len(prompt) != batch or prompt.shape[1] > tokens:
                raise GatewiseError(
                    f"prompt positions of shape {tuple(prompt.shape)} were given for a batch of shape ({batch}, {tokens})"
                )
            prompt = F.pad(prompt.bool(), (0, tokens - prompt.shape[1]), value=False).to(present.device)
        elif not self._causal:
            prompt = present
        elif isinstance(labels, Tensor) and labels.shape == (batch, tokens):
            prompt = prompts_by_labels(labels).to(present.device)
        elif training:
            raise GatewiseError(
                f"a decoder with {self.adapters} was trained without labels in its call, so that its {self.readers} would read the "
                "answers: pass labels with -100 before the answer (label_smoothing_factor and compute_loss_func have the Trainer "
                "keep them back: leave these out), or run the forward under model.prompt_positions(mask)"
            )
        else:
            prompt = torch.arange(tokens, device=present.device) < width
            if call.width is None and tokens > 1 and not arguments.get("use_cache") and cache_of(arguments) is None:
                self._warn_of_answers()
        return Text(present, present & prompt)

    def _warn_of_answers(self) -> None:
        """Once: who goes on after a prompt gives a cache or asks for one, so this call may score a text with its answer."""
        if not self._warned_of_answers and not is_compiling():
            self._warned_of_answers = True
            logger.warning(
                "a decoder with %s was called without labels, so its %s read the whole text, and an answer in it too: to score "
                "answers give labels that are -100 before them, or call it under model.prompt_positions(mask)",
                self.adapters,
                self.readers,
            )

    def _present(self, arguments: Mapping[str, Any], inputs: Tensor, call: Call) -> Tensor:
        """Where a row has tokens (b, t)."""
        batch, tokens = inputs.shape[:2]
        mask: Any = arguments.get("attention_mask")
        if mask is None:
            return torch.ones(batch, tokens, dtype=torch.bool, device=inputs.device)
        if call.attention_mask is not None and getattr(mask, "ndim", None) != 2:
            # With a static cache `generate` gives the model the mask of its attention instead of the one that was given.
            mask = call.by_row(call.attention_mask, batch)
        if not isinstance(mask, Tensor) or mask.ndim != 2:
            raise GatewiseError(
                f"attention_mask is not of shape (b, t), by which {self.adapters} know padding: give one, with a static cache too"
            )
        return mask[:, -tokens:].to(inputs.device).bool()


class TrackedGeneration(ObjectMixin, nn.Module):
    """Has a model's ``generate`` tell its tracker what it was given. PEFT's ``generate`` comes through here, too."""

    call_tracker: CallTracker

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own, which its ``generate_batch`` calls too.

        Raises:
            GatewiseError: an adapter is in use.
        """
        if self.call_tracker.active():
            raise GatewiseError(
                f"generate_batch packs many texts into a row, but {self.call_tracker.adapters} read one text a row: call generate"
            )
        return super().init_continuous_batching(*args, **kwargs)  # type: ignore[misc]

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own.

        Raises:
            GatewiseError: classifier-free guidance.
        """
        tracker = self.call_tracker
        given = {**dict(zip(("inputs", "generation_config"), args, strict=False)), **kwargs}
        settings = given.get("generation_config") or self.generation_config
        scale = given.get("guidance_scale", getattr(settings, "guidance_scale", None))
        if scale not in (None, 1) and tracker.active():
            raise GatewiseError(
                f"guidance_scale is {scale}, but {tracker.readers} cannot tell the negative prompt from an answer: leave it out"
            )
        named = (given.get(name) for name in ("inputs_embeds", "input_ids", "inputs"))
        prompts = next((one for one in named if isinstance(one, Tensor) and one.ndim > 1), None)
        # Without a prompt it begins with one token of its own.
        rows, width = (1, 1) if prompts is None else prompts.shape[:2]
        mask = given.get("attention_mask")
        mask = mask if prompts is not None and isinstance(mask, Tensor) and mask.ndim == 2 else None
        outer = tracker.now.call or Call()  # PEFT's generate, around this one, knows the adapters' names
        with tracker.call(replace(outer, rows=rows, width=width, attention_mask=mask)):
            return super().generate(*args, **kwargs)  # type: ignore[misc]


def text_inputs(arguments: Mapping[str, Any], adapters: str) -> Tensor:
    """The ids (b, t) or embeddings (b, t, d) of a forward.

    Raises:
        GatewiseError: there are none, or they have another shape.
    """
    ids, embeddings = arguments.get("input_ids"), arguments.get("inputs_embeds")
    inputs, dimensions = (ids, 2) if ids is not None else (embeddings, 3)
    if not isinstance(inputs, Tensor) or inputs.ndim != dimensions:
        raise GatewiseError(
            f"{adapters} read one text a row: the model was called without input_ids or inputs_embeds, of shape (b, t) or (b, t, d)"
        )
    return inputs


def is_packed(arguments: Mapping[str, Any]) -> bool:
    """Whether a row holds several texts, which Transformers tells by positions that begin anew, or by ``cu_seq_lens_q``."""
    positions, ends = arguments.get("position_ids"), arguments.get("cu_seq_lens_q")
    if arguments.get("attention_mask") is not None:
        return False
    if isinstance(ends, Tensor):
        return len(ends) > 2
    return isinstance(positions, Tensor) and positions.ndim == 2 and bool((positions.diff(dim=1) < 0).any())


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
