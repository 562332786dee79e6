"""Word documents: no word of the body is lost, odd tables are read on, and what is left out is said."""

import io
import zipfile
from pathlib import Path
from typing import Any

import pytest
from gatewise_mdt.documents.document import Document
from gatewise_mdt.documents.passages import split_passages
from gatewise_mdt.documents.reading import document_of

from gatewise.errors import GatewiseError

docx = pytest.importorskip("docx")
from docx.oxml import parse_xml  # noqa: E402
from docx.oxml.ns import nsdecls  # noqa: E402

SPACES = (
    f'{nsdecls("w", "wp", "a", "pic", "r")} xmlns:v="urn:schemas-microsoft-com:vml"'
    ' xmlns:wps="http://schemas.microsoft.com/office/word/2010/wordprocessingShape"'
    ' xmlns:mc="http://schemas.openxmlformats.org/markup-compatibility/2006"'
    ' xmlns:m="http://schemas.openxmlformats.org/officeDocument/2006/math"'
)


def element(tag: str, inside: str = "", more: str = "") -> Any:
    return parse_xml(f"<w:{tag} {SPACES} {more}>{inside}</w:{tag}>")


def drawing(inside: str) -> str:
    graphic = f'<a:graphic><a:graphicData uri="x">{inside}</a:graphicData></a:graphic>'
    return f"<w:drawing><wp:inline>{graphic}</wp:inline></w:drawing>"


def run(text: str, properties: str = "") -> str:
    return f'<w:r><w:rPr>{properties}</w:rPr><w:t xml:space="preserve">{text}</w:t></w:r>'


def read(document: Any) -> Document:
    made = io.BytesIO()
    document.save(made)
    return document_of(made.getvalue(), "gout.docx", ".docx")


def with_paragraph(inside: str) -> Any:
    document = docx.Document()
    document.element.body.insert(0, element("p", inside))
    return document


def texts(document: Any) -> list[str]:
    return [block.text for block in read(document).blocks]


INSERTED = f'<w:ins w:id="1" w:author="a">{run("not ")}</w:ins>'
SYMBOL = '<w:rFonts w:ascii="Symbol" w:hAnsi="Symbol"/>'
RAISED = '<w:vertAlign w:val="superscript"/>'
HALF = "<m:f><m:num><m:r><m:t>1</m:t></m:r></m:num><m:den><m:r><m:t>2</m:t></m:r></m:den></m:f>"
DELETED = '<w:del w:id="2" w:author="a"><w:r><w:delText>always </w:delText></w:r></w:del>'
MOVED = f'<w:moveFrom w:id="3" w:author="a">{run("ever ")}</w:moveFrom><w:moveTo w:id="4" w:author="a">{run("give it.")}</w:moveTo>'


@pytest.mark.parametrize(
    ("inside", "text"),
    [
        (f"{run('In pregnancy, do ')}{INSERTED}{DELETED}{run('give it.')}", "In pregnancy, do not give it."),
        (f"{run('Do not ')}{MOVED}", "Do not give it."),
        (f'{run("Give ")}<w:smartTag w:element="dose">{run("500 mg")}</w:smartTag>{run(" daily.")}', "Give 500 mg daily."),
        (f"{run('Give ')}<w:sdt><w:sdtContent>{run('5 mg')}</w:sdtContent></w:sdt>{run('.')}", "Give 5 mg."),
        (
            f'{run("See ")}<w:hyperlink>{run("the dose")}</w:hyperlink><w:fldSimple w:instr="REF x">{run(" below")}</w:fldSimple>',
            "See the dose below",
        ),
        ("<w:r><w:t>non</w:t><w:noBreakHyphen/><w:t>steroidal</w:t><w:br/><w:t>drugs</w:t></w:r>", "non-steroidal drugs"),
        (f'{run("eGFR ")}<w:r><w:sym w:font="Symbol" w:char="F0B3"/></w:r>{run(" 30")}', "eGFR ≥ 30"),
        (f"{run('10')}{run('9', RAISED)}{run('/L')}", "10^9/L"),
        (f"{run('1')}{run('1', RAISED)}{run('/2 tablets')}", "1 1/2 tablets"),
        (
            f"{run('Give 5 ')}{run('m', SYMBOL)}{run('g/kg if eGFR ')}{run(chr(0xF0B3), SYMBOL)}{run(' 30')}",
            "Give 5 μg/kg if eGFR ≥ 30",
        ),
        (f"{run('Give ')}{run('50', '<w:strike/>')}{run('5 mg')}", "Give 50 5 mg"),
        (f"{run('130/80')}{run('1', RAISED)}{run(' mmHg')}", "130/80 mmHg[1]"),
        (f"{run('30 kg/m')}{run('2', RAISED)}{run(' at visits')}{run('3,4', RAISED)}", "30 kg/m2 at visits[3,4]"),
        (
            f"<m:oMath>{HALF}</m:oMath>{run('500 mg')}",
            "1/2 500 mg",
        ),
    ],
)
def test_no_word_of_a_paragraph_is_lost(inside: str, text: str) -> None:
    assert texts(with_paragraph(inside)) == [text]


