"""What the page shows of a review, as JSON."""

from collections.abc import Iterable, Sequence
from itertools import pairwise, takewhile
from typing import Any

from gatewise.checks import is_whole, printable
from gatewise_mdt.checking.changes import difference
from gatewise_mdt.documents.headings import lead_of, population_of
from gatewise_mdt.documents.language import has_han
from gatewise_mdt.evaluation.differences import differences
from gatewise_mdt.formats.page import pieces_of
from gatewise_mdt.formats.svg import drawing_of, main_subject
from gatewise_mdt.formats.views import FORMATS
from gatewise_mdt.formats.words import percent, words_for
from gatewise_mdt.records import CARRIED_KEY, DOUBTFUL
from gatewise_mdt.relations import RELATIONS
from gatewise_mdt.review.edits import drawable, empty_tree, fault_of
from gatewise_mdt.review.extracting import Extracting
from gatewise_mdt.review.files import Entry
from gatewise_mdt.review.passage import ADJUDICATED_KEY, Passage, Version, texts
from gatewise_mdt.review.session import Session
from gatewise_mdt.spans import locate_tree, part_of
from gatewise_mdt.tree import DecisionTree

_MOST_ENTRIES = 100  # of a history that a page is sent
_SHOWN, _FEW = 120, 16  # characters of a text that tell it from others in the list, and of what several begin with
_LONGEST = 5000  # characters that are compared with those of an older text; a passage has fewer


def session_json(session: Session, extracting: Extracting | None = None) -> dict[str, Any]:
    """The passages and how far each is; without their trees, as it is asked for often."""
    entries, passages = session.entries(), session.passages
    return {
        "passages": [
            {**_line(one, entries[one.number], extracting), "title": printable(title), "begins": printable(begins)}
            for one, (title, begins) in zip(passages, titles_of(passages), strict=True)
        ],
        "unsaved": session.unsaved,
        "out": str(session.files.out),
        "notes": session.notes,
        "formats": list(FORMATS),
    }


def _line(passage: Passage, entries: int, extracting: Extracting | None) -> dict[str, Any]:
    return {
        "number": passage.number,
        "state": passage.now.state,
        "reviewed": _reviewed(passage.now),
        "valid": passage.is_valid,
        "look": bool(passage.open_items) if passage.now.state == "approved" else _has_doubts(passage),
        "waiting": extracting is not None and extracting.is_waiting(passage),
        "error": extracting.fault(passage) if extracting else "",
        "least": _sure(passage.now.least),
        "unsaved": passage.is_unsaved,
        "version": passage.version,
        "entries": entries,
        "beside": passage.extractions if passage.beside is not None else 0,
    }


def _has_doubts(passage: Passage) -> bool:
    """Whether something stands on its page that is to be looked at before it is approved."""
    told = passage.now.warnings or texts(passage.more.get("notes")) or passage.open_items
    return bool(told) or passage.fault is not None or passage.beside is not None


def titles_of(passages: Sequence[Passage]) -> list[tuple[str, str]]:
    """What tells each passage from the others: the heading that it stands under, or else whom it is about, and its first words,
    without those that another one begins with too."""
    made = []
    for one in passages:
        population, at, rest = one.text.partition("@")
        about, said = (population, rest) if at else ("", one.text)
        headings = one.headings
        said = said.removeprefix(lead_of(population_of(headings)[1]))
        made.append((" ".join((headings[-1] if headings else about).split()), " ".join(said.split())))
    order = sorted(range(len(made)), key=lambda place: made[place])
    alike = [0] * len(made)
    for place, other in pairwise(order):
        if made[place][0] == made[other][0]:
            signs = zip(made[place][1], made[other][1], strict=False)
            shared = sum(1 for _ in takewhile(lambda two: two[0] == two[1], signs))
            alike[place], alike[other] = max(alike[place], shared), shared
    return [(title, _shortened(said, shared)) for (title, said), shared in zip(made, alike, strict=True)]


