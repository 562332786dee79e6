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

// The request on the present tree; null where what it was about is not there, or there twice and elsewhere.
export function fitted({ action, body, of }, present) {
  if (action === "approve") return present.valid ? body : null;
  if (action !== "edit" || !of || !of.nodes || !present.nodes) return null;
  const { node, triple } = body.arguments;
  const places = [];
  present.nodes.forEach((one, i) => {
    if (triple === undefined) {
      if (same(inside(one), inside(of.nodes[node]))) places.push({ node: i });
    } else {
      const parts = of.nodes[node].triples[triple].parts;
      one.triples.forEach((held, k) => { if (same(held.parts, parts)) places.push({ node: i, triple: k }); });
    }
  });
  const place = places.find(one => one.node === node && one.triple === triple) || (places.length === 1 ? places[0] : null);
  return place && { ...body, arguments: { ...body.arguments, ...place } };
}
