"""How often the rules of ``gatewise mdt check`` list what is wrong, and how often they cry wolf.

On the annotators' own trees of Text2MDT, where every item counts as false, and on the same trees with one mistake each: a dose
changed, the doses of two drugs swapped, a prohibition turned round, a limit or a frequency lost, a condition or a recommendation
dropped, the branches of a condition swapped. Every place where a mistake can be made is one, at most three of a kind in a passage.
A mistake counts as listed when the tree with it has an item that the tree without it has not (hints are no items); of the first
seven kinds of mistakes, an item of the first group of rules. Rules were written and tuned on the train passages and the project's
samples.

    python mdt/benchmarks/check.py --data-dir DIR

writes ``results/mdt_check.json``; DIR has ``text2mdt/en_train.json`` and the like. The samples are measured beside them.
"""

import argparse
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from gatewise_mdt import TreeRecord, read_trees, sample
from gatewise_mdt.checking.items import Item, items_of
from gatewise_mdt.relations import relation_in
from gatewise_mdt.tree import DecisionTree

from gatewise.files import write_json

RESULTS = Path(__file__).parent / "results" / "mdt_check.json"
MOST = 3
Nodes = list[dict[str, Any]]
_NUMBER = re.compile(r"\d+(?:\.\d+)?")
_DOSE = re.compile(
    r"\d(?:[\d.,]*)\s*万?(?:mg|g|μg|ug|mcg|iu|u|ml|mmol|meq|tablets?|毫克|克|微克|单位|片|粒|滴)(?![a-z])", re.IGNORECASE
)
_LIMIT = re.compile(  # beside a number
    r"[<>≤≥＜＞]=?(?=\s*\d)"
    r"|\b(?:(?:a )?max(?:imum|\.)?(?: of)?|minimum|at least|at most|(?:no|not) more than|not exceed(?:ing)?|up to"
    r"|(?:less|more|greater|higher|lower|larger|smaller|older|younger) than|exceeding|above|below|under|over|within)"
    r"(?= (?:the age of )?(?:\d|one|two|three|four|five|six|seven|eight))"
    r"|不超过|超过|最大|至少|[大小高低]于(?:等于)?|以上|以下",
    re.IGNORECASE,
)
_COUNT = r"(?:\d+|two|three|four|five)"
_FREQUENCY = re.compile(
    rf"\b(?:once|twice|{_COUNT}(?: (?:to|or) {_COUNT})? times)(?: (?:a|per|each) (?:day|week|month)| daily| weekly)"
    r"|\b(?:every (?:other |second |\d+(?: ?- ?\d+)? )?(?:day|hour|week|month)s?|(?:on )?alternate days|weekly|monthly)\b"
    r"|(?<![a-z])(?:qd|bid|tid|qid|qod|q\d+h)(?![a-z])|(?:每[日天周]|[一1]日|日)\d?[\d一二三两四-]*次|\d(?:[-~]\d)?次/[d日天]"
    r"|[每隔]\d*(?:[-~]\d)?(?:小时|周|月)|隔[日天]",
    re.IGNORECASE,
)
_DAILY = re.compile(
    r"(?<!once )(?<!twice )(?<!times )\b(?:daily|(?:per|a|each) day)\b|/ ?d(?:ay)?\b|每[日天](?!\d?[\d一二三两四-]*次)",
    re.IGNORECASE,
)
_ROUTE = re.compile(
    r"(?:\b(?:intravenous|intramuscular|subcutaneous|oral|inhaled|topical)(?:ly)?\b|\bby mouth\b"
    r"|静脉(?:滴注|注射|推注|输注)|静[滴注]|肌[内肉]注射|皮下注射|口服|吸入|外用)",
    re.IGNORECASE,
)
_NEGATED = re.compile(
    r"\s*(?:is|are|be) (?:\w+ )?(?:not|no longer) (?:\w+ )?(?:recommended|advised|indicated|suggested)\.?$"
    r"|^(?:avoid(?:ing)?|do not (?:use|give))\s+|^(?:不[宜应推荐建议]{1,2}(?:使用|行|用)?|避免(?:使用)?|无需|禁止|忌)",
    re.IGNORECASE,
)
_NOT = re.compile(r"^(?:(?:not|no|without|absence of|do not|does not|cannot)\s+|(?:无|未|不|没有|非)\s*)", re.IGNORECASE)


