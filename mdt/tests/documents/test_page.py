"""Pages laid out by a program: columns in their order, tables with and without rules."""

import io
import re
from collections.abc import Sequence
from random import Random
from typing import Any

import pytest
from gatewise_mdt.documents.document import Document
from gatewise_mdt.documents.reading import document_of

pytest.importorskip("reportlab")
from reportlab.lib import colors
from reportlab.lib.styles import ParagraphStyle
from reportlab.pdfgen.canvas import Canvas
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


NONE: list[Any] = [("TOPPADDING", (0, 0), (-1, -1), 3)]
DOSES = [["Drug", "Dose"], ["morphine", "5 mg"], ["Oxycodone", "2.5 mg"], ["fentanyl", "12 micrograms"]]
READ = ["Drug: morphine. Dose: 5 mg.", "Drug: Oxycodone. Dose: 2.5 mg.", "Drug: fentanyl. Dose: 12 micrograms."]


def test_a_table_beside_a_column_of_text_is_read_before_it() -> None:
    """Its short lines stand beside lines of the other column, and its own gap is no white between columns of text."""
    frames = [(50, 50, 240, 740), (305, 50, 240, 740)]
    left = [p(LONG), Table(DOSES, colWidths=[90, 90], style=NONE), p(f"Then {LONG}")]
    right = [p(f"On the right {LONG}") for _ in range(3)]
    assert texts(read([*left, FrameBreak(), *right], frames)) == [LONG, *READ, f"Then {LONG}", *[f"On the right {LONG}"] * 3]


def test_columns_without_rules_between_rows_are_parted_into_rows() -> None:
    upright = [("BOX", (0, 0), (-1, -1), 0.5, colors.black), ("LINEBEFORE", (1, 0), (1, -1), 0.5, colors.black)]
    header = [("LINEBELOW", (0, 0), (-1, 0), 0.5, colors.black)]
    assert texts(read([p(LONG), Table(DOSES, colWidths=[90, 90], style=[*NONE, *upright, *header])])) == [LONG, *READ]


def test_words_that_touch_the_line_between_two_cells_are_parted_there() -> None:
    tight = [("LEFTPADDING", (0, 0), (-1, -1), 0.5), ("RIGHTPADDING", (0, 0), (-1, -1), 0.5), ("FONTSIZE", (0, 0), (-1, -1), 10)]
    rows = [["Drug", "Dose"], ["simvastatin", "800 g"], ["oxycodone", "2 mg"]]
    found = texts(read([p(LONG), Table(rows, colWidths=[51, 60], style=[*GRID, *tight])]))
    assert found[1:] == ["Drug: simvastatin. Dose: 800 g.", "Drug: oxycodone. Dose: 2 mg."]


def test_a_row_that_goes_on_in_the_next_column_is_joined_with_a_note() -> None:
    first = "Give 5 mg daily, and stop it at once if the patient has a rash or fever or if"
    rest = "the creatinine has doubled within two weeks, as it may in renal failure."
    header = [p("Drug", HEAD), p("What to do", HEAD), p("For", HEAD)]
    widths = [65, 130, 45]
    above = Table([header, [p("Colchicine"), p("Give 2 mg."), p("gout")], [p("Naproxen"), p(first), ""]], widths, style=NONE)
    below = Table([header, ["", p(rest), p("pain")], [p("Ibuprofen"), p("Give 400 mg."), p("pain")]], widths, style=NONE)
    frames = [(50, 50, 240, 740), (305, 50, 240, 740)]
    blocks = read([*(p(LONG) for _ in range(3)), above, FrameBreak(), below, *(p(LONG) for _ in range(3))], frames).blocks
    rows = [block for block in blocks if block.kind == "row"]
    assert [block.text for block in rows] == [
        "Drug: Colchicine. What to do: Give 2 mg. For: gout.",
        f"Drug: Naproxen. What to do: {first} {rest} For: pain.",
        "Drug: Ibuprofen. What to do: Give 400 mg. For: pain.",
    ]
    assert all(any("may go on over a page or a column" in note for note in block.notes) for block in rows)


