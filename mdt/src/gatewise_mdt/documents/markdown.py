"""Markdown read so that no word of it is lost: what is no certain markup is text ("ALT <ULN and eGFR> 30" has no tags)."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from html import unescape
from typing import Any
from urllib.parse import unquote

from gatewise_mdt.documents.document import NOTE, Block, Document, quoted_list, with_footnotes
from gatewise_mdt.documents.headings import SENTENCE_END, is_label, reads_as_sentence
from gatewise_mdt.documents.tables import Cell, row_of, table_blocks

# Those that go away leave their content; <del> and <s> stay, as what they strike out must not pass for valid.
_INLINE = "a abbr address b big cite code dfn em font i ins kbd mark q ruby rt rp small span strong sub sup tt u var wbr"
_APART = (
    "article aside blockquote body br caption center col colgroup dd details div dl dt figcaption figure footer h1 h2 h3 h4 h5 h6"
    " head header hr html img li main nav ol p pre section summary table tbody td tfoot th thead title tr ul"
)
_ALONE = ("br", "hr", "img", "wbr", "col", "p", "li")  # that need no closing
_TAG = re.compile(
    rf"<(/?)({'|'.join(f'{_INLINE} {_APART}'.split())})((?:\s+[a-z-]+\s*=\s*(?:\"[^\"]*\"|'[^']*'|[^\s\"'=<>`]+))*)\s*/?>",
    re.IGNORECASE,
)
_ALT = re.compile(r"\b(?:alt|title)\s*=\s*(?:\"([^\"]*)\"|'([^']*)')", re.IGNORECASE)
_COMMENT = re.compile(r"<!--(.*?)-->", re.DOTALL)
_ADDRESS = re.compile(
    r"(?:[a-z][a-z+.-]+:|[#/]|\.{1,2}/|www\.).*|[^\s]*\.(?:html?|pdf|md|docx?|xlsx?|png|jpe?g|svg|gif|com|org|net|edu|gov|int|uk)(?:[/#?].*)?",
    re.IGNORECASE,
)
_FENCE = re.compile(r"\s{0,3}(?:```|~~~)")
# "> 140/90" and "> ULN" are comparisons at the beginning of a line.
_QUOTE = re.compile(r"(\s{0,3})>\s?(?!\s*(?:[=\d.]|[A-Z]{2,6}\b))")
_FOOTNOTE = re.compile(r"^ {0,3}\[\^([^\]\s]+)\]:[ \t]*(.*(?:\n(?:[ ]{2,}|\t)\S.*)*)\n?", re.MULTILINE)
_REFERENCE = re.compile(r"\[\^([^\]\s]+)\]")
_TABLE = re.compile(r"<table\b[^>]*>(?:(?!<table\b).)*?</table\s*>", re.IGNORECASE | re.DOTALL)
_ROW = re.compile(r"<tr\b[^>]*>(.*?)(?=<tr\b|</tr\s*>|$)", re.IGNORECASE | re.DOTALL)
# With what stands after it in its row, where it does not belong.
_CELL = re.compile(r"<(t[hd])\b([^>]*)>(.*?)(?:</t[hd]\s*>|(?=<t[hd]\b)|$)(.*?)(?=<t[hd]\b|$)", re.IGNORECASE | re.DOTALL)
_PLACE = "\x03{}\x03"  # stands for a table in HTML; no text holds it
_NESTING = 200  # of lists; deeper ones would be left out


def read_markdown(text: str, name: str) -> Document:
    """Headings, paragraphs, list items and rows of tables."""
    from markdown_it import MarkdownIt

    notes: list[str] = []
    plain, footnotes = _without_footnotes(_without_comments(text, name, notes))
    plain, tables = _without_tables(plain)
    # Quotations are unmarked in `_certain`, which can tell them from comparisons.
    source = _certain(plain)
    markdown = MarkdownIt("commonmark", {"maxNesting": _NESTING}).enable("table")
    markdown.disable(["html_inline", "html_block", "autolink", "blockquote"])
    found: dict[str, Any] = {}
    tokens = markdown.parse(source, found)
    references = [*found.get("references", {}).values(), *found.get("duplicate_refs", ())]
    if not all(_ADDRESS.fullmatch(one["href"]) and not one["title"] for one in references):  # "[Dose]: 5mg" is no address
        tokens = markdown.disable("reference").parse(source)
    blocks = [
        made for block in _Walk(source, tables).blocks(tokens) for made in with_footnotes(_referring(block, footnotes), footnotes)
    ]
    return Document(name, tuple(blocks), tuple(notes))


class _Walk:
    """The walk through the tokens of a document."""

    def __init__(self, source: str, tables: Sequence[list[list[Cell]]]) -> None:
        self.lines, self.tags, self.tables = source.split("\n"), _paired(source), tables

    def blocks(self, tokens: Sequence[Any]) -> Iterator[Block]:
        level = above = 0
        underlined = False
        items = 0
        table: list[list[Cell]] | None = None
        for number, token in enumerate(tokens):
            where = f"line {token.map[0] + 1}" if token.map else ""
            if token.type == "heading_open":
                level, underlined = int(token.tag[1:]), token.markup in ("-", "=")
            elif token.type == "heading_close":
                level = 0
            elif token.type in ("list_item_open", "list_item_close"):
                items += 1 if token.type == "list_item_open" else -1
            elif token.type == "table_open":
                table, places, headers = [], [], 0
            elif token.type == "tr_open" and table is not None:
                row, cells = token.map[0] if token.map else -1, list[str]()
            elif token.type == "tr_close" and table is not None:
                held = re.sub(r"^\s*\|?|(?<!\\)\|?\s*$", "", self.lines[row]) if row >= 0 else ""
                beyond = re.split(r"(?<!\\)\|", held)[len(cells) :]  # a row may have more than the first one
                table.append(row_of([*cells, *(self._text(cell.replace("\\|", "|").strip()) for cell in beyond)]))
                places.append(f"line {row + 1}" if row >= 0 else "")
            elif token.type == "thead_close" and table is not None:
                headers = int(any(cell.text for cell in table[0]))
            elif token.type == "table_close" and table is not None:
                yield from table_blocks(table, places, headers)
                table = None
            elif token.type == "inline" and table is not None:
                cells.append(self._text(_inline(token.children or ())))
            elif token.type == "inline":
                said = self._text(_inline(token.children or ()))
                if place := re.fullmatch(_PLACE.format(r"(\d+)"), said):
                    rows = self.tables[int(place[1])]
                    top = next((i for i, cells_ in enumerate(rows) if not all(cell.bold for cell in cells_)), len(rows))
                    yield from table_blocks(rows, [where] * len(rows), top or None)
                    continue
                # A line of "---" under a sentence was meant to part it from the next.
                is_sentence = (
                    underlined and (SENTENCE_END.search(said) or reads_as_sentence(said)) and not said.endswith(("?", "？"))
                )
                if level and not is_sentence:
                    above = level
                    yield Block(said, level, where)
                elif not items and not level and _is_bold(token) and is_label(said):
                    yield Block(said, above + 1, where)
                else:
                    first = bool(items) and tokens[number - 2].type == "list_item_open"
                    yield Block(said, 0, where, "item" if first else "paragraph")
            elif token.type in ("fence", "code_block"):
                named = token.info if " " in token.info.strip() else ""
                content = self._text(token.content) if token.type == "code_block" else " ".join(token.content.split())
                yield Block(f"{named} {content}".strip(), 0, where)

    def _text(self, said: str) -> str:
        return _text(said, self.tags)


def _is_bold(token: Any) -> bool:
    """Whether all of a paragraph is bold."""
    children = [child for child in token.children or () if child.content.strip() or child.type != "text"]
    kinds = [child.type for child in children]
    return len(kinds) > 2 and kinds[0] == "strong_open" and kinds[-1] == "strong_close" and kinds.count("strong_open") == 1


def _without_footnotes(text: str) -> tuple[str, dict[str, str]]:
    """The text without the footnotes that something refers to, and these by their names."""
    notes: dict[str, str] = {}
    referred = {found[1] for found in _REFERENCE.finditer(_FOOTNOTE.sub("", text))}

    def taken(found: re.Match[str]) -> str:
        if found[1] not in referred or found[1] in notes or not any(map(str.isalnum, found[2])):
            return found[0]
        notes[found[1]] = " ".join(found[2].split())
        return "\n" * found[0].count("\n")

    return _FOOTNOTE.sub(taken, text), notes


def _referring(block: Block, notes: Mapping[str, str]) -> Block:
    def marked(text: str) -> str:
        return _REFERENCE.sub(lambda found: f"{NOTE}{found[1]}{NOTE}" if found[1] in notes else found[0], text)

    if not notes:
        return block
    return replace(block, text=marked(block.text), stem=marked(block.stem), notes=tuple(map(marked, block.notes)))


def _without_tables(text: str) -> tuple[str, list[list[list[Cell]]]]:
    """The text with a mark for each table in HTML, and the tables' rows."""
    tables: list[list[list[Cell]]] = []

    def taken(found: re.Match[str]) -> str:
        tags = _paired(found[0])
        rows = _html_rows(found[0], tags)
        outside = _text(_ROW.sub(lambda row: _CELL.sub("", row[1]), found[0]), tags)
        if not rows or any(map(str.isalnum, outside)):  # a caption, what stands before the cells of a row, or what is no table
            return found[0]
        tables.append(rows)
        lines = found[0].count("\n")
        return "\n\n" * (lines > 1) + _PLACE.format(len(tables) - 1) + "\n" * (max(lines - 2, 0) if lines > 1 else lines)

    return _TABLE.sub(taken, text), tables


