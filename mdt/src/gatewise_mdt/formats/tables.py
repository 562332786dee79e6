"""A decision tree as a decision table: DMN 1.3 (https://www.omg.org/spec/DMN/1.3) for engines, a workbook for WHO's DAKs.

A column is a condition of the tree, a row one way from the root to a decision. Conditions that a way does not pass are left open,
so that exactly one row applies (hit policy UNIQUE). In DMN a fact (a triple of a condition) is a Boolean input, ``tree_1_fact_2``,
and a column the expression that joins facts. Where a fact that matters is not known (null), no row applies.

Digital Adaptation Kits (DAKs) lay decision-support logic out as a workbook: a sheet COVER that lists the decisions, and for each a
table with its ID, business rule and trigger, then inputs, output, guidance for the health worker, annotations and references. Names
and places are those that WHO's own reader of such workbooks looks for (``dt_extractor.py`` in WorldHealthOrganization/smart-base).
"""

import io
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from typing import Any

from gatewise_mdt.formats.orders import choices_of, notes_of_choices, order_words, orders_of
from gatewise_mdt.formats.origin import BEFORE_USE, DRAFT, before_use, clean, document_of, marked, sentences_beside
from gatewise_mdt.formats.svg import name_of
from gatewise_mdt.formats.words import words_for
from gatewise_mdt.pathway import Link, Pathway
from gatewise_mdt.records import TreeRecord
from gatewise_mdt.spans import TripleSpans, locate_tree
from gatewise_mdt.tree import DecisionTree, Node, Triple

_Names = dict[tuple[str, str, str], str]  # by the key of a fact the name of its input
_DMN = "https://www.omg.org/spec/DMN/20191111/MODEL/"


def _conditions(tree: DecisionTree) -> list[int]:
    return [i for i, node in enumerate(tree.nodes) if node.is_condition]


def notes_of(record: TreeRecord) -> list[str]:
    """What a table cannot say as the tree does, a sentence each."""
    choices = [number for number, node in enumerate(record.tree.nodes, start=1) if not node.is_condition and _says_or(node)]
    if not choices:
        return notes_of_choices(record.tree)
    nodes = f"{'nodes' if len(choices) > 1 else 'node'} {', '.join(map(str, choices))}"
    said = (
        "a table has one text for a decision; that its parts are joined by 'or' is said in words, and no engine offers the choice"
    )
    return [f"{nodes}: {said}", *notes_of_choices(record.tree)]


def _says_or(node: Node) -> bool:
    return node.logical_rel == "or" and (len(_choices(node)[0]) > 1 or any(len(order.doses) > 1 for order in orders_of(node)))


def _recommendation(node: Node) -> str:
    """A decision on one line, each dose with its drug."""
    if node.is_empty:
        return "no recommendation"
    choices, always = _choices(node)
    return ", and ".join(filter(None, (" or ".join(choices), " and ".join(always))))


def _choices(node: Node) -> tuple[list[str], list[str]]:
    """The orders of a decision: those to choose from, and those that all hold."""
    choices: list[str] = []
    always: list[str] = []
    orders = orders_of(node)
    for order, is_choice in zip(orders, choices_of(orders, node.logical_rel), strict=True):
        (choices if is_choice else always).append(order_words(order, node.logical_rel))
    return choices, always


def _expression(node: Node, names: _Names) -> str:
    """A condition over the names of its facts, in FEEL (and as people read it)."""
    return f" {node.logical_rel} ".join(names[triple.key] for triple in node.triples)


def _names(facts: Sequence[Triple], prefix: str = "") -> _Names:
    return {fact.key: f"{prefix}fact_{number}" for number, fact in enumerate(facts, start=1)}


def _numbers(records: Sequence[TreeRecord]) -> list[int]:
    """The records' numbers, or where these are not all different, their places."""
    numbers = [record.number for record in records]
    return numbers if len(set(numbers)) == len(numbers) else list(range(1, len(numbers) + 1))


# ---- DMN ----


