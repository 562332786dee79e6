"""The corpus: documents of ours in the shapes of real guidelines, each with what must be found in it.

A JSON file beside each document says, for the passages that matter: the headings above it, the population, pieces of the text that
the model reads, in their order, what must not stand in it, and its notes; and for the whole document what must be in some passage
("all"), what must be in none ("never"), and its notes. The Word documents were made with python-docx, the PDFs with reportlab.
"""

import hashlib
import itertools
import json
from pathlib import Path

import pytest
from gatewise_mdt.documents.passages import Passage, split_passages
from gatewise_mdt.documents.reading import read_document

CORPUS = Path(__file__).parent / "corpus"
NAMES = sorted(path.stem for path in CORPUS.glob("*.json"))


def file_of(name: str) -> Path:
    (found,) = (path for path in CORPUS.glob(f"{name}.*") if path.suffix != ".json")
    return found


def in_order(pieces: list[str], text: str) -> bool:
    at = 0
    for piece in pieces:
        at = text.find(piece, at)
        if at < 0:
            return False
        at += len(piece)
    return True


@pytest.mark.parametrize("name", NAMES)
def test_what_must_be_found_is_found(name: str) -> None:
    path = file_of(name)
    expected = json.loads((CORPUS / f"{name}.json").read_text(encoding="utf-8"))
    document = read_document(path)
    passages = split_passages(document)
    for wanted in expected["passages"]:
        fits = [
            one
            for one in passages
            if in_order(wanted.get("says", []), one.text)
            and one.headings == tuple(wanted.get("headings", one.headings))
            and one.population == wanted.get("population", one.population)
            and not any(piece in one.text for piece in wanted.get("lacks", []))
            and all(any(note in said for said in one.notes) for note in wanted.get("notes", []))
        ]
        assert fits, wanted
    texts = [one.text for one in passages]
    for piece in expected.get("all", []):
        assert any(piece in text for text in texts), piece
    for piece in expected.get("never", []):
        assert not any(piece in text for text in texts), piece
    for note in expected["notes"]:
        assert any(note in said for said in document.notes), note


def letters(text: str) -> str:
    """Without what stands between the pieces of a passage: spaces, full stops, ends of lines."""
    return "".join(filter(str.isalnum, text))


@pytest.mark.parametrize("most", [None, 120])
@pytest.mark.parametrize("name", NAMES)
def test_offsets_are_of_what_the_passage_says_itself(name: str, most: int | None) -> None:
    """Before it come headings, and what is said again; and nothing of the document is in two passages."""
    path = file_of(name)
    document = read_document(path)
    found = split_passages(document, most=most)
    for one in found:
        own = letters(document.text[one.start : one.end])
        assert own
        assert letters(one.passage).endswith(own)
        before = letters(one.passage).removesuffix(own)
        assert said_before(one, before), before
    by_place = sorted((one.start, one.end) for one in found)
    assert all(first[1] <= second[0] for first, second in itertools.pairwise(by_place))
    assert {one.origin("x")["sha256"] for one in found} == {hashlib.sha256(path.read_bytes()).hexdigest()}


def said_before(one: Passage, before: str) -> bool:
    """Whether headings or, with a note, something said again is all that stands before a passage's own text."""
    left = before
    for heading in one.headings:
        plain = letters(heading).lstrip("0123456789.一二三四五六七八九十")
        left = left.replace(plain, "", 1)
    return not left or any("said again" in note for note in one.notes)
