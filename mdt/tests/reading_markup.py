"""Writes the random documents of `reading_corpus` as plain text, Markdown, HTML and DOCX.

What a seed does not fix is drawn: how lists are marked and moved in, whether the headers of a table are marked, whether cells are
merged, which names HTML has for what, and what is left out that may be.
"""

import io
from collections.abc import Sequence
from html import escape
from random import Random
from typing import Any

import docx
from docx.oxml import parse_xml
from docx.oxml.ns import nsdecls
from docx.shared import Pt
from reading_corpus import Heading, Item, Listing, Part, Prose, Table

# ---- plain text and Markdown ----


def text_of(parts: Sequence[Part], random: Random) -> bytes:
    """A document in plain text, which has no tables."""
    return markdown_of(parts, random, counted=False).replace(b"# ", b"").replace(b"#", b"")


def markdown_of(parts: Sequence[Part], random: Random, *, counted: bool = True) -> bytes:
    """A document in Markdown.

    Args:
        counted: the numbers of items are counted by who shows them, whatever stands in the file.
    """
    bullet, step, loose = random.choice("-*+"), random.choice((2, 3, 4)), random.random() < 0.4

    def items(listed: Sequence[Item], numbered: bool, indent: str) -> list[str]:
        lines = []
        for number, item in enumerate(listed, start=1):
            wrong = counted and random.random() < 0.2 and number > 1
            mark = f"{number - wrong}." if numbered else bullet
            below = indent + " " * max(len(mark) + 1, step)
            mark = mark.ljust(len(below) - len(indent)) if random.random() < 0.5 else f"{mark} "
            below = indent + " " * len(mark)
            lines += [f"{indent}{mark}{item.text}", *([""] if loose else [])]
            lines += ["", f"{below}{item.more.text}", ""] if item.more else []
            lines += items(item.inner, False, below)
        return lines

    lines: list[str] = []
    for part in parts:
        if isinstance(part, Heading):
            lines.append(f"{'#' * part.level} {part.text}")
        elif isinstance(part, Prose):
            lines.append(random.choice(("\n", " ")).join(part.sentences))
        elif isinstance(part, Listing):
            lines += [part.lead.text, ""] if part.lead else []
            lines += items(part.items, part.numbered, "")
            lines += ["", part.after.text] if part.after else []
        else:
            lines += [part.caption, ""] if part.caption else []
            rows = [
                ["**" + row[0] + "**" if len(row) == 1 and random.random() < 0.5 else text for text in row] for row in _grid(part)
            ]
            width = len(part.headers)
            said = [f"| {' | '.join([*row, *[''] * (width - len(row))])} |" for row in rows]
            lines += [said[0], f"|{' --- |' * width}", *said[1:]]
        lines.append("")
    return "\n".join(lines).encode()


def _grid(table: Table) -> list[list[str]]:
    """All rows as they stand, the header over several columns in the first of them."""
    plain = len(table.headers) - table.bands
    above = [[*[""] * plain, table.over, *[""] * (table.bands - 1)]] if table.over else []
    if above and plain:
        above[0][:plain] = table.headers[:plain]
        return [*above, [*[""] * plain, *table.headers[plain:]], *map(list, table.rows)]
    return [list(table.headers), *map(list, table.rows)]


# ---- HTML ----


def html_of(parts: Sequence[Part], random: Random) -> bytes:
    """A page, with what stands around the text of pages."""
    closed = random.random() < 0.6

    def end(tag: str) -> str:
        return f"</{tag}>" if closed or tag in ("ul", "ol", "table", "div", "thead") else ""

    def items(listed: Sequence[Item], tag: str) -> str:
        made, beside = "", random.random() < 0.2
        for item in listed:
            text = f"<p>{escape(item.text)}{end('p')}" if item.more or random.random() < 0.2 else escape(item.text)
            more = f"<p>{escape(item.more.text)}{end('p')}" if item.more else ""
            inner = items(item.inner, "ul") if item.inner else ""
            # A list beside its item instead of in it is a fault that many pages have.
            made += f"<li>{text}{more}{'</li>' + inner if beside else inner + end('li')}\n"
        return f"<{tag}>{made}</{tag}>"

    def row(cells: str) -> str:
        return f"<tr>{cells}{end('tr')}\n"

    def table(part: Table) -> str:
        plain, head = len(part.headers) - part.bands, random.choice(("thead", "th", "bold", "none"))
        tag = "td" if head in ("bold", "none") else "th"

        def cell(text: str, more: str = "", name: str = tag) -> str:
            said = f"<b>{escape(text)}</b>" if head == "bold" and name == tag else escape(text)
            return f"<{name}{more}>{said}{end(name)}"

        top = row("".join(map(cell, part.headers)))
        if part.over:
            first = [cell(text, " rowspan=2") for text in part.headers[:plain]]
            top = row("".join([*first, cell(part.over, f" colspan={part.bands}")])) + row("".join(map(cell, part.headers[plain:])))
        body = ""
        for one in part.rows:
            whole = f" colspan={len(part.headers)}" if random.random() < 0.7 else ""
            blank = "" if len(one) > 1 or whole else "<td></td>" * (len(part.headers) - 1)
            body += row("".join(f"<td{whole if len(one) == 1 else ''}>{escape(text)}{end('td')}" for text in one) + blank)
        caption = f"<caption>{escape(part.caption)}</caption>" if part.caption else ""
        return f"<table>{caption}{f'<thead>{top}</thead>' if head == 'thead' else top}{body}</table>"

    made = ""
    for part in parts:
        if isinstance(part, Heading):
            made += f"<h{part.level}>{escape(part.text)}</h{part.level}>\n"
        elif isinstance(part, Prose):
            tag = random.choice(("p", "div"))
            made += f"<{tag}>{escape(' '.join(part.sentences))}{end(tag)}\n"
        elif isinstance(part, Listing):
            made += f"<p>{escape(part.lead.text)}{end('p')}\n" if part.lead else ""
            made += items(part.items, "ol" if part.numbered else "ul")
            made += f"<p>{escape(part.after.text)}{end('p')}\n" if part.after else ""
        else:
            made += table(part)
    main = random.choice(("main", "article", "div"))
    around = "<nav><ul><li>Home<li>Contact</ul></nav><script>let x = 'Give 5 mg';</script>"
    return f"<!DOCTYPE html><title>Page</title><body>{around}<{main}>{made}</{main}><footer>Imprint</footer>".encode()


