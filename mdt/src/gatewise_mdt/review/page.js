// The page of a review: the list of passages, the text, the tree, and what the buttons and keys do.

import { Failed, WINDOW, base64, element, get, inOrder, post } from "./calls.js";
import { showEditor } from "./editor.js";
import { saidOfOthers, saidOfReviewed, showHistory } from "./history.js";
import { isOpen, showItems } from "./items.js";
import { listed, nextOpen, showList, stateOf, watchList } from "./list.js";
import { showSource } from "./source.js";
import { choose, language, tr, translatePage } from "./words.js";

const at = id => document.getElementById(id);
const AGAIN = 1000; // milliseconds between looks at a running extraction
const OTHERS = 3000; // milliseconds between looks at what others do

let session = null; // what /api/session gave
let passage = null; // what /api/passage gave
let node = 0; // position of the node in the editor
let phrase = ""; // words selected in the text
let fit = false; // show the whole tree, however small
let timer = 0;
let drawn = ""; // the session as the page shows it
let news = null; // what others did to the passage that is shown, as long as it is shown as it was before

// ---- asking ----

function say(text, bad = false) {
  at("said").textContent = text;
  at("said").classList.toggle("bad", bad);
  clearTimeout(say.timer);
  say.timer = setTimeout(() => { at("said").textContent = ""; }, bad ? 12000 : 5000);
}

async function failed(error) {
  if (!(error instanceof Failed)) throw error;
  say(error.message, true);
}

// Our own changes: what each was of, to which version it led, and whether nodes and triples kept their places in it.
const own = [];
const STILL = ["join", "set_triple", "add_triple"];
// What could not be made, as somebody else had changed the passage: kept to be read until it is dropped.
let unsent = [];

// The version that a change is of, which was seen at an older one, if all changes in between are our own and left it what it meant.
function forward(number, seen, relative) {
  let version = seen;
  for (const one of own) if (one.number === number && one.from === version && (one.still || relative)) version = one.to;
  return version;
}

// Comments that were begun, by the number of the passage: each goes with the next change of it.
const comments = new Map();

function keepComment() {
  comments.set(passage.number, at("comment").value);
  showComment();
}

function showComment() {
  const text = comments.get(passage.number) || "";
  if (at("comment").value !== text) at("comment").value = text;
  at("comment-go").disabled = !text.trim();
}

function takeComment(number) {
  const text = (comments.get(number) || "").trim();
  comments.delete(number);
  showComment();
  return text;
}

function giveCommentBack(number, text) {
  // Another one may have been begun meanwhile.
  if (text) comments.set(number, [text, comments.get(number)].filter(Boolean).join("\n"));
  if (passage) showComment();
}

// A change of the present passage as it was seen, after the ones asked for before it.
function change(action, body = {}, then = () => {}, seen = passage.version) {
  const { number } = passage, comment = action === "tick" ? "" : takeComment(number); // a tick has words of its own
  return inOrder(() => send(number, action, { ...body, comment }, then, seen)).catch(failed);
}

async function send(number, action, body, then, seen) {
  const version = forward(number, seen, action === "undo" || action === "redo"); // these are of whatever is there then
  try {
    const answer = await post(`api/${action}`, { number, version, ...body });
    own.push({ number, from: version, to: answer.passage.version,
      still: ["approve", "tick", "leave"].includes(action) || STILL.includes(body.edit) });
    session = answer.session;
    if (passage && passage.number === number) setPassage(answer.passage);
    then();
    showAll();
  } catch (error) {
    giveCommentBack(number, body.comment);
    if (!(error instanceof Failed) || error.status !== 409) throw error;
    await refused(number, action, body, error.content.since);
  }
}

