// Keyboard shortcuts. They are inactive in input fields and while a dialog is open.

import { h } from "./dom.js";
import { PAGES } from "./pages/table.js";
import { link } from "./router.js";

const SECOND_MS = 1_200; // how long a g waits for its second key
const ROWS = ".requests tbody tr, .talk tbody tr, .listed tbody tr, .batch";
const HELP = [
  ["/", "Search on this page"],
  ["j, k", "Next and previous row"],
  ["Enter", "Open the selected row"],
  ["Esc", "Close the request panel"],
  ["?", "Show keyboard shortcuts"],
];

/** Listen until `signal` is aborted. */
export function follow(signal) {
  let began = -SECOND_MS;
  const pressed = (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || isTyping(event.target)) return;
    const isSecond = performance.now() - began < SECOND_MS;
    began = -SECOND_MS;
    const page = isSecond && PAGES.find((one) => one.key === event.key);
    if (page) location.hash = link(page.path);
    else if (event.key === "g") began = performance.now();
    else if (event.key === "/") search(event);
    else if (event.key === "j" || event.key === "k") step(event.key === "j" ? 1 : -1);
    else if (event.key === "?") help();
  };
  document.addEventListener("keydown", pressed, { signal });
}

function isTyping(target) {
  if (document.querySelector("dialog[open]")) return true;
  return target.closest?.("input, textarea, select, [contenteditable]") !== null;
}

function search(event) {
  const field = [...document.querySelectorAll("main input[type=search]")].find((one) => one.checkVisibility());
  if (!field) return;
  event.preventDefault(); // otherwise the key is typed into the field
  field.focus();
  field.select();
}

function step(by) {
  const links = [...document.querySelectorAll(ROWS)].map((row) => row.querySelector("a"));
  const rows = links.filter((one) => one?.checkVisibility());
  if (rows.length === 0) return;
  const focused = rows.indexOf(document.activeElement);
  const at = focused < 0 ? rows.findIndex((one) => one.hasAttribute("aria-current")) : focused;
  const next = at < 0 ? (by > 0 ? 0 : rows.length - 1) : Math.min(rows.length - 1, Math.max(0, at + by));
  rows[next].focus();
  rows[next].scrollIntoView({ block: "nearest" });
}

function help() {
  const pages = PAGES.filter((one) => one.key).map((one) => [`g ${one.key}`, one.title]);
  const close = h("button", { class: "button", type: "submit" }, "Close");
  const rows = [...HELP, ...pages].map(([key, words]) =>
    h("div", {}, h("dt", {}, h("kbd", {}, key)), h("dd", {}, words)),
  );
  const dialog = h(
    "dialog",
    { "aria-labelledby": "keys-title" },
    h(
      "form",
      { method: "dialog" },
      h("h2", { id: "keys-title" }, "Keyboard shortcuts"),
      h("dl", { class: "keys" }, rows),
      h("div", { class: "actions" }, close),
    ),
  );
  dialog.addEventListener("close", () => dialog.remove());
  document.body.append(dialog);
  dialog.showModal();
}
