"""PEFT's own soft prompts, prompt tuning and prefix tuning: the positions they take, and what PEFT's own code does not do right.

Prompt tuning (Lester et al., EMNLP 2021, arXiv 2104.08691) puts l trained embeddings in front of the text. Prefix tuning (Li and
Liang, ACL 2021, arXiv 2101.00190) puts l trained keys and values in front of those of every layer; without its MLP, as here,
it is P-tuning v2 (Liu et al., ACL 2022, arXiv 2110.07602).

Shapes: b batch, l prompt tokens, t tokens, c classes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from gatewise.losses import cache_argument, soft_prompt


@contextmanager
def without_prompts(model: Any) -> Iterator[Any]:
    """The model to call for what the base model computes, while open. For PEFT's soft prompts and for SPT."""
    if soft_prompt(model) is not None:
        yield model.get_base_model()  # PEFT's own way does not know models that cannot generate
        return
    with model.disable_adapter():
        yield model


def generate_after(
    model: Any, ids: Tensor, mask: Tensor, settings: GenerationConfig, processor: LogitsProcessor | None = None
) -> Tensor:
    """Token ids (b, n) that a model generates after texts padded on the left.

    They are those of ``model.generate`` but for soft prompts. PEFT 0.21 looks for the cache under the name it had before
    Transformers 5, takes it for empty and puts the prompt in anew before every token; and it leaves the padding between prompt and
    text, as if they stood that far apart.

    Args:
        ids, mask: (b, t) and which of them are no padding.
        processor: changes the scores of each next token. Of all adapters alike it is shown ``ids`` and what was written after
            them, and nothing of a soft prompt.
    """
    config = soft_prompt(model)
    if config is None:
        listed = _listed(processor)
        generated = model.generate(input_ids=ids, attention_mask=mask, generation_config=settings, logits_processor=listed)
        return generated[:, ids.shape[1] :]
    base, (rows, tokens) = model.get_base_model(), ids.shape
    length = config.num_virtual_tokens
    is_prefix = config.peft_type == "PREFIX_TUNING"
    # Generation from embeddings has no ids of what they stand for.
    shown = _listed(None if processor is None else _ShownText(processor, ids, length + tokens if is_prefix else 0))
    prompt = model.get_prompt(rows)
    if is_prefix:
        given = {
            "input_ids": torch.cat([ids.new_zeros(rows, length), ids], dim=1),  # the zeros stand for what is cached
            "attention_mask": torch.cat([mask.new_ones(rows, length), mask], dim=1),
            cache_argument(base) or "past_key_values": prompt,
        }
        return base.generate(**given, generation_config=settings, logits_processor=shown)[:, length + tokens :]
    text = base.get_input_embeddings()(ids)
    start = (tokens - mask.sum(dim=1)).tolist()
    embedded = [torch.cat([text[i, :n], prompt[i].to(text.dtype), text[i, n:]]) for i, n in enumerate(start)]
    place = torch.arange(length + tokens, device=mask.device)
    present = (place >= torch.tensor(start, device=mask.device)[:, None]).long()
    given = {"inputs_embeds": torch.stack(embedded), "attention_mask": present}
    return base.generate(**given, generation_config=settings, logits_processor=shown)


class _ShownText(LogitsProcessor):
    """Shows a processor the text and what was written after it, whatever stands for the text in ``generate``.

    Args:
        ids: (b, t) of the text.
        before: ids that ``generate`` has in front of what was written.
    """

    def __init__(self, processor: LogitsProcessor, ids: Tensor, before: int) -> None:
        self.processor, self.ids, self.before = processor, ids, before

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The processor's scores (b, V)."""
        return self.processor(torch.cat([self.ids, input_ids[:, self.before :]], dim=1), scores)


def _listed(processor: LogitsProcessor | None) -> LogitsProcessorList:
    return LogitsProcessorList([] if processor is None else [processor])
