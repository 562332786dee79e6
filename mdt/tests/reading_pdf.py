"""Writes the random documents of `reading_corpus` as PDF: with and without grids, in one and two columns of text.

What a caller does not fix is drawn: letters, sizes, leading, alignment, padding, bold headers, where cells stand in their row.
"""

import io
import re
from collections.abc import Sequence
from random import Random
from typing import Any

from reading_corpus import Heading, Part, Prose, Table
from reportlab.lib import colors
from reportlab.lib.enums import TA_JUSTIFY, TA_LEFT
from reportlab.lib.styles import ParagraphStyle
from reportlab.pdfbase import pdfmetrics
from reportlab.pdfbase.cidfonts import UnicodeCIDFont
from reportlab.platypus import BaseDocTemplate, Frame, FrameBreak, NextPageTemplate, PageBreak, PageTemplate, Paragraph, Spacer
from reportlab.platypus import Table as Printed

LINES = ("grid", "none", "rules", "header rule", "booktabs", "shaded", "shaded cells", "box", "upright rules")
"""Which lines tables have. Of "shaded cells" each cell has a ground of its own, and "upright rules" part the columns alone."""
LAYOUTS = ("one column", "two columns", "two columns, wide tables")
"""How the text is set. "wide tables" go over both columns, above, between and below the text."""
_WIDTH, _HEIGHT, _MARGIN = 595, 842, 55
_GRAY = colors.Color(0.9, 0.92, 0.95)
_CHINESE = "STSong-Light"


def pdf_of(parts: Sequence[Part], random: Random, lines: str, layout: str) -> bytes:
    """A document printed, with lines of `LINES` and a layout of `LAYOUTS`."""
    gap = random.choice((14, 18, 24))
    whole = _WIDTH - 2 * _MARGIN
    column = (whole - gap) / 2
    pages: list[PageTemplate] = []
    story: list[Any] = []
    if layout == LAYOUTS[2]:
        writer = _Writer(random, lines, whole, column, parts)
        bands: list[tuple[list[Any], ...]] = []  # from the top of a page: over both columns, or the left and the right one
        for part in parts:
            printed = writer.printed(part)
            if not isinstance(part, Prose):
                bands.append((printed,))
            elif bands and len(bands[-1]) == 2 and not bands[-1][1]:
                bands[-1][1].extend(printed)
            else:
                bands.append((printed, []))
        for name, page in enumerate(_pages(bands, whole, column)):
            frames = []
            at = _HEIGHT - _MARGIN
            for band, high in page:
                at -= high
                width = whole if len(band) == 1 else column
                frames += [
                    Frame(_MARGIN + n * (column + gap), at, width, high, 0, 0, 0, 0, id=f"{name} {len(frames)}")
                    for n in range(len(band))
                ]
            pages.append(PageTemplate(str(name), frames))
            inside = [flowables for band, _ in page for flowables in band]
            story += [NextPageTemplate(str(name)), PageBreak()] if name else []
            for number, flowables in enumerate(inside):
                story += [*([FrameBreak()] if number else []), *(flowables or [Spacer(1, 1)])]
    else:
        count = 1 + LAYOUTS.index(layout)
        width = whole if count == 1 else column
        writer = _Writer(random, lines, width, width, parts)
        pages.append(
            PageTemplate(
                "0", [Frame(_MARGIN + n * (width + gap), _MARGIN, width, _HEIGHT - 2 * _MARGIN, 0, 0, 0, 0) for n in range(count)]
            )
        )
        story = [flowable for part in parts for flowable in writer.printed(part)]
    made = io.BytesIO()
    document = BaseDocTemplate(made, pagesize=(_WIDTH, _HEIGHT))
    document.addPageTemplates(pages)
    document.build(story)
    return made.getvalue()


def _pages(bands: Sequence[tuple[list[Any], ...]], whole: float, column: float) -> list[list[tuple[tuple[list[Any], ...], float]]]:
    """Bands on pages, each with its height."""
    pages: list[list[tuple[tuple[list[Any], ...], float]]] = [[]]
    left = _HEIGHT - 2 * _MARGIN
    for band in bands:
        width = whole if len(band) == 1 else column
        high = (
            max(sum(one.wrap(width, _HEIGHT)[1] + one.getSpaceAfter() + one.getSpaceBefore() for one in side) for side in band) + 8
        )
        if high > left:
            pages.append([])
            left = _HEIGHT - 2 * _MARGIN
        pages[-1].append((band, high))
        left -= high
    return pages


