// Talks to the server: every call carries the token that stood behind the "#" of the address.

import { tr } from "./words.js";

const KEY = "gatewise-review-token";

function findToken() {
  const found = new URLSearchParams(location.hash.slice(1)).get("token");
  if (found) {
    sessionStorage.setItem(KEY, found);
    // Not left in the address, where it would be seen, and copied with it.
    history.replaceState(null, "", location.pathname);
  }
  return found || sessionStorage.getItem(KEY) || "";
}

const token = findToken();

// Names this page, so that it knows its own changes among those of others.
export const WINDOW = Math.random().toString(36).slice(2);

// Names the review that this page is of: in one that is started later the numbers of passages may be other passages'.
let run = "";

export class Failed extends Error {
  constructor(message, status, content = {}) {
    super(message);
    this.status = status;
    this.content = content;
  }
}

async function call(path, options) {
  let answer, content;
  try {
    answer = await fetch(path, options);
    content = await answer.json();
  } catch {
    throw new Failed(tr("The review has ended, or cannot be reached. Start it again; everything is kept."), 0);
  }
  if (!answer.ok) throw new Failed(content.error || `The server answered ${answer.status}.`, answer.status, content);
  run ||= content.run || "";
  return content;
}

const headers = { "X-Gatewise-Token": token };

export function get(path, asked = {}) {
  return call(`${path}?${new URLSearchParams({ ...asked, run })}`, { headers });
}

export function post(path, body) {
  return call(path, {
    method: "POST",
    headers: { ...headers, "Content-Type": "application/json" },
    body: JSON.stringify({ ...body, window: WINDOW, run }),
  });
}

// One change after another: each is of the version that the one before it gave back.
let last = Promise.resolve();

export function inOrder(work) {
  const next = last.then(work, work);
  last = next.catch(() => {});
  return next;
}

export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (name === "text") made.textContent = value;
    else if (value === true) made.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) made.setAttribute(name, value);
  }
  made.append(...children.filter(Boolean));
  return made;
}

export async function base64(file) {
  const address = await new Promise((done, failed) => {
    const reader = new FileReader();
    reader.onload = () => done(reader.result);
    reader.onerror = () => failed(new Failed(tr("The file could not be read."), 0));
    reader.readAsDataURL(file);
  });
  return address.slice(address.indexOf(",") + 1);
}
