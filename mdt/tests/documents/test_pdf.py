"""PDF beside the layout of its pages: what is printed on several pages, pictures, footnotes."""

import io
from collections.abc import Sequence

import pytest
from gatewise_mdt.documents.document import Document
from gatewise_mdt.documents.reading import document_of
from mdt_models import pdf

pypdf = pytest.importorskip("pypdf")

WHOLE = "Adults with gout and normal kidneys should be given colchicine twice daily."


def picture(writer, width: int = 300, height: int = 200):
    """A grey picture in a document that is written."""
    made = pypdf.generic.StreamObject()
    made.set_data(bytes(width * height))
    names = {"/Type": "/XObject", "/Subtype": "/Image", "/ColorSpace": "/DeviceGray"}
    numbers = {"/Width": width, "/Height": height, "/BitsPerComponent": 8}
    for key, name in names.items():
        made[pypdf.generic.NameObject(key)] = pypdf.generic.NameObject(name)
    for key, number in numbers.items():
        made[pypdf.generic.NameObject(key)] = pypdf.generic.NumberObject(number)
    return writer._add_object(made)


def form(writer, drawn):
    """A form that draws something."""
    made = pypdf.generic.StreamObject()
    made.set_data(b"/Drawing0 Do")
    made[pypdf.generic.NameObject("/Subtype")] = pypdf.generic.NameObject("/Form")
    made[pypdf.generic.NameObject("/BBox")] = pypdf.generic.ArrayObject(map(pypdf.generic.NumberObject, (0, 0, 595, 842)))
    draws(made, [drawn])
    return writer._add_object(made)


def draws(holder, drawings: Sequence) -> None:
    """Gives a page or a form what it draws; of a page, it is drawn too."""
    resources = holder.setdefault(pypdf.generic.NameObject("/Resources"), pypdf.generic.DictionaryObject()).get_object()
    resources[pypdf.generic.NameObject("/XObject")] = pypdf.generic.DictionaryObject(
        {pypdf.generic.NameObject(f"/Drawing{number}"): drawing for number, drawing in enumerate(drawings)}
    )


def notes(writer) -> tuple[str, ...]:
    made = io.BytesIO()
    writer.write(made)
    document = document_of(made.getvalue(), "gout.pdf", ".pdf")
    assert " ".join(block.text for block in document.blocks).count("colchicine") == len(writer.pages)
    return document.notes


def pages(count: int, text: str = WHOLE):
    writer = pypdf.PdfWriter(io.BytesIO(pdf(*[text] * count)))
    for page in writer.pages:
        stream = pypdf.generic.StreamObject()
        stream.set_data(b"/Drawing0 Do /Drawing1 Do " + page.get_contents().get_data())
        page[pypdf.generic.NameObject("/Contents")] = writer._add_object(stream)
    return writer


def test_pages_with_pictures_are_named() -> None:
    writer = pages(4)
    logo, icon = picture(writer), picture(writer, 90, 400)
    circle = form(writer, picture(writer))
    draws(writer.pages[0], [logo, icon])
    draws(writer.pages[1], [logo, picture(writer)])
    draws(writer.pages[2], [logo, form(writer, circle)])
    draws(writer.pages[3], [icon, picture(writer, 400, 90)])
    (note,) = [one for one in notes(writer) if "pictures" in one]
    assert note.startswith(
        "gout.pdf has pictures on pages 2, 3 of 4, which were not read: if they show text, such as a flow chart,"
    )


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


def test_a_number_at_the_edge_of_a_page_is_left_out_only_if_white_parts_it_from_the_text() -> None:
    alone = printed(f"{BODY}{chr(10) * 50}4")
    assert [block.text for block in alone.blocks] == [" ".join([WHOLE] * 3)]
    dose = printed(f"{'It is so.' + chr(10) * 50}Give prednisolone at a dose of\n30\nmg.")
    assert dose.blocks[-1].text == "Give prednisolone at a dose of 30 mg."


def test_pages_without_text_are_named() -> None:
    (note,) = printed(WHOLE, "", "", WHOLE, "").notes
    assert note.startswith("gout.pdf has no text, or next to none, on pages 2, 3, 5 of 5, as scanned pages have none: run text")
    assert printed(WHOLE).notes == ()
