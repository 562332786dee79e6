"""A decision tree that a FHIR system runs, in R4 or R5, in the way of CPG-on-FHIR (https://hl7.org/fhir/uv/cpg/).

A Bundle holds three kinds of resources for each record:

- a ``Library`` with CQL: a Boolean parameter and a ``define`` for each fact (a triple of a condition), and for each condition one
  ``define`` that joins them and one that is its ``not``. It runs as it is, with the facts given as parameters; who codes a fact
  replaces the parameter in its ``define`` by a query.
- a ``PlanDefinition``: each branch of a condition is an action that applies under one of these two, by its name
  (``text/cql-identifier``). Branches are inside each other as in the tree. What recommends nothing has no action.
- an ``ActivityDefinition`` for each order of a decision: a drug with its doses, a measure, or a drug with ``doNotPerform``.

The resources name the profiles of FHIR itself (such as ``shareableplandefinition``), and those of R4 the profiles of CPG too, which
there are for R4 only: a recommendation, a computable library, and activities for a drug or a measure. Everything is a draft;
populations and drugs are words without codes.
"""

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, Literal

from gatewise_mdt.formats.orders import Order, choices_of, notes_of_choices, order_words, orders_of
from gatewise_mdt.formats.origin import DRAFT, before_use, clean, document_of, marked, reviewer_of, sentences_beside
from gatewise_mdt.formats.svg import main_subject, name_in_pathway
from gatewise_mdt.pathway import Link, Pathway
from gatewise_mdt.records import TreeRecord
from gatewise_mdt.spans import locate_tree, part_of
from gatewise_mdt.tree import DecisionTree, Node, Triple

Release = Literal["R4", "R5"]
_Facts = dict[tuple[str, str, str], tuple[int, str]]  # by the key of a fact its number and the identifier of its ``define``
BASE = "http://example.org/fhir"
"""What the canonical addresses begin with; who publishes the resources puts their own in its place."""
_VERSIONS = {"R4": "4.0.1", "R5": "5.0.0"}
_PROFILES = "http://hl7.org/fhir/StructureDefinition/"
_CPG = "http://hl7.org/fhir/uv/cpg/StructureDefinition/"
_PUBLISHER = "gatewise (a draft, not published)"
_COMMENT = """\
// Needs review by a clinician before any use. Drafted from a text by software; not medical advice.
// A fact is given as a parameter. To read it from a record, put a query in place of the parameter in its define.
"""


def bundle_of(records: Sequence[TreeRecord], release: Release) -> dict[str, Any]:
    """A ``Bundle`` of type collection with the resources of the records."""
    made = [_Resources(record, name, release) for record, name in zip(records, _names(records), strict=True)]
    return _bundle("trees", [resource for one in made for resource in one.made()], records)


def pathway_bundle_of(pathway: Pathway, release: Release) -> dict[str, Any]:
    """A ``Bundle`` with one plan and one library for a whole pathway, and an activity for each order."""
    return _bundle("pathway", _Pathway(pathway, release).made(), pathway.records)


def _bundle(what: str, resources: Sequence[dict[str, Any]], records: Sequence[TreeRecord]) -> dict[str, Any]:
    entries = [{"fullUrl": resource["url"], "resource": resource} for resource in resources]
    tag = {"system": f"{BASE}/CodeSystem/gatewise", "code": "DRAFT", "display": "DRAFT: not to be used"}
    meta = {"meta": {"tag": [tag]}} if any(record.draft for record in records) else {}
    return {"resourceType": "Bundle", "id": f"{what}-{_hash(json.dumps(entries))}", **meta, "type": "collection", "entry": entries}


def notes_of(record: TreeRecord) -> list[str]:
    """What the resources of a record cannot say as the tree does, a sentence each."""
    notes = []
    if all(node.is_empty for node in record.tree.nodes if not node.is_condition):
        notes.append("the tree recommends nothing, so the plan has no action")
    for number, node in enumerate(record.tree.nodes, start=1):
        if node.is_condition:
            continue
        for order in orders_of(node):
            if order.kind == "text":
                notes.append(f"node {number}: {str(order.triple)!r} {order.why_text}; it is an action with this text and no more")
            if node.logical_rel == "or" and len(order.doses) > 1:
                notes.append(
                    f"node {number}: the doses of {order.triple.object!r} are joined by 'or', as all of the node is; which of them "
                    "belong together the tree does not say"
                )
    return [*notes, *notes_of_choices(record.tree)]


