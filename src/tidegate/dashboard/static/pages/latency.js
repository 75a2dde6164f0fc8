// A day by the hour: how long requests waited and took, which hours were slow, and where the time
// went.

import { get, Problem } from "../api.js";
import { dayColumns } from "../days.js";
import { fill, h, mark } from "../dom.js";
import { count, length, percent, time } from "../format.js";
import { link, note } from "../router.js";
import * as scope from "../scope.js";
import { may } from "../session.js";
import { choice, empty, failed, loading } from "../ui.js";
import { requestsIn } from "./request_filters.js";

const HOUR_MS = 3_600_000;
const DAYS = 8; // so that the same weekday of last week is included
const MOST_ACTIONS = 20;
const SLOW_TIMES = 2; // times the usual value
const SLOW_BY_MS = 500;
const LEAST_SAMPLED = 50; // minimum sampled requests to judge an hour
const MOST_SHARE = 0.5; // minimum share for which a tenant or an upstream is named
const OF = { tenant: "Tenant", upstream: "Upstream", model: "Model", type: "Type", error: "Error" };
const SPENT = {
  waited: ["Waiting for admission", "Requests waited for a limit, or for their turn at it"],
  called: ["At the upstream", "The upstream itself was slow"],
  between: ["Before retries", "Calls failed and were retried"],
};

export async function open(main, { query, signal }) {
  const { pools } = await get("dashboard/session", { signal });
  scope.amongRecorded(pools, query.get("upstream"));
  const upstreams = scope.scopeSwitch((upstream) => change({ upstream })).element;
  const view = { upstream: scope.narrowed(), day: /^\d{4}-\d\d-\d\d$/.test(query.get("day")) ? query.get("day") : localDay(-1) };
  const body = h("div", { class: "usage overview" });
  const other = h("input", { type: "date", "aria-label": "Another day", max: localDay(0) });
  const buttons = Object.fromEntries(Array.from({ length: DAYS }, (_, at) => localDay(at + 1 - DAYS)).map((day) => [day, weekday(day)]));
  const days = choice("Day", buttons, view.day, (day) => change({ day }));
  let round = new AbortController();

  other.addEventListener("change", () => other.value && change({ day: other.value }));
  function change(values) {
    Object.assign(view, values);
    note(view);
    return again();
  }

  async function again() {
    round.abort();
    round = new AbortController();
    const within = AbortSignal.any([signal, round.signal]);
    other.value = view.day;
    for (const one of days.children) mark(one, "aria-pressed", String(one.value === view.day));
    mark(body, "aria-busy", "true");
    try {
      const { since, until } = spanOf(view.day);
      const [found, actions] = await Promise.all([
        get("admin/latency", { query: { since: spanOf(shifted(view.day, -1)).since, until, upstream: view.upstream }, signal: within }),
        may("admin") ? get("admin/actions", { query: { since, until, limit: MOST_ACTIONS }, signal: within }) : { items: [] },
      ]);
      draw(body, view.day, found, actions.items);
    } catch (problem) {
      if (within.aborted) return;
      if (!(problem instanceof Problem)) throw problem;
      fill(body, h("section", { class: "card" }, failed(problem, again)));
    }
    mark(body, "aria-busy", null);
  }

  if (view.upstream) note(view); // as chosen elsewhere
  fill(body, loading());
  main.append(
    h("a", { class: "back", href: link("/") }, "← Overview"),
    h("div", { class: "page-head" }, h("h1", {}, "Latency"), upstreams, h("div", { class: "usage-span end" }, days, other)),
    body,
  );
  await again();
}

const pad = (number) => String(number).padStart(2, "0");
const dateOf = (at) => `${at.getFullYear()}-${pad(at.getMonth() + 1)}-${pad(at.getDate())}`;
const midnight = (day) => new Date(`${day}T00:00:00`);

function shifted(day, by) {
  const at = midnight(day);
  at.setDate(at.getDate() + by);
  return dateOf(at);
}

const localDay = (by) => shifted(dateOf(new Date()), by);
const weekday = (day) => midnight(day).toLocaleDateString("en-GB", { weekday: "short", day: "numeric" });
const spanOf = (day) => ({ since: midnight(day).toISOString(), until: midnight(shifted(day, 1)).toISOString() });
const clock = (ms) => `${pad(new Date(ms).getHours())}:${pad(new Date(ms).getMinutes())}`;
const startOf = (hour) => new Date(hour.at).getTime();

/**
 * The usual 95th percentile of an hour: the lower of the medians of this day and the day before.
 */
function usualOf(...days) {
  const medians = days.filter((hours) => hours.length).map((hours) => hours.map((one) => one.took_ms.p95).toSorted((a, b) => a - b)[(hours.length - 1) >> 1]);
  return Math.min(...medians);
}

