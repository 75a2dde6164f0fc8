// Exports of the list of requests, and saved filters.

import { get, Problem } from "../api.js";
import { fill, h, say } from "../dom.js";
import { csv, jsonLines, save } from "../export.js";
import { count, counted } from "../format.js";
import { link } from "../router.js";
import { confirm, field, toast } from "../ui.js";
import { asked } from "./request_filters.js";

const MOST = 10_000;
const PAGE = 200;
const NAME = "tidegate.filters";
const MOST_KEPT = 20;
const COLUMNS = [
  ...["request_id", "submitted_at", "finished_at", "status", "tenant", "key", "source", "type", "model", "endpoint", "pool"],
  ...["upstream", "tier", "queue_ms", "upstream_ms", "total_tokens", "cost_usd", "attempts", "error_code", "subject", "conversation"],
];

/** Buttons that export the matches of the filters to a file, at most the newest `MOST`. */
export function exporting(values, signal) {
  const kinds = { csv: "CSV", jsonl: "JSONL" };
  const told = h("span", { class: "quiet-text", role: "status" });
  const buttons = Object.entries(kinds).map(([kind, words]) => {
    const button = h("button", { class: "button small quiet", type: "button" }, `Export ${words}`);
    button.addEventListener("click", async () => {
      buttons.forEach((one) => (one.disabled = true));
      try {
        const found = await gathered(values(), (read) => say(told, `${count(read)} read`), signal);
        const rows = found.slice(0, MOST).map(exported);
        save("requests", kind, kind === "csv" ? csv(COLUMNS, rows) : jsonLines(rows));
        const cut = found.length > MOST ? `, the newest ${count(MOST)} only` : "";
        toast(`${counted(rows.length, "request")} exported${cut}.`);
      } catch (error) {
        if (!signal.aborted) toast(error.message, "bad");
      } finally {
        say(told, "");
        buttons.forEach((one) => (one.disabled = false));
      }
    });
    return button;
  });
  return [told, ...buttons];
}

/**
 * Return an exported row: with the cost in dollars, as in exports of Usage, and without the prompt.
 */
function exported({ prompt: _, cost_micros: micros, ...row }) {
  return micros === undefined ? row : { ...row, cost_usd: (micros / 1e6).toFixed(6) };
}

/** Read up to a page beyond `MOST`, which shows that there are more. */
async function gathered(values, tell, signal) {
  const rows = [];
  let cursor = "";
  do {
    const page = await get(`admin/requests?${asked(values, { limit: PAGE, cursor })}`, { signal });
    rows.push(...page.items);
    cursor = page.next_cursor;
    tell(rows.length);
  } while (cursor && rows.length <= MOST);
  return rows;
}

const kept = () => {
  try {
    return JSON.parse(localStorage.getItem(NAME)) ?? {};
  } catch {
    return {};
  }
};
const keep = (all) => localStorage.setItem(NAME, JSON.stringify(all));

/** Filters saved by name in this browser; selecting one opens the list with it. */
export function saved(values) {
  const element = h("div", { class: "saved-filters", role: "group", "aria-label": "Saved filters" });
  const given = () => Object.fromEntries(Object.entries(values()).filter(([, value]) => value !== ""));

  async function add() {
    const name = field("name", "Name", { maxlength: 40 });
    await confirm({
      title: "Save filters",
      text: "Saved filters are kept in this browser only.",
      fields: [name],
      action: "Save",
      act: ({ name: chosen }) => {
        const { [chosen || "Filter"]: _, ...others } = kept();
        if (Object.keys(others).length >= MOST_KEPT) throw new Problem({ detail: `At most ${MOST_KEPT} filters can be saved. Delete one first.` });
        keep({ [chosen || "Filter"]: given(), ...others });
      },
    });
    draw();
  }

  function draw() {
    const rows = Object.entries(kept()).map(([name, query]) => {
      const drop = h("button", { class: "button small quiet", type: "button", "aria-label": `Delete ${name}` }, "✕");
      drop.addEventListener("click", () => {
        const { [name]: _, ...rest } = kept();
        keep(rest);
        draw();
      });
      return h("span", { class: "saved-filter" }, h("a", { href: link("/requests", query) }, name), drop);
    });
    const more = h("button", { class: "button small quiet", type: "button", on: { click: add } }, "Save filters");
    fill(element, rows, more);
  }

  draw();
  return element;
}
