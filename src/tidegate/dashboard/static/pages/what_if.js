// What if: the calls of a recorded day, replayed with changed limits and with those in force.

import { get, patch, post, Problem } from "../api.js";
import { chart, stack } from "../chart.js";
import { fill, h, mark, say } from "../dom.js";
import { brief, count, counted, length, NOTHING, percent } from "../format.js";
import { listed } from "../listed.js";
import { link, note } from "../router.js";
import * as scope from "../scope.js";
import { confirm, empty, field, said, toast } from "../ui.js";
import { limitsToChange, written } from "./what_if_limits.js";

const DAY_MS = 86_400_000;
const LOOKED_BACK_DAYS = 30;
const MOST_DAYS = 8; // so that the same weekday of last week is included
const LINES = ["--chart-1", "--chart-2", "--chart-3", "--chart-5", "--chart-7"];
const HEADS = [
  ["Tenant", ""],
  ["Calls", "number wide"],
  ["p50 recorded", "number wide"],
  ["p50 now", "number wide"],
  ["p50 changed", "number wide"],
  ["p99 recorded", "number wide"],
  ["p99 now", "number"],
  ["p99 changed", "number"],
  ["Rejected now", "number wide"],
  ["Rejected changed", "number wide"],
];
const TEACHES = [
  "Choose a day and a new value",
  "The calls of that day are simulated with the limits in force and with the new values. No limit is changed, and no provider is called.",
];

export async function open(main, { query, signal }) {
  const { pools } = await get("dashboard/session", { signal });
  scope.among(pools);
  // The page is about one upstream, whatever is selected for the other pages.
  const asked = query.get("pool");
  const view = { pool: pools.includes(asked) ? asked : scope.chosen() || pools[0], from: Number(query.get("from") ?? 0), until: Number(query.get("until") ?? 24) };
  const days = await recordedDays(signal);
  view.day = query.get("day") || days[0]?.day || today();
  const limits = limitsToChange(view.pool, written(query.get("set") ?? ""), noted, signal);
  const when = span(view, days, noted);
  const go = h("button", { class: "button main", type: "submit" }, "Rehearse");
  const stop = h("button", { class: "button", type: "button", hidden: true }, "Cancel");
  const state = h("span", { class: "quiet-text", role: "status" });
  const wrong = h("p", { class: "notice bad", role: "alert", hidden: true });
  const place = h("section", { class: "card what-if-result", "aria-label": "Result" }, teaching(days));
  let round = new AbortController();

  function noted() {
    note({ pool: pools.length > 1 ? view.pool : "", day: view.day, from: view.from || "", until: view.until === 24 ? "" : view.until, set: limits.text() });
  }

  async function run() {
    wrong.hidden = true;
    [when, limits].forEach((one) => one.complain(null));
    if (!limits.isSound() || !when.isSound()) return;
    round.abort();
    round = new AbortController();
    const within = AbortSignal.any([signal, round.signal]);
    const clock = ticking(state, within);
    [go.disabled, stop.hidden] = [true, false];
    mark(place, "aria-busy", "true");
    try {
      const changes = await limits.changes(within);
      const set = Object.fromEntries(changes.map(({ limit, after }) => [limit, after]));
      const found = await post("admin/limits/rehearse", { record: recordOf(view), set }, { query: { pool: view.pool }, signal: within });
      show(found, changes, within);
    } catch (error) {
      if (error.name === "AbortError" || within.aborted) say(state, "Cancelled.");
      else if (error instanceof Problem) refused(error);
      else throw error;
    } finally {
      clock();
      if (!signal.aborted) {
        [go.disabled, stop.hidden] = [false, true];
        mark(place, "aria-busy", null);
      }
    }
  }

  function refused(problem) {
    say(state, "");
    if ([when, limits].some((one) => one.complain(problem))) return;
    wrong.hidden = false;
    fill(wrong, said(problem));
  }

  function show(found, changes, within) {
    say(state, `${count(found.calls)} calls simulated.`);
    if (found.calls === 0) {
      say(state, "");
      fill(place, noCalls(view, days));
      return;
    }
    const apply = h("button", { class: "button main", type: "button", needs: "operator" }, "Apply");
    apply.addEventListener("click", async () => {
      if (await applied(view.pool, changes)) await limits.again();
    });
    fill(
      place,
      h("div", { class: "what-if-said" }, h("p", {}, found.sentence), apply),
      h("div", { class: "what-if-charts" }, curves(found, within)),
    );
    place.append(tenants(found));
    if (place.getBoundingClientRect().top > innerHeight / 2) place.scrollIntoView();
  }

  stop.addEventListener("click", () => round.abort());
  const chooser = h(
    "select",
    { class: "scope", "aria-label": "Upstream", hidden: pools.length < 2 },
    pools.map((one) => h("option", { value: one, selected: one === view.pool }, one)),
  );
  chooser.addEventListener("change", () => {
    scope.choose(chooser.value);
    location.hash = link("/what-if", { pool: chooser.value, day: view.day });
  });
  const form = h(
    "form",
    { class: "card card-body what-if-form", novalidate: true, "aria-label": "Simulation" },
    when.element,
    limits.element,
    wrong,
    h("div", { class: "what-if-actions" }, go, stop, state),
  );
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    if (!go.disabled) run();
  });
  await limits.again();
  main.append(
    h(
      "div",
      { class: "page-head" },
      h("h1", {}, "What if"),
      chooser,
      h("span", { class: "quiet-text" }, "Simulate other limits on a recorded day"),
    ),
    form,
    place,
  );
}

