"""Whether people, or a person and a model, agree who made trees for the same passages: measures, and what differs.

**Which passages belong together** is told by their texts, in which runs of white space and Unicode's canonical forms (NFC) do not
count. Passages of one text are told apart by the ids in their records, and where one side has none, by their order, which a note
then says. Phrases are compared in the same way, and without case.

**F1, not kappa, is the measure of triples, nodes and paths.** Cohen's kappa corrects the observed agreement by what chance gives,
for which it has to count what neither has. For triples that is all that could have been written down and was not: nobody can count
it, and as it grows kappa goes to F1 (Hripcsak and Rothschild, JAMIA 12:296, 2005). F1 = 2 |A and B| / (|A| + |B|) is the same
whichever of the two is called right; it and the tree edit ratio are those of :mod:`gatewise_mdt.evaluation.metrics`. Tree agreement
is the share of passages whose trees are the same.

**Kappa where units and classes are fixed beforehand** (Cohen, Educational and Psychological Measurement 20:37, 1960): each
character of a passage, but no white space, is in a phrase of conditions, of decisions, of both or of neither. Of n characters,
n_ij are put into class i by A and into class j by B; with p_o = sum_i n_ii / n and p_e = sum_i (n_i. / n) (n_.i / n), kappa =
(p_o - p_e) / (1 - p_e). Where both put all into one class, p_e is 1 and kappa is not defined, whatever the agreement. A
character is in a phrase where subject or object of a triple stands in the text (:mod:`gatewise_mdt.spans`). The population
before the "@" is left out, as nobody had to find it. Long phrases weigh more than short ones.

Intervals are those of :mod:`gatewise_mdt.evaluation.intervals`, of passages drawn, so that characters of one passage, which are not
independent, come and go together. This whole module is ours but for the two formulas.
"""

import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from textwrap import shorten
from typing import Any

import numpy as np

from gatewise.checks import printable, writable
from gatewise.errors import GatewiseError
from gatewise_mdt.documents.passages import PASSAGE_ID
from gatewise_mdt.evaluation.differences import KINDS, Difference, differences
from gatewise_mdt.evaluation.intervals import intervals
from gatewise_mdt.evaluation.metrics import Counts, count_trees, rates
from gatewise_mdt.records import TreeRecord
from gatewise_mdt.relations import Language, relation_in
from gatewise_mdt.spans import locate_tree
from gatewise_mdt.tree import DecisionTree

MEASURES = ("triplet_f1", "node_f1", "path_f1", "tree_agreement", "ter")
CLASSES = 4
"""Of characters: in no phrase, in one of conditions, of decisions, of both."""


@dataclass(frozen=True)
class PassageAgreement:
    """Two trees of one passage.

    Attributes:
        a: the record as A's file has it.
        trees: both trees as they are compared: A's words for relations, phrases in NFC with single spaces.
        text: the text that they are of, in the same form.
        values: the :data:`MEASURES`.
        differences: the most dangerous first; none exactly where the trees are the same.
    """

    a: TreeRecord
    b: TreeRecord
    text: str
    trees: tuple[DecisionTree, DecisionTree]
    values: dict[str, float]
    differences: tuple[Difference, ...]

    @property
    def same(self) -> bool:
        return not self.differences

    def to_json(self) -> dict[str, Any]:
        """As in ``gatewise mdt agree --json``."""
        return {
            "a": _record_json(self.a),
            "b": _record_json(self.b),
            "same": self.same,
            **{name: value for name, value in self.values.items() if name != "tree_agreement"},
        }


