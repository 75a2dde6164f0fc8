// Usage and cost by day, and by tenant, key, model or upstream; comparisons with providers'
// reports.

import { allKeys, get, Problem } from "../api.js";
import { BOOK_HEADS, bookRow, bookText } from "../books.js";
import { dayColumns, dayWords, MOST_PARTS } from "../days.js";
import { fill, h, mark, say } from "../dom.js";
import { csv, save } from "../export.js";
import { brief, count, counted, money, percent } from "../format.js";
import { listed } from "../listed.js";
import { link, note } from "../router.js";
import * as scope from "../scope.js";
import { choice, failed, loading, toast } from "../ui.js";
import { requestsIn } from "./request_filters.js";

const RANGES = { 7: "Last 7 days", 30: "Last 30 days", month: "This month", last: "Last month", 90: "Last 90 days", own: "Custom range" };
const GROUPS = { tenant: "Tenant", key: "Key", model: "Model", upstream: "Upstream", day: "Day" };
const MEASURES = { cost: "Cost", tokens: "Tokens", requests: "Requests" };
const DAY_MS = 86_400_000;
const MOST_DAYS = 400; // columns
const MOST_ROWS = 5_000; // groups by day, read and drawn in one interaction
const NONE = { tenant: "(none)", key: "No key", model: "(none)", upstream: "(none)", day: "" };
const COLUMNS = [
  ...["requests", "input_tokens", "cached_tokens", "output_tokens", "thoughts_tokens", "images", "searches"],
  ...["cost_usd", "unpriced", "partial", "estimated", "unknown"],
];

const dollars = (micros) => money(micros / 1e6);
const AMOUNTS = {
  cost: [(one) => one.cost_micros, dollars],
  tokens: [(one) => one.input_tokens + outputOf(one), brief],
  requests: [(one) => one.requests, brief],
};

export async function open(main, { query, signal }) {
  const { pools } = await get("dashboard/session", { signal });
  scope.amongRecorded(pools, query.get("upstream"));
  const view = viewOf(query);
  const upstreams = scope.scopeSwitch((upstream) => change({ upstream }));
  const place = h("div", { class: "card-place" });
  const total = h("p", { class: "usage-total", role: "status" });
  const columns = dayColumns((day) => change({ range: "own", since: day, until: day }));
  const books = listed("Reconciliations", BOOK_HEADS, bookText, bookRow, {
    none: [
      "No day in this range was reconciled",
      "tidegate reconcile openai --day 2026-11-24 compares a day with the provider's own costs, by model. With RECONCILE=openai,anthropic the workers do this each night.",
    ],
  });
  const body = h("div", { class: "usage overview" }, columns.element, place, books.element);
  const controls = controlsOf(view, change);
  const reading = loading(8);
  let round = new AbortController();

  function change(values) {
    if (values.upstream !== undefined) scope.amongRecorded(pools, values.upstream);
    Object.assign(view, values);
    note({ ...view });
    controls.show();
    upstreams.show();
    return again();
  }

  async function again() {
    round.abort();
    round = new AbortController();
    const within = AbortSignal.any([signal, round.signal]);
    mark(body, "aria-busy", "true");
    try {
      const span = spanOf(view);
      const [found, compared] = await Promise.all([read(view, span, within), get("admin/reconciliations", { query: { ...span, upstream: view.upstream }, signal: within })]);
      [columns.element.hidden, books.element.hidden] = [false, false];
      draw(found, span);
      books.show(compared.items);
      mark(body, "aria-busy", null);
    } catch (problem) {
      if (within.aborted) return;
      if (!(problem instanceof Problem)) throw problem;
      // Hidden, because sums of the previous selection could be mistaken for those of the current
      // one.
      fill(total);
      [columns.element.hidden, books.element.hidden] = [true, true];
      fill(place, h("section", { class: "card" }, failed(problem, again)));
      mark(body, "aria-busy", null);
    }
  }

  function draw(found, span) {
    drawTotal(total, found.total);
    columns.update(columnsOf(found, view, span));
    const table = listed(`By ${GROUPS[view.by].toLowerCase()}`, headsOf(view), (one) => one.name, (one) => row(one, view, change), {
      none: ["No usage in these days", "A request counts on the day (UTC) on which it ended."],
      acts: [csvButton(found, view, span, false), view.by !== "day" && !found.cut && csvButton(found, view, span, true)].filter(Boolean),
    });
    const [amount] = AMOUNTS[view.measure];
    const whole = Math.max(1, amount(found.total));
    table.show(found.groups.map((one) => ({ ...one, share: amount(one) / whole })).toSorted(orderOf(view)));
    fill(place, table.element);
  }

  main.append(h("div", { class: "page-head" }, h("h1", {}, "Usage"), upstreams.element, controls.element), reading);
  if (view.upstream) note({ ...view }); // as chosen elsewhere
  await again();
  reading.replaceWith(total, body); // together, so that none of them moves another
}

