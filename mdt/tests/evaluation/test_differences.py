"""What two trees say differently, by danger: a pair of trees for each kind, in English and Chinese; and what holds for all."""

import copy
from typing import Any

import pytest
from gatewise_mdt import DecisionTree, differences
from gatewise_mdt.evaluation.differences import KINDS, WHAT, rate
from hypothesis import given
from mdt_trees import gout, node, preorders, properties, swapped_root, triple

Nodes = list[dict[str, Any]]
DRUG, PLAN, DOSE, NOT = "drug therapy", "therapeutic schedule", "dosage and administration", "prohibited drugs"


def listed(a: Nodes, b: Nodes) -> list[tuple[str, str]]:
    """The kinds, which are the same seen from either side."""
    one, other = DecisionTree.from_preorder(a), DecisionTree.from_preorder(b)
    found, back = differences(one, other), differences(other, one)
    assert sorted((x.kind, x.what, x.a, x.b) for x in found) == sorted((x.kind, x.what, x.b, x.a) for x in back)
    return [(one.kind, one.what) for one in found]


def of_condition(one: str, other: str, subject: str = "", other_subject: str = "") -> list[tuple[str, str]]:
    """Of two trees that ask for this."""
    rest = [node("D", triple("ramipril", DRUG)), node("D")]
    a, b = triple(one, subject=subject or "adults"), triple(other, subject=other_subject or subject or "adults")
    return listed([node("C", a), *rest], [node("C", b), *rest])


def of_decision(one: list[str], other: list[str]) -> list[tuple[str, str]]:
    rest = [node("C", triple("acute flare"))]
    return listed([*rest, node("D", one), node("D")], [*rest, node("D", other), node("D")])


CONTRARY, OTHER_DOSE, CONDITION, MISSING = "contrary orders", "other dose", "other condition", "missing"


@pytest.mark.parametrize(
    ("one", "other", "what"),
    [
        (triple("ramipril", DRUG), triple("ramipril", NOT), "given / not given"),
        (triple("aspirin is recommended", PLAN), triple("aspirin is no longer recommended", PLAN), "given / not given"),
        (triple("start warfarin", PLAN), triple("stop warfarin", PLAN), "given / not given"),
        (triple("increase the dose of warfarin", PLAN), triple("reduce the dose of warfarin", PLAN), "more / less"),
        (triple("ACEI", "治疗药物", "患者"), triple("ACEI", "禁用药物", "患者"), "given / not given"),
        (triple("推荐手术", "治疗方案", "患者"), triple("不推荐手术", "治疗方案", "患者"), "given / not given"),
        (triple("开始华法林", "治疗方案", "患者"), triple("停用华法林", "治疗方案", "患者"), "given / not given"),
        (triple("use ramipril in the morning", PLAN), triple("avoid ramipril at night", PLAN), "given / not given"),
        (triple("oral antibiotics", DRUG), triple("antibiotics given routinely", NOT), "given / not given"),
        (triple("aspirin with clopidogrel", PLAN), triple("aspirin without clopidogrel", PLAN), "given / not given"),
        (triple("华法林联合阿司匹林", "治疗方案", "患者"), triple("华法林不联合阿司匹林", "治疗方案", "患者"), "given / not given"),
        (triple("step up treatment", PLAN), triple("step down treatment", PLAN), "more / less"),
        (triple("escalate treatment", PLAN), triple("de-escalate treatment", PLAN), "more / less"),
        (triple("升阶梯治疗", "治疗方案", "患者"), triple("降阶梯治疗", "治疗方案", "患者"), "more / less"),
    ],
)
def test_contrary_orders(one: list[str], other: list[str], what: str) -> None:
    assert of_decision(one, other) == [(CONTRARY, what)]


def test_contrary_orders_are_found_where_both_trees_have_both() -> None:
    """Ramipril is prohibited in pregnancy and given otherwise; and given to all. As sets of triples the two are nearly the same."""
    give, avoid = node("D", triple("ramipril", DRUG)), node("D", triple("ramipril", NOT))
    first, second = node("C", triple("pregnancy")), node("C", triple("angioedema"))
    assert listed([first, avoid, second, avoid, give], [first, give, second, avoid, give]) == [(CONTRARY, "given / not given")]
    tree = [first, avoid, give]
    assert listed(tree, swapped_root(DecisionTree.from_preorder(tree)).to_preorder()) == [(CONTRARY, "given / not given")] * 2


