// One request beside the list, while the window is wide enough for both.

import { Problem } from "../api.js";
import { fill, h, mark } from "../dom.js";
import { link } from "../router.js";
import { failed } from "../ui.js";
import { pageOf } from "./request.js";

const WIDE = "(min-width: 75rem)";
const ROW = ".requests .c-id a";

/**
 * Create the panel: `{ element, shown(), open(id), mark() }`. `list` contains the rows. `changed()`
 * is called when another request, or none, is shown.
 */
export function panel(list, signal, changed) {
  const wide = window.matchMedia(WIDE);
  const body = h("div", { class: "panel-body" });
  const whole = h("a", { class: "button small" }, "Open full page");
  const close = h("button", { class: "button quiet small", type: "button" }, "Close");
  const head = h("div", { class: "panel-head" }, whole, close);
  const element = h("aside", { class: "card request-panel", "aria-label": "Request", hidden: true }, head, body);
  let shown = "";
  let leaving = new AbortController();

  /** Mark the row of the shown request, which may have been drawn since. */
  function markRow() {
    for (const row of list.querySelectorAll(ROW)) mark(row, "aria-current", idOf(row) === shown ? "true" : null);
  }

  /** Show a request, or none. The previous one stays until the next one is loaded. */
  async function show(id) {
    if (id === shown) return;
    shown = id;
    leaving.abort();
    leaving = new AbortController();
    const until = AbortSignal.any([signal, leaving.signal]);
    element.hidden = id === "";
    markRow();
    changed();
    if (id === "") return fill(body);
    whole.href = link(`/requests/${id}`);
    mark(element, "aria-busy", "true");
    try {
      const page = pageOf(id, until, { isBeside: true });
      await page.load();
      fill(body, page.element);
      element.scrollTop = 0;
      page.follow();
    } catch (error) {
      if (until.aborted) return;
      if (!(error instanceof Problem)) throw error;
      const again = () => {
        shown = "";
        show(id);
      };
      fill(body, failed(error, again));
    }
    mark(element, "aria-busy", null);
  }

  function shut() {
    const row = [...list.querySelectorAll(ROW)].find((one) => idOf(one) === shown);
    show("");
    row?.focus();
  }

  // Only a click with a pointer: Enter on a row, or a click for another tab, opens the page.
  list.addEventListener("click", (event) => {
    const row = event.target.closest(ROW);
    const isPlain = event.button === 0 && !(event.ctrlKey || event.metaKey || event.shiftKey || event.altKey);
    if (!row || !isPlain || event.detail === 0 || !wide.matches) return;
    event.preventDefault();
    show(idOf(row));
  });
  list.addEventListener("focusin", (event) => {
    const row = event.target.closest(ROW);
    if (row && shown) show(idOf(row));
  });
  close.addEventListener("click", shut);
  const pressed = (event) => {
    const isElsewhere = document.querySelector("dialog[open]") || event.target.closest?.("input, textarea, select");
    if (event.key === "Escape" && shown && !isElsewhere) shut();
  };
  document.addEventListener("keydown", pressed, { signal });
  wide.addEventListener("change", () => !wide.matches && show(""), { signal });

  /** Show the request of the URL; if there is no room beside the list, on its own page. */
  function open(id) {
    if (id && !wide.matches) location.replace(link(`/requests/${encodeURIComponent(id)}`));
    else show(id);
  }

  return { element, shown: () => shown, open, mark: markRow };
}

const idOf = (row) => row.hash.slice(row.hash.lastIndexOf("/") + 1);
