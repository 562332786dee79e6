// The list of passages: which of them are shown, in what order, and which one comes next.

import { Failed, element, get } from "./calls.js";
import { saidOfReviewed } from "./history.js";
import { tr } from "./words.js";

const STATES = { empty: tr("no tree"), drafted: tr("to review"), corrected: tr("corrected"), approved: tr("approved") };
const KEPT = ["filter", "order"]; // for when the page is loaded again
const SHOWN = { all: () => true, open: line => line.state !== "approved", look: line => line.look,
  doubtful: line => line.least && line.least.doubtful && line.state !== "approved" };
const at = id => document.getElementById(id);
const keyOf = id => `gatewise-review-${id}`;

let seen = 0; // number of the passage that the list was scrolled to
let found = null; // numbers of the passages with the words that are looked for; null while nothing is
// The least confidence of each passage as the model's tree had it, so that nothing moves in the list while somebody corrects it.
const leasts = new Map();

export function stateOf(line, { progress }) {
  const now = progress && progress.passage === line.number;
  if (line.waiting) return [now ? tr("writing…") : tr("waiting"), "waiting"];
  if (line.error) return [tr("failed"), "failed"];
  if (line.state !== "empty" && !line.valid) return [tr("unfinished"), "failed"];
  return [STATES[line.state], line.state];
}

// A percentage, and in words that it is a low one.
function saidOfSure({ percent, doubtful }) {
  return doubtful ? tr("{percent}%, doubtful", { percent }) : `${percent}%`;
}

// The passages that are listed. The one that is open stays, whatever becomes of it.
export function listed(session, passage) {
  for (const { number, state, least } of session.passages) {
    if (state === "empty" || state === "drafted" || !leasts.has(number)) leasts.set(number, least ? least.percent : 101);
  }
  const open = passage && passage.number;
  const fits = SHOWN[at("filter").value];
  const lines = session.passages.filter(one => one.number === open || (fits(one) && (!found || found.has(one.number))));
  return at("order").value === "sure" ? lines.sort((one, other) => leasts.get(one.number) - leasts.get(other.number)) : lines;
}

// The number of the next passage after the open one that nobody approved, of those that are listed; from the first again at the end.
export function nextOpen(session, passage) {
  const lines = listed(session, passage), place = lines.findIndex(one => passage && one.number === passage.number);
  const after = [...lines.slice(place + 1), ...lines.slice(0, Math.max(place, 0))].find(SHOWN.open);
  return after && after.number;
}

function itemOf(line, session, passage, open) {
  const [word, kind] = stateOf(line, session);
  return element("li", {}, element("button", {
    type: "button", id: `open-${line.number}`, "aria-current": passage && passage.number === line.number && "true",
    onclick: () => open(line.number),
  },
  element("span", { class: "number", text: line.number }),
  element("span", { class: "about" }, line.title && element("b", { text: line.title }), element("span", { text: line.begins })),
  element("span", { class: "marks" }, element("span", { class: `chip ${kind}`, text: word }),
    line.unsaved && element("span", { class: "dot", title: tr("not saved"), text: "●" }),
    line.reviewed && line.reviewed.by && element("span", { class: "by", text: line.reviewed.by, title: saidOfReviewed(line) })),
  // Who approved a tree stands for all of its nodes.
  line.least && line.state !== "approved" && element("span", { class: line.least.doubtful ? "sure warn" : "sure",
    text: tr("least sure node: {sure}", { sure: saidOfSure(line.least) }) })));
}

export function showList(session, passage, open) {
  const count = session.passages.length, lines = listed(session, passage);
  at("finding").hidden = !count;
  at("order").hidden = at("filter").querySelector("[value=doubtful]").hidden = !session.passages.some(one => one.least);
  const done = session.passages.filter(one => one.state === "approved").length;
  const told = { done, count, listed: lines.length };
  at("counts").textContent = !count ? "" : lines.length === count ? tr("{done} of {count} approved", told)
    : tr("{done} of {count} approved, {listed} listed", told);
  at("next-open").disabled = done === count;
  at("none-found").hidden = !count || lines.some(one => !passage || one.number !== passage.number) || lines.length === count;
  const focused = document.activeElement && document.activeElement.id;
  at("passages").replaceChildren(...lines.map(line => itemOf(line, session, passage, open)));
  if (focused && focused.startsWith("open-") && at(focused)) at(focused).focus({ preventScroll: true });
  if (passage && passage.number !== seen) {
    seen = passage.number;
    const list = at("passages"), top = at(`open-${seen}`).offsetTop - list.offsetTop;
    if (top < list.scrollTop || top > list.scrollTop + 0.8 * list.clientHeight) list.scrollTop = top - list.clientHeight / 3;
  }
}

// Calls ``changed`` whenever other passages are to be listed, and ``failed`` with what the server could not answer.
export function watchList(changed, failed) {
  for (const id of KEPT) {
    const kept = sessionStorage.getItem(keyOf(id));
    if (at(id).querySelector(`[value="${kept}"]`)) at(id).value = kept;
    at(id).addEventListener("change", () => {
      sessionStorage.setItem(keyOf(id), at(id).value);
      changed();
    });
  }
  let asked = 0;
  at("search").placeholder = tr("Search");
  at("search").addEventListener("input", async () => {
    const mine = ++asked, words = at("search").value.trim();
    await new Promise(done => setTimeout(done, words ? 200 : 0));
    if (mine !== asked) return; // more was typed
    try {
      const numbers = words ? (await get("api/search", { words })).numbers : null;
      if (mine !== asked) return;
      found = numbers && new Set(numbers);
      changed();
    } catch (error) {
      if (!(error instanceof Failed)) throw error;
      failed(error);
    }
  });
}