@pytest.mark.parametrize(
    ("one", "other", "what"),
    [
        ("5 mg", "10 mg", "number"),
        ("0.5 mg", "one tablet twice daily", "number"),
        ("5 mg", "5 g", "number"),  # 5000 mg
        ("5 mg", "5 ml", "unit"),
        ("10 MU", "10 mU", "unit"),
        ("5 mg/kg", "5 mg", "unit"),
        ("7.5 mg every 7 days", "7.5 mg daily", "frequency"),
        ("5 mg", "5 mg twice daily", "frequency"),
        ("5 mg intramuscularly", "5 mg intravenously", "route"),
        ("at least 5 mg", "no more than 5 mg", "limit"),
        ("5 mg", "maximum 5 mg", "limit"),
        ("每日3次", "每日2次", "frequency"),
        ("5mg静脉滴注", "5mg口服", "route"),
        ("不超过5mg", "5mg", "limit"),
        ("5 mg in a week", "5 mg in a day", "number"),
        ("repeat 5 mg in a week", "5 mg weekly", "number"),
        ("repeat 5 mg in an hour", "repeat 5 mg every hour", "number"),
        ("4 g in a day", "4 g", "frequency"),
        ("500 ml/day", "500 ml", "frequency"),
        ("500 ml over an hour", "500 ml over a day", "unit"),
    ],
)
def test_other_doses(one: str, other: str, what: str) -> None:
    assert of_decision(triple(one, DOSE, "ramipril"), triple(other, DOSE, "ramipril")) == [(OTHER_DOSE, what)]


def test_caution_and_what_a_dose_goes_with_are_no_wording() -> None:
    assert of_decision(triple("5 mg with food", DOSE, "x"), triple("5 mg without food", DOSE, "x")) == [(CONDITION, "negation")]
    assert of_decision(triple("使用利尿剂", "治疗方案", "患者"), triple("慎用利尿剂", "治疗方案", "患者")) == [
        (CONDITION, "degree")
    ]


def test_a_dose_of_another_drug() -> None:
    drugs = triple("ramipril", DRUG), triple("bisoprolol", DRUG)
    doses = [triple("2.5 mg", DOSE, "ramipril"), triple("5 mg", DOSE, "bisoprolol")]
    other = [triple("5 mg", DOSE, "ramipril"), triple("2.5 mg", DOSE, "bisoprolol")]
    assert (
        listed([node("D", *drugs, *doses, joined="and")], [node("D", *drugs, *other, joined="and")]) == [(OTHER_DOSE, "number")] * 2
    )
    assert of_decision(triple("5 mg", DOSE, "ramipril"), triple("5 mg", DOSE, "bisoprolol")) == [(OTHER_DOSE, "drug")]
    assert of_decision(triple("240万U", "用法用量", "青霉素"), triple("240万U", "用法用量", "普鲁卡因青霉素")) == [
        (OTHER_DOSE, "drug")
    ]
    assert of_decision(triple("low-dose aspirin", DRUG), triple("high-dose aspirin", DRUG)) == [(OTHER_DOSE, "amount")]


@pytest.mark.parametrize(
    ("one", "other", "what"),
    [
        ("eGFR below 30", "eGFR below 60", "number"),
        ("eGFR below 30", "eGFR above 30", "limit"),
        ("aged 60 and above", "aged 60 and below", "limit"),
        ("≥ 140 mmHg", "> 140 mmHg", "limit"),
        ("type 1 diabetes", "type 2 diabetes", "number"),
        ("tolerates aspirin", "does not tolerate aspirin", "negation"),
        ("children with fever", "adults with fever", "population"),
        ("mild asthma", "severe asthma", "degree"),
        ("heart failure", "renal failure", "finding"),
        ("symptoms for a week", "symptoms for a month", "number"),
        ("review in a week", "review weekly", "number"),
        ("seizures every hour", "seizures every month", "frequency"),
        ("3 attacks in a year", "3 attacks a month", "frequency"),
        ("infants under a year", "infants under a month", "unit"),
        ("asthma", "gallstones", "finding"),  # in one place
        ("asthma", "asthma and heart failure", "finding"),
        ("before surgery", "after surgery", "degree"),
        ("warfarin started", "warfarin stopped", "negation"),
        ("LVEF<40%", "LVEF>40%", "limit"),
        ("术前感染", "术后感染", "degree"),
        ("有发热", "无发热", "negation"),
        ("急性胰腺炎", "慢性胰腺炎", "degree"),
    ],
)
def test_other_conditions(one: str, other: str, what: str) -> None:
    assert of_condition(one, other) == [(CONDITION, what)]


