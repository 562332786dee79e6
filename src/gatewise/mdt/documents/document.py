"""What a document says: headings and paragraphs with their places, and the sections that they make."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest


@dataclass(frozen=True)
class Block:
    """A heading or a paragraph.

    Attributes:
        level: of a heading, from 1; 0 for a paragraph.
        where: its place, such as "line 12" or "page 3".
    """

    text: str
    level: int = 0
    where: str = ""


@dataclass(frozen=True)
class Document:
    """What a file says.

    Attributes:
        name: the file as it was given; "stdin" for "-".
        notes: what could not be read or was left out, a whole sentence each that names the file.
    """

    name: str
    blocks: tuple[Block, ...]
    notes: tuple[str, ...] = ()


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


def listed(texts: Sequence[str], places: Sequence[str] = (), most: int = 20) -> str:
    """Texts in quotation marks, long ones shortened, with their places if given, and the number of those that are not shown."""
    said = [f'"{text[:80]}{"…" if len(text) > 80 else ""}"' for text in texts[:most]]
    said = [f"{one} ({place})" if place else one for one, place in zip_longest(said, places[:most], fillvalue="")]
    return ", ".join(said) + (f" and {len(texts) - most} more" if len(texts) > most else "")