// Somebody was faster: the present tree is shown, and above it what was not made, with the words that had been typed.
async function refused(number, action, body, since) {
  const words = ((body.arguments || {}).parts || []).filter(Boolean);
  const what = words.length ? `“${words.join(" · ")}”` : action === "approve"
    ? (body.approved ? tr("the approval") : tr("taking the approval back")) : tr("a change of the tree");
  const last = unsent.at(-1);
  // A field that is left sends its words once more.
  if (!last || last.number !== number || last.what !== what) unsent.push({ number, what, others: saidOfOthers(since) });
  for (const field of at("editor").querySelectorAll("textarea")) {
    if (words.includes(field.value.trim())) field.dataset.given = field.value; // they stand above the tree now
  }
  session = await get("api/session");
  if (passage && passage.number === number) await show(number);
  else showAll();
}

function setPassage(answer) {
  if (news && news.number === answer.number && news.version <= answer.version) news = null;
  passage = answer;
}

// An approval of somebody else is their word: it goes only when we say so.
function mayTakeBack(by) {
  return !by || by === session.you || confirm(tr("Take the approval of {name} back?", { name: by }));
}

function undo() {
  if (passage && passage.undo) change("undo");
}

function redo() {
  if (passage && passage.redo) change("redo");
}

function ask(name, more, show, focus, version) {
  return change("edit", { edit: name, arguments: more }, () => { node = show; }, version).then(() => {
    if (focus && at(focus)) at(focus).focus();
  });
}

async function show(number) {
  const answer = await get("api/passage", { number });
  if (!passage || passage.number !== number) {
    node = 0;
    phrase = "";
  }
  setPassage(answer);
  sessionStorage.setItem("gatewise-review-passage", number);
  showAll();
}

function open(number) {
  return inOrder(() => show(number)).catch(failed);
}

async function refresh() {
  session = await get("api/session");
  const line = passage && session.passages.find(one => one.number === passage.number);
  if (passage && !line) {
    comments.delete(passage.number);
    passage = null;
  }
  if (!passage && session.passages.length) {
    const last = Number(sessionStorage.getItem("gatewise-review-passage"));
    await show((session.passages.find(one => one.number === last) || session.passages[0]).number);
  } else if (line && ["version", "beside", "error", "waiting", "entries"].some(name => line[name] !== passage[name])) {
    await follow(line);
  } else if (!passage) {
    showAll();
  } else if (JSON.stringify(session) !== drawn) {
    // Not the text and the tree, in which something may be selected.
    showHead();
    showList(session, passage, open);
    showPlace();
  }
}

// The passage has changed. A tree is not exchanged under the eyes of who reads it: they are told what others did, and look then. Nor
// is it while they write in one of its fields, also if the new one is an extraction that they asked for.
async function follow(line) {
  if (!news || news.number !== line.number || news.version !== line.version) {
    const answer = await get("api/passage", { number: line.number });
    const writing = at("editor").querySelector("textarea:focus");
    const others = answer.history.filter(one => one.version > passage.version && (writing || one.window !== WINDOW));
    if (others.length && JSON.stringify(answer.nodes) !== JSON.stringify(passage.nodes)) {
      news = { number: line.number, version: answer.version, others };
    } else {
      setPassage(answer);
    }
    showAll();
  }
}

async function watch() {
  clearTimeout(timer);
  try {
    await inOrder(refresh);
  } catch (error) {
    if (!(error instanceof Failed)) throw error;
    at("trouble").hidden = false;
    at("trouble").textContent = error.message;
    if (error.status === 401 || error.status === 403) return;
  }
  if (!document.hidden) timer = setTimeout(watch, session && session.progress ? AGAIN : OTHERS);
}

// ---- showing ----

function showAll() {
  showHead();
  showList(session, passage, open);
  showText();
  showTree();
  showEditor(at("editor"), passage || {}, node, { ask, phrase: () => phrase });
}

