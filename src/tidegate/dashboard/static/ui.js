// The few things that every page shows alike: states, toasts, dialogs, buttons.

import { Problem } from "./api.js";
import { fill, h } from "./dom.js";

const SHOWN_MS = 6_000;
let dialogs = 0;

/** What a page shows before its first answer; it keeps the room that the answer will take. */
export function loading(lines = 4) {
  const bars = Array.from({ length: lines }, () => h("div", { class: "placeholder" }));
  return h(
    "div",
    { class: "card-body loading", "aria-busy": "true" },
    h("span", { class: "visually-hidden" }, "Loading"),
    bars,
  );
}

/** Nothing there, and what would change that. */
export const empty = (title, hint = "", ...more) =>
  h("div", { class: "state" }, h("strong", {}, title), hint && h("span", {}, hint), more);

/** What went wrong, in the gateway's words, and a way to try again. */
export function failed(problem, retry = null) {
  return h(
    "div",
    { class: "state", role: "alert" },
    h("strong", {}, problem.isAway ? "No connection" : "Could not load this page"),
    h("span", {}, said(problem)),
    retry && h("button", { class: "button", type: "button", on: { click: retry } }, "Try again"),
  );
}

/** A problem in one sentence, with what would be allowed. */
export function said(problem) {
  const allowed = problem.allowed && !problem.message.includes(problem.allowed);
  return allowed ? `${problem.message} Allowed: ${problem.allowed}.` : problem.message;
}

/** Text whose commands stand between backticks. */
export const marked = (text) => text.split("`").map((part, at) => (at % 2 ? h("code", {}, part) : part));

/** A line that stays for a while; `kind` is "good" or "bad". */
export function toast(text, kind = "good") {
  const close = h(
    "button",
    { class: "button quiet small", type: "button", "aria-label": "Dismiss" },
    "✕",
  );
  const shown = h("div", { class: `toast ${kind}` }, h("span", {}, text), close);
  close.addEventListener("click", () => shown.remove());
  document.getElementById("toasts").append(shown);
  if (kind !== "bad") setTimeout(() => shown.remove(), SHOWN_MS);
}

/**
 * Copy a text, and return whether it was: a page over plain HTTP may not. `place` is where the text
 * stands, and is selected then.
 */
export async function copied(text, place = null) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    if (place) getSelection().selectAllChildren(place);
    return false;
  }
}

/**
 * Ask before something is done, and do it.
 *
 * `more` stands below the text, `below` below the fields. `fields` are from `field()`; `act(values)` is called with their values by name. While it runs the
 * dialog stays; a Problem of it is shown in the dialog, at its field where it names one. Resolves
 * with what `act` returned, or null when the person thought better of it, or left the page. A dialog
 * that is closed while `act` runs stops nothing: it resolves once that has ended, and a Problem is a toast then.
 */
export function confirm({ title, text = "", more = [], fields = [], below = null, action, danger = false, act }) {
  const id = `dialog-${++dialogs}`;
  const wrong = h("p", { class: "notice bad", role: "alert", hidden: true });
  const cancel = h("button", { class: "button", type: "button" }, "Cancel");
  const go = h("button", { class: `button ${danger ? "danger" : "main"}`, type: "submit" }, action);
  const form = h(
    "form",
    { method: "dialog", novalidate: true },
    h("h2", { id }, title),
    text && h("p", {}, text),
    more,
    fields.map((one) => one.element),
    below,
    wrong,
    h("div", { class: "actions" }, cancel, go),
  );
  const dialog = h("dialog", { "aria-labelledby": id, data: { confirms: "" } }, form);
  document.body.append(dialog);
  return new Promise((resolve) => {
    let result = null;
    const leave = () => {
      dialog.remove();
      resolve(result);
    };
    cancel.addEventListener("click", () => dialog.close());
    dialog.addEventListener("close", () => {
      if (!go.disabled) leave();
    });
    form.addEventListener("submit", async (event) => {
      event.preventDefault();
      if (go.disabled) return;
      go.disabled = true;
      fill(cancel, "Close");
      wrong.hidden = true;
      fields.forEach((one) => one.complain(""));
      try {
        result = (await act(valuesOf(fields))) ?? true;
        dialog.close();
      } catch (error) {
        if (!(error instanceof Problem)) throw error;
        if (dialog.open) complain(error, fields, wrong);
        else if (error.status !== 401) toast(`${title} ${said(error)}`, "bad");
      } finally {
        go.disabled = false;
        fill(cancel, "Cancel");
        if (!dialog.open) leave();
      }
    });
    dialog.showModal();
    (fields[0]?.input ?? cancel).focus();
  });
}

/** Close what asks before something is done: its page was left, or its person is signed out. */
export const leaveDialogs = () => document.querySelectorAll("dialog[data-confirms]").forEach((one) => one.close());

function valuesOf(fields) {
  const values = Object.fromEntries(fields.map((one) => [one.name, one.value()]));
  // JSON has null for what is no number, and null takes a bound away.
  const wrong = fields.find(({ name }) => typeof values[name] === "number" && !Number.isFinite(values[name]));
  if (wrong) throw new Problem({ detail: "Enter a number, such as 1,250.50.", field: wrong.name });
  return values;
}

function complain(problem, fields, wrong) {
  const at = fields.find((one) => problem.field && problem.field.endsWith(one.name));
  if (at) at.complain(said(problem));
  else {
    wrong.hidden = false;
    fill(wrong, said(problem));
  }
}

/** A number with commas between its thousands; NaN for any other text, such as `$5` or `7,50`. */
export const numberOf = (text) => Number(text.replaceAll(/,(?=\d{3}(\D|$))/g, ""));

/**
 * A labelled input. `options` (value -> words) makes it a choice. `value()` gives a number for
 * type "number", null for an empty one, NaN for another text.
 */
export function field(name, label, { type = "text", value = "", hint = "", options, ...more } = {}) {
  const id = `field-${++dialogs}-${name}`;
  const attributes = { id, name, "aria-describedby": `${id}-says`, autocomplete: "off", ...more };
  const input = options
    ? h(
        "select",
        attributes,
        Object.entries(options).map(([key, words]) =>
          h("option", { value: key, selected: key === String(value) }, words),
        ),
      )
    : h("input", { ...attributes, type: type === "number" ? "text" : type, value });
  if (type === "number") input.setAttribute("inputmode", "numeric");
  const says = h("span", { id: `${id}-says`, class: "hint" }, hint);
  return {
    name,
    input,
    element: h("div", { class: "field" }, h("label", { for: id }, label), input, says),
    value: () => {
      const text = input.value.trim();
      if (type !== "number") return text;
      return text === "" ? null : numberOf(text);
    },
    complain: (text) => {
      input.setAttribute("aria-invalid", text ? "true" : "false");
      says.className = text ? "wrong" : "hint";
      fill(says, text || hint);
    },
  };
}

/** A few choices side by side, one of them pressed; `choose(value)` is called on a change. */
export function choice(label, options, value, choose) {
  const buttons = Object.entries(options).map(([key, words]) =>
    h(
      "button",
      {
        type: "button",
        "aria-pressed": String(key === value),
        on: {
          click: () => {
            buttons.forEach((one) => one.setAttribute("aria-pressed", String(one.value === key)));
            choose(key);
          },
        },
        value: key,
      },
      words,
    ),
  );
  return h("div", { class: "choice", role: "group", "aria-label": label }, buttons);
}