def dmn_of(records: Sequence[TreeRecord]) -> str:
    """DMN 1.3 with a decision for each record, its outputs being the leaf's ``node`` (from 1) and its ``recommendation``."""
    root = _definitions("trees", "Decision trees", records)
    for record, number in zip(records, _numbers(records), strict=True):
        names = _names(record.tree.facts, f"tree_{number}_")
        _add_inputs(root, [record], names)
        _add_decision(root, record, number, names)
    return _written(root)


def pathway_dmn_of(pathway: Pathway) -> str:
    """DMN 1.3 with a decision for each passage of a pathway, which requires those that lead to it.

    A fact of several passages is one input. A decision that links lead to has a first column for them, and no rule of it applies
    where none of them comes to it.
    """
    root = _definitions("pathway", "Pathway", pathway.records)
    names = _names(pathway.facts)
    _add_inputs(root, pathway.order, names)
    for record in pathway.order:
        own = {fact.key: names[fact.key] for fact in record.tree.facts}
        _add_decision(root, record, record.number, own, pathway.into[record.number])
    return _written(root)


def _definitions(kind: str, title: str, records: Sequence[TreeRecord]) -> ET.Element:
    ET.register_namespace("", _DMN)
    draft, said = _of_all(records)
    root = ET.Element(_tag("definitions"), {"id": kind, "name": f"{draft}{title}", "namespace": "http://example.org/dmn"})
    _text(root, "description", said)
    return root


def _written(root: ET.Element) -> str:
    ET.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ET.tostring(root, encoding="unicode") + "\n"


def _of_all(records: Sequence[TreeRecord]) -> tuple[str, str]:
    """The mark of a file in which there is a draft, and what stands at its beginning."""
    said = next((before_use(record) for record in records if record.draft), BEFORE_USE)
    return DRAFT if said != BEFORE_USE else "", said


def _add_inputs(root: ET.Element, records: Sequence[TreeRecord], names: _Names) -> None:
    """An input for each fact, which says where the fact does not stand in a text."""
    for key, name in names.items():
        held = [(record, fact) for record in records for fact in record.tree.facts if fact.key == key]
        said = [str(held[0][1]), *(note for record, fact in held for note in _absence_notes(record, (fact,)))]
        data = ET.SubElement(root, _tag("inputData"), {"id": name, "name": name})
        _text(data, "description", "\n".join(dict.fromkeys(said)))
        ET.SubElement(data, _tag("variable"), {"name": name, "typeRef": "boolean"})


def _add_decision(root: ET.Element, record: TreeRecord, number: int, names: _Names, links: Sequence[Link] = ()) -> None:
    """A decision for a record.

    Args:
        links: those that lead to it; without any it is always decided.
    """
    tree, name = record.tree, f"tree_{number}"
    prefix = f"{name}_"
    decision = ET.SubElement(root, _tag("decision"), {"id": name, "name": name, "label": clean(marked(record, name_of(record)))})
    about = [f"{name}: {said}" for name, said in (("Population", record.population), ("Passage", record.passage)) if said]
    document = ": ".join(filter(None, document_of(record)))
    about += [f"{name}: {said}" for name, said in (("Passage id", record.more.get("passage_id")), ("Document", document)) if said]
    _text(decision, "description", "\n\n".join([before_use(record), *_notes_and_origin(record), *about]))
    ET.SubElement(decision, _tag("variable"), {"name": name})
    required = [("requiredInput", one) for one in names.values()]
    required += [("requiredDecision", one) for one in dict.fromkeys(f"tree_{link.start}" for link in links)]
    for kind, one in required:
        needed = ET.SubElement(decision, _tag("informationRequirement"))
        ET.SubElement(needed, _tag(kind), {"href": f"#{one}"})
    conditions = _conditions(tree)
    made = ET.SubElement(decision, _tag("decisionTable"), {"id": f"{prefix}table", "hitPolicy": "UNIQUE"})
    asked = [(f"node_{i + 1}", tree.nodes[i].words, _expression(tree.nodes[i], names)) for i in conditions]
    if links:
        said = " or ".join(f"passage {link.start} comes to node {link.node + 1}" for link in links)
        asked.insert(0, ("reached", said, " or ".join(f"tree_{link.start}.node = {link.node + 1}" for link in links)))
    for key, label, text in asked:
        column = ET.SubElement(made, _tag("input"), {"id": f"{prefix}{key}", "label": clean(label)})
        expression = ET.SubElement(column, _tag("inputExpression"), {"typeRef": "boolean"})
        _text(expression, "text", text)
    for output, type_ in (("node", "number"), ("recommendation", "string")):
        ET.SubElement(made, _tag("output"), {"id": f"{prefix}{output}", "name": output, "typeRef": type_})
    for leaf, holds in tree.ways.items():
        row = ET.SubElement(made, _tag("rule"), {"id": f"{prefix}rule_{leaf + 1}"})
        if absent := _absence_notes(record, tree.nodes[leaf].triples):
            _text(row, "description", "\n".join(absent))
        answers = [*(["true"] if links else []), *(str(holds.get(i, "-")).lower() for i in conditions)]
        outputs = [str(leaf + 1), _feel(_recommendation(tree.nodes[leaf]))]
        for kind, values in (("input", answers), ("output", outputs)):
            for place, value in enumerate(values, start=1):
                entry = ET.SubElement(row, _tag(f"{kind}Entry"), {"id": f"{row.get('id')}_{kind}_{place}"})  # engines ask for ids
                _text(entry, "text", value)


