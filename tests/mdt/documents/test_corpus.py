"""The corpus: documents of ours in the shapes of real guidelines, each with what must be found in it.

A JSON file beside each document says, for the passages that matter: the headings above it, the population, pieces of the text that
the model reads, in their order, what must not stand in it, and its notes; and for the whole document what must be in some passage
("all"), what must be in none ("never"), and its notes.
"""

import importlib.util
import json
from pathlib import Path

import pytest

from gatewise.mdt.documents.passages import split_passages
from gatewise.mdt.documents.reading import read_document

CORPUS = Path(__file__).parent / "corpus"
NAMES = sorted(path.stem for path in CORPUS.glob("*.json"))


def file_of(name: str) -> Path:
    (found,) = (path for path in CORPUS.glob(f"{name}.*") if path.suffix != ".json")
    return found


def test_the_corpus_is_whole_and_small() -> None:
    assert len(NAMES) == 20
    assert {file_of(name).suffix for name in NAMES} == {".md", ".txt", ".docx", ".pdf"}
    for name in NAMES:
        assert file_of(name).stat().st_size < 30_000
        expected = json.loads((CORPUS / f"{name}.json").read_text(encoding="utf-8"))
        assert expected["shape"]
        assert expected["passages"]


@pytest.mark.parametrize("kind", ["docx", "pdf"])
def test_each_document_has_its_maker(kind: str) -> None:
    pytest.importorskip({"docx": "docx", "pdf": "reportlab"}[kind])
    spec = importlib.util.spec_from_file_location(f"make_{kind}", CORPUS / f"make_{kind}.py")
    assert spec is not None
    assert spec.loader is not None
    makers = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(makers)
    assert set(makers.DOCUMENTS) == {name for name in NAMES if file_of(name).suffix == f".{kind}"}


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
    pytest.importorskip({".md": "markdown_it", ".txt": "re", ".docx": "docx", ".pdf": "pdfplumber"}[path.suffix])
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