function showHead() {
  drawn = JSON.stringify(session);
  const { progress } = session;
  at("progress").hidden = !progress;
  if (progress) {
    const values = { ...progress, number: progress.passage };
    const writing = tr("Extracting the tree of passage {number}, {seconds} s", values);
    const rest = progress.of > 1 ? ` (${tr("{at} of {of}", values)})` : "";
    const what = progress.cancelling ? tr("Stopping") : writing + rest;
    at("progress-text").textContent = progress.passage ? what : tr("Waiting for the model");
    at("progress-bar").max = progress.of;
    at("progress-bar").value = Math.max(0, progress.at - 1);
  }
  at("trouble").hidden = true;
  showUnsent();
  at("news").hidden = !news || !passage || news.number !== passage.number;
  if (news) at("news-text").textContent = tr("This is no longer the present tree: {what}.", { what: saidOfOthers(news.others) });
  at("you").textContent = tr("Reviewer: {name}", { name: session.you });
  at("notes").hidden = !session.notes.length;
  at("notes").replaceChildren(...session.notes.map(note => element("p", { text: note })));
  const open = session.passages.filter(one => one.state === "empty" && !one.waiting);
  at("extract-all").disabled = !session.extracts || !open.length;
  at("extract-all").title = session.extracts ? tr("All passages without a tree") : session.reason;
  at("save").textContent = session.unsaved ? tr("Save ({count})", { count: session.unsaved }) : tr("Save");
  at("save").title = tr("Ctrl+S: writes {path}", { path: session.out });
  at("export").disabled = !session.passages.some(one => one.valid);
}

function showUnsent() {
  at("conflict").hidden = !unsent.length;
  at("conflict-text").replaceChildren(...unsent.map(one => element("p", {
    text: tr("Passage {number} was changed while you were at work on it: {others}. Not made: {what}.", one) })));
}

function showText() {
  at("text").hidden = !passage;
  if (!passage) return;
  const marked = pieces => pieces.map(([text, names]) => names.length
    ? element("mark", { tabindex: 0, "data-of": names.join(" "), class: names.some(name => nodeOf(name) === node) ? "picked" : null,
      title: tr("node {numbers}", { numbers: [...new Set(names.map(name => nodeOf(name) + 1))].join(", ") }), text })
    : text);
  at("population-head").hidden = at("population").hidden = !passage.population.length;
  at("population").lang = at("passage").lang = passage.language;
  at("population").replaceChildren(...marked(passage.population));
  at("passage").replaceChildren(...marked(passage.passage));
  at("headings").textContent = passage.headings.join(" › ");
  at("place").textContent = passage.place;
  at("reading-notes").replaceChildren(...passage.notes.map(text => element("li", { text })));
  showSource(passage);
  showCarried();
  showAdjudicated();
  showHistory(at("history-list"), passage);
  showPhrase();
}

// Where the tree was carried over from; a change of the text is open until the tree was read against it.
function showCarried() {
  const { carried } = passage;
  at("carried").hidden = !carried;
  if (!carried) return;
  const changed = carried.difference !== null;
  const { from } = carried;
  at("carried-head").textContent = changed ? tr("Carried over from {from}; the text has changed since", { from })
    : tr("Carried over from {from}; the text is the same", { from });
  at("carried").open = changed && passage.state !== "approved";
  at("carried-difference").lang = passage.language;
  at("carried-difference").replaceChildren(...(carried.difference || []).map(([kind, text]) =>
    kind === "same" ? text : element(kind === "gone" ? "del" : "ins", { text })));
}

// Whose trees there were, of which an adjudicator chooses one or makes another.
function showAdjudicated() {
  const { adjudicated } = passage;
  at("adjudicated").hidden = !adjudicated;
  if (!adjudicated) return;
  const [one, other] = adjudicated.names;
  at("adjudicated").textContent = other === undefined ? tr("Only {one} had this passage.", { one })
    : adjudicated.agreed ? tr("{one} and {other} had the same tree.", { one, other })
      : tr("{one} and {other} had different trees; this one began as that of {one}.", { one, other });
}

function nodeOf(name) {
  return Number(name.split(".")[0]);
}

