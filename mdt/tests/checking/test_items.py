"""What the rules list of trees with one mistake, and that they list nothing of trees without; passages written for this test."""

from dataclasses import replace
from typing import Any, NamedTuple

import pytest
from gatewise_mdt import DecisionTree, TreeRecord, items, sample
from gatewise_mdt.checking.items import items_of
from gatewise_mdt.checking.rules import RULES
from gatewise_mdt.review.passage import passage_of
from gatewise_mdt.review.shown import passage_json
from mdt_trees import node

SIGN, DRUG, PLAN, DOSE = "clinical manifestation", "drug therapy", "therapeutic schedule", "dosage and administration"
AVOID, BASIC = "prohibited drugs", "basic condition"
FACT, GIVE, DO, HOW, NEVER = "临床表现", "治疗药物", "治疗方案", "用法用量", "禁用药物"


def tree_of(*nodes: dict[str, Any]) -> DecisionTree:
    return DecisionTree.repaired(list(nodes))[0]


def leaf(*triples: list[str], joined: str = "and") -> DecisionTree:
    return tree_of(node("D", *triples, joined=joined if len(triples) > 1 else "null"))


def on(condition: list[str], *triples: list[str]) -> DecisionTree:
    """Where the condition holds, what the triples say; else nothing."""
    return tree_of(node("C", condition), node("D", *triples, joined="and"), node("D"))


class Case(NamedTuple):
    """A passage, the tree that says what it says, the same with a mistake, and the kind and words that are to be listed."""

    passage: str
    right: DecisionTree
    wrong: DecisionTree
    kind: str
    words: str


P, Q = "adults with gout", "痛风患者"


def by_age(first: str, second: str) -> DecisionTree:
    how = [[[P, DRUG, "prednisolone"], ["prednisolone", DOSE, dose]] for dose in (first, second)]
    return tree_of(
        node("C", [P, BASIC, "Under 2 years"], [P, SIGN, "Acute attack"], joined="and"),
        node("D", *how[0], joined="and"),
        node("C", [P, BASIC, "2 to 5 years"]),
        node("D", *how[1], joined="and"),
        node("D"),
    )


def by_column(below: str, above: str) -> DecisionTree:
    ramipril, atenolol = [P, DRUG, "Ramipril"], [P, DRUG, "Atenolol"]
    return tree_of(
        node("C", [P, SIGN, "eGFR below 30"]),
        node("D", ramipril, ["Ramipril", DOSE, below], atenolol, ["Atenolol", DOSE, "25 mg"], joined="and"),
        node("C", [P, SIGN, "eGFR 30 to 59"]),
        node("D", ramipril, ["Ramipril", DOSE, above], atenolol, ["Atenolol", DOSE, "50 mg"], joined="and"),
        node("D"),
    )


