"""Plain text and printed pages: headings are told from sentences, page numbers from doses, and the notes say what is left out."""

import pytest
from gatewise_mdt.documents.document import Document
from gatewise_mdt.documents.headings import unnumbered
from gatewise_mdt.documents.passages import Passage, split_passages
from gatewise_mdt.documents.plain_text import join_lines
from gatewise_mdt.documents.reading import document_of


def text(said: str) -> Document:
    return document_of(said.encode(), "gout.txt", ".txt")


def said(found: list[Passage]) -> str:
    return " ".join(one.text for one in found)


@pytest.mark.parametrize(
    "line",
    [
        "If the patient has acute gout, give colchicine",
        "痛风患者首选秋水仙碱",
        "Acute gout colchicine",
        "Stop allopurinol",
        "2. Do not give NSAIDs",
        "Gout in adults\n\nTreatment",
    ],
)
def test_a_text_of_one_line_is_a_passage(line: str) -> None:
    assert said(split_passages(text(line))) == line.replace("\n\n", ". ")


@pytest.mark.parametrize(
    "line",
    [
        "Do not give NSAIDs in renal failure",
        "Stop allopurinol during pregnancy",
        "NSAIDs are contraindicated",
        "Patients have renal failure",
        "Adults should rest",
        "Colchicine 0.5 mg",
        "ALT >3 times the upper limit",
        "妊娠期禁用秋水仙碱",
        "患者应卧床",
    ],
)
def test_an_instruction_is_no_heading(line: str) -> None:
    document = text(f"Gout in adults\n\nFor a flare, give colchicine.\n\n{line}\n\nGive prednisolone otherwise.\n\n{line}")
    (only,) = split_passages(document)
    assert only.population == "Gout in adults"
    assert only.passage.count(line) == 2
    assert document.notes == ()


@pytest.mark.parametrize(
    ("line", "population"),
    [
        ("Gout in adults", "Gout in adults"),
        ("Patients who have gout", "Patients who have gout"),
        ("Use of steroids", "Use of steroids"),
        ("2.1 Renal failure", "Renal failure"),
        ("ACUTE FLARES OF GOUT AND THE LONG RUN", "ACUTE FLARES OF GOUT AND THE LONG RUN"),
        ("一、痛风患者的药物使用", "痛风患者的药物使用"),
        ("禁忌证", "禁忌证"),
        ("药物不良反应", "药物不良反应"),
        ("Acute flares of gout, and what follows in the long run", ""),
    ],
)
def test_what_stands_like_a_heading_names_the_population(line: str, population: str) -> None:
    (found,) = split_passages(text(f"{line}\n\nGive colchicine."))
    assert found.population == population
    assert line in f"{found.headings}{found.passage}"


def test_a_title_stands_above_the_headings_of_a_text() -> None:
    document = text("Gout in adults\n\nTreatment\n\nGive colchicine.\n\n1.1 Diet\n\nDrink water.\n\nAuthors")
    assert [one.headings for one in split_passages(document)] == [
        ("Gout in adults", "Treatment"),
        ("Gout in adults", "Treatment", "1.1 Diet"),
    ]
    assert document.notes == ('gout.txt: a heading was left out, as nothing stands under: "Authors" (line 11)',)


def test_numbered_headings_need_no_empty_line_before_their_text() -> None:
    text = (
        "Gout in primary care\n\n1. Introduction\nGout is common.\n2. Treatment\n2.1 Adults with normal renal function\n"
        "Give colchicine\ntwice daily.\n2.2 Patients with chronic kidney disease\nStage 3\nGive prednisolone.\n"
        "一、儿童哮喘的治疗\n首选沙丁胺醇雾化吸入。"
    )
    found = [(one.population, one.passage) for one in split_passages(document_of(text.encode(), "a.txt", ".txt"))]
    assert found == [
        ("Gout in primary care", "Introduction: Gout is common."),
        ("Adults with normal renal function", "Gout in primary care: Treatment: Give colchicine twice daily."),
        ("Patients with chronic kidney disease", "Gout in primary care: Treatment: Stage 3 Give prednisolone."),
        ("儿童哮喘的治疗", "Gout in primary care: 首选沙丁胺醇雾化吸入。"),
    ]


@pytest.mark.parametrize(
    "text",
    [
        "The options are\n1. Colchicine\n2. Naproxen\n3. Prednisolone\nin this order.",
        "The options are\n1. Colchicine\n2. Naproxen\n3. Prednisolone\nGive them in this order.",
        "The dose of colchicine is\n2.5 Mg or less a day.",
        "The target is\n1 Glucose below 7 mmol/L\nGive insulin above it.",
    ],
)
def test_items_of_a_list_and_broken_lines_are_no_headings(text: str) -> None:
    (passage,) = split_passages(document_of(text.encode(), "a.txt", ".txt"))
    assert passage.passage == " ".join(text.split())


def test_questions_and_names_with_a_colon_are_headings() -> None:
    found = split_passages(
        text(
            "Adults with gout\n\nWhat if the kidneys fail?\n\nGive prednisolone.\n\nDialysis:\n\nGive less.\n\n"
            "Children with gout\n\nGive the following:\n\nnaproxen and rest.\n\n儿童怎么办？\n\n首选布洛芬。"
        )
    )
    assert [one.text for one in found] == [
        "Adults with gout@What if the kidneys fail? Give prednisolone.",
        "Adults with gout@What if the kidneys fail? Dialysis: Give less.",
        "Children with gout@Give the following: naproxen and rest.",
        "Children with gout@儿童怎么办？首选布洛芬。",
    ]


