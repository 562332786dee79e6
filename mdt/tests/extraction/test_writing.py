"""What is written with an adapter of PEFT's soft prompts, against a loop over the tokens of one row without padding or a cache."""

from typing import Any

import pytest
import torch
from gatewise_mdt import Extraction, Extractor, sample
from gatewise_mdt.extraction.constraint import TreeConstraint
from gatewise_mdt.extraction.course import Course
from gatewise_mdt.extraction.prompts import prompt
from mdt_models import random_model
from tiny_prompts import by_hand, soft_prompted

from gatewise.tasks import Records, Template, prompt_ids

pytest.importorskip("llguidance")

RECORDS = sample()[:3]
MOST = 150


def loop(model: Any, tokenizer: Any, text: str, course: Course) -> str:
    """The most probable tokens that are allowed, one after the other."""
    rows = Records("generation", [{"source": text, "target": "D"}], None, "")
    (ids,) = prompt_ids(rows, tokenizer, Template("{source}"), [2**20], 2**20)
    start, end = len(ids), tokenizer.eos_token_id
    constraint = TreeConstraint(tokenizer, [course], ends=[end], prompt_tokens=start, max_new_tokens=MOST)
    while len(ids) < start + MOST and ids[-1] != end:
        with torch.no_grad():
            scores = by_hand(model, torch.tensor(ids))[-1:]
        ids.append(int(constraint(torch.tensor([ids]), scores).argmax()))
    constraint.read(torch.tensor([ids[start:]]))
    return course.written


def written(model: Any, tokenizer: Any) -> list[str]:
    found = Extractor(model, tokenizer, verbatim=True, max_new_tokens=MOST)([record.text for record in RECORDS], language="en")
    return [one.written for one in found if isinstance(one, Extraction)]


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_soft_prompts_write_what_a_loop_without_a_cache_writes(kind: str) -> None:
    base, tokenizer = random_model(3)
    before = written(base, tokenizer)
    model = soft_prompted(base, kind)
    made = written(model, tokenizer)
    assert made == [loop(model, tokenizer, prompt(one.text, "en"), Course("en", within=one.text)) for one in RECORDS]
    assert all(made)
    assert made != before  # or the loop would say nothing about where the prompt goes
