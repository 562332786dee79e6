"""What is written with an adapter of PEFT's soft prompts, against a loop over the tokens of one row without padding or a cache."""

from typing import Any

import pytest
import torch
from gatewise_mdt import sample
from gatewise_mdt.extraction.constraint import TreeConstraint
from gatewise_mdt.extraction.course import Course
from gatewise_mdt.extraction.extractor import Written, write
from gatewise_mdt.extraction.prompts import prompt
from mdt_models import random_model
from tiny_prompts import by_hand, soft_prompted

from gatewise.tasks import Records, Template, prompt_ids

pytest.importorskip("llguidance")

RECORDS = sample()[:2]
TEXTS = [prompt(record.text, "en") for record in RECORDS]
TEMPLATE = Template("{source}")
MOST = 40


def loop(model: Any, tokenizer: Any, text: str, course: Course | None) -> str:
    """The most probable tokens that are allowed, one after the other."""
    rows = Records("generation", [{"source": text, "target": "D"}], None, "")
    (ids,) = prompt_ids(rows, tokenizer, TEMPLATE, [2**20], 2**20)
    start, end = len(ids), tokenizer.eos_token_id
    constraint = course and TreeConstraint(tokenizer, [course], ends=[end], prompt_tokens=start, max_new_tokens=MOST)
    while len(ids) < start + MOST and ids[-1] != end:
        with torch.no_grad():
            scores = by_hand(model, torch.tensor(ids))[-1:]
        ids.append(int((constraint(torch.tensor([ids]), scores) if constraint else scores).argmax()))
    if constraint is None:
        return tokenizer.decode([token for token in ids[start:] if token != end], skip_special_tokens=True).strip()
    constraint.read(torch.tensor([ids[start:]]))
    return course.written


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
@pytest.mark.parametrize("constrained", [True, False])
def test_soft_prompts_write_what_a_loop_without_a_cache_writes(kind: str, constrained: bool) -> None:
    base, tokenizer = random_model()
    model = soft_prompted(base, kind)
    courses, others = ([Course("en", within=record.text) for record in RECORDS] for _ in range(2))
    settings: dict[str, Any] = {"template": TEMPLATE, "max_new_tokens": MOST, "batch_size": len(TEXTS)}
    written = write(model, tokenizer, TEXTS, courses if constrained else None, **settings)
    for text, one, course in zip(TEXTS, written, others, strict=True):
        assert isinstance(one, Written)
        assert one.text == loop(model, tokenizer, text, course if constrained else None)
        assert one.text


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_the_prompt_changes_what_is_written(kind: str) -> None:
    """Or the loop above would say nothing about where the prompt goes."""
    base, tokenizer = random_model()
    settings: dict[str, Any] = {"template": TEMPLATE, "max_new_tokens": MOST}
    before = write(base, tokenizer, TEXTS, **settings)
    assert write(soft_prompted(base, kind), tokenizer, TEXTS, **settings) != before