def test_another_population_another_branch_and_another_join() -> None:
    assert of_condition("fever", "fever", "adults with gout", "children with gout") == [(CONDITION, "population")]
    assert of_condition("发热", "发热", "儿童患者", "老年患者") == [(CONDITION, "population")]
    a, b = node("D", triple("aspirin", DRUG)), node("D", triple("rest", PLAN))
    x, y = node("C", triple("fever")), node("C", triple("cough"))
    # A line for each condition, and not for each thing that is decided below it.
    assert listed([x, a, b], [x, b, a]) == [(CONDITION, "yes and no")] * 2
    assert listed([x, y, a, b, node("D")], [x, node("D"), y, a, b]) == [(CONDITION, "yes and no")]
    assert (CONDITION, "yes and no") in listed([x, y, a, node("D"), b], [x, node("D"), y, a, b])
    both = node("C", *x["triples"], *y["triples"], joined="and")
    assert listed([both, a, b], [{**both, "logical_rel": "or"}, a, b]) == [(CONDITION, "and / or")]
    # Whatever else they say: with one part more, or another one.
    more = node("C", *both["triples"], triple("rash"), joined="and")
    assert listed([more, a, b], [{**both, "logical_rel": "or"}, a, b]) == [(CONDITION, "and / or"), (MISSING, "condition")]
    other = node("C", triple("fever"), triple("vomiting"), joined="or")
    assert sorted(listed([both, a, b], [other, a, b])) == [(CONDITION, "and / or"), (CONDITION, "finding")]
    assert listed([both, a, node("D")], [x, y, a, node("D"), node("D")]) == [(CONDITION, "together or apart")]
    # What is decided where it holds, and whether or not.
    assert listed([x, y, a, node("D"), b], [x, y, node("D"), node("D"), y, a, b])[0][0] == CONDITION


def test_what_is_missing() -> None:
    for place, at, what in ((0, 1, "condition"), (1, 2, "decision")):
        less = copy.deepcopy(gout())
        del less[place]["triples"][at]
        less[place]["logical_rel"] = "or" if len(less[place]["triples"]) > 1 else "null"
        assert listed(gout(), less) == [(MISSING, what)]
    # What says the same in other words is told first, so that a phrase is not compared with another one of its node.
    doses = [triple("3-4 mg/kg", DOSE, "voriconazole"), triple("twice daily", DOSE, "voriconazole")]
    worded = [triple("2 times a day", DOSE, "voriconazole"), triple("3-4 milligrams/kg", DOSE, "voriconazole")]
    assert listed([node("D", *doses, joined="and")], [node("D", *worded, joined="and")]) == [("wording", "")] * 2
    # Without a condition, what follows where it does not hold goes too; what is left is no difference of its own.
    assert listed(gout(), gout()[:2] + gout()[3:4]) == [(MISSING, "condition")]
    assert of_decision(triple("aspirin", DRUG), triple("aspirin and warfarin", DRUG)) == [(MISSING, "a part")]
    assert of_decision(triple("insulin", DRUG), triple("insulin glargine", DRUG)) == [(MISSING, "a part")]
    several = node("D", triple("aspirin", DRUG), triple("rest", PLAN), joined="and")
    assert listed([several], [{**several, "logical_rel": "or"}]) == [(MISSING, "and / or")]
    third = {**several, "triples": [*several["triples"], triple("warfarin", DRUG)], "logical_rel": "or"}
    assert sorted(listed([several], [third])) == [(MISSING, "and / or"), (MISSING, "decision")]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("500 mg twice daily", "0.5 g 2 times a day"),
        ("5 mg bid", "5 milligrams twice a day"),
        ("10 mg weekly", "10 mg every 7 days"),
        ("250 mcg", "0.25 mg"),
        ("5 mg no more than once daily", "5 mg at most once daily"),
        ("5mg 每日2次", "5毫克 bid"),
        ("两片", "2 片"),
        ("5 mg tds", "5 mg three times daily"),
        ("5 mg qds", "5 mg four times daily"),
        ("5 mg bds", "5 mg twice daily"),
    ],
)
def test_a_dose_in_other_words(one: str, other: str) -> None:
    assert of_decision(triple(one, DOSE, "ramipril"), triple(other, DOSE, "ramipril")) == [("wording", "")]