const today = () => new Date().toISOString().slice(0, 10);

/** `2026-11-24`, or hours of that day: `2026-11-24T9-17` */
const recordOf = ({ day, from, until }) => (from === 0 && until === 24 ? day : `${day}T${from}-${until}`);

/** Return the days with requests, newest first. */
async function recordedDays(signal) {
  const since = new Date(Date.now() - LOOKED_BACK_DAYS * DAY_MS).toISOString().slice(0, 10);
  const { rows } = await get("admin/usage", { query: { by: "day", since, until: today() }, signal });
  return rows.filter((one) => one.requests > 0).toSorted((a, b) => (a.day < b.day ? 1 : -1));
}

const dayWords = new Intl.DateTimeFormat("en-GB", { weekday: "short", day: "numeric", month: "short", timeZone: "UTC" });

/** Fields for the day and its hours; `isSound()` validates them. */
function span(view, days, noted) {
  const day = field("record", "Day (UTC)", { type: "date", value: view.day, max: today() });
  const hours = (from, to) => Object.fromEntries(Array.from({ length: to - from + 1 }, (_, at) => [from + at, `${String(from + at).padStart(2, "0")}:00`]));
  const from = field("from", "From", { options: hours(0, 23), value: String(view.from) });
  const until = field("until", "Until", { options: hours(1, 24), value: String(view.until) });
  const quick = days.slice(0, MOST_DAYS).map((one) => {
    const words = `${dayWords.format(new Date(`${one.day}T00:00:00Z`))}, ${brief(one.requests)}`;
    const button = h("button", { class: "button small", type: "button", title: `${counted(one.requests, "request")} ended on ${one.day}` }, words);
    button.addEventListener("click", () => {
      day.input.value = one.day;
      changed();
    });
    return button;
  });
  function changed() {
    Object.assign(view, { day: day.value(), from: Number(from.value()), until: Number(until.value()) });
    noted();
  }
  [day, from, until].forEach((one) => one.input.addEventListener("change", changed));
  return {
    element: h(
      "div",
      { class: "what-if-span" },
      day.element,
      from.element,
      until.element,
      quick.length > 0 && h("div", { class: "what-if-days", role: "group", "aria-label": "Days with requests" }, h("span", { class: "quiet-text" }, "Requests by day"), quick),
    ),
    isSound() {
      changed();
      if (!view.day) day.complain("Choose a day.");
      else if (view.from >= view.until) until.complain("Must be later than From.");
      else return true;
      return false;
    },
    complain(problem) {
      [day, from, until].forEach((one) => one.complain(""));
      if (problem?.field !== "record") return false;
      day.complain(said(problem));
      return true;
    },
  };
}

function teaching(days) {
  if (days.length) return empty(...TEACHES);
  return empty(
    "No calls on record yet",
    "Calls can be simulated once they have ended and are on record. Send some calls first, or describe a load in a file:",
    h("code", {}, "tidegate rehearse load.toml"),
    h("a", { href: link("/try") }, "Send a call"),
  );
}

function noCalls(view, days) {
  if (!days.length) return teaching(days);
  const had = days.slice(0, 3).map((one) => one.day);
  return empty(
    `No calls of ${view.pool} on record in that time`,
    `Only admitted calls are simulated. Days with requests: ${had.join(", ")}. The request log is kept for RETENTION_DAYS.`,
  );
}