def _relation(triple: Sequence[str]) -> str:
    return relation_in(triple[1], "en")


def _copy(nodes: Nodes) -> Nodes:
    return [{**node, "triples": [list(triple) for triple in node["triples"]]} for node in nodes]


def _in_place(nodes: Nodes, node: int, triple: int, part: int, words: str) -> Nodes | None:
    made = _copy(nodes)
    made[node]["triples"][triple][part] = words.strip()
    return made if words.strip() else _without(nodes, node, triple)


def _without(nodes: Nodes, node: int, triple: int) -> Nodes | None:
    """Without a triple; None where a condition would be left empty."""
    made = _copy(nodes)
    del made[node]["triples"][triple]
    if made[node]["role"] == "C" and not made[node]["triples"]:
        return None
    if len(made[node]["triples"]) < 2:
        made[node]["logical_rel"] = "null"
    return made


def _triples(nodes: Nodes, role: str = "") -> Iterator[tuple[int, int, list[str]]]:
    for i, node in enumerate(nodes):
        if role in ("", node["role"]):
            yield from ((i, k, triple) for k, triple in enumerate(node["triples"]))


# ---- the mistakes: each gives (the tree with it) for each place ----


def change_a_dose(record: TreeRecord, nodes: Nodes, draw: random.Random) -> Iterator[Nodes | None]:
    """To a number that the passage has not, or to one that it has, by turns."""
    for i, k, triple in _triples(nodes, "D"):
        found = list(_NUMBER.finditer(triple[2])) if _DOSE.search(triple[2]) else []
        if found:
            number = draw.choice(found)
            others = [one for one in _NUMBER.findall(record.passage) if one != number[0]]
            new = draw.choice(others) if others and draw.random() < 0.5 else f"{float(number[0]) * draw.choice([2, 3, 10]):g}"
            yield _in_place(nodes, i, k, 2, triple[2][: number.start()] + new + triple[2][number.end() :])


def swap_doses(record: TreeRecord, nodes: Nodes, draw: random.Random) -> Iterator[Nodes | None]:
    doses = [(i, k, one) for i, k, one in _triples(nodes, "D") if _relation(one).startswith("dosage") and _NUMBER.search(one[2])]
    for a, (i, k, one) in enumerate(doses):
        for j, m, other in doses[a + 1 :]:
            if one[0].lower() != other[0].lower() and one[2] != other[2]:
                made = _copy(nodes)
                made[i]["triples"][k][2], made[j]["triples"][m][2] = other[2], one[2]
                yield made


def give_what_is_forbidden(record: TreeRecord, nodes: Nodes, draw: random.Random) -> Iterator[Nodes | None]:
    for i, k, triple in _triples(nodes, "D"):
        if _relation(triple) == "prohibited drugs":
            yield _in_place(nodes, i, k, 1, relation_in("drug therapy", record.tree.language))
        elif _relation(triple) == "therapeutic schedule" and _NEGATED.search(triple[2]):
            yield _in_place(nodes, i, k, 2, _NEGATED.sub("", triple[2]))


def forbid_what_is_given(record: TreeRecord, nodes: Nodes, draw: random.Random) -> Iterator[Nodes | None]:
    for i, k, triple in _triples(nodes, "D"):
        if _relation(triple) == "drug therapy":
            yield _in_place(nodes, i, k, 1, relation_in("prohibited drugs", record.tree.language))


