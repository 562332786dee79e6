"""Passages: the whole way of headings, nothing cut from what it refers to, no more characters than asked for, places and notes."""

import re
from unittest.mock import ANY

import pytest
from gatewise_mdt.documents.document import Block, Document
from gatewise_mdt.documents.passages import Passage, split_passages
from gatewise_mdt.documents.reading import document_of
from hypothesis import example, given
from hypothesis import strategies as st
from mdt_trees import properties

NSAIDS = "Do not give NSAIDs."


def read(text: str, suffix: str = ".md", **settings: object) -> list[Passage]:
    return split_passages(document_of(text.encode(), f"a{suffix}", suffix), **settings)  # type: ignore[arg-type]


def of_blocks(*blocks: Block | str, **settings: object) -> list[Passage]:
    made = tuple(block if isinstance(block, Block) else Block(block) for block in blocks)
    return split_passages(Document("x", made), **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("headings", "text"),
    [
        (["Adults with asthma", "Renal failure"], f"Adults with asthma@Renal failure: {NSAIDS}"),
        (["Asthma", "Renal failure"], f"Asthma@Renal failure: {NSAIDS}"),
        (["House guideline 7", "Asthma", "Treatment"], f"Asthma@House guideline 7: Treatment: {NSAIDS}"),
        (["Adults", "Adults with asthma", "2.1 Dialysis"], f"Adults with asthma@Dialysis: {NSAIDS}"),
        (["Adults with asthma", "Pregnant women"], f"Adults with asthma, Pregnant women@{NSAIDS}"),
        (["Adults with asthma", "Pregnancy"], f"Adults with asthma@Pregnancy: {NSAIDS}"),
        (["Asthma", "Which patients need care?", "Renal failure:"], f"Asthma@Which patients need care? Renal failure: {NSAIDS}"),
        (["Treatment"], f"Treatment: {NSAIDS}"),
        (["哮喘", "一、成人患者", "（二）肾功能不全"], f"成人患者@哮喘：肾功能不全：{NSAIDS}"),
    ],
)
def test_the_whole_way_of_headings_is_in_the_text(headings: list[str], text: str) -> None:
    source = "\n".join(f"{'#' * level} {heading}" for level, heading in enumerate(headings, start=1))
    (only,) = read(f"{source}\n{NSAIDS}")
    assert only.text == text
    assert only.headings == tuple(headings)


def test_a_population_that_is_given_takes_no_heading_away() -> None:
    (only,) = read(f"# Adults with asthma\n\n## Renal failure\n\n{NSAIDS}", population="inpatients")
    assert only.text == f"inpatients@Adults with asthma: Renal failure: {NSAIDS}"
    (same,) = read(f"# Adults with asthma\n\n## Renal failure\n\n{NSAIDS}", population="adults with asthma")
    assert same.text == f"adults with asthma@Renal failure: {NSAIDS}"


def test_headings_count_but_leave_half_to_the_text() -> None:
    first, second = read(f"# Adults with gout\n\n## {'h' * 300}\n\n{'Give it now. ' * 60}")
    assert len(first.passage) <= 800
    assert first.passage.startswith("h" * 300)
    assert second.passage.startswith("h" * 300)
    assert "Give it now." in read(f"# Adults\n\n## {'h' * 900}\n\nGive it now.")[0].passage


@pytest.mark.parametrize("short", ["e.g.", "i.e.", "i.v.", "b.i.d.", "approx.", "p.r.n.", "vs.", "max.", "Dr."])
def test_nothing_is_cut_after_an_abbreviation(short: str) -> None:
    text = f"Give it {short} in the morning. " * 20
    for most in range(50, 120):
        for one in of_blocks(text, most=most):
            assert not one.passage.endswith(short)


@pytest.mark.parametrize(
    ("condition", "second"),
    [
        ("If the eGFR is below 30, give prednisolone.", "Otherwise give colchicine."),
        ("If the eGFR is below 30, give prednisolone.", "If not, give colchicine."),
        ("血钾升高的患者停用螺内酯。", "否则继续使用。"),
    ],
)
@pytest.mark.parametrize("parted", [False, True])
def test_otherwise_stays_with_its_condition(condition: str, second: str, parted: bool) -> None:
    for before in range(0, 160, 7):
        filler = "x" * before + "。" if "。" in second else "x" * before + "."
        blocks = [filler, condition, second] if parted else [f"{filler} {condition} {second}"]
        for one in of_blocks(*blocks, most=90):
            assert second not in one.passage or condition in one.passage


