"""Documents of every kind, made here and read back; passages with their populations; and what is said of bad ones."""

import io
import os
from pathlib import Path

import pytest
from gatewise_mdt.documents.headings import population_mark
from gatewise_mdt.documents.passages import Passage, split_passages
from gatewise_mdt.documents.reading import document_of, documents_in, read_document
from mdt_models import pdf

from gatewise.errors import GatewiseError

FLARE = "For an acute flare, give colchicine 0.5 mg twice daily."
MARKDOWN = f"""# Gout

About the disease, in a few words.

## Adults with gout

{FLARE}
If the kidneys *fail*, give prednisolone:

- 30 mg daily
- for **five** days

### 1.2 Treatment

Without a flare, check `uric acid`.

| Drug | Dose |
|---|---|
| colchicine | 0.5 mg |
"""


def passages(path: Path, **settings: object) -> list[Passage]:
    return split_passages(read_document(path), **settings)  # type: ignore[arg-type]


def test_plain_text_has_a_population_before_the_at_sign_or_under_a_heading(tmp_path: Path) -> None:
    file = tmp_path / "gout.txt"
    file.write_text(
        f"adults with gout@{FLARE}\nadults with asthma@Give salbutamol when needed.\n\n"
        "2. Children with gout\n\nGive\r\nnaproxen to them.\nWrite to me@example.org for more.\n"
    )
    first, second, third = passages(file)
    assert first.text == f"adults with gout@{FLARE}"
    assert second.text == "adults with asthma@Give salbutamol when needed."
    assert third.population == "Children with gout"
    assert third.passage.startswith("Give naproxen to them. Write to me@example.org")
    assert {one.population for one in passages(file, population="everyone")} == {"everyone"}


def test_a_pdf_comes_back_as_it_was_written(tmp_path: Path) -> None:
    pytest.importorskip("pypdf")
    lines = (
        "For an acute flare with normal kidneys, give colchicine twice daily, or non-\nsteroidal drugs that inflam-\nmation needs."
    )
    file = tmp_path / "gout.pdf"
    file.write_bytes(pdf(*(f"House guideline\n\n\nAdults with gout {n}\n{lines}{chr(10) * 48}Page {n} of 3" for n in "123")))
    found = passages(file)
    assert [one.population for one in found] == ["Adults with gout 1", "Adults with gout 2", "Adults with gout 3"]
    assert found[1].where == "page 2"
    assert found[0].passage == lines.replace("non-\n", "non-").replace("inflam-\n", "inflam").replace("\n", " ")


def test_standard_input_is_text_or_markdown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(f"# Adults with gout\n{FLARE}".encode())))
    document = read_document("-")
    assert document.name == "stdin"
    assert split_passages(document)[0].text == f"Adults with gout@{FLARE}"


def locked() -> bytes:
    pypdf = pytest.importorskip("pypdf")
    writer = pypdf.PdfWriter(io.BytesIO(pdf(FLARE)))
    writer.encrypt("secret", algorithm="RC4-128")
    made = io.BytesIO()
    writer.write(made)
    return made.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("x.txt", b" \n ", "is empty"),
        ("x.txt", b"12. 34", "has no words"),
        ("x.txt", "é".encode("latin-1"), "not UTF-8 text (byte 1)"),
        ("x.txt", b"a\x00b", "zero bytes"),
        ("x.rtf", b"x", "ends in '.rtf', expected .txt, .md, .html, .pdf or .docx"),
        ("x.pdf", b"%PDF-1.4 and nothing", "cannot be read as PDF"),
        ("x.pdf", pdf("", ""), "has no text on its 2 pages, as scanned pages have none: run text recognition (OCR) over it first"),
        ("x.pdf", None, "locked with a password"),
        ("x.docx", b"PK and nothing", "cannot be read as DOCX"),
        (
            "x.doc",
            b"x",
            "x.doc is in the old format of Word (.doc), which is not read: open it in Word or LibreOffice, and save it as",
        ),
        ("x.docx", b"\xd0\xcf\x11\xe0", "old format of Word, or locked with a password: open it"),
        ("x.txt", "Größe über Müller".encode("latin-1"), "not UTF-8 text (byte 3)"),
        ("x.txt", b"\xff\xfeabc", "not UTF-16-LE text"),
        ("x.md", b"# Only a heading", "has no passage"),
    ],
)
def test_what_cannot_be_read_is_said_in_a_sentence(tmp_path: Path, name: str, content: bytes | None, said: str) -> None:
    file = tmp_path / name
    file.write_bytes(locked() if content is None else content)
    with pytest.raises(GatewiseError) as raised:
        passages(file)
    assert said in str(raised.value)
    assert name in str(raised.value)


def test_text_that_is_turned_round_is_noted() -> None:
    document = document_of("Give \u202e05\u202c mg.\n\nRest.".encode(), "a.txt", ".txt")
    (note,) = document.notes
    assert note.startswith(
        "a.txt has invisible signs that turn its text round (U+202E and the like); it is read in the order of the file: "
    )
    assert note.endswith("(line 1)")


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(GatewiseError, match="there is no such file"):
        read_document(tmp_path / "none.txt")
    with pytest.raises(GatewiseError, match="cannot be read"):
        read_document(tmp_path)


@pytest.mark.parametrize(
    ("text", "at"),
    [
        ("adults@Give", 6),
        ("adults with gout @ If", 17),
        ("Infantile cholestasis @ In cases of fever, stop.", 22),
        ("患者@给药", 2),
        ("输尿管结石患者@结石直径小于0.4cm的患者", 7),
        ("me@example.org", -1),
        ("no mark", -1),
        ("@x", -1),
        ("Amitriptyline 10 mg @ night for adults with pain", -1),
        ("Adults take amitriptyline @ night", -1),
        ("amitriptyline 10mg@night", -1),
        ("If SpO2@rest is below 90%, give oxygen", -1),
    ],
)
def test_an_address_or_a_dose_names_no_population(text: str, at: int) -> None:
    assert population_mark(text) == at


def test_what_in_a_folder_is_no_document(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Give water.")
    (tmp_path / "~$b.docx").write_bytes(b"lock")
    (tmp_path / "c.txt").mkdir()
    (tmp_path / "d.txt").symlink_to(tmp_path / "nowhere")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "e.txt")  # which would be read for ever
    assert documents_in([tmp_path]) == [tmp_path / "a.txt", tmp_path / "d.txt"]


@pytest.mark.parametrize(
    ("name", "content", "note"),
    [
        ("a.txt", f"患者{FLARE}".encode("utf-16"), "a.txt was read as UTF-16-LE, by the mark at its beginning"),
        ("a.md", b"\xfe\xff" + f"患者{FLARE}".encode("utf-16-be"), "a.md was read as UTF-16-BE, by the mark at its beginning"),
        (
            "a.txt",
            "患者停用华法林。".encode("gb18030"),
            "a.txt was read as GB18030, as it is no UTF-8: look whether its letters are right",
        ),
        ("a.htm", "<meta charset=gb2312>患者停用".encode("gbk"), "a.htm was read as GB18030, as it says itself"),
        ("a.html", "<meta charset='latin1'>Café".encode("cp1252"), "a.html was read as CP1252, as it says itself"),
        ("a.txt", "患者".encode("utf-8-sig"), None),
    ],
)
def test_other_encodings_are_told_by_their_marks_and_noted(name: str, content: bytes, note: str | None) -> None:
    document = document_of(content, name, Path(name).suffix)
    assert document.notes == ((note,) if note else ())
    assert any(said in document.text for said in ("患者", FLARE, "Café"))
