"""Writes the Word documents of the corpus: `python mdt/tests/corpus/make_docx.py`.

What must be found in each is in the JSON beside it.
"""

import io
import re
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import docx
from docx.enum.style import WD_STYLE_TYPE
from docx.oxml import OxmlElement, parse_xml
from docx.oxml.ns import nsdecls, qn
from docx.shared import Pt

HERE = Path(__file__).parent
NOTICE = "Invented text for tests. Not for clinical use."
Rows = Sequence[Sequence[str]]


def style(document: Any, name: str, base: str | None = None, outline: int | None = None, hidden: bool = False) -> str:
    made = document.styles.add_style(name, WD_STYLE_TYPE.PARAGRAPH)
    made.base_style = document.styles[base] if base else document.styles["Normal"]
    if outline is not None:
        made.element.get_or_add_pPr().append(value("outlineLvl", outline))
    if hidden:
        made.font.hidden = True
    return name


def value(tag: str, val: object) -> Any:
    made = OxmlElement(f"w:{tag}")
    made.set(qn("w:val"), str(val))
    return made


def table(document: Any, rows: Rows, header_rows: int = 0, bold: bool = False) -> Any:
    made = document.add_table(len(rows), len(rows[0]))
    made.style = "Table Grid"
    for number, (row, texts) in enumerate(zip(made.rows, rows, strict=True)):
        if number < header_rows:
            row._tr.get_or_add_trPr().append(OxmlElement("w:tblHeader"))
        for cell, text in zip(row.cells, texts, strict=True):
            run = cell.paragraphs[0].add_run(text)
            run.bold = (bold and number == 0) or None
    return made


def footnotes(document: Any, notes: Sequence[tuple[Any, str]]) -> None:
    """Adds footnotes to the ends of paragraphs, as python-docx has none of its own."""
    from docx.opc.constants import RELATIONSHIP_TYPE
    from docx.opc.packuri import PackURI
    from docx.opc.part import Part

    said = "".join(
        f'<w:footnote w:id="{number}"><w:p><w:r><w:t>{text}</w:t></w:r></w:p></w:footnote>'
        for number, (_, text) in enumerate(notes, start=1)
    )
    rule = '<w:footnote w:type="separator" w:id="0"><w:p><w:r><w:separator/></w:r></w:p></w:footnote>'
    root = f"<w:footnotes {nsdecls('w')}>{rule}{said}</w:footnotes>"
    kind = "application/vnd.openxmlformats-officedocument.wordprocessingml.footnotes+xml"
    part = Part(PackURI("/word/footnotes.xml"), kind, root.encode(), document.part.package)
    document.part.relate_to(part, RELATIONSHIP_TYPE.FOOTNOTES)
    for number, (paragraph, _) in enumerate(notes, start=1):
        mark = value("footnoteReference", "")
        del mark.attrib[qn("w:val")]
        mark.set(qn("w:id"), str(number))
        run = paragraph.add_run()
        run.font.superscript = True
        run._r.append(mark)


def text_box(paragraph: Any, *lines: str) -> None:
    inside = "".join(f"<w:p><w:r><w:t>{line}</w:t></w:r></w:p>" for line in lines)
    paragraph._p.append(
        parse_xml(
            f'<w:r {nsdecls("w")} xmlns:v="urn:schemas-microsoft-com:vml"><w:pict><v:shape><v:textbox><w:txbxContent>{inside}'
            "</w:txbxContent></v:textbox></v:shape></w:pict></w:r>"
        )
    )


def asthma_styles() -> Any:
    document = docx.Document()
    section = style(document, "House section", base="Heading 1")
    deeper = style(document, "House subsection", base=style(document, "House middle", base="Heading 2"))
    outlined = style(document, "Frame heading", outline=2)
    document.add_heading("Asthma in hospital", 0)
    document.add_paragraph(NOTICE)
    document.add_paragraph("Adults with asthma", style=section)
    document.add_paragraph("Offer budesonide 200 micrograms twice daily.")
    document.add_paragraph("Renal failure", style=deeper)
    document.add_paragraph("Do not give NSAIDs.")
    document.add_paragraph("Dialysis", style=outlined)
    document.add_paragraph("Give paracetamol only.")
    document.add_paragraph("Children with asthma", style=section)
    document.add_paragraph("Offer montelukast if a spacer is refused.")
    direct = document.add_paragraph("What if the child is under five?")
    direct._p.get_or_add_pPr().append(value("outlineLvl", 1))
    document.add_paragraph("Do not use a dry powder inhaler.")
    body = document.add_paragraph("Review the technique at each visit.", style=deeper)
    body._p.get_or_add_pPr().append(value("outlineLvl", 9))
    return document