def library_of(tree: DecisionTree, name: str, version: str, release: Release, draft: bool = False) -> str:
    """The CQL of a tree's conditions."""
    facts = _facts(tree.facts)
    return _cql(name, version, release, facts, _conditions(tree, facts), draft)


def _cql(name: str, version: str, release: Release, facts: _Facts, conditions: Sequence[str], draft: bool) -> str:
    comment = f"// {DRAFT}exported to be tried, not to be used.\n{_COMMENT}" if draft else _COMMENT
    lines = [f"library {name} version '{version}'", "", comment, f"using FHIR version '{_VERSIONS[release]}'", ""]
    lines += [f"parameter Fact{number} Boolean" for number, _ in facts.values()]
    lines += ["", "context Patient"]
    for number, words in facts.values():
        lines += ["", f"define {words}:", f"  Fact{number}"]
    return "\n".join([*lines, *conditions]) + "\n"


def _conditions(tree: DecisionTree, facts: _Facts, passage: str = "") -> list[str]:
    """The lines that define the conditions of a tree."""
    lines = []
    for number, node in enumerate(tree.nodes, start=1):
        if node.is_condition:
            joined = f"\n    {node.logical_rel} ".join(facts[triple.key][1] for triple in node.triples)
            lines += ["", f"define {_holds(number, True, passage)}:", f"  {joined}"]
            lines += ["", f"define {_holds(number, False, passage)}:", f"  not {_holds(number, True, passage)}"]
    return lines


def _facts(facts: Sequence[Triple]) -> _Facts:
    return {fact.key: (number, _quoted(f"Fact {number}: {fact}")) for number, fact in enumerate(facts, start=1)}


def _holds(number: int, side: bool, passage: str = "") -> str:
    return f"{passage}Node{number}Holds" if side else f"{passage}Node{number}DoesNotHold"


def _quoted(text: str) -> str:
    """A quoted identifier of CQL."""
    escaped = clean(text).replace("\\", "\\\\").replace('"', '\\"')
    return '"' + escaped.replace("\n", "\\n").replace("\r", "\\r").replace("\t", "\\t") + '"'


