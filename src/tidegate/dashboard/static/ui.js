// Elements that all pages share: states, toasts, dialogs, buttons.

import { Problem } from "./api.js";
import { fill, h } from "./dom.js";

const SHOWN_MS = 6_000;
const MOST_TOASTS = 3;
let dialogs = 0;

/** A placeholder until the first response; it keeps the room that the content will take. */
export function loading(lines = 4) {
  const bars = Array.from({ length: lines }, () => h("div", { class: "placeholder" }));
  return h(
    "div",
    { class: "card-body loading", "aria-busy": "true" },
    h("span", { class: "visually-hidden" }, "Loading"),
    bars,
  );
}

/** An empty state, and what would change it. */
export const empty = (title, hint = "", ...more) =>
  h("div", { class: "state" }, h("strong", {}, title), hint && h("span", {}, hint), more);

/** A failure as the gateway reports it, with a button to try again. */
export function failed(problem, retry = null) {
  return h(
    "div",
    { class: "state", role: "alert" },
    h("strong", {}, problem.isAway ? "No connection" : "Could not load this page"),
    h("span", {}, said(problem)),
    retry && h("button", { class: "button", type: "button", on: { click: retry } }, "Try again"),
  );
}

/** Return a problem as one sentence, with the allowed values. */
export function said(problem) {
  const allowed = problem.allowed && !problem.message.includes(problem.allowed);
  return allowed ? `${problem.message} Allowed: ${problem.allowed}.` : problem.message;
}

/** Return a text with the commands between backticks as code. */
export const marked = (text) => text.split("`").map((part, at) => (at % 2 ? h("code", {}, part) : part));

/** Show a short-lived message below the page; `kind` is "good" or "bad". */
export function toast(text, kind = "good") {
  const place = document.getElementById("toasts");
  const close = h(
    "button",
    { class: "button quiet small", type: "button", "aria-label": "Dismiss" },
    "✕",
  );
  const shown = h("div", { class: `toast ${kind}` }, h("span", {}, text), close);
  const drop = () => {
    shown.remove();
    keepClear(place);
  };
  close.addEventListener("click", drop);
  while (place.childElementCount >= MOST_TOASTS) (place.querySelector(".good") ?? place.firstElementChild).remove();
  place.append(shown);
  keepClear(place);
  if (kind !== "bad") setTimeout(drop, SHOWN_MS);
}

/** What has the focus, or is scrolled into view, ends above the toasts. */
function keepClear(place) {
  const { height, top } = place.getBoundingClientRect();
  document.documentElement.style.scrollPaddingBottom = height ? `${height}px` : "";
  const focused = document.activeElement;
  if (height && focused !== document.body && !place.contains(focused) && focused.getBoundingClientRect().bottom > top) focused.scrollIntoView({ block: "nearest" });
}

/**
 * Copy a text, and return whether it worked: pages over plain HTTP may not copy. `place` contains
 * the text, and is selected if it did not.
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
 * Ask for confirmation, then act.
 *
 * `more` is placed below the text, `below` below the fields. `fields` are made by `field()`;
 * `act(values)` gets their values by name. The dialog stays open while it runs, and shows its
 * Problem at the field that the Problem names, if any. Resolves with the result of `act`, or with
 * null if the person cancelled or left the page. Closing the dialog while `act` runs does not stop
 * it: the promise resolves when it ends, and a Problem is shown as a toast.
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

/** Close confirmation dialogs, because the page was left or the person is signed out. */
export const leaveDialogs = () => document.querySelectorAll("dialog[data-confirms]").forEach((one) => one.close());

function valuesOf(fields) {
  const values = Object.fromEntries(fields.map((one) => [one.name, one.value()]));
  // JSON represents NaN as null, and null would remove a bound.
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

/** Parse a number with commas between thousands; NaN for any other text, such as `$5` or `7,50`. */
export const numberOf = (text) => Number(text.replaceAll(/,(?=\d{3}(\D|$))/g, ""));

/**
 * A labelled input. `options` (value -> text) makes it a selection. For the type "number",
 * `value()` returns a number, null if empty, NaN for other text.
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

/** A group of buttons of which one is pressed; `choose(value)` is called on a change. */
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
