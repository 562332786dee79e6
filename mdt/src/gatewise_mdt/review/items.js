// What of its text the tree seems to have lost or turned round, as the rules of the check list it: each item to be ticked, with a
// word why it is no mistake, before the tree is approved.

import { element } from "./calls.js";
import { when } from "./history.js";
import { language, tr } from "./words.js";

const KINDS = { "empty tree": tr("empty tree"), "empty leaf": tr("empty leaf"), dose: tr("dose"), number: tr("number"), limit: tr("limit"),
  frequency: tr("frequency"), "number not in the text": tr("number not in the text"), "dose of another drug": tr("dose of another drug"),
  "given though forbidden": tr("given though forbidden"), "forbidden though given": tr("forbidden though given"),
  prohibition: tr("prohibition"), negation: tr("negation"), condition: tr("condition"), recommendation: tr("recommendation"),
  heading: tr("heading"), route: tr("route"), branches: tr("branches"), otherwise: tr("otherwise"), words: tr("words"), "changed text": tr("changed text") };
const WHYS = [tr("stands elsewhere in the tree"), tr("said in other words"), tr("belongs to another passage"), tr("no part of the decision")];

const whys = new Map(); // words that were begun, by passage and item
let next = ""; // what is to have the focus when the list is made anew

// Selects characters of a text that stands in several elements, as a mouse would.
function selectWords(block, start, end) {
  const walk = document.createTreeWalker(block, NodeFilter.SHOW_TEXT);
  const range = document.createRange();
  for (let begin = 0, found = false; walk.nextNode();) {
    const { data } = walk.currentNode;
    if (!found && start < begin + data.length) {
      range.setStart(walk.currentNode, start - begin);
      found = true;
    }
    if (end <= begin + data.length) {
      range.setEnd(walk.currentNode, end - begin);
      break;
    }
    begin += data.length;
  }
  getSelection().removeAllRanges();
  getSelection().addRange(range);
  range.startContainer.parentElement.scrollIntoView({ block: "nearest" });
}

function said(item, block, goTo) {
  // The sentences are in English; in Chinese the kind and the words say it.
  const text = language === "zh" ? `“${item.words}”` : item.sentence;
  const words = item.place ? element("button", { type: "button", class: "link", lang: block.lang, text, title: item.sentence,
    onclick: () => selectWords(block, ...item.place) }) : element("span", { text, title: item.sentence });
  return [element("b", { text: KINDS[item.kind] || item.kind }), ": ", words, ...(item.node === null ? [] : [" ", goTo(item.node)])];
}

export const isOpen = item => !item.hint && !item.tick;

function line(item, place, at, passage, goTo, change) {
  const block = at("passage"), name = `${KINDS[item.kind] || item.kind}: ${item.words}`;
  const known = `${passage.number} ${item.kind} ${item.words} ${item.again} ${item.node}`;
  const box = element("input", { type: "checkbox", id: `item-${place}`, "aria-label": name });
  box.checked = Boolean(item.tick);
  if (item.tick) {
    const who = [item.tick.by, item.tick.at && when(item.tick.at)].filter(Boolean).join(", ");
    box.disabled = passage.state === "approved";
    box.addEventListener("change", () => change("tick", { item: place, ticked: false, why: "" }, () => { next = box.id; }));
    return element("li", { class: "ticked" }, box, element("span", {}, ...said(item, block, goTo)),
      element("span", { class: "hint", text: [item.tick.why && `“${item.tick.why}”`, who].filter(Boolean).join(" ") }));
  }
  const why = element("input", { type: "text", id: `why-${place}`, maxlength: 500, autocomplete: "off", list: "whys",
    placeholder: item.is_change ? tr("looked at") : tr("why it is no mistake"), "aria-label": `${tr("why it is no mistake")} (${name})` });
  why.value = whys.get(known) || "";
  why.addEventListener("input", () => whys.set(known, why.value));
  const tick = () => {
    box.checked = false;
    if (!item.is_change && !why.value.trim()) {
      why.focus();
      return;
    }
    change("tick", { item: place, ticked: true, why: why.value.trim() }, () => {
      whys.delete(known);
      // On to the next open one, and after the last to what can be done then.
      const open = [...at("items-list").querySelectorAll("input[type=text]")].filter(one => one !== why);
      next = (open.find(one => Number(one.id.slice(4)) > place) || open[0] || at("approve")).id;
    });
  };
  box.addEventListener("change", tick);
  why.addEventListener("keydown", event => {
    if (event.key === "Enter" && !event.isComposing) tick();
  });
  return element("li", {}, box, element("span", {}, ...said(item, block, goTo)), why);
}

// Fills the list in a place of the page; the words of an item are selected in the passage when it is pressed.
export function showItems(at, passage, goTo, change) {
  const here = at("items-list").contains(document.activeElement) ? document.activeElement.id : "";
  const items = passage.items.map((item, place) => [item, place]).filter(([item]) => !item.hint);
  const hints = passage.items.filter(item => item.hint), open = items.filter(([item]) => isOpen(item)).length;
  at("items").hidden = !passage.items.length;
  at("items-head").textContent = tr("To look at and tick, the surest first: {open} of {count} open", { open, count: items.length });
  at("items-list").replaceChildren(...items.map(([item, place]) => line(item, place, at, passage, goTo, change)));
  at("whys").replaceChildren(...WHYS.map(value => element("option", { value })));
  at("hints").hidden = !hints.length;
  at("hints-head").textContent = tr("Hints, which err more often: {count}", { count: hints.length });
  at("hints-list").replaceChildren(...hints.map(item => element("li", {}, ...said(item, at("passage"), goTo))));
  const focused = at(next || here);
  next = "";
  if (focused) focused.focus();
}
