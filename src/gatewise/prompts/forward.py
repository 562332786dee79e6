"""One forward of the base model with prompts in it: what its layers need to know, and when it begins and ends.

A pass that finds tokens in the key-value cache continues a text: its prompts are in the cache, and no generator runs. Any other
pass begins a text.

Shapes: b batch, t tokens, l prompt tokens, c head size.
"""

import inspect
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import count
from typing import Any, TypeVar

import torch
from torch import Tensor

from gatewise.errors import GatewiseError
from gatewise.internals.call_tracking import CallState, CallTracker, Text, cache_of, cached_tokens, text_inputs
from gatewise.internals.library_attributes import attention_implementation
from gatewise.prompts.cache import PromptedCache, prompts_of
from gatewise.prompts.config import SelectivePromptConfig
from gatewise.prompts.families import Transformer
from gatewise.prompts.generator import pooling_weights

logger = logging.getLogger(__name__)
Gates = Mapping[int, Tensor | None]
"""a_i (1,) by the number of the layer, None for one."""


_Made = TypeVar("_Made")
_trackers = count()


@dataclass(frozen=True)
class AdapterInUse:
    """The adapter whose prompts a pass takes.

    Attributes:
        gates: of the layers with a generator, in order; with their graph.
        first: the first layer that a prompt enters. Layers of ``gates`` below it have a closed gate and nothing to carry on.
    """

    name: str
    config: SelectivePromptConfig
    gates: Gates
    first: int


@dataclass(eq=False)
class PromptPass:
    """A pass in which prompts of one adapter are at work. What layers share is made once.

    Attributes:
        tracker: the number of the tracker, which goes into caches with the prompts.
        first: the first layer that a prompt enters; of a pass that continues a text, the first with a prompt in the cache.
        gates: of the layers with a generator, in order.
        text: None if the pass continues one.
        tokens: t.
        balanced: whether prompts of different sizes count evenly where they are mixed.
        biases: the attention that makes relative position biases, if there is one.
        propagated: the prompt (b, l, d) that the layer below left, set from layer to layer.
    """

    tracker: int
    adapter: str
    config: SelectivePromptConfig
    causal: bool
    first: int
    gates: Gates
    text: Text | None
    tokens: int
    balanced: bool = False
    biases: Any = None
    propagated: Tensor | None = None
    pooling: Tensor | None = None
    rotary: dict[int, tuple[Any, Any]] = field(default_factory=dict)
    _masks: dict[int, tuple[Any, Any]] = field(default_factory=dict)
    _position_bias: Tensor | None = None

    def __post_init__(self) -> None:
        if self.text is not None:
            self.pooling = pooling_weights(self.text.prompt, self.config.num_prompt_tokens)

    def mask(self, given: Tensor | None) -> Tensor | None:
        """The mask that goes with the prompt in front, from that of the text alone."""
        if given is None:
            # Plain attention, causal or not, stays what it is with more tokens in front; while decoding there is one new token.
            return None
        return _once(self._masks, given, self._with_prompt)

    def positions(self, given: Any) -> Any:
        """Rotary embeddings of prompt and text, for those of the text that a layer is given."""
        return self.rotary[id(given[0])][1]

    def position_bias(self) -> Tensor:
        """Relative position biases (b, h, l + t, l + t) of h heads, for prompt and text; of the text among itself the base model's.

        The prompt is at the l positions before the row's first token, as in rotary models. Biases stand for differences of
        positions, so none is missing there. A bias of zero for the prompt would mean nothing: the same number on all biases of a
        head changes nothing in the base model, but it would then move attention between prompt and text.
        """
        if self._position_bias is None:
            assert self.text is not None
            present, length = self.text.present, self.config.num_prompt_tokens
            size = length + self.tokens
            before, after = (self.biases.compute_bias(*sides, device=present.device)[0] for sides in ((size, 1), (1, size)))
            by_distance = torch.cat([before[:, 1:, 0].flip(1), after[:, 0]], dim=1)  # (h, 2 (l + t) - 1)
            first = present.int().argmax(dim=1, keepdim=True)
            place = torch.arange(-length, self.tokens, device=present.device)
            places = torch.where(place < 0, first + place, place)
            distance = places[:, None, :] - places[:, :, None]
            self._position_bias = by_distance[:, distance + size - 1].transpose(0, 1)
        return self._position_bias

    def _with_prompt(self, given: Tensor) -> Tensor:
        length = self.config.num_prompt_tokens
        seen, unseen = (True, False) if given.dtype == torch.bool else (0.0, torch.finfo(given.dtype).min)
        front = given.new_full((*given.shape[:-1], length), seen)
        rows = torch.cat([front, given], dim=-1)
        if self.text is None:
            return rows
        # What the prompt tokens see: themselves, in a causal model those before; and in an encoder the text.
        square = given.new_full((length, length), unseen)
        square = square.masked_fill(torch.ones_like(square, dtype=torch.bool).tril(), seen) if self.causal else square.fill_(seen)
        text = given.new_full((len(given), 1, 1, given.shape[-1]), unseen)
        if not self.causal:
            text = text.masked_fill(self.text.present[:, None, None, :].to(given.device), seen)
        own = torch.cat([square.expand(*given.shape[:2], -1, -1), text.expand(*given.shape[:2], length, -1)], dim=-1)
        return torch.cat([own, rows], dim=-2)


