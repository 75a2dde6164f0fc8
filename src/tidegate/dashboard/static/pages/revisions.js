// Changes of the limits of one or all upstreams: what, when, by whom and why, each with a button to
// undo it.

import { get, patch, Problem } from "../api.js";
import { fill, h } from "../dom.js";
import { count, time } from "../format.js";
import { link, note } from "../router.js";
import * as scope from "../scope.js";
import { confirm, empty, failed, field, toast } from "../ui.js";

const MOST = 20;

export async function open(main, { query, signal }) {
  const { pools } = await get("dashboard/session", { signal });
  scope.among(pools, query.get("pool"));
  const place = h("div", { class: "revisions" });
  const chooser = scope.scopeSwitch(async (pool) => {
    note({ pool });
    try {
      await again();
    } catch (error) {
      if (signal.aborted) return;
      if (!(error instanceof Problem)) throw error;
      fill(place, failed(error, again));
    }
  }).element;
  const of = async (pool) => {
    const found = await get("dashboard/revisions", { query: { pool }, signal });
    return found.map((one) => ({ ...one, pool }));
  };
  const again = async () => {
    const pool = scope.chosen();
    const all = await Promise.all((pool === scope.ALL ? pools : [pool]).map(of));
    if (pool !== scope.chosen()) return; // another one was selected meanwhile
    const found = all.flat().toSorted((a, b) => (a.at < b.at ? 1 : -1)).slice(0, MOST);
    const none = empty("No changes yet", "Changes of limits and weights, by a person or a deployment, are listed here.");
    fill(place, found.length ? found.map((one) => revision(one, pool === scope.ALL, again)) : none);
  };
  await again();
  main.append(
    h("a", { class: "back", href: link("/") }, "← Overview"),
    h("div", { class: "page-head" }, h("h1", {}, "Changes of limits"), chooser),
    h("section", { class: "card", "aria-label": "Changes of limits" }, place),
  );
}

/** Format a number, a table, or a word, as most options of a pool are. */
function shown(value) {
  if (value === null) return "none";
  if (typeof value === "number") return count(value);
  return typeof value === "string" ? value : JSON.stringify(value);
}

function revision(one, isOfAll, again) {
  const whose = isOfAll ? ` of ${one.pool}` : "";
  const undo = h("button", { class: "button small", type: "button", needs: "operator", "aria-label": `Undo revision ${one.revision}${whose}` }, "Undo");
  undo.addEventListener("click", () => undone(one, one.pool, again));
  const rows = one.changes.map(({ key, before, after }) =>
    h("li", {}, h("code", {}, key.replace(/^limits\./, "")), " ", h("del", {}, shown(before)), " → ", h("ins", {}, shown(after))),
  );
  const canUndo = one.changes.length > 0 && !one.more && one.changes.every(({ key }) => key !== "bands");
  return h(
    "article",
    { class: "revision", data: { revision: one.revision } },
    h(
      "div",
      { class: "revision-head" },
      h("h2", {}, `Revision ${one.revision}${whose}`),
      h("span", { class: "quiet-text" }, `${time(one.at)}, ${one.set_by}${one.reason ? `: ${one.reason}` : ""}`),
      h("span", { class: "end" }, canUndo && undo),
    ),
    h("ul", { class: "changes" }, rows),
    one.more > 0 && h("p", { class: "quiet-text" }, `and ${count(one.more)} more: tidegate limits history --pool ${one.pool}`),
  );
}

/** Undo the changes of a revision; rejected if one of the values was changed again since. */
async function undone(one, pool, again) {
  const reason = field("reason", "Reason (recorded)", { maxlength: 500, value: `undo of revision ${one.revision}` });
  const back = one.changes.filter(({ before }) => before !== null);
  const done = await confirm({
    title: `Undo revision ${one.revision}?`,
    text: "A new revision restores the earlier values in all processes within a second. It is rejected if one of them was changed again since.",
    fields: [reason],
    action: "Undo",
    act: (values) =>
      patch(
        "admin/limits",
        {
          set: Object.fromEntries(back.map(({ key, before }) => [key, before])),
          remove: one.changes.filter(({ before }) => before === null).map(({ key }) => key),
          expected: Object.fromEntries(one.changes.map(({ key, after }) => [key, after])),
          by: "dashboard",
          reason: values.reason,
        },
        { query: { pool } },
      ),
  });
  if (done === null) return;
  toast(`Revision ${one.revision} is undone.`);
  await again();
}
