"""Tables as sentences: every value with its header, and no value taken for one."""

from dataclasses import replace

import pytest
from gatewise_mdt.documents.document import Block
from gatewise_mdt.documents.tables import Cell, table_blocks


def row_of(texts: list[str], bold: bool = False) -> list[Cell]:
    return [Cell(text, column, bold=bold) for column, text in enumerate(texts)]


def rows(*said: str, bold: int = 0) -> list[list[Cell]]:
    return [row_of(row.split("|"), number < bold) for number, row in enumerate(said)]


def texts(made: list[list[Cell]], headers: int | None = None) -> list[str]:
    return [block.text for block in table_blocks(made, ["page 1"] * len(made), headers)]


def test_each_cell_has_its_header() -> None:
    made = table_blocks(rows("Drug|Adults|", "colchicine|0.5 mg|with food", "naproxen||"), ["a", "b", "c"], 1)
    assert made == [
        Block("Drug: colchicine. Adults: 0.5 mg. with food.", 0, "b", "row", "Drug: colchicine."),
        Block("Drug: naproxen.", 0, "c", "row"),
    ]


def test_chinese_rows_are_written_as_chinese_is() -> None:
    assert texts(rows("药物|剂量", "阿司匹林|100 mg"), 1) == ["药物：阿司匹林。剂量：100 mg。"]


def test_two_rows_of_headers_and_a_cell_over_two_columns() -> None:
    top = [Cell("Drug", 0), Cell("Adults", 1, 2)]
    below = [Cell("", 0), Cell("eGFR 30 to 59", 1), Cell("eGFR < 30", 2)]
    body = [Cell("apixaban", 0), Cell("no change", 1, 2)]
    assert texts([top, below, body], 2) == ["Drug: apixaban. Adults, eGFR 30 to 59 and Adults, eGFR < 30: no change."]


def test_a_header_over_names_of_what_is_below_is_in_a_note() -> None:
    made = table_blocks(rows("Do not give|Adults|Children", "aspirin||", "|300 mg|none"), ["page 1"] * 3, 1)
    assert [block.text for block in made] == ["aspirin. Adults: 300 mg. Children: none."]
    assert 'headers of the table were left out, as nothing stands under: "Do not give"' in made[0].notes


def test_a_row_over_all_columns_names_what_is_below_and_a_sentence_stands_alone() -> None:
    made = [*rows("Drug|Dose", "amoxicillin|500 mg"), [Cell("Penicillin allergy", 0, 2)], *rows("doxycycline|100 mg")]
    made += [[Cell("Do not give doxycycline in pregnancy.", 0, 2)], [Cell("Dialysis", 0, 2)]]
    assert texts(made, 1) == [
        "Drug: amoxicillin. Dose: 500 mg.",
        "Penicillin allergy. Drug: doxycycline. Dose: 100 mg.",
        "Do not give doxycycline in pregnancy.",
        "Dialysis",
    ]


@pytest.mark.parametrize(
    ("said", "bold", "headed"),
    [
        (("Drug|Dose", "colchicine|0.5 mg"), 0, True),
        (("Opioid|Starting amount", "morphine|5", "oxycodone|2.5"), 0, True),
        (("Finding|Adults at risk", "fever|give paracetamol"), 1, True),
        (("Acute flare|colchicine", "Renal failure|prednisolone", "Pregnancy|prednisolone"), 0, False),
        (("Acute flare|colchicine 0.5 mg", "Renal failure|prednisolone 30 mg"), 1, False),
        (("Low risk|Stop it one day before.", "High risk|Stop it two days before."), 0, False),
        (("Drug|Dose",), 1, False),
    ],
)
def test_a_first_row_is_a_header_only_if_it_looks_like_one(said: tuple[str, ...], bold: int, headed: bool) -> None:
    made = table_blocks(rows(*said, bold=bold), ["page 1"] * len(said))
    assert len(made) == len(said) - headed
    assert all(word in " ".join(block.text for block in made) for row in said for cell in row.split("|") for word in cell.split())
    if headed:
        assert made[0].notes[0].startswith("the first row of the table was taken for its headers: ")
    elif len(said) > 1:
        assert made[0].notes == ("no headers were found in the table: compare it with the document",)


@pytest.mark.parametrize("headers", [1, None])
def test_a_header_that_no_row_says_is_named_in_a_note(headers: int | None) -> None:
    made = rows("Drug|Dose|Never in pregnancy|Dose", "colchicine|0.5 mg||", "naproxen|500 mg||")
    made.append([Cell("Dialysis", 0, 4)])
    blocks = table_blocks(made, ["page 1"] * 4, headers)
    note = 'headers of the table were left out, as nothing stands under: "Never in pregnancy"'
    assert [block.text for block in blocks] == ["Drug: colchicine. Dose: 0.5 mg.", "Drug: naproxen. Dose: 500 mg.", "Dialysis"]
    assert all(block.notes[-1] == note for block in blocks)
    (alone,) = table_blocks([*made[:1], *made[3:]], ["page 1"] * 2, 1)
    assert alone.notes[0].endswith('nothing stands under: "Drug", "Dose", "Never in pregnancy"')


def test_headers_over_nothing_but_empty_rows_are_a_row() -> None:
    assert texts(rows("Drug|Dose", "|", "|"), 1) == ["Drug: Dose"]


