"""A lane: the model with adapters that can share a batch, and the rows that are being written, one token each per step.

Rows come and go between steps. The prompt of a new one is read by itself, and its keys and values are then put under those of the
others, filled up on the left, where the mask hides what fills. The rows of one lane may belong to different adapters, where these
can share a batch: plain LoRA (``fast_lora``), or routed adapters. An adapter that can share with none has a lane to itself.

All lanes have the same weights: the modules of each are a copy, their parameters and buffers are not.

Shapes: b rows, t columns of the longest, v vocabulary.
"""

import copy
import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from gatewise.adapters.loading import check_base_weights, put_on
from gatewise.errors import GatewiseError
from gatewise.losses import cache_argument
from gatewise.progress import quiet
from gatewise.prompts.cache import append_prompts
from gatewise.routed.request import regroup
from gatewise.serving.lora import fast_lora

Kind = Literal["plain", "routed", "alone"]
"""What an adapter can share a batch with: plain LoRA and the base model; routed adapters; nothing."""


@dataclass(frozen=True)
class Prompt:
    """A prompt that was read.

    Attributes:
        name: of its adapter.
        logits: (1, v) of the token after it, in float32.
        mask: (1, t).
        cache: its keys and values.
    """

    name: str
    logits: Tensor
    mask: Tensor
    cache: Any


