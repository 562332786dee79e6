"""Random documents with known facts: none is torn without a note. `mdt/benchmarks/reading.py` counts many more."""

from itertools import product
from random import Random

import pytest
from reading_corpus import SHAPES, content, facts_of, torn

pytest.importorskip("reportlab")
from reading_pdf import COLUMNS, LINES, pdf_of


@pytest.mark.parametrize("lines", LINES)
def test_pdf_keeps_what_belongs_together_or_says_that_it_may_not(lines: str) -> None:
    for columns, shape in product(COLUMNS, SHAPES):
        random = Random(f"{lines} {columns} {shape}")
        parts = content(random, [shape])
        assert torn(pdf_of(parts, random, lines, columns), ".pdf", facts_of(parts)) == [], (columns, shape)