def test_content_controls_and_text_boxes_are_read_once() -> None:
    box = f"<w:txbxContent><w:p>{run('Never in pregnancy.')}</w:p></w:txbxContent>"
    choice = f'<mc:Choice Requires="wps">{drawing(f"<wps:txbx>{box}</wps:txbx>")}</mc:Choice>'
    fallback = f"<mc:Fallback><w:pict><v:textbox>{box}</v:textbox></w:pict></mc:Fallback>"
    gone = f"<w:del><w:r><w:pict><v:textbox>{box.replace('Never', 'Deleted')}</v:textbox></w:pict></w:r></w:del>"
    document = with_paragraph(f"{run('Give it.')}<w:r><mc:AlternateContent>{choice}{fallback}</mc:AlternateContent></w:r>{gone}")
    document.element.body.insert(1, element("sdt", f"<w:sdtContent><w:p>{run('Not in renal failure.')}</w:p></w:sdtContent>"))
    blocks = read(document).blocks
    assert [block.text for block in blocks] == ["Give it.", "Never in pregnancy.", "Not in renal failure."]
    assert [block.where for block in blocks] == ["paragraph 1", "paragraph 1, a text box", "paragraph 2"]


def test_what_stands_in_a_text_box_is_read_as_it_stands_beside_it() -> None:
    def box(inside: str) -> str:
        return f"<w:r><w:pict><v:textbox><w:txbxContent>{inside}</w:txbxContent></v:textbox></w:pict></w:r>"

    said = ("Stop NSAIDs.", "Give 5 mg.")
    items = "".join(f'<w:p><w:pPr><w:pStyle w:val="ListBullet"/></w:pPr>{run(one)}</w:p>' for one in said)
    inner = f"<w:p>{run('Not in children.')}{box(items)}</w:p>"
    found = [(block.text, block.kind) for block in read(with_paragraph(run("If acute:") + box(inner))).blocks]
    assert found == [("If acute:", "paragraph"), ("Not in children.", "paragraph"), *((one, "item") for one in said)]


def test_styles_of_letters_count_as_what_is_said_of_them_directly() -> None:
    document = with_paragraph("")
    for name, inside in (("Up", RAISED), ("Gone", "<w:strike/>")):
        style = f'<w:name w:val="{name}"/><w:rPr>{inside}</w:rPr>'
        document.styles.element.append(element("style", style, f'w:type="character" w:styleId="{name}"'))
    styled = "<w:rStyle w:val='{}'/>".format
    words = f"{run('Below 10')}{run('9', styled('Up'))}{run('/L give ')}{run('50', styled('Gone'))}{run('5 mg')}"
    document.element.body.insert(0, element("p", words))
    found = read(document)
    assert [block.text for block in found.blocks] == ["Below 10^9/L give 50 5 mg"]
    assert any('struck through was read like any other: "50"' in note for note in found.notes)


