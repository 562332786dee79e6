"""Markdown read so that no word of it is lost: what is no certain markup is text ("ALT <ULN and eGFR> 30" has no tags)."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from gatewise_mdt.documents.document import LOWERED, NOTE, RAISED, Block, Document, in_one_line, quoted_list, with_footnotes
from gatewise_mdt.documents.headings import SENTENCE_END, is_label, reads_as_sentence
from gatewise_mdt.documents.tables import Cell, table_blocks

# Tags that go away and leave their content; <del> and <s> stay, as what they strike out must not pass for valid.
_INLINE = "a abbr address b big cite code dfn em font i ins kbd mark q ruby rt rp small span strong sub sup tt u var wbr"
_APART = (
    "article aside blockquote body br caption center col colgroup dd details div dl dt figcaption figure footer h1 h2 h3 h4 h5 h6"
    " head header hr html li main nav ol p pre section summary table tbody td tfoot th thead title tr ul"
)
_TAG = re.compile(
    rf"<(/?)({'|'.join(f'{_INLINE} {_APART}'.split())})((?:\s+[a-z-]+\s*=\s*(?:\"[^\"]*\"|'[^']*'|[^\s\"'=<>`]+))*)\s*/?>",
    re.IGNORECASE,
)
_COMMENT = re.compile(r"<!--(.*?)-->", re.DOTALL)
_FENCE = re.compile(r"\s{0,3}(?:```|~~~)")
# "> 140/90" and "> ULN" are comparisons at the beginning of a line.
_QUOTE = re.compile(r"(\s{0,3})>\s?(?!\s*(?:[=\d.]|[A-Z]{2,6}\b))")
_FOOTNOTE = re.compile(r"^ {0,3}\[\^([^\]\s]+)\]:[ \t]*(.*(?:\n(?:[ ]{2,}|\t)\S.*)*)\n?", re.MULTILINE)
_REFERENCE = re.compile(r"\[\^([^\]\s]+)\]")
_HTML_CELL = re.compile(r"<t[dh]\b", re.IGNORECASE)
_HTML_TABLE = "this is a table in HTML, read as text, so that no cell has its header beside it: compare it with the document"
_PANDOC_RAISED = re.compile(r"(?<=[\w.,;:)%])\^([^\s^]{1,8})\^")
_NESTING = 200  # of lists; deeper ones would be left out


def read_markdown(text: str, name: str) -> Document:
    """Headings, paragraphs, list items and rows of tables. A table in HTML is read as text, with a note."""
    from markdown_it import MarkdownIt

    comments = [" ".join(one.split()) for one in _COMMENT.findall(text)]
    notes = []
    if any(comments):
        notes.append(f"{name}: {'a comment was' if len(comments) == 1 else 'comments were'} left out: {quoted_list(comments)}")
    plain, footnotes = _without_footnotes(_COMMENT.sub(lambda found: "\n" * found[0].count("\n"), text))
    # Quotations are unmarked in `_escape_doubtful_marks`, which can tell them from comparisons; "[Dose]: 5 mg" is no address.
    source = _escape_doubtful_marks(plain)
    markdown = MarkdownIt("commonmark", {"maxNesting": _NESTING}).enable("table")
    markdown.disable(["html_inline", "html_block", "autolink", "blockquote", "reference"])
    blocks: list[Block] = []
    for block in _blocks(markdown.parse(source), source.split("\n")):
        blocks += with_footnotes(in_one_line(_with_note_marks(block, footnotes)), footnotes)
    return Document(name, tuple(blocks), tuple(notes))


def _blocks(tokens: Sequence[Any], lines: Sequence[str]) -> Iterator[Block]:
    level = above = items = 0
    numbers: list[int | None] = []  # of the lists around, the number of the next item; None where items have a bullet
    mark = ""  # of the item that begins
    underlined = False
    table: list[list[Cell]] | None = None
    for number, token in enumerate(tokens):
        where = f"line {token.map[0] + 1}" if token.map else ""
        if token.type == "heading_open":
            level, underlined = int(token.tag[1:]), token.markup in ("-", "=")
        elif token.type == "heading_close":
            level = 0
        elif token.type in ("ordered_list_open", "bullet_list_open"):
            start = token.attrGet("start")  # 0 too
            numbers.append((1 if start is None else int(start)) if token.type == "ordered_list_open" else None)
        elif token.type in ("ordered_list_close", "bullet_list_close"):
            numbers.pop()
        elif token.type in ("list_item_open", "list_item_close"):
            items += token.nesting
            if token.nesting > 0:
                mark = "" if numbers[-1] is None else f"{numbers[-1]}{token.markup} "
                numbers[-1] = None if numbers[-1] is None else numbers[-1] + 1
        elif token.type == "table_open":
            table, places, headers = [], [], 0
        elif token.type == "tr_open" and table is not None:
            row, cells = token.map[0] if token.map else -1, list[Cell]()
        elif token.type == "tr_close" and table is not None:
            held = re.sub(r"^\s*\|?|(?<!\\)\|?\s*$", "", lines[row]) if row >= 0 else ""
            beyond = re.split(r"(?<!\\)\|", held)[len(cells) :]  # a row may have more than the first one
            said_beyond = [_text(cell.replace("\\|", "|").strip()) for cell in beyond]
            table.append([*cells, *(Cell(said, len(cells) + place) for place, said in enumerate(said_beyond))])
            places.append(f"line {row + 1}" if row >= 0 else "")
        elif token.type == "thead_close" and table is not None:
            headers = int(any(cell.text for cell in table[0]))
        elif token.type == "table_close" and table is not None:
            yield from (replace(block, depth=items) for block in table_blocks(table, places, headers))
            table = None
        elif token.type == "inline" and table is not None:
            cells.append(Cell(_text(_inline(token.children or ())), len(cells), bold=_is_bold(token)))
        elif token.type == "inline":
            said = _text(_inline(token.children or ()))
            # A line of "---" under a sentence was meant to part it from the next.
            is_sentence = underlined and (SENTENCE_END.search(said) or reads_as_sentence(said)) and not said.endswith(("?", "？"))
            if level and not is_sentence:
                above = level
                yield Block(said, level, where)
            elif not items and not level and _is_bold(token) and is_label(said):
                yield Block(said, above + 1, where)
            else:
                first = bool(items) and tokens[number - 2].type == "list_item_open"
                notes = (_HTML_TABLE,) if _HTML_CELL.search(token.content) else ()
                own = f"{mark}{said}" if first else said
                yield Block(own, 0, where, "item" if first else "paragraph", notes=notes, depth=items - first)
        elif token.type in ("fence", "code_block"):
            content = _text(token.content) if token.type == "code_block" else " ".join(f"{token.info} {token.content}".split())
            yield Block(content, 0, where, depth=items)


def _is_bold(token: Any) -> bool:
    """Whether all of a paragraph is bold."""
    kinds = [child.type for child in token.children or () if child.content.strip() or child.type != "text"]
    return len(kinds) > 2 and kinds[0] == "strong_open" and kinds[-1] == "strong_close" and kinds.count("strong_open") == 1


def _without_footnotes(text: str) -> tuple[str, dict[str, str]]:
    """The text without the footnotes that something refers to, and these by their names."""
    notes: dict[str, str] = {}
    referred = {found[1] for found in _REFERENCE.finditer(_FOOTNOTE.sub("", text))}

    def cut(found: re.Match[str]) -> str:
        if found[1] not in referred or found[1] in notes or not any(map(str.isalnum, found[2])):
            return found[0]
        notes[found[1]] = " ".join(found[2].split())
        return "\n" * found[0].count("\n")

    return _FOOTNOTE.sub(cut, text), notes


def _with_note_marks(block: Block, notes: Mapping[str, str]) -> Block:
    def marked(text: str) -> str:
        return _REFERENCE.sub(lambda found: f"{NOTE}{found[1]}{NOTE}" if found[1] in notes else found[0], text)

    return replace(block, text=marked(block.text), stem=marked(block.stem), notes=tuple(map(marked, block.notes)))


def _inline(children: Any) -> str:
    said = ""
    for token in children:
        if token.type in ("softbreak", "hardbreak"):
            said += " "
        elif token.type in ("text", "code_inline"):
            said += token.content
        elif token.type == "image":
            said += f" {token.content} {token.attrs.get('title', '')} "
        elif token.type == "link_open" and token.attrs.get("title"):
            said += f"({token.attrs['title']}) "
    return said


def _text(said: str) -> str:
    """One line without tags, in which superscripts are marked: of 10<sup>9</sup> and Pandoc's 10^9^."""

    def kept(found: re.Match[str]) -> str:
        closing, tag = found[1], found[2].lower()
        if tag == "sup":
            return LOWERED if closing else RAISED
        return " " if tag in _APART.split() else ""

    return " ".join(_PANDOC_RAISED.sub(rf"{RAISED}\1{LOWERED}", _TAG.sub(kept, said)).split())


def _escape_doubtful_marks(text: str) -> str:
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
                said = re.sub(r"(?<=[A-Za-z0-9/])\*(?=\d)", r"\\*", said)  # HLA-B*57:01, *2/*2
        quoting = quoting and bool(line.strip())
        made.append(said)
        before = said
    return "\n".join(made)
