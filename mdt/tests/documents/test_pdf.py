"""PDF beside the layout of its pages: what is printed on several pages, pictures, footnotes."""

import io
import time
from collections.abc import Sequence
from types import SimpleNamespace

import pytest
from gatewise_mdt.documents.document import LOWERED, RAISED, Document, one_line
from gatewise_mdt.documents.lines import Word
from gatewise_mdt.documents.page import _printed_once, _with_bullets, _words
from gatewise_mdt.documents.reading import document_of
from mdt_models import pdf

WHOLE = "Adults with gout and normal kidneys should be given colchicine twice daily."


def test_pages_with_pictures_are_named() -> None:
    """But not for a logo, which is on several pages, nor for an icon."""
    canvas = pytest.importorskip("reportlab.pdfgen.canvas")
    image = pytest.importorskip("PIL.Image")
    from reportlab.lib.utils import ImageReader

    made = io.BytesIO()
    drawn = canvas.Canvas(made)
    logo, first, second, icon = (ImageReader(image.new("RGB", (300, high), (9, 9, high % 255))) for high in (200, 210, 220, 90))
    for pictures in ((logo, icon), (logo, first), (logo, second), (icon,)):
        drawn.drawString(40, 700, WHOLE)
        for picture in pictures:
            drawn.drawImage(picture, 40, 400)
        drawn.showPage()
    drawn.save()
    (note,) = document_of(made.getvalue(), "gout.pdf", ".pdf").notes
    assert note.startswith("gout.pdf has pictures on pages 2, 3 of 4, which were not read: if they show text, such as a flow")


def test_a_footnote_stays_where_it_is_printed_with_a_note() -> None:
    pytest.importorskip("reportlab")
    from reportlab.lib.styles import ParagraphStyle
    from reportlab.platypus import Paragraph, SimpleDocTemplate

    raised = "<super rise=4 size=5>{}</super>".format
    text = (
        f"With platelets below 10{raised(9)}/L or an eGFR below 45 mL/min/1.73 m{raised(2)}{raised('a')} never give any{raised(1)}."
    )
    notes = [f"{raised(1)}Not to adults who take clarithromycin,<br/>nor to children.", f"{raised('a')}In acute illness."]
    styles = [ParagraphStyle("p", fontSize=size, leading=1.2 * size, spaceAfter=12) for size in (12, 9)]
    made = io.BytesIO()
    SimpleDocTemplate(made).build([Paragraph(text, styles[0]), *(Paragraph(note, styles[1]) for note in notes)])
    blocks = document_of(made.getvalue(), "gout.pdf", ".pdf").blocks
    assert [block.text for block in blocks] == [
        "With platelets below 10^9/L or an eGFR below 45 mL/min/1.73 m2a never give any[1].",
        "1 Not to adults who take clarithromycin, nor to children.",
        "a In acute illness.",
    ]
    assert [["perhaps a footnote" in note for note in block.notes] for block in blocks] == [[], [True], [True]]


@pytest.mark.parametrize(
    ("before", "raised", "after", "said"),
    [
        ("below 130/80", "1", " mmHg", "below 130/80 mmHg[1]"),
        ("Give 5", "2", " mg daily", "Give 5 mg[2] daily"),
        ("Give 10", "2", " mg daily", "Give 10 mg[2] daily"),
        ("Give 5 mg", "3,4", " daily", "Give 5 mg[3,4] daily"),
        ("Give 50", "a", " mg", "Give 50 mg[a]"),
        ("for 10", "1", ".", "for 10[1]."),
        ("platelets below 10", "9", "/L", "platelets below 10^9/L"),
        ("2 × 10", "6", " units", "2 × 10^6 units"),
        ("10", "-3", " mol", "10^-3 mol"),
        ("above 30 kg/m", "2", ",", "above 30 kg/m2,"),
        ("3 ml min", "-1", "", "3 ml min-1"),
        ("on the 1", "st", " day", "on the 1st day"),
        ("above 38", "o", "C", "above 38°C"),
    ],
)
def test_a_superscript_is_a_power_a_reference_or_a_part_of_its_word(before: str, raised: str, after: str, said: str) -> None:
    assert one_line(f"{before}{RAISED}{raised}{LOWERED}{after}") == said