function viewOf(query) {
  const among = (name, options, usual) => (Object.hasOwn(options, query.get(name)) ? query.get(name) : usual);
  return {
    by: among("by", GROUPS, "tenant"),
    range: among("range", RANGES, "30"),
    measure: among("measure", MEASURES, "cost"),
    tenant: query.get("tenant") ?? "",
    upstream: scope.narrowed(),
    since: query.get("since") ?? "",
    until: query.get("until") ?? "",
  };
}

const today = () => new Date().toISOString().slice(0, 10);
const startOf = (day) => Date.parse(`${day}T00:00:00Z`);
const later = (day, by) => new Date(startOf(day) + by * DAY_MS).toISOString().slice(0, 10);

/** Return the number of days from the first to the last. */
const daysIn = ({ since, until }) => Math.round((startOf(until) - startOf(since)) / DAY_MS) + 1;

/** Return the first and the last day, in UTC. */
function spanOf({ range, since, until }) {
  const now = today();
  const first = `${now.slice(0, 7)}-01`;
  if (range === "own") return { since: since || until || now, until: until || now };
  if (range === "month") return { since: first, until: now };
  if (range === "last") return { since: `${later(first, -1).slice(0, 7)}-01`, until: later(first, -1) };
  return { since: later(now, 1 - Number(range)), until: now };
}

function controlsOf(view, change) {
  const range = h("select", { "aria-label": "Days" }, Object.entries(RANGES).map(([value, words]) => h("option", { value }, words)));
  const [since, until] = [["since", "From"], ["until", "To"]].map(([name, label]) => {
    const input = h("input", { type: "date", "aria-label": label, max: today() });
    input.addEventListener("change", () => input.value && change({ [name]: input.value }));
    return input;
  });
  const drop = h("button", { class: "button small", type: "button" });
  const by = h("div", {});
  const measure = h("div", {});
  range.addEventListener("change", () => change({ range: range.value, ...(range.value === "own" ? spanOf(view) : { since: "", until: "" }) }));
  drop.addEventListener("click", () => change({ tenant: "" }));
  function show() {
    range.value = view.range;
    for (const [input, value] of [[since, view.since], [until, view.until]]) {
      input.hidden = view.range !== "own";
      if (input.value !== value) input.value = value;
    }
    drop.hidden = !view.tenant;
    say(drop, `${view.tenant} ✕`);
    mark(drop, "aria-label", `Remove the filter on the tenant ${view.tenant}`);
    for (const [group, chosen] of [[by, view.by], [measure, view.measure]]) {
      for (const button of group.querySelectorAll("button")) mark(button, "aria-pressed", String(button.value === chosen));
    }
  }
  fill(by, choice("Group by", GROUPS, view.by, (chosen) => change({ by: chosen })));
  fill(measure, choice("Measure", MEASURES, view.measure, (chosen) => change({ measure: chosen })));
  show();
  return { element: h("div", { class: "usage-span end" }, drop, since, until, range, by, measure), show };
}

