// The editor of one node. It asks for edits and shows what comes back; what a valid tree is, the server knows.

import { element } from "./calls.js";
import { tr } from "./words.js";

// While fields are taken away for new ones, which is no leaving of them by the user.
let replacing = false;

// ask(name, arguments, node to show after it, control to focus, version that it is of) asks the server; phrase() is what is selected
// in the text.
export function showEditor(place, passage, at, { ask, phrase }) {
  const node = passage.nodes && passage.nodes[at];
  place.hidden = !node;
  if (!node) {
    place.replaceChildren();
    return;
  }
  const held = heldInput(place);
  const edit = (name, more, show, focus, version = passage.version) => ask(name, { node: at, ...more }, show, focus, version);
  const condition = node.role === "C";
  const parts = [
    element("h2", { text: tr("Node {number}", { number: at + 1 }) }, element("small", { text: ` ${whereIs(passage, at)}` })),
    node.confidence ? sure(node.confidence) : null,
    kinds(node, at, edit),
    node.triples.length > 1 ? joins(node, at, edit) : null,
    ...node.triples.map((triple, i) => card(passage, at, i, triple, edit, phrase)),
    element("button", {
      type: "button", id: "add-triple", text: tr("Add triple"),
      onclick: () => edit("add_triple", { parts: [passage.about, "", ""] }, at, `object-${node.triples.length}`),
    }),
    structure(passage, at, condition, edit),
  ];
  replacing = true;
  place.replaceChildren(...parts.filter(Boolean));
  replacing = false;
  giveBack(place, held, passage);
}

// How sure the model was of the node, which nobody has changed since.
function sure({ percent, doubtful }) {
  return element("div", { id: "node-sure", class: doubtful ? "warn" : null },
    element("p", { text: doubtful ? tr("Confidence {percent}%: doubtful, more likely wrong than right", { percent })
      : tr("Confidence {percent}%", { percent }) }),
    element("meter", { min: 0, max: 100, value: percent, "aria-hidden": "true" }),
    element("p", { class: "hint",
      text: tr("How likely the model's node is right, as measured on dev passages. It goes when you change the node.") }));
}

function whereIs(passage, at) {
  const parent = passage.nodes.findIndex(node => node.children && node.children.includes(at));
  if (parent < 0) return tr("the root");
  const yes = passage.nodes[parent].children[0] === at;
  return yes ? tr("if yes to node {number}", { number: parent + 1 }) : tr("if no to node {number}", { number: parent + 1 });
}

function choice(name, value, label, checked, onchange) {
  return element("label", {}, element("input", { type: "radio", name, id: `${name}-${value}`, value, checked, onchange }), label);
}

function kinds(node, at, edit) {
  const condition = node.role === "C";
  return element("fieldset", { class: "row" },
    element("legend", { text: tr("Kind") }),
    choice("kind", "C", tr("Condition"), condition, () => edit("to_condition", {}, at)),
    choice("kind", "D", tr("Decision"), !condition, () => edit("to_decision", {}, at)));
}

function joins(node, at, edit) {
  const words = node.role === "C" ? [tr("all of these (and)"), tr("any of these (or)")] : [tr("do all (and)"), tr("do any (or)")];
  return element("fieldset", { class: "row" },
    element("legend", { text: tr("Triples joined by") }),
    choice("join", "and", words[0], node.join === "and", () => edit("join", { join: "and" }, at)),
    choice("join", "or", words[1], node.join === "or", () => edit("join", { join: "or" }, at)));
}