def test_a_mark_after_a_number_is_doubted_in_a_note() -> None:
    pytest.importorskip("reportlab")
    from reportlab.lib.styles import ParagraphStyle
    from reportlab.platypus import Paragraph, SimpleDocTemplate

    made = io.BytesIO()
    text = "Aim at 130/80<super rise=4 size=5>1</super> mmHg in most people who have had a stroke."
    SimpleDocTemplate(made).build([Paragraph(text, ParagraphStyle("p", fontSize=11, leading=13))])
    (block,) = document_of(made.getvalue(), "a.pdf", ".pdf").blocks
    assert block.text == "Aim at 130/80 mmHg[1] in most people who have had a stroke."
    assert block.notes[0].startswith('"130/80 mmHg[1]": what is raised after a number was taken for the mark of a note')


BODY = "\n".join([WHOLE] * 3)


def printed(*texts: str) -> Document:
    return document_of(pdf(*texts), "gout.pdf", ".pdf")


def test_what_stands_at_the_edges_of_pages_is_left_out_with_a_note_unless_it_is_a_warning() -> None:
    pages = [f"House guideline\n\n\n{BODY}{chr(10) * 46}Do not use in pregnancy\n\n{number} of 3" for number in (1, 2, 3)]
    document = printed(*pages)
    assert document.notes == ('gout.pdf: "House guideline", at the top or bottom of 3 pages, was left out',)
    texts = [block.text for block in document.blocks]
    assert texts.count("Do not use in pregnancy") == 1
    assert document.blocks[0].notes == ("this stands at the top or bottom of 3 pages",)
    assert not any("House" in text or "of 3" in text for text in texts)


def test_doses_at_the_edges_of_pages_are_not_taken_for_one_line() -> None:
    pages = printed(*(f"Give prednisolone {dose} mg daily in adults.\n\n\n{BODY}" for dose in (5, 50)))
    assert all(f" {dose} mg" in " ".join(block.text for block in pages.blocks) for dose in (5, 50))
    chapters = printed(*(f"Chapter {number}\n\n\n{BODY}" for number in (1, 2)))
    assert chapters.notes == ('gout.pdf: "Chapter 1", "Chapter 2", at the top or bottom of 2 pages, was left out',)


def test_a_number_at_the_edge_of_a_page_is_left_out_only_if_white_parts_it_from_the_text() -> None:
    alone = printed(f"{BODY}{chr(10) * 50}4")
    assert [block.text for block in alone.blocks] == [" ".join([WHOLE] * 3)]
    dose = printed(f"{'It is so.' + chr(10) * 50}Give prednisolone at a dose of\n30\nmg.")
    assert dose.blocks[-1].text == "Give prednisolone at a dose of 30 mg."


def test_pages_without_text_are_named() -> None:
    (note,) = printed(WHOLE, "", "", WHOLE, "").notes
    assert note.startswith("gout.pdf has no text, or next to none, on pages 2, 3, 5 of 5, as scanned pages have none: run text")
    assert printed(WHOLE).notes == ()


def test_what_is_beside_what_is_shown_of_a_page_is_left_out_with_a_note() -> None:
    """As the other half of a spread that was cut into two pages."""
    lines = [f"Give {number} mg of colchicine to adults." for number in range(1, 21)]
    content = pdf("\n".join(lines)).replace(b"/MediaBox [0 0 595 842]", b"/MediaBox [0 0 595 842] /CropBox [0 0 595 600]")
    document = document_of(content, "gout.pdf", ".pdf")
    said = " ".join(block.text for block in document.blocks)
    assert [number for number in range(1, 21) if f"Give {number} mg" in said] == list(range(15, 21))
    assert any("text beside what is shown of a page was left out" in note and "Give 1 mg" in note for note in document.notes)


@pytest.mark.parametrize("box", [b"0 0 0 0", b"0 900 595 1800", b"0 -100 595 842"])
@pytest.mark.parametrize("turned", [False, True])
def test_a_page_is_read_though_what_is_shown_of_it_lies_outside_of_it(box: bytes, turned: bool) -> None:
    known = pdf(WHOLE)
    if turned:
        known = known.replace(b"/MediaBox", b"/Rotate 90 /MediaBox").replace(b"40 780 Td", b"0 1 -1 0 40 40 Tm")
    content = known.replace(b"/MediaBox", b"/CropBox [%b] /MediaBox" % box)
    first, second = (document_of(one, "gout.pdf", ".pdf").blocks for one in (known, content))
    assert first == second
    assert [block.regions for block in first] == [block.regions for block in second]