def _once(made: dict[int, tuple[Any, Any]], given: Any, make: Callable[[Any], _Made]) -> _Made:
    """make(given), once for each; the given one is kept, so that no other can come to have its id."""
    if id(given) not in made:
        made[id(given)] = given, make(given)
    return made[id(given)][1]


class PassState(CallState):
    """What is being done with a model with prompts.

    Attributes:
        current: the pass that is open; None where prompts are not at work.
        dropped, reparameterised: what ``gates_dropped`` and ``gates_reparameterised`` of the tuner set.
    """

    current: PromptPass | None = None
    dropped: Tensor | None = None
    reparameterised: bool = False


class PassTracker(CallTracker):
    """Watches the base model's forwards and makes a ``PromptPass`` of each.

    Args:
        transformer: where the layers are.
        causal: whether labels tell prompt from answer.
        active: what tells which adapter is in use, None while there is none or all its gates are closed.
        state: the tuner's.
    """

    now: PassState

    def __init__(self, transformer: Transformer, causal: bool, active: Callable[[], AdapterInUse | None], state: PassState) -> None:
        self._transformer, self._active = transformer, active
        self._number = next(_trackers)
        self._looked_at_prompts = False
        super().__init__(transformer.around, state, "selective prompts", "generators", causal)
        if transformer.rotary is not None:
            self._handles.append(transformer.rotary.register_forward_hook(self._add_positions, with_kwargs=True))

    @property
    def is_at_work(self) -> bool:
        """Whether there is an adapter in use."""
        return self._active() is not None

    def begin(self, arguments: Mapping[str, Any], module: Any) -> PromptPass | None:
        """The pass that a forward opens, of a text that begins or of one in the cache."""
        cache = cache_of(arguments)
        continues = cached_tokens(cache) > 0
        if isinstance(cache, PromptedCache) and not continues:
            cache.gatewise_prompts.states.clear()
        active = self._active()
        if active is None:
            if continues and prompts_of(cache) is not None:
                raise GatewiseError(
                    "the key-value cache was filled with prompts of an adapter that is not in use now: start with an empty cache"
                )
            return None
        attention = attention_implementation(self._models[-1])
        if attention not in ("sdpa", "eager"):
            raise GatewiseError(
                f"attn_implementation is {attention!r}, whose masks selective prompts do not make: load the model with "
                "attn_implementation='sdpa' or 'eager'"
            )
        inputs = text_inputs(arguments, "selective prompts")
        batch, tokens = inputs.shape[:2]
        text, first = None, active.first
        if continues:
            first = self._first_continued(cache, active.name, batch)
        else:
            training = module.training and torch.is_grad_enabled()
            text = self.read_text(arguments, inputs, training)
            # A row without a prompt (plain language modelling, all labels) has its first token for one, which no position predicts.
            start = text.present & (text.present.cumsum(dim=1) == 1)
            text = Text(text.present, torch.where(text.prompt.any(dim=1, keepdim=True), text.prompt, start))
            if self._causal and training:
                self._look_at_prompts(text)
        family, config = self._transformer.family, active.config
        balanced = not family.normed if config.balanced is None else config.balanced
        biases = self._transformer.biases
        return PromptPass(self._number, active.name, config, family.causal, first, active.gates, text, tokens, balanced, biases)

    def end(self, done: PromptPass, arguments: Mapping[str, Any], output: Any, module: Any) -> Any:
        """Takes the prompt out of the attentions among the outputs; the rest of a row adds up to less than one."""
        if isinstance(output, tuple):
            return tuple(_text_of(part, done) if _are_attentions(part) else part for part in output)
        if isinstance(output, dict) and _are_attentions(output.get("attentions")):
            output["attentions"] = _text_of(output["attentions"], done)
            return output
        return None

    def _look_at_prompts(self, text: Text) -> None:
        """Once, because generators that are trained without prompts are given some when the model writes."""
        if not self._looked_at_prompts and bool((text.prompt.sum(dim=1) <= 1).all()) and bool((text.present.sum(dim=1) > 1).any()):
            logger.warning(
                "no row of the first batch has a prompt of more than one token, so that is all that prompt generators read in "
                "training: give labels that are -100 up to the answer"
            )
        self._looked_at_prompts = True

    def _first_continued(self, cache: Any, adapter: str, batch: int) -> int:
        """The first layer with a prompt in a cache, which must be of this adapter and of as many rows."""
        held = prompts_of(cache)
        if held is None or held.tracker != self._number:
            raise GatewiseError(
                "the key-value cache holds tokens of a text that this model's selective prompts did not read: run the text "
                "through this model first, with its adapter active and an empty cache"
            )
        if held.adapter != adapter:
            raise GatewiseError(
                f"the key-value cache was filled with adapter {held.adapter!r}, but {adapter!r} is in use now: start with an empty "
                "cache after changing adapters"
            )
        if held.batch != batch:
            raise GatewiseError(
                f"the key-value cache belongs to {held.batch} texts, but the batch has {batch} rows: give the rows that filled it, "
                "or start with an empty cache"
            )
        return min(held.states)

    @torch.compiler.disable
    def _add_positions(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Makes rotary embeddings for the prompt too, at the l positions before the first token of each row.

        Those may be negative. Attention sees differences of positions only, so that is the same as prompts from 0 on and a text
        that is moved up, but the text and what is in the cache stay where they are.
        """
        running = self.now.current
        if running is None or running.text is None:
            return
        bound = inspect.signature(module.forward).bind(*args, **kwargs)
        present = running.text.present
        positions = bound.arguments["position_ids"].expand(*present.shape)
        first = positions.gather(1, present.int().argmax(dim=1, keepdim=True).to(positions.device))
        before = torch.arange(-running.config.num_prompt_tokens, 0, device=positions.device)
        bound.arguments["position_ids"] = torch.cat([first + before, positions], dim=1)
        running.rotary[id(output[0])] = output, module.forward(*bound.args, **bound.kwargs)


def _are_attentions(part: Any) -> bool:
    return isinstance(part, tuple) and bool(part) and all(isinstance(one, Tensor) and one.ndim == 4 for one in part)


def _text_of(attentions: tuple[Tensor, ...], done: PromptPass) -> tuple[Tensor, ...]:
    length = done.config.num_prompt_tokens
    return tuple(
        weights if layer < done.first else weights[..., -done.tokens :, length:] for layer, weights in enumerate(attentions)
    )