def test_what_does_not_fit_is_said_again_with_a_note() -> None:
    condition = "If the patient has renal failure and " + "x" * 40 + ", give prednisolone."
    first, second = of_blocks(f"{condition} Otherwise give colchicine.", most=110)
    assert first.passage == condition
    assert second.passage == "Otherwise give colchicine."
    assert second.notes == ("the passage begins with the end of the one before",)
    items = [Block(f"{number} mg of the drug by mouth in the morning", kind="item") for number in range(9)]
    parts = of_blocks("Give one of these:", *items, most=120)
    assert all(one.passage.startswith("Give one of these:") for one in parts)
    assert all("is said again" in one.notes[0] for one in parts[1:])


def test_a_second_half_without_a_first_is_noted() -> None:
    _, second = read("# If kidneys work\n\nGive naproxen.\n\n# If they do not\n\nOtherwise give prednisolone.")
    assert second.notes == ('"Otherwise give prednisolone." refers to something that is not under its heading',)


def test_a_row_that_is_too_long_says_its_beginning_again() -> None:
    cells = [f"{number} mg in the morning and nothing in the evening" for number in range(5)]
    table = f"|Drug|{'|'.join('ABCDE')}|\n|{'---|' * 6}\n|colchicine|{'|'.join(cells)}|"
    parts = read(table, most=150)
    assert len(parts) > 1
    assert all(one.passage.startswith("Drug: colchicine.") for one in parts)
    assert all(any(f"{letter}: {cell}" in one.passage for one in parts) for letter, cell in zip("ABCDE", cells, strict=True))


def test_no_number_is_cut_from_its_unit() -> None:
    sentence = "Give " + "colchicine at a dose of 500 micrograms and " * 9 + "stop."
    found = of_blocks(sentence, most=60)
    assert " ".join(one.passage for one in found) == sentence
    assert not any(re.search(r"\d$", one.passage) for one in found)
    assert all(one.notes == ("a sentence that is longer than a passage was cut between words",) for one in found[:-1])


@pytest.mark.parametrize("shift", range(9))
def test_a_long_chinese_sentence_is_cut_at_a_comma_or_at_least_in_no_number(shift: int) -> None:
    text = "患者" * shift + "每次100毫克口服" * 40
    found = [one.passage for one in read(text, ".txt")]
    assert len(found) > 1
    assert "".join(found) == text
    assert all("00毫克" not in one[:4] and not one[-1].isdigit() for one in found)
    assert sum(one.count("100毫克") for one in found) == 40
    paused = "，".join(["每次给予100毫克口服"] * 40)
    assert all(one.endswith("，") for one in [one.passage for one in read(paused, ".txt")][:-1])


def test_what_has_no_place_to_be_cut_at_is_cut_in_large_pieces() -> None:
    found = [one.passage for one in read("Seehttps" + "abc1" * 300, ".txt")]
    assert min(map(len, found[:-1])) > 100


def test_places_are_those_of_the_document_as_it_was_read() -> None:
    document = document_of(
        b"# Adults\n\n## Gout\n\nGive colchicine.\n\n- 5 mg\n\n## Asthma\n\nadults@Give salbutamol.", "a.md", ".md"
    )
    for one, said in zip(split_passages(document), ["Give colchicine.\n5 mg", "Give salbutamol."], strict=True):
        assert document.text[one.start : one.end] == said


_SENTENCES = [
    "Give it e.g. with food.", "Otherwise stop it.", "If not, wait.", "Measure creatinine!", "Then give 5 mg i.v. at once.",
    "Is it painful?",
    "See the patient approx. every week and write down what is found there.", "x" * 130 + ".", "否则停药。", "首选。",
]  # fmt: skip


@properties
@example([["x" * 130 + "."]], 65)  # two passages full to the brim, and a full stop
@given(st.lists(st.lists(st.sampled_from(_SENTENCES), min_size=1, max_size=6), min_size=1, max_size=5), st.integers(50, 200))
def test_every_sentence_is_in_a_passage_in_order_and_none_is_too_long(paragraphs: list[list[str]], most: int) -> None:
    document = Document("x", tuple(Block(" ".join(sentences)) for sentences in paragraphs))
    found = split_passages(document, most=most)
    assert all(len(one.passage) <= most for one in found)
    covered = "".join(document.text[one.start : one.end] for one in found)
    assert "".join(covered.split()) == "".join(document.text.split())
    for one in found[1:]:
        if re.match("Otherwise|If not|Then|否则", one.passage):
            assert one.notes