def _notes_and_origin(record: TreeRecord) -> list[str]:
    notes = (f"Note of the export: {note}" for note in notes_of(record))
    return [*sentences_beside(record), *_absence_notes(record, record.tree.triples), *notes]


def _absence_notes(record: TreeRecord, triples: Sequence[Triple]) -> list[str]:
    """Which of some triples do not stand in the text and why, a line each, in the words of the other formats."""
    if not record.text.strip():
        return []
    whys = [words_for("en").why_absent(record.text, triple) for triple in triples]
    return [_line(f"{why}: {triple}") for why, triple in zip(whys, triples, strict=True) if why]


def _feel(text: str) -> str:
    """A string literal of FEEL, on one line."""
    return '"' + " ".join(text.split()).replace("\\", "\\\\").replace('"', '\\"') + '"'


def _tag(name: str) -> str:
    return f"{{{_DMN}}}{name}"


def _text(parent: ET.Element, name: str, text: str) -> None:
    ET.SubElement(parent, _tag(name)).text = clean(text)


# ---- WHO DAK ----

_COVER = (
    "Activity ID.Activity name",
    "Tab name",
    "Decision-support table (DT), contraindications table and scheduling-logic table (S) identification (ID)",
    "Table description",
    "Reference/source",
)
_HEADS = ("Output", "Guidance displayed to health worker", "Annotations", "Reference(s)")
_NO_TRIGGER = "To be filled in: the text does not say at which point of care this is decided."
_ONE_ROW = "Hit policy UNIQUE: exactly one of the rows below applies."


def dak_of(records: Sequence[TreeRecord]) -> bytes:
    """A workbook with a sheet that lists the decisions and says how to read them, one for each record, and one with all facts."""
    from openpyxl import Workbook

    book = Workbook()
    cover = book.active
    assert cover is not None
    cover.title = "COVER"
    draft, before = _of_all(records)
    _row(cover, 1, (before,))
    _row(cover, 3, _COVER, bold=True)
    facts = book.create_sheet("Facts")
    _row(facts, 1, (f"{draft}Fact", "Decision ID", "Subject", "Relation", "Object", "Type", "In the text"), bold=True)
    said = ["A row of a table is one way to an output. An input has a name and, below it, what it is made of; - does not matter."]
    said += ["The facts, which are TRUE or FALSE, are in the sheet Facts."]
    for record, number in zip(records, _numbers(records), strict=True):
        name, tab = f"tree_{number}", f"DT {number}"
        _fill(book.create_sheet(tab), record, name)
        about = _line(name_of(record))
        source = ", ".join(str(record.more[key]) for key in ("source", "place") if record.more.get(key))
        _row(cover, cover.max_row + 1, (f"{name} {about}", tab, name, about, source or "-"))
        for place, fact in enumerate(record.tree.facts, start=1):
            stands = (_line(words_for("en").why_absent(record.text, fact)) or "yes") if record.text.strip() else ""
            _row(facts, facts.max_row + 1, (f"fact_{place}", name, *fact, "Boolean", stands))
        said += [f"{name}: {one}" for one in _notes_and_origin(record)]
    for place, sentence in enumerate(said, start=cover.max_row + 2):  # the list ends with an empty row
        _row(cover, place, (sentence,))
    content = io.BytesIO()
    book.save(content)
    return content.getvalue()