class _Resources:
    """The resources of one record.

    Args:
        passage: what its names begin with, where it is one of several in a plan.
    """

    def __init__(self, record: TreeRecord, name: str, release: Release, passage: str = "") -> None:
        self.record, self.tree, self.name, self.release, self.passage = record, record.tree, name, release, passage
        # A number of the tree's content: another tree of the same text is another version. Larger is not later.
        self.version = f"0.1.{int(_hash(json.dumps(self.tree.to_preorder()))[:7], 16)}"
        about = clean(record.population or main_subject(self.tree))
        self.title = about or "Decision tree"
        self.before_use = before_use(record)
        focus = {"system": "http://terminology.hl7.org/CodeSystem/usage-context-type", "code": "focus", "display": "Clinical Focus"}
        # With the headings: where the disease stands in one of them, the population alone would say too much ("adults").
        whom = " › ".join(filter(None, [*map(clean, record.headings), about]))
        self.context = {"useContext": [{"code": focus, "valueCodeableConcept": {"text": whom}}]} if about else {}
        # For each node where its triples stand in the text.
        rows = zip(self.tree.nodes, locate_tree(record.text, self.tree), strict=True)
        self.located = [dict(zip(node.triples, spans, strict=True)) for node, spans in rows]
        self.activities: list[dict[str, Any]] = []

    def made(self) -> list[dict[str, Any]]:
        return [self._plan(), self._library(), *self.activities]

    def _plan(self) -> dict[str, Any]:
        root = self._inside(0)
        actions = [] if root is None else [{**self._link("tree"), "title": self.title, **root}]
        more = self.context | _people([self.record]) | _source(self.record)
        return self._plan_of(actions, self._sentences(), more, self.tree.to_outline())

    def _plan_of(self, actions: list[Any], said: Sequence[str], more: dict[str, Any], outline: str) -> dict[str, Any]:
        profiles = ("shareableplandefinition", "computableplandefinition")
        # A recommendation of CPG has an action.
        cpg = "recommendationdefinition" if actions else "shareableplandefinition"
        return {
            **self._head("PlanDefinition", profiles, cpg, self.name, self.title),
            "type": _concept("plan-definition-type", "eca-rule"),
            "description": clean("\n\n".join([self.before_use, *said])),
            "purpose": "To run the decisions that the source text describes.",
            "usage": self.before_use,
            **more,
            "library": [self._canonical("Library", self.name)],
            "text": self._narrative(self.title, outline),
            **({"action": actions} if actions else {}),
        }

    def _sentences(self) -> list[str]:
        return [*sentences_beside(self.record), *(f"Note of the export: {note}" for note in notes_of(self.record))]

    def _library(self) -> dict[str, Any]:
        cql = library_of(self.tree, self.name, self.version, self.release, self.record.draft)
        return self._library_of(self.tree.facts, cql)

    def _library_of(self, facts: Sequence[Triple], cql: str) -> dict[str, Any]:
        parameters = [
            {"name": f"Fact{number}", "use": "in", "min": 0, "max": "1", "documentation": clean(str(fact)), "type": "boolean"}
            for number, fact in enumerate(facts, start=1)
        ]
        return {
            **self._head("Library", ("shareablelibrary",), "computablelibrary", self.name, f"Conditions: {self.title}"),
            "type": _concept("library-type", "logic-library"),
            "description": self.before_use,
            **({"parameter": parameters} if parameters else {}),
            "text": self._narrative(f"Conditions: {self.title}", cql),
            "content": [{"contentType": "text/cql", "data": _base64(cql)}],
        }

    def _inside(self, i: int) -> dict[str, Any] | None:
        """What is inside the action of a node and all below it; None where it recommends nothing."""
        node, both = self.tree.nodes[i], self.tree.children[i]
        if both is None:
            return self._decision(node, i + 1)
        sides = [self._branch(i + 1, node, side, self._inside(child)) for side, child in zip((True, False), both, strict=True)]
        return _group([one for one in sides if one is not None], "exactly-one" if all(sides) else "at-most-one")

    def _branch(self, number: int, node: Node, side: bool, inside: dict[str, Any] | None) -> dict[str, Any] | None:
        """What is to be done when a condition holds, or when it does not. It is None where that is nothing."""
        if inside is None:
            return None
        words = clean(node.words)
        words = words if side else f"not ({words})"
        condition = _applies(words, _holds(number, side, self.passage))
        return {
            **self._link(f"node-{number}-{'yes' if side else 'no'}"),
            "title": f"If {words}",
            **self._documentation(node.triples, number),
            **condition,
            **inside,
        }

    def _decision(self, node: Node, number: int) -> dict[str, Any] | None:
        """The actions of a decision as one group: all are to be taken, but of the choices among them one or more; None for none."""
        orders = orders_of(node)
        actions = [self._order(order, node.logical_rel, number, i) for i, order in enumerate(orders, start=1)]
        choices = choices_of(orders, node.logical_rel)
        chosen = [action for action, choice in zip(actions, choices, strict=True) if choice]
        always = [action for action, choice in zip(actions, choices, strict=True) if not choice]
        if chosen and always:
            return _group([{**self._link(f"node-{number}-choice"), **(_group(chosen, "one-or-more") or {})}, *always], "all")
        return _group(chosen or always, "one-or-more" if chosen else "all")

    def _order(self, order: Order, join: str, number: int, place: int) -> dict[str, Any]:
        title, link = clean(order_words(order, join)), f"node-{number}-order-{place}"
        action = {**self._link(link), "title": title, **self._documentation((order.triple, *order.doses), number)}
        if order.kind == "text":
            return {**action, "textEquivalent": title}
        name = f"{self.name}Node{number}Order{place}"
        kind = "ServiceRequest" if order.kind == "measure" else "MedicationRequest"
        activity = self._head("ActivityDefinition", ("shareableactivitydefinition",), f"{kind.lower()}activity", name, title)
        activity |= {"description": self.before_use, "text": self._narrative(title), **self.context, "kind": kind}
        if self.release == "R4":
            activity["profile"] = f"{_CPG}cpg-{kind.lower()}"
        activity |= {"intent": "proposal", "doNotPerform": order.kind == "avoid"}
        what = {"text": clean(order.triple.object)}
        if order.kind == "measure":
            activity["code"] = what
        else:
            activity["productCodeableConcept"] = what
            if order.doses:
                # Several dosages of one activity would all be taken; what joins them can only be said in words.
                activity["dosage"] = [{"text": clean(f" {join} ".join(dose.object for dose in order.doses))}]
        self.activities.append(activity)
        return {**action, "definitionCanonical": self._canonical("ActivityDefinition", name)}

    def _documentation(self, triples: Sequence[Triple], number: int) -> dict[str, Any]:
        """The phrases of the source text on which triples of a node rest, as the ``documentation`` of an action."""
        text, phrases = self.record.text, dict[str, None]()
        for triple in triples:
            spans = self.located[number - 1][triple]
            for name, part, span in (("subject", triple.subject, spans.subject), ("object", triple.object, spans.object)):
                if span is not None:
                    quoted = clean(text[span.start : span.end])
                    phrases[f"source text, characters {span.start + 1} to {span.end}: {quoted}"] = None
                elif text.strip():
                    whole = part_of(text, part)
                    only = "not in the source text" if whole is None else f"in the source text only as part of '{clean(whole)}'"
                    phrases[f"{name} {only}: {clean(part)}"] = None
        return {"documentation": [{"type": "documentation", "display": phrase} for phrase in phrases]} if phrases else {}

    def _link(self, link: str) -> dict[str, Any]:
        link = f"{self.passage}-{link}" if self.passage else link
        return {"id": link, "linkId": link} if self.release == "R5" else {"id": link}  # R4 has no linkId

    def _narrative(self, title: str, content: str = "") -> dict[str, str]:
        """What a person reads where a system shows no more than text."""
        pre = f"<pre>{escape(clean(content), quote=False)}</pre>" if content else ""
        div = f'<div xmlns="http://www.w3.org/1999/xhtml"><p>{escape(title, quote=False)}</p><p>{self.before_use}</p>{pre}</div>'
        return {"status": "generated", "div": div}

    def _canonical(self, kind: str, name: str) -> str:
        return f"{BASE}/{kind}/{name}|{self.version}"

    def _head(self, kind: str, profiles: Sequence[str], cpg: str, name: str, title: str) -> dict[str, Any]:
        """What all resources begin with.

        Args:
            profiles: those of FHIR.
            cpg: that of CPG.
        """
        urls, extensions = [_PROFILES + one for one in profiles], []
        if self.release == "R4":
            urls.append(f"{_CPG}cpg-{cpg}")
            said = [("Capability", "shareable"), ("Capability", "computable"), ("RepresentationLevel", "structured")]
            extensions = [{"url": f"{_CPG}cpg-knowledge{what}", "valueCode": code} for what, code in said]
        return {
            "resourceType": kind,
            "id": name,
            "meta": {"profile": urls},
            "language": self.tree.language,
            **({"extension": extensions} if extensions else {}),
            "url": f"{BASE}/{kind}/{name}",
            "version": self.version,
            "name": name,
            "title": marked(self.record, title),
            "status": "draft",
            "experimental": True,
            "publisher": _PUBLISHER,
        }