/** Read the sums by group, and by day and group; if there are too many rows, by day of the largest groups. */
async function read(view, span, signal) {
  const of = (by, only = {}) => get("admin/usage", { query: { by, ...span, tenant: view.tenant, upstream: view.upstream, ...only }, signal });
  const [names, groups, all] = await Promise.all([
    view.by === "key" ? keyNames(signal) : null,
    view.by === "day" ? null : of(view.by),
    of("day"),
  ]);
  const nameOf = (one) => (names ? (names.get(one.key) ?? one.key) : one[view.by]) || NONE[view.by];
  const named = (rows) => rows.map((one) => ({ ...one, name: nameOf(one) }));
  if (view.by === "day") {
    const { rows, total, cut } = all;
    return { groups: named(rows), days: rows.map((one) => ({ ...one, name: "All" })), total, cut };
  }
  if (!groups.cut && groups.rows.length * daysIn(span) <= MOST_ROWS) {
    const found = await of(`${view.by},day`);
    return { groups: named(groups.rows), days: named(found.rows), total: groups.total, cut: false };
  }
  const whole = { groups: named(groups.rows), total: all.total, cut: true };
  if (!["tenant", "upstream"].includes(view.by)) return { ...whole, days: all.rows.map((one) => ({ ...one, name: "All" })) };
  const [amount] = AMOUNTS[view.measure];
  const largest = groups.rows.filter((one) => one[view.by] && amount(one)).toSorted((a, b) => amount(b) - amount(a)).slice(0, MOST_PARTS);
  const found = await Promise.all(largest.map((one) => of("day", { [view.by]: one[view.by] })));
  const parts = found.flatMap(({ rows }, at) => rows.map((one) => ({ ...one, name: nameOf(largest[at]) })));
  const others = groups.cut ? "All others" : `${count(groups.rows.length - largest.length)} others`;
  return { ...whole, days: parts, others: { name: others, days: all.rows } };
}

async function keyNames(signal) {
  const keys = await allKeys(signal);
  return new Map(keys.map((one) => [one.prefix, one.name ? `${one.name} (tg_${one.prefix})` : `tg_${one.prefix}`]));
}

function columnsOf(found, view, span) {
  const [amount, format] = AMOUNTS[view.measure];
  const days = daysIn(span);
  const most = Math.min(days, MOST_DAYS);
  const shown = Array.from({ length: most }, (_, at) => later(span.until, at + 1 - most));
  const places = new Map(shown.map((day, at) => [day, at]));
  const parts = new Map();
  for (const one of found.days) {
    if (!places.has(one.day)) continue;
    if (!parts.has(one.name)) parts.set(one.name, { name: one.name, values: shown.map(() => 0) });
    parts.get(one.name).values[places.get(one.day)] += amount(one);
  }
  const title = `${MEASURES[view.measure]} by day${shown.length < days ? `, the last ${count(MOST_DAYS)}` : ""}`;
  const drawn = fewest([...parts.values()]);
  if (found.others) drawn.push(rest(found.others, drawn, places, amount));
  return { title, days: shown, parts: drawn.filter((one) => one.values.some(Boolean)), format };
}

/** The part of all days that no other part has. */
function rest({ name, days }, parts, places, amount) {
  const values = Array.from(places, () => 0);
  for (const one of days) if (places.has(one.day)) values[places.get(one.day)] = amount(one);
  return { name, values: values.map((value, at) => Math.max(0, value - parts.reduce((sum, one) => sum + one.values[at], 0))) };
}

/** Return the largest parts, and the sum of all others as one part. */
function fewest(parts) {
  const size = (one) => one.values.reduce((sum, value) => sum + value, 0);
  const sorted = parts.filter(size).toSorted((a, b) => size(b) - size(a));
  if (sorted.length <= MOST_PARTS) return sorted;
  const rest = sorted.slice(MOST_PARTS);
  const values = rest[0].values.map((_, at) => rest.reduce((sum, one) => sum + one.values[at], 0));
  return [...sorted.slice(0, MOST_PARTS), { name: `${count(rest.length)} others`, values }];
}

