"""PDF read into lines, with notes of what no reader of text sees: scanned pages and pictures."""

import io
import logging
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from gatewise.errors import GatewiseError, reason_of
from gatewise.mdt.documents.document import Document
from gatewise.mdt.documents.plain_text import paragraphs, without_margins

_SCANNED = 20  # fewer letters than these on a page are a page number or a stamp
_PICTURE = 100  # pixels of the shorter side; what is smaller is an icon or a rule
_HIDDEN_TEXT = re.compile(rb"(?<![\d.])3\s+Tr\b")  # as text recognition lays over the picture that it has read
_DRAWN = re.compile(rb"/([^\s/()<>\[\]{}%]+)\s+Do\b")


def read_pdf(content: bytes, name: str) -> Document:
    """Reads the text of a PDF.

    Raises:
        ImportError: pypdf (extra ``mdt``) is not installed.
        GatewiseError: the file is damaged, locked, or has no text but pictures of it.
    """
    import pypdf

    log = logging.getLogger("pypdf")
    level = log.level
    log.setLevel(logging.CRITICAL)  # it tells of every small damage that it gets over
    try:
        reader = pypdf.PdfReader(io.BytesIO(content))
        # Many files are locked with an empty password, against printing only.
        if reader.is_encrypted and not reader.decrypt(""):
            raise GatewiseError(f"{name} is locked with a password: save it without one")
        pages = [page.extract_text() or "" for page in reader.pages]
        pictured = _pictured(reader)
    except GatewiseError:
        raise
    except Exception as error:  # a damaged file fails in as many ways as there are damages
        raise GatewiseError(f"{name} cannot be read as PDF ({reason_of(error, 150)}): save or download it again") from error
    finally:
        log.setLevel(level)
    scanned = [number for number, page in enumerate(pages, start=1) if _letters(page) < _SCANNED]
    if len(scanned) == len(pages):
        raise GatewiseError(
            f"{name} has no text on its {len(pages)} {'page' if len(pages) == 1 else 'pages'}, as scanned pages have none: run text"
            " recognition (OCR) over it first"
        )
    notes = []
    if scanned:
        notes.append(
            f"{name} has no text, or next to none, on {_spans(scanned)} of {len(pages)}, as scanned pages have none: run text"
            " recognition (OCR) over it if they matter"
        )
    if others := [number for number in pictured if number not in scanned]:
        notes.append(
            f"{name} has pictures on {_spans(others)} of {len(pages)}, which were not read: if they show text, such as a flow"
            " chart, run text recognition (OCR) over it"
        )
    lines, left_out = without_margins(
        [[(f"page {number}", line) for line in page.split("\n") if line.strip()] for number, page in enumerate(pages, start=1)],
        name,
    )
    return Document(name, tuple(paragraphs(lines, printed=True)), (*notes, *left_out))


def _pictured(reader: Any) -> list[int]:
    """The pages with a picture of their own: not a logo, which is on several, nor one whose text has been recognised."""
    found = []
    for page in reader.pages:
        try:
            contents = page.get_contents()
            drawing = contents.get_data() if contents is not None else b""
            found.append(set() if _HIDDEN_TEXT.search(drawing) else set(_pictures(page, drawing)))
        except Exception:  # its text was read all the same
            found.append(set())
    times = Counter(picture for pictures in found for picture in pictures)
    return [number for number, pictures in enumerate(found, start=1) if any(times[picture] == 1 for picture in pictures)]


def _pictures(holder: Any, drawing: bytes, depth: int = 0) -> Iterator[tuple[int, int]]:
    """The pictures that a page draws, or a form on it, by the numbers of their objects; pages may share what they could draw."""
    resources = holder.get("/Resources")
    known = resources.get_object().get("/XObject") if resources else None
    if known is None:
        return
    known = known.get_object()
    for name in {f"/{name.decode('latin-1')}" for name in _DRAWN.findall(drawing)} & known.keys():
        reference, drawn = known.raw_get(name), known[name]
        if drawn.get("/Subtype") == "/Image":
            if min(int(drawn["/Width"]), int(drawn["/Height"])) >= _PICTURE:
                yield reference.idnum, reference.generation
        elif depth < 4:  # forms in forms, which could also go round in a circle
            yield from _pictures(drawn, drawn.get_data(), depth + 1)


def _letters(page: str) -> int:
    """Letters of a page; a Chinese character says about as much as three."""
    return sum(3 if character >= "\u3400" else 1 for character in page if character.isalpha())


def _spans(numbers: Sequence[int]) -> str:
    """Numbers of pages as people write them: "pages 2-5, 7"."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][-1] + 1:
            spans[-1] = [spans[-1][0], number]
        else:
            spans.append([number])
    said = ", ".join("-".join(map(str, span)) for span in spans)
    return f"{'page' if len(numbers) == 1 else 'pages'} {said}"
