// Who did what to a passage, when, and what they said of it. All of it is other people's text, and only ever shown as text.

import { element } from "./calls.js";
import { tr } from "./words.js";

const ACTIONS = { come: tr("brought it in"), add: tr("added it"), edit: tr("changed the tree"), begin: tr("began a tree"),
  undo: tr("took a change back"), redo: tr("made a change again"), approve: tr("approved it"), withdraw: tr("took the approval back"),
  extract: tr("had it extracted"), take: tr("took the other tree"), leave: tr("left the other tree"), carry: tr("carried it over"),
  comment: tr("commented"), text: tr("opened it with a changed text"), tick: tr("ticked an item"), untick: tr("took a tick back") };
const two = number => String(number).padStart(2, "0");

function hour(time) {
  const at = new Date(time);
  return `${two(at.getHours())}:${two(at.getMinutes())}`;
}

// Day and hour of this machine's time zone; what is no time stays as it is.
export function when(time) {
  const at = new Date(time);
  return isNaN(at) ? time : `${at.getFullYear()}-${two(at.getMonth() + 1)}-${two(at.getDate())} ${hour(time)}`;
}

// Who did what, and when: in a sentence.
export function saidOfOthers(entries) {
  return !entries.length ? tr("changed it") : entries.slice(-5).map(one => {
    const why = one.comment ? ` (${one.comment})` : "";
    return `${one.reviewer} ${ACTIONS[one.action] || tr("changed it")}, ${hour(one.time)}${why}`;
  }).join("; ");
}

// Who stands for the tree as it is, as far as it is known.
export function saidOfReviewed({ state, reviewed }) {
  const who = reviewed ? [reviewed.by, reviewed.at && when(reviewed.at)].filter(Boolean).join(", ") : "";
  if (!who) return "";
  const said = state === "approved" ? tr("approved by {who}", { who }) : tr("corrected by {who}", { who });
  return reviewed.comment ? `${said}: “${reviewed.comment}”` : said;
}

// The newest first. What one person did several times in a row, and without a word, is one line.
export function showHistory(list, passage) {
  const groups = [];
  for (const one of passage.history) {
    const last = groups.at(-1);
    const more = last && !one.comment && !last.comment && last.reviewer === one.reviewer && last.action === one.action;
    if (more) Object.assign(last, { times: last.times + 1, time: one.time });
    else groups.push({ ...one, times: 1 });
  }
  const left = passage.entries - passage.history.length;
  list.replaceChildren(...groups.reverse().map(one => element("li", {},
    element("b", { text: one.reviewer }), ` ${ACTIONS[one.action] || tr("changed it")}${one.times > 1 ? ` (×${one.times})` : ""} `,
    element("time", { datetime: one.time, text: when(one.time) }),
    one.comment && element("q", { text: one.comment }))),
  left > 0 ? element("li", { text: tr("{count} earlier ones are in the file of the history", { count: left }) }) : "");
}
