"""The pointing model: a base model read as an encoder, with heads, and the rows that it is trained on.

Adapters go on it as on any Transformers model: PEFT trains and saves the heads whole (``modules_to_save``), in the adapter's
own file.

Shapes: b texts, t tokens, n units, m phrases, g nodes, h width of the encoder.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.generic import ModelOutput

from gatewise.errors import GatewiseError
from gatewise.models import ModelAround, attention_implementation
from gatewise_mdt.pointing.heads import (
    IGNORED,
    Gold,
    HeadSettings,
    PointingHeads,
    UnitPlaces,
    member_rows,
    mention_rows,
    node_rows,
    padded,
    unit_rows,
)
from gatewise_mdt.pointing.targets import Pointed, pointed_at
from gatewise_mdt.pointing.units import Units, tokens_of
from gatewise_mdt.records import TreeRecord


@dataclass
class PointingOutput(ModelOutput):
    """What the model makes of texts.

    Attributes:
        loss: the mean of ``row_losses``; None without gold trees.
        row_losses: (b,) nats, the sum of all heads' losses of each text; None without gold trees.
        states: (b, t, h), the encoder's last.
    """

    loss: Tensor | None = None
    row_losses: Tensor | None = None
    states: Tensor | None = None


class PointingModel(ModelAround):
    """An encoder and its heads. A decoder is read as an encoder: its attention looks in both directions.

    Args:
        encoder: a model without a head, such as ``AutoModel`` loads.

    Raises:
        GatewiseError: attention of the encoder does not look in both directions, whatever mask it is given, or the encoder is of
            another width than the heads are made for.
    """

    base_model_prefix = "encoder"
    measures_itself = True
    trained_whole = ("heads",)
    """What is trained as it is, with no adapter on it: PEFT's ``modules_to_save``."""

    def __init__(self, encoder: PreTrainedModel, settings: HeadSettings) -> None:
        super().__init__(encoder)
        if (hidden := int(encoder.config.get_text_config().hidden_size)) != settings.hidden:
            raise GatewiseError(
                f"the heads are made for states of {settings.hidden} numbers, but the base model's have {hidden}: give the base"
                " model that they were trained with"
            )
        _drop_pooler(encoder)
        self.encoder = encoder
        self.heads = PointingHeads(settings).to(encoder.device)  # in float32, whatever the encoder is in
        self.whole_mask = not _looks_ahead(encoder, whole_mask=False)
        if self.whole_mask and not _looks_ahead(encoder, whole_mask=True):
            raise GatewiseError(
                f"attention of {encoder.config.model_type} models cannot be made to look in both directions, as pointing needs it:"
                " give an encoder such as BERT, or a decoder such as Llama, Qwen or Gemma"
            )

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        **batch: Any,
    ) -> PointingOutput:
        """The encoder's states of texts, and of a batch with gold trees their losses.

        Args:
            batch: what :class:`PointingCollator` made beside the tokens.
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        given = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        states = _last_states(self.encoder, input_ids, attention_mask, self.whole_mask, **given)
        if "mentions" not in batch:
            return PointingOutput(states=states)
        gold = Gold.of(batch["mentions"], batch["members"], batch["nodes"])
        with without_autocast(states):
            made = self.heads.losses(states, UnitPlaces.of(batch["units"]), gold)
        rows = torch.stack(list(made.values())).sum(dim=0)
        return PointingOutput(loss=rows.mean(), row_losses=rows, states=states)


def without_autocast(states: Tensor) -> torch.autocast:
    """While open, there is no autocast: the heads' sums over partings lose too much in half precision."""
    return torch.autocast(states.device.type, enabled=False)


def _both_ways(attention_mask: Tensor, encoder: PreTrainedModel) -> Tensor:
    """(b, t) -> (b, 1, t, t): every token sees every token but padding, and padding itself, so that no row is without any."""
    t = attention_mask.shape[1]
    seen = attention_mask.bool()[:, None, None, :].expand(-1, 1, t, t)
    seen = seen | torch.eye(t, dtype=torch.bool, device=seen.device)
    if attention_implementation(encoder) != "eager":
        return seen
    # It adds the mask to its scores.
    return torch.zeros(seen.shape, dtype=encoder.dtype, device=seen.device).masked_fill(~seen, torch.finfo(encoder.dtype).min)


def _last_states(encoder: PreTrainedModel, ids: Tensor, attention_mask: Tensor, whole_mask: bool, **given: Any) -> Tensor:
    if whole_mask:  # a decoder: it would count positions by a cache
        attention_mask = _both_ways(attention_mask, encoder)
        given.update(use_cache=False, position_ids=torch.arange(ids.shape[1], device=ids.device)[None])
    return cast(Tensor, encoder(input_ids=ids, attention_mask=attention_mask, **given).last_hidden_state)