def _fill(sheet: Any, record: TreeRecord, name: str) -> None:
    tree, conditions = record.tree, _conditions(record.tree)
    business = marked(record, f"{name_of(record)}: {record.passage}" if record.passage else name_of(record))
    for place, row in enumerate((("Decision ID", name), ("Business rule", business), ("Trigger", _NO_TRIGGER)), start=1):
        _row(sheet, place, row)
    names = _names(tree.facts)
    inputs = [(_line(node.words), _expression(node, names)) for node in (tree.nodes[i] for i in conditions)]
    inputs = inputs or [(_line(name_of(record)), "always TRUE: the text names no condition")]
    _row(sheet, 4, ["Inputs", *[""] * (len(inputs) - 1), *_HEADS], bold=True)
    # Without the annotation, that reader takes the names of a table's only input for one.
    absent = [_absence_notes(record, tree.nodes[i].triples) for i in conditions] or [[]]
    heads = ["; ".join([words, *lost]) for (words, _), lost in zip(inputs, absent, strict=True)]
    definitions = (f"{one}\n{facts}" for one, (_, facts) in zip(heads, inputs, strict=True))
    _row(sheet, 5, [*definitions, "", "", _ONE_ROW], bold=True)
    located = locate_tree(record.text, tree)
    for place, (leaf, holds) in enumerate(tree.ways.items(), start=6):
        answers = [holds.get(i) for i in conditions] or [None]
        cells = [_answer(*one, answer) for one, answer in zip(inputs, answers, strict=True)]
        _row(sheet, place, [*cells, *_outputs(leaf, record, located[leaf], name)])
    sheet.freeze_panes = "A6"


def _answer(words: str, facts: str, answer: bool | None) -> str:
    """An input of a row: a name of its own for each answer, and what it asks of the facts."""
    if answer is None:
        return "-"
    asked = f"({facts})" if " " in facts else facts
    return f"{words}\n{asked} = TRUE" if answer else f"Not: {words}\n{asked} = FALSE"


def _outputs(leaf: int, record: TreeRecord, located: Sequence[TripleSpans], name: str) -> tuple[str, str, str, str]:
    node = record.tree.nodes[leaf]
    choices, always = _choices(node)
    actions = "\n".join([*choices, *always])
    annotation = f"node {leaf + 1}"
    if node.logical_rel != "null":
        told = f"; any of the first {len(choices)} actions, and all of the others" if always else "; any of the actions"
        annotation += told if len(choices) > 1 or (choices and not always) else "; all of the actions"
    spans = [found.object for found in located if found.object]
    phrases = [f"characters {span.start + 1} to {span.end}: {record.text[span.start : span.end]}" for span in spans]
    phrases += _absence_notes(record, node.triples)
    return f"{_line(_recommendation(node))}\nnode {leaf + 1} of {name}", actions, annotation, "\n".join(phrases)


def _line(text: str) -> str:
    return " ".join(clean(text).split())


def _row(sheet: Any, place: int, values: Sequence[str], *, bold: bool = False) -> None:
    from openpyxl.styles import Alignment, Font

    for column, value in enumerate(values, start=1):
        cell = sheet.cell(place, column)
        if text := clean(value):
            cell.value = text
            cell.data_type = "s"  # whatever it begins with, a text is no formula
        cell.alignment = Alignment(wrap_text=True, vertical="top")
        if bold:
            cell.font = Font(bold=True)
        sheet.column_dimensions[cell.column_letter].width = 32
