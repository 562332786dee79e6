"""Markdown read so that no word of it is lost: what is no certain markup is text ("ALT <ULN and eGFR> 30" has no tags)."""

import re
from typing import Any
from urllib.parse import unquote

from gatewise.mdt.documents.document import Block, Document, listed
from gatewise.mdt.documents.headings import SENTENCE_END, reads_as_sentence

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
_QUOTED = re.compile(r"\s{0,3}>")
# "> 140/90" and "> ULN" are comparisons at the beginning of a line.
_QUOTE = re.compile(r"(\s{0,3})>\s?(?!\s*(?:[=\d.]|[A-Z]{2,6}\b))")
_NESTING = 200  # of lists; deeper ones would be left out


def read_markdown(text: str, name: str) -> Document:
    """Headings, paragraphs, list items and rows of tables.

    Raises:
        ImportError: markdown-it-py is not installed.
    """
    from markdown_it import MarkdownIt

    notes: list[str] = []
    source = _certain(_without_comments(text, name, notes))
    # Quotations are unmarked in `_certain`, which can tell them from comparisons.
    markdown = MarkdownIt("commonmark", {"maxNesting": _NESTING}).enable("table")
    markdown.disable(["html_inline", "html_block", "autolink", "blockquote"])
    found: dict[str, Any] = {}
    tokens = markdown.parse(source, found)
    references = [*found.get("references", {}).values(), *found.get("duplicate_refs", ())]
    if not all(_ADDRESS.fullmatch(one["href"]) and not one["title"] for one in references):  # "[Dose]: 5mg" is no address
        tokens = markdown.disable("reference").parse(source)
    return Document(name, tuple(_blocks(tokens, source)), tuple(notes))


def _blocks(tokens: list[Any], source: str) -> list[Block]:
    lines, tags = source.split("\n"), _paired(source)
    blocks: list[Block] = []
    level, in_table, row = 0, False, -1
    underlined = False
    cells: list[str] = []
    for token in tokens:
        where = f"line {token.map[0] + 1}" if token.map else ""
        if token.type == "heading_open":
            level, underlined = int(token.tag[1:]), token.markup in ("-", "=")
        elif token.type == "heading_close":
            level = 0
        elif token.type == "tr_open":
            cells, in_table, row = [], True, token.map[0] if token.map else -1
        elif token.type == "tr_close":
            in_table = False
            beyond = _cells(lines[row])[len(cells) :] if row >= 0 else []  # a row may have more than the first one
            said = " ".join(filter(None, [*cells, *(_text(cell, tags) for cell in beyond)]))
            blocks.append(Block(" ".join(said.split()), 0, f"line {row + 1}" if row >= 0 else ""))
        elif token.type == "inline":
            said = _text(_inline(token.children or ()), tags)
            if in_table:
                cells.append(said)
                continue
            # A line of "---" under a sentence was meant to part it from the next.
            is_sentence = underlined and (SENTENCE_END.search(said) or reads_as_sentence(said))
            blocks.append(Block(said, 0 if is_sentence else level, where))
        elif token.type in ("fence", "code_block"):
            named = token.info if " " in token.info.strip() else ""
            content = _text(token.content, tags) if token.type == "code_block" else " ".join(token.content.split())
            blocks.append(Block(f"{named} {content}".strip(), 0, where))
    return blocks


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


def _cells(line: str) -> list[str]:
    return [cell.replace("\\|", "|").strip() for cell in re.split(r"(?<!\\)\|", re.sub(r"^\s*\|?|(?<!\\)\|?\s*$", "", line))]


def _without_comments(text: str, name: str, notes: list[str]) -> str:
    comments = [" ".join(one.split()) for one in _COMMENT.findall(text)]
    if any(comments):
        notes.append(f"{name}: {'a comment was' if len(comments) == 1 else 'comments were'} left out: {listed(comments)}")
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