@torch.no_grad()
def _looks_ahead(encoder: PreTrainedModel, whole_mask: bool) -> bool:
    """Whether the state of a text's first token depends on its last one, unless that is padding; False where the mask fails."""
    training, moved = encoder.training, []
    try:
        for mask in ([1, 1, 1], [1, 1, 0]):
            # Each text by itself: the rows of a batch may be rounded in different ways, and then all seem to depend on all.
            one, other = (_first_state(encoder.eval(), [1, 2, last], mask, whole_mask) for last in (3, 4))
            moved.append(float((one - other).abs().max()))
    except (RuntimeError, ValueError, TypeError, AttributeError):
        return False
    finally:
        encoder.train(training)
    return moved[0] > 0 and moved[1] < 0.01 * moved[0]


def _first_state(encoder: PreTrainedModel, ids: list[int], mask: list[int], whole_mask: bool) -> Tensor:
    tokens = torch.tensor([ids], device=encoder.device) % encoder.config.get_text_config().vocab_size
    return _last_states(encoder, tokens, torch.tensor([mask], device=encoder.device), whole_mask)[0, 0].float()


def _drop_pooler(encoder: PreTrainedModel) -> None:
    """Takes an encoder's pooler away, which nobody reads here and an adapter would be put on, where the encoder can do without."""
    pooler = getattr(encoder, "pooler", None)
    if pooler is None:
        return
    encoder.register_module("pooler", None)
    try:
        _first_state(encoder, [1, 2], [1, 1], whole_mask=False)
    except (RuntimeError, ValueError, TypeError, AttributeError):
        encoder.register_module("pooler", pooler)


# ---- rows ----


def encode_texts(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """A row for each text: tokens, and ``units``, where its units are among them. Errors are those of ``units.tokens_of``."""
    rows = []
    for text in texts:
        units = Units.of(text)
        tokens = tokens_of(units, tokenizer)
        made: dict[str, Any] = {key: tokens[key] for key in ("input_ids", "token_type_ids") if key in tokens}
        rows.append({**made, "units": unit_rows(tokens, units.population)})
    return rows


def encode_records(
    records: Sequence[TreeRecord], tokenizer: PreTrainedTokenizerBase, longest: int
) -> tuple[list[dict[str, Any]], list[Pointed]]:
    """A row for each record, with its tree, and the trees by their places.

    Args:
        longest: units of the longest phrase that the model can point at.
    """
    pointed = [pointed_at(record, Units.of(record.text), longest) for record in records]
    rows = encode_texts([record.text for record in records], tokenizer)
    for row, one in zip(rows, pointed, strict=True):
        # "labels": each text counts once.
        row |= {"mentions": mention_rows(one), "members": member_rows(one), "nodes": node_rows(one), "labels": 1}
    return rows, pointed


class PointingCollator:
    """Pads rows to the longest of a batch, on the right.

    Its tensors have a row a text in front, and but for tokens three dimensions, so that code that cuts batches of any model
    down to their tokens cuts nothing else.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if tokenizer.pad_token_id is None:
            raise GatewiseError(
                "the tokenizer has no padding token: set one, for instance tokenizer.pad_token = tokenizer.eos_token"
            )
        self.pad_id = int(tokenizer.pad_token_id)

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """``input_ids``, ``attention_mask`` (b, t), ``units`` (b, n, 5), and of rows with trees ``mentions`` (b, m, 5), ``members``
        (b, g, m), ``nodes`` (b, g, 4) and ``labels`` (b,), all ones."""
        longest = max(len(row["input_ids"]) for row in rows)

        def flat(values: Sequence[Sequence[int]], fill: int) -> Tensor:
            return torch.tensor([[*one, *[fill] * (longest - len(one))] for one in values])

        batch = {
            "input_ids": flat([row["input_ids"] for row in rows], self.pad_id),
            "attention_mask": flat([[1] * len(row["input_ids"]) for row in rows], 0),
            "units": padded([row["units"] for row in rows], 5, -1),
        }
        if "token_type_ids" in rows[0]:
            batch["token_type_ids"] = flat([row["token_type_ids"] for row in rows], 0)
        if "mentions" in rows[0]:
            batch["mentions"] = padded([row["mentions"] for row in rows], 5, -1)
            batch["members"] = padded([row["members"] for row in rows], batch["mentions"].shape[1], 0)
            batch["nodes"] = padded([row["nodes"] for row in rows], 4, IGNORED)
            batch["labels"] = torch.tensor([row["labels"] for row in rows])
        return batch
