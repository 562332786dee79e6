"""How often ``gatewise mdt agree`` puts a difference into the right class.

The annotators' trees of Text2MDT against the same trees with one change each: those of ``check.py`` (a dose changed, a prohibition
turned round, a condition dropped ...), another threshold, side or population in a condition, and phrases in other words. Every
place where a change can be made is one, at most three of a kind in a passage. It is right when the most dangerous difference that
is listed has the class that the change was made for: among the same words, and with every phrase of the tree in other words. Rules
were written and tuned on the train passages.

    python mdt/benchmarks/agree.py --data-dir DIR
    python mdt/benchmarks/agree.py --report

The first writes ``results/mdt_agree.json``; DIR has ``text2mdt/en_train.json`` and the like. The second prints what stands there.
"""

import argparse
import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import check
from gatewise_mdt import DecisionTree, TreeRecord, differences, read_trees
from gatewise_mdt.evaluation.differences import KINDS

from gatewise.files import write_json

RESULTS = Path(__file__).parent / "results" / "mdt_agree.json"
CONTRARY, DOSE, CONDITION, MISSING, WORDING = KINDS
Nodes = check.Nodes
Change = Callable[[TreeRecord, Nodes, random.Random], Iterator[Nodes | None]]

_NUMBER = re.compile(r"\d+(?:\.\d+)?")
_SIDES = {"<": ">", "≤": "≥", "less than": "more than", "below": "above", "under": "over", "younger": "older",
          "lower than": "higher than",          "小于": "大于", "低于": "高于", "以下": "以上", "少于": "多于"}  # fmt: skip
_SIDES |= {other: one for one, other in _SIDES.items()}
_PEOPLE = {"adults": "children", "adult": "child", "children": "adults", "women": "men", "elderly": "young",
           "儿童": "成人", "成人": "儿童", "老年": "青年", "女性": "男性", "患儿": "成年患者",
           "妊娠": "哺乳", "孕妇": "产妇"}  # fmt: skip
_DEGREES = {"mild": "severe", "severe": "mild", "acute": "chronic", "chronic": "acute", "high": "low", "low": "high",
            "急性": "慢性", "慢性": "急性", "轻度": "重度", "重度": "轻度", "升高": "降低", "早期": "晚期"}  # fmt: skip


def _with(nodes: Nodes, role: str, change: Callable[[str], str | None], parts: tuple[int, ...] = (2,)) -> Iterator[Nodes | None]:
    """A phrase of a node in the other words that a function gives."""
    for i, k, triple in check._triples(nodes, role):
        for part in parts:
            new = change(triple[part])
            if new is not None and new.strip() and new != triple[part]:
                yield check._in_place(nodes, i, k, part, new)


def _exchanged(table: dict[str, str]) -> Callable[[str], str | None]:
    pattern = re.compile(
        "|".join(rf"\b{one}\b" if one.isascii() and one.isalpha() else re.escape(one) for one in table), re.IGNORECASE
    )

    def change(phrase: str) -> str | None:
        found = pattern.search(phrase)
        return phrase[: found.start()] + table[found[0].lower()] + phrase[found.end() :] if found else None

    return change


def other_threshold(record: TreeRecord, nodes: Nodes, draw: random.Random) -> Iterator[Nodes | None]:
    def change(phrase: str) -> str | None:
        found = list(_NUMBER.finditer(phrase))
        if not found:
            return None
        one = draw.choice(found)
        return f"{phrase[: one.start()]}{float(one[0]) * draw.choice([0.5, 2, 3]):g}{phrase[one.end() :]}"

    yield from _with(nodes, "C", change)


def of_conditions(change: Change) -> Change:
    return lambda record, nodes, draw: (made for made in change(record, nodes, draw) if made and _roles(nodes, made) <= {"C"})


def of_decisions(change: Change) -> Change:
    return lambda record, nodes, draw: (made for made in change(record, nodes, draw) if made and _roles(nodes, made) <= {"D"})