function showPhrase() {
  at("phrase").textContent = phrase ? tr("Selected: “{phrase}”", { phrase })
    : tr("Select words in the text to use them as a subject or an object.");
  at("phrase-add").hidden = !phrase || !passage || !passage.nodes;
  for (const button of document.querySelectorAll(".take")) button.disabled = !phrase;
}

function showTree() {
  at("nothing").hidden = Boolean(passage);
  at("tree-side").hidden = !passage;
  if (!passage) return;
  if (passage.nodes && node >= passage.nodes.length) node = 0;
  at("title").textContent = tr("Passage {number}", { number: passage.number });
  showPlace();
  showComment();
  at("reviewed").textContent = saidOfReviewed(passage);
  at("undo").disabled = !passage.undo;
  at("redo").disabled = !passage.redo;
  at("extract").disabled = !session.extracts || passage.waiting;
  at("extract").textContent = passage.nodes ? tr("Extract again") : tr("Extract");
  at("extract").title = session.extracts ? "" : session.reason;
  const approved = passage.state === "approved";
  const open = passage.items.filter(isOpen).length;
  at("approve").disabled = !passage.valid || (!approved && open > 0);
  at("approve").title = open ? tr("each item below has to be ticked first: {count} are open", { count: open }) : "";
  at("approve").textContent = approved ? tr("Approved ✓") : tr("Approve");
  at("approve").setAttribute("aria-pressed", String(approved));
  showValidity();
  showItems(at, passage, goTo, change);
  showSure();
  at("kept").hidden = !passage.kept;
  showBeside();
  at("warnings").hidden = !passage.warnings.length;
  at("warnings").replaceChildren(element("h3", { text: tr("Warnings of the extraction: the tree may be incomplete or wrong") }),
    element("ul", {}, ...passage.warnings.map(warning => element("li", { text: warning }))));
  if (passage.nodes) draw(); else noTree();
}

// What the tree's head has from the other passages.
function showPlace() {
  const lines = listed(session, passage), place = lines.findIndex(one => one.number === passage.number);
  at("previous").disabled = place <= 0;
  at("next").disabled = place === lines.length - 1;
  const [word, kind] = stateOf(passage, session);
  at("state").textContent = word;
  at("state").className = `chip ${kind}`;
}

function showBeside() {
  const found = passage.extraction;
  at("beside").hidden = !found;
  at("beside-tree").replaceChildren();
  if (!found) return;
  if (found.of) at("beside").open = true; // an adjudicator is here for what differs
  at("beside-head").textContent =
    found.of ? tr("The tree of {name} lies beside this one", { name: found.of }) : tr("Another tree lies beside this one");
  const drawing = new DOMParser().parseFromString(found.drawing, "image/svg+xml").documentElement;
  at("beside-tree").append(element("ul", { class: "differences" }, ...found.differences.map(one => difference(one, found.of))),
    document.importNode(drawing, true),
    element("ul", {}, ...found.warnings.map(warning => element("li", { text: warning }))));
}

// What this tree and the other one say differently; the server has put the most dangerous first.
function difference({ kind, what, a, b }, of) {
  return element("li", {}, element("strong", { text: tr(kind) + (what ? ` (${tr(what)})` : "") }),
    ...[[tr("here"), a], [of || tr("beside"), b]].filter(([, text]) => text)
      .map(([name, text]) => element("div", { text: `${name}: ${text}`, lang: passage.language })));
}

function goTo(i) {
  return element("button", {
    type: "button", class: "link", text: tr("node {numbers}", { numbers: i + 1 }), onclick: () => select(i, true),
  });
}

// The nodes to begin with: those that are doubtful, else the least sure one. Who approved the tree stands for all of them.
function showSure() {
  const known = (passage.nodes || []).map((one, i) => ({ ...one.confidence, i })).filter(one => "percent" in one);
  const sorted = known.sort((one, other) => one.percent - other.percent);
  at("sure").hidden = !sorted.length || passage.state === "approved";
  if (at("sure").hidden) return;
  const doubtful = sorted.filter(one => one.doubtful);
  at("sure").classList.toggle("warn", doubtful.length > 0);
  at("sure").replaceChildren(
    doubtful.length ? tr("Doubtful, more likely wrong than right: ") : tr("Least sure of the nodes: "),
    ...(doubtful.length ? doubtful : sorted.slice(0, 1)).flatMap(({ i, percent }, k) => [k ? ", " : "", goTo(i), ` (${percent}%)`]));
}