def anticoagulant_tables() -> Any:
    document = docx.Document()
    document.add_heading("Anticoagulants", 1)
    document.add_paragraph(NOTICE)
    document.add_heading("Starting doses", 2)
    rows = [
        ["Drug", "Adults", "", "Children"],
        ["", "eGFR 50 or more", "eGFR 15 to 49", ""],
        ["Apixaban", "5 mg twice daily", "2.5 mg twice daily", "do not give"],
        ["Rivaroxaban", "20 mg once daily", "15 mg once daily", "ask haematology"],
        ["", "with food", "with food", "in hospital only"],
    ]
    made = table(document, rows, header_rows=2)
    made.cell(0, 1).merge(made.cell(0, 2))
    made.cell(0, 0).merge(made.cell(1, 0))
    made.cell(0, 3).merge(made.cell(1, 3))
    made.cell(3, 0).merge(made.cell(4, 0))
    document.add_heading("Adults with bleeding", 2)
    document.add_paragraph("Stop the anticoagulant.")
    table(document, [["Drug", "Antidote"], ["Apixaban", "andexanet alfa"], ["Dabigatran", "idarucizumab 5 g"]], bold=True)
    document.add_heading("Adults before surgery", 2)
    table(document, [["Low risk of bleeding", "Stop apixaban 24 hours before."], ["High risk", "Stop apixaban 48 hours before."]])
    return document


def warfarin_hidden() -> Any:
    document = docx.Document()
    hidden = style(document, "Author note", hidden=True)
    document.sections[0].header.paragraphs[0].text = "Trust policy 31"
    document.sections[0].footer.paragraphs[0].text = NOTICE
    document.add_heading("Adults on warfarin", 1)
    document.add_heading("INR above the target", 2)
    paragraph = document.add_paragraph("If the INR is above 8, stop warfarin")
    old = paragraph.add_run(" and give 10 mg phytomenadione at once")
    old.font.hidden = True
    paragraph.add_run(" and give phytomenadione 1 mg.")
    document.add_paragraph("Ask the committee whether this is still right.", style=hidden)
    tracked = document.add_paragraph("Restart warfarin when the INR is below ")
    tracked._p.append(parse_xml(f'<w:del {nsdecls("w")} w:id="1" w:author="a"><w:r><w:delText>6</w:delText></w:r></w:del>'))
    tracked._p.append(parse_xml(f'<w:ins {nsdecls("w")} w:id="2" w:author="a"><w:r><w:t>5</w:t></w:r></w:ins>'))
    tracked.add_run(".")
    commented = document.add_paragraph("Do not give vitamin K to patients with mechanical valves unless they bleed.")
    document.add_comment(commented.runs, text="Which dose?", author="a")
    document.add_heading("Pregnancy", 2)
    footnotes(document, [(document.add_paragraph("Change to enoxaparin 1 mg/kg twice daily."), "Not in severe renal failure.")])
    return document


def anaphylaxis_boxes() -> Any:
    document = docx.Document()
    document.add_heading("Anaphylaxis", 0)
    document.add_paragraph(NOTICE)
    document.add_heading("Adults with anaphylaxis", 1)
    box = document.add_table(1, 1)
    box.style = "Table Grid"
    box.cell(0, 0).text = "Box 1. Red flags"
    box.cell(0, 0).add_paragraph("Call the team if there is stridor.")
    box.cell(0, 0).add_paragraph("Do not wait for a rash.")
    first = document.add_paragraph("Give adrenaline 500 micrograms i.m.")
    text_box(first, "Never give adrenaline i.v. outside intensive care.")
    document.add_paragraph("If there is no response after 5 minutes:", style="List Bullet")
    document.add_paragraph("repeat adrenaline", style="List Bullet 2")
    document.add_paragraph("give fluids 500 ml", style="List Bullet 2")
    document.add_paragraph("Otherwise observe for 6 hours.", style="List Bullet")
    document.add_heading("Patients who take a beta blocker", 2)
    document.add_paragraph("Consider glucagon 1 mg i.m.")
    return document


