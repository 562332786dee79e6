"""The words that forbid, and those that make a dose a limit or say how often: one sentence for each, written for this test."""

import pytest
from gatewise_mdt import DecisionTree
from gatewise_mdt.checking.items import items_of
from gatewise_mdt.checking.marks import marks_of, numbers_of
from gatewise_mdt.wholes import fold

FORBIDDING = """
In pregnancy, cease "naproxen".
Naproxen should be held by the patient before surgery.
Naproxen should be held by the surgeon before surgery.
Naproxen should be held by the on-call team.
Naproxen should be held by the parenteral nutrition team.
Naproxen is contraindicated in heart failure.
Naproxen should be withheld before surgery.
Naproxen is not advised in pregnancy.
Avoid naproxen in pregnancy.
Never use naproxen in pregnancy.
Naproxen is best avoided in pregnancy.
Patients should refrain from naproxen.
Naproxen must be discontinued.
Do not routinely offer naproxen.
Naproxen is no longer the preferred drug.
Stop naproxen before surgery.
Hold naproxen on the day of surgery.
Naproxen may not be used in children.
Naproxen is unsafe in pregnancy.
Naproxen is of no benefit.
There is no place for naproxen in children.
Pregnant women should not receive naproxen.
Children must never be given naproxen.
Naproxen ought not to be given.
We recommend against naproxen.
We suggest not using naproxen.
It is not recommended to give naproxen.
Naproxen is strictly forbidden.
Naproxen is not to be used.
Naproxen cannot be recommended.
Naproxen shouldn't be used.
Don't give naproxen.
Naproxen is inappropriate for most patients.
Use paracetamol instead of naproxen.
Do NOT give naproxen to patients on warfarin.
The use of naproxen is discouraged.
Naproxen: contraindicated.
Contraindications: naproxen.
Naproxen is not suitable for children under 12 years.
Withhold naproxen if creatinine rises.
Discontinue naproxen if bleeding occurs.
Naproxen has no role in treatment.
Treatment with naproxen is not indicated.
Naproxen should only be avoided in children.
Under no circumstances should naproxen be given.
Neither naproxen nor ibuprofen should be given.
Replace naproxen with paracetamol.
Switch from naproxen to paracetamol.
Naproxen should be replaced by paracetamol.
Give paracetamol, but not with naproxen.
Naproxen should not be given to patients without pain.
Ibuprofen must not be combined with naproxen.
Ibuprofen should not be given together with naproxen.
布洛芬不应与萘普生合用。
避免与萘普生同时使用。
No naproxen should be given.
Naproxen should be stopped two days before surgery.
Naproxen is prohibited.
Patients with ulcers should not take naproxen.
孕妇禁用萘普生。
孕妇不得使用萘普生。
萘普生不可用于孕妇。
萘普生禁用于孕妇。
孕妇应避免使用萘普生。
孕妇切勿服用萘普生。
孕妇不宜服用萘普生。
不推荐孕妇使用萘普生。
不建议给予萘普生。
不应给予萘普生。
孕妇忌服萘普生。
萘普生为孕妇禁忌。
妊娠期为萘普生的禁忌证。
应停用萘普生。
术前停服萘普生。
不再推荐萘普生。
不主张使用萘普生。
禁止应用萘普生。
萘普生已不推荐使用。
孕妇不能用萘普生。
萘普生不适用于孕妇。
无需使用萘普生。
不要使用萘普生。
严禁使用萘普生。
应停止使用萘普生。
萘普生不作为首选。
反对使用萘普生。
不必给予萘普生。
忌用萘普生。
Do not add naproxen.
Do not initiate naproxen.
Do not continue naproxen.
Do not consider naproxen.
Do not switch to naproxen.
Do not treat with naproxen.
Naproxen should be withdrawn.
Naproxen should be held before surgery.
Omit naproxen before surgery.
Withdraw naproxen if bleeding occurs.
不使用萘普生。
暂停萘普生。
中止萘普生。
不加用萘普生。
不应加用萘普生。
Naproxen should be held in renal failure.
Cease naproxen.
Cease (if possible) naproxen.
"""
KEPT_ON = """
Do not stop naproxen abruptly.
Never discontinue naproxen.
Naproxen should not be withheld.
Naproxen must not be suddenly stopped.
Naproxen should not be delayed.
Naproxen is not contraindicated in asthma.
Naproxen should not exceed 1 g daily.
Naproxen should not be given without a proton pump inhibitor.
Do not give naproxen without a proton pump inhibitor.
Replace ibuprofen with naproxen.
Switch from ibuprofen to naproxen.
不应停用萘普生。
不可突然停用萘普生。
切勿自行停用萘普生。
萘普生并非禁用。
不宜停用萘普生。
"""
# What the text says, and what of it the tree has.
LOST = [
    ("Do not exceed 4 g in 24 hours.", "4 g in 24 hours"),
    ("Give no more than 3 tablets daily.", "3 tablets daily"),
    ("Give at most 2 tablets.", "2 tablets"),
    ("Give 10 mg every other day.", "10 mg"),
    ("Give 10 mg on alternate days.", "10 mg"),
    ("Give 10 mg once every two weeks.", "10 mg"),
    ("Give 10 mg three times per week.", "10 mg"),
    ("Give 90 mg every 12 weeks.", "90 mg"),
    ("Give 10 mg fortnightly.", "10 mg"),
    ("Give 5 mg at least 30 minutes before food.", "5 mg"),
    ("Give up to 40 mg.", "40 mg"),
    ("Give 40 mg (maximum).", "40 mg"),
    ("Give 1 mg/kg, max 60 mg.", "60 mg"),
    ("Total daily dose must not exceed 200 mg.", "200 mg"),
    ("Limit to 4 g per day.", "4 g per day"),
    ("Doses above 20 mg are not recommended.", "20 mg"),
    ("Give 10 mg q12h.", "10 mg"),
    ("Give 10 mg b.d.", "10 mg"),
    ("Give 10 mg at night.", "10 mg"),
    ("Give 10 mg four-hourly.", "10 mg"),
    ("Give 10 mg 6-hourly.", "10 mg"),
    ("Give 500 mg 8 hourly.", "500 mg"),
    ("Give 10 mg q.i.d.", "10 mg"),
    ("Give 10 mg/m2.", "10 mg"),
    ("Give 10 mg per kilogram.", "10 mg"),
    ("Give 10 mg/kg/day in two divided doses.", "10 mg/kg/day"),
    ("Give 10 mg twice weekly for six weeks.", "10 mg twice weekly"),
    ("Give 10 mg for at least 6 weeks.", "10 mg for 6 weeks"),
    ("Give 10 mg every morning.", "10 mg"),
    ("Give 10 mg for a maximum of 5 days.", "10 mg for 5 days"),
    ("Give a minimum of 10 mg.", "10 mg"),
    ("Give two tablets at night.", "tablets at night"),
    ("Give one or two puffs as needed.", "puffs as needed"),
    ("Give adrenaline 0.5 mg intramuscularly.", "0.5 mg"),
    ("Give 10 mg by mouth.", "10 mg"),
    ("肾上腺素0.5mg肌内注射。", "肾上腺素0.5mg"),
    ("Give it within 4 hours.", "4 hours"),
    ("每次两片，每日2次。", "每次片，每日2次"),
    ("Give 10 mg once a month.", "10 mg"),
    ("给予10mg，隔日1次。", "10mg"),
    ("给予10mg，每周2次。", "10mg"),
    ("给予10mg，1日3次。", "10mg"),
    ("给予10mg tid。", "10mg"),
    ("每次10mg，q8h。", "10mg"),
    ("每12小时10mg。", "10mg"),
    ("最大剂量40mg。", "40mg"),
    ("每日总量不超过40mg。", "40mg"),
    ("至少40mg。", "40mg"),
    ("极量为40mg。", "40mg"),
    ("剂量上限为40mg。", "40mg"),
    ("10mg/kg。", "10mg"),
    ("每公斤体重10mg。", "10mg"),
    ("每4周给药10mg。", "10mg"),
    ("10mg，每日一次。", "10mg"),
    ("10mg，每晚1次。", "10mg"),
    ("不少于10mg。", "10mg"),
    ("10mg，3次/日。", "10mg"),
    ("10mg/次，2次/d。", "10mg"),
    ("每天10mg，分2次服用。", "每天10mg"),
    ("10mg，两周一次。", "10mg"),
    ("10mg以内。", "10mg"),
    ("不得大于10mg。", "10mg"),
    ("疗程不超过5天，10mg。", "疗程5天"),
    ("Give 15 mg per week.", "15 mg"),
    ("Give 15 mg a week.", "15 mg"),
    ("Give 15 mg/week.", "15 mg"),
    ("Give 20 mg per hour.", "20 mg"),
    ("Give 0.1 mg/kg/min.", "0.1 mg/kg"),
    ("Give 10 mg tds.", "10 mg"),
    ("Give 10 mg od.", "10 mg"),
    ("一日5mg。", "5mg"),
    ("5mg/日。", "5mg"),
    ("每小时5mg。", "5mg"),
    ("Give 500 mg.", "500"),
    ("Give 10 mg in a 7-day course.", "10 mg"),
    ("Give 2.5 mg [1.25 mg in the elderly].", "2.5 mg"),
    ("Aim for an INR of 2 to 3. Give 5 mg.", "INR of 2 Give 5 mg"),
    ("If aged 65 years and over, give 5 mg.", "aged 65 years give 5 mg"),
    ("If aged 18 or under, give 5 mg.", "aged 18 give 5 mg"),
    ("未满65岁给予5mg。", "65岁给予5mg"),
    ("Give no more than a daily dose of 4 g.", "4 g"),
    ("Give not more than the usual starting dose of 20 mg.", "20 mg"),
    ("Give less than a single dose of 20 mg.", "20 mg"),
    ("Give it below a baseline of 60.", "60"),
    ("Give it above a target score of 60.", "60"),
    ("Give 5 mg or up to 10 mg.", "5 mg or 10 mg"),
    ("Give 500 ml/day.", "500 ml"),
    ("Give 80 ml/h.", "80 ml"),
    ("Give 4 g in a day.", "4 g"),
]


