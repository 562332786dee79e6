"""The corpus: documents of ours in the shapes of real guidelines, each with what must be found in it.

A JSON file beside each document says, for the passages that matter: the headings above it, the population, pieces of the text that
the model reads, in their order, what must not stand in it, and its notes; and for the whole document what must be in some passage
("all"), what must be in none ("never"), and its notes.
"""

import importlib.util
import json
from pathlib import Path

import pytest

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