def _html_rows(table: str, tags: set[str]) -> list[list[Cell]]:
    """The rows of a table in HTML; a cell that goes over several rows stands in each."""
    rows: list[list[Cell]] = []
    going: dict[int, tuple[int, Cell]] = {}  # column -> for how many more rows its cell goes on
    for row in _ROW.finditer(table):
        cells = [cell for _, cell in going.values()]
        taken = {cell.column + place for cell in cells for place in range(cell.span)}
        going = {column: (more - 1, cell) for column, (more, cell) in going.items() if more > 1}
        column = 0
        for tag, attributes, content, after in _CELL.findall(row[1]):
            while column in taken:
                column += 1
            # A mark or a lone tag between two cells says nothing.
            says = any(map(str.isalnum, re.sub("<[^>]*>", "", unescape(_text(after, tags)))))
            text = _text(f"{content} {after}" if says else content, tags)
            cell = Cell(text, column, _spanned("colspan", attributes), tag.lower() == "th")
            if (down := _spanned("rowspan", attributes)) > 1:
                going[column] = (down - 1, cell)
            cells.append(cell)
            column += cell.span
        if cells:
            rows.append(sorted(cells, key=lambda cell: cell.column))
    return rows


def _spanned(name: str, attributes: str) -> int:
    found = re.search(rf"{name}\s*=\s*[\"']?(\d{{1,2}})", attributes, re.IGNORECASE)
    return max(1, int(found[1])) if found else 1


