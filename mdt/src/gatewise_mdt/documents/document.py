"""What a document says: headings, paragraphs, items of lists and rows of tables with their places, and the sections they make."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Literal

# No text of a document holds these: they stand around a superscript, and around the name of a footnote where it is referred to,
# until all of a paragraph is known.
RAISED, LOWERED, NOTE = "\x02", "\x03", "\x04"
_MARK = re.compile(rf"\s*{NOTE}([^{NOTE}]*){NOTE}")  # of a footnote
UNKNOWN = "\ufffd"
"""Stands for a sign that a document gives no meaning to."""
Kind = Literal["paragraph", "item", "row", "footnote"]


@dataclass(frozen=True)
class Block:
    """A heading, or a piece of the text.

    Attributes:
        level: of a heading, from 1; 0 for what is none.
        where: its place, such as "line 12" or "page 3".
        kind: of text: a paragraph, an item of a list, a row of a table, or a footnote, which stands after what refers to it.
        stem: of a row: its beginning, which is said again where the row does not fit into one passage.
        notes: what has to be known of how it was read, a sentence each.
    """

    text: str
    level: int = 0
    where: str = ""
    kind: Kind = "paragraph"
    stem: str = ""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Document:
    """What a file says.

    Attributes:
        name: the file as it was given; "stdin" for "-".
        notes: what could not be read or was left out, a whole sentence each that names the file.
        sha256: of the bytes that it was read from, in hexadecimal digits: which version of the file it is; empty where it was not
            read from any.
    """

    name: str
    blocks: tuple[Block, ...]
    notes: tuple[str, ...] = ()
    sha256: str = ""

    @property
    def text(self) -> str:
        """The text as gatewise reads it: the blocks' texts, a line each.

        Offsets of passages count its characters (Unicode code points, as Python counts them), and not the bytes or characters of
        the file: marks of Markdown, the layout of a PDF and the like are not in it, and a row of a table reads "header: cell".
        """
        return "\n".join(block.text for block in self.blocks)


def sections(blocks: Sequence[Block]) -> Iterator[tuple[tuple[Block, ...], list[Block]]]:
    """The paragraphs directly under each heading, none for some, with the headings above them, the outermost first."""
    above: tuple[Block, ...] = ()
    held: list[Block] = []
    for block in blocks:
        if not block.level:
            held.append(block)
            continue
        if above or held:
            yield above, held
        above, held = (*(one for one in above if one.level < block.level), block), []
    if above or held:
        yield above, held


def with_footnotes(block: Block, notes: Mapping[str, str]) -> Iterator[Block]:
    """A block without the marks of footnotes, and then the footnotes that it refers to, a block each.

    A footnote that only a note of the block refers to is said in that note, for it is about nothing that the block says.
    """
    found = _MARK.findall(block.text)
    told = tuple(_MARK.sub(lambda mark: f" (footnote: {notes[mark[1]]})", note) for note in block.notes)
    text = " ".join(_MARK.sub("", block.text).split()) if found else block.text
    yield replace(block, text=text, stem=_MARK.sub("", block.stem), notes=told)
    for note in dict.fromkeys(found):
        kind = "脚注：" if re.search("[\u4e00-\u9fff]", notes[note]) else "Footnote: "
        yield Block(f"{kind}{notes[note]}", 0, block.where, "footnote")


def one_line(said: str) -> str:
    """One line of text; a superscript after a number is marked, as 10 to the 9th is not 109, and one that refers to a source."""
    joined = said.replace(LOWERED + RAISED, "")
    marked = re.sub(rf"(?<=\d){RAISED}(?=[-−–+]?\d)", "^", joined)
    # After a word or a full stop it is a reference, unless the word is a unit: "visits[3]", and "30 kg/m2".
    marked = re.sub(rf"([^\W\d_]{{3}}|[a-z)][.,;:?!]){RAISED}([\d,–-]+|[a-z]|[*†‡§¶]{{1,3}}){LOWERED}", r"\1[\2]", marked)
    return " ".join(marked.replace(RAISED, "").replace(LOWERED, "").split())


def quoted_list(texts: Sequence[str], places: Sequence[str] = (), most: int = 20) -> str:
    """Texts in quotation marks, long ones shortened, with their places if given, and the number of those that are not shown."""
    said = [f'"{text[:80]}{"…" if len(text) > 80 else ""}"' for text in texts[:most]]
    said = [f"{one} ({place})" if place else one for one, place in zip_longest(said, places[:most], fillvalue="")]
    return ", ".join(said) + (f" and {len(texts) - most} more" if len(texts) > most else "")