@dataclass(frozen=True)
class Agreement:
    """Two sets of trees, A's and B's.

    Attributes:
        names: who made them.
        files: what they were read from, as they were named.
        passages: those that both have, in A's order.
        only_a: records of passages that only A has.
        values: the :data:`MEASURES` over all passages that both have.
        kappa: over the characters of all passages; None where it is not defined.
        intervals: 95%, measure or "kappa" -> ``low`` and ``high``.
        notes: what has to be known of how passages were paired, a sentence each.
    """

    names: tuple[str, str]
    files: tuple[str, str]
    passages: tuple[PassageAgreement, ...]
    only_a: tuple[TreeRecord, ...]
    only_b: tuple[TreeRecord, ...]
    values: dict[str, float]
    kappa: float | None
    intervals: dict[str, dict[str, float]]
    notes: tuple[str, ...]

    @property
    def differences(self) -> list[tuple[PassageAgreement, Difference]]:
        """All that differs, with its passage: the most dangerous first, then in the order of the passages."""
        found = [(passage, one) for passage in self.passages for one in passage.differences]
        return sorted(found, key=lambda both: KINDS.index(both[1].kind))

    def to_json(self) -> dict[str, Any]:
        """As in ``gatewise mdt agree --json``."""
        a, b = ({"name": name, "file": file} for name, file in zip(self.names, self.files, strict=True))
        return {
            "a": a,
            "b": b,
            "passages": len(self.passages),
            "same": sum(passage.same for passage in self.passages),
            "differences": [
                {**one._asdict(), "records": [passage.a.number, passage.b.number]} for passage, one in self.differences
            ],
            **self.values,
            "kappa": self.kappa,
            "intervals": self.intervals,
            "by_passage": [passage.to_json() for passage in self.passages],
            "only_a": [_record_json(record) for record in self.only_a],
            "only_b": [_record_json(record) for record in self.only_b],
            "notes": list(self.notes),
        }


def agree(
    a: Sequence[TreeRecord], b: Sequence[TreeRecord], *, names: tuple[str, str] = ("A", "B"), files: tuple[str, str] = ("", "")
) -> Agreement:
    """Measures whether two sets of trees agree, and says where they differ.

    Args:
        a: trees with their texts, in any order; the other set may have other passages too.
        names: who made them, for notes and what is shown; :func:`names_of` finds them in the records.
        files: what they were read from.

    Raises:
        GatewiseError: no passage is in both.
    """
    pairs, notes = _pairs(a, b, names)
    if not pairs:
        raise GatewiseError(
            f"{names[0]} and {names[1]} have no passage in common: expected two files of trees for the same texts"
            " (white space and Unicode's normal form do not count)"
        )
    compared = [_compared(a[i], b[j]) for i, j in pairs]
    ones, others = ([trees[side].to_preorder() for _, trees in compared] for side in (0, 1))
    counts = count_trees(ones, others, repair=True)
    tables = np.stack([_character_table(text, trees) for text, trees in compared])
    counts |= {f"kappa {i}": column for i, column in enumerate(tables.T)}
    passages = [
        PassageAgreement(
            a[i],
            b[j],
            text,
            trees,
            _plain_numbers(_measures({name: column[row] for name, column in counts.items()})),
            tuple(differences(*trees)),
        )
        for row, ((i, j), (text, trees)) in enumerate(zip(pairs, compared, strict=True))
    ]
    values = _measures({name: column.sum() for name, column in counts.items()})
    kappa, ends = float(values["kappa"]), intervals(counts, of=_measures)
    both_a, both_b = {i for i, _ in pairs}, {j for _, j in pairs}
    if np.isnan(kappa):
        ends.pop("kappa", None)
    return Agreement(
        names,
        files,
        tuple(passages),
        tuple(record for i, record in enumerate(a) if i not in both_a),
        tuple(record for j, record in enumerate(b) if j not in both_b),
        _plain_numbers(values),
        None if np.isnan(kappa) else kappa,
        ends,
        tuple(notes),
    )


def names_of(*files: tuple[str, Sequence[TreeRecord]]) -> tuple[str, ...]:
    """What to call those who made the trees of some files: by the one reviewer of all records that name one, else by the file.

    Args:
        files: each with its records.
    """
    made = []
    for _, records in files:
        said = [(record.reviewed or {}).get("by") for record in records]
        reviewers = {" ".join(printable(by).split()) for by in said if isinstance(by, str)}
        made.append(reviewers.pop() if len(reviewers) == 1 else "")
    shown = [printable(str(writable(file))) for file, _ in files]
    return tuple(name if name and made.count(name) == 1 else file for name, file in zip(made, shown, strict=True))


def _record_json(record: TreeRecord) -> dict[str, Any]:
    return {"record": record.number, "text": record.text, "review": record.more.get("review"), "reviewed": record.reviewed}


# ---- which passages belong together ----


