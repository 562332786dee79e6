// A change that was refused because somebody else had changed the passage: what it was, and what it is on the tree that is there now.

import { tr } from "./words.js";

const ACTIONS = { edit: tr("changed the tree"), begin: tr("began a tree"), undo: tr("took a change back"), redo: tr("made a change again"),
  approve: tr("approved it"), withdraw: tr("took the approval back"), extract: tr("had it extracted"), take: tr("took the other tree"),
  carry: tr("carried it over") };

// Who did what, and when.
export function saidOfOthers(entries) {
  return !entries.length ? tr("changed it") : entries.slice(-5).map(one => {
    const time = new Date(one.time).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" });
    const why = one.comment ? ` (${one.comment})` : "";
    return `${one.reviewer} ${ACTIONS[one.action] || tr("changed it")}, ${time}${why}`;
  }).join("; ");
}

// What somebody wanted, with the words that they had typed.
export function saidOf({ action, body }) {
  const { parts } = (body && body.arguments) || {};
  const words = parts ? parts.filter(Boolean).join(" · ") : "";
  if (action === "edit" && body.edit === "add_triple") return tr("a new triple");
  if (action === "edit" && words) return `“${words}”`;
  if (action === "edit") return body.edit === "remove_triple" ? tr("deleting a triple") : tr("a change of the tree");
  return action === "approve" ? tr("the approval") : tr("a change of the tree");
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