def pages_with(x: int, y: int, said: str, numbers: Sequence[int], font: tuple[str, int], size: int) -> Document:
    """Pages of text in this size, with a line on each that has its number."""
    canvas = pytest.importorskip("reportlab.pdfgen.canvas")
    made = io.BytesIO()
    drawn = canvas.Canvas(made)
    for page, number in enumerate(numbers, start=1):
        drawn.setFont(*font)
        drawn.drawString(x, y, said.format(number))
        drawn.setFont("Helvetica", size)
        for line in range(4):
            drawn.drawString(40, 700 - 14 * line, f"Give salbutamol {page}00 micrograms to adults who wheeze at rest.")
        drawn.showPage()
    drawn.save()
    return document_of(made.getvalue(), "a.pdf", ".pdf")


@pytest.mark.parametrize(
    ("said", "numbers"), [("Step {}", (1, 2, 3)), ("Grade {}-4", (1, 2, 3)), ("GOLD 1-{}", (2, 3, 4)), ("{} Weeks", (6, 10, 14))]
)
def test_headings_at_the_tops_of_pages_stay_where_they_are(said: str, numbers: Sequence[int]) -> None:
    document = pages_with(40, 800, said, numbers, ("Helvetica-Bold", 15), 11)
    assert [block.text for block in document.blocks if block.level] == [said.format(number) for number in numbers]
    assert document.notes == ()


@pytest.mark.parametrize(
    ("x", "y", "said"), [(40, 30, "Stroke guideline | {}"), (300, 800, "Page {}"), (40, 800, "{} Stroke guideline")]
)
def test_larger_lines_that_count_the_pages_are_no_headings(x: int, y: int, said: str) -> None:
    document = pages_with(x, y, said, (12, 13, 14), ("Helvetica", 12), 10)
    assert [block.text for block in document.blocks if block.level or said[:6] in block.text] == []


@pytest.mark.parametrize("points", ["121", "012"])
def test_a_score_is_no_table_of_contents(points: str) -> None:
    dots = " ........ ".join
    score = [dots(one) for one in zip(("Heart failure", "Age 75 or more", "Diabetes"), points, strict=True)]
    assert all(line in " ".join(block.text for block in printed("\n".join(score)).blocks) for line in score)
    tables = [dots(one) for one in (("Treatment", "3"), ("Children", "9"), ("Doses", "6"), ("Weights", "7"))]
    document = printed("\n".join([WHOLE, "Contents", *tables]))
    assert WHOLE in document.blocks[0].text
    assert not any("...." in block.text for block in document.blocks)
    contents = [dots(one) for one in (("Treatment", "3"), ("Children", "7"))]
    document = printed("\n".join([WHOLE, *contents]))
    assert [block.text for block in document.blocks] == [WHOLE]
    assert "a table of contents was left out" in document.notes[0]


def pages_of(*pages: Sequence[str]) -> Document:
    """Pages with these lines, far apart."""
    canvas = pytest.importorskip("reportlab.pdfgen.canvas")
    made = io.BytesIO()
    drawn = canvas.Canvas(made)
    for lines in pages:
        for place, line in enumerate(lines):
            drawn.drawString(40, 700 - 40 * place, line)
        drawn.showPage()
    drawn.save()
    return document_of(made.getvalue(), "a.pdf", ".pdf")


def test_contents_may_count_from_a_later_page() -> None:
    document = pages_of(
        [], ["Treatment ........ 1", "Children ........ 2"], ["Treatment", "Give 5 mg to adults."], ["Children", WHOLE]
    )
    assert 'a table of contents was left out: "Treatment ........ 1", "Children ........ 2"' in " ".join(document.notes)


def test_contents_may_name_what_an_earlier_chapter_has_a_line_of() -> None:
    contents = ["Summary ........ 1", "Treatment ........ 2", "Children ........ 3"]
    chapters = (["Summary", WHOLE, "Treatment", WHOLE], ["Treatment", "Give 5 mg to adults."], ["Children", WHOLE])
    assert "a table of contents was left out" in " ".join(pages_of([], contents, *chapters).notes)