def test_items_of_a_list_are_told_apart_and_a_range_is_none() -> None:
    blocks = text("Give one of these:\n- 5 mg\n- 10 mg daily\n\nA dose of 5\n- 10 mg.").blocks
    assert [(block.kind, block.text) for block in blocks] == [
        ("paragraph", "Give one of these:"),
        ("item", "5 mg"),
        ("item", "10 mg daily"),
        ("paragraph", "A dose of 5 - 10 mg."),
    ]


def test_what_comes_after_a_list_under_a_short_line_is_doubted() -> None:
    blocks = text("Gout\n\nGive rest.\n\nHeart failure\n\n- x\n\nGive it.\n\n- y\n\nMonitoring\n\n- z\n\nStop it.").blocks
    doubted = [block.text for block in blocks if any("was taken for a heading" in note for note in block.notes)]
    assert doubted == ["Give it.", "y"]


@pytest.mark.parametrize(
    ("text", "depths"),
    [
        ("1. In pregnancy:\n\n   - stop it\n\n2. Give rest", [0, 1, 0]),
        ("1. Pregnancy\n   + stop it\n   + rest\n2. Give rest", [0, 1, 1, 0]),
        ("1、患者：\n（1）氨氯地平\n①5mg\n②10mg\n（2）缬沙坦\n2、孕妇禁用", [0, 1, 2, 2, 1, 0]),
        ("• a\n\t◦ b\n• c", [0, 1, 0]),
        ("a) first\nb) second\n- inner", [0, 0, 0]),
    ],
)
def test_items_are_as_deep_as_they_are_moved_in_or_numbered(text: str, depths: list[int]) -> None:
    blocks = document_of(text.encode(), "a", ".txt").blocks
    assert [block.depth for block in blocks] == depths
    assert {block.kind for block in blocks} == {"item"}


def test_words_cut_at_the_end_of_a_line_keep_the_hyphens_of_their_own() -> None:
    for lines, said in (
        (["Give co-", "amoxiclav once-", "daily"], "Give co-amoxiclav once-daily"),
        (
            ["co-", "morbid follow-", "up at follow-", "ing co-", "agulation, co-", "deine"],
            "co-morbid follow-up at following coagulation, codeine",
        ),
        (["co-", "danthramer follow-", "ups"], "co-danthramer follow-ups"),
        (["Co-", "trifamole as co-", "treatment"], "Co-trifamole as co-treatment"),
        (["Non-", "steroidal ACE-", "inhibitor Fol-", "low"], "Non-steroidal ACE- inhibitor Follow"),
        (["two-", "thirds of hydro\u2010", "chlorothiazide"], "two-thirds of hydrochlorothiazide"),
        (["hydro\xad", "chlorothiazide"], "hydrochlorothiazide"),
    ):
        assert join_lines(lines) == said


def test_what_a_heading_counts_is_no_number_of_it() -> None:
    for line, rest in (
        ("2 Treatment", "Treatment"),
        ("2.1 Adults with gout", "Adults with gout"),
        ("3 治疗", "治疗"),
        ("4 类风湿关节炎", "类风湿关节炎"),
        ("5 周围神经病变", "周围神经病变"),
        ("6 months to 5 years", "6 months to 5 years"),
        ("24 Hours after surgery", "24 Hours after surgery"),
        ("2 型糖尿病患者", "2 型糖尿病患者"),
        ("3 个月以下婴儿", "3 个月以下婴儿"),
        ("4.5 小时内静脉溶栓", "4.5 小时内静脉溶栓"),
        ("4.5 Hours after onset", "4.5 Hours after onset"),
        ("2.5 岁以下儿童", "2.5 岁以下儿童"),
        ("2.5 个月以下婴儿", "2.5 个月以下婴儿"),
        ("0.25 小时内", "0.25 小时内"),
        ("6 周期R-CHOP方案", "6 周期R-CHOP方案"),
        ("3.2 个体化治疗", "个体化治疗"),
        ("3.10 Days off work", "Days off work"),
        ("4 级联检测", "级联检测"),
        ("4 度洛西汀", "度洛西汀"),
    ):
        assert unnumbered(line) == rest


def test_a_length_of_time_behind_a_colon_is_no_heading() -> None:
    document = text("Antibiotics are to be continued for:\n14 Days\nGive dexamethasone before the first dose to all adults.")
    assert len(split_passages(document)) == 1


@pytest.mark.parametrize(
    ("first", "said", "others"),
    [
        ("3.1 一般治疗", "患者应给予健康教育。", ("3.2 个体化治疗", "3.3 期待治疗", "3.4 周期性治疗")),
        ("1 Month to 2 Years", "Give amoxicillin 250 mg.", ("2 Years to 12 Years", "24 Hours after surgery", "4 Day surgery")),
    ],
)
@pytest.mark.parametrize("white", ["\n", "\n\n"])
def test_headings_that_begin_with_a_number_of_any_kind_part_what_stands_under_them(
    first: str, said: str, others: tuple[str, ...], white: str
) -> None:
    document = text(white.join(line for heading in (first, *others) for line in (heading, said)))
    assert [block.text for block in document.blocks if block.level] == [first, *others]
    assert len(split_passages(document)) == 1 + len(others)