def kinds(passage: str, *triple: str) -> set[str]:
    """What is listed for a tree with one triple."""
    tree = DecisionTree.from_preorder([{"role": "D", "triples": [list(triple)], "logical_rel": "null"}])
    return {item.kind for item in items_of(passage, tree) if not item.hint}


@pytest.mark.parametrize("passage", FORBIDDING.strip().splitlines())
def test_words_that_forbid(passage: str) -> None:
    drug, gives, avoids = (
        ("naproxen", "drug therapy", "prohibited drugs") if passage.isascii() else ("萘普生", "治疗药物", "禁用药物")
    )
    assert {"given though forbidden", "prohibition", "negation"} & kinds(passage, "people", gives, drug)
    assert not {"forbidden though given", "prohibition", "negation"} & kinds(passage, "people", avoids, drug)


@pytest.mark.parametrize("passage", KEPT_ON.strip().splitlines())
def test_words_that_forbid_to_stop_do_not_forbid(passage: str) -> None:
    drug, gives, avoids = (
        ("naproxen", "drug therapy", "prohibited drugs") if passage.isascii() else ("萘普生", "治疗药物", "禁用药物")
    )
    assert not {"given though forbidden", "prohibition", "negation"} & kinds(passage, "people", gives, drug)
    assert "forbidden though given" in kinds(passage, "people", avoids, drug)