function draw(body, day, found, actions) {
  const begin = midnight(day).getTime();
  const [before, hours] = [found.hours.filter((one) => startOf(one) < begin), found.hours.filter((one) => startOf(one) >= begin)];
  if (!hours.length) {
    fill(body, h("section", { class: "card" }, empty("No requests on record for this day", "A request counts in the hour of its submission, once it has ended.")));
    return;
  }
  const usual = usualOf(hours, before);
  const about = found.one_in > 1 ? (amount) => `about ${count(amount)}` : count;
  const isJudged = (one) => found.one_in === 1 || one.sampled >= LEAST_SAMPLED;
  const isSlow = (one) => isJudged(one) && one.took_ms.p95 >= SLOW_TIMES * usual && one.took_ms.p95 - usual >= SLOW_BY_MS;
  const slow = hours.filter(isSlow);
  const columns = dayColumns((ms) => (location.hash = requestsIn(ms, ms + HOUR_MS)), clock, mean(hours, begin));
  columns.update(columnsOf(day, hours));
  fill(body, verdict(hours, slow, about), sampleNote(found.one_in, hours, about), columns.element, h("div", { class: "columns" }, hoursCard(hours, isSlow, about), whereCard(about, slow.length ? slow : hours, slow.length > 0)), actionsCard(actions));
}

const MEANS = [["waited", "waited_sum_ms"], ["called", "called_sum_ms"], ["between", "between_sum_ms"]];
const total = (hours, name) => hours.reduce((sum, one) => sum + one[name], 0);
const meanOf = (hours, name) => (hours.length ? total(hours, name) / Math.max(1, total(hours, "requests")) : 0);

function columnsOf(day, hours) {
  const [first, last] = [midnight(day).getTime(), midnight(shifted(day, 1)).getTime()];
  const starts = Array.from({ length: Math.ceil((last - first) / HOUR_MS) }, (_, at) => first + at * HOUR_MS);
  const known = new Map(hours.map((one) => [startOf(one), one]));
  const parts = MEANS.map(([name, sum]) => ({
    name: SPENT[name][0],
    values: starts.map((at) => (known.has(at) ? meanOf([known.get(at)], sum) : 0)),
  }));
  return { title: "Mean time of a request, by hour", days: starts, parts, format: length };
}

/** The mean of the day for the legend, over requests rather than hours. */
function mean(hours, first) {
  const requests = new Map(hours.map((one) => [(startOf(one) - first) / HOUR_MS, one.requests]));
  return (values) => values.reduce((sum, value, at) => sum + value * (requests.get(at) ?? 0), 0) / Math.max(1, total(hours, "requests"));
}

/** State that the figures come from a sample, if they do. */
function sampleNote(oneIn, hours, about) {
  if (oneIn === 1) return null;
  const words = `From ${count(total(hours, "sampled"))} of ${about(total(hours, "requests"))} requests, sampled evenly over the time. Counts are estimates, and rare failures may be missing. An hour with fewer than ${LEAST_SAMPLED} sampled requests is not judged.`;
  return h("p", { class: "quiet-text", data: { sample: oneIn } }, words);
}

/** State in sentences when it was slow, and why. */
function verdict(hours, slow, about) {
  const head = (health, sign, word, words) =>
    h("p", { class: "verdict-head", role: "status" }, h("span", { class: "verdict-sign", "aria-hidden": "true" }, sign), h("b", { class: "verdict-word" }, word), h("span", { class: "verdict-words" }, words));
  const worst = hours.reduce((a, b) => (b.took_ms.p95 > a.took_ms.p95 ? b : a));
  if (!slow.length) {
    const words = `no hour was slow. The highest 95th percentile of the duration was ${length(worst.took_ms.p95)}, in the hour from ${clock(startOf(worst))}.`;
    return h("section", { class: "card verdict", "aria-label": "Why", data: { health: "healthy" } }, head("healthy", "●", "As usual:", words));
  }
  const others = hours.filter((one) => !slow.includes(one));
  const grown = MEANS.map(([name, sum]) => [name, meanOf(slow, sum), meanOf(others, sum)]);
  const [most] = grown.toSorted(([, a, b], [, c, d]) => c - d - (a - b));
  const [since, until] = [startOf(slow[0]), startOf(slow.at(-1)) + HOUR_MS];
  const isWhole = (until - since) / HOUR_MS === slow.length;
  const when = isWhole ? `from ${clock(since)} to ${clock(until)}.` : `in ${count(slow.length)} hours between ${clock(since)} and ${clock(until)}.`;
  const lines = [
    `${SPENT[most[0]][1]}. Mean per request: ${grown.filter(([, ms, usual]) => Math.max(ms, usual) >= 1).map((one) => spent(one, others)).join("; ")}.`,
    sharesOf(slow, most[0]),
    failuresOf(slow, about),
  ];
  return h(
    "section",
    { class: "card verdict", "aria-label": "Why", data: { health: "degraded" } },
    head("degraded", "▲", "Slow", when),
    h("ul", { class: "causes" }, lines.filter(Boolean).map((words) => h("li", { class: "cause", data: { level: "degraded" } }, h("span", { class: "verdict-sign", "aria-hidden": "true" }, "▲"), h("div", { class: "cause-words" }, h("span", {}, words)), h("div", { class: "cause-acts" })))),
    h("p", { class: "card-body" }, h("a", { class: "button small", href: requestsIn(since, until) }, "Requests of this time")),
  );
}