function showValidity() {
  const place = at("validity");
  place.className = "";
  if (!passage.nodes) {
    place.replaceChildren();
    return;
  }
  const { fault } = passage;
  const absent = passage.nodes.flatMap((one, i) => one.triples.some(triple => triple.absent.includes(true)) ? [i] : []);
  if (fault) {
    place.className = "bad";
    place.replaceChildren(tr("Not a valid tree yet: "), ...(fault.node === null ? [] : [goTo(fault.node), ": "]), fault.message);
  } else if (absent.length) {
    place.className = "warn";
    const places = absent.flatMap((i, k) => [k ? ", " : "", goTo(i)]);
    place.replaceChildren(tr("A valid tree, but some phrases are not in the text: "), ...places);
  } else if (passage.items.some(isOpen)) {
    place.className = "warn";
    place.replaceChildren(passage.state === "approved"
      ? tr("Approved, but with open items: systems that run trees do not get it until each is ticked below.")
      : tr("A valid tree, but look below at what it may have left out of the text or turned round."));
  } else {
    place.className = "good";
    place.replaceChildren(passage.items.some(item => item.tick)
      ? tr("A valid tree; every phrase is in the text, and every item is ticked.")
      : tr("A valid tree; every phrase is in the text, and the rules find nothing left out."));
  }
}

function draw() {
  const old = at("tree").querySelector(".node:focus");
  const scrolled = [at("tree").scrollLeft, at("tree").scrollTop];
  const drawing = document.importNode(new DOMParser().parseFromString(passage.drawing, "image/svg+xml").documentElement, true);
  // Shrinks to the room there is, as far as it stays readable.
  drawing.style.minWidth = fit ? "0" : `${Math.round(0.72 * drawing.width.baseVal.value)}px`;
  at("tree").classList.toggle("fit", fit);
  at("fit").setAttribute("aria-pressed", String(fit));
  at("tree").replaceChildren(drawing);
  [at("tree").scrollLeft, at("tree").scrollTop] = scrolled;
  for (const box of drawing.querySelectorAll(".node")) {
    const position = Number(box.dataset.node);
    box.classList.toggle("selected", position === node);
    box.setAttribute("aria-pressed", String(position === node));
    if (passage.fault && passage.fault.node === position) box.classList.add("wrong");
  }
  if (old) focusNode();
}

function noTree() {
  const why = passage.error || (passage.waiting ? tr("The tree is being written.") : tr("This passage has no tree yet."));
  at("tree").replaceChildren(element("div", { class: passage.error ? "welcome bad" : "welcome" },
    element("p", { text: why }),
    !session.extracts && element("p", { class: "hint", text: session.reason }),
    element("button", { type: "button", id: "begin", text: tr("Begin with an empty tree"), onclick: () => change("begin") })));
}

function focusNode() {
  const box = at("tree").querySelector(`[data-node="${node}"]`);
  if (box) box.focus({ preventScroll: true });
}

function select(position, focus = false) {
  node = position;
  showText();
  showTree();
  showEditor(at("editor"), passage, node, { ask, phrase: () => phrase });
  if (focus) focusNode();
  const box = at("tree").querySelector(`[data-node="${node}"]`);
  if (box) box.scrollIntoView({ block: "nearest", inline: "nearest" });
  at("editor").scrollTop = 0;
}

// ---- buttons ----

function onClick(id, work) {
  at(id).addEventListener("click", () => work());
}

function go(by) {
  const lines = listed(session, passage), place = lines.findIndex(one => one.number === passage.number) + by;
  if (lines[place]) open(lines[place].number);
}

