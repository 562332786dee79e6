// Runs exported trees on the engines of package.json: reads a JSON list of jobs from stdin, writes a list of what came out.
import cql from "cql-execution";
import { DmnModdle } from "dmn-moddle";
import { processActions, simpleResolver } from "encender";
import { evaluate, unaryTest } from "feelin";
import fs from "node:fs";
import { createRequire } from "node:module";
import { CqlTranslator, LibraryManager, ModelManager, createModelInfoProvider, stringAsSource } from "@cqframework/cql/cql-to-elm";
import { SystemModelInfoProvider } from "@cqframework/cql/cql";

const require = createRequire(import.meta.url);
// No package has the model of FHIR 5.0.0 for CQL. The libraries use nothing of it but Patient, so that of 4.0.1 stands for it.
const model = fs.readFileSync(require.resolve("cql-exec-fhir/lib/modelInfos/fhir-modelinfo-4.0.1.xml"), "utf8");

const models = new ModelManager(); // takes one version of a model: all jobs are of one release
models.modelInfoLoader.registerModelInfoProvider(new SystemModelInfoProvider());
models.modelInfoLoader.registerModelInfoProvider(createModelInfoProvider((name, system, version) =>
  name === "FHIR" ? stringAsSource(model.replaceAll('version="4.0.1"', `version="${version}"`)) : null));

function translated(text) {
  const translator = CqlTranslator.fromText(text, new LibraryManager(models));
  return { errors: [...translator.exceptions.asJsReadonlyArrayView()].map(one => one.message), elm: JSON.parse(translator.toJson()) };
}

// The names of a library's expressions with their values for a patient, from the CQL engine.
async function values(library, facts) {
  const patients = new cql.PatientSource([{ id: "one", resourceType: "Patient" }]);
  const parameters = Object.fromEntries(facts.map((value, i) => [`Fact${i + 1}`, value]));
  return (await new cql.Executor(library, null, parameters).exec(patients)).patientResults.one;
}

// The ids of the atomic actions that $apply leaves of a plan, and the resources that it makes of their definitions.
async function applied(bundle, plan, results) {
  const resolver = simpleResolver([...bundle.entry.map(one => one.resource), { resourceType: "Patient", id: "one" }]);
  const actions = JSON.parse(JSON.stringify(plan.action ?? []).replaceAll('"text/cql-identifier"', '"text/cql"')); // all that it knows
  const made = await processActions(actions, "Patient/one", resolver, {}, name => results[name]);
  const ids = [];
  const walk = several => several.forEach(one => (one.action ? walk(one.action) : ids.push(one.id)));
  walk(made.processedActions);
  return { ids: ids.sort(), made: made.otherResources.map(one => one.resourceType).sort() };
}

const found = answer => (answer && typeof answer === "object" && "value" in answer ? answer.value : answer);

// The outputs of the rules that fit, from the engine of FEEL.
function decided(decision, context) {
  const { input: columns = [], output: outputs, rule: rules } = decision.decisionLogic;
  const inputs = columns.map(column => found(evaluate(column.inputExpression.text, context)));
  const fits = rule => (rule.inputEntry ?? []).every((entry, i) => found(unaryTest(entry.text, { ...context, "?": inputs[i] })) === true);
  return rules.filter(fits).map(rule =>
    Object.fromEntries(outputs.map((output, i) => [output.name, found(evaluate(rule.outputEntry[i].text, context))])));
}

const results = [];
for (const job of JSON.parse(fs.readFileSync(0, "utf8"))) {
  const kept = kind => job.bundle.entry.map(one => one.resource).filter(one => one.resourceType === kind);
  const [plan] = kept("PlanDefinition");
  const [{ content: [{ data }] }] = kept("Library");
  const { errors, elm } = translated(Buffer.from(data, "base64").toString("utf8"));
  const { rootElement } = await new DmnModdle().fromXML(job.dmn);
  const decisions = rootElement.drgElement.filter(one => one.$type === "dmn:Decision"); // each after those that it requires
  const names = rootElement.drgElement.filter(one => one.$type === "dmn:InputData").map(one => one.name);
  const runs = [];
  for (const facts of job.combinations) {
    const known = await values(new cql.Library(elm), facts);
    const context = Object.fromEntries(names.map((name, i) => [name, facts[i]]));
    const made = {};
    for (const decision of decisions) {
      made[decision.name] = decided(decision, context);
      context[decision.name] = made[decision.name][0] ?? null;
    }
    runs.push({ cql: known, apply: await applied(job.bundle, plan, known), dmn: made });
  }
  results.push({ errors, runs });
}
console.log(JSON.stringify(results));