def _kept(change: Change) -> Change:
    """A change of words that leaves some."""
    return lambda record, nodes, draw: (made for made in change(record, nodes, draw) if made and _count(made) == _count(nodes))


def _count(nodes: Nodes) -> int:
    return sum(len(node["triples"]) for node in nodes)


def _roles(nodes: Nodes, made: Nodes) -> set[str]:
    """Of the nodes that were changed."""
    return {one["role"] for one, other in zip(nodes, made, strict=True) if one != other}


def add_a_not(record: TreeRecord, nodes: Nodes, draw: random.Random) -> Iterator[Nodes | None]:
    chinese = record.tree.language == "zh"
    yield from _with(nodes, "C", lambda phrase: None if check._NOT.search(phrase) else ("无" if chinese else "no ") + phrase)


_REWORDED = [  # what is said, in other words that say the same
    (r"≥ ?(?=\d)", "at least "), (r"≤ ?(?=\d)", "at most "), (r"> ?(?=\d)", "more than "), (r"< ?(?=\d)", "less than "),
    (r"\btwice (?:daily|a day)\b", "2 times a day"), (r"\bonce daily\b", "once a day"), (r"(?<=\d) ?mg\b", " milligrams"),
    (r"(?<!times )\b(?:the|a|an) ", ""), (r"^patients with ", ""), (r"\s*treatment$", " therapy"), (r"^use of ", ""),
    (r" and (?!above)", " & "), (r"^(\w+) (?:is|are) recommended$", r"recommend \1"), (r"^(?=[a-z])", "the "),
    (r"^(?=[A-Z])", "use of "),
]  # fmt: skip
_HAN_REWORDED = [
    (r"≥ ?(?=\d)", "大于等于"), (r"≤ ?(?=\d)", "不超过"), (r"> ?(?=\d)", "超过"), (r"< ?(?=\d)", "低于"),
    (r"(?<=\d) ?mg(?![a-z/])", "毫克"), (r"[每一1]日(\d)次", r"\1次/d"), (r"患者$", ""), (r"^给予", ""), (r"治疗$", ""),
    (r"^(?!使用|给予|有|存在|[无不非未])", "有"),
]  # fmt: skip
_HAN_ADDED = {"C": "有", "D": "给予"}


def other_words(record: TreeRecord, nodes: Nodes, draw: random.Random) -> Iterator[Nodes | None]:
    """Each phrase in one of the ways that fit it."""
    for i, k, triple in check._triples(nodes):
        if ways := _ways(triple[2], nodes[i]["role"], record.tree.language):
            yield check._in_place(nodes, i, k, 2, draw.choice(ways))


def _ways(phrase: str, role: str, language: str) -> list[str]:
    rules = [(pattern, _HAN_ADDED[role] if new == "有" else new) for pattern, new in _HAN_REWORDED]
    said = [re.sub(pattern, new, phrase, count=1).strip() for pattern, new in (rules if language == "zh" else _REWORDED)]
    return [one for one in said if one and one != phrase]


def _all_in_other_words(tree: DecisionTree, draw: random.Random) -> DecisionTree:
    nodes = tree.to_preorder()
    for i, _, triple in check._triples(nodes):
        triple[2] = draw.choice([*_ways(triple[2], nodes[i]["role"], tree.language), triple[2]])
    return DecisionTree.repaired(nodes)[0]


