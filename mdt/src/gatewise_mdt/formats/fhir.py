"""A decision tree as a FHIR R5 ``PlanDefinition`` (https://hl7.org/fhir/R5/plandefinition.html), checked by fhir.resources.

A condition becomes an action with two actions inside, of which exactly one applies: one under the condition, the other under its
negation. A decision becomes an action with one action a triple, a dose with its drug, all or one or more of which are to be taken.
Conditions are plain words (``text/plain``), so that nothing runs before a person has coded them. The status is ``draft``, the
source text goes along as documentation, each action names its phrases in it.
"""

import base64
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple
from uuid import NAMESPACE_URL, uuid5

from gatewise.errors import GatewiseError
from gatewise_mdt.formats.orders import choices_of, notes_of_choices, order_words, orders_of
from gatewise_mdt.formats.origin import approval_of, corrector_of, document_of, origin_of
from gatewise_mdt.formats.words import words_for
from gatewise_mdt.records import TreeRecord
from gatewise_mdt.spans import TripleSpans, locate_tree, part_of
from gatewise_mdt.tree import Node, Triple, joined_words

NOTICE = "Needs review by a clinician before any use. Drafted from the text by software; not medical advice."
_TYPE = "http://terminology.hl7.org/CodeSystem/plan-definition-type"
# What XML has no way to write, in which FHIR's resources come as well as in JSON.
_NO_XML = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")


class Located(NamedTuple):
    """Where the triples of a node stand in the text."""

    text: str
    spans: Mapping[Triple, TripleSpans]


def plan_of(record: TreeRecord) -> dict[str, Any]:
    """The ``PlanDefinition`` of a record, as JSON that fhir.resources has validated.

    Raises:
        GatewiseError: fhir.resources is not installed (the extra ``mdt``), or it refuses the resource, such as one of more than
            about 50 levels.
    """
    tree = record.tree
    about = clean(record.population) or (tree.triples[0].subject if tree.triples else "")
    plan: dict[str, Any] = {
        "resourceType": "PlanDefinition",
        "language": tree.language,
        "name": f"DecisionTree{record.number}",
        "title": clean(about) or "Decision tree",
        "type": {"coding": [{"system": _TYPE, "code": "clinical-protocol", "display": "Clinical Protocol"}]},
        "status": "draft",
        "experimental": True,
        "description": description_of(record, notes_of(record)),
        "purpose": "To show the decisions that the source text describes, for review.",
        "usage": NOTICE,
        "action": [_root_action(record)],
    }
    if about:
        plan["subjectCodeableConcept"] = {"text": clean(about)}
    return _validated("PlanDefinition", plan | people_of(record) | source_of(record))


def bundle_of(records: Sequence[TreeRecord]) -> dict[str, Any]:
    """The ``PlanDefinition`` of one record, or a ``Bundle`` with those of several.

    Raises:
        GatewiseError: as :func:`plan_of`.
    """
    plans = [plan_of(record) for record in records]
    if len(plans) == 1:
        return plans[0]
    entries = [
        {"fullUrl": f"urn:uuid:{uuid5(NAMESPACE_URL, f'{i}{json.dumps(plan)}')}", "resource": plan} for i, plan in enumerate(plans)
    ]
    return _validated("Bundle", {"resourceType": "Bundle", "type": "collection", "entry": entries})


def check_available() -> None:
    """Refuses early where the FHIR library is missing.

    Raises:
        GatewiseError: fhir.resources is not installed.
    """
    try:
        import fhir.resources
    except ImportError as error:
        raise GatewiseError("the format fhir needs fhir.resources, which is not installed: pip install gatewise-mdt") from error
    if not hasattr(fhir.resources, "get_fhir_model_class"):
        raise GatewiseError("the installed fhir.resources is too old for FHIR R5: pip install gatewise-mdt")


def _validated(kind: str, resource: dict[str, Any]) -> dict[str, Any]:
    check_available()
    import fhir.resources
    from pydantic import ValidationError

    try:
        # From version 7 on, the models at the top of the package are those of R5.
        fhir.resources.get_fhir_model_class(kind).model_validate(resource)
    except RecursionError:
        raise GatewiseError(
            f"the tree is too deep for a FHIR {kind}, which nests as its levels do: show it in another format"
        ) from None
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise GatewiseError(f"the tree makes no valid FHIR {kind}: {place}: {first['msg']}") from error
    return resource


def _root_action(record: TreeRecord) -> dict[str, Any]:
    """The actions of all nodes, each inside the one of its parent. Children are made first, so that no depth is too deep."""
    tree = record.tree
    located = located_of(record)
    made: list[dict[str, Any]] = [{} for _ in tree.nodes]
    for i in range(len(tree.nodes) - 1, -1, -1):
        node, both = tree.nodes[i], tree.children[i]
        made[i] = (
            _decision(node, i, located[i]) if both is None else _condition(node, i, located[i], [made[child] for child in both])
        )
    return made[0]


def _condition(node: Node, i: int, located: Located, children: list[dict[str, Any]]) -> dict[str, Any]:
    words = clean(joined_words(node))
    sides = []
    for side, child, expression in (("true", children[0], words), ("false", children[1], f"not ({words})")):
        sides.append(
            {
                "linkId": f"node-{i + 1}-{side}",
                "title": f"If {expression}" if side == "true" else "Otherwise",
                "condition": [
                    {
                        "kind": "applicability",
                        "expression": {"description": expression, "language": "text/plain", "expression": expression},
                    }
                ],
                "action": [child],
            }
        )
    return {
        "linkId": f"node-{i + 1}",
        "title": f"Condition: {words}",
        "groupingBehavior": "logical-group",
        "selectionBehavior": "exactly-one",
        **documentation_of(node.triples, located),
        "action": sides,
    }


