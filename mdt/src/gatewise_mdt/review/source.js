// The document beside the passage: of a PDF the page that it stands on, of others the blocks around it. All of it is shown as text
// or as a picture that the server drew; nothing of the document itself is loaded.

import { Failed, element, get } from "./calls.js";
import { tr } from "./words.js";

const SVG = "http://www.w3.org/2000/svg";
const MARGIN = 8; // points around a part of a page
const MOST = 6; // pages that are kept
const NUMBER = /^[(（]?(\d{1,3}|[a-z]|[ivx]{1,4}|[一二三四五六七八九十]+)[.)）、]/; // of an item, which then has no bullet
const at = id => document.getElementById(id);
const pictures = new Map(); // answers of api/page, by document and page

let shown = 0; // number of the passage whose document is shown

function drawn(name, attributes, ...children) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function pictureOf(number, source, page) {
  const key = `${source.id}/${page}`;
  if (!pictures.has(key)) {
    if (pictures.size >= MOST) pictures.delete(pictures.keys().next().value);
    const asked = get("api/page", { number, page });
    asked.catch(() => pictures.delete(key));
    pictures.set(key, asked);
  }
  return pictures.get(key);
}

// A page, or the part of it in a box, with regions marked.
function pageOf({ image, width, height }, label, regions, box = [0, 0, width, height]) {
  return drawn("svg", { viewBox: box.join(" "), role: "img", "aria-label": label, class: "page" },
    drawn("image", { href: image, width, height }),
    ...regions.map(([, x, y, w, h]) => drawn("rect", { class: "own", x: x - 3, y: y - 2, width: w + 6, height: h + 4, rx: 2 })));
}

const title = ({ name }) => element("h2", { text: name.split(/[\\/]/).at(-1), title: name });

// Within its own pane: the page as a whole stays where it is.
function scrollToMark() {
  const pane = at("source"), mark = pane.querySelector(".own");
  if (!mark) return;
  const [to, from] = [mark, pane].map(one => one.getBoundingClientRect());
  pane.scrollTop += to.top - from.top - pane.clientHeight / 3;
  pane.scrollLeft += to.left - from.left - 16;
}

async function showPage(number, source, page) {
  const regions = source.regions.filter(one => one[0] === page);
  const turn = (by, sign, label) => element("button", { type: "button", id: by < 0 ? "page-before" : "page-after", "aria-label": label,
    title: label, text: sign, disabled: page + by < 1 || page + by > source.pages,
    onclick: async () => {
      await showPage(number, source, page + by);
      const button = at(by < 0 ? "page-before" : "page-after");
      if (button) button.focus({ preventScroll: true });
    } });
  const picture = await pictureOf(number, source, page);
  if (shown !== number) return;
  const label = tr("Page {page} of {count}", { page, count: source.pages });
  const svg = pageOf(picture, `${source.name}, ${label}${regions.length ? `, ${tr("the passage is marked")}` : ""}`, regions);
  at("source").replaceChildren(
    element("div", { class: "top" }, title(source), turn(-1, "‹", tr("Previous page")),
      element("span", { text: label }), turn(1, "›", tr("Next page")),
      element("button", { type: "button", id: "larger", "aria-pressed": String(at("source").classList.contains("large")), text: tr("Larger"),
        onclick: () => {
          at("larger").setAttribute("aria-pressed", String(at("source").classList.toggle("large")));
          scrollToMark();
        } })), svg);
  scrollToMark();
}

// What was read without certainty is seen as it is printed, beside its text.
async function showDoubted(number, source) {
  const made = [];
  for (const [page, x, y, w, h] of source.doubted) {
    const picture = await pictureOf(number, source, page);
    const box = [Math.max(0, x - MARGIN), Math.max(0, y - MARGIN), w + 2 * MARGIN, h + 2 * MARGIN];
    const label = tr("Page {page} of {count}", { page, count: source.pages });
    const part = pageOf(picture, label, [], box);
    part.style.maxWidth = `${1.4 * box[2]}px`;
    const said = tr("Read without certainty; as it is printed on page {page}:", { page });
    made.push(element("figure", {}, element("figcaption", { text: said }), part));
  }
  if (shown === number) at("doubted").replaceChildren(...made);
}

const marked = pieces => pieces.map(([text, own]) => own ? element("b", { class: "own", text }) : text);

function tableOf({ headers, rows, left_out: [before, after] }) {
  const wide = Math.max(...[...headers, ...rows.map(row => row.cells)].map(cells => cells.reduce((sum, [, span]) => sum + span, 0)));
  const gap = count => count > 0 && element("tr", {}, element("td", { class: "hint", colspan: wide, text: tr("… {count} more rows", { count }) }));
  const line = (tag, cells, own) => element("tr", { class: own ? "own" : null },
    ...cells.map(([text, span]) => element(tag, { colspan: span > 1 ? span : null, scope: tag === "th" ? "col" : null, text })));
  return element("table", {}, headers.length && element("thead", {}, ...headers.map(cells => line("th", cells))),
    element("tbody", {}, gap(before), ...rows.map(row => line("td", row.cells, row.own)), gap(after)));
}

function blockOf(block) {
  if (block.kind === "heading") return element("h3", {}, ...marked(block.pieces));
  const made = block.kind === "table" ? tableOf(block)
    : element("p", { class: NUMBER.test(block.pieces[0][0]) ? "numbered" : block.kind,
      role: block.kind === "item" ? "listitem" : null }, ...marked(block.pieces));
  made.style.marginInlineStart = `${1.4 * (block.depth || 0)}rem`;
  return made;
}

// Items that follow each other are one list; how deep one is, is said to a screen reader too.
function blocksOf(blocks) {
  const made = [];
  for (const block of blocks) {
    const one = blockOf(block);
    if (block.kind !== "item") made.push(one);
    else {
      one.setAttribute("aria-level", block.depth + 1);
      if (made.length && made.at(-1).getAttribute("role") === "list") made.at(-1).append(one);
      else made.push(element("div", { role: "list" }, one));
    }
  }
  return made;
}

// Shows the document of a passage, once for each passage that is opened.
export async function showSource(passage) {
  const { number, language } = passage;
  if (shown === number) return;
  shown = number;
  at("doubted").replaceChildren();
  at("source").hidden = false;
  try {
    const source = await get("api/source", { number });
    if (shown !== number) return;
    at("source").classList.toggle("none", !source.name);
    at("source").lang = language;
    if (!source.name) {
      at("source").replaceChildren(element("p", { class: "hint", text: tr("The document of this passage is not here: only its text is shown.") }));
    } else if (source.pages) {
      await showPage(number, source, source.regions.length ? source.regions[0][0] : 1);
      await showDoubted(number, source);
    } else {
      at("source").replaceChildren(element("div", { class: "top" }, title(source)),
        element("p", { class: "hint", text: source.headings.join(" › ") }), ...blocksOf(source.blocks));
      scrollToMark();
    }
  } catch (error) {
    if (!(error instanceof Failed)) throw error;
    shown = 0; // asked for again when the passage is shown again
    at("source").replaceChildren(element("p", { class: "bad", text: error.message }));
  }
}
