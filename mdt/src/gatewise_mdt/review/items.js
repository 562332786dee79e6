// What of its text the tree seems to have lost or turned round, as the rules of the check list it.

import { element } from "./calls.js";
import { language, tr } from "./words.js";

const KINDS = { "empty tree": tr("empty tree"), "empty leaf": tr("empty leaf"), dose: tr("dose"), number: tr("number"), limit: tr("limit"),
  frequency: tr("frequency"), "number not in the text": tr("number not in the text"), "dose of another drug": tr("dose of another drug"),
  "given though forbidden": tr("given though forbidden"), "forbidden though given": tr("forbidden though given"),
  prohibition: tr("prohibition"), negation: tr("negation"), condition: tr("condition"), recommendation: tr("recommendation"),
  route: tr("route"), branches: tr("branches"), otherwise: tr("otherwise"), words: tr("words") };

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

function line(item, block, goTo) {
  // The sentences are in English; in Chinese the kind and the words say it.
  const said = language === "zh" ? `“${item.words}”` : item.sentence;
  const words = item.place ? element("button", { type: "button", class: "link", lang: block.lang, text: said, title: item.sentence,
    onclick: () => selectWords(block, ...item.place) }) : element("span", { text: said, title: item.sentence });
  return element("li", {}, element("b", { text: KINDS[item.kind] || item.kind }), ": ", words,
    ...(item.node === null ? [] : [" ", goTo(item.node)]));
}

// Fills the list in a place of the page; the words of an item are selected in the passage when it is pressed.
export function showItems(at, passage, goTo) {
  const items = passage.items.filter(item => !item.hint), hints = passage.items.filter(item => item.hint);
  at("items").hidden = !passage.items.length;
  at("items-head").textContent = tr("To look at, the surest first: {count}", { count: items.length });
  at("items-list").replaceChildren(...items.map(item => line(item, at("passage"), goTo)));
  at("hints").hidden = !hints.length;
  at("hints-head").textContent = tr("Hints, which err more often: {count}", { count: hints.length });
  at("hints-list").replaceChildren(...hints.map(item => line(item, at("passage"), goTo)));
}