def _decision(node: Node, i: int, located: Located) -> dict[str, Any]:
    link = f"node-{i + 1}"
    if node.is_empty:
        return {"linkId": link, "title": "No recommendation", "description": "The source text recommends nothing for this case."}
    orders, join = orders_of(node), node.logical_rel
    actions = [
        {
            "linkId": f"{link}-{number}",
            "title": clean(order_words(order, join)),
            **documentation_of((order.triple, *order.doses), located),
        }
        for number, order in enumerate(orders, start=1)
    ]
    group = grouped(actions, choices_of(orders, join), {"linkId": f"{link}-choice"})
    return {"linkId": link, "title": f"Decision: {clean(joined_words(node))}", **(group or {})}


def grouped(actions: Sequence[dict[str, Any]], choices: Sequence[bool], link: dict[str, Any]) -> dict[str, Any] | None:
    """The actions of a decision as one group: all are to be taken, but of the choices among them one or more; None for no action.

    Args:
        choices: for each action whether it is a choice.
        link: what names the group of the choices, where there are others beside it.
    """
    chosen = [action for action, choice in zip(actions, choices, strict=True) if choice]
    always = [action for action, choice in zip(actions, choices, strict=True) if not choice]
    if chosen and always:
        return group([{**link, **(group(chosen, "one-or-more") or {})}, *always], "all")
    return group(chosen or always, "one-or-more" if chosen else "all")


def group(actions: Sequence[dict[str, Any]], selection: str) -> dict[str, Any] | None:
    """Actions of which a FHIR selection is to be taken, such as "all"; None for no action."""
    return {"groupingBehavior": "logical-group", "selectionBehavior": selection, "action": list(actions)} if actions else None


def notes_of(record: TreeRecord) -> list[str]:
    """What the plan cannot say as the tree does, a sentence each."""
    return notes_of_choices(record.tree)


def description_of(record: TreeRecord, notes: Sequence[str] = ()) -> str:
    """What has to be known of a resource: the notice, the headings above the passage, warnings, and notes of the export."""
    return clean("\n\n".join([NOTICE, *said_of(record), *(f"Note of the export: {one}" for one in notes)]))


def said_of(record: TreeRecord) -> list[str]:
    """What a record says of its passage and its tree beside these."""
    headings = [f"Headings: {' › '.join(record.headings)}"] if record.headings else []
    notes = [f"Note of the reading: {one}" for one in record.notes]
    notes += [f"Origin: {phrase}" for phrase in origin_of(record, words_for("en"))]
    return [*headings, *notes, *(f"Warning of the extraction: {one}" for one in record.warnings)]


def source_of(record: TreeRecord) -> dict[str, Any]:
    """The text, and the document that it is from, each as a ``relatedArtifact`` of a resource; nothing where there is none.

    The document is cited with its SHA-256: the ``hash`` that an attachment of FHIR has is another one (SHA-1).
    """
    text, made = clean(record.text), []
    if text.strip():
        document = {"contentType": "text/plain; charset=utf-8", "data": encoded(text)}
        made.append({"type": "documentation", "label": "source", "display": "Source text", "citation": text, "document": document})
    if found := document_of(record, words_for("en")):
        source, where = map(clean, found)
        cited = f"{source}: {where}" if where else source
        made.append({"type": "derived-from", "label": "document", "display": source, "citation": cited})
    return {"relatedArtifact": made} if made else {}


def people_of(record: TreeRecord) -> dict[str, Any]:
    """Who approved the tree and when, or who corrected it, as elements of a resource. It stays a draft."""
    if (approval := approval_of(record)) is not None:
        by, day = approval
        return {"reviewer": [{"name": clean(by)}]} | ({"approvalDate": day} if day else {})
    by = clean(corrector_of(record))
    return {"editor": [{"name": by}]} if by else {}


def located_of(record: TreeRecord) -> list[Located]:
    """For each node where its triples stand in the text: at the places that the other formats name."""
    rows = zip(record.tree.nodes, locate_tree(record.text, record.tree), strict=True)
    return [Located(record.text, dict(zip(node.triples, row, strict=True))) for node, row in rows]


def documentation_of(triples: Sequence[Triple], located: Located) -> dict[str, Any]:
    """The phrases of the source text on which triples of a node rest, as the ``documentation`` of an action."""
    text, phrases = located.text, dict[str, None]()
    for triple in triples:
        spans = located.spans[triple]
        for name, part, span in (("subject", triple.subject, spans.subject), ("object", triple.object, spans.object)):
            if span is not None:
                quoted = text[span.start : span.end]
                phrases[f"source text, characters {span.start + 1} to {span.end}: {clean(quoted)}"] = None
            elif text.strip():
                whole = part_of(text, part)
                only = "not in the source text" if whole is None else f"in the source text only as part of '{clean(whole)}'"
                phrases[f"{name} {only}: {clean(part)}"] = None
    return {"documentation": [{"type": "documentation", "display": phrase} for phrase in phrases]} if phrases else {}


def encoded(text: str) -> str:
    """A text as the data of an attachment."""
    return base64.b64encode(text.encode()).decode()


def clean(text: str) -> str:
    """A text as FHIR and any other XML may hold it."""
    return _NO_XML.sub("\N{REPLACEMENT CHARACTER}", text)