function goToNextOpen() {
  const number = nextOpen(session, passage);
  if (number) open(number);
  else say(tr("No other passage that is listed waits for an approval."));
}

async function act(path, body, then) {
  try {
    const answer = await inOrder(() => post(path, body));
    session = answer.session;
    await then(answer);
    await watch();
  } catch (error) {
    await failed(error);
  }
}

const save = () => act("api/save", {}, ({ saved }) => {
  const values = { path: saved.path, count: saved.records, numbers: saved.unlike.join(", ") };
  const what = saved.records ? tr("Saved: {path}, trees: {count}", values)
    : tr("Nothing is corrected or approved yet, so {path} has no trees", values);
  say(what + (saved.unlike.length
    ? tr("; not as it stands, because unfinished, or not approved or corrected since it was saved: passage {numbers}", values) : ""));
});

onClick("previous", () => go(-1));
onClick("next", () => go(1));
onClick("next-open", goToNextOpen);
onClick("undo", undo);
onClick("redo", redo);
onClick("approve", () => {
  const approved = passage.state !== "approved";
  // It may have become approved under the pointer.
  if (approved || mayTakeBack(passage.reviewed && passage.reviewed.by)) change("approve", { approved });
});
onClick("beside-take", () => {
  const reviewed = passage.state === "corrected" || passage.state === "approved";
  if (reviewed && !confirm(tr("Put it in the place of a tree that a person corrected or approved?"))) return;
  change("take", { extraction: passage.extraction.number, replaced: reviewed }, () => { node = 0; });
});
onClick("beside-leave", () => change("leave", { extraction: passage.extraction.number }));
onClick("conflict-drop", () => {
  unsent = [];
  showUnsent();
});
onClick("news-look", () => open(passage.number));
at("comment").placeholder = tr("goes with your next approval or change");
at("comment").addEventListener("input", keepComment);
onClick("comment-go", () => {
  const { number } = passage;
  const comment = takeComment(number);
  return inOrder(async () => {
    try {
      const answer = await post("api/comment", { number, comment });
      session = answer.session;
      if (passage && passage.number === number && passage.version === answer.passage.version) setPassage(answer.passage);
    } catch (error) {
      giveCommentBack(number, comment);
      throw error;
    }
    showAll();
  }).catch(failed);
});
onClick("save", save);
onClick("fit", () => {
  fit = !fit;
  showTree();
});
onClick("extract", () => act("api/extract", { passages: [[passage.number, passage.version]] }, () => {
  if (passage.state === "corrected" || passage.state === "approved") say(tr("The extraction will lie beside your tree."));
}));
onClick("extract-all", () => act("api/extract",
  { passages: session.passages.filter(one => one.state === "empty").map(one => [one.number, one.version]) }, () => {}));
onClick("cancel", () => act("api/cancel", {}, () => say(tr("Cancelled; trees that are done stay."))));
onClick("phrase-add", () => ask("add_triple", { node, parts: [passage.about, "", phrase] }, node,
  `object-${passage.nodes[node].triples.length}`, passage.version));
at("phrase-add").addEventListener("mousedown", event => event.preventDefault());