def test_a_file_that_is_far_larger_than_it_looks_is_refused() -> None:
    made = io.BytesIO()
    with_paragraph(run("Give it.")).save(made)
    with (
        zipfile.ZipFile(made, "a", zipfile.ZIP_DEFLATED) as archive,
        archive.open("word/more.xml", "w", force_zip64=True) as stream,
    ):
        for _ in range(33):
            stream.write(bytes(2**24))
    with pytest.raises(GatewiseError, match=r"unpacked it has 528 MiB, more than 512"):
        document_of(made.getvalue(), "gout.docx", ".docx")


def table(*rows: str) -> Any:
    document = docx.Document()
    made = document.add_table(len(rows), len(rows[0].split("|")))
    for row, said in zip(made.rows, rows, strict=True):
        for cell, text in zip(row.cells, said.split("|"), strict=True):
            cell.text = text
    return document


def test_cells_that_say_the_same_are_all_read_and_merged_ones_once() -> None:
    document = table("Day|1|5 mg|5 mg", "Adults|2|x|y", "|3|10 mg|not in pregnancy")
    made = document.tables[0]
    made.cell(1, 0).merge(made.cell(2, 0))
    made.cell(1, 2).merge(made.cell(1, 3))
    inner = made.cell(0, 3).add_table(1, 2)
    inner.cell(0, 0).text, inner.cell(0, 1).text = "never", "in infants"
    assert texts(document) == ["Day 1 5 mg 5 mg never in infants", "Adults 2 x y", "Adults 3 10 mg not in pregnancy"]


def test_an_odd_table_is_read_on() -> None:
    document = table("Give|5 mg", "do not|10 mg")
    first, second = document.tables[0]._tbl.tr_lst
    first.tc_lst[0].get_or_add_tcPr().append(element("vMerge"))  # a merge without a beginning
    first.tc_lst[1].get_or_add_tcPr().append(element("gridSpan", more='w:val="x"'))
    second.insert(0, element("trPr", '<w:gridBefore w:val="1"/>'))
    document.tables[0]._tbl.remove(document.tables[0]._tbl.tblGrid)
    assert texts(document) == ["Give 5 mg", "do not 10 mg"]


def test_the_title_stands_above_all_headings() -> None:
    document = docx.Document()
    document.add_heading("Gout in adults", 0)
    for heading in ("Treatment", "Follow-up"):
        document.add_heading(heading, 1)
        document.add_paragraph("For an acute flare, give colchicine.")
    found = split_passages(read(document))
    assert [one.headings for one in found] == [("Gout in adults", "Treatment"), ("Gout in adults", "Follow-up")]
    assert {one.population for one in found} == {"Gout in adults"}


NOTES = f"<w:footnotes {SPACES}><w:footnote w:id='1'><w:p>{run('Not in pregnancy')}</w:p></w:footnote></w:footnotes>"


def with_notes(document: Any) -> Any:
    from docx.opc.constants import RELATIONSHIP_TYPE
    from docx.opc.packuri import PackURI
    from docx.opc.part import Part

    part = Part(PackURI("/word/footnotes.xml"), "application/xml", NOTES.encode(), document.part.package)
    document.part.relate_to(part, RELATIONSHIP_TYPE.FOOTNOTES)
    return document


def test_in_a_symbol_font_the_text_alone_is_read_by_its_looks() -> None:
    mark = '<w:footnoteReference w:customMarkFollows="1" w:id="1"/><w:sym w:font="Symbol" w:char="F02A"/>'
    arrow = '<w:sym w:font="Wingdings" w:char="F0E0"/>'
    inside = f"{run('Give 5 ')}<w:r><w:rPr>{SYMBOL}</w:rPr><w:t>m</w:t>{mark}</w:r>{run('g')}<w:r>{arrow}</w:r>"
    assert texts(with_notes(with_paragraph(inside)))[:2] == ["Give 5 μ*g\ufffd", "Footnote: Not in pregnancy"]


