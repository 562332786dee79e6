"""Pictures in a PDF, whose text no reader sees, are said to be there; logos, icons and what was recognised are not.

A footnote leaves the foot of its page only for a place that refers to it.
"""

import io
from collections.abc import Sequence

import pytest
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
        contents(writer, page, b"/Drawing0 Do /Drawing1 Do " + page.get_contents().get_data())
    return writer


def contents(writer, page, data: bytes) -> None:
    stream = pypdf.generic.StreamObject()
    stream.set_data(data)
    page[pypdf.generic.NameObject("/Contents")] = writer._add_object(stream)


def test_pages_with_pictures_are_named() -> None:
    writer = pages(4)
    logo, icon = picture(writer), picture(writer, 90, 400)
    circle = form(writer, picture(writer))
    draws(writer.pages[0], [logo, icon])
    draws(writer.pages[1], [logo, picture(writer)])
    draws(writer.pages[2], [logo, form(writer, circle)])
    draws(writer.pages[3], [icon, picture(writer, 400, 90)])
    (note,) = [one for one in notes(writer) if "pictures" in one]
    assert note.startswith("gout.pdf has pictures on pages 2-3 of 4, which were not read: if they show text, such as a flow chart,")


def test_a_page_whose_text_was_recognised_has_been_read() -> None:
    writer = pages(1)
    draws(writer.pages[0], [picture(writer)])
    assert "pictures" in notes(writer)[0]
    page = writer.pages[0]
    contents(writer, page, page.get_contents().get_data().replace(b"BT ", b"BT 3 Tr "))
    assert notes(writer) == ()


RAISED = "<super rise=4 size=5>{}</super>".format
FAILED = "Adults with gout should be given colchicine, unless the kidneys have failed"
NEVER = "Never give it to adults who take clarithromycin."
TABLETS = "2 tablets daily is the dose of adults."


def footed(text: str, *notes: str) -> list[str]:
    """The texts of a page with small print below."""
    pytest.importorskip("reportlab")
    from reportlab.lib.styles import ParagraphStyle
    from reportlab.platypus import Paragraph, SimpleDocTemplate

    made = io.BytesIO()
    styles = [ParagraphStyle("p", fontSize=size, leading=16, spaceAfter=12) for size in (12, 9)]
    SimpleDocTemplate(made).build([Paragraph(text, styles[0]), *(Paragraph(note, styles[1]) for note in notes)])
    return [block.text for block in document_of(made.getvalue(), "gout.pdf", ".pdf").blocks]


def test_a_footnote_stays_where_it_stands_unless_something_refers_to_it() -> None:
    assert footed(f"{FAILED}{RAISED(1)}.", f"{RAISED(1)}{NEVER}") == [f"{FAILED}.", f"Footnote: {NEVER}"]
    after_a_number = footed(f"{FAILED} or the eGFR is below 30{RAISED(1)}.", f"{RAISED(1)}{NEVER}")
    assert after_a_number == [f"{FAILED} or the eGFR is below 30^1.", f"1{NEVER}"]
    both = footed(f"{FAILED}{RAISED(1)} or the eGFR is below 30{RAISED(2)}.", f"{RAISED(1)}{NEVER}", f"{RAISED(2)}Give less.")
    assert both == [f"{FAILED} or the eGFR is below 30^2.", f"Footnote: {NEVER}", "2Give less."]


@pytest.mark.parametrize("begin", ["99</super>mTc", "18</super>F", "a</super>FP"])
def test_a_line_of_a_footnote_may_begin_with_something_raised(begin: str) -> None:
    """What can be the mark of no footnote after it ends none."""
    more = f"{NEVER}<br/><super rise=4 size=5>{begin} says more."
    (_, note) = footed(f"{FAILED} {FAILED} {FAILED}{RAISED(1)}.", f"{RAISED(1)}{more}")
    assert note == f"Footnote: {NEVER} {begin.replace('</super>', '')} says more."


@pytest.mark.parametrize("marks", ["1,2", "2,1"])
def test_of_several_marks_those_are_followed_whose_footnotes_are_there(marks: str) -> None:
    assert footed(f"{FAILED}{RAISED(marks)}.", f"{RAISED(1)}{NEVER}") == [f"{FAILED}[2].", f"Footnote: {NEVER}"]


def test_the_power_of_a_unit_is_no_mark_of_a_footnote() -> None:
    text = f"If the eGFR is above 45 mL/min/1.73 m{RAISED(2)} and the body mass index above 30 kg/m{RAISED(2)}, give metformin"
    read = "If the eGFR is above 45 mL/min/1.73 m2 and the body mass index above 30 kg/m2, give metformin"
    assert footed(f"{text}.", TABLETS) == [f"{read}.", TABLETS]
    footnote = f"{RAISED(2)}{NEVER}"
    assert footed(f"{text}{RAISED(2)}.", footnote) == [f"{read}.", f"Footnote: {NEVER}"]
    assert footed(f"{text}{RAISED(2)}.", TABLETS, footnote) == [f"{read}.", f"Footnote: {NEVER}", TABLETS]
    owned = f"If the weight is the patient's{RAISED(2)} and the eGFR is above 45 mL/min/1.73 m"
    assert footed(f"{owned}{RAISED(2)}.", footnote)[1] == f"Footnote: {NEVER}"