class Lane:
    """One copy of the model's modules, and its rows.

    Args:
        bare: the base model, which stays without adapters.
        kind: of the adapters that it takes.

    Attributes:
        names: of the adapters that are loaded, unique in a server's life.
        rows: the adapter of each row, ``BASE`` for the base model.
    """

    def __init__(self, bare: PreTrainedModel, kind: Kind) -> None:
        self.kind = kind
        self.names = set[str]()
        self.rows: list[str] = []
        self._bare = bare
        self._model: Any = with_same_weights(bare)
        self._peft: PeftModel | None = None
        self._accepted = inspect.signature(self._model.forward).parameters
        self._cache_argument = cache_argument(self._model) or "past_key_values"
        self._cache: Any = None
        self._mask = torch.empty(0, 0, dtype=torch.long)
        self._call = ExitStack()  # of PEFT, open from step to step as long as rows and adapters stay the same
        self._is_open = False

    # ---- adapters ----

    def load(self, folder: Path, name: str, base_name: str) -> None:
        """Loads one more adapter.

        Raises:
            GatewiseError: it cannot be read, or does not fit. All else is as it was.
        """
        self._close()
        check_base_weights(self._bare, folder)
        try:
            self._peft = put_on(self._peft or self._model, folder, name, base_name)
        except BaseException:
            if self._peft is None:
                self._model = with_same_weights(self._bare)
            raise
        finally:
            if self.rows:  # modules may have become routed, to stay so: by the same decisions each is told what it runs
                regroup(self._cache, [(self._cache, range(len(self.rows)))])
        self.names.add(name)
        if self.kind == "plain":
            fast_lora(self._peft)

    def unload(self, name: str) -> None:
        """Takes off an adapter that no row has. After the last one the model is the base model again."""
        assert name not in self.rows
        assert self._peft is not None
        self._close()
        self.names.discard(name)
        if self.names:
            with quiet():  # PEFT says which adapter is active now, and each row says so itself
                self._peft.delete_adapter(name)
        else:
            self._model, self._peft = with_same_weights(self._bare), None

    # ---- rows ----

    @torch.no_grad()
    def read(self, ids: Sequence[int], name: str) -> Prompt:
        """Reads a prompt of token ids by an adapter. The rows stay as they are."""
        self._close()
        cache = DynamicCache(config=self._model.config)
        mask = torch.ones(1, len(ids), dtype=torch.long)
        with self._peft_call([name]):
            logits = self._forward(torch.tensor([list(ids)]), mask, cache)
        return Prompt(name, logits, mask, cache)

    def join(self, prompt: Prompt) -> None:
        """A prompt that was read becomes the last row."""
        if self._cache is None:
            self._cache, self._mask = prompt.cache, prompt.mask
        else:  # the shorter of both is filled up on the left
            width, before = max(self._mask.shape[1], prompt.mask.shape[1]), len(self._mask)
            for mine, theirs in zip(self._layers(self._cache), self._layers(prompt.cache), strict=True):
                columns = max(mine.keys.shape[2], theirs.keys.shape[2])
                mine.keys, mine.values = (
                    torch.cat([F.pad(one, (0, 0, columns - one.shape[2], 0)) for one in both])
                    for both in ((mine.keys, theirs.keys), (mine.values, theirs.values))
                )
                if isinstance(mine, DynamicSlidingWindowLayer):
                    mine.cumulative_length = width
            append_prompts(self._cache, prompt.cache)
            regroup(self._cache, [(self._cache, range(before)), (prompt.cache, range(1))])
            self._mask = torch.cat([F.pad(one, (width - one.shape[1], 0)) for one in (self._mask, prompt.mask)])
        self.rows.append(prompt.name)

    @torch.no_grad()
    def step(self, tokens: Sequence[int]) -> Tensor:
        """Reads the token that each row goes on with: logits (b, v) of the next one, in float32."""
        if not self._is_open:
            self._call.enter_context(self._peft_call(self.rows))
            self._is_open = True
        self._mask = F.pad(self._mask, (0, 1), value=1)
        return self._forward(torch.tensor(tokens)[:, None], self._mask, self._cache)

    def keep(self, rows: Sequence[int]) -> None:
        """These rows stay, the others are done."""
        if len(rows) == len(self.rows):
            return
        self._close()
        self.rows = [self.rows[row] for row in rows]
        if not rows:
            self._cache = None
            return
        self._cache.batch_select_indices(torch.tensor(rows, device=self._model.device))
        regroup(self._cache, [(self._cache, rows)])
        self._mask = self._mask[list(rows)]
        spare = int(self._mask.any(dim=0).int().argmax())  # columns that only fill up
        if spare:
            length = self._mask.shape[1]
            self._mask = self._mask[:, spare:]
            for layer in self._layers(self._cache):
                first = max(layer.keys.shape[2] - length + spare, 0)  # a layer may have fewer columns than the mask
                layer.keys, layer.values = (one[:, :, first:].contiguous() for one in (layer.keys, layer.values))
                if isinstance(layer, DynamicSlidingWindowLayer):
                    layer.cumulative_length = length - spare

    def clear(self) -> None:
        """All rows are gone, whatever state they were left in."""
        self._close()
        self.rows, self._cache = [], None

    # ---- within ----

    def _close(self) -> None:
        self._call.close()
        self._is_open = False

    @contextmanager
    def _peft_call(self, names: Sequence[str]) -> Iterator[None]:
        """PEFT's call of the model, which it opens around ``generate``."""
        if self._peft is None:
            yield
            return
        given = {} if self.kind == "alone" else {"adapter_names": list(names)}
        tuner: Any = self._peft.base_model
        with tuner._enable_peft_forward_hooks(**given):
            yield

    def _forward(self, ids: Tensor, mask: Tensor, cache: Any) -> Tensor:
        """Logits (b, v) of the last position, in float32."""
        device = self._model.device
        options: dict[str, Any] = {self._cache_argument: cache}
        if "logits_to_keep" in self._accepted:
            options["logits_to_keep"] = 1
        if "position_ids" in self._accepted:
            options["position_ids"] = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -ids.shape[1] :].to(device)
        made = self._model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=True, **options)
        logits: Tensor = made.logits[:, -1].float()
        return logits

    @staticmethod
    def _layers(cache: Any) -> list[Any]:
        return [layer for layer in cache.layers if layer.is_initialized]


def with_same_weights(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of a model's modules that has the same parameters and buffers, not copies of them."""
    shared: dict[int, Any] = {id(one): one for one in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


@torch.no_grad()
def check_model(model: PreTrainedModel) -> None:
    """Refuses a base model whose rows cannot come and go.

    Raises:
        GatewiseError: it keeps its past in other things than keys and values by column.
    """
    cache = DynamicCache(config=model.config)
    ids = torch.tensor([[1, 1]], device=model.device)
    given: dict[str, Any] = {cache_argument(model) or "past_key_values": cache}
    model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True, **given)
    known = (DynamicLayer, DynamicSlidingWindowLayer)
    if not cache.layers or cache.get_seq_length() != 2 or any(type(layer) not in known for layer in cache.layers):
        raise GatewiseError(
            f"{model.config.model_type} models keep more of their past than keys and values, which this engine does not serve: "
            "take --engine vllm, or a model with attention alone"
        )