CASES = {
    # Those of the report: all six went out to systems that run trees, and nothing was said.
    "given though forbidden": Case(
        "Do not give naproxen to anyone with an eGFR below 30.",
        on([P, SIGN, "eGFR below 30"], [P, AVOID, "naproxen"]),
        on([P, SIGN, "eGFR below 30"], [P, DRUG, "naproxen"]),
        "given though forbidden",
        "Do not give naproxen",
    ),
    "the dose of another drug": Case(
        "Give ramipril 2.5 mg twice daily. Add bisoprolol 1.25 mg once daily.",
        leaf(
            [P, DRUG, "ramipril"],
            ["ramipril", DOSE, "2.5 mg twice daily"],
            [P, DRUG, "bisoprolol"],
            ["bisoprolol", DOSE, "1.25 mg once daily"],
        ),
        leaf([P, DRUG, "bisoprolol"], ["bisoprolol", DOSE, "2.5 mg twice daily"]),
        "dose of another drug",
        "ramipril 2.5 mg twice daily",
    ),
    "a maximum": Case(
        "Give bisoprolol. The maximum dose of bisoprolol in liver failure is 5 mg once daily.",
        leaf([P, DRUG, "bisoprolol"], ["bisoprolol", DOSE, "maximum dose of bisoprolol in liver failure is 5 mg once daily"]),
        on([P, SIGN, "liver failure"], [P, DRUG, "bisoprolol"], ["bisoprolol", DOSE, "5 mg once daily"]),
        "limit",
        "maximum dose of bisoprolol in liver failure is 5 mg",
    ),
    "per kg": Case(
        "Give aciclovir 5 mg (per kg) intravenously.",
        leaf([P, DRUG, "aciclovir"], ["aciclovir", DOSE, "5 mg (per kg) intravenously"]),
        leaf([P, DRUG, "aciclovir"], ["aciclovir", DOSE, "5 mg"], ["aciclovir", DOSE, "intravenously"]),
        "dose",
        "5 mg (per kg",
    ),
    "how often": Case(
        "Give methotrexate 7.5 mg every 7 days.",
        leaf([P, DRUG, "methotrexate"], ["methotrexate", DOSE, "7.5 mg every 7 days"]),
        leaf([P, DRUG, "methotrexate"], ["methotrexate", DOSE, "7.5 mg"]),
        "frequency",
        "every 7 days",
    ),
    "no longer recommended": Case(
        "Aspirin is no longer recommended for primary prevention.",
        leaf([P, AVOID, "Aspirin"], [P, PLAN, "primary prevention"]),
        leaf(["Aspirin", PLAN, "recommended"], [P, PLAN, "primary prevention"]),
        "negation",
        "no longer recommended",
    ),
    # The other kinds.
    "a dose of another number": Case(
        "Give colchicine 0.5 mg twice daily.",
        leaf([P, DRUG, "colchicine"], ["colchicine", DOSE, "0.5 mg twice daily"]),
        leaf([P, DRUG, "colchicine"], ["colchicine", DOSE, "5 mg twice daily"]),
        "number not in the text",
        "5 mg twice daily",
    ),
    "another unit": Case(
        "Start levothyroxine 25 micrograms daily.",
        leaf([P, DRUG, "levothyroxine"], ["levothyroxine", DOSE, "25 micrograms daily"]),
        leaf([P, DRUG, "levothyroxine"], ["levothyroxine", DOSE, "25 mg daily"]),
        "number not in the text",
        "25 mg daily",
    ),
    "doses swapped": Case(
        "Give colchicine 0.5 mg twice daily or naproxen 500 mg twice daily.",
        leaf(
            [P, DRUG, "colchicine"], ["colchicine", DOSE, "0.5 mg"], [P, DRUG, "naproxen"], ["naproxen", DOSE, "500 mg twice daily"]
        ),
        leaf(
            [P, DRUG, "colchicine"], ["colchicine", DOSE, "500 mg twice daily"], [P, DRUG, "naproxen"], ["naproxen", DOSE, "0.5 mg"]
        ),
        "dose of another drug",
        "naproxen 500 mg twice daily",
    ),
    "forbidden though given": Case(
        "For an acute flare give prednisolone.",
        on([P, SIGN, "acute flare"], [P, DRUG, "prednisolone"]),
        on([P, SIGN, "acute flare"], [P, AVOID, "prednisolone"]),
        "forbidden though given",
        "prednisolone",
    ),
    "the negation of a condition": Case(
        "In adults without kidney stones, give probenecid.",
        on([P, SIGN, "without kidney stones"], [P, DRUG, "probenecid"]),
        on([P, SIGN, "kidney stones"], [P, DRUG, "probenecid"]),
        "negation",
        "without kidney stones",
    ),
    "a prohibition": Case(
        "Give allopurinol. Azathioprine must not be given with allopurinol.",
        leaf([P, DRUG, "allopurinol"], [P, AVOID, "Azathioprine"]),
        leaf([P, DRUG, "allopurinol"]),
        "prohibition",
        "Azathioprine must not be given",
    ),
    "a condition": Case(
        "If the flare lasts longer than three days and there is fever, aspirate the joint.",
        tree_of(
            node("C", [P, SIGN, "flare lasts longer than three days"], [P, SIGN, "fever"], joined="and"),
            node("D", [P, PLAN, "aspirate the joint"]),
            node("D"),
        ),
        on([P, SIGN, "flare lasts longer than three days"], [P, PLAN, "aspirate the joint"]),
        "condition",
        "fever",
    ),
    "a recommendation": Case(
        "For an acute flare give prednisolone and an ice pack.",
        on([P, SIGN, "acute flare"], [P, DRUG, "prednisolone"], [P, PLAN, "ice pack"]),
        on([P, SIGN, "acute flare"], [P, DRUG, "prednisolone"]),
        "recommendation",
        "ice pack",
    ),
    "a drug among other words": Case(
        "Adults who bleed from a stomach ulcer should receive esomeprazole 40 mg daily with iron tablets.",
        on(
            [P, SIGN, "bleed from a stomach ulcer"],
            [P, DRUG, "esomeprazole"],
            ["esomeprazole", DOSE, "40 mg daily"],
            [P, DRUG, "iron"],
        ),
        on([P, SIGN, "bleed from a stomach ulcer"], ["stomach", DOSE, "40 mg daily"], [P, DRUG, "iron"]),
        "recommendation",
        "esomeprazole",
    ),
    "an empty leaf": Case(
        "For an acute flare give prednisolone. For tophi give allopurinol.",
        tree_of(
            node("C", [P, SIGN, "acute flare"]),
            node("D", [P, DRUG, "prednisolone"]),
            node("C", [P, SIGN, "tophi"]),
            node("D", [P, DRUG, "allopurinol"]),
            node("D"),
        ),
        tree_of(
            node("C", [P, SIGN, "acute flare"]),
            node("D"),
            node("C", [P, SIGN, "tophi"]),
            node("D", [P, DRUG, "allopurinol"]),
            node("D"),
        ),
        "empty leaf",
        "acute flare",
    ),
    "otherwise": Case(
        "For tophi give allopurinol. Otherwise, repeat the urate level.",
        tree_of(node("C", [P, SIGN, "tophi"]), node("D", [P, DRUG, "allopurinol"]), node("D", [P, PLAN, "repeat the urate level"])),
        on([P, SIGN, "tophi"], [P, DRUG, "allopurinol"]),
        "otherwise",
        "Otherwise, repeat the urate level.",
    ),
    "unless": Case(
        "Give ibuprofen unless there is a peptic ulcer.",
        tree_of(node("C", [P, SIGN, "peptic ulcer"]), node("D"), node("D", [P, DRUG, "ibuprofen"])),
        on([P, SIGN, "peptic ulcer"], [P, DRUG, "ibuprofen"]),
        "branches",
        "ibuprofen unless there is a peptic ulcer",
    ),
    "contraindicated unless": Case(
        "Metformin is contraindicated unless eGFR is above 30.",
        tree_of(node("C", [P, SIGN, "eGFR is above 30"]), node("D", [P, DRUG, "Metformin"]), node("D", [P, AVOID, "Metformin"])),
        tree_of(node("C", [P, SIGN, "eGFR is above 30"]), node("D", [P, AVOID, "Metformin"]), node("D", [P, DRUG, "Metformin"])),
        "branches",
        "Metformin is contraindicated unless eGFR is above 30",
    ),
    "except": Case(
        "Give naproxen to all except those with a peptic ulcer.",
        tree_of(node("C", [P, SIGN, "peptic ulcer"]), node("D"), node("D", [P, DRUG, "naproxen"])),
        on([P, SIGN, "peptic ulcer"], [P, DRUG, "naproxen"]),
        "branches",
        "naproxen to all except those with a peptic ulcer",
    ),
    "branches swapped": Case(
        "If there are tophi, give allopurinol. If there are none, repeat the urate level.",
        tree_of(node("C", [P, SIGN, "tophi"]), node("D", [P, DRUG, "allopurinol"]), node("D", [P, PLAN, "repeat the urate level"])),
        tree_of(node("C", [P, SIGN, "tophi"]), node("D", [P, PLAN, "repeat the urate level"]), node("D", [P, DRUG, "allopurinol"])),
        "branches",
        "tophi, give allopurinol",
    ),
    "branches of a dose in cells": Case(
        "Drug: apixaban. Dose if eGFR is ≥ 60: 5 mg. Dose if eGFR is < 60: 2.5 mg.",
        tree_of(
            node("C", [P, SIGN, "eGFR is ≥ 60"]), node("D", ["apixaban", DOSE, "5 mg"]), node("D", ["apixaban", DOSE, "2.5 mg"])
        ),
        tree_of(
            node("C", [P, SIGN, "eGFR is ≥ 60"]), node("D", ["apixaban", DOSE, "2.5 mg"]), node("D", ["apixaban", DOSE, "5 mg"])
        ),
        "branches",
        "eGFR is ≥ 60: 5 mg",
    ),
    "branches of rows": Case(
        "Flare: mild. Drug: ice. Flare: severe. Drug: prednisolone.",
        tree_of(node("C", [P, SIGN, "severe"]), node("D", [P, DRUG, "prednisolone"]), node("D", [P, PLAN, "ice"])),
        tree_of(node("C", [P, SIGN, "severe"]), node("D", [P, PLAN, "ice"]), node("D", [P, DRUG, "prednisolone"])),
        "branches",
        "severe. Drug: prednisolone",
    ),
    "what is not needed": Case(
        "Allopurinol is not needed if urate is low. If it is high, give febuxostat.",
        tree_of(node("C", [P, SIGN, "urate is low"]), node("D", [P, AVOID, "Allopurinol"]), node("D", [P, DRUG, "febuxostat"])),
        tree_of(node("C", [P, SIGN, "urate is low"]), node("D", [P, DRUG, "febuxostat"]), node("D", [P, AVOID, "Allopurinol"])),
        "branches",
        "Allopurinol is not needed if urate is low",
    ),
    "a cell that forbids": Case(
        "Drug: apixaban. Dose if eGFR is < 15: do not use.",
        on([P, SIGN, "eGFR is < 15"], [P, AVOID, "apixaban"]),
        on([P, SIGN, "eGFR is < 15"], [P, DRUG, "apixaban"]),
        "prohibition",
        "do not use",
    ),
    "given to those who must not have it": Case(
        "Aspirin is effective but must be avoided in children under 16.",
        tree_of(node("C", [P, BASIC, "children under 16"]), node("D", [P, AVOID, "Aspirin"]), node("D", [P, DRUG, "Aspirin"])),
        tree_of(node("C", [P, BASIC, "children under 16"]), node("D", [P, DRUG, "Aspirin"]), node("D", [P, AVOID, "Aspirin"])),
        "branches",
        "be avoided in children under 16",
    ),
    # Of guidelines with headings, ladders and tables.
    "a dose of another row": Case(
        "Acute attack: Give prednisolone by age: Age: Under 2 years. Dose: 10 mg. Age: 2 to 5 years. Dose: 20 mg.",
        by_age("10 mg", "20 mg"),
        by_age("20 mg", "10 mg"),
        "branches",
        "Age: 2 to 5 years. Dose: 20 mg",
    ),
    "a dose of another column": Case(
        "Adjust the doses: Drug: Ramipril. eGFR 30 to 59: 5 mg. eGFR below 30: 2.5 mg. Drug: Atenolol. eGFR 30 to 59: 50 mg."
        " eGFR below 30: 25 mg.",
        by_column("2.5 mg", "5 mg"),
        by_column("5 mg", "2.5 mg"),
        "branches",
        "eGFR 30 to 59: 5 mg",
    ),
    "a drug that its row forbids": Case(
        "Drug: Atenolol. eGFR below 30: 25 mg. Drug: Indapamide. eGFR below 30: do not use.",
        on([P, SIGN, "eGFR below 30"], [P, DRUG, "Atenolol"], ["Atenolol", DOSE, "25 mg"], [P, AVOID, "Indapamide"]),
        on([P, SIGN, "eGFR below 30"], [P, DRUG, "Atenolol"], ["Atenolol", DOSE, "25 mg"], [P, DRUG, "Indapamide"]),
        "prohibition",
        "Drug: Indapamide. eGFR below 30: do not use",
    ),
    "forbidden without something": Case(
        "Do not give formoterol without an inhaled steroid.",
        leaf([P, AVOID, "formoterol without an inhaled steroid"]),
        leaf([P, DRUG, "formoterol without an inhaled steroid"]),
        "given though forbidden",
        "Do not give formoterol without an inhaled steroid",
    ),
    "how often at least": Case(
        "If symptoms wake the patient at least once a week, give budesonide.",
        on([P, SIGN, "symptoms wake the patient at least once a week"], [P, DRUG, "budesonide"]),
        on([P, SIGN, "symptoms wake the patient"], [P, SIGN, "once a week"], [P, DRUG, "budesonide"]),
        "limit",
        "at least once a week",
    ),
    # Chinese.
    "每行": Case(
        "药物：贝那普利。eGFR<30：5 mg。药物：氢氯噻嗪。eGFR<30：不推荐使用。",
        on([Q, FACT, "eGFR<30"], [Q, GIVE, "贝那普利"], ["贝那普利", HOW, "5 mg"], [Q, NEVER, "氢氯噻嗪"]),
        on([Q, FACT, "eGFR<30"], [Q, GIVE, "贝那普利"], ["贝那普利", HOW, "5 mg"], [Q, GIVE, "氢氯噻嗪"]),
        "prohibition",
        "药物：氢氯噻嗪。eGFR<30：不推荐使用",
    ),
    "减量": Case(
        "起始胰岛素。出现低血糖时，剂量减少10%。",
        tree_of(node("C", [Q, FACT, "低血糖"]), node("D", [Q, DO, "剂量减少10%"]), node("D", [Q, GIVE, "胰岛素"])),
        leaf([Q, GIVE, "胰岛素"]),
        "number",
        "10",
    ),
    "仅在": Case(
        "仅在其他药物无效时才使用泼尼松。",
        on([Q, FACT, "其他药物无效"], [Q, GIVE, "泼尼松"]),
        leaf([Q, GIVE, "泼尼松"]),
        "condition",
        "无效",
    ),
    "一句两剂": Case(
        "体重≥40kg者每次200mg，体重＜40kg者每次100mg。",
        tree_of(node("C", [Q, BASIC, "体重≥40kg"]), node("D", [Q, HOW, "每次200mg"]), node("D", [Q, HOW, "每次100mg"])),
        tree_of(node("C", [Q, BASIC, "体重≥40kg"]), node("D", [Q, HOW, "每次100mg"]), node("D", [Q, HOW, "每次200mg"])),
        "branches",
        "体重≥40kg者每次200mg",
    ),
    "除非": Case(
        "除非存在禁忌证，患者均应服用阿司匹林。",
        tree_of(node("C", [Q, FACT, "存在禁忌证"]), node("D"), node("D", [Q, GIVE, "阿司匹林"])),
        on([Q, FACT, "存在禁忌证"], [Q, GIVE, "阿司匹林"]),
        "branches",
        "存在禁忌证，患者均应服用阿司匹林",
    ),
    "除外": Case(
        "除哮喘患者外，均应给予美托洛尔。",
        tree_of(node("C", [Q, FACT, "哮喘"]), node("D"), node("D", [Q, GIVE, "美托洛尔"])),
        on([Q, FACT, "哮喘"], [Q, GIVE, "美托洛尔"]),
        "branches",
        "哮喘患者外，均应给予美托洛尔",
    ),
    "分支颠倒": Case(
        "有痛风石者给予别嘌醇；其余患者复查血尿酸。",
        tree_of(node("C", [Q, FACT, "痛风石"]), node("D", [Q, GIVE, "别嘌醇"]), node("D", [Q, DO, "复查血尿酸"])),
        tree_of(node("C", [Q, FACT, "痛风石"]), node("D", [Q, DO, "复查血尿酸"]), node("D", [Q, GIVE, "别嘌醇"])),
        "branches",
        "痛风石者给予别嘌醇",
    ),
    "禁用": Case(
        "肾功能衰竭者禁用萘普生。",
        on([Q, FACT, "肾功能衰竭"], [Q, NEVER, "萘普生"]),
        on([Q, FACT, "肾功能衰竭"], [Q, GIVE, "萘普生"]),
        "given though forbidden",
        "禁用萘普生",
    ),
    "剂量互换": Case(
        "给予秋水仙碱0.5mg，每日2次，或萘普生500mg，每日2次。",
        leaf([Q, GIVE, "秋水仙碱"], ["秋水仙碱", HOW, "0.5mg"], [Q, GIVE, "萘普生"], ["萘普生", HOW, "500mg，每日2次"]),
        leaf([Q, GIVE, "秋水仙碱"], ["秋水仙碱", HOW, "500mg，每日2次"], [Q, GIVE, "萘普生"], ["萘普生", HOW, "0.5mg"]),
        "dose of another drug",
        "萘普生500mg，每日2次",
    ),
    "不超过": Case(
        "给予秋水仙碱，每日不超过1.5mg。",
        leaf([Q, GIVE, "秋水仙碱"], ["秋水仙碱", HOW, "每日不超过1.5mg"]),
        leaf([Q, GIVE, "秋水仙碱"], ["秋水仙碱", HOW, "1.5mg"]),
        "limit",
        "不超过1.5mg",
    ),
    "隔日": Case(
        "给予泼尼松10mg，隔日1次。",
        leaf([Q, GIVE, "泼尼松"], ["泼尼松", HOW, "10mg，隔日1次"]),
        leaf([Q, GIVE, "泼尼松"], ["泼尼松", HOW, "10mg"]),
        "frequency",
        "隔日1次",
    ),
    "每公斤": Case(
        "给予阿昔洛韦5mg/kg静脉滴注。",
        leaf([Q, GIVE, "阿昔洛韦"], ["阿昔洛韦", HOW, "5mg/kg静脉滴注"]),
        leaf([Q, GIVE, "阿昔洛韦"], ["阿昔洛韦", HOW, "5mg"]),
        "dose",
        "5mg/kg",
    ),
    "条件": Case(
        "对于痛风石较大、反复发作的患者，推荐别嘌醇。",
        tree_of(node("C", [Q, FACT, "痛风石较大"], [Q, FACT, "反复发作"], joined="and"), node("D", [Q, GIVE, "别嘌醇"]), node("D")),
        on([Q, FACT, "痛风石较大"], [Q, GIVE, "别嘌醇"]),
        "condition",
        "反复发作",
    ),
    "推荐": Case(
        "急性期推荐秋水仙碱、关节局部冰敷。",
        on([Q, FACT, "急性期"], [Q, GIVE, "秋水仙碱"], [Q, DO, "关节局部冰敷"]),
        on([Q, FACT, "急性期"], [Q, GIVE, "秋水仙碱"]),
        "recommendation",
        "关节局部冰敷",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_mistake_is_listed(name: str) -> None:
    case = CASES[name]
    found = {(item.kind, item.words) for item in items_of(case.passage, case.wrong) if not item.hint}
    assert (case.kind, case.words) in found
    assert (case.kind, case.words) not in {(item.kind, item.words) for item in items_of(case.passage, case.right)}


@pytest.mark.parametrize(
    ("passage", "tree"),
    [
        (  # where it holds there is nothing to do
            "Give ibuprofen unless there is a peptic ulcer.",
            tree_of(node("C", [P, SIGN, "peptic ulcer"]), node("D"), node("D", [P, DRUG, "ibuprofen"])),
        ),
        (  # background
            "Gout is due to urate crystals. In 2019 it was found in 4 of 100 men. Give colchicine.",
            leaf([P, DRUG, "colchicine"]),
        ),
        ("Drink water to relieve pain.", leaf([P, PLAN, "Drink water"])),  # a purpose
        ("Give 2 g in type 2 diabetes [3].", leaf([P, DRUG, "2 g in type 2 diabetes"])),  # numbers that are names
        ("Give iron, and avoid tea.", leaf([P, DRUG, "iron"], [P, PLAN, "avoid tea"])),
        ("Do not use antibiotics other than penicillin.", leaf([P, DRUG, "penicillin"], [P, AVOID, "antibiotics"])),
        ("Levodopa is preferred and metoclopramide must not be used.", leaf([P, DRUG, "Levodopa"], [P, AVOID, "metoclopramide"])),
        ("若无禁忌证，应使用阿司匹林。", on([Q, FACT, "无禁忌证"], [Q, GIVE, "阿司匹林"])),
        ("ACEI可用于治疗，但高血钾的患者禁用。", tree_of(
            node("C", [Q, FACT, "高血钾"]), node("D", [Q, NEVER, "ACEI"]), node("D", [Q, GIVE, "ACEI"]))),
        (  # what does not hold where the condition does
            "If blood pressure is below 140/90 mmHg, check it yearly; if it is 140/90 mmHg or more, give amlodipine.",
            tree_of(
                node("C", [P, SIGN, "blood pressure is below 140/90 mmHg"]), node("D", [P, PLAN, "check it yearly"]),
                node("D", [P, DRUG, "amlodipine"])),
        ),
        ("Statins need not be stopped unless there is myositis.", on([P, SIGN, "myositis"], [P, AVOID, "Statins"])),
        ("Flare: mild. Drug: ice. Flare: severe. Drug: prednisolone.", tree_of(
            node("C", [P, SIGN, "severe"]), node("D", [P, DRUG, "prednisolone"]),
            node("C", [P, SIGN, "mild"]), node("D", [P, PLAN, "ice"]), node("D"))),
        ("不宜手术的患者推荐放疗。", on([Q, FACT, "不宜手术"], [Q, DO, "放疗"])),
        (
            "If ramipril causes cough, replace it by losartan.",
            on([P, SIGN, "ramipril causes cough"], [P, AVOID, "ramipril"], [P, DRUG, "losartan"]),
        ),
        (  # a mark of a note in a phrase, and before the note
            "If pressure is 130/80 mmHg[1] or higher, give ramipril[2]. 2 Do not give it with losartan.",
            on([P, SIGN, "pressure is 130/80 mmHg or higher"], [P, DRUG, "ramipril"], [P, PLAN, "Do not give it with losartan"])),
        ("二甲双胍最大剂量为2 000 mg/d。", leaf([Q, GIVE, "二甲双胍"], ["二甲双胍", HOW, "最大剂量为2 000 mg/d"])),
    ],
)  # fmt: skip
def test_what_a_tree_says_as_its_text_does_is_not_listed(passage: str, tree: DecisionTree) -> None:
    assert [(item.kind, item.words) for item in items_of(passage, tree) if not item.hint] == []


def test_a_heading_that_names_a_state_is_a_condition_of_all_below_it() -> None:
    headings = ("Asthma", "Special situations", "Pregnancy")
    record = TreeRecord(
        "adults@Asthma: Special situations: Pregnancy: Give budesonide.",
        leaf([P, DRUG, "budesonide"]),
        more={"headings": list(headings)},
    )
    found = [(item.kind, item.words) for item in items(record) if not item.hint]
    assert found == [("heading", "Pregnancy")]
    tree = on(["adults", BASIC, "Pregnancy"], ["adults with asthma", DRUG, "budesonide"])
    assert not [item for item in items(replace(record, tree=tree)) if not item.hint]


def test_a_drug_that_the_text_gives_to_some_and_forbids_to_others() -> None:
    passage = "Start methotrexate 15 mg once weekly. Women who plan a pregnancy must not take methotrexate."
    both = tree_of(
        node("C", [P, BASIC, "plan a pregnancy"]),
        node("D", [P, AVOID, "methotrexate"]),
        node("D", [P, DRUG, "methotrexate"], ["methotrexate", DOSE, "15 mg once weekly"], joined="and"),
    )
    kinds = {"forbidden though given", "prohibition", "given though forbidden"}
    assert not kinds & {item.kind for item in items_of(passage, both)}
    for relation, kind in ((AVOID, "forbidden though given"), (DRUG, "prohibition")):
        nodes = both.to_preorder()
        nodes[1]["triples"][0][1] = nodes[2]["triples"][0][1] = relation
        assert kind in {item.kind for item in items_of(passage, tree_of(*nodes))}


@pytest.mark.parametrize(
    ("heading", "named", "words"),
    [
        ("2.1 Chronic kidney disease", "Chronic kidney disease: ", ""),
        ("What if this fails?", "What if this fails? ", ""),
        ("Second step", "Second step: ", ""),
        ("Use in pregnancy", "Use in pregnancy: ", "pregnancy"),  # a condition
        ("Offer diuretics", "Offer diuretics: ", "diuretics"),  # says what to do
        ("Elsewhere", "Chronic kidney disease: ", "Chronic kidney"),
    ],
)
def test_a_heading_is_no_recommendation_but_may_have_conditions(heading: str, named: str, words: str) -> None:
    tree = leaf([P, DRUG, "ramipril"], ["ramipril", DOSE, "1.25 mg once daily"])
    record = TreeRecord(f"{P}@{named}Give ramipril 1.25 mg once daily.", tree, more={"headings": ["Gout", heading]})
    assert [item.words for item in items(record) if not item.hint] == [words] * bool(words)


def test_a_word_of_a_heading_may_be_in_the_tree_from_below_it() -> None:
    tree = on([P, SIGN, "naproxen fails"], [P, DRUG, "colchicine"])
    text = f"{P}@After naproxen: If naproxen fails, give colchicine."
    assert [item.words for item in items(TreeRecord(text, tree)) if not item.hint] == ["naproxen"]
    assert [item for item in items(TreeRecord(text, tree, more={"headings": ["After naproxen"]})) if not item.hint] == []


def test_a_heading_may_be_the_drug_of_a_dose() -> None:
    record = TreeRecord(
        f"{P}@Ramipril: 1.25 mg once daily.", leaf([P, DOSE, "1.25 mg once daily"]), more={"headings": ["Ramipril"]}
    )
    assert [item.words for item in items(record) if not item.hint] == ["Ramipril"]


def test_trees_that_say_what_their_text_says_have_few_items() -> None:
    found = {name: [item for item in items_of(case.passage, case.right) if not item.hint] for name, case in CASES.items()}
    assert sum(map(len, found.values())) <= len(CASES) / 5, found


def test_an_empty_tree_over_a_text_that_recommends_is_listed() -> None:
    passage = "Give colchicine 0.5 mg twice daily. If eGFR is below 30, do not give it."
    empty = DecisionTree.from_preorder([node("D")])
    first = items_of(passage, empty)[0]
    assert (first.kind, first.node, first.hint) == ("empty tree", 0, False)
    assert {"dose", "number", "frequency", "prohibition"} <= {item.kind for item in items_of(passage, empty)}
    assert not [item for item in items_of("Gout is common.", empty) if item.kind == "empty tree"]


def test_a_dose_that_changed_in_the_text_is_listed_though_the_old_one_stands_elsewhere() -> None:
    tree = leaf([P, DRUG, "colchicine"], ["colchicine", DOSE, "0.5 mg twice daily"])
    before = "Give colchicine 0.5 mg twice daily. In renal failure 0.5 mg is enough."
    after = before.replace("0.5 mg twice", "0.6 mg twice")
    changed = {item.identity for item in items_of(after, tree)} - {item.identity for item in items_of(before, tree)}
    assert ("dose", "0.6 mg", 0, ()) in changed


def test_places_are_those_of_the_words_in_the_passage() -> None:
    for record in [*sample(), TreeRecord("成人@ 给予 泼尼松１０ｍｇ，隔日1次；禁用阿司匹林。 ", leaf([Q, GIVE, "阿司匹林"]))]:
        for item in items(record):
            if item.start is not None:
                assert record.passage[item.start : item.end] == item.words
            assert item.node is None or item.node < len(record.tree.nodes)
            assert "{" not in item.sentence


def test_places_on_the_page_are_those_of_the_words_as_shown() -> None:
    notes = {"headings": ["\u202eGout"], "notes": ["\u202ea note"]}
    passage = passage_of(
        TreeRecord("\u202eadults@ 𝒳 \u202eGive\u202c it, but avoid\u202d naproxen.", leaf([P, PLAN, "Give"]), 1, notes)
    )
    said = passage_json(passage)
    assert "\u202e" not in "".join(
        [
            *(piece for piece, _ in said["population"]),
            *said["headings"],
            *said["notes"],
            *(item["sentence"] for item in said["items"]),
        ]
    )
    shown = "".join(text for text, _ in said["passage"]).encode("utf-16-le")
    places = [(item["words"], item["place"]) for item in said["items"] if item["kind"] == "prohibition"]
    assert [shown[2 * begin : 2 * end].decode("utf-16-le") for _, (begin, end) in places] == [words for words, _ in places] != []


def test_items_come_surest_first_and_hints_last() -> None:
    for record in sample():
        found = items(record)
        assert [(item.hint, -item.sure) for item in found] == sorted((item.hint, -item.sure) for item in found)
        assert all(0 <= item.sure <= 1 and item.kind in {rule.kind for rule in RULES} for item in found)


def test_an_identity_is_of_one_item_and_stays_when_other_words_change() -> None:
    tree = leaf([P, DRUG, "colchicine"])
    before = items_of("Give colchicine 0.5 mg. Later give 0.5 mg again.", tree)
    assert len({item.identity for item in before}) == len(before)
    doses = [item.identity for item in before if item.kind == "dose"]
    assert doses == [("dose", "0.5 mg", 0, ()), ("dose", "0.5 mg", 1, ())]
    after = items_of("In most adults, give colchicine 0.5 mg. Later give 0.5 mg again.", tree)
    assert doses == [item.identity for item in after if item.kind == "dose"]


def test_an_item_that_goes_away_hands_its_identity_to_none() -> None:
    passage = "Give colchicine 0.5 mg tid. Later give 0.5 mg with food."
    first = leaf([P, DRUG, "colchicine"], ["colchicine", DOSE, "Give colchicine 0.5 mg tid"])
    assert [item.identity for item in items_of(passage, first) if item.kind == "dose"] == [("dose", "0.5 mg", 1, ())]


def test_phrases_with_braces_and_odd_signs_make_no_errors() -> None:
    for odd in ("{x}", "{", "100%}", "\u202e5 mg", "５ ｍｇ", "·", ")("):
        tree = tree_of(node("C", [odd, SIGN, f"{odd} 7 mg"]), node("D"), node("D", [P, AVOID, odd], [odd, DOSE, f"9 mg {odd}"]))
        for passage in (f"Do not give {odd} 5 mg.", odd, f"对于{odd}患者，禁用{odd}"):
            for item in items_of(passage, tree):
                assert item.words in passage or item.start is None