def _lose(
    pattern: re.Pattern[str], beside: re.Pattern[str] = re.compile("")
) -> Callable[[TreeRecord, Nodes, random.Random], Iterator[Nodes | None]]:
    def mistake(record: TreeRecord, nodes: Nodes, draw: random.Random) -> Iterator[Nodes | None]:
        for i, k, triple in _triples(nodes):
            if pattern.search(triple[2]) and beside.search(triple[2]):
                yield _in_place(nodes, i, k, 2, " ".join(pattern.sub("", triple[2], count=1).split()))

    return mistake


def lose_a_not(record: TreeRecord, nodes: Nodes, draw: random.Random) -> Iterator[Nodes | None]:
    for i, k, triple in _triples(nodes, "C"):
        if _NOT.search(triple[2]) and len(_NOT.sub("", triple[2])) > 1:
            yield _in_place(nodes, i, k, 2, _NOT.sub("", triple[2]))


def drop_a_condition(record: TreeRecord, nodes: Nodes, draw: random.Random) -> Iterator[Nodes | None]:
    """A whole condition, in whose place its yes branch comes."""
    for i, both in enumerate(record.tree.children):
        if both is not None:
            end = _end(record.tree, both[1])
            yield [*_copy(nodes)[:i], *_copy(nodes)[both[0] : both[1]], *_copy(nodes)[end:]]


def _end(tree: DecisionTree, node: int) -> int:
    """Behind the last node of a subtree."""
    both = tree.children[node]
    return node + 1 if both is None else _end(tree, both[1])


def drop_of_a_condition(record: TreeRecord, nodes: Nodes, draw: random.Random) -> Iterator[Nodes | None]:
    """One triple of a condition that has several."""
    yield from (_without(nodes, i, k) for i, k, _ in _triples(nodes, "C") if len(nodes[i]["triples"]) > 1)


def drop_a_leaf(record: TreeRecord, nodes: Nodes, draw: random.Random) -> Iterator[Nodes | None]:
    """All that a decision says."""
    for i, node in enumerate(nodes):
        if node["role"] == "D" and node["triples"]:
            yield [*_copy(nodes)[:i], {"role": "D", "triples": [], "logical_rel": "null"}, *_copy(nodes)[i + 1 :]]


def drop_of_a_leaf(record: TreeRecord, nodes: Nodes, draw: random.Random) -> Iterator[Nodes | None]:
    """One drug or measure of a decision that has several, with its doses."""
    for i, _, triple in _triples(nodes, "D"):
        kept = [one for one in nodes[i]["triples"] if one != triple and one[0] != triple[2]]
        if not _relation(triple).startswith("dosage") and any(not _relation(one).startswith("dosage") for one in kept):
            made = _copy(nodes)
            made[i]["triples"] = [list(one) for one in kept]
            made[i]["logical_rel"] = made[i]["logical_rel"] if len(kept) > 1 else "null"
            yield made


def swap_branches(record: TreeRecord, nodes: Nodes, draw: random.Random) -> Iterator[Nodes | None]:
    """What is said where a condition holds, where it does not."""
    for both in record.tree.children:
        if both is not None:
            end = _end(record.tree, both[1])
            yes, no = _copy(nodes)[both[0] : both[1]], _copy(nodes)[both[1] : end]
            if yes != no:
                yield [*_copy(nodes)[: both[0]], *no, *yes, *_copy(nodes)[end:]]


MISTAKES: dict[str, Callable[[TreeRecord, Nodes, random.Random], Iterator[Nodes | None]]] = {
    "change a dose": change_a_dose,
    "swap two drugs' doses": swap_doses,
    "give what is forbidden": give_what_is_forbidden,
    "forbid what is given": forbid_what_is_given,
    "lose a limit": _lose(_LIMIT),
    "lose a frequency": _lose(_FREQUENCY),
    "lose a daily": _lose(_DAILY),
    "lose the not of a condition": lose_a_not,
    "lose a route": _lose(_ROUTE, beside=_DOSE),
    "drop a condition": drop_a_condition,
    "drop one of several conditions": drop_of_a_condition,
    "drop a decision": drop_a_leaf,
    "drop one of several decisions": drop_of_a_leaf,
    "swap the branches of a condition": swap_branches,
}
FIRST = tuple(MISTAKES)[:7]
"""What the first group of rules is for: at most one false item in five passages."""
FIRST_KINDS = (
    "given though forbidden", "forbidden though given", "dose of another drug", "number not in the text", "dose", "number", "limit",
    "frequency", "negation", "prohibition", "empty tree", "branches", "route",
)  # fmt: skip


