"""Writes mdt/tests/fhir_rules.json: what the published definitions of FHIR R4 and R5 say of the resources that gatewise makes.

Run it after ``npm install --ignore-scripts --prefix mdt/tests/formats/engines``; it reads the definitions from there.
"""

import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
MODULES = HERE / "node_modules"
RESOURCES = ("Bundle", "PlanDefinition", "Library", "ActivityDefinition")
TYPES = (
    "Meta",
    "Coding",
    "CodeableConcept",
    "UsageContext",
    "RelatedArtifact",
    "Attachment",
    "Expression",
    "ParameterDefinition",
    "Narrative",
    "ContactDetail",
)
PROFILES = ("shareableplandefinition", "computableplandefinition", "shareablelibrary", "shareableactivitydefinition")
PRIMITIVES = ("id", "uri", "url", "canonical", "code", "date", "string", "markdown", "base64Binary", "boolean", "integer")
MOST_CODES = 300
REGEX = "http://hl7.org/fhir/StructureDefinition/regex"


def read(release: str) -> list[dict[str, Any]]:
    if release == "R5":
        return [json.loads(file.read_text()) for file in sorted((MODULES / "hl7.fhir.r5.core").glob("*-*.json"))]
    folder = MODULES / "@medplum" / "definitions" / "dist" / "fhir" / "r4"
    names = ("profiles-resources", "profiles-others", "profiles-types", "valuesets")
    return [one["resource"] for name in names for one in json.loads((folder / f"{name}.json").read_text())["entry"]]


class Definitions:
    def __init__(self, release: str) -> None:
        self.known = {one["url"]: one for one in read(release) if "url" in one}

    def structure(self, name: str) -> dict[str, Any]:
        return self.known[f"http://hl7.org/fhir/StructureDefinition/{name}"]

    def codes(self, url: str) -> list[str] | None:
        """The codes of a value set, or None where the definitions do not list them all."""
        value_set = self.known.get(url.split("|")[0])
        found: list[str] = []
        for part in value_set["compose"]["include"] if value_set else [{"system": ""}]:
            if "concept" in part:
                found += [one["code"] for one in part["concept"]]
            elif "valueSet" in part:
                several = [self.codes(one) for one in part["valueSet"]]
                if None in several:
                    return None
                found += [code for codes in several for code in codes or []]
            elif (system := self.known.get(part["system"])) and system.get("content") == "complete" and "filter" not in part:
                found += walk(system["concept"])
            else:
                return None
        return sorted(set(found)) if len(found) <= MOST_CODES else None

    def rules(self) -> dict[str, Any]:
        elements: dict[str, Any] = {}
        for name in (*RESOURCES, *TYPES, "Dosage"):
            for one in self.structure(name)["snapshot"]["element"][1:]:
                types = [
                    type_["code"].rpartition(".")[2] if "System." in type_["code"] else type_["code"]
                    for type_ in one.get("type", [])
                ]
                rule: dict[str, Any] = {"min": one["min"], "max": one["max"], "types": types}
                if "contentReference" in one:
                    rule["like"] = one["contentReference"].rpartition("#")[2]
                binding = one.get("binding", {})
                if binding.get("strength") == "required" and (codes := self.codes(binding["valueSet"])) is not None:
                    rule["codes"] = codes
                elements[one["path"]] = rule
        profiles = {
            self.structure(name)["url"]: {
                one["path"]: [one.get("min", 0), one.get("max", "*")]
                for one in self.structure(name)["differential"]["element"][1:]
                if "sliceName" not in one and ("min" in one or "max" in one)
            }
            for name in PROFILES
        }
        return {"elements": elements, "profiles": profiles, "patterns": {name: self.pattern(name) for name in PRIMITIVES}}

    def pattern(self, name: str) -> str:
        value = next(one for one in self.structure(name)["snapshot"]["element"] if one["path"] == f"{name}.value")
        found = [extension["valueString"] for extension in value["type"][0].get("extension", []) if extension["url"] == REGEX]
        return found[0] if found else ""


def walk(concepts: list[dict[str, Any]]) -> list[str]:
    return [code for one in concepts for code in (one["code"], *walk(one.get("concept", [])))]


if __name__ == "__main__":
    made = {release: Definitions(release).rules() for release in ("R4", "R5")}
    lines = json.dumps(made, ensure_ascii=False, sort_keys=True)
    (HERE.parents[1] / "fhir_rules.json").write_text(lines + "\n", encoding="utf-8")
