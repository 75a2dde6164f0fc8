// Actions of operators: author, action, target, values before and after, address.

import { get } from "../api.js";
import { h } from "../dom.js";
import { ago, time } from "../format.js";
import { listed } from "../listed.js";
import { link } from "../router.js";

const MOST = 500;
const HEADS = [
  ["When", ""],
  ["Who", ""],
  ["Action", ""],
  ["Target", ""],
  ["Change", "wrap wide"],
  ["Address", "wide"],
];

export async function open(main, { query, signal }) {
  const list = listed("Actions", HEADS, textOf, row, {
    none: ["No actions yet", "Each change that a person makes is listed here, whether with a key, an account, the dashboard or a command."],
  });
  const { items } = await get("admin/actions", { query: { limit: MOST }, signal });
  list.show(items);
  list.search(query.get("search") ?? "");
  main.append(
    h("a", { class: "back", href: link("/tenants") }, "← Keys and tenants"),
    h(
      "div",
      { class: "page-head" },
      h("h1", {}, "Operator actions"),
      items.length === MOST && h("span", { class: "quiet-text" }, `the newest ${MOST}; tidegate actions lists all`),
    ),
    list.element,
  );
}

const textOf = (one) => `${one.operator} ${one.what} ${one.target} ${changeOf(one)} ${one.address}`;

function row(one) {
  return h(
    "tr",
    { data: { action: one.number } },
    h("td", { title: time(one.at) }, ago(one.at)),
    h("th", { scope: "row", class: "name", title: `As ${one.role}` }, one.operator),
    h("td", { class: "mono" }, one.what),
    h("td", { title: one.target }, one.target),
    h("td", { class: "wrap wide" }, changeOf(one)),
    h("td", { class: "wide" }, one.address),
  );
}

function shown(value) {
  if (value === null) return "none";
  return typeof value === "object" ? JSON.stringify(value) : String(value);
}

/** `weight: 1 → 3` for each difference; a revision if its history has the change. */
function changeOf({ before = {}, after = {}, revision }) {
  if (revision !== undefined) return `revision ${revision}`;
  return Object.entries(after)
    .filter(([name, value]) => shown(before[name] ?? null) !== shown(value))
    .map(([name, value]) => (name in before ? `${name}: ${shown(before[name])} → ${shown(value)}` : `${name}: ${shown(value)}`))
    .join(", ");
}