CHANGES: dict[str, tuple[str, Change]] = {
    "give what is forbidden": (CONTRARY, check.give_what_is_forbidden),
    "forbid what is given": (CONTRARY, check.forbid_what_is_given),
    "change a dose": (DOSE, check.change_a_dose),
    "swap two drugs' doses": (DOSE, check.swap_doses),
    "lose a limit of a decision": (DOSE, of_decisions(check._lose(check._LIMIT))),
    "lose a frequency of a decision": (DOSE, of_decisions(_kept(check._lose(check._FREQUENCY)))),
    "lose a daily of a decision": (DOSE, of_decisions(check._lose(check._DAILY, beside=check._DOSE))),
    "lose a route": (DOSE, check.MISTAKES["lose a route"]),
    "change a threshold": (CONDITION, other_threshold),
    "turn a limit of a condition": (CONDITION, lambda record, nodes, draw: _with(nodes, "C", _exchanged(_SIDES))),
    "lose a limit of a condition": (CONDITION, of_conditions(check._lose(check._LIMIT))),
    "lose the not of a condition": (CONDITION, check.lose_a_not),
    "add a not to a condition": (CONDITION, add_a_not),
    "another population": (CONDITION, lambda record, nodes, draw: _with(nodes, "", _exchanged(_PEOPLE), (0, 2))),
    "another degree of a condition": (CONDITION, lambda record, nodes, draw: _with(nodes, "C", _exchanged(_DEGREES))),
    "swap the branches of a condition": (CONDITION, check.swap_branches),
    "drop a condition": (MISSING, check.drop_a_condition),
    "drop one of several conditions": (MISSING, check.drop_of_a_condition),
    "drop a decision": (MISSING, check.drop_a_leaf),
    "drop one of several decisions": (MISSING, check.drop_of_a_leaf),
    "say it in other words": (WORDING, other_words),
}


def measure(records: Sequence[TreeRecord], show: str = "") -> dict[str, Any]:
    """For each change how often it was made, the share in the right class, and what was the most dangerous class listed."""
    found: dict[str, Counter[str]] = {name: Counter() for name in CHANGES}
    for record in records:
        draw = random.Random(record.text)
        for name, (kind, change) in CHANGES.items():
            made = [nodes for nodes in change(record, record.tree.to_preorder(), draw) if nodes is not None]
            for nodes in draw.sample(made, min(check.MOST, len(made))):
                other = DecisionTree.repaired(nodes)[0]
                listed = differences(record.tree, other)
                first = listed[0].kind if listed else "nothing"
                found[name].update([first, "made"] + ["right"] * (first == kind) + ["listed"] * len(listed))
                worded = differences(record.tree, _all_in_other_words(other, draw))
                found[name]["worded"] += (worded[0].kind if worded else WORDING) == kind
                for some in (listed, worded):
                    if show and show in name and (some[0].kind if some else WORDING) != kind:
                        print(name, record.number, *(one[:4] for one in some[:4]), sep="\n    ")
    return {
        name: {"class": CHANGES[name][0], "made": one["made"], "right": round(one["right"] / one["made"], 3)}
        | {"right, all in other words": round(one["worded"] / one["made"], 3), "listed": round(one["listed"] / one["made"], 2)}
        | {"first": {kind: count for kind, count in one.most_common() if kind in KINDS}}
        for name, one in found.items()
        if one["made"]
    }


def report(made: dict[str, Any]) -> None:
    """Prints what was measured."""
    for part, changes in made.items():
        print(
            f"\n{part}: change, class, how often made, share in it, the same among other words, number listed, classes of the first"
        )
        for name, one in changes.items():
            shares = f"{one['right']:.3f} {one['right, all in other words']:.3f} {one['listed']:5.2f}"
            print(f"  {name:34} {one['class']:16} {one['made']:4} {shares}  {one['first']}")


def main() -> None:
    """Measures and writes, or prints what was written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--parts", nargs="+", default=["train", "dev"])
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--report", action="store_true", help="print the results, measure nothing")
    parser.add_argument("--show", default="", help="print what is not in its class, of changes with these words in their names")
    options = parser.parse_args()
    if not options.report:
        if options.data_dir is None:
            parser.error("--data-dir is missing")
        files = {
            f"{one}_{part}": options.data_dir / "text2mdt" / f"{one}_{part}.json" for part in options.parts for one in ("en", "zh")
        }
        write_json(
            options.out, {name: measure(read_trees(file, repair=True).records, options.show) for name, file in files.items()}
        )
    report(json.loads(options.out.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
