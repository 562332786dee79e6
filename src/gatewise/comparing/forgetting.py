"""What a model forgets of what it knew before: how far its next words on other text are from those of its base model.

The text is ``samples/neutral.txt``: short pieces of plain prose, talk, code and a few languages, about nothing that anybody trains.
For each of its tokens x_t the base model and the adapted one say how likely each token of the vocabulary is to come next, and

    forgotten = mean over t of KL(base || adapted) = mean over t of sum_v p(v | x_<t) log(p(v | x_<t) / q(v | x_<t))

in nats, with p of the base model and q of the adapted one. It is zero for an adapter that changes nothing on such text.

Shapes: n positions read, V vocabulary.
"""

from importlib import resources
from pathlib import Path

import torch
from torch.nn.functional import kl_div

from gatewise.adapters.files import read_config
from gatewise.adapters.loading import load_as_trained
from gatewise.internals.soft_prompt_fixes import without_prompts
from gatewise.losses import base_of, labelled_logits
from gatewise.tasks.encoding import PadCollator, text_prefix, token_ids
from gatewise.tasks.metrics import measuring, most_positions

_TOKENS, _PROMPT, _BATCH = 64, 16, 4  # of a piece at most; before the first that is counted; pieces in one forward
_SMALL = 1_000_000_000  # parameters: 4 GB in float32


def forgotten(adapter: str | Path, *, device: torch.device | str = "auto") -> float | None:
    """Mean KL(base || adapted) in nats a token of the neutral text, of an adapter as its user would have it.

    Each piece's first tokens are its prompt, of which none is counted: by them a routed adapter chooses its experts. Soft prompts
    stand in front of it. Base models of up to a billion parameters compute in float32, whatever they were trained in: in bfloat16
    rounding alone is 0.001 to 0.002 nats.

    Returns:
        None for an adapter that does not write text.

    Raises:
        GatewiseError: the folder is no adapter, or its base model cannot be loaded.
    """
    if read_config(adapter).get("task_type") != "CAUSAL_LM":
        return None
    model, tokenizer, _ = load_as_trained(adapter, device=device)
    if getattr(base_of(model).config, "quantization_config", None) is None and model.num_parameters() <= _SMALL:
        model.float()
    text = (resources.files("gatewise") / "samples" / "neutral.txt").read_text(encoding="utf-8")
    start, longest = text_prefix(tokenizer), min(_TOKENS, most_positions(model))
    pieces = [[*start, *ids][:longest] for ids in token_ids(tokenizer, text.strip().split("\n\n"))]
    prompt = min(_PROMPT, longest // 2)
    collate, total, count = PadCollator(tokenizer), 0.0, 0
    with measuring(model):
        for first in range(0, len(pieces), _BATCH):
            rows = collate([{"input_ids": ids} for ids in pieces[first : first + _BATCH]])
            batch = {name: value.to(model.device) for name, value in rows.items()}
            counted = batch["attention_mask"].bool()
            counted[:, : prompt - 1] = False
            adapted = labelled_logits(model, batch, counted)
            with without_prompts(model) as base:
                p, q = (one.float().log_softmax(dim=-1) for one in (labelled_logits(base, batch, counted), adapted))
            total += float(kl_div(q, p, log_target=True, reduction="sum"))
            count += len(adapted)
    return total / count
