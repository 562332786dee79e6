"""Random documents with known rows, lists and conditions: nothing that belongs together is torn without a note."""

from collections.abc import Callable
from random import Random

import pytest
from reading_corpus import LISTS, SHAPES, content_with_lists, facts_of, torn
from reading_markup import docx_of, html_of, markdown_of, text_of


@pytest.mark.parametrize(("write", "suffix"), [(docx_of, ".docx"), (html_of, ".html"), (markdown_of, ".md"), (text_of, ".txt")])
def test_rows_and_lists_are_read_with_what_they_are_said_of(write: Callable[..., bytes], suffix: str) -> None:
    for seed in range(12):
        random = Random(seed)
        shapes = [] if suffix == ".txt" else [SHAPES[seed % len(SHAPES)]]
        parts = content_with_lists(random, shapes, [LISTS[(seed + seed // 6) % len(LISTS)]])
        assert torn(write(parts, random), suffix, facts_of(parts)) == [], seed
