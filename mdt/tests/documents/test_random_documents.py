"""Random documents with known facts: none is torn without a note. `mdt/benchmarks/reading.py` counts many more."""

from random import Random

import pytest
from reading_corpus import SHAPES, content, facts_of, torn
from reading_words import CHINESE, ENGLISH

pytest.importorskip("reportlab")
from reading_pdf import LAYOUTS, LINES, pdf_of


@pytest.mark.parametrize("lines", LINES)
def test_pdf_keeps_what_belongs_together_or_says_that_it_may_not(lines: str) -> None:
    """Tables of each shape, in each layout of the text in turn."""
    for number, shape in enumerate(SHAPES, start=LINES.index(lines)):
        layout = LAYOUTS[number % len(LAYOUTS)]
        random = Random(f"{lines} {layout} {shape}")
        parts = content(random, [shape], random.choice((ENGLISH, CHINESE)))
        assert torn(pdf_of(parts, random, lines, layout), ".pdf", facts_of(parts)) == [], (layout, shape)