@pytest.mark.parametrize(
    "score",
    [
        ["Heart failure ........ 1", "Diabetes ........ 1", "Age 75 or over ........ 2"],
        ["Diabetes ........ 1"],
        ["Age 75 or over ........ 2", "Diabetes ........ 1"],
        ["Diabetes ........ 1", "Age 75 or over ........ 1"],
    ],
)
def test_a_score_of_what_later_pages_treat_stays(score: list[str]) -> None:
    pages = (["Heart failure", "Give 5 mg to adults."], ["Diabetes", WHOLE, "Age 75 or over", WHOLE], ["Age 75 or over", WHOLE])
    text = " ".join(block.text for block in pages_of([], score, *pages).blocks)
    assert all(line in text for line in score)


def test_letters_of_a_symbol_font_are_read_as_they_look() -> None:
    content = pdf("5 m \xb3 30" + 8 * " abg").replace(b"/BaseFont /Helvetica", b"/BaseFont /Symbol   ")
    assert [block.text for block in document_of(content, "a.pdf", ".pdf").blocks] == ["5 μ ≥ 30" + 8 * " αβγ"]


def test_a_dot_of_a_symbol_font_is_a_bullet_before_a_text_and_a_dash_is_doubted() -> None:
    letters = 4 * " abg"
    font = b"/FontDescriptor << /FontName /SymbolMT >> /Encoding /WinAnsiEncoding /FirstChar 0 /Widths [%b]" % (b"500 " * 256)
    content = pdf("\n".join(f"\xb7 {number}\x9610{letters}" for number in (5, 6))).replace(b"/BaseFont /Helvetica", font)
    document = document_of(content, "a.pdf", ".pdf")
    found = [(block.text, block.kind) for block in document.blocks]
    assert found == [(f"{number}\ufffd10{4 * ' αβγ'}", "item") for number in (5, 6)]  # a "–", or the font's own "±"
    assert "some letters have no meaning in the file" in document.notes[0]
    content = pdf("2 \xb4 5" + 2 * letters).replace(b"/BaseFont /Helvetica", b"/BaseFont /Symbol   ")
    assert [block.text for block in document_of(content, "a.pdf", ".pdf").blocks] == ["2 × 5" + 8 * " αβγ"]


def test_letters_that_are_printed_twice_to_look_bold_are_read_once() -> None:
    canvas = pytest.importorskip("reportlab.pdfgen.canvas")
    made = io.BytesIO()
    drawn = canvas.Canvas(made)
    for x in (40, 40.3):
        drawn.drawString(x, 700, "Do not give more than 5 mg or 11 mg to llamas.")
    drawn.save()
    (block,) = document_of(made.getvalue(), "a.pdf", ".pdf").blocks
    assert block.text == "Do not give more than 5 mg or 11 mg to llamas."


def test_twice_printed_letters_of_a_full_page_are_found_in_seconds() -> None:
    look = {"fontname": "A", "size": 4, "upright": True}
    letters = [
        {**look, "text": "e", "x0": 2 * x + again, "top": 4 * y} for again in (0, 0.3) for y in range(100) for x in range(150)
    ]
    page = SimpleNamespace(chars=letters, filter=lambda keep: list(filter(keep, letters)))
    start = time.process_time()
    assert _printed_once(page) == letters[:15000]
    assert time.process_time() - start < 5


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["eGFR", "is", "(cid:3)", "30"], "eGFR is \ufffd 30"),
        (["(cid:3)", "Give", "5", "mg"], "• Give 5 mg"),
        (["10\x025", "units"], "10\ufffd5 units"),
    ],
)
def test_signs_without_a_meaning_are_told_from_bullets(words: list[str], said: str) -> None:
    made, x = list[Word](), 40.0
    for word in words:
        place = {"x0": x, "x1": x + 5 * len(word), "top": 100, "bottom": 110, "size": 10, "fontname": "A", "text": word}
        made += _words({**place, "chars": [place]}, [])
        x += 5 * len(word) + 3
    assert " ".join(word.text for word in _with_bullets(made)) == said
