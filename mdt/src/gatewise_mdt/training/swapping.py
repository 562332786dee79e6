"""More training passages from few: phrases change places with those of other records, in the text and in its tree alike.

A model that sees the same few hundred passages in every epoch learns them by heart. In a copy whose drugs, findings and patients
are those of other passages it can only read where a phrase begins and ends, and what is said of it. What the copies say is
medical nonsense: they are for training alone. (Not of the papers: our own.)
"""

import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace

from gatewise.errors import GatewiseError
from gatewise_mdt.records import TreeRecord
from gatewise_mdt.spans import Span, find
from gatewise_mdt.tree import DecisionTree

_Pools = dict[tuple[str, str], list[str]]
_TRIES = 5


def swapped_copies(records: Iterable[TreeRecord], copies: int, *, seed: int = 0, chance: float = 0.5) -> list[TreeRecord]:
    """Copies of records with phrases of each other: an object may be exchanged for one of the same relation, a population for one.

    A phrase is left as it is where it does not stand in the text word for word, overlaps with another one of the tree, or is of two
    kinds. A copy has no triple whose phrases are not in its text but those that the record has; a record whose tries all fail is
    copied as it is.

    Args:
        copies: of each record.
        chance: that a phrase is exchanged, in [0, 1].

    Returns:
        All copies of the first record, then those of the second, and so on; equal for equal seeds.
    """
    held = list(records)
    pools = _pools(held)
    draw = random.Random(f"{seed}/swapped")
    return [_copy(record, pools, draw, chance) for record in held for _ in range(copies)]


def _pools(records: Sequence[TreeRecord]) -> _Pools:
    """(language, relation or "population") -> the phrases to draw from, as they stand in their texts."""
    pools: dict[tuple[str, str], dict[str, None]] = defaultdict(dict)
    for record in records:
        for kind, spans in _phrases(record).values():
            # As the prompt shows it, which has no line breaks.
            pools[record.tree.language, kind][" ".join(record.text[spans[0].start : spans[0].end].split())] = None
    return {key: list(phrases) for key, phrases in pools.items()}


def _phrases(record: TreeRecord) -> dict[str, tuple[str, list[Span]]]:
    """The phrases of a tree that can be exchanged: what kind each is, and all its places in the text."""
    text = record.text
    uses: dict[str, set[str]] = defaultdict(set)
    for triple in record.tree.triples:
        uses[triple.object].add(triple.relation)
        if triple.subject == record.population:
            uses[triple.subject].add("population")
    found = {phrase: (kinds.pop(), find(text, phrase)) for phrase, kinds in uses.items() if len(kinds) == 1}
    others = {part for triple in record.tree.triples for part in (triple.subject, triple.object)} - set(found)
    places = [(phrase, span) for phrase, (_, spans) in found.items() for span in spans]
    places += [(phrase, span) for phrase in others for span in find(text, phrase)]
    crossed = {
        name
        for one, a in places
        for other, b in places
        if one != other and a.start < b.end and b.start < a.end
        for name in (one, other)
    }
    return {
        phrase: (kind, spans)
        for phrase, (kind, spans) in found.items()
        if spans and phrase not in crossed and all(_stands_alone(text, span) for span in spans)
    }


def _stands_alone(text: str, span: Span) -> bool:
    """Whether a phrase is not the beginning of a longer word, nor runs from the population into the passage."""
    after = text[span.end : span.end + 1]
    longer = after.isalnum() and after.isascii() and text[span.end - 1].isascii()
    return not longer and "@" not in text[span.start : span.end]


def _copy(record: TreeRecord, pools: _Pools, draw: random.Random, chance: float) -> TreeRecord:
    phrases = _phrases(record)
    for _ in range(_TRIES):
        chosen: dict[str, str] = {}
        for phrase, (kind, _spans) in phrases.items():
            if draw.random() < chance:
                pool = pools[record.tree.language, kind]
                for new in draw.sample(pool, min(len(pool), _TRIES)):
                    if new not in chosen.values() and not find(record.text, new):
                        chosen[phrase] = new
                        break
        made = _exchanged(record, chosen, phrases)
        if made is not None:
            return made
    return record


def _exchanged(record: TreeRecord, chosen: dict[str, str], phrases: dict[str, tuple[str, list[Span]]]) -> TreeRecord | None:
    """The record with phrases exchanged; None where something in it would no longer fit."""
    text = record.text
    for span, new in sorted(((span, new) for phrase, new in chosen.items() for span in phrases[phrase][1]), reverse=True):
        text = text[: span.start] + new + text[span.end :]
    nodes = [
        {**node.to_json(), "triples": [[chosen.get(s, s), r, chosen.get(o, o)] for s, r, o in node.triples]}
        for node in record.tree.nodes
    ]
    try:
        tree = DecisionTree.from_preorder(nodes)
    except GatewiseError:  # two triples have become one
        return None
    # A new phrase may hold another one: then it would no longer be clear which of the two is meant. Nor may one be lost.
    for phrase in {part for triple in record.tree.triples for part in (triple.subject, triple.object)}:
        places = find(text, chosen.get(phrase, phrase))
        if len(places) != len(find(record.text, phrase)):
            return None
        if phrase in chosen and not all(_stands_alone(text, place) for place in places):
            return None
    return replace(record, text=text, tree=tree)
