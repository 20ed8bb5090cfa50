// Drafts as one types, keys, and patience while the server is away. Without this file the page is a plain form.
"use strict";

const form = document.getElementById("verdict");
const status = document.getElementById("status");
const rows = [...form.querySelectorAll("fieldset")];
const storageKey = "exalign-" + form.dataset.key;
const JSON_WANTED = { Accept: "application/json" };
let current = 0;
let leaving = false;
let edits = 0;
let sending = false;
let timer = 0;

const values = () => new URLSearchParams(new FormData(form));
const pause = (seconds) => new Promise((done) => setTimeout(done, 1000 * seconds));

function say(text, trouble = false) {
  status.textContent = text;
  status.classList.toggle("trouble", trouble);
}

// Storage may be forbidden; then only the server keeps drafts.
function remember(key, value) {
  try {
    if (value === null) localStorage.removeItem(key);
    else localStorage.setItem(key, value);
  } catch { /* nothing to do */ }
}

function recall(key) {
  try {
    return localStorage.getItem(key);
  } catch {
    return null;
  }
}

// Every edit goes to this browser's storage at once and to the server soon after, one request at a time.
function edited() {
  edits += 1;
  remember(storageKey, values().toString());
  clearTimeout(timer);
  timer = setTimeout(sendDraft, 400);
}

async function sendDraft() {
  if (sending || leaving) return;
  sending = true;
  let seen;
  let delay = 1;
  do {
    seen = edits;
    try {
      const reply = await fetch(form.dataset.draft, { method: "POST", body: values() });
      if (reply.status >= 500) throw new Error(reply.status);
      if (seen === edits) {
        remember(storageKey, null);
        if (!leaving) say(reply.ok ? "Draft kept." : "This page is out of date: reload it.", !reply.ok);
      }
    } catch {
      if (!leaving) say("The server is away. What you entered is kept in this browser.", true);
      await pause(delay);
      delay = Math.min(2 * delay, 10);
      seen = -1;
    }
  } while (seen !== edits && !leaving);
  sending = false;
}

// The same request may arrive twice; the server takes it once. So it can be repeated until it is answered.
async function send(address, body, stored) {
  if (leaving) return;
  leaving = true;
  clearTimeout(timer);
  for (let delay = 0.5; ; delay = Math.min(2 * delay, 10)) {
    try {
      const reply = await fetch(address, { method: "POST", body, headers: JSON_WANTED });
      if (reply.ok) {
        const { next } = await reply.json();
        stored?.();
        location.assign(next);
        return;
      }
      if (reply.status < 500) {
        leaving = false;
        say("This was not stored. Reload the page and try again.", true);
        return;
      }
    } catch { /* the server is away: try again */ }
    say("Not stored yet: the server is away. Keep this window open; it is sent again by itself.", true);
    await pause(delay);
  }
}

function save() {
  if (!form.reportValidity()) {
    mark(0);
    return;
  }
  say("Saving…");
  send(form.action, values(), () => remember(storageKey, null));
}

function mark(index, focus = true) {
  rows[current].classList.remove("current");
  current = Math.max(0, Math.min(rows.length - 1, index));
  rows[current].classList.add("current");
  if (focus) (rows[current].querySelector("input:checked") ?? rows[current].querySelector("input")).focus();
}

function choose(value) {
  rows[current].querySelector(`input[value=${value}]`).checked = true;
  edited();
  mark(current + 1);
}

function leaveOpen() {
  for (const input of rows[current].querySelectorAll("input")) input.checked = false;
  edited();
}

const KEYS = {
  a: () => choose("left"),
  t: () => choose("tie"),
  b: () => choose("right"),
  j: () => mark(current + 1),
  k: () => mark(current - 1),
  x: leaveOpen,
  c: () => document.getElementById("comment").focus(),
  u: () => document.getElementById("undo").click(),
  r: () => {
    const reference = document.getElementById("reference");
    if (reference) reference.open = !reference.open;
  },
  Enter: save,
};

const useKeys = document.getElementById("use-keys");
useKeys.checked = recall("exalign-keys") !== "off";
useKeys.addEventListener("change", () => remember("exalign-keys", useKeys.checked ? null : "off"));

document.addEventListener("keydown", (event) => {
  const typing = event.target.id === "comment";
  if (event.key === "Enter" && typing && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    save();
    return;
  }
  if (event.ctrlKey || event.metaKey || event.altKey || event.repeat || typing || event.isComposing) return;
  if (event.key === "Escape") return;
  const onControl = event.target.closest("button, a, summary, input[type=checkbox]");
  const action = useKeys.checked || event.key === "Enter" ? KEYS[event.key] : undefined;
  if (!action || (event.key === "Enter" && onControl)) return;
  event.preventDefault();
  action();
});

form.addEventListener("input", edited);
form.addEventListener("focusin", (event) => {
  const row = rows.indexOf(event.target.closest("fieldset"));
  if (row >= 0) mark(row, false);
});
form.addEventListener("submit", (event) => {
  event.preventDefault();
  save();
});
document.querySelector(".undo").addEventListener("submit", (event) => {
  event.preventDefault();
  send(event.target.action, new URLSearchParams(new FormData(event.target)));
});

// A page taken from the browser's memory (back button) may be old: fetch it anew.
addEventListener("pageshow", (event) => {
  if (event.persisted) location.reload();
});
addEventListener("pagehide", () => {
  if (recall(storageKey) !== null) navigator.sendBeacon(form.dataset.draft, values());
});

// What the server never got, because it or the network was away when the window closed.
const unsent = recall(storageKey);
if (unsent !== null) {
  const fields = new URLSearchParams(unsent);
  if (fields.get("revision") === form.elements.revision.value) {
    for (const input of form.querySelectorAll("input[type=radio]")) input.checked = false;
    for (const [name, value] of fields) {
      if (name === "comment") form.elements.comment.value = value;
      else if (!["form_token", "revision"].includes(name)) document.getElementById(`${name}-${value}`).checked = true;
    }
    edited();
  } else {
    remember(storageKey, null);
  }
}
mark(0, false);