def _pairs(a: Sequence[TreeRecord], b: Sequence[TreeRecord], names: tuple[str, str]) -> tuple[list[tuple[int, int]], list[str]]:
    """The positions of the records of one passage, in A's order, and what has to be known of how they were paired."""
    by_text: dict[str, tuple[list[int], list[int]]] = defaultdict(lambda: ([], []))
    for side, records in enumerate((a, b)):
        for at, record in enumerate(records):
            if record.text.strip():
                by_text[_plain_text(record)][side].append(at)
    found: dict[int, int] = {}
    notes = []
    for here, there in by_text.values():
        named = {name: j for j in there if (name := b[j].more.get(PASSAGE_ID))}
        left = list(there)
        for i in here:
            if (name := a[i].more.get(PASSAGE_ID)) in named:
                found[i] = named.pop(name)
                left.remove(found[i])
        by_order = []
        for i in (i for i in here if i not in found):
            # With ids of their own they are two passages.
            j = next((j for j in left if not (a[i].more.get(PASSAGE_ID) and b[j].more.get(PASSAGE_ID))), None)
            if j is not None:
                left.remove(j)
                by_order.append((i, j))
        found |= by_order
        if by_order and len(here) + len(there) > 2:
            of_a, of_b = ", ".join(str(a[i].number) for i, _ in by_order), ", ".join(str(b[j].number) for _, j in by_order)
            notes.append(
                f'"{shorten(a[here[0]].text, 40, placeholder="…")}" comes several times, and no ids tell its passages apart:'
                f" they were paired by their order, {names[0]}'s records {of_a} with {names[1]}'s {of_b}"
            )
    return sorted(found.items()), notes


# ---- two trees as they are compared ----


def _plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).split())


def _plain_text(record: TreeRecord) -> str:
    population, passage = _plain(record.population), _plain(record.passage)
    return f"{population}@{passage}" if "@" in record.text else passage


def _compared(a: TreeRecord, b: TreeRecord) -> tuple[str, tuple[DecisionTree, DecisionTree]]:
    language = (a.tree if a.tree.triples else b.tree).language
    return _plain_text(a), (_plain_tree(a.tree, language), _plain_tree(b.tree, language))


def _plain_tree(tree: DecisionTree, language: Language) -> DecisionTree:
    nodes = [
        {**node.to_json(), "triples": [[_plain(s), relation_in(r, language), _plain(o)] for s, r, o in node.triples]}
        for node in tree.nodes
    ]
    return DecisionTree.repaired(nodes)[0]  # in this form two triples of a node may be one


def _measures(totals: Counts) -> Counts:
    """The measures and kappa, of one passage, of all, or of many draws of passages at once."""
    made = rates(totals)
    made["tree_agreement"] = made["tree_acc"]
    cells = np.stack([totals[f"kappa {i}"] for i in range(CLASSES**2)], axis=-1)
    return {name: made[name] for name in MEASURES} | {"kappa": kappa_of(cells.reshape(*cells.shape[:-1], CLASSES, CLASSES))}


def _plain_numbers(values: Counts) -> dict[str, float]:
    return {name: float(values[name]) for name in MEASURES}


# ---- kappa ----


def kappa_of(table: Any) -> Any:
    """Cohen's kappa of tables, (..., classes of A, classes of B); NaN where it is not defined.

    Multiplied by n squared above and below, so that all is whole numbers and "not defined" is exact.
    """
    units = table.sum(axis=(-2, -1))
    same = np.trace(table, axis1=-2, axis2=-1)
    chance = (table.sum(axis=-1) * table.sum(axis=-2)).sum(axis=-1)
    above, below = units * same - chance, units * units - chance
    return np.divide(above, below, out=np.full(np.shape(below), np.nan), where=below != 0)


def _character_table(text: str, trees: tuple[DecisionTree, DecisionTree]) -> Any:
    """(CLASSES²,): how many characters of a passage each of the two trees puts into which class."""
    one, other = (_character_classes(text, tree) for tree in trees)
    return np.bincount(CLASSES * one + other, minlength=CLASSES**2)


def _character_classes(text: str, tree: DecisionTree) -> Any:
    """The class of each character of the passage that is no white space."""
    classes = np.zeros(len(text), dtype=np.int64)
    for node, row in zip(tree.nodes, locate_tree(text, tree), strict=True):
        for span in (span for spans in row for span in spans if span is not None):
            classes[span.start : span.end] |= 1 if node.is_condition else 2
    return classes[[i for i in range(text.find("@") + 1, len(text)) if not text[i].isspace()]]