# ---- DOCX ----


def docx_of(parts: Sequence[Part], random: Random) -> bytes:
    """A Word document."""
    return _Word(random).written(parts)


class _Word:
    def __init__(self, random: Random) -> None:
        self.random, self.document = random, docx.Document()
        self.lists = random.choice(("styles", "levels", "typed"))
        self.bullets, self.numbers = self._numbering("bullet", "•", 900), 900

    def written(self, parts: Sequence[Part]) -> bytes:
        for part in parts:
            if isinstance(part, Heading):
                self.document.add_heading(part.text, part.level)
            elif isinstance(part, Prose):
                self.document.add_paragraph(" ".join(part.sentences))
            elif isinstance(part, Listing):
                if part.lead:
                    self.document.add_paragraph(part.lead.text)
                if part.numbered:
                    self.numbers = self._numbering("decimal", "%1.", self.numbers + 1)
                self._items(part.items, part.numbered, 0)
                if part.after:
                    self.document.add_paragraph(part.after.text)
            else:
                self._table(part)
        made = io.BytesIO()
        self.document.save(made)
        return made.getvalue()

    def _numbering(self, kind: str, text: str, number: int) -> int:
        """A list of the document's own with nine levels."""
        levels = "".join(
            f'<w:lvl w:ilvl="{level}"><w:start w:val="1"/><w:numFmt w:val="{kind if level == 0 else "bullet"}"/>'
            f'<w:lvlText w:val="{text if level == 0 else "•"}"/>'
            f'<w:pPr><w:ind w:left="{500 * (level + 1)}" w:hanging="300"/></w:pPr></w:lvl>'
            for level in range(9)
        )
        root = self.document.part.numbering_part.element
        root.insert(0, parse_xml(f'<w:abstractNum {nsdecls("w")} w:abstractNumId="{number}">{levels}</w:abstractNum>'))
        root.append(parse_xml(f'<w:num {nsdecls("w")} w:numId="{number}"><w:abstractNumId w:val="{number}"/></w:num>'))
        return number

    def _items(self, items: Sequence[Item], numbered: bool, level: int) -> None:
        for item in items:
            styled = self.lists == "styles" and level < 3 and not numbered
            if styled:
                self.document.add_paragraph(item.text, style=f"List Bullet{f' {level + 1}' if level else ''}")
            elif self.lists == "typed" and not numbered:
                self.document.add_paragraph(f"{self.random.choice(('•', '-'))} {item.text}").paragraph_format.left_indent = Pt(
                    20 * level
                )
            else:
                name = self.numbers if numbered and level == 0 else self.bullets
                paragraph = self.document.add_paragraph(item.text)
                properties = f'<w:numPr {nsdecls("w")}><w:ilvl w:val="{level}"/><w:numId w:val="{name}"/></w:numPr>'
                paragraph._p.get_or_add_pPr().append(parse_xml(properties))
            if item.more:
                moved = {"styles": 18 * (level + 1), "levels": 25 * (level + 1), "typed": 20 * level + 12}[self.lists]
                self.document.add_paragraph(item.more.text).paragraph_format.left_indent = Pt(
                    moved if not numbered else 25 * (level + 1)
                )
            self._items(item.inner, False, level + 1)

    def _table(self, table: Table) -> None:
        random, plain = self.random, len(table.headers) - table.bands
        if table.caption:
            self.document.add_paragraph(table.caption)
        rows: list[list[str]] = [list(table.headers), *map(list, table.rows)]
        top = 1
        if table.over:
            rows.insert(0, [*table.headers[:plain], table.over])
            rows[1] = [*[""] * plain, *table.headers[plain:]]
            top = 2
        marked = random.choice(("header", "style", "bold", "none"))
        merged = random.random() < 0.7
        made: Any = self.document.add_table(len(rows), len(table.headers))
        made.style = random.choice(("Light List", "Medium Grid 1", "Light Shading")) if marked == "style" else "Table Grid"
        for number, row in enumerate(rows):
            if marked == "header" and number < top:
                made.rows[number]._tr.get_or_add_trPr().append(parse_xml(f"<w:tblHeader {nsdecls('w')}/>"))
            for column, text in enumerate(row):
                cell = made.cell(number, column)
                cell.text = text
                for run in cell.paragraphs[0].runs:
                    run.bold = True if marked == "bold" and number < top else None
            if len(row) == 1 and merged:
                made.cell(number, 0).merge(made.cell(number, len(table.headers) - 1)).text = row[0]
        if table.over and merged:
            made.cell(0, plain).merge(made.cell(0, len(table.headers) - 1)).text = table.over
            for column in range(plain):
                made.cell(0, column).merge(made.cell(1, column)).text = table.headers[column]
