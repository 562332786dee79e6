"""Writes the random documents of `reading_corpus` as PDF: with and without grids, in one and two columns of text.

What a seed does not fix is drawn: letters, sizes, leading, alignment, padding, bold headers, where cells stand in their row.
"""

import io
from collections.abc import Sequence
from random import Random
from typing import Any

from reading_corpus import Heading, Part, Prose, Table
from reportlab.lib import colors
from reportlab.lib.enums import TA_JUSTIFY, TA_LEFT
from reportlab.lib.styles import ParagraphStyle
from reportlab.pdfbase.pdfmetrics import stringWidth
from reportlab.platypus import BaseDocTemplate, Frame, PageTemplate, Paragraph, Spacer
from reportlab.platypus import Table as Printed

LINES = ("grid", "none", "rules", "header rule", "booktabs", "shaded")
COLUMNS = (1, 2)
_WIDTH, _HEIGHT, _MARGIN = 595, 842, 55
_GRAY = colors.Color(0.9, 0.92, 0.95)


def pdf_of(parts: Sequence[Part], random: Random, lines: str, columns: int) -> bytes:
    """A document printed.

    Args:
        lines: which lines its tables have, one of `LINES`.
        columns: of text.
    """
    gap = random.choice((14, 18, 24))
    width = (_WIDTH - 2 * _MARGIN - (columns - 1) * gap) / columns
    frames = [
        Frame(_MARGIN + number * (width + gap), _MARGIN, width, _HEIGHT - 2 * _MARGIN, 0, 0, 0, 0) for number in range(columns)
    ]
    writer = _Writer(random, lines, width)
    made = io.BytesIO()
    document = BaseDocTemplate(made, pagesize=(_WIDTH, _HEIGHT))
    document.addPageTemplates([PageTemplate("page", frames)])
    document.build([flowable for part in parts for flowable in writer.printed(part)])
    return made.getvalue()


class _Writer:
    def __init__(self, random: Random, lines: str, width: float) -> None:
        self.random, self.lines, self.width = random, lines, width
        self.font = random.choice(("Helvetica", "Times-Roman"))
        self.bold = {"Helvetica": "Helvetica-Bold", "Times-Roman": "Times-Bold"}[self.font]
        self.size = random.choice((8.5, 9, 10, 11))
        leading = self.size * random.choice((1.15, 1.2, 1.3))
        align = random.choice((TA_LEFT, TA_JUSTIFY))
        self.body = ParagraphStyle("body", fontName=self.font, fontSize=self.size, leading=leading, alignment=align, spaceAfter=6)
        self.cell = ParagraphStyle("cell", parent=self.body, alignment=TA_LEFT, spaceAfter=0)
        self.heading = ParagraphStyle(
            "heading", parent=self.body, fontName=self.bold, fontSize=self.size + 3, leading=self.size + 6
        )

    def printed(self, part: Part) -> list[Any]:
        if isinstance(part, Heading):
            return [Paragraph(part.text, self.heading)]
        if isinstance(part, Prose):
            return [Paragraph(" ".join(part.sentences), self.body)]
        return self._table(part)

    def _table(self, table: Table) -> list[Any]:
        random = self.random
        plain = len(table.headers) - table.bands
        top = 1 + bool(table.over)
        padding = random.choice((2, 3, 6))
        rows: list[list[str]] = [[*[""] * plain, table.over, *[""] * (table.bands - 1)]] if table.over else []
        rows += [list(table.headers), *([*row, *[""] * (len(table.headers) - len(row))] for row in table.rows)]
        bold = random.random() < 0.7
        widths = self._widths(rows)
        style: list[Any] = [
            ("FONT", (0, 0), (-1, -1), self.font, self.size, self.cell.leading),
            ("TOPPADDING", (0, 0), (-1, -1), padding),
            ("BOTTOMPADDING", (0, 0), (-1, -1), padding),
            ("VALIGN", (0, 0), (-1, -1), random.choice(("TOP", "TOP", "MIDDLE"))),
            ("ALIGN", (plain, 0), (-1, -1), random.choice(("LEFT", "CENTER", "RIGHT")) if table.bands else "LEFT"),
        ]
        if bold:
            style.append(("FONT", (0, 0), (-1, top - 1), self.bold, self.size, self.cell.leading))
        if table.over:
            style += [("SPAN", (plain, 0), (-1, 0)), ("ALIGN", (plain, 0), (-1, 0), "CENTER")]
        for number, row in enumerate(table.rows, start=top):
            if len(row) == 1:
                style += [("SPAN", (0, number), (-1, number)), ("FONT", (0, number), (-1, number), self.bold, self.size)]
        cells = [
            [self._cell(text, width, bold and number < top) for text, width in zip(row, widths, strict=True)]
            for number, row in enumerate(rows)
        ]
        printed = Printed(cells, colWidths=widths, style=[*style, *self._drawn(top, len(rows))], repeatRows=top)
        printed.hAlign = random.choice(("LEFT", "CENTER"))
        caption = [Paragraph(table.caption, self.body)] if table.caption else []
        return [*caption, printed, Spacer(1, 8)]

    def _cell(self, text: str, width: float, bold: bool) -> Any:
        fits = stringWidth(text, self.bold, self.size) <= width - 12
        style = ParagraphStyle("head", parent=self.cell, fontName=self.bold) if bold else self.cell
        return text if fits else Paragraph(text, style)

    def _widths(self, rows: Sequence[Sequence[str]]) -> list[float]:
        """As wide as the longest cell, or what is left of the column of text beside the longest words, which long cells share."""

        def widest(column: int, *, words: bool) -> float:
            texts = [row[column] for row in rows if sum(map(bool, row)) > 1]
            parts = [part for text in texts for part in (text.split() if words else [text])]
            return max((stringWidth(part, self.bold, self.size) for part in parts), default=0.0) + 13

        columns = range(len(rows[-1]))
        needed = [widest(column, words=False) for column in columns]
        if sum(needed) <= self.width:
            room = max(self.width * self.random.choice((0.7, 0.9, 1.0)), sum(needed))
            spare = (room - sum(needed)) / len(needed) * self.random.choice((0.0, 0.3, 1.0))
            return [width + spare for width in needed]
        least = [widest(column, words=True) for column in columns]
        rest = max(0.0, self.width - sum(least))
        wanted = sum(needed) - sum(least)
        return [low + rest * (high - low) / wanted for low, high in zip(least, needed, strict=True)]

    def _drawn(self, top: int, count: int) -> list[Any]:
        thin, thick = (0.5, colors.black), (1.0, colors.black)
        if self.lines == "grid":
            return [("GRID", (0, 0), (-1, -1), *thin)]
        if self.lines == "rules":
            return [("LINEABOVE", (0, 0), (-1, -1), *thin), ("LINEBELOW", (0, -1), (-1, -1), *thin)]
        if self.lines == "header rule":
            return [("LINEBELOW", (0, top - 1), (-1, top - 1), *thin)]
        if self.lines == "booktabs":
            ends = [("LINEABOVE", (0, 0), (-1, 0), *thick), ("LINEBELOW", (0, -1), (-1, -1), *thick)]
            return [*ends, ("LINEBELOW", (0, top - 1), (-1, top - 1), *thin)]
        if self.lines == "shaded":
            return [("BACKGROUND", (0, number), (-1, number), _GRAY) for number in range(top - 1, count, 2)]
        return []
