"""What a Transformers model is called with, seen through hooks: for adapters that read the text of a call before its layers run.

Shapes: b batch, t tokens.
"""

import inspect
import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Generic, TypeVar, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gatewise.errors import GatewiseError

logger = logging.getLogger(__name__)
_Value = TypeVar("_Value")


class OfThread(Generic[_Value]):
    """An attribute of which every thread has its own value, so that several can run one model at a time, as web servers do.

    A thread that has set none finds the one given here, and so does a deep copy or what was pickled.
    """

    def __init__(self, at_first: _Value) -> None:
        self._at_first = at_first

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, owner: None, kind: type) -> "OfThread[_Value]": ...
    @overload
    def __get__(self, owner: object, kind: type) -> _Value: ...
    def __get__(self, owner: object | None, kind: type) -> "OfThread[_Value] | _Value":
        if owner is None:
            return self
        value: _Value = getattr(_values_of(owner), self._name, self._at_first)
        return value

    def __set__(self, owner: object, value: _Value) -> None:
        setattr(_values_of(owner), self._name, value)


class _Values(threading.local):
    def __reduce__(self) -> Any:
        return _Values, ()  # what a call was doing is no part of a copy


def _values_of(owner: object) -> _Values:
    values: _Values | None = owner.__dict__.get("_values_of_threads")
    # In one step, because two threads may be the first at the same time.
    return owner.__dict__.setdefault("_values_of_threads", _Values()) if values is None else values


class CallTracker:
    """Watches the forwards of a model and of the models inside it; what a subclass does when one begins and ends is its own.

    Which forward runs, and which prompts were told, each thread has for itself.

    Args:
        watched: the Transformers models around the stack of layers, the outermost first; whichever is called opens the pass.
        what: the adapters' kind, in messages.
    """

    _opened_by = OfThread[int | None](None)
    _told = OfThread[Tensor | None](None)
    _told_of_answers = False

    def __init__(self, watched: Sequence[nn.Module], what: str) -> None:
        self._watched, self._what = list(watched), what
        self._names = [list(inspect.signature(type(module).forward).parameters)[1:] for module in watched]
        self._handles = [
            handle
            for module in watched
            for handle in (
                module.register_forward_pre_hook(self._begin, with_kwargs=True),
                module.register_forward_hook(self._end, always_call=True),
            )
        ]

    def remove(self) -> None:
        """Takes the hooks off."""
        for handle in self._handles:
            handle.remove()

    @contextmanager
    def told(self, prompt: Tensor) -> Iterator[None]:
        """While open, texts of this thread have their prompts where ``prompt`` (b, t) is true; columns it lacks are none of it."""
        before, self._told = self._told, prompt
        try:
            yield
        finally:
            self._told = before

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise NotImplementedError

    def _end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        raise NotImplementedError

    def _tell_of_answers(self, arguments: Mapping[str, Any], readers: str) -> None:
        """Warns, once, of a call outside ``generate`` that scores a text, because then what is predicted was read before."""
        is_told = self._told is not None or isinstance(arguments.get("labels"), Tensor)
        if not is_told and not self._told_of_answers and seems_to_hold_answers(arguments):
            self._told_of_answers = True
            logger.warning(
                "a decoder with %s was called without labels, so its %s read the whole text, and an answer in it too: to score "
                "answers give labels that are -100 before them, or call it under model.prompt_positions(mask)",
                self._what,
                readers,
            )

    def _place(self, module: nn.Module) -> int:
        """Which of the watched models one is.

        Raises:
            GatewiseError: none, but a copy of one.
        """
        place = next((index for index, one in enumerate(self._watched) if one is module), None)
        if place is None:
            raise GatewiseError(
                f"{self._what} do not run in replicas (nn.DataParallel): use one process a device, as torchrun does"
            )
        return place

    def _is_inside(self, place: int) -> bool:
        """Whether a forward that begins is part of the one that runs.

        An outer model's forward runs the inner ones. The same or an outer one again is a new pass: the last one was interrupted.
        """
        return self._opened_by is not None and self._opened_by < place

    def _is_open_by(self, module: nn.Module) -> bool:
        return self._opened_by is not None and self._watched[self._opened_by] is module

    def _given(self, place: int, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of a forward by name."""
        return {**dict(zip(self._names[place], args, strict=False)), **kwargs}


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