onClick("add", () => {
  at("add-error").textContent = "";
  at("add-dialog").showModal();
});
onClick("add-go", async () => {
  const population = at("add-population").value;
  const file = at("add-file").files[0];
  try {
    const answer = file
      ? await post("api/load", { name: file.name, content: await base64(file), population })
      : await post("api/paste", { text: at("add-text").value, population });
    at("add-dialog").close();
    for (const field of ["add-text", "add-file", "add-population"]) at(field).value = "";
    session = answer.session;
    const left = answer.faults.map(fault => ` ${fault}.`).join("");
    say(tr("Passages added: {count}.", { count: answer.added.length }) + left, Boolean(left));
    await open(answer.added[0]);
  } catch (error) {
    if (!(error instanceof Failed)) throw error;
    at("add-error").textContent = error.message;
  }
});
onClick("export", () => {
  at("export-error").textContent = "";
  at("export-which").querySelector("[value=this]").disabled = !passage || !passage.valid;
  at("export-format").replaceChildren(...session.formats.map(name => element("option", { value: name, text: name })));
  at("export-dialog").showModal();
});
onClick("export-go", async () => {
  const which = at("export-which").value;
  try {
    const body = { format: at("export-format").value, which: which === "this" ? passage.number : which,
      drafts: at("export-drafts").checked };
    const { file } = await post("api/export", body);
    const address = URL.createObjectURL(new Blob([file.content], { type: "text/plain;charset=utf-8" }));
    element("a", { href: address, download: file.name }).click();
    setTimeout(() => URL.revokeObjectURL(address), 10000);
    at("export-dialog").close();
  } catch (error) {
    if (!(error instanceof Failed)) throw error;
    at("export-error").textContent = error.message;
  }
});
for (const button of document.querySelectorAll("[data-close]")) button.addEventListener("click", () => button.closest("dialog").close());
for (const form of document.querySelectorAll("form")) form.addEventListener("submit", event => event.preventDefault());

// ---- tree, text and keys ----

at("work").addEventListener("click", event => {
  const box = event.target.closest("#tree .node");
  const mark = event.target.closest("mark");
  if (box) select(Number(box.dataset.node), true);
  else if (mark && getSelection().isCollapsed) select(nodeOf(mark.dataset.of.split(" ")[0]));
});

at("tree").addEventListener("keydown", event => {
  const box = event.target.closest(".node");
  if (!box) return;
  const here = Number(box.dataset.node);
  const children = passage.nodes[here].children;
  const above = passage.nodes.findIndex(one => one.children && one.children.includes(here));
  const way = { ArrowUp: above, ArrowLeft: children ? children[0] : -1, ArrowRight: children ? children[1] : -1,
    ArrowDown: children ? children[0] : -1, Enter: here, " ": here }[event.key];
  if (way === undefined) return;
  event.preventDefault();
  if (way >= 0) select(way, true);
});

document.addEventListener("selectionchange", () => {
  const chosen = getSelection();
  if (!chosen.rangeCount || chosen.isCollapsed) return;
  const home = chosen.getRangeAt(0).commonAncestorContainer;
  const block = (home.nodeType === Node.TEXT_NODE ? home.parentElement : home).closest("#passage,#population");
  if (!block || !chosen.toString().trim()) return;
  phrase = chosen.toString().trim().replace(/\s+/g, " ");
  showPhrase();
});

document.addEventListener("keydown", event => {
  if (event.ctrlKey || event.metaKey || event.altKey || document.querySelector("dialog[open]")) return;
  if (event.key.toLowerCase() === "n" && passage && !event.target.closest("textarea,input:not([type=radio]),select")) goToNextOpen();
});

document.addEventListener("keydown", event => {
  if (!(event.ctrlKey || event.metaKey) || event.altKey || document.querySelector("dialog[open]")) return;
  const key = event.key.toLowerCase();
  if (key === "s") {
    event.preventDefault();
    if (document.activeElement) document.activeElement.blur(); // what is being typed belongs to what is saved
    save();
  } else if (passage && !event.target.closest("textarea,input:not([type=radio])") && (key === "z" || key === "y")) {
    event.preventDefault();
    if (key === "y" || event.shiftKey) redo(); else undo();
  }
});

window.addEventListener("beforeunload", event => {
  if (unsent.length || [...comments.values()].some(text => text.trim())) event.preventDefault();
});
window.addEventListener("focus", () => { if (session) watch(); });
document.addEventListener("visibilitychange", () => { if (session && !document.hidden) watch(); });
translatePage();
at("language").value = language;
watchList(() => {
  if (!session) return;
  showList(session, passage, open);
  if (passage) showPlace();
}, failed);
at("language").addEventListener("change", event => choose(event.target.value));
marking(at("work"));
watch();
