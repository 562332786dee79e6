// A change that was refused because somebody else had changed the passage: what it was, and what it is on the tree that is there now.

import { tr } from "./words.js";

// What somebody wanted, with the words that they had typed, and their comment.
export function saidOf(wanted) {
  const { comment } = wanted.body;
  return comment ? `${what(wanted)} (${comment})` : what(wanted);
}

function what({ action, body }) {
  const { parts } = body.arguments || {};
  const words = parts ? parts.filter(Boolean).join(" · ") : "";
  if (action === "edit" && body.edit === "add_triple") return tr("a new triple");
  if (action === "edit" && words) return `“${words}”`;
  if (action === "edit") return body.edit === "remove_triple" ? tr("deleting a triple") : tr("a change of the tree");
  if (action === "approve") return body.approved ? tr("the approval") : tr("taking the approval back");
  return tr("a change of the tree");
}

// Whether two changes of a passage are one and the same, whatever was said of them.
export function alike(one, other) {
  const bare = ({ action, body: { comment, ...rest } }) => [action, rest];
  return same(bare(one), bare(other));
}

// Whether any of the changes can be made on the present tree. An approval is of a tree with all that was wanted before it.
export function makeable(wanted, present) {
  const missing = wanted.findIndex(one => !fitted(one, present));
  return wanted.some((one, i) => fitted(one, present) && (one.action !== "approve" || missing < 0 || i < missing));
}

const same = (one, other) => JSON.stringify(one) === JSON.stringify(other);
const inside = node => [node.role, node.join, node.triples.map(triple => triple.parts)];

// The request on the present tree; null where what it was about is not there. Of several that are alike it is the one in its old
// place only where no node can have moved, and none where they were several before.
export function fitted({ action, body, of }, present) {
  if (action === "approve") return present.valid ? body : null;
  if (action !== "edit" || !of || !of.nodes || !present.nodes) return null;
  const { node, triple } = body.arguments;
  const content = triple === undefined ? inside(of.nodes[node]) : of.nodes[node].triples[triple].parts;
  const find = nodes => nodes.flatMap((one, i) => triple === undefined ? (same(inside(one), content) ? [{ node: i }] : [])
    : one.triples.flatMap((held, k) => same(held.parts, content) ? [{ node: i, triple: k }] : []));
  const places = find(present.nodes), roles = nodes => nodes.map(one => one.role);
  const still = same(roles(of.nodes), roles(present.nodes)) && places.find(one => one.node === node && one.triple === triple);
  const place = still || (places.length === 1 && find(of.nodes).length === 1 ? places[0] : null);
  return place && { ...body, arguments: { ...body.arguments, ...place } };
}

// Which of a tree's nodes stand where after an edit, by their positions before it; null is a new one. As edits.py makes them.
function orderAfter(nodes, { edit, arguments: { node, side } }) {
  const end = at => nodes[at].children ? end(nodes[at].children[1]) : at + 1;
  const from = (first, last) => Array.from({ length: last - first }, (_, i) => first + i);
  const last = end(node), here = from(node, last), [yes, no] = nodes[node].children || [];
  const made = {
    join: () => here,
    set_triple: () => here,
    add_triple: () => here,
    remove_triple: () => here,
    to_condition: () => yes ? here : [node, null, null],
    to_decision: () => [node],
    delete: () => [yes ? null : node],
    swap: () => [node, ...from(no, last), ...from(yes, no)],
    keep_branch: () => side === "true" ? from(yes, no) : from(no, last),
    put_above: () => side === "true" ? [null, ...here, null] : [null, null, ...here],
  }[edit];
  return made ? [...from(0, node), ...made(), ...from(last, nodes.length)] : [];
}

// An edit of a tree with these nodes after another change of ours to it; null where its node or triple is gone, or where it is not
// certain to mean the same.
export function followed(body, action, made, nodes) {
  if (action === "approve" || action === "leave") return body;
  if (action !== "edit" || !nodes) return null;
  let { node, triple } = body.arguments;
  if (node === made.arguments.node) {
    if (made.edit === "remove_triple" && triple === made.arguments.triple) return null;
    if (made.edit === "remove_triple" && triple > made.arguments.triple) triple -= 1;
    if (made.edit === "delete" && triple !== undefined) return null;
    // Which branch was meant, the one that was seen on this side or the one that came there?
    if (made.edit === "swap" && body.edit === "keep_branch") return null;
    if (made.edit === "to_decision" && ["swap", "keep_branch"].includes(body.edit)) return null;
  }
  node = orderAfter(nodes, made).indexOf(node);
  return node < 0 ? null : { ...body, arguments: { ...body.arguments, node, ...(triple === undefined ? {} : { triple }) } };
}