/** Show the elapsed seconds until the returned function is called. */
function ticking(state, signal) {
  const began = performance.now();
  const tell = () => say(state, `Rehearsing, ${Math.floor((performance.now() - began) / 1_000)} s so far`);
  tell();
  const timer = setInterval(tell, 1_000);
  signal.addEventListener("abort", () => clearInterval(timer));
  return () => clearInterval(timer);
}

const NAMES = ["limits in force", "with the change"];

/** Return charts of waiting calls and usage, for both cases side by side on one scale. */
function curves(found, signal) {
  const begins = Date.parse(found.since);
  // The page's days are in UTC, and so are its axes.
  const shift = new Date(begins).getTimezoneOffset() * 60;
  const at = (ms) => (begins + ms) / 1_000 + shift;
  const most = Math.max(1, ...found.cases.map(mostWaiting));
  const rows = [[], []];
  found.cases.forEach((one, number) => {
    const times = [...one.at_ms.map(at), at(found.end_ms)];
    const to = ({ values }) => [...values, 0];
    const waiting = stack(`Waiting, ${NAMES[number]}`, brief, { signal, least: most * 1.08, peaks: true });
    waiting.update(times, one.waiting.map((curve) => [curve.name, to(curve)]));
    const shown = one.used.length ? one.used : [{ name: "nothing in use", values: one.at_ms.map(() => 0) }];
    const used = chart(`In use, ${NAMES[number]}`, shown.map(({ name }, line) => [name, LINES[line]]), percent, { signal, least: 1, peaks: true });
    used.update(times, shown.map(to));
    rows[0].push(waiting.element);
    rows[1].push(used.element);
  });
  return rows;
}

const mostWaiting = (one) => Math.max(0, ...one.at_ms.map((_, at) => one.waiting.reduce((sum, { values }) => sum + values[at], 0)));

function tenants(found) {
  const more = found.more_tenants ? `, and ${count(found.more_tenants)} more with shorter waits` : "";
  const list = listed("Waits by tenant", HEADS, (one) => one.tenant || "All tenants", tenantRow, {
    none: ["No tenants"],
    acts: [h("span", { class: "quiet-text" }, `Recorded, with the limits in force now, and with the change${more}`)],
  });
  list.show(found.tenants);
  return list.element;
}

function tenantRow(one) {
  const [now, changed] = [one.cases[0], one.cases.at(-1)];
  const wait = (ms) => (ms === null ? NOTHING : ms < 2 ? "0" : length(ms));
  const cell = (words, look = "number wide") => h("td", { class: look }, words);
  const compared = (before, after, words, look) =>
    h("td", { class: `${look} ${after < before * 0.9 ? "better" : after > before * 1.1 ? "worse" : ""}` }, words(after));
  return h(
    "tr",
    { data: { tenant: one.tenant } },
    h("th", { scope: "row", class: "name", title: one.tenant || null }, one.tenant ? one.tenant : h("b", {}, "All tenants")),
    cell(count(one.calls)),
    cell(wait(one.recorded_p50_ms)),
    cell(wait(now.p50_ms)),
    compared(now.p50_ms, changed.p50_ms, wait, "number wide"),
    cell(wait(one.recorded_p99_ms)),
    cell(wait(now.p99_ms), "number"),
    compared(now.p99_ms, changed.p99_ms, wait, "number"),
    cell(count(now.refused)),
    compared(now.refused, changed.refused, count, "number wide"),
  );
}

const bound = (value) => (typeof value === "object" ? value.bound : value);

/** Put the changes in force, by the same route as all changes of limits. */
async function applied(pool, changes) {
  const reason = field("reason", "Reason (recorded)", { maxlength: 500, value: "rehearsed" });
  const rows = changes.map(({ limit, before, after }) =>
    h("li", {}, h("code", {}, limit), " ", h("del", {}, count(bound(before))), " → ", h("ins", {}, count(bound(after)))),
  );
  const done = await confirm({
    title: changes.length === 1 ? `Apply the new ${changes[0].limit}?` : `Apply ${count(changes.length)} changes?`,
    text: "Takes effect in all processes within a second. Lowering a limit cancels no call.",
    more: [h("ul", { class: "what-if-diff", "aria-label": "Changes" }, rows)],
    fields: [reason],
    action: "Apply",
    act: ({ reason: why }) => {
      const values = (of) => Object.fromEntries(changes.map((one) => [`limits.${one.limit}`, one[of]]));
      return patch("admin/limits", { set: values("after"), expected: values("before"), by: "dashboard", reason: why }, { query: { pool } });
    },
  });
  if (done !== null) toast("The new limits are in force.");
  return done !== null;
}