class _Pathway(_Resources):
    """The resources of a pathway: one plan and one library for all passages. In the plan each passage is an action, which applies
    where a link comes to it, or always."""

    def __init__(self, pathway: Pathway, release: Release) -> None:
        said = [record.text if record.text.strip() else json.dumps(record.tree.to_preorder()) for record in pathway.order]
        super().__init__(pathway.order[0], f"Pathway{_hash(json.dumps(said))}", release)
        content = [[record.tree.to_preorder() for record in pathway.order], [link[:3] for link in pathway.links]]
        self.version = f"0.1.{int(_hash(json.dumps(content))[:7], 16)}"
        self.title = f"Pathway: {clean(document_of(self.record)[0]) or self.title}"
        self.pathway, self.parts = pathway, []
        for record in pathway.order:
            part = _Resources(record, f"{self.name}Passage{record.number}", release, _passage(record.number))
            part.version = self.version
            self.parts.append(part)

    def _plan(self) -> dict[str, Any]:
        insides = {part.record.number: inside for part in self.parts if (inside := part._inside(0)) is not None}
        self.activities = [activity for part in self.parts for activity in part.activities]
        actions = [self._action(part, insides) for part in self.parts if part.record.number in insides]
        said = [f"Passage {part.record.number}: {one}" for part in self.parts for one in part._sentences()]
        outline = "\n".join(f"passage {part.record.number}:\n{part.tree.to_outline()}" for part in self.parts)
        return self._plan_of(actions, said, _people(self.pathway.records), outline)

    def _action(self, part: _Resources, insides: Mapping[int, dict[str, Any]]) -> dict[str, Any]:
        number = part.record.number
        action = {
            **self._link(part.passage),
            "title": clean(f"Passage {number}: {name_in_pathway(part.record)}"),
            **insides[number],
        }
        if artifacts := _source(part.record).get("relatedArtifact"):
            action["documentation"] = artifacts
        if links := self.pathway.into[number]:
            words = " or ".join(f"passage {link.start} comes to node {link.node + 1}" for link in links)
            action |= _applies(words, f"{part.passage}IsReached")
            before = dict.fromkeys(_passage(link.start) for link in links if link.start in insides)
            target = "actionId" if self.release == "R4" else "targetId"
            if before:
                action["relatedAction"] = [{target: one, "relationship": "after"} for one in before]
        return action

    def _library(self) -> dict[str, Any]:
        facts = _facts(self.pathway.facts)
        conditions = []
        for part in self.parts:
            conditions += _conditions(part.tree, facts, part.passage)
            if links := self.pathway.into[part.record.number]:
                ways = "\n    or ".join(f"({self._way(link)})" for link in links)
                conditions += ["", f"define {part.passage}IsReached:", f"  {ways}"]
        cql = _cql(self.name, self.version, self.release, facts, conditions, self.record.draft)
        return self._library_of(self.pathway.facts, cql)

    def _way(self, link: Link) -> str:
        """The conditions on the way to a decision that leads on, of all passages before it."""
        start = _passage(link.start)
        first = [f"{start}IsReached"] if self.pathway.into[link.start] else []
        way = self.pathway.numbered[link.start].tree.ways[link.node]
        return " and ".join([*first, *(_holds(at + 1, side, start) for at, side in way.items())]) or "true"


