"""One forward of the base model with prompts in it: what its layers need to know, and when it begins and ends.

A pass that finds tokens in the key-value cache continues a text: its prompts are in the cache, and no generator runs. Any other
pass begins a text.

Shapes: b batch, t tokens, l prompt tokens.
"""

import inspect
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from gatewise.errors import GatewiseError
from gatewise.internals.call_tracking import CallTracker, Text, cache_of, cached_tokens, text_inputs
from gatewise.internals.layer_stack import Stack
from gatewise.internals.library_attributes import attention_implementation
from gatewise.prompts.cache import PromptedCache, prompts_of
from gatewise.prompts.config import SelectivePromptConfig
from gatewise.prompts.generator import pooling_weights

logger = logging.getLogger(__name__)
_trackers = count()


@dataclass(frozen=True)
class AdapterInUse:
    """The adapter whose prompts a pass takes.

    Attributes:
        gates: layer -> a_i (1,) with its graph, None for one; of the layers with a generator, in order.
        first: the first layer that a prompt enters. Layers of ``gates`` below it have a closed gate and nothing to carry on.
    """

    name: str
    config: SelectivePromptConfig
    gates: Mapping[int, Tensor | None]
    first: int


@dataclass(eq=False)
class PromptPass:
    """A pass in which prompts of one adapter are at work. What layers share is made once.

    Attributes:
        tracker: the number of the tracker, which goes into caches with the prompts.
        first: the first layer that a prompt enters; of a pass that continues a text, the first with a prompt in the cache.
        text: None if the pass continues one.
        propagated: the prompt (b, l, d) that the layer below left, set from layer to layer.
        pooling: what generators read, see ``pooling_weights``.
        rotary: by the id of the embeddings of the text (which are kept, so that no other can have it), those of prompt and text.
    """

    tracker: int
    adapter: AdapterInUse
    causal: bool
    first: int
    text: Text | None
    propagated: Tensor | None = None
    pooling: Tensor | None = None
    rotary: dict[int, tuple[Any, Any]] = field(default_factory=dict)
    _masks: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def mask(self, given: Tensor | None) -> Tensor | None:
        """The mask that goes with the prompt in front, from that of the text alone."""
        if given is None:
            # Plain attention, causal or not, stays what it is with more tokens in front; while decoding there is one new token.
            return None
        if id(given) not in self._masks:
            self._masks[id(given)] = given, self._with_prompt(given)
        return self._masks[id(given)][1]

    def _with_prompt(self, given: Tensor) -> Tensor:
        length = self.adapter.config.num_prompt_tokens
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


class PassTracker(CallTracker):
    """Watches the base model's forwards and makes a ``PromptPass`` of each.

    Args:
        stack: the layers.
        is_decoder: whether attention is causal.
        writes: whether labels tell prompt from answer.
        active: tells which adapter is in use, None while there is none or all its gates are closed.
    """

    def __init__(self, stack: Stack, is_decoder: bool, writes: bool, active: Callable[[], AdapterInUse | None]) -> None:
        super().__init__(stack.around, "selective prompts", "generators", writes, active)
        self._is_decoder, self._number, self._looked_at_prompts = is_decoder, next(_trackers), False
        rotary: nn.Module | None = getattr(stack.around[-1], "rotary_emb", None)
        if rotary is not None:  # without one positions are added below the first layer, so real tokens keep theirs by themselves
            self._handles.append(rotary.register_forward_hook(self._add_positions, with_kwargs=True))

    def begin(self, arguments: Mapping[str, Any], module: Any) -> PromptPass | None:
        """The pass that a forward opens, of a text that begins or of one in the cache."""
        cache = cache_of(arguments)
        continues = cached_tokens(cache) > 0
        if isinstance(cache, PromptedCache) and not continues:
            cache.gatewise_prompts.states.clear()
        active = self.active()
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
        inputs = text_inputs(arguments, self.adapters)
        if continues:
            first = self._first_continued(cache, active.name, len(inputs))
            return PromptPass(self._number, active, self._is_decoder, first, None)
        training = module.training and torch.is_grad_enabled()
        text = self.read_text(arguments, inputs, training)
        # A row without a prompt (plain language modelling, all labels) has its first token for one, which no position predicts.
        start = text.present & (text.present.cumsum(dim=1) == 1)
        text = Text(text.present, torch.where(text.prompt.any(dim=1, keepdim=True), text.prompt, start))
        if self._causal and training:
            self._look_at_prompts(text)
        pooling = pooling_weights(text.prompt, active.config.num_prompt_tokens)
        return PromptPass(self._number, active, self._is_decoder, active.first, text, pooling=pooling)

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
        first = min(held.states)
        texts = len(held.states[first][0])
        if texts != batch:
            raise GatewiseError(
                f"the key-value cache belongs to {texts} texts, but the batch has {batch} rows: give the rows that filled it, "
                "or start with an empty cache"
            )
        return first

    @torch.compiler.disable
    def _add_positions(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Makes rotary embeddings for the prompt too, at the l positions before the first token of each row.

        Those may be negative. Attention sees differences of positions only, so that is the same as prompts from 0 on and a text
        that is moved up, but the text and what is in the cache stay where they are.
        """
        running: PromptPass | None = self.now.current
        if running is None or running.text is None:
            return
        bound = inspect.signature(module.forward).bind(*args, **kwargs)
        present = running.text.present
        positions = bound.arguments["position_ids"].expand(*present.shape)
        first = positions.gather(1, present.int().argmax(dim=1, keepdim=True).to(positions.device))
        before = torch.arange(-running.adapter.config.num_prompt_tokens, 0, device=positions.device)
        bound.arguments["position_ids"] = torch.cat([first + before, positions], dim=1)
        running.rotary[id(output[0])] = output, module.forward(*bound.args, **bound.kwargs)