def diabetes_zh() -> Any:
    document = docx.Document()
    document.add_heading("糖尿病用药示例", 0)
    document.add_paragraph("本文为测试而编写，不得用于临床。")
    document.add_heading("一、2型糖尿病患者", 1)
    document.add_paragraph("首选二甲双胍0.5 g，每日2次。")
    document.add_heading("（一）肾功能不全", 2)
    document.add_paragraph("eGFR<30的患者禁用二甲双胍。")
    rows = [["药物", "eGFR 30~59", "eGFR<30"], ["二甲双胍", "减量", "禁用"], ["利格列汀", "5 mg，每日1次", "5 mg，每日1次"]]
    table(document, rows, header_rows=1)
    document.add_heading("二、儿童糖尿病患者如何处理？", 1)
    document.add_paragraph("首选胰岛素。")
    return document


def stroke_numbered() -> Any:
    """Headings that are only bold and large, with no style at all, and recommendations whose numbers are typed."""
    document = docx.Document()

    def heading(text: str, points: int) -> None:
        run = document.add_paragraph().add_run(text)
        run.bold, run.font.size = True, Pt(points)

    heading("Stroke and TIA", 18)
    document.add_paragraph(NOTICE)
    heading("1 Adults with ischaemic stroke", 14)
    document.add_paragraph("1.1.1 Give aspirin 300 mg within 24 hours unless alteplase was given.")
    document.add_paragraph("1.1.2 If alteplase was given, wait for 24 hours and repeat the scan.")
    heading("Swallowing is unsafe:", 12)
    document.add_paragraph("1.2.1 Give aspirin by enteral tube.")
    heading("2 Adults with haemorrhagic stroke", 14)
    document.add_paragraph("2.1.1 Do not give aspirin.")
    strong = document.add_paragraph()
    strong.add_run("Stop all anticoagulants at once.").bold = True
    document.add_paragraph("2.1.2 Lower the systolic blood pressure to 140 mmHg.")
    return document


def seizure_protocol() -> Any:
    document = docx.Document()
    document.add_paragraph("Convulsive status epilepticus", style="Title")
    document.add_paragraph("Protocol of the emergency department", style="Subtitle")
    document.add_paragraph(NOTICE)
    document.add_heading("Adults with a seizure", 1)
    rows = [
        ["Time", "What to do"],
        ["0 to 5 minutes", "Give oxygen. Check glucose."],
        ["5 to 15 minutes", "Give lorazepam 4 mg i.v. If there is no access, give midazolam 10 mg buccally."],
        ["15 minutes", "Give levetiracetam 60 mg/kg, at most 4.5 g."],
    ]
    table(document, rows, header_rows=1)
    power = document.add_paragraph("Stop valproate if platelets fall below 100 × 10")
    power.add_run("9").font.superscript = True
    power.add_run("/L.")
    document.add_heading("Women of childbearing age", 2)
    document.add_paragraph("Do not give valproate.")
    document.add_heading("Children with a seizure", 1)
    document.add_paragraph("Give midazolam 0.3 mg/kg buccally.")
    return document


DOCUMENTS: dict[str, Callable[[], Any]] = {
    "asthma-styles": asthma_styles,
    "anticoagulant-tables": anticoagulant_tables,
    "warfarin-hidden": warfarin_hidden,
    "anaphylaxis-boxes": anaphylaxis_boxes,
    "diabetes-zh": diabetes_zh,
    "stroke-numbered": stroke_numbered,
    "seizure-protocol": seizure_protocol,
}


def small(content: bytes) -> bytes:
    """The document without what python-docx's template adds for looks, and the same for every run."""
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as new:
        for name in old.namelist():
            data = old.read(name)
            if name in ("docProps/thumbnail.jpeg", "word/stylesWithEffects.xml"):
                continue
            if name.endswith(".rels"):
                data = re.sub(rb"<Relationship [^>]*(?:thumbnail|stylesWithEffects)[^>]*/>", b"", data)
            if name == "[Content_Types].xml":
                data = re.sub(rb"<Override [^>]*stylesWithEffects[^>]*/>", b"", data)
            if name == "word/styles.xml":  # a hundred styles of tables
                data = re.sub(
                    rb'<w:style w:type="table" w:styleId="(?!TableGrid|TableNormal).*?</w:style>', b"", data, flags=re.DOTALL
                )
            new.writestr(zipfile.ZipInfo(name, (2026, 1, 1, 0, 0, 0)), data, zipfile.ZIP_DEFLATED)
    return made.getvalue()


def main() -> None:
    for name, make in DOCUMENTS.items():
        made = io.BytesIO()
        make().save(made)
        (HERE / f"{name}.docx").write_bytes(small(made.getvalue()))


if __name__ == "__main__":
    main()