def _passage(number: int) -> str:
    return f"Passage{number}"


def _applies(words: str, name: str) -> dict[str, Any]:
    """That an action applies where the library says so."""
    expression = {"description": words, "language": "text/cql-identifier", "expression": name}
    return {"condition": [{"kind": "applicability", "expression": expression}]}


def _group(actions: Sequence[dict[str, Any]], selection: str) -> dict[str, Any] | None:
    """Actions of which a FHIR selection is to be taken, such as "all"; None for no action."""
    return {"groupingBehavior": "logical-group", "selectionBehavior": selection, "action": list(actions)} if actions else None


def _source(record: TreeRecord) -> dict[str, Any]:
    """The text, and the document that it is from, each as a ``relatedArtifact`` of a resource; nothing where there is none.

    The document is cited with its SHA-256: the ``hash`` that an attachment of FHIR has is another one (SHA-1).
    """
    text, made = clean(record.text), []
    if text.strip():
        name = record.more.get("passage_id")
        said = f"Source text, passage {clean(name)}" if isinstance(name, str) else "Source text"
        document = {"contentType": "text/plain; charset=utf-8", "data": _base64(text)}
        made.append({"type": "documentation", "label": "source", "display": said, "citation": text, "document": document})
    source, where = map(clean, document_of(record))
    if source:
        cited = f"{source}: {where}" if where else source
        made.append({"type": "derived-from", "label": "document", "display": source, "citation": cited})
    return {"relatedArtifact": made} if made else {}


def _people(records: Sequence[TreeRecord]) -> dict[str, Any]:
    """Who approved the trees and when the last was, and who corrected some, as elements of a resource. It stays a draft."""
    found = [tuple(map(clean, reviewer_of(record))) for record in records]
    people: dict[str, Any] = {}
    for role, state in (("reviewer", "approved"), ("editor", "corrected")):
        if names := dict.fromkeys(by for was, by, _ in found if was == state and by):
            people[role] = [{"name": name} for name in names]
    days = [day for was, by, day in found if was == "approved" and by and day]
    return people | ({"approvalDate": max(days)} if days and len(days) == len(records) else {})


def _base64(text: str) -> str:
    """A text as the data of an attachment."""
    return base64.b64encode(text.encode()).decode()


def _concept(system: str, code: str) -> dict[str, Any]:
    return {"coding": [{"system": f"http://terminology.hl7.org/CodeSystem/{system}", "code": code}]}


def _names(records: Sequence[TreeRecord]) -> list[str]:
    """A name for each record that its text decides, so that it stays when the tree is corrected; equal texts get a number."""
    names: list[str] = []
    for record in records:
        name = f"Tree{_hash(record.text if record.text.strip() else json.dumps(record.tree.to_preorder()))}"
        seen = sum(one == name or one.startswith(f"{name}No") for one in names)
        names.append(f"{name}No{seen + 1}" if seen else name)
    return names


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:12]