def _shortened(said: str, shared: int) -> str:
    """The beginning of a text; of what it shares with another one only the first words."""
    cut = max(said.rfind(" ", 0, shared + 1) + 1, 0) or shared
    few = said[: _FEW // 2] if has_han(said[:_FEW]) else said[:_FEW].rpartition(" ")[0]
    return (f"{few} … {said[cut:]}" if shared > 2 * _FEW and cut < len(said) else said)[:_SHOWN]


def found_in(passages: Iterable[Passage], words: str) -> list[int]:
    """The numbers of the passages that have all of the words: in text, headings, place, or the name of who reviewed them."""
    wanted = words.casefold().split()
    made = []
    for one in passages:
        told = [one.more.get("place"), *one.headings, (one.now.reviewed or {}).get("by")]
        said = "\n".join([one.text, *texts([part for part in told if part])]).casefold()
        made += [one.number] if all(word in said for word in wanted) else []
    return made


def passage_json(passage: Passage, entries: Sequence[Entry] = (), extracting: Extracting | None = None) -> dict[str, Any]:
    """A passage with its text in pieces, its tree, its drawing, what is wrong with it, and the end of its history."""
    tree = drawable(passage.now.nodes or empty_tree())
    words = words_for(passage.language)
    has_tree = passage.now.nodes is not None
    mark = passage.text.find("@")
    pieces = [(start, printable(piece), names if has_tree else []) for start, piece, names in pieces_of(passage.text, tree)]
    fault, beside = passage.fault, passage.beside
    other = None
    if beside is not None:  # to be looked at
        nodes = beside.nodes or empty_tree()
        differ = differences(tree, drawable(nodes)) if passage.is_valid and fault_of(nodes) is None else []
        other = {"number": passage.extractions, "warnings": list(beside.warnings), "made_with": beside.extraction}
        other |= {"of": beside.of, "drawing": _drawing(passage, beside, drawable(nodes))}
        other["differences"] = [{**one._asdict(), "a": printable(one.a), "b": printable(one.b)} for one in differ]
    return {
        **_line(passage, len(entries), extracting),
        "history": entries_json(entries[-_MOST_ENTRIES:]),
        "language": passage.language,
        "population": [[piece, names] for start, piece, names in pieces if start < mark],
        "passage": [[piece, names] for start, piece, names in pieces if start > mark],
        "about": main_subject(tree) or (passage.text[:mark].strip() if mark > 0 else ""),
        "place": ", ".join(str(part) for part in (passage.more.get("source"), passage.more.get("place")) if part),
        "headings": list(map(printable, passage.headings)),
        "notes": list(map(printable, texts(passage.more.get("notes")))),
        "carried": _carried(passage),
        "adjudicated": _adjudicated(passage),
        "nodes": _nodes(passage, tree) if has_tree else None,
        "drawing": _drawing(passage, passage.now, tree, focusable=True) if has_tree else "",
        "fault": None if fault is None else {"node": fault.node, "message": fault.message},
        "items": _items(passage),
        "warnings": list(map(printable, passage.now.warnings)),
        "made_with": passage.now.extraction,
        "extraction": other,
        "kept": passage.now.approved is not None,
        "undo": len(passage.past),
        "redo": len(passage.future),
        "relations": [chinese if words.language == "zh" else english for english, chinese in RELATIONS.items()],
    }


def source_json(session: Session, passage: Passage) -> dict[str, Any]:
    """The part of the document that a passage comes from; without a name where the review does not have the document."""
    original, offsets = session.original(passage), passage.more.get("offsets")
    if original is None or not (isinstance(offsets, list) and len(offsets) == 2 and all(map(is_whole, offsets))):
        return {"name": ""}
    if not original.has(passage.text, *offsets):  # read by another version of gatewise, which counts its text otherwise
        return {"name": ""}
    return original.around(*offsets)


def _items(passage: Passage) -> list[dict[str, Any]]:
    """What the tree seems to have lost of its text, with the places of the words as a browser counts them in what is shown, and
    who ticked it and why."""
    after = passage.text.partition("@")[2] if "@" in passage.text else passage.text
    before = len(after) - len(after.lstrip())

    def counted(place: int) -> int:
        return len(printable(after[: before + place]).encode("utf-16-le", "surrogatepass")) // 2

    made = []
    for item, tick in passage.looked_at:
        shown = {"words": printable(item.words), "sentence": printable(item.sentence), "is_change": item.is_change}
        place = None if item.start is None or item.end is None else [counted(item.start), counted(item.end)]
        said = tick and {name: printable(str(tick.get(name, ""))) for name in ("why", "by", "at")}
        made.append({**item.to_json(), **shown, "place": place, "tick": said})
    return made


def _reviewed(version: Version) -> dict[str, str] | None:
    """Who stands for the tree, since when and with what words, as far as a file says it in texts."""
    held = version.reviewed or {}
    return {name: held[name] for name in ("by", "at", "comment") if isinstance(held.get(name), str)} or None


def _carried(passage: Passage) -> dict[str, Any] | None:
    """Where a tree was carried over from, and how the text was changed since."""
    held = passage.more.get(CARRIED_KEY)
    if not isinstance(held, dict):
        return None
    old, reviewed = held.get("text"), held.get("reviewed")
    origin = [held.get("from"), held.get("place"), reviewed.get("by") if isinstance(reviewed, dict) else None]
    return {
        "from": ", ".join(texts([one for one in origin if one])),
        "difference": difference(old[:_LONGEST], passage.text[:_LONGEST]) if isinstance(old, str) else None,
    }


def _adjudicated(passage: Passage) -> dict[str, Any] | None:
    """Whose trees an adjudicator has to choose from, and whether they were the same."""
    held = passage.more.get(ADJUDICATED_KEY)
    names = texts(held.get("names")) if isinstance(held, dict) else []
    return {"names": names[:2], "agreed": held["agreed"] is True} if isinstance(held, dict) and names and "agreed" in held else None


def entries_json(entries: Iterable[Entry]) -> list[dict[str, Any]]:
    """What was done to a passage, by whom and when."""
    return [
        {name: getattr(one, name) for name in ("time", "reviewer", "action", "version", "comment", "window")} for one in entries
    ]


def _drawing(passage: Passage, version: Version, tree: DecisionTree, focusable: bool = False) -> str:
    sure = version.confidence or ()
    return drawing_of(tree, passage.text, focusable=focusable, language=passage.language, confidence=sure)


def _sure(confidence: float | None) -> dict[str, Any] | None:
    """How sure a model was of a node, as the page says it."""
    return None if confidence is None else {"percent": percent(confidence), "doubtful": confidence < DOUBTFUL}


def _nodes(passage: Passage, tree: DecisionTree) -> list[dict[str, Any]]:
    """The nodes with their children's positions; for each triple whether subject and object stand in the text or are but a part."""
    found = locate_tree(passage.text, tree)
    sure = passage.now.confidence or (None,) * len(found)
    made = []
    for node, rows, both, one in zip(passage.now.nodes or (), found, tree.children, sure, strict=True):
        triples = [
            {
                "parts": parts,
                "absent": [bool(part) and span is None for part, span in zip((parts[0], parts[2]), spans, strict=True)],
                "part_of": [
                    part_of(passage.text, part) if span is None else None
                    for part, span in zip((parts[0], parts[2]), spans, strict=True)
                ],
            }
            for parts, spans in zip(node["triples"], rows, strict=True)
        ]
        held = {"role": node["role"], "join": node["logical_rel"], "triples": triples, "children": both}
        made.append({**held, "confidence": _sure(one)})
    return made