@pytest.mark.parametrize(("passage", "said"), LOST)
def test_words_that_make_a_limit_or_say_how_often(passage: str, said: str) -> None:
    relation = "dosage and administration" if passage.isascii() else "用法用量"
    wanted = {"limit", "frequency", "route", "dose", "number", "number not in the text"}
    assert wanted & kinds(passage, "drug", relation, said)
    assert not wanted & kinds(passage, "drug", relation, passage.rstrip(".。"))


@pytest.mark.parametrize(
    ("passage", "said", "is_listed"),
    [
        ("If there is fever, admit.", "no fever", True),
        ("若发热，住院治疗。", "无发热", True),
        ("In the absence of cough or fever, discharge.", "no fever", False),
        ("If there is fever, do not wait.", "no fever", False),  # a "not" in the sentence may be meant
        ("If there is no fever, discharge.", "no fever", False),
        ("If there is fever, admit.", "no rash", False),
        ("Nonsteroidals help.", "non-steroidals", False),
    ],
)
def test_a_no_that_only_the_tree_has(passage: str, said: str, is_listed: bool) -> None:
    relation = "clinical manifestation" if passage.isascii() else "临床表现"
    assert ("negation" in kinds(passage, "people", relation, said)) == is_listed


@pytest.mark.parametrize(
    ("passage", "said"),
    [
        ("Patients described above should receive ramipril 5 mg.", "ramipril 5 mg"),
        ("Patients under dialysis receive ramipril 5 mg.", "ramipril 5 mg"),
        ("If the potassium is within the normal range give ramipril 5 mg.", "ramipril 5 mg"),
        ("People aged 65 years and over give amlodipine 5 mg.", "aged 65 years and over give amlodipine 5 mg"),
        ("以上患者给予雷米普利5mg。", "雷米普利5mg"),
    ],
)
def test_words_that_are_about_no_number_are_no_limits(passage: str, said: str) -> None:
    assert "limit" not in kinds(passage, "people", "dosage and administration" if passage.isascii() else "用法用量", said)


def test_a_limit_is_of_the_number_behind_up_to() -> None:
    marks = marks_of("Give 5 mg and up to 10 mg.")
    assert [marks.text[one.number.begin : one.number.end] for one in marks.limits] == ["10 mg"]