def measure(records: Sequence[TreeRecord]) -> dict[str, Any]:
    """False items a passage by rule, and the share of the mistakes that is listed, by mistake and by what listed it."""
    false: Counter[str] = Counter()
    hints: Counter[str] = Counter()
    listed: dict[str, Counter[str]] = defaultdict(Counter)
    right: dict[tuple[str, float], float] = defaultdict(float)
    wrong: dict[tuple[str, float], float] = defaultdict(float)
    for record in records:
        own = items_of(record.passage, record.tree)
        false.update(item.kind for item in own if not item.hint)
        hints.update(item.kind for item in own if item.hint)
        known = {_what(item) for item in own}
        draw = random.Random(record.text)
        new: list[list[Item]] = []
        for name, mistake in MISTAKES.items():
            made = [nodes for nodes in mistake(record, record.tree.to_preorder(), draw) if nodes is not None]
            for nodes in draw.sample(made, min(MOST, len(made))):
                found = [item for item in items_of(record.passage, DecisionTree.repaired(nodes)[0]) if _what(item) not in known]
                new.append(found)
                listed[name]["made"] += 1
                listed[name]["listed"] += any(not item.hint and (name not in FIRST or item.kind in FIRST_KINDS) for item in found)
                listed[name].update(sorted({f"by {item.kind}" for item in found}))
        for item in own:
            wrong[item.kind, item.sure] += 2  # with a mistake and without
        for item in (item for found in new for item in found):
            right[item.kind, item.sure] += 1 / len(new)
    count = len(records)
    first = sum(false[kind] for kind in FIRST_KINDS)
    return {
        "passages": count,
        "false items a passage": {"first group": _round(first / count), "all": _round(sum(false.values()) / count)}
        | {kind: _round(one / count) for kind, one in false.most_common()},
        "hints a passage": {kind: _round(one / count) for kind, one in hints.most_common()},
        "right, of what is said to be so sure": {
            f"{kind}, {sure}": _round(right[kind, sure] / (right[kind, sure] + wrong[kind, sure]))
            for kind, sure in sorted({*right, *wrong})
        },
        "mistakes": {
            name: {"made": one["made"], "listed": _round(one["listed"] / one["made"])}
            | {key: value for key, value in one.most_common() if key.startswith("by ")}
            for name, one in listed.items()
        },
    }  # fmt: skip


def _what(item: Item) -> tuple[str, str, int | None]:
    return item.kind, item.words, item.start


def _round(share: float) -> float:
    return round(share, 3)


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--parts", nargs="+", default=["train", "dev"])
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    made: dict[str, Any] = {}
    for part in options.parts:
        for language in ("en", "zh"):
            file = options.data_dir / "text2mdt" / f"{language}_{part}.json"
            made[f"{language}_{part}"] = measure(read_trees(file, repair=True).records)
    made["samples"] = measure(sample())
    for name, one in made.items():
        print(f"\n{name}: {one['passages']} passages; false items a passage: {one['false items a passage']}")
        print(f"  hints: {one['hints a passage']}")
        for mistake, counts in one["mistakes"].items():
            ways = {key[3:]: value for key, value in counts.items() if key.startswith("by ")}
            print(f"  {mistake:32} {counts['made']:4} made, {counts['listed']:.3f} listed  {ways}")
    write_json(options.out, made)


if __name__ == "__main__":
    main()