def test_cells_without_headers_are_read_one_after_the_other() -> None:
    assert texts(rows("Low risk|Stop it.", "Give|5 mg"), 0) == ["Low risk: Stop it.", "Give 5 mg"]


EGFR = [Cell("Drug", 0), Cell("Dose if eGFR is", 1, 3)]
BODY = rows("apixaban|5 mg|2.5 mg|none", "digoxin|125|62.5|ask")


@pytest.mark.parametrize("headers", [1, None])
@pytest.mark.parametrize(
    ("top", "said"),
    [
        ([EGFR, row_of(["", ">= 60", "30-59", "< 30"])], "Dose if eGFR is {}: "),
        ([EGFR, row_of(["Drug", ">= 60", "30-59", "< 30"])], "Dose if eGFR is {}: "),
        (rows("Drug|Dose if eGFR is||", "|>= 60|30-59|< 30"), "Dose if eGFR is {}: "),
        ([[Cell("Drug", 0), Cell("Dose, adults", 1, 3)], row_of(["", ">= 60 kg", "30-59 kg", "< 30 kg"])], "Dose, adults, {} kg: "),
    ],
)
def test_headers_of_several_rows_are_joined_in_each_column(top: list[list[Cell]], said: str, headers: int | None) -> None:
    labels = [said.format(range) for range in (">= 60", "30-59", "< 30")]
    assert texts([*top, *BODY], headers)[0] == f"Drug: apixaban. {labels[0]}5 mg. {labels[1]}2.5 mg. {labels[2]}none."


def test_headers_of_three_rows() -> None:
    groups = [Cell("", 0), Cell("Adults", 1, 2), Cell("Children", 3, 2)]
    made = [[Cell("Drug", 0), Cell("Dose", 1, 4)], groups, *rows("|oral|i.v|oral|i.v", "a|1 mg|2 mg|3 mg|4 mg")]
    assert texts(made, 1)[0].startswith("Drug: a. Dose, Adults, oral: 1 mg. Dose, Adults, i.v: 2 mg. Dose, Children, oral: 3 mg.")


def test_a_row_below_a_wide_header_is_no_header_if_it_names_a_drug_or_has_a_dose() -> None:
    for first in ("apixaban|5 mg|2.5 mg|none", "rivaroxaban|full|half|none"):
        made = table_blocks([EGFR, *rows(first, "digoxin|1|2|3")], ["page 1"] * 3, 1)
        assert len(made) == 2
        assert all("that have none of their own: compare the table" in block.notes[0] for block in made)


def test_a_weight_or_a_laboratory_value_over_a_column_is_no_dose() -> None:
    for head in ("< 30 kg|>= 30 kg", "30-59 kg|60 kg", "below 3.5 mmol/L|above 3.5 mmol/L", "SpO2 < 92%|SpO2 >= 92%"):
        assert texts(rows(f"Drug|{head}", "amoxicillin|250 mg|500 mg"))[0].startswith(
            f"Drug: amoxicillin. {head.split('|')[0]}: 250 mg."
        )
    assert len(texts(rows("Drug|10-20 mg|5 mg/kg", "amoxicillin|250 mg|500 mg"))) == 2


def test_a_row_with_one_cell_alone_names_what_is_below_with_a_note_if_nothing_marks_it() -> None:
    below = ["amoxicillin|500 mg|daily", "doxycycline|100 mg|daily"]
    made = table_blocks(rows("Drug|Dose|When", "Penicillin allergy||", *below, "naproxen||"), ["page 1"] * 5, 1)
    assert [block.text for block in made] == [
        "Penicillin allergy. Drug: amoxicillin. Dose: 500 mg. When: daily.",
        "Penicillin allergy. Drug: doxycycline. Dose: 100 mg. When: daily.",
        "Penicillin allergy. Drug: naproxen.",
    ]
    assert all('"Penicillin allergy" stands alone in its row' in block.notes[-1] for block in made)
    bold = [replace(cell, bold=bool(cell.text)) for cell in row_of(["Allergy", "", ""])]
    first = table_blocks([*rows("Drug|Dose|When"), bold, *rows(*below)], ["page 1"] * 4, 1)[0]
    assert (first.text, first.notes) == ("Allergy. Drug: amoxicillin. Dose: 500 mg. When: daily.", ())


def test_a_label_below_another_is_said_with_a_note() -> None:
    over = [[Cell(text, 0, 3)] for text in ("Renal failure", "Mild")]
    made = table_blocks([*rows("Drug|Dose|When"), *over, *rows("a|5 mg|daily")], ["page 1"] * 4, 1)
    assert [block.text for block in made] == ["Renal failure", "Mild. Drug: a. Dose: 5 mg. When: daily."]
    assert '"Renal failure" stands alone in its row' in made[1].notes[0]


def test_an_empty_first_cell_is_that_of_the_row_above_with_a_note() -> None:
    first, second, third = table_blocks(
        rows("Drug|For|Dose", "colchicine|gout|0.5 mg", "|fever|1 mg", "naproxen|gout|5 mg"), ["a"] * 4, 1
    )
    assert second.text == "Drug: colchicine. For: fever. Dose: 1 mg."
    assert second.notes == ('its first cell is empty, and "colchicine" was taken from a row above: compare it with the document',)
    assert (first.notes, third.notes) == ((), ())