def _inline(children: Any) -> str:
    said, ends = "", []
    for token in children:
        if token.type in ("softbreak", "hardbreak"):
            said += " "
        elif token.type in ("text", "code_inline"):
            said += token.content
        elif token.type == "image":
            said += f" {token.content} {token.attrs.get('title', '')} "
        elif token.type == "link_open":
            href, title = unquote(str(token.attrs.get("href", ""))), str(token.attrs.get("title", ""))
            ends.append([title, "" if _ADDRESS.fullmatch(href) else href])
        elif token.type == "link_close" and ends:
            said += "".join(f" ({extra})" for extra in ends.pop() if extra)
    return said


def _text(said: str, tags: set[str]) -> str:
    """One line without the tags that are certain; superscripts of numbers are marked, 10<sup>9</sup> is not 109."""

    def kept(found: re.Match[str]) -> str:
        closing, tag = found[1], found[2].lower()
        if tag not in tags:
            return found[0]
        if tag == "sup" and not closing and said[: found.start()][-1:].isdigit():
            return "^"
        alt = " ".join(one or other for one, other in _ALT.findall(found[3]))
        return f" {alt} " if alt else " " if tag in _APART.split() else ""

    return " ".join(_TAG.sub(kept, said).split())


def _paired(source: str) -> set[str]:
    """The names of the tags that the source has: opened and closed, or such as need no closing."""
    opened = {found[2].lower() for found in _TAG.finditer(source) if not found[1]}
    closed = {found[2].lower() for found in _TAG.finditer(source) if found[1]}
    return (opened & closed) | set(_ALONE)


def _without_comments(text: str, name: str, notes: list[str]) -> str:
    comments = [" ".join(one.split()) for one in _COMMENT.findall(text)]
    if any(comments):
        notes.append(f"{name}: {'a comment was' if len(comments) == 1 else 'comments were'} left out: {quoted_list(comments)}")
    return _COMMENT.sub(lambda found: "\n" * found[0].count("\n"), text)


def _certain(text: str) -> str:
    """The source with marks of quotations taken away, and those marks escaped that belong to a comparison, a range or a name."""
    made: list[str] = []
    before, fenced, quoting = "", False, False
    for line in text.split("\n"):
        fenced ^= bool(_FENCE.match(line))
        said = line
        if not fenced:
            while (quoting or not before.strip()) and _QUOTE.match(said):
                said, quoting = _QUOTE.sub(r"\1", said, count=1), True
            if before.strip() and re.search(r"[\d<>≤≥=]$", before.rstrip()):
                said = re.sub(r"^(\s*)([-+])(\s+\d)", r"\1\\\2\3", said)  # "5" and, on the next line, "- 10 mg"
            if "`" not in said:
                said = re.sub(r"(?<=[A-Za-z0-9])\*(?=\d)", r"\\*", said)  # HLA-B*57:01
        quoting = quoting and bool(line.strip())
        made.append(said)
        before = said
    return "\n".join(made)