@pytest.mark.parametrize(
    "passage",
    [
        "Give 10 mg half an hour before surgery.",
        "Give 10 mg an hour before surgery.",
        "Give 10 mg for more than a month.",
        "Give 10 mg over an hour.",
        "Give 10 mg and review in a week.",
        "Give 10 mg and review in a day.",
        "Increase prednisolone to 10 mg in a week.",
        "Give 5 mg above a year of age.",
        "If the eGFR is 60 ml/ min, or 60 ml / min, stop.",
        "If the eGFR is 60 ml/min, stop.",
    ],
)
def test_how_long_or_how_soon_is_not_how_often(passage: str) -> None:
    assert marks_of(passage).daily == []


@pytest.mark.parametrize(
    "passage",
    [
        "新生儿出现呼吸暂停时应给予氨茶碱。",
        "睡眠呼吸暂停患者推荐使用莫达非尼。",
        "心跳暂停时给予肾上腺素。",
        "Give diazepam until seizures cease.",
        "Give diazepam until seizures cease and then start saline.",
        "The inhaler should be held upright.",
        "The mask should be held in place.",
        "The mask should be held by a parent.",
        "The child should be held by the mother or another adult.",
    ],
)
def test_words_that_tell_of_the_body_or_of_a_device_do_not_forbid(passage: str) -> None:
    assert marks_of(passage).forbidden == []


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("Aim for an INR of 2 to 3. Give it.", ["2 to 3"]),
        ("If the score is at least 3. Give it.", ["3"]),
        ("severe (score ≥ 3), admit", ["3"]),
        ("评分≥3、伴发热", ["3"]),
        ("eGFR below 30. Give it", ["30"]),
        ("a 14-day course", ["14-day"]),
        ("1) Stop. 2) Give 5 mg. 3. Rest", ["5 mg"]),
        ("1、停用。2、给予5mg", ["5mg"]),
        ("for COVID-19, Th2, 5-HT, type 2 and step 3 [4]", []),
    ],
)
def test_numbers_are_told_from_those_of_lists_and_names(text: str, numbers: list[str]) -> None:
    folded = fold(text).text
    assert [folded[one.begin : one.end] for one in numbers_of(folded)] == [fold(one).text for one in numbers]


def test_a_chinese_comma_between_numbers_is_that_of_a_sentence() -> None:
    said = "eGFR<30，2周后复查肾功能"
    assert not {"number", "number not in the text"} & kinds(f"若{said}。", "患者", "治疗方案", said)
    assert fold("用0，5mg或2，3次").text == fold("用0, 5mg或2, 3次").text


@pytest.mark.parametrize(
    ("passage", "said"),
    [
        ("If there is no history of stroke, give it.", "stroke"),
        ("If there is no sign of oedema, give it.", "oedema"),
        ("若无明显水肿，停药。", "水肿"),
    ],
)
def test_a_no_a_word_further_away_counts(passage: str, said: str) -> None:
    assert "negation" in kinds(passage, "people", "clinical manifestation" if passage.isascii() else "临床表现", said)


def test_how_often_is_more_than_its_last_word() -> None:
    triples = [["x", "dosage and administration", said] for said in ("500 mg", "twice daily")]
    tree = DecisionTree.from_preorder([{"role": "D", "triples": triples, "logical_rel": "and"}])
    assert "frequency" in {item.kind for item in items_of("Give 500 mg three times daily.", tree)}


@pytest.mark.parametrize(
    ("passage", "said"),
    [
        ("If metformin is not tolerated, stop it.", "metformin is tolerated"),
        ("If metformin is tolerated, go on.", "metformin is not tolerated"),
        ("若血压未达标，加量。", "血压达标"),
        ("若血压达标，维持。", "血压未达标"),
    ],
)
def test_a_not_within_a_phrase_counts(passage: str, said: str) -> None:
    relation = "clinical manifestation" if passage.isascii() else "临床表现"
    assert "negation" in kinds(passage, "people", relation, said)
    there = passage.removeprefix("If ").removeprefix("若").split(",")[0].split("，")[0]
    assert "negation" not in kinds(passage, "people", relation, there)


@pytest.mark.parametrize(
    ("passage", "said"),
    [
        ("If there are two or more attacks, give it.", "three or more attacks"),
        ("If it lasts more than two minutes, call.", "more than ten minutes"),
        ("持续三个月。", "持续六个月"),
        ("若超过两周，停药。", "超过四周"),
    ],
)
def test_another_number_in_words_is_listed(passage: str, said: str) -> None:
    relation = "clinical manifestation" if passage.isascii() else "临床表现"
    assert "number not in the text" in kinds(passage, "people", relation, said)