def test_the_notes_say_what_was_left_out() -> None:
    symbol = '<w:sym w:font="Wingdings" w:char="F0E0"/>'
    document = with_paragraph(f"{INSERTED}{run('500 mg', '<w:strike/>')}<w:r>{symbol}{drawing('<a:blip/>')}</w:r>")
    document.sections[0].footer.paragraphs[0].text = "House guideline"
    paragraph = document.add_paragraph("Give it.")
    document.add_comment(paragraph.runs, text="Check this dose", author="a")
    said = read(with_notes(document)).notes
    for expected in (
        "1 picture could not be read",
        "some letters have no meaning in the file",
        "tracked changes were read as if all were accepted",
        'struck through was read like any other: "500 mg"',
        'the footers were left out: "House guideline"',
        'the comments were left out: "Check this dose"',
        'the footnotes were left out: "Not in pregnancy"',
    ):
        assert sum(expected in note for note in said) == 1, expected
    assert all("gout.docx" in note for note in said)
    assert len(said) == 7


def with_style(document: Any, name: str, base: str, outline: int | None = None) -> str:
    made = document.styles.add_style(name, 1)
    made.base_style = document.styles[base]
    if outline is not None:
        made.element.get_or_add_pPr().append(element("outlineLvl", more=f'w:val="{outline}"'))
    return name


def test_hidden_text_is_left_out_with_a_note() -> None:
    hidden = run(" at twice the dose", "<w:vanish/>") + run(" daily", '<w:vanish w:val="0"/>')
    document = with_paragraph(f"{run('Give it')}{hidden}{run('.')}")
    document.add_paragraph("Ask the board.").runs[0].style = document.styles.add_style("Unseen", 2)
    document.styles["Unseen"].font.hidden = True
    assert texts(document) == ["Give it daily."]
    assert read(document).notes == ('gout.docx: hidden text was left out: "at twice the dose", "Ask the board."',)


def test_footnotes_follow_what_refers_to_them_and_a_table_of_contents_is_left_out() -> None:
    corpus = Path(__file__).parent / "corpus" / "warfarin-hidden.docx"
    blocks = document_of(corpus.read_bytes(), "gout.docx", ".docx").blocks
    assert [block.text for block in blocks[-2:]] == [
        "Change to enoxaparin 1 mg/kg twice daily.",
        "Footnote: Not in severe renal failure.",
    ]
    document = docx.Document()
    document.add_paragraph("1 Adults 5", style=with_style(document, "toc 1", "Normal"))
    document.add_paragraph("Give it.")
    assert texts(document) == ["Give it."]
    assert read(document).notes == ('gout.docx: a table of contents was left out: "1 Adults 5"',)


def listed(level: int, number: str, indent: int | None = None) -> Any:
    moved = "" if indent is None else f'<w:ind w:left="{indent}"/>'
    return f'<w:pPr><w:numPr><w:ilvl w:val="{level}"/><w:numId w:val="{number}"/></w:numPr>{moved}</w:pPr>'


def with_list(document: Any, *levels: tuple[str, str], number: str = "77") -> None:
    """A list of the document's own, its levels given as Word's name of the kind of numbers and what stands around them."""
    kinds = [
        f'<w:lvl w:ilvl="{i}"><w:start w:val="1"/><w:numFmt w:val="{kind}"/><w:lvlText w:val="{text}"/>'
        f'<w:pPr><w:ind w:left="{360 * (i + 1)}"/></w:pPr></w:lvl>'
        for i, (kind, text) in enumerate(levels)
    ]
    root = document.part.numbering_part.element
    root.insert(0, element("abstractNum", "".join(kinds), f'w:abstractNumId="{number}"'))
    root.append(element("num", f'<w:abstractNumId w:val="{number}"/>', f'w:numId="{number}"'))
    anew = '<w:lvlOverride w:ilvl="0"><w:startOverride w:val="1"/></w:lvlOverride>'
    root.append(element("num", f'<w:abstractNumId w:val="{number}"/>{anew}', f'w:numId="{number}1"'))


