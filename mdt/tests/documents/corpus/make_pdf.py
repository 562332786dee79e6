"""Writes the PDFs of the corpus: `python mdt/tests/corpus/make_pdf.py`. What must be found in each is in the JSON beside it."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from reportlab.lib import colors
from reportlab.lib.pagesizes import A4
from reportlab.lib.styles import ParagraphStyle
from reportlab.pdfbase import pdfmetrics
from reportlab.pdfbase.cidfonts import UnicodeCIDFont
from reportlab.platypus import (
    BaseDocTemplate,
    Frame,
    FrameBreak,
    ListFlowable,
    NextPageTemplate,
    PageBreak,
    PageTemplate,
    Paragraph,
    Spacer,
    Table,
    TableStyle,
)

HERE = Path(__file__).parent
NOTICE = "Invented text for tests. Not for clinical use."
WIDTH, HEIGHT = A4
EDGE, GUTTER = 56, 24
TITLE = ParagraphStyle("title", fontName="Helvetica-Bold", fontSize=20, leading=24, spaceAfter=10)
FIRST = ParagraphStyle("first", fontName="Helvetica-Bold", fontSize=14, leading=18, spaceBefore=10, spaceAfter=4)
SECOND = ParagraphStyle("second", fontName="Helvetica-Bold", fontSize=11.5, leading=14, spaceBefore=6, spaceAfter=3)
BODY = ParagraphStyle("body", fontName="Helvetica", fontSize=10, leading=13, spaceAfter=6)
BOLD = ParagraphStyle("bold", parent=BODY, fontName="Helvetica-Bold")
SMALL = ParagraphStyle("small", parent=BODY, fontSize=7.5, leading=9)
RULED = [("GRID", (0, 0), (-1, -1), 0.5, colors.black), ("VALIGN", (0, 0), (-1, -1), "TOP")]


def document(
    name: str,
    story: Sequence[Any],
    *,
    columns: int = 1,
    first: float = 0,
    header: str = "",
    footer: str = NOTICE,
    footnotes: Sequence[str] = (),
    font: str = "Helvetica",
) -> None:
    """A document with a running header and footer; of two columns below a strip over both that is ``first`` points high."""

    def margins(canvas: Any, made: Any) -> None:
        canvas.setFont(font, 8)
        if header:
            canvas.drawString(EDGE, HEIGHT - 34, header)
        canvas.drawString(EDGE, 30, footer)
        canvas.drawRightString(WIDTH - EDGE, 30, str(made.page))
        if footnotes and made.page == 1:
            canvas.line(EDGE, 92, EDGE + 140, 92)
            for number, note in enumerate(footnotes, start=1):
                canvas.setFont("Helvetica", 5)
                canvas.drawString(EDGE, 92 - 12 * number + 3, str(number))
                canvas.setFont("Helvetica", 7.5)
                canvas.drawString(EDGE + 5, 92 - 12 * number, note)

    low = 110 if footnotes else EDGE
    width = (WIDTH - 2 * EDGE - (columns - 1) * GUTTER) / columns

    def frames(top: float) -> list[Frame]:
        return [
            Frame(EDGE + number * (width + GUTTER), low, width, HEIGHT - EDGE - low - top, 0, 0, 0, 0) for number in range(columns)
        ]

    strip = [Frame(EDGE, HEIGHT - EDGE - first, WIDTH - 2 * EDGE, first, 0, 0, 0, 0)] if first else []
    made = BaseDocTemplate(str(HERE / f"{name}.pdf"), pagesize=A4, invariant=1, title=name)
    made.addPageTemplates(
        [PageTemplate("first", strip + frames(first), onPage=margins), PageTemplate("later", frames(0), onPage=margins)]
    )
    made.build([NextPageTemplate("later"), *story])


def p(text: str, style: ParagraphStyle = BODY) -> Paragraph:
    return Paragraph(text, style)


def table(
    rows: Sequence[Sequence[str]], widths: Sequence[float], style: Sequence[Any] = (), bold: bool = True, **more: Any
) -> Table:
    cells = [[p(text, BOLD if bold and not number else BODY) for text in row] for number, row in enumerate(rows)]
    return Table(cells, colWidths=list(widths), style=TableStyle(list(style)), hAlign="LEFT", **more)


def cholesterol_columns(name: str) -> None:
    filler = (
        "Cholesterol is measured after a meal or without one, as it suits the patient, and the value of the laboratory nearest to"
        " the patient counts."
    )
    story = [
        p("Cholesterol: a guide for practices", TITLE),
        p(NOTICE),
        FrameBreak(),
        p("1 Adults at high risk", FIRST),
        p("Offer atorvastatin 20 mg daily if the ten-year risk is 10 per cent or more. " + filler),
        p("1.1 Chronic kidney disease", SECOND),
        p("Offer atorvastatin 20 mg daily. Increase the dose only with the advice of a renal specialist if the eGFR is below 30."),
        p("1.2 Muscle pain", SECOND),
        p("Measure creatine kinase. If it is above five times the upper limit, stop atorvastatin. Otherwise go on and look again."),
        *[p(f"Background paragraph {number}. {filler}") for number in range(1, 12)],
        p("2 Women who may become pregnant", FIRST),
        p("Do not offer statins. Stop them three months before conception."),
        p("3 Children with familial disease", FIRST),
        p("Refer to a specialist before the age of ten. " + filler),
        *[p(f"Later paragraph {number}. {filler}") for number in range(1, 14)],
        p("3.1 What if both parents are affected?", SECOND),
        p("Refer before the age of five."),
    ]
    document(name, story, columns=2, first=70, header="Practice guide 4: cholesterol")


def insulin_table(name: str) -> None:
    rows = [["Glucose (mmol/L)", "Adults", "Children over 6"]]
    rows += [
        [f"{low} to {low + 1.9:.1f}", f"{units} units", f"{units / 2:g} units"]
        for low, units in zip(range(8, 22, 2), range(2, 16, 2), strict=True)
    ]
    said = "The scale is for patients who do not eat, and is written anew each day by the doctor on call."
    renal = [["If", "Then"], ["eGFR is below 30", "halve each dose"], ["on dialysis", "ask the renal team"]]
    story = [
        p("Insulin on the ward", TITLE),
        *[p(said)] * 31,
        p("Correction doses", FIRST),
        table(rows, [130, 150, 150], RULED, repeatRows=1),
        p("Check glucose again after 2 hours."),
        p("Hypoglycaemia", FIRST),
        p("If glucose is below 4 mmol/L, give 20 g of glucose by mouth. If the patient cannot swallow, give glucagon 1 mg i.m."),
        *[p(said)] * 25,
        p("Patients with renal failure", FIRST),
        table(renal, [200, 200], RULED),
        p("Ask the pharmacist about other drugs."),
    ]
    document(name, story, header="Ward guideline 9")


def opioids_unruled(name: str) -> None:
    rows = [
        ["Opioid", "Starting dose", "eGFR below 30"],
        ["Morphine", "5 mg every 4 hours", "avoid"],
        ["Oxycodone", "2.5 mg every 6 hours", "halve the dose"],
        ["Fentanyl patch", "12 micrograms per hour, for patients with stable pain only", "no change"],
    ]
    story = [
        p("Pain in palliative care", TITLE),
        p("Adults with cancer pain", FIRST),
        p("Start with a low dose, and see the patient within 48 hours."),
        table(rows, [110, 190, 120]),
        p("Give a laxative with every opioid."),
        p("Older patients", FIRST),
        p("Start at half of the dose."),
    ]
    document(name, story)


def thrombosis_boxes(name: str) -> None:
    boxed = [
        p("Box 2: When not to give enoxaparin", BOLD),
        p("Do not give enoxaparin if platelets are below 50 × 10<super>9</super>/L."),
        p("Stop it 24 hours before surgery."),
    ]
    box = Table(
        [[boxed]],
        colWidths=[300],
        style=TableStyle([("BOX", (0, 0), (-1, -1), 1, colors.black), ("BACKGROUND", (0, 0), (-1, -1), colors.whitesmoke)]),
        hAlign="LEFT",
    )
    story = [
        p("Venous thrombosis", TITLE),
        p("Adults with pulmonary embolism", FIRST),
        p(
            "Give enoxaparin 1 mg/kg every 12 hours.<super size=6>1</super>"
            " If the systolic blood pressure is below 90 mmHg, give alteplase.<super size=6>2</super>"
        ),
        Spacer(1, 6),
        box,
        Spacer(1, 6),
        p("Treat for three months."),
        p("Cancer", SECOND),
        p(
            "Treat for six months. The patient decides with the doctor whether to go on, and is asked again every six months,"
            " as long as the cancer is active or is being treated."
        ),
        PageBreak(),
        p("Pregnancy", SECOND),
        p("Do not give warfarin."),
    ]
    notes = ["If eGFR is below 30, give 1 mg/kg once daily.", "Not after surgery within the last 14 days."]
    document(name, story, footnotes=notes)


def copd_questions(name: str) -> None:
    bullets = ["breathlessness that limits walking", "two exacerbations in a year"]
    story = [
        p("COPD: questions and answers", TITLE),
        p("1 Adults with COPD", FIRST),
        p("Which inhaler should be offered first?", BOLD),
        p("1.1.1 Offer a long-acting bronchodilator to patients with:"),
        ListFlowable([p(text) for text in bullets], bulletType="bullet", start="•"),
        p("1.1.2 Do not offer an inhaled corticosteroid alone."),
        p("What if there is asthma as well?", BOLD),
        p("1.2.1 Offer an inhaled corticosteroid with a long-acting bronchodilator."),
        p("Oxygen:", BOLD),
        p("1.3.1 Offer oxygen if PaO2 is below 7.3 kPa on two occasions."),
        p("1.3.2 Do not offer oxygen to patients who smoke."),
        p("2 Adults with an exacerbation", FIRST),
        p("Give prednisolone 30 mg for 5 days."),
    ]
    document(name, story)


def anaemia_levels(name: str) -> None:
    story = [
        p("Iron deficiency", TITLE),
        p("Adults", FIRST),
        p(
            "Give ferrous sulfate 200 mg once daily. Measure haemoglobin after four weeks, and go on for three months after it"
            " is nor-<br/>mal, as stores need time."
        ),
        p("Inflammatory bowel disease", SECOND),
        p("Give iron i.v. if haemoglobin is below 100 g/L, e.g. ferric carboxymaltose."),
        p("Pregnant women", FIRST),
        p("First trimester", SECOND),
        p("Do not give iron i.v."),
        p("Second trimester", SECOND),
        p("Give iron i.v. if tablets fail."),
        p("Children", FIRST),
        p("Give 3 mg/kg of iron daily."),
    ]
    document(name, story)


def pneumonia_zh(name: str) -> None:
    pdfmetrics.registerFont(UnicodeCIDFont("STSong-Light"))
    made = {
        size: ParagraphStyle(f"zh{size}", fontName="STSong-Light", fontSize=size, leading=1.5 * size, spaceAfter=6, wordWrap="CJK")
        for size in (20, 14, 10)
    }
    story = [
        p("肺炎用药示例", made[20]),
        p("一、成人社区获得性肺炎患者", made[14]),
        p(
            "首选阿莫西林0.5 g，每日3次。对青霉素过敏的患者，可用左氧氟沙星0.5 g，每日1次；"
            "如果患者同时有癫痫病史，则不宜使用左氧氟沙星，可以改用多西环素0.1 g，每日2次。",
            made[10],
        ),
        p("（一）肾功能不全", made[10]),
        p("阿莫西林减量。", made[10]),
        p("二、儿童肺炎患者", made[14]),
        p("首选阿莫西林，每日50 mg/kg，分3次口服。", made[10]),
    ]
    document(name, story, footer="本文为测试而编写，不得用于临床。", font="STSong-Light")


DOCUMENTS: dict[str, Callable[[str], None]] = {
    "cholesterol-columns": cholesterol_columns,
    "insulin-table": insulin_table,
    "opioids-unruled": opioids_unruled,
    "thrombosis-boxes": thrombosis_boxes,
    "copd-questions": copd_questions,
    "anaemia-levels": anaemia_levels,
    "pneumonia-zh": pneumonia_zh,
}


if __name__ == "__main__":
    for name, make in DOCUMENTS.items():
        make(name)