function card(passage, at, i, triple, edit, phrase) {
  // Only the part that was changed: another may be on its way. What was typed is of the version that was there when it was begun.
  const send = (which, value, version) => {
    const parts = [null, null, null];
    parts[which] = value;
    if (value !== triple.parts[which]) edit("set_triple", { triple: i, parts }, at, null, version);
  };
  const known = passage.relations.includes(triple.parts[1]) ? passage.relations : [...passage.relations, triple.parts[1]];
  const relation = element("select", { id: `relation-${i}`, onchange: event => send(1, event.target.value) },
    ...known.map(name => element("option", { value: name, text: name, selected: name === triple.parts[1] })));
  return element("fieldset", { class: "triple card", "data-triple": `${at}.${i}` },
    element("legend", { text: tr("Triple {number}", { number: i + 1 }) }),
    part(`subject-${i}`, tr("Subject"), triple, 0, (value, version) => send(0, value, version), phrase, passage),
    element("div", { class: "part" }, element("label", { for: `relation-${i}`, text: tr("Relation") }), relation),
    part(`object-${i}`, tr("Object"), triple, 1, (value, version) => send(2, value, version), phrase, passage),
    element("button", {
      type: "button", class: "quiet delete", id: `remove-${i}`, text: tr("Delete triple"),
      "aria-label": tr("Delete triple {number}", { number: i + 1 }),
      onclick: () => edit("remove_triple", { triple: i }, at, "add-triple"),
    }));
}

function part(id, label, triple, which, send, phrase, passage) {
  const value = triple.parts[2 * which], absent = triple.absent[which], whole = triple.part_of[which];
  const input = element("textarea", {
    id, rows: 1, spellcheck: "false", "aria-describedby": absent ? `${id}-absent` : null, "aria-invalid": !value && "true",
    // Not "change": a field that was filled with what had been typed into the one before it would be left without one.
    onblur: event => {
      const { value, dataset, isConnected } = event.target;
      if (!replacing && isConnected && value !== dataset.given) send(value.trim(), Number(dataset.version));
    },
    onkeydown: event => {
      if (event.key !== "Enter" || event.isComposing) return;
      event.preventDefault();
      send(event.target.value.trim(), Number(event.target.dataset.version));
    },
  });
  input.value = value;
  Object.assign(input.dataset, { given: value, version: passage.version, passage: passage.number });
  const take = element("button", {
    type: "button", class: "take", id: `take-${id}`, text: tr("From text"), disabled: !phrase(),
    title: tr("Take the words selected in the text"),
    "aria-label": tr("{part}: take the words selected in the text", { part: label }),
    onmousedown: event => event.preventDefault(), // keeps the selection
    onclick: () => phrase() && send(phrase()),
  });
  return element("div", { class: absent ? "part absent" : "part" },
    element("label", { for: id, text: label }), take, input,
    absent && element("p", {
      class: "warn", id: `${id}-absent`,
      text: whole ? tr("! in the text only as part of “{whole}”", { whole }) : tr("! not in the text"),
    }));
}

function structure(passage, at, condition, edit) {
  const button = (id, text, name, more, node = at) =>
    element("button", { type: "button", class: "quiet", id, text, onclick: () => edit(name, more, node) });
  const empty = passage.nodes[at].role === "D" && !passage.nodes[at].triples.length;
  return element("details", { class: "structure", open: true },
    element("summary", { text: tr("Change the tree here") }),
    condition && button("swap", tr("Swap the yes and no branches"), "swap", {}),
    condition && button("keep-yes", tr("Drop this condition, keep its yes branch"), "keep_branch", { side: "true" }),
    condition && button("keep-no", tr("Drop this condition, keep its no branch"), "keep_branch", { side: "false" }),
    button("above-yes", tr("Put a condition above, this on its yes side"), "put_above", { side: "true" }),
    button("above-no", tr("Put a condition above, this on its no side"), "put_above", { side: "false" }),
    !empty && button("delete", condition ? tr("Delete this node and all below it") : tr("Empty this leaf"), "delete", {}));
}

// What somebody is typing while an answer comes in stays as it is, with what is selected in it.
function heldInput(place) {
  const active = document.activeElement;
  if (!active || !place.contains(active) || !active.id) return null;
  const typed = active.dataset.given !== undefined && active.value !== active.dataset.given;
  return { id: active.id, value: typed ? active.value : null, from: active.selectionStart, to: active.selectionEnd, of: { ...active.dataset } };
}

function giveBack(place, held, passage) {
  const input = held && place.querySelector(`#${CSS.escape(held.id)}`);
  if (!input || (held.of.passage && Number(held.of.passage) !== passage.number)) return;
  if (held.value !== null) {
    input.value = held.value;
    input.dataset.version = held.of.version;
  }
  input.focus({ preventScroll: true });
  if (Number.isInteger(held.from)) input.setSelectionRange(held.from, held.to);
}