def test_rows_that_cannot_be_told_are_said_to_be_doubtful() -> None:
    close = [("TOPPADDING", (0, 0), (-1, -1), 0), ("BOTTOMPADDING", (0, 0), (-1, -1), 0), ("VALIGN", (0, 0), (-1, -1), "MIDDLE")]
    rows = [[p("Drug"), p("What to do")], [p("Colchicine"), p(LONG)], [p("Naproxen"), p(f"Never {LONG}")]]
    blocks = read([p(LONG), Table(rows, colWidths=[70, 180], style=close), p(LONG)]).blocks
    of_table = [block for block in blocks if "Colchicine" in block.text or "Naproxen" in block.text]
    assert of_table
    assert all(any("compare it with the document" in note for note in block.notes) for block in of_table)


@pytest.mark.parametrize("seed", range(12))
def test_no_word_of_a_page_is_lost(seed: int) -> None:
    """Wherever words stand: in columns and lines of all kinds, with rules that part what is no table."""
    random = Random(seed)
    made = io.BytesIO()
    drawn = Canvas(made, (595, 842))
    columns, y, count = sorted(random.sample(range(40, 500, 20), random.randint(1, 4))), 790.0, 0
    while y > 60:
        drawn.setFont(random.choice(("Helvetica", "Helvetica-Bold")), 10)
        for x, end in zip(columns, [*columns[1:], 560], strict=True):
            said = []
            for _ in range(random.choice((0, 1, 1, 2, 6))):
                word = random.choice((f"w{count}z", f"W{count}z", f"{count}z mg"))
                if drawn.stringWidth(" ".join([*said, word])) < end - x - 6:
                    said.append(word)
                    count += 1
            drawn.drawString(x + random.choice((0, 0, 2)), y + random.choice((0, 0, 0, 2)), " ".join(said))
        if random.random() < 0.2:
            drawn.line(columns[0] - 5, y - 3, random.choice((300, 560)), y - 3)
        y -= random.choice((11.5, 13, 12, 20))
    drawn.save()
    document = document_of(made.getvalue(), "a.pdf", ".pdf")
    headers = " ".join(note for block in document.blocks for note in block.notes)
    for number in range(count):
        places = len(re.findall(rf"(?<!\d){number}z", " ".join(block.text for block in document.blocks)))
        assert places > 0 or re.search(rf"(?<!\d){number}z", f"{headers} {document.notes}"), number


def test_a_last_column_of_a_few_lines_is_no_table_with_the_headings_beside_it() -> None:
    """Two lines, small print and a page's number: the gout section ended there, and its advice stood above "When to treat"."""
    story = [p("When to treat", HEAD), *(p(f"In part {place} {LONG}") for place in range(3))]
    story += [
        p("Gout", HEAD),
        FrameBreak(),
        p("With gout avoid thiazides. Losartan may be preferred, and thiazides are not wanted by any."),
    ]
    story += [p("1 At home, the limit is 135/85 mmHg.", ParagraphStyle("small", fontSize=7, leading=9))]
    frames = [(50, 50, 240, 740), (310, 50, 240, 740)]

    def foot(canvas: Canvas, document: Any) -> None:
        canvas.setFont("Helvetica", 7)
        canvas.drawString(50, 24, "Hypertension, 2024")
        canvas.drawRightString(550, 24, "Page 1")

    made = io.BytesIO()
    document = BaseDocTemplate(made)
    document.addPageTemplates([PageTemplate("page", [Frame(*one, leftPadding=0, rightPadding=0) for one in frames], onPage=foot)])
    document.build(story)
    said = texts(document_of(made.getvalue(), "a.pdf", ".pdf"))
    assert said[0] == "When to treat"
    assert said[said.index("Gout") + 1].startswith("With gout avoid thiazides. Losartan may be preferred")


def test_items_that_are_moved_in_stand_under_the_one_above() -> None:
    """Else what is said of all would be read as said of a pressure of 160/110."""
    outer, inner = (ParagraphStyle(f"item{left}", parent=BODY, leftIndent=left, bulletIndent=left - 10) for left in (10, 24))
    items = [("If blood pressure is 160/110 or higher:", outer), ("give labetalol 20 mg", inner), ("admit", inner)]
    items += [("Give aspirin 75 mg.", outer)]
    document = read(
        [p("Pregnancy", HEAD), p(LONG.capitalize()), *(Paragraph(text, style, bulletText="•") for text, style in items)]
    )
    assert [(block.text, block.depth) for block in document.blocks if block.kind == "item"] == [
        ("If blood pressure is 160/110 or higher:", 0), ("give labetalol 20 mg", 1), ("admit", 1), ("Give aspirin 75 mg.", 0),
    ]  # fmt: skip