def test_an_id_stays_with_a_text_under_its_headings() -> None:
    source = f"# Adults\n\n{NSAIDS}\n\n# Children\n\n{NSAIDS}\n\nGive rest.\n\n# Adults\n\n{NSAIDS}\n"
    ids = [one.id for one in read(source)]
    assert len(set(ids)) == len(ids) == 3
    assert [one.origin("a.md")["passage_id"] for one in read(source)] == ids
    assert [one.id for one in read(f"# Preface\n\nRead all of it.\n\n{source}")][1:] == ids  # it moved
    assert [one.id for one in read(source.replace("Give rest.", "Give water."))] == [ids[0], ANY, ids[2]]
    assert ids[1] not in [one.id for one in read(source.replace("# Children", "# Infants"))]


PREGNANT = "In pregnancy: stop warfarin; give LMWH"


@pytest.mark.parametrize(
    ("suffix", "text", "said"),
    [
        (
            ".md",
            "- In pregnancy:\n  - stop warfarin\n  - give LMWH\n- Give bisoprolol 2.5 mg",
            [PREGNANT, "Give bisoprolol 2.5 mg"],
        ),
        (
            ".txt",
            "- In pregnancy:\n  - stop warfarin\n  - give LMWH\n- Give bisoprolol 2.5 mg",
            [PREGNANT, "Give bisoprolol 2.5 mg"],
        ),
        (
            ".txt",
            "1. Pregnant:\n   - stop it\n2. Give rest\n3. Skip step 1.",
            ["1. Pregnant: stop it", "2. Give rest; 3. Skip step 1."],
        ),
        (".md", "- Pregnancy\n  - stop it\n\n    and rest\n- Give it", ["Pregnancy: stop it and rest", "Give it"]),
        (".md", "- In pregnancy:\n\n  stop it\n- Give it", ["In pregnancy: stop it", "Give it"]),
        (".md", "In pregnancy:\n\n- stop it\n\nGive bisoprolol.", ["In pregnancy: stop it", "Give bisoprolol."]),
        (".md", "Give one of these:\n\n- 5 mg\n\nMeasure INR.", ["Give one of these: 5 mg. Measure INR."]),
        (".md", "All:\n\n- Pregnant:\n  - stop it\n- Give it\n- Rest", ["All: Pregnant: stop it", "All: Give it; Rest"]),
        (".md", "- If pregnant:\n  - stop it\n- Otherwise give it", ["If pregnant: stop it; Otherwise give it"]),
        (".md", "- 妊娠：\n  - 停用华法林\n- 给予比索洛尔", ["妊娠：停用华法林", "给予比索洛尔"]),
        (
            ".txt",
            "1、一般患者：\n（1）氨氯地平\n（2）缬沙坦\n2、妊娠患者禁用",
            ["1、一般患者：（1）氨氯地平；（2）缬沙坦", "2、妊娠患者禁用"],
        ),
        (".md", "- A:\n  - x\n\n|Drug|Dose|\n|---|---|\n|a|5 mg|", ["A: x", "Drug: a. Dose: 5 mg."]),
        (".md", "1. Test\n1. If low:\n   1. wait\n1. Skip step 1", ["1. Test; 2. If low: 1. wait", "3. Skip step 1"]),
    ],
)
def test_an_inner_item_belongs_to_its_outer_item_and_the_next_outer_one_does_not(suffix: str, text: str, said: list[str]) -> None:
    assert [one.passage for one in read(f"# Heart failure\n\n{text}" if suffix == ".md" else text, suffix)] == said


def test_what_an_item_stands_under_is_said_again_with_each_piece_of_it() -> None:
    found = read(f"- In pregnancy:\n  - {'Stop it. ' * 12}\n  - give {'rest ' * 40}\n- Give it", most=90)
    assert len(found) > 4
    assert all(one.passage.startswith("In pregnancy: ") for one in found[:-1])
    assert found[-1].passage == "Give it"


def test_a_step_that_stands_in_another_passage_is_noted() -> None:
    last = read("1. Test\n2. If low:\n   - wait\n3. Skip step 1")[-1]
    assert (last.passage, last.notes) == ("3. Skip step 1", ("it refers to step 1, which stands in another passage",))
