"""Two drugs' doses swapped: few passages of Text2MDT have two doses, so these were written for the test."""

import pytest
from gatewise_mdt import DecisionTree
from gatewise_mdt.checking.items import items_of

# (passage, drug, its dose, other drug, its dose)
PASSAGES = [
    ("Give amoxicillin 500 mg daily and metronidazole 400 mg twice daily.", "amoxicillin", "500 mg", "metronidazole", "400 mg"),
    ("Enalapril (starting at 2.5 mg) or losartan (starting at 25 mg) may be used.", "Enalapril", "2.5 mg", "losartan", "25 mg"),
    ("The dose of morphine is 5 mg; that of oxycodone is 2.5 mg.", "morphine", "5 mg", "oxycodone", "2.5 mg"),
    ("Offer 75 mg of aspirin and 20 mg of atorvastatin.", "aspirin", "75 mg", "atorvastatin", "20 mg"),
    ("Lithium is started at 400 mg at night. Quetiapine is started at 50 mg.", "Lithium", "400 mg", "Quetiapine", "50 mg"),
    ("Ceftriaxone and dexamethasone at 2 g and 10 mg respectively.", "Ceftriaxone", "2 g", "dexamethasone", "10 mg"),
    ("Prednisolone at a dose of 40 mg, hydrocortisone at a dose of 1 g.", "Prednisolone", "40 mg", "hydrocortisone", "1 g"),
    ("Use ondansetron: 4 mg; metoclopramide: 10 mg.", "ondansetron", "4 mg", "metoclopramide", "10 mg"),
    ("Calcium 1,200 mg with vitamin D 800 IU is recommended.", "Calcium", "1,200 mg", "vitamin D", "800 IU"),
    ("Start furosemide, 40 mg, and add spironolactone, 25 mg, for oedema.", "furosemide", "40 mg", "spironolactone", "25 mg"),
    ("Dexamethasone, a steroid, is given as 6 mg; tocilizumab as 8 mg/kg.", "Dexamethasone", "6 mg", "tocilizumab", "8 mg/kg"),
    ("可选用阿莫西林1g每日2次，或克拉霉素0.5g每日2次。", "阿莫西林", "1g", "克拉霉素", "0.5g"),
    ("静脉滴注甲泼尼龙500mg/d，或口服泼尼松1mg/kg。", "甲泼尼龙", "500mg/d", "泼尼松", "1mg/kg"),
    ("异烟肼和利福平的剂量分别为300mg和450mg。", "异烟肼", "300mg", "利福平", "450mg"),
    ("地高辛（0.125mg/d）与美托洛尔（25mg/d）联合应用。", "地高辛", "0.125mg/d", "美托洛尔", "25mg/d"),
    ("阿司匹林的剂量为100mg，氯吡格雷的剂量为75mg。", "阿司匹林", "100mg", "氯吡格雷", "75mg"),
    ("氢氯噻嗪，每次12.5mg；螺内酯，每次20mg。", "氢氯噻嗪", "每次12.5mg", "螺内酯", "每次20mg"),
    ("轻症口服布洛芬0.2g，重症肌内注射曲马多50mg。", "布洛芬", "0.2g", "曲马多", "50mg"),
    ("先用5mg氨氯地平，再加用80mg缬沙坦。", "氨氯地平", "5mg", "缬沙坦", "80mg"),
    ("推荐口服伏立康唑（200mg，每日2次）或氟康唑（400mg，每日1次）。", "伏立康唑", "200mg", "氟康唑", "400mg"),
]  # fmt: skip


def listed(passage: str, *drugs_and_doses: tuple[str, str]) -> list[str]:
    """What the rule says of a tree that gives these drugs at these doses."""
    names = ("drug therapy", "dosage and administration") if passage.isascii() else ("治疗药物", "用法用量")
    triples = [triple for drug, dose in drugs_and_doses for triple in (["people", names[0], drug], [drug, names[1], dose])]
    tree = DecisionTree.from_preorder([{"role": "D", "triples": triples, "logical_rel": "and"}])
    return [item.sentence for item in items_of(passage, tree) if item.kind == "dose of another drug"]


@pytest.mark.parametrize(("passage", "drug", "dose", "other", "its"), PASSAGES)
def test_swapped_doses_are_listed_and_right_ones_are_not(passage: str, drug: str, dose: str, other: str, its: str) -> None:
    assert listed(passage, (drug, its), (other, dose))
    assert not listed(passage, (drug, dose), (other, its))


@pytest.mark.parametrize(
    ("rows", "drug", "dose", "other", "its"),
    [
        (
            "Drug: ramipril. Starting dose: 2.5 mg.\nDrug: atenolol. Starting dose: 25 mg.",
            "ramipril",
            "2.5 mg",
            "atenolol",
            "25 mg",
        ),
        ("Drug: ramipril. Use: heart. Dose: 5 mg. Drug: atenolol. Dose: 25 mg.", "ramipril", "5 mg", "atenolol", "25 mg"),
        ("药物：卡托普利。剂量：12.5mg。药物：美托洛尔。剂量：25mg。", "卡托普利", "12.5mg", "美托洛尔", "25mg"),
    ],
)
def test_a_dose_in_a_row_of_a_table_is_of_the_drug_of_the_row(rows: str, drug: str, dose: str, other: str, its: str) -> None:
    assert len(listed(rows, (drug, its), (other, dose))) == 2
    assert not listed(rows, (drug, dose), (other, its))


def test_the_dose_of_a_sentence_without_a_drug_is_of_none_before() -> None:
    assert not listed("Stop ibuprofen. Give naproxen. The usual dose is 500 mg.", ("ibuprofen", "500 mg"))