class _Writer:
    def __init__(self, random: Random, lines: str, width: float, column: float, parts: Sequence[Part]) -> None:
        """Args: the width of tables and headings, and that of text."""
        self.random, self.lines, self.width, self.column = random, lines, width, column
        self.chinese = any(
            ord(one) > 0x3000 for part in parts if isinstance(part, Prose) for text in part.sentences for one in text
        )
        self.font, self.bold = random.choice((("Helvetica", "Helvetica-Bold"), ("Times-Roman", "Times-Bold")))
        if self.chinese:
            pdfmetrics.registerFont(UnicodeCIDFont(_CHINESE))
            self.font = self.bold = _CHINESE
        self.size = random.choice((8.5, 9, 10, 11))
        leading = self.size * random.choice((1.15, 1.2, 1.3) if not self.chinese else (1.3, 1.5))
        align = random.choice((TA_LEFT, TA_JUSTIFY))
        wrap = {"wordWrap": "CJK"} if self.chinese else {}
        self.body = ParagraphStyle(
            "body", fontName=self.font, fontSize=self.size, leading=leading, alignment=align, spaceAfter=6, **wrap
        )
        self.cell = ParagraphStyle("cell", parent=self.body, alignment=TA_LEFT, spaceAfter=0)
        self.heading = ParagraphStyle(
            "heading", parent=self.body, fontName=self.bold, fontSize=self.size + 3, leading=self.size + 6
        )

    def printed(self, part: Part) -> list[Any]:
        if isinstance(part, Heading):
            return [Paragraph(part.text, self.heading)]
        if isinstance(part, Prose):
            return [Paragraph(("" if self.chinese else " ").join(part.sentences), self.body)]
        return self._table(part)

    def _table(self, table: Table) -> list[Any]:
        random = self.random
        plain = len(table.headers) - table.bands
        named = any(table.headers)
        top = named + bool(table.over)
        padding = random.choice((0, 1, 2, 3, 6))
        rows: list[list[str]] = [[*[""] * plain, table.over, *[""] * (table.bands - 1)]] if table.over else []
        rows += [list(table.headers)] if named else []
        rows += [[*row, *[""] * (len(table.headers) - len(row))] for row in table.rows]
        bold = random.random() < 0.7
        widths = self._widths(rows)
        style: list[Any] = [
            ("FONT", (0, 0), (-1, -1), self.font, self.size, self.cell.leading),
            ("TOPPADDING", (0, 0), (-1, -1), padding),
            ("BOTTOMPADDING", (0, 0), (-1, -1), padding),
            ("VALIGN", (0, 0), (-1, -1), random.choice(("TOP", "TOP", "MIDDLE"))),
            ("ALIGN", (plain, 0), (-1, -1), random.choice(("LEFT", "CENTER", "RIGHT")) if table.bands else "LEFT"),
        ]
        if bold and top:
            style.append(("FONT", (0, 0), (-1, top - 1), self.bold, self.size, self.cell.leading))
        if table.over:
            style += [("SPAN", (plain, 0), (-1, 0)), ("ALIGN", (plain, 0), (-1, 0), "CENTER")]
        stressed = random.random() < 0.7  # names of groups
        for number, row in enumerate(table.rows, start=top):
            if len(row) == 1:
                style.append(("SPAN", (0, number), (-1, number)))
                style += [("FONT", (0, number), (-1, number), self.bold, self.size, self.cell.leading)] if stressed else []
        cells = [
            [self._cell(text, width, bold and number < top) for text, width in zip(row, widths, strict=True)]
            for number, row in enumerate(rows)
        ]
        repeated = top if random.random() < 0.8 else 0
        printed = Printed(cells, colWidths=widths, style=[*style, *self._drawn(top, rows)], repeatRows=repeated)
        printed.hAlign = random.choice(("LEFT", "CENTER"))
        caption = [Paragraph(table.caption, self.body)] if table.caption else []
        return [*caption, printed, Spacer(1, 8)]

    def _cell(self, text: str, width: float, bold: bool) -> Any:
        fits = pdfmetrics.stringWidth(text, self.bold, self.size) <= width - 12
        style = ParagraphStyle("head", parent=self.cell, fontName=self.bold) if bold else self.cell
        return text if fits else Paragraph(text, style)

    def _widths(self, rows: Sequence[Sequence[str]]) -> list[float]:
        """As wide as the longest cell, or what is left of the column of text beside the longest words, which long cells share."""

        def widest(column: int, *, words: bool) -> float:
            texts = [row[column] for row in rows if sum(map(bool, row)) > 1]
            parts = [part for text in texts for part in (self._parts(text) if words else [text])]
            return max((pdfmetrics.stringWidth(part, self.bold, self.size) for part in parts), default=0.0) + 13

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

    def _parts(self, text: str) -> list[str]:
        # Between any two Chinese characters a line may end, but doses stay whole.
        return re.findall("[!-~ <>≥≤]+|[^!-~ ≥≤]{1,4}", text) if self.chinese else text.split()

    def _drawn(self, top: int, rows: Sequence[Sequence[str]]) -> list[Any]:
        thin, thick = (0.5, colors.black), (1.0, colors.black)
        header = [("LINEBELOW", (0, top - 1), (-1, top - 1), *thin)] if top else []
        if self.lines == "grid":
            return [("GRID", (0, 0), (-1, -1), *thin)]
        if self.lines == "rules":
            return [("LINEABOVE", (0, 0), (-1, -1), *thin), ("LINEBELOW", (0, -1), (-1, -1), *thin)]
        if self.lines == "header rule":
            return header
        if self.lines == "booktabs":
            return [("LINEABOVE", (0, 0), (-1, 0), *thick), ("LINEBELOW", (0, -1), (-1, -1), *thick), *header]
        if self.lines == "box":
            return [("BOX", (0, 0), (-1, -1), *thin), *header]
        if self.lines == "upright rules":
            return [("BOX", (0, 0), (-1, -1), *thin), ("LINEBEFORE", (1, 0), (-1, -1), *thin), *header]
        if self.lines == "shaded":
            return [("BACKGROUND", (0, number), (-1, number), _GRAY) for number in range(max(0, top - 1), len(rows), 2)]
        if self.lines == "shaded cells":
            cells = [(column, number) for number in range(max(0, top - 1), len(rows), 2) for column in range(len(rows[0]))]
            return [("BACKGROUND", cell, cell, _GRAY) for cell in cells]
        return []
