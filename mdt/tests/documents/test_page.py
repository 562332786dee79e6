"""Pages laid out by a program: columns in their order, tables with and without rules, boxes, and what only looks like one."""

import io
from collections.abc import Sequence
from typing import Any

import pytest
from gatewise_mdt.documents.document import Block, Document
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


def test_cells_of_several_lines_are_read_whole_wherever_they_stand_in_their_row() -> None:
    told = "If the saturation is below 90 per cent, give more oxygen and call the team of the intensive care unit to the bed."
    rows = [[p("Step 1"), p("Give oxygen."), p("A")], [p("Step 2"), p(told), p("B")], [p("Step 3"), p(f"Wait. {told}"), p("C")]]
    for place in ("TOP", "MIDDLE"):
        document = read([Table(rows, colWidths=[80, 200, 60], style=[("VALIGN", (0, 0), (-1, -1), place)])])
        assert texts(document) == ["Step 1: Give oxygen. A", f"Step 2: {told} B", f"Step 3: Wait. {told} C"]
        assert document.notes == ()


def test_rows_that_stand_close_are_not_taken_for_lines_of_one_cell() -> None:
    close = [
        ("TOPPADDING", (0, 0), (-1, -1), 0),
        ("BOTTOMPADDING", (0, 0), (-1, -1), 0),
        ("FONTNAME", (0, 0), (-1, 0), "Helvetica-Bold"),
    ]
    rows = [["Drug", "Dose"], ["morphine", "5 mg"], ["oxycodone", "2.5 mg"], ["fentanyl", "12 micrograms"]]
    assert texts(read([Table(rows, colWidths=[90, 90], rowHeights=[11] * 4, style=close)])) == [
        "Drug: morphine. Dose: 5 mg.",
        "Drug: oxycodone. Dose: 2.5 mg.",
        "Drug: fentanyl. Dose: 12 micrograms.",
    ]


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


def test_words_of_a_table_that_lie_in_no_cell_are_kept() -> None:
    rows = [["Never", "Dose", "Duration"], ["colchicine", "0.5 mg", "6 days"], ["naproxen", "500 mg", "5 days"]]
    said = ["Never: colchicine. Dose: 0.5 mg. Duration: 6 days.", "Never: naproxen. Dose: 500 mg. Duration: 5 days."]
    corner = [("GRID", (1, 0), (-1, -1), 0.5, colors.black), ("GRID", (0, 1), (-1, -1), 0.5, colors.black)]
    left = [("GRID", (0, 0), (-1, 0), 0.5, colors.black), ("GRID", (1, 0), (-1, -1), 0.5, colors.black)]
    for lines in (corner, left):
        assert texts(read([p(LONG), Table(rows, colWidths=[100] * 3, style=lines), p(LONG)])) == [LONG, *said, LONG]
    # What runs over columns is no cell's.
    running = [
        [p("Never give two of them, and none of them in pregnancy or to infants."), "", "Dose"],
        ["colchicine", "daily", "5 mg"],
    ]
    lines = [("SPAN", (0, 0), (1, 0)), ("GRID", (2, 0), (-1, -1), 0.5, colors.black), ("GRID", (0, 1), (-1, -1), 0.5, colors.black)]
    found = texts(read([p(LONG), Table(running, colWidths=[100] * 3, style=lines), p(LONG)]))
    assert "Never give two of them, and none of them in pregnancy or to infants." in found
    assert sum("5 mg" in text for text in found) == 1


def test_notes_say_headers_with_their_footnotes_and_without_the_marks_of_what_is_raised() -> None:
    raised = "<super rise=3 size=5>{}</super>".format
    rows = [["Drug", p(f"Dose per m{raised(2)}"), p(f"Never{raised(1)}")], ["colchicine", "0.5 mg", ""], ["naproxen", "5 mg", ""]]
    small = ParagraphStyle("small", fontSize=7)
    blocks = read([p(LONG), Table(rows, colWidths=[100] * 3, style=GRID), p(f"{raised(1)}In pregnancy.", small)]).blocks
    assert [block.text for block in blocks[1:]] == [
        f"Drug: {row}." for row in ("colchicine. Dose per m2: 0.5 mg", "naproxen. Dose per m2: 5 mg")
    ]
    assert blocks[1].stem == "Drug: colchicine."
    assert blocks[1].notes == (
        'the first row of the table was taken for its headers: "Drug", "Dose per m2", "Never (footnote: In pregnancy.)"',
        'headers of the table were left out, as nothing stands under: "Never (footnote: In pregnancy.)"',
    )


def test_a_frame_makes_a_box_and_a_frame_around_the_page_none() -> None:
    inner = Table([[[p("Red flags"), p("Call the team."), p("Do not wait.")]]], colWidths=[200], style=GRID)
    story = [p("Adults", HEAD), p("Give oxygen."), inner, p("Then wait.")]
    assert texts(read(story)) == ["Adults", "Give oxygen.", "Red flags:", "Call the team.", "Do not wait.", "Then wait."]
    framed = Table([[story]], colWidths=[490], rowHeights=[700], style=GRID)
    assert read([framed]).blocks[0] == Block("Adults", 1, "page 1")


def test_a_heading_at_the_left_of_what_comes_below_two_columns_stays_with_it() -> None:
    frames = [(50, 420, 240, 370), (305, 420, 240, 370), (50, 50, 495, 370)]
    story: list[Any] = [
        p(f"Left {LONG}"),
        p(f"More at the left {LONG}"),
        p(f"Last at the left {LONG}"),
        p("3 Doses", HEAD),
        FrameBreak(),
    ]
    story += [p(f"Right {LONG}"), p(f"More at the right {LONG}"), p(f"The last {LONG}"[:330]), FrameBreak()]
    story += [Table([["Drug", "Dose", "Note"], ["naproxen", "250 mg", "with food"]], colWidths=[165] * 3, style=GRID)]
    said = texts(read(story, frames))
    assert [text.split()[0] for text in said] == ["Left", "More", "Last", "Right", "More", "The", "3", "Drug:"]


def test_a_table_without_rules_goes_on_over_a_page_even_in_a_cell() -> None:
    long = "after two weeks, and then every four weeks until the uric acid has been below the target for as long as half a year"
    rows = [[p("Risk", HEAD), p("Visit", HEAD), p("Blood test", HEAD)], [p("low"), p("after 3 months"), p("once")]]
    rows += [[p("high"), p(long), p("each time")]]
    table = Table(rows, colWidths=[60, 190, 50], style=[("VALIGN", (0, 0), (-1, -1), "MIDDLE")])
    blocks = read([Table([[""]], rowHeights=[670]), table]).blocks
    assert [(block.text, block.where) for block in blocks] == [
        ("Risk: low. Visit: after 3 months. Blood test: once.", "page 1"),
        (f"Risk: high. Visit: {long}. Blood test: each time.", "page 2"),
    ]