const spent = ([name, ms, usual], others) => `${SPENT[name][0].toLowerCase()} ${length(ms)}${others.length ? `, at other hours ${length(usual)}` : ""}`;

/**
 * Name the largest shares: `Share of the waiting time: tenant acme 92 %, upstream gemini 100 %.`
 */
function sharesOf(slow, name) {
  const sum = name === "called" ? "called_sum_ms" : "waited_sum_ms";
  const whole = total(slow, sum);
  const found = whole ? partsOf(slow).filter((one) => one.of !== "error" && one[sum] / whole >= MOST_SHARE) : [];
  const words = found.map((one) => `${OF[one.of].toLowerCase()} ${one.name} ${percent(Math.min(1, one[sum] / whole))}`);
  return words.length ? `${name === "called" ? "Share of the time at upstreams" : "Share of the waiting time"}: ${words.join(", ")}.` : "";
}

function failuresOf(slow, about) {
  const lost = total(slow, "failed");
  const codes = partsOf(slow).filter((one) => one.of === "error").map((one) => `${one.name} ${about(one.requests)}`);
  return lost ? `${about(lost)} of ${about(total(slow, "requests"))} requests failed: ${codes.join(", ")}.` : "";
}

/** Return the summed parts of some hours, longest first. */
function partsOf(hours) {
  const found = new Map();
  for (const part of hours.flatMap((one) => one.parts)) {
    const key = `${part.of} ${part.name}`;
    const sum = found.get(key) ?? { of: part.of, name: part.name, requests: 0, waited_sum_ms: 0, called_sum_ms: 0 };
    for (const name of ["requests", "waited_sum_ms", "called_sum_ms"]) sum[name] += part[name];
    found.set(key, sum);
  }
  const order = Object.keys(OF);
  const size = (one) => one.waited_sum_ms + one.called_sum_ms;
  return [...found.values()].sort((a, b) => order.indexOf(a.of) - order.indexOf(b.of) || size(b) - size(a));
}

function tableCard(title, words, heads, rows) {
  const cells = heads.map(([text, look]) => h("th", { scope: "col", class: look }, text));
  return h(
    "section",
    { class: "card listed", "aria-label": title },
    h("div", { class: "card-head" }, h("h2", {}, title), h("span", { class: "quiet-text" }, words)),
    rows.length > 0 && h("div", { class: "scroll", tabindex: "0", role: "group", "aria-label": `${title}, a table` }, h("table", { class: "table" }, h("thead", {}, h("tr", {}, cells)), h("tbody", {}, rows))),
  );
}

const number = (text, look = "", title = null) => h("td", { class: `number ${look}`, title }, text);
const pair = ({ p50, p95 }, look = "") => number(length(p95), look, `median ${length(p50)}`);

function hoursCard(hours, isSlow, about) {
  const heads = [["Hour", ""], ["Requests", "number wide"], ["Failed", "number wide"], ["Waited", "number"], ["Upstream", "number"], ["Took", "number"]];
  const row = (one) =>
    h(
      "tr",
      { data: { hour: clock(startOf(one)) } },
      h("th", { scope: "row", class: "name" }, h("a", { href: requestsIn(startOf(one), startOf(one) + HOUR_MS), title: "Requests of this hour" }, clock(startOf(one))), " ", isSlow(one) && h("span", { class: "badge warn" }, "slow")),
      number(about(one.requests), "wide"),
      number(about(one.failed), "wide"),
      pair(one.waited_ms),
      pair(one.called_ms),
      pair(one.took_ms),
    );
  return tableCard("Hours", "95th percentiles", heads, hours.map(row));
}

function whereCard(about, hours, isSlow) {
  const heads = [["By", ""], ["Name", ""], ["Requests", "number wide"], ["Waited", "number"], ["Upstream", "number"]];
  const [since, until] = [startOf(hours[0]), startOf(hours.at(-1)) + HOUR_MS];
  const row = (one) =>
    h(
      "tr",
      { data: { of: one.of } },
      h("td", {}, OF[one.of]),
      h("th", { scope: "row", class: "name", title: one.name }, h("a", { href: requestsIn(since, until, { [one.of]: one.name }), title: "Requests of this time" }, one.name)),
      number(about(one.requests), "wide"),
      number(length(one.waited_sum_ms / one.requests)),
      number(length(one.called_sum_ms / one.requests)),
    );
  return tableCard("Breakdown", isSlow ? "of the slow hours, mean per request" : "of the day, mean per request", heads, partsOf(hours).map(row));
}

function actionsCard(items) {
  if (!may("admin")) return h("p", { class: "quiet-text" }, h("a", { href: link("/limits/history") }, "Changes of limits"));
  const heads = [["When", ""], ["Who", "wide"], ["Action", ""], ["Target", ""]];
  const row = (one) => h("tr", {}, h("td", {}, time(one.at)), h("td", { class: "wide" }, one.operator), h("td", { class: "mono" }, one.what), h("th", { scope: "row", class: "name", title: one.target }, one.target));
  return tableCard("Operator actions", items.length ? "on this day" : "none on this day", heads, items.map(row));
}
