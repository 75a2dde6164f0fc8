// The queue by tenant, and whether each tenant gets the share of its weight.

import { put } from "../../api.js";
import { h, keyed, mark, say } from "../../dom.js";
import { NOTHING, brief, count, percent } from "../../format.js";
import { link } from "../../router.js";
import { ALL } from "../../scope.js";
import { confirm, empty, field, toast } from "../../ui.js";

// The measure of shares: the field of a tenant's usage, and its heading.
const MEASURES = {
  seconds: ["upstream_ms", "Share of upstream time"],
  calls: ["calls", "Share of calls"],
  cost: ["cost_micros", "Share of cost"],
};

/** A card of tenants; `find(limit)` shows a limit. */
export function tenantsCard(pool, find) {
  const body = h("tbody");
  const draw = keyed(body, (first) => row(first.tenant, pool, find));
  const nobody = h("div", {}, empty("No calls", "Tenants with calls in this time, or that wait, are shown here."));
  const heads = [
    ["Tenant", ""],
    ["Waiting", "number"],
    ["Waits for", "wide"],
    ["Weight", "number"],
    [MEASURES.seconds[1], "shares"],
    ["", "actions"],
  ].map(([words, kind]) =>
    h("th", { scope: "col", class: kind }, words || h("span", { class: "visually-hidden" }, "Actions")),
  );
  const table = h(
    "table",
    { class: "table tenants" },
    h("thead", {}, h("tr", {}, heads)),
    body,
  );
  const span = h("span", { class: "quiet-text" });
  const more = h("span", { class: "quiet-text" });
  let live = null;
  let past = null;
  const weights = new Map(); // seen live since the last update of the past, which has older ones
  let order = new Map();

  // The order is kept between two updates of the past, so that rows do not move every second.
  function show(fresh = false) {
    const rows = merged(live, past, weights);
    if (fresh || rows.some((one) => !order.has(one.tenant))) {
      order = new Map(rows.map((one, place) => [one.tenant, place]));
    }
    rows.sort((a, b) => order.get(a.tenant) - order.get(b.tenant));
    nobody.hidden = rows.length > 0;
    table.hidden = rows.length === 0;
    draw(rows, (one) => one.tenant);
  }

  return {
    element: h(
      "section",
      { class: "card", "aria-label": "Tenants" },
      h("div", { class: "card-head" }, h("h2", {}, "Tenants"), span, more),
      nobody,
      h("div", { class: "scroll", tabindex: "0", role: "group", "aria-label": "Tenants, a table" }, table),
    ),
    live(frame) {
      live = frame;
      for (const one of live.tenants ?? []) weights.set(one.tenant, one.weight);
      say(more, live.more_tenants ? `${count(live.more_tenants)} more wait` : "");
      say(table.querySelector("th.shares"), measure(live)[1]);
      show();
    },
    trend(frame) {
      past = frame;
      weights.clear();
      say(span, `shares of the last ${frame.words}`);
      show(true);
    },
  };
}

const measure = (frame) => MEASURES[frame?.fair_by] ?? MEASURES.seconds;

/**
 * Return waiting tenants and those with calls, longest queue first, with the shares of those with
 * calls.
 */
function merged(live, past, newer) {
  const rows = new Map();
  for (const one of past?.tenants ?? []) {
    const used = one[measure(live)[0]];
    const weight = one.weight !== null && newer.has(one.name) ? newer.get(one.name) : one.weight;
    rows.set(one.name, { tenant: one.name, waiting: 0, weight, used });
  }
  for (const one of live?.tenants ?? []) {
    const known = rows.get(one.tenant) ?? { used: 0 };
    rows.set(one.tenant, { ...known, ...one, weight: known.weight === null ? null : one.weight });
  }
  const all = [...rows.values()].filter((one) => one.tenant !== "");
  const whole = all.reduce((sum, one) => sum + one.used, 0);
  const isOne = all.every((one) => one.weight !== null); // otherwise there is no fair share over all upstreams
  const weights = isOne ? all.reduce((sum, one) => sum + one.weight, 0) : 0;
  for (const one of all) {
    one.got = whole ? one.used / whole : null;
    one.due = weights ? one.weight / weights : null;
  }
  return all.sort((a, b) => b.waiting - a.waiting || b.used - a.used || (a.tenant < b.tenant ? -1 : 1));
}

function row(tenant, pool, find) {
  let latest = null;
  const waiting = h("td", { class: "number" });
  const limit = h("button", { class: "as-link", type: "button", title: "Show this limit" });
  limit.addEventListener("click", () => find(latest.held_up_by));
  const itself = h("span", { class: "quiet-text" });
  const heldUp = h("td", { class: "wide" }, limit, itself);
  const weight = h("td", { class: "number" });
  const got = h("div", { class: "share-got" });
  const due = h("div", { class: "share-due" });
  const said = h("span", { class: "figures" });
  const change = h("button", { class: "button quiet small", type: "button", needs: "admin" }, "Weight");
  change.setAttribute("aria-label", `Change the weight of ${tenant}`);
  change.addEventListener("click", () => changeWeight(pool(), latest));
  const measured = () => mark(change, "hidden", pool() === ALL ? "" : null);
  const element = h(
    "tr",
    { data: { tenant } },
    h(
      "th",
      { scope: "row", class: "name" },
      h("a", { href: link("/requests", { tenant }), title: `Requests of ${tenant}` }, tenant),
    ),
    waiting,
    heldUp,
    weight,
    h("td", { class: "shares" }, h("div", { class: "share" }, h("div", { class: "share-bar" }, got, due), said)),
    h("td", { class: "actions" }, change),
  );
  return {
    element,
    update(one) {
      latest = one;
      measured(); // each upstream has its own weights
      say(waiting, brief(one.waiting));
      mark(waiting, "data-some", one.waiting > 0);
      say(limit, (one.waiting && one.held_up_by) || "");
      mark(limit, "aria-label", one.held_up_by ? `Show the limit ${one.held_up_by}, which ${tenant} waits for` : null);
      limit.hidden = !limit.textContent;
      say(itself, one.waiting ? (one.held_up_by ? "" : "its process") : NOTHING);
      say(weight, one.weight === null ? NOTHING : count(one.weight));
      mark(weight, "title", one.weight === null ? "Differs by upstream" : null);
      got.style.width = `${(one.got ?? 0) * 100}%`;
      due.style.left = `${(one.due ?? 0) * 100}%`;
      due.hidden = one.due === null;
      const fair = one.due === null ? "" : `, fair ${percent(one.due)}`;
      say(said, one.got === null ? NOTHING : `${percent(one.got)}${fair}`);
    },
  };
}

function changeWeight(pool, one) {
  const weight = field("weight", "Weight, from 1 to 1,000", {
    type: "number",
    value: String(one.weight),
    hint: "Its share while tenants compete: weight 2 gets twice as much as weight 1.",
  });
  return confirm({
    title: `Weight of ${one.tenant}`,
    fields: [weight],
    action: "Change the weight",
    act: async (values) => {
      await put(
        `admin/tenants/${encodeURIComponent(one.tenant)}`,
        // Another operator may have changed it since the dialog opened.
        { weight: values.weight, expected: { weight: one.weight }, by: "dashboard" },
        { query: { pool } },
      );
      toast(`The weight of ${one.tenant} is ${count(values.weight)} now.`);
    },
  });
}