@pytest.mark.parametrize(
    ("one", "other", "what"),
    [
        ("fever and cough", "fever or cough", "and / or"),
        ("发热且咳嗽", "发热或咳嗽", "and / or"),
        ("妊娠期和以下情况", "妊娠期或以下情况", "and / or"),
        ("严重程度及以下因素", "严重程度或以下因素", "and / or"),
        ("able to swallow", "unable to swallow", "negation"),
        ("responds to steroids", "fails to respond to steroids", "negation"),
        ("aged 60 and above", "aged 60 or above", ""),
        ("65岁及以上", "65岁或以上", ""),
        ("中度及以上症状", "中度或以上症状", ""),
        ("Ⅲ期及以上疾病", "Ⅲ期或以上疾病", ""),
        ("IIIB期及以上疾病", "IIIB期或以上疾病", ""),
        ("38.5度及以上症状", "38.5度或以上症状", ""),
        ("2级及以上3个月", "2级或以上3个月", ""),
        ("两次或以上发作", "两次及以上发作", ""),
    ],
)
def test_what_joins_or_negates_within_a_phrase_is_no_wording(one: str, other: str, what: str) -> None:
    assert of_condition(one, other) == ([(CONDITION, what)] if what else [("wording", "")])
    if what == "and / or":
        assert of_decision(triple(one, PLAN), triple(other, PLAN)) == [(MISSING, what)]


def test_other_words() -> None:
    assert of_condition("BP ≥ 140", "BP of at least 140") == [("wording", "")]
    assert of_condition("symptoms of asthma", "asthma symptoms") == [("wording", "")]
    assert of_condition("symptoms lasting a month", "symptoms for a month") == [("wording", "")]
    assert of_condition("symptoms for more than a month", "symptoms for more than one month") == [("wording", "")]
    assert of_condition("asthma", "asthma", "adults with gout", "adult gout patients") == [("wording", "")]
    assert of_condition("年龄≥60岁", "年龄大于等于60岁") == [("wording", "")]
    assert of_decision(triple("rest", PLAN), triple("rest", "basic condition")) == [("wording", "relation")]
    x, y, a = node("C", triple("fever")), node("C", triple("cough")), node("D", triple("aspirin", DRUG))
    assert listed([x, y, a, node("D"), node("D")], [y, x, a, node("D"), node("D")]) == [("wording", "order")]


def test_how_often_is_a_number_a_day() -> None:
    same = ["twice daily", "2 times a day", "bid", "every 12 hours", "每日2次", "两次/日", "q12h", "12 hourly"]
    assert {rate(words) for words in same} == {frozenset({"2"})}
    assert rate("每2周1次") == rate("every 2 weeks") == rate("every 14 days") == rate("once every 14 days")
    assert rate("every other day") == rate("隔日") == rate("qod") == rate("alternate days") == {"1/2"}
    assert rate("2 to 3 times daily") == rate("每日2-3次") == {"2", "3"}
    assert rate("weekly") == rate("once a week") != rate("monthly")
    assert rate("biweekly") == {"biweekly"}  # twice a week or every two weeks


@properties
@given(preorders(), preorders())
def test_all_trees_are_compared_and_only_the_same_ones_have_no_difference(a: Nodes, b: Nodes) -> None:
    one, other = DecisionTree.from_preorder(a), DecisionTree.from_preorder(b)
    assert differences(one, one) == []
    assert bool(differences(one, other)) == bool(differences(other, one))
    for found in differences(one, other):
        assert found.kind in KINDS
        assert found.what in ("", *WHAT)
        assert [bool(found.a), bool(found.b)] == [node is not None for node in found.nodes] != [False, False]
