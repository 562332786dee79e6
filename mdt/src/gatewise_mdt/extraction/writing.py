"""What a causal model writes after a prompt, with or without a constraint."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from gatewise.errors import GatewiseError
from gatewise.internals.soft_prompt_fixes import written_after
from gatewise.tasks.encoding import Template, pad, prompt_ids
from gatewise.tasks.metrics import end_ids, greedy, measuring, most_positions
from gatewise.tasks.records import Records
from gatewise_mdt.extraction.constraint import TreeConstraint
from gatewise_mdt.extraction.course import Course

Progress = Callable[[int, int], None]
_LEAST_ROOM = 16


@dataclass(frozen=True)
class Written:
    """What a model wrote.

    Attributes:
        ended: it came to its end by itself; otherwise the tokens ran out, and a piece that was not whole is left out.
        hurried: the constraint brought it to a close because tokens were running out.
    """

    text: str
    ended: bool = True
    hurried: bool = False


def write(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    courses: Sequence[Course] | None = None,
    *,
    template: Template,
    max_new_tokens: int,
    batch_size: int = 8,
    temperature: float | None = None,
    progress: Progress | None = None,
) -> list[Written | GatewiseError]:
    """What the model writes after each prompt.

    Args:
        courses: what may be written after each prompt; None leaves it free.
        template: how a prompt, as the row's ``source``, was written in training.
        temperature: draw each token at it; None takes the most probable one.
        progress: called with (done, total) after every batch.

    Returns:
        For each prompt what was written, or why it could not be: a prompt that is too long, or a course that leads nowhere, does
        not stop the others.

    Raises:
        GatewiseError: the template does not show ``{source}``, or the constraint cannot be had.
    """
    if not prompts:
        return []
    rows = Records("generation", [{"source": text, "target": "D"} for text in prompts], None, "the prompts")
    if "{source}" not in template.prompt:
        raise GatewiseError(
            f"the adapter's prompt is {template.prompt!r}, without {{source}}: expected one that was trained on rows from"
            " `gatewise mdt prepare`"
        )
    ids = prompt_ids(rows, tokenizer, template, [2**40] * len(prompts), 2**40)
    positions = most_positions(model)
    written: list[Written | GatewiseError] = []
    for row in ids:
        room = positions - len(row)
        fault = f"the passage takes {len(row)} tokens of the {positions} that the model can read and write: give a shorter one"
        written.append(Written("") if room >= _LEAST_ROOM else GatewiseError(fault))
    order = sorted((i for i, one in enumerate(written) if isinstance(one, Written)), key=lambda i: -len(ids[i]))
    with measuring(model):
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            room = min(max_new_tokens, positions - len(ids[batch[0]]))
            chosen = [courses[i] for i in batch] if courses else None
            texts = _batch(model, tokenizer, [ids[i] for i in batch], chosen, room, temperature)
            for i, one in zip(batch, texts, strict=True):
                written[i] = one
            if progress:
                progress(start + len(batch), len(order))
    return written


def _batch(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    courses: list[Course] | None,
    most: int,
    temperature: float | None,
) -> list[Written | GatewiseError]:
    device = next(model.parameters()).device
    ends = end_ids(model, tokenizer)
    if not ends:
        raise GatewiseError("the tokenizer has no end-of-text token (eos_token), with which a tree has to end")
    fill = int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(ends))
    ids = pad(prompts, fill, left=True).to(device)
    mask = pad([[1] * len(prompt) for prompt in prompts], 0, left=True).to(device)
    config = greedy(most, ends, fill)
    if temperature is not None:
        config.update(do_sample=True, temperature=temperature, top_k=0)
    constraint = None
    if courses is not None:
        constraint = TreeConstraint(tokenizer, courses, ends=sorted(ends), prompt_tokens=ids.shape[1], max_new_tokens=most)
    found = written_after(model, ids, mask, config, constraint)
    if constraint is not None:
        constraint.read(torch.cat([ids, found], dim=1))
        return [row.fault or Written(row.course.written, row.course.finished, row.hurried) for row in constraint.rows]
    made: list[Written | GatewiseError] = []
    for tokens in found.tolist():
        end = next((i for i, token in enumerate(tokens) if token in ends), None)
        made.append(Written(str(tokenizer.decode(tokens[:end], skip_special_tokens=True)).strip(), end is not None))
    return made
