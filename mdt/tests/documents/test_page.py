"""Pages laid out by a program: columns in their order, tables with and without rules."""

import io
from collections.abc import Sequence
from typing import Any

import pytest
from gatewise_mdt.documents.document import Document
from gatewise_mdt.documents.reading import document_of

pytest.importorskip("reportlab")
from reportlab.lib import colors
from reportlab.lib.styles import ParagraphStyle
from reportlab.platypus import BaseDocTemplate, Frame, FrameBreak, PageTemplate, Paragraph, Table

BODY = ParagraphStyle("body", fontSize=9, leading=11, spaceAfter=4)
HEAD = ParagraphStyle("head", fontName="Helvetica-Bold", fontSize=12, leading=15)
BAND = ParagraphStyle("band", parent=HEAD, backColor=colors.lightblue)
GRID = [("GRID", (0, 0), (-1, -1), 0.5, colors.black)]
LONG = (
    "the patient is asked about pain, fever and swelling at each visit, and the answers are written down in the record by the"
    " nurse on duty, who tells the doctor."
)
ONE = [(50, 50, 495, 740)]


def p(text: str, style: ParagraphStyle = BODY) -> Paragraph:
    return Paragraph(text, style)


def read(story: Sequence[Any], frames: Sequence[tuple[float, float, float, float]] = ONE) -> Document:
    made = io.BytesIO()
    document = BaseDocTemplate(made)
    document.addPageTemplates([PageTemplate("page", [Frame(*frame, leftPadding=0, rightPadding=0) for frame in frames])])
    document.build(list(story))
    return document_of(made.getvalue(), "a.pdf", ".pdf")


def texts(document: Document) -> list[str]:
    return [block.text for block in document.blocks]


@pytest.mark.parametrize("count", [2, 3])
def test_columns_are_read_one_after_the_other_below_what_stands_over_them(count: int) -> None:
    width, gap = (495 - (count - 1) * 12) / count, 12
    frames = [(50, 720, 495, 60), *((50 + number * (width + gap), 50, width, 660) for number in range(count))]
    story: list[Any] = [p("Gout in adults and children", HEAD)]
    for number in range(count):
        story += [FrameBreak(), p(f"{number} Part", BAND), *(p(f"In part {number}.{place} {LONG}") for place in range(4))]
        story.append(Table([["Drug", "Dose"], [f"drug {number}", "5 mg"]], colWidths=[70, 60], style=GRID))
        story += [p(f"In part {number}.{place} {LONG}") for place in range(4, 7)]
    expected = ["Gout in adults and children"]
    for number in range(count):
        said = [f"In part {number}.{place} {LONG}" for place in range(7)]
        expected += [f"{number} Part", *said[:4], f"Drug: drug {number}. Dose: 5 mg.", *said[4:]]
    assert texts(read(story, frames)) == expected


def test_cells_over_columns_and_rows_keep_their_headers() -> None:
    rows = [
        ["Drug", "Adults", "", "Children"],
        ["", "oral", "i.v.", ""],
        ["amoxicillin", "500 mg", "1 g", "40 mg/kg"],
        ["Penicillin allergy", "", "", ""],
        ["doxycycline", "100 mg", "100 mg", "do not give"],
    ]
    spans = [("SPAN", (1, 0), (2, 0)), ("SPAN", (0, 0), (0, 1)), ("SPAN", (3, 0), (3, 1)), ("SPAN", (0, 3), (3, 3))]
    blocks = read([Table(rows, colWidths=[100] * 4, style=[*GRID, *spans])]).blocks
    assert [block.text for block in blocks] == [
        "Drug: amoxicillin. Adults, oral: 500 mg. Adults, i.v.: 1 g. Children: 40 mg/kg.",
        "Penicillin allergy. Drug: doxycycline. Adults, oral: 100 mg. Adults, i.v.: 100 mg. Children: do not give.",
    ]


def test_a_table_without_rules_is_read_by_rows() -> None:
    rows = [["Drug", "Dose"], ["morphine", "5 mg"], ["oxycodone", "2.5 mg"]]
    blocks = read([p(LONG), Table(rows, colWidths=[90, 90]), p(LONG)]).blocks
    assert [block.text for block in blocks] == [LONG, "Drug: morphine. Dose: 5 mg.", "Drug: oxycodone. Dose: 2.5 mg.", LONG]
    assert [len(block.notes) for block in blocks] == [0, 1, 1, 0]
    assert blocks[1].notes[0].startswith("the first row of the table was taken for its headers")


def test_words_in_a_frame_and_outside_the_cells_of_a_table_are_kept() -> None:
    rows = [["Never", "Dose"], ["colchicine", "0.5 mg"]]
    corner = [("GRID", (1, 0), (-1, -1), 0.5, colors.black), ("GRID", (0, 1), (-1, -1), 0.5, colors.black)]
    inner = Table([[[p("Red flags"), p("Call the team."), p("Do not wait.")]]], colWidths=[200], style=GRID)
    story = [p("Adults", HEAD), p("Give oxygen."), inner, p("Then wait."), Table(rows, colWidths=[100] * 2, style=corner)]
    said = " ".join(texts(read([Table([[story]], colWidths=[490], rowHeights=[700], style=GRID)])))
    for words in ("Adults Give oxygen. Red flags Call the team. Do not wait. Then wait.", "Never", "Dose", "colchicine 0.5 mg"):
        assert words in said
