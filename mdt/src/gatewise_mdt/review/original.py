"""The document that a passage comes from, as the page shows it: of a PDF its pages, of others the blocks around the passage."""

import base64
import io
from collections.abc import Iterable, Sequence, Set
from functools import cached_property, lru_cache
from itertools import groupby
from threading import Lock
from typing import Any

from gatewise.checks import printable
from gatewise.errors import GatewiseError, reason_of
from gatewise_mdt.documents.document import Block, Document, Region, Table, joined, unmarked

_AROUND = 12  # blocks, or rows of a table, before and after those of the passage
_ENDS = 20  # letters of a passage by which it is known again
_LONGEST, _SHARPEST = 1600, 2.0  # pixels of a page's longer side, and of a point, at most
_PDFIUM = Lock()  # of which one thread at a time may ask something


class Original:
    """A document that was read.

    Args:
        content: of the file, if it has pages to be shown.
    """

    def __init__(self, document: Document, content: bytes = b"") -> None:
        self.document, self._content = document, content
        self._starts = document.starts

    @cached_property
    def pages(self) -> int:
        """How many pages can be shown; 0 in a document without any."""
        import pypdfium2

        if not self._content:
            return 0
        with _PDFIUM:
            try:
                with pypdfium2.PdfDocument(self._content) as opened:
                    return len(opened)
            except pypdfium2.PdfiumError:  # which the reader got over
                return 0

    def picture(self, page: int) -> dict[str, Any]:
        """A page as a PNG in a "data:" address, and its size in points.

        Raises:
            GatewiseError: there is no such page, or it cannot be drawn.
        """
        if not 1 <= page <= self.pages:
            raise GatewiseError(f"there is no page {page} in {printable(self.document.name)}: it has {self.pages}")
        image, width, height = _drawn(self._content, page)
        return {"image": f"data:image/png;base64,{base64.b64encode(image).decode()}", "width": width, "height": height}

    def has(self, text: str, start: int, end: int) -> bool:
        """Whether a passage has what the document has from ``start`` to ``end``, at both ends of that, signs apart."""
        said, own = ("".join(filter(str.isalnum, one)) for one in (text, self.document.text[max(start, 0) : end]))
        return bool(own) and own[:_ENDS] in said and own[-_ENDS:] in said

    def around(self, start: int, end: int) -> dict[str, Any]:
        """What the page shows for the characters of the text from ``start`` to ``end``.

        "regions" are where they are printed, and "doubted" what of that was read without certainty, tables whole: page, left, top,
        width and height. "blocks" are those around them under the same heading, of a document without pages.
        """
        blocks = self.document.blocks
        cuts = [self._cut(number, start, end) for number in range(len(blocks))]
        own = [number for number, (first, last) in enumerate(cuts) if first < last]
        made: dict[str, Any] = {"name": printable(self.document.name), "id": self.document.sha256, "pages": self.pages}
        if self.pages:
            doubted = [blocks[number] for number in own if blocks[number].notes]
            pieces = groupby(own, lambda number: id(blocks[number].table or blocks[number]))
            printed = [joined(one for number in piece for one in blocks[number].regions) for _, piece in pieces]
            made["regions"] = [_box(region) for regions in printed for region in regions]
            made["doubted"] = [_box(one) for one in _together(doubted)]
        else:
            made |= self._blocks(own, start, end)
        return made

    def _cut(self, number: int, start: int, end: int) -> tuple[int, int]:
        """Which characters of a block are of a passage."""
        begins, length = self._starts[number], len(self.document.blocks[number].text)
        return max(start - begins, 0), min(end - begins, length)

    def _block(self, number: int, start: int, end: int) -> dict[str, Any]:
        block, (first, last) = self.document.blocks[number], self._cut(number, start, end)
        cut, until = (first, last) if first < last else (0, 0)
        pieces = [(block.text[:cut], False), (block.text[cut:until], True), (block.text[until:], False)]
        said = [[printable(text), own] for text, own in pieces if text]
        return {"kind": "heading" if block.level else block.kind, "depth": block.depth, "pieces": said}

    def _blocks(self, own: Sequence[int], start: int, end: int) -> dict[str, Any]:
        blocks = self.document.blocks
        if not own:
            return {"headings": [], "blocks": []}
        first, last = own[0], own[-1]
        above: list[Block] = []
        for block in blocks[: first + 1]:
            if block.level:
                above = [*(one for one in above if one.level < block.level), block]
        while first > 0 and own[0] - first < _AROUND and not blocks[first - 1].level and not blocks[first].level:
            first -= 1
        while last + 1 < len(blocks) and last - own[-1] < _AROUND and not blocks[last + 1].level:
            last += 1
        made: list[dict[str, Any]] = []
        tables: set[int] = set()
        for number in range(first, last + 1):
            table = blocks[number].table
            if table is None:
                made.append(self._block(number, start, end))
            elif id(table) not in tables:  # footnotes may stand between its rows
                tables.add(id(table))
                made.append(_table(table, {blocks[one].row for one in own if blocks[one].table is table}))
        return {"headings": [printable(one.text) for one in above if one is not blocks[first]], "blocks": made}


def _table(table: Table, own: Set[int]) -> dict[str, Any]:
    """A table with its headers, and of its rows those around the ones of the passage."""
    first = max(table.headers, min(own, default=table.headers) - _AROUND)
    last = min(len(table.rows), max(own, default=first) + 1 + _AROUND)
    rows = [[[printable(unmarked(text)), span] for text, span in row] for row in table.rows[:last]]
    return {
        "kind": "table",
        "headers": rows[: table.headers],
        "rows": [{"own": place in own, "cells": rows[place]} for place in range(first, last)],
        "left_out": [first - table.headers, len(table.rows) - last],
    }


def _together(blocks: Iterable[Block]) -> list[Region]:
    """What blocks take of each page, tables whole."""
    found: dict[int, Region] = {}
    for block in blocks:
        rows = block.table.regions if block.table is not None else (block.regions,)
        pages = {region.page for region in block.regions}
        for region in (region for row in rows for region in row if region.page in pages):
            other = found.get(region.page, region)
            left, right = min(region.x0, other.x0), max(region.x1, other.x1)
            found[region.page] = Region(region.page, left, right, min(region.top, other.top), max(region.bottom, other.bottom))
    return list(found.values())


def _box(region: Region) -> list[float]:
    page, x0, x1, top, bottom = region
    return [page, *(round(one, 1) for one in (x0, top, x1 - x0, bottom - top))]


@lru_cache(maxsize=16)
def _drawn(content: bytes, page: int) -> tuple[bytes, float, float]:
    """A page as PNG, with its width and height in points."""
    import pypdfium2

    with _PDFIUM:
        try:
            with pypdfium2.PdfDocument(content) as opened:
                drawn = opened[page - 1]
                width, height = drawn.get_size()
                scale = min(_SHARPEST, _LONGEST / max(width, height, 1.0))
                image = drawn.render(scale=scale).to_pil().copy()
        except (pypdfium2.PdfiumError, ValueError, MemoryError) as error:
            said = f"page {page} cannot be drawn ({reason_of(error, 150)})"
            raise GatewiseError(f"{said}: open the PDF itself beside the review") from error
    made = io.BytesIO()
    image.save(made, "PNG", compress_level=4)
    return made.getvalue(), width, height