def test_lists_keep_their_depth_by_level_style_and_indent() -> None:
    document = docx.Document()
    document.add_heading("Heart failure", 1)
    for style, text in (("", "In pregnancy:"), (" 2", "stop warfarin"), ("", "Give bisoprolol")):
        document.add_paragraph(text, style=f"List Bullet{style}")
    document.add_paragraph("Follow-up.")
    for text, indent in (("- In infants:", 0), ("- half the dose", 400), ("- Give rest", 0)):
        document.add_paragraph(text).paragraph_format.left_indent = indent * 635
    document.add_paragraph("Diabetes.")
    with_list(document, ("bullet", "o"), ("bullet", "-"))
    for level, text in ((0, "Adults:"), (1, "metformin"), (0, "Rest")):
        document.element.body.insert(-1, element("p", listed(level, "77") + run(text)))
    document.element.body.insert(-1, element("p", '<w:pPr><w:ind w:left="360"/></w:pPr>' + run("and water")))
    assert [one.passage for one in split_passages(read(document))] == [
        "In pregnancy: stop warfarin",
        "Give bisoprolol. Follow-up. In infants: half the dose",
        "Give rest. Diabetes. Adults: metformin",
        "Rest and water",
    ]


def test_steps_have_the_numbers_that_word_shows() -> None:
    document = docx.Document()
    with_list(document, ("decimal", "Step %1:"), ("lowerLetter", "%1.%2)"), ("upperRoman", "%3."), ("chineseCounting", "%4、"))
    steps = [("77", 0), ("77", 0), ("77", 1), ("77", 1), ("77", 2), ("77", 3), ("77", 0), ("771", 0), ("0", 0)]
    for number, level in steps:
        document.element.body.insert(-1, element("p", listed(level, number) + run("so")))
    assert [text.removesuffix("so").strip() for text in texts(document)] == [
        "Step 1:", "Step 2:", "2.a)", "2.b)", "I.", "一、", "Step 3:", "Step 1:", "",
    ]  # fmt: skip


def test_a_list_in_a_cell_is_parted_and_one_within_it_noted() -> None:
    document = table("Drug|Action", "warfarin|")
    cell = document.tables[0].cell(1, 1)
    cell.paragraphs[0].text, cell.paragraphs[0].style = "In pregnancy:", "List Bullet"
    cell.add_paragraph("stop", style="List Number 2")
    cell.add_paragraph("Else go on", style="List Bullet")
    (only,) = read(document).blocks
    assert only.text == "Drug: warfarin. Action: In pregnancy: 1. stop; Else go on."
    assert any("a list within a list" in note for note in only.notes)


def test_two_rows_of_headers_under_a_table_style() -> None:
    document = table("Drug|Dose if eGFR is||", "|>= 60|30-59|< 30", "apixaban|5 mg|2.5 mg|avoid")
    made = document.tables[0]
    made.style = "Light List"
    made.cell(0, 1).merge(made.cell(0, 3)).text = "Dose if eGFR is"
    made.cell(0, 0).merge(made.cell(1, 0)).text = "Drug"
    (only,) = texts(document)
    assert only == "Drug: apixaban. Dose if eGFR is >= 60: 5 mg. Dose if eGFR is 30-59: 2.5 mg. Dose if eGFR is < 30: avoid."


def test_typed_numbers_are_items_too() -> None:
    document = docx.Document()
    for said in ("1、一般患者：", "（1）给予氨氯地平5mg", "（2）给予缬沙坦80mg", "2、妊娠患者：", "（1）禁用缬沙坦", "3、停药"):
        document.add_paragraph(said)
    document.add_paragraph("2. Treatment")
    assert [block.depth for block in read(document).blocks] == [0, 1, 1, 0, 1, 0, 0]
    assert [one.passage for one in split_passages(read(document))] == [
        "1、一般患者：（1）给予氨氯地平5mg; （2）给予缬沙坦80mg",
        "2、妊娠患者：（1）禁用缬沙坦",
        "3、停药。2. Treatment",
    ]
