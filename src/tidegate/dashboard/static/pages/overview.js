// What is admitted, waiting and refused now, with tenants and causes.

import { get } from "../api.js";
import { fill, h, say } from "../dom.js";
import { follow, hide } from "../feed.js";
import { brief } from "../format.js";
import { link, note } from "../router.js";
import * as scope from "../scope.js";
import * as stuck from "../stuck.js";
import { choice, failed } from "../ui.js";
import { budgetsCard } from "./overview/budgets.js";
import { charts } from "./overview/charts.js";
import { faultsCard } from "./overview/faults.js";
import { figuresStrip } from "./overview/figures.js";
import { firstSteps } from "./overview/first_steps.js";
import { limitsCard } from "./overview/limits.js";
import { processesCard, upstreamsCard } from "./overview/places.js";
import { spendCard } from "./overview/spend.js";
import { tenantsCard } from "./overview/tenants.js";
import { verdictCard } from "./overview/verdict.js";

const SPANS = { "5m": "5 min", "1h": "1 h", "24h": "24 h" };
const WORDS = { "5m": "5 minutes", "1h": "hour", "24h": "24 hours" };
// What decides the height of the cards. They are shown together, so that none moves another.
const FIRST = ["live", "trend", "events", "budgets", "record"];
const LATE_MS = 2_000; // after the verdict; a late event then moves the cards

export async function open(main, { query, signal }) {
  const session = await get("dashboard/session", { signal });
  const { pools } = session;
  scope.among(pools, query.get("pool"));
  const chosen = {
    pool: scope.chosen(),
    span: query.get("span") in SPANS ? query.get("span") : "5m",
  };
  const view = parts(chosen, session, signal);
  view.heard = loadedBy(view.element, signal);
  signal.addEventListener("abort", hide);
  let round = null;

  function choose(what) {
    Object.assign(chosen, what);
    view.narrow(chosen.pool !== scope.ALL && pools.length > 1);
    note(chosen);
    round?.abort();
    round = new AbortController();
    const both = AbortSignal.any([signal, round.signal]);
    const on = (event, data) => show(view, chosen, event, data);
    follow("dashboard/feed", { query: { ...chosen, pool: scope.narrowed() }, signal: both, on }).catch((problem) => {
      if (!signal.aborted) fill(main, failed(problem, () => location.reload()));
    });
  }

  const upstreams = scope.scopeSwitch((pool) => choose({ pool })).element;
  view.upstreamsChoice = upstreams;
  main.append(
    h(
      "div",
      { class: "page-head" },
      h("h1", {}, "Overview"),
      upstreams,
      h(
        "div",
        { class: "end" },
        choice("Charts of the last", SPANS, chosen.span, (span) => choose({ span })),
        h("a", { class: "button small", href: link("/latency"), title: "Latency by hour, tenant, upstream and model" }, "Earlier days"),
      ),
    ),
    view.element,
    view.notices,
  );
  choose({});
}

/** Return a function that takes the name of each event, and shows the cards once all are known. */
function loadedBy(element, signal) {
  const missing = new Set(FIRST);
  const loaded = () => delete element.dataset.loading;
  element.dataset.loading = "";
  let late = 0;
  signal.addEventListener("abort", () => clearTimeout(late));
  return (...events) => {
    for (const event of events) missing.delete(event);
    if (missing.size === 0) loaded();
    else if (!missing.has("live")) late ||= setTimeout(loaded, LATE_MS);
  };
}

function parts(chosen, session, signal) {
  const pool = () => chosen.pool;
  const frames = { live: null, budgets: null };
  const view = {
    frames,
    verdict: verdictCard(() => frames),
    first: firstSteps(session, signal),
    figures: figuresStrip(),
    limits: limitsCard(pool, signal),
    budgets: budgetsCard(),
    charts: charts(signal),
    tenants: tenantsCard(pool, (limit) => view.limits.find(limit)),
    faults: faultsCard(),
    spend: spendCard(),
    upstreams: upstreamsCard(pool),
    processes: processesCard(),
    notices: h("div", { class: "notices", role: "alert" }),
  };
  const { verdict, figures, limits, tenants, faults, spend, upstreams, processes } = view;
  view.element = h(
    "div",
    { class: "overview", data: { state: "loading" } },
    verdict.element,
    view.first.element,
    figures.element,
    view.charts.element,
    limits.element,
    view.budgets.element,
    h("div", { class: "columns" }, tenants.element, faults.element),
    h("div", { class: "columns" }, spend.element, upstreams.element),
    processes.element,
  );
  /** If an upstream is selected, label the cards that cover all upstreams. */
  view.narrow = (isNarrowed) => {
    for (const one of [verdict, view.budgets]) one.ofAll.hidden = !isNarrowed;
  };
  return view;
}

/** Records of the only upstream are those of all: some calls end before an upstream is chosen. */
function show(view, chosen, event, data) {
  const recorded = scope.narrowed();
  if (event === "live") {
    showLive(view, chosen, data);
    view.heard("live", ...(data.postgresql_away ? FIRST : []));
  } else if (event === "now" && data[recorded]) view.figures.now(data[recorded]);
  else if (event === "events") {
    view.charts.events(data, chosen.pool);
    view.heard("events");
  } else if (event === "budgets") {
    view.frames.budgets = data;
    view.budgets.update(data);
    view.heard("budgets");
  } else if (event === "record") {
    stuck.told(data);
    if (data.pool !== recorded) return; // of the previous selection
    view.figures.record(data);
    view.spend.record(data);
    view.first.record(data).then(() => view.heard("record"));
  } else if (event === "trend" && data.pool === recorded && data.range === chosen.span) {
    const frame = { ...data, words: WORDS[data.range] };
    for (const part of [view.charts, view.limits, view.tenants, view.faults, view.spend, view.upstreams]) {
      (part.trend ?? part.update)(frame);
    }
    view.heard("trend");
  }
}

function showLive(view, chosen, data) {
  view.frames.live = data;
  view.verdict.live(data);
  const pool = scope.within(data, chosen.pool);
  const isThere = pool !== null;
  const away = data.pools.find((one) => one.problem && (!isThere || chosen.pool === scope.ALL));
  const notices = [];
  if (away) {
    notices.push(["bad", "These are the last known figures, until Valkey answers."]);
  } else if (data.pools.some((one) => one.recovering_ms && [scope.ALL, one.pool].includes(chosen.pool))) {
    notices.push(["", "Valkey has lost its data. No call is admitted until all processes have registered their permits again."]);
  }
  if (data.postgresql_away) {
    notices.push(["bad", "Charts and spend are not updated until PostgreSQL answers."]);
  }
  const text = notices.map(([, words]) => words).join("\n");
  if (view.notices.dataset.said !== text) {
    view.notices.dataset.said = text;
    fill(view.notices, notices.map(([kind, words]) => h("p", { class: `notice ${kind}` }, words)));
  }
  view.element.dataset.state = isThere ? "live" : "stale";
  view.upstreams.live(data);
  if (!isThere) return;
  view.figures.live(pool);
  view.limits.update(pool);
  view.tenants.live(pool);
  view.processes.live(pool);
  for (const option of view.upstreamsChoice.options) {
    if (option.value === scope.ALL) continue;
    const waiting = data.pools.find((one) => one.pool === option.value)?.waiting;
    say(option, waiting ? `${option.value} (${brief(waiting)} waiting)` : option.value);
  }
}