function drawTotal(place, total) {
  const doubts = [
    [total.unpriced, "without a price", "Their models have no price, so they add nothing to the cost"],
    [total.estimated, "estimated", "Calls without reported usage, charged by an estimate"],
    [total.partial, "partly known", "Interrupted calls, charged for the usage that the provider reported"],
    [total.unknown, "unknown", "Calls of unknown usage, which add nothing to the cost"],
  ];
  fill(
    place,
    h("strong", {}, dollars(total.cost_micros)),
    h("span", {}, `${counted(total.requests, "request")}, ${brief(total.input_tokens)} tokens in, ${brief(outputOf(total))} out`),
    doubts.filter(([amount]) => amount).map(([amount, words, title]) => h("span", { class: "badge warn", title }, `${count(amount)} ${words}`)),
  );
}

function outputOf(one) {
  return one.output_tokens + one.thoughts_tokens;
}

const headsOf = (view) => [
  [GROUPS[view.by], ""],
  ["Requests", "number wide"],
  ["Tokens in", "number wide"],
  ["Cached", "number wide"],
  ["Tokens out", "number wide"],
  ["Cost", "number"],
  [`Share of ${MEASURES[view.measure].toLowerCase()}`, "wide"],
];

function orderOf(view) {
  const [amount] = AMOUNTS[view.measure];
  if (view.by === "day") return (a, b) => (a.day < b.day ? 1 : -1);
  return (a, b) => amount(b) - amount(a) || (a.name < b.name ? -1 : 1);
}

function row(one, view, change) {
  const bar = h("i", {});
  const priced = one.unpriced && !one.cost_micros ? "no price" : dollars(one.cost_micros);
  bar.style.width = `${Math.round(100 * one.share)}%`;
  return h(
    "tr",
    { data: { group: one[view.by] } },
    h("th", { scope: "row", class: "name", title: one.name }, nameIn(one, view, change)),
    h("td", { class: "number wide" }, count(one.requests)),
    h("td", { class: "number wide", title: `${count(one.input_tokens)} tokens` }, brief(one.input_tokens)),
    h("td", { class: "number wide" }, one.input_tokens ? percent(one.cached_tokens / one.input_tokens) : ""),
    h("td", { class: "number wide", title: `${count(outputOf(one))} tokens` }, brief(outputOf(one))),
    h("td", { class: "number", title: one.unpriced ? `${counted(one.unpriced, "request")} without a price` : null }, priced),
    h("td", { class: "wide" }, h("div", { class: "usage-share" }, h("span", {}, one.share > 0 && one.share < 0.01 ? "< 1 %" : percent(one.share)), h("div", {}, bar))),
  );
}

/**
 * Return a link for a name: a tenant to its models, a day to itself, a model to its requests of
 * these days.
 */
function nameIn(one, view, change) {
  if (view.by === "model" && one.model) {
    const { since, until } = spanOf(view);
    const href = requestsIn(startOf(since), startOf(later(until, 1)), { model: one.model, tenant: view.tenant, upstream: view.upstream });
    return h("a", { href, title: `Requests of ${one.name}` }, one.name);
  }
  const next = { tenant: { tenant: one.tenant, by: "model" }, upstream: one.upstream && { upstream: one.upstream, by: "model" }, day: { range: "own", since: one.day, until: one.day, by: "tenant" } }[view.by];
  if (!next) return one.name;
  const to = h("a", { href: link("/usage", { ...view, ...next }) }, view.by === "day" ? `${dayWords(one.day)}` : one.name);
  to.addEventListener("click", (event) => {
    if (event.ctrlKey || event.metaKey || event.shiftKey) return;
    event.preventDefault();
    change(next);
  });
  return to;
}

/** A button that exports the rows of the table, or the same rows by day. */
function csvButton(found, view, span, isDaily) {
  const button = h("button", { class: "button small", type: "button" }, isDaily ? "CSV by day" : "CSV");
  const columns = [...new Set(isDaily ? ["day", view.by] : [view.by]), ...COLUMNS];
  button.addEventListener("click", () => {
    const rows = (isDaily ? found.days : found.groups).map((one) => ({ ...one, cost_usd: (one.cost_micros / 1e6).toFixed(6) }));
    save(`usage-${view.by}${isDaily ? "-by-day" : ""}-${span.since}-${span.until}`, "csv", csv(columns, rows));
    toast(`${count(rows.length)} rows exported.`);
  });
  return button;
}
