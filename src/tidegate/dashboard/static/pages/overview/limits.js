// Each limit as a gauge: its usage, who waits, whether it is paused, and actions.

import { get, patch, post, Problem } from "../../api.js";
import { fill, h, keyed, mark, say, sayComposed } from "../../dom.js";
import { brief, count, grouped, length } from "../../format.js";
import { link } from "../../router.js";
import * as scope from "../../scope.js";
import { choice, confirm, field, said, toast } from "../../ui.js";
import { textOf } from "../what_if_limits.js";

const FOR_EVER_MS = 10 * 365 * 86_400_000;
const UNITS = {
  input_tokens: "input tokens",
  uncached_input_tokens: "uncached input tokens",
  output_tokens: "output tokens",
  audio_seconds: "seconds of audio",
  usd: "dollars",
  calls: "concurrent calls",
  tokens_in_flight: "tokens in flight",
};

const NO_BOUND = 10_000_000_000; // the bound of a limit that can only be paused
const FEW = 12; // up to this number all limits are shown
const BUSY_MS = 20_000; // how long a limit stays in the list after it was busy
const ORDER_MS = 10_000; // how often rows may move
const ALL_EVERY_MS = 2_000;
const TYPED_MS = 250;
const GROUPS = { none: "No grouping", kind: "By type", model: "By model", tenant: "By tenant" };

const isBusy = (one) =>
  one.waiting > 0 || one.paused_ms > 0 || one.bound === 0 || (one.used > 0 && one.used >= one.current) || (one.adaptive && one.current < one.bound);
const keyOf = (one) => `${one.pool} ${one.limit}`;
const waitsMore = (a, b) =>
  b.waiting - a.waiting || b.used / Math.max(1, b.current) - a.used / Math.max(1, a.current) || (keyOf(a) < keyOf(b) ? -1 : 1);

/**
 * A card of limits; `pool()` is the scope. Busy limits come with the feed; the list of all limits
 * is requested by pages.
 */
export function limitsCard(pool, signal) {
  const list = h("ul", { class: "limits" });
  const draw = keyed(list, (first) => (first.group === undefined ? row(first) : groupRow()));
  const learned = h("ul", { class: "learned-limits", "aria-label": "Learned limits", hidden: true });
  const drawLearned = keyed(learned, (first) => learnedRow(first.limit, first.pool));
  const note = h("a", { class: "quiet-text", href: link("/limits/history"), title: "What was changed, by whom and why" });
  const state = { shown: "busy", group: "none", search: "", offset: 0 };
  const idle = h("p", { class: "quiet-text card-body limits-idle", hidden: true });
  const seenBusy = new Map();
  let [order, orderedAt] = [new Map(), -ORDER_MS];
  let frame = null;

  function busy() {
    const now = performance.now();
    const few = frame.all_limits <= FEW;
    for (const one of frame.limits) if (isBusy(one)) seenBusy.set(keyOf(one), now);
    const wanted = frame.limits.filter((one) => few || now - (seenBusy.get(keyOf(one)) ?? -BUSY_MS) < BUSY_MS);
    if (now - orderedAt > ORDER_MS || wanted.some((one) => !order.has(keyOf(one)))) {
      orderedAt = now;
      order = new Map(wanted.toSorted(few ? byName : waitsMore).map((one, place) => [keyOf(one), place]));
    }
    wanted.sort((a, b) => order.get(keyOf(a)) - order.get(keyOf(b)));
    draw(wanted, keyOf);
    const folded = frame.all_limits - wanted.length;
    idle.hidden = folded === 0 && wanted.length > 0;
    const none = wanted.length ? "" : "No limit is busy. ";
    say(idle, `${none}${count(folded)} idle ${folded === 1 ? "limit" : "limits"} not shown: choose All to see them.`);
  }

  const pages = pagesOf(state, pool, signal, (page) => {
    const rows = page.limits.flatMap((one, at) => {
      const isFirst = state.group !== "none" && one.group !== page.limits[at - 1]?.group;
      const { group: _, ...plain } = one;
      return isFirst ? [page.groups.find((each) => each.group === one.group), plain] : [plain];
    });
    draw(rows, (one) => (one.group === undefined ? keyOf(one) : `group ${one.group}`));
    idle.hidden = rows.length > 0;
    say(idle, state.search ? `No limit matches ${state.search}.` : "No limits.");
  }, (problem) => {
    idle.hidden = false;
    say(idle, `Not refreshed: ${said(problem)}`);
  });
  const shownChoice = choice("Which limits", { busy: "Busy", all: "All" }, state.shown, (shown) => {
    state.shown = shown;
    again();
  });
  const search = h("input", { type: "search", class: "limits-search", placeholder: "Search limits", "aria-label": "Search limits", spellcheck: "false" });
  const group = h(
    "select",
    { class: "limits-group", "aria-label": "Group limits" },
    Object.entries(GROUPS).map(([value, words]) => h("option", { value }, words)),
  );
  const toAll = () => {
    state.shown = "all";
    for (const one of shownChoice.children) one.setAttribute("aria-pressed", String(one.value === "all"));
    again();
  };
  let typing = 0;
  search.addEventListener("input", () => {
    clearTimeout(typing);
    typing = setTimeout(() => {
      state.search = search.value.trim();
      toAll();
    }, TYPED_MS);
  });
  group.addEventListener("change", () => {
    state.group = group.value;
    toAll();
  });
  function again() {
    state.offset = 0;
    pages.show(state.shown === "all");
    if (state.shown === "busy" && frame) busy();
  }

  return {
    element: h(
      "section",
      { class: "card", "aria-label": "Limits" },
      h(
        "div",
        { class: "card-head" },
        h("h2", {}, "Limits"),
        note,
        h("div", { class: "end limits-tools" }, search, group, shownChoice),
      ),
      h(
        "div",
        { class: "limit limit-heads", "aria-hidden": "true" },
        ["Limit", "", "Used", "Waiting", "State", ""].map((words) => h("div", {}, words)),
      ),
      list,
      idle,
      pages.foot,
      learned,
    ),
    /** Show the limits whose names contain this text, at the top of the window. */
    find(text) {
      [search.value, state.search] = [text, text];
      toAll();
      search.focus({ preventScroll: true });
      search.closest("section").scrollIntoView({ block: "start" });
    },
    update(now) {
      if (frame?.pool !== now.pool) again();
      frame = now;
      const all = shownChoice.querySelector("[value=all]");
      say(all, `All ${count(now.all_limits)}`);
      if (state.shown === "busy") busy();
      drawLearned(now.learned ?? [], keyOf);
      learned.hidden = !now.learned?.length;
      say(note, now.revision === null ? "changes" : `revision ${now.revision}`);
    },
    trend(past) {
      lines.clear();
      for (const one of past.sparks ?? past.queue) lines.set(keyOf({ pool: one.pool, limit: one.name }), one.line);
    },
  };
}

const byName = (a, b) => (keyOf(a) < keyOf(b) ? -1 : 1);
// Recent numbers of waiting calls by limit and pool, as in the charts.
const lines = new Map();

/** All limits by pages, requested again periodically while they are shown. */
function pagesOf(state, pool, signal, paint, fail) {
  const words = h("span", { class: "quiet-text" });
  const [back, on] = ["Previous", "Next"].map((text) =>
    h("button", { class: "button small", type: "button" }, text),
  );
  const foot = h("div", { class: "card-body limits-foot", hidden: true }, words, back, on);
  let [isOn, size] = [false, 25];
  let round = new AbortController();
  back.addEventListener("click", () => turn(-size));
  on.addEventListener("click", () => turn(size));

  function turn(by) {
    state.offset = Math.max(0, state.offset + by);
    look();
  }

  async function look() {
    round.abort();
    round = new AbortController();
    const mine = round;
    try {
      const query = { pool: pool(), group: state.group, search: state.search, offset: state.offset };
      const page = await get("dashboard/limits", { query, signal: AbortSignal.any([signal, mine.signal]) });
      if (mine !== round || !isOn) return;
      if (page.total > 0 && !page.limits.length) {
        state.offset = 0; // there were more before
        await look();
        return;
      }
      const last = state.offset + page.limits.length;
      if (page.limits.length > size) size = page.limits.length;
      say(words, page.total ? `${count(state.offset + 1)} to ${count(last)} of ${count(page.total)}` : "");
      back.disabled = state.offset === 0;
      on.disabled = last >= page.total;
      foot.hidden = page.total <= size && state.offset === 0;
      paint(page);
    } catch (error) {
      if (error.name === "AbortError") return;
      if (!(error instanceof Problem)) throw error;
      if (mine === round && isOn) fail(error);
    }
  }

  const timer = setInterval(() => isOn && !document.hidden && look(), ALL_EVERY_MS);
  signal.addEventListener("abort", () => clearInterval(timer));
  return {
    foot,
    show(shown) {
      isOn = shown;
      foot.hidden = true;
      if (isOn) look();
      else round.abort();
    },
  };
}

/** The heading of a group, with the totals of all its limits. */
function groupRow() {
  const name = h("b");
  const words = h("span", { class: "quiet-text" });
  return {
    element: h("li", { class: "limit-group" }, name, words),
    update(one) {
      say(name, one.group);
      const said = [`${count(one.limits)} ${one.limits === 1 ? "limit" : "limits"}`];
      if (one.waiting) said.push(`${brief(one.waiting)} waiting`);
      if (one.full) said.push(`${count(one.full)} full`);
      say(words, said.join(", "));
    },
  };
}

/** A limit that headers of answers report, and that differs from the one in force. */
function learnedRow(limit, pool) {
  const words = h("span", { class: "quiet-text" });
  const accept = h("button", { class: "button quiet small", type: "button", needs: "operator" }, "Accept");
  accept.setAttribute("aria-label", `Accept ${limit}`);
  accept.addEventListener("click", () => acceptLimit(pool, limit));
  return {
    element: h(
      "li",
      { data: { learned: limit } },
      h("div", {}, h("b", { title: limit }, limit), words),
      h("span", { class: "badge accent" }, "Learned"),
      accept,
    ),
    update(one) {
      const now = one.in_force === null ? "no such limit is in force" : `${count(one.in_force)} is in force: it ${one.drift}`;
      say(words, `Answers report ${count(one.bound)}; ${now}`);
    },
  };
}

export function acceptLimit(pool, limit) {
  const reason = field("reason", "Reason (recorded)", { maxlength: 500 });
  return confirm({
    title: `Accept the reported bound of ${limit}?`,
    text: "The bound that the provider's answers report takes effect in all processes within a second.",
    fields: [reason],
    action: "Accept",
    act: async (values) => {
      const body = { limits: [limit], by: "dashboard", reason: values.reason };
      await post("admin/limits/accept", body, { query: { pool } });
      toast(`The reported bound of ${limit} is in force.`);
    },
  });
}

function row(first) {
  const { limit, pool } = first;
  let latest = null;
  const used = h("div", { class: "gauge-used" });
  const held = h("div", { class: "gauge-held" });
  const tick = h("div", { class: "gauge-tick", hidden: true });
  const gauge = h("div", { class: "gauge", role: "meter", "aria-label": limit }, used, held, tick);
  const words = h("span", { class: "quiet-text" });
  const figure = h("span", { class: "figures" });
  const left = h("span", { class: "quiet-text" });
  const waiting = h("span", { class: "figures" });
  const spark = h("polyline", { fill: "none", stroke: "currentColor", "stroke-width": "1.5" });
  const sparkline = h("svg", { class: "spark", viewBox: "0 0 60 16", "aria-hidden": "true" }, spark);
  const tenants = h("span", { class: "quiet-text limit-tenants" });
  const badges = h("span", { class: "badges" });
  const change = h("button", { class: "button quiet small", type: "button", needs: "operator" }, "Change");
  const pause = h("button", { class: "button quiet small", type: "button", needs: "operator" }, "Pause");
  change.setAttribute("aria-label", `Change ${limit}`);
  change.addEventListener("click", () => changeLimit(pool, latest));
  pause.addEventListener("click", () =>
    latest.paused_ms > 0 ? resumeLimit(pool, latest) : pauseLimit(pool, latest),
  );
  const element = h(
    "li",
    { class: "limit", data: { limit } },
    h("div", { class: "limit-name" }, h("b", { title: limit }, limit), words),
    h("div", { class: "limit-gauge" }, gauge),
    h("div", { class: "limit-used" }, figure, left),
    h("div", { class: "limit-waiting" }, sparkline, waiting, h("span", { class: "quiet-text limit-label" }, "waiting")),
    h("div", { class: "limit-state" }, badges, tenants),
    h("div", { class: "limit-actions" }, change, pause),
  );
  return {
    element,
    update(one) {
      latest = one;
      const isPaused = one.paused_ms > 0;
      const isFull = one.used >= one.current;
      const inWords = grouped(one.words);
      const what = scope.chosen() === scope.ALL ? `${inWords}, ${pool}` : inWords;
      say(words, what);
      mark(words, "title", what);
      const isOpen = one.bound >= NO_BOUND;
      say(figure, isOpen ? amount(one, one.used) : `${amount(one, one.used)} / ${amount(one, one.current)}`);
      mark(figure, "title", `${exact(one, one.used)} of ${exact(one, one.current)}`);
      say(left, leftOf(one));
      say(waiting, brief(one.waiting));
      mark(waiting, "data-some", one.waiting > 0);
      mark(spark, "points", pointsOf(lines.get(keyOf(first))));
      const who = (one.tenants ?? []).map(([name, amount]) => `${name} ${brief(amount)}`).join(", ");
      sayComposed(tenants, who);
      mark(tenants, "title", who ? `Waiting: ${who}` : null);
      drawGauge(one, { gauge, used, held, tick });
      mark(element, "data-full", isFull && !one.shadow);
      mark(element, "data-paused", isPaused);
      drawBadges(badges, one, isPaused, isFull);
      say(pause, isPaused ? "Resume" : "Pause");
      mark(pause, "aria-label", `${isPaused ? "Resume" : "Pause"} ${limit}`);
    },
  };
}

/**
 * Return the points of a line of 60 by 16, scaled to the largest value; null if nothing has waited.
 */
function pointsOf(values) {
  if (!values?.some((value) => value > 0)) return null;
  const most = Math.max(...values);
  const across = 60 / Math.max(1, values.length - 1);
  return values.map((value, at) => `${(at * across).toFixed(1)},${(15 - (value / most) * 14).toFixed(1)}`).join(" ");
}

function drawGauge(one, { gauge, used, held, tick }) {
  const most = Math.max(one.bound, 1);
  const lighter = Math.min(one.sort === "concurrency" ? one.lapsing : one.reserved, one.used);
  const share = (amount) => `${Math.min(100, (amount / most) * 100)}%`;
  used.style.width = share(one.used - lighter);
  held.style.width = share(lighter);
  tick.hidden = !one.adaptive || one.current >= one.bound;
  tick.style.left = share(one.current);
  mark(gauge, "aria-valuemin", 0);
  mark(gauge, "aria-valuemax", most);
  mark(gauge, "aria-valuenow", Math.min(one.used, most));
  mark(gauge, "aria-valuetext", `${exact(one, one.used)} of ${exact(one, one.current)} used`);
}

const MICROS = 1_000_000; // of a dollar

/** An amount in a limit's unit, shortened: `12.5k`, `$0.79` */
const amount = (one, value) => (one.unit === "usd" ? dollars(value) : brief(value));
const exact = (one, value) => (one.unit === "usd" ? dollars(value) : count(value));
const dollars = (micros) => `$${(micros / MICROS).toFixed(2)}`;

/** The details below the figures. */
function leftOf(one) {
  if (one.sort === "concurrency") {
    return one.lapsing ? `${count(one.lapsing)} of expired sessions` : " ";
  }
  if (one.bound >= NO_BOUND) return " ";
  const left = Math.max(0, one.current - one.used);
  const said = [`${amount(one, left)} left`];
  if (one.reserved && one.unit !== "requests") said.push(`${amount(one, one.reserved)} reserved`);
  return said.join(", ");
}

function drawBadges(badges, one, isPaused, isFull) {
  const said = [];
  if (isPaused) {
    const until =
      one.paused_ms > FOR_EVER_MS ? "until resumed" : `${length(secondsOf(one.paused_ms))} more`;
    said.push(["bad", `Paused, ${until}`, one.paused_by]);
  } else if (one.bound === 0) said.push(["bad", "Closed", "A limit of 0 admits no calls"]);
  else if (one.room_in_ms > 0 && isFull) {
    said.push(["warn", `Room in ${length(secondsOf(one.room_in_ms))}`, "When the window has capacity again"]);
  } else if (isFull && !one.shadow) said.push(["warn", "Full", ""]);
  if (one.adaptive && one.current < one.bound) {
    said.push(["accent", `Adapting: ${count(one.current)} of ${count(one.bound)}`, ""]);
  }
  if (one.others_share > 0) {
    const share = `${Math.round(one.others_share * 100)} %`;
    said.push(["warn", `Others take ${share}`, "Other programs use this share of the account; it is kept free for them"]);
  }
  if (one.source && one.source !== "set") said.push(["", one.source === "learned" ? "Learned" : "Imported", ""]);
  if (one.shadow) said.push(["", `Shadow: ${brief(one.shadowed)} would have waited`, ""]);
  const text = said.map((parts) => parts.join("|")).join("\n");
  if (badges.dataset.said === text) return;
  badges.dataset.said = text;
  fill(
    badges,
    said.map(([kind, words, title]) => h("span", { class: `badge ${kind}`, title: title || null }, words)),
    isPaused && one.paused_by && h("span", { class: "quiet-text", title: one.paused_by }, one.paused_by),
  );
}

const secondsOf = (ms) => Math.ceil(ms / 1_000) * 1_000;

export function changeLimit(pool, one) {
  const unit = UNITS[one.unit] ?? one.unit ?? "concurrent calls";
  const told = one.unit === "usd" ? one.bound / MICROS : one.bound;
  const bound = field("bound", `New limit, in ${unit}`, {
    type: "number",
    value: String(told),
    hint: `Now ${grouped(one.words)}. 0 admits no calls. Lowering a limit cancels no call.`,
  });
  const reason = field("reason", "Reason (recorded)", { maxlength: 500 });
  const rehearsed = h("a", { href: link("/what-if", { pool }) }, "Simulate the change on a recorded day");
  rehearsed.addEventListener("click", () => {
    rehearsed.href = link("/what-if", { pool, set: textOf([[one.limit, bound.input.value]]) });
    rehearsed.closest("dialog").close();
  });
  return confirm({
    title: `Change ${one.limit}`,
    text: "Takes effect in all processes within a second.",
    fields: [bound, reason],
    below: rehearsed,
    action: "Change the limit",
    act: async (values) => {
      const { policy } = await get("admin/limits", { query: { pool } });
      const before = policy.limits[one.limit];
      const isTable = before !== null && typeof before === "object";
      const to = (value) => ({ [`limits.${one.limit}`]: isTable ? { ...before, bound: value } : value });
      await patch(
        "admin/limits",
        {
          set: to(values.bound),
          expected: to(told), // the value that was shown
          by: "dashboard",
          reason: values.reason,
        },
        { query: { pool } },
      );
      toast(`${one.limit} is ${one.unit === "usd" ? "$" : ""}${count(values.bound)} now.`);
    },
  });
}

function pauseLimit(pool, one) {
  const forMs = field("for_ms", "Duration", {
    options: {
      60000: "1 minute",
      300000: "5 minutes",
      1800000: "30 minutes",
      3600000: "1 hour",
      "": "Until resumed",
    },
    value: "300000",
  });
  const reason = field("reason", "Reason", { maxlength: 500 });
  return confirm({
    title: `Pause ${one.limit}?`,
    text: "No call is admitted under this limit while it is paused. Running calls continue, and waiting calls keep their place.",
    fields: [forMs, reason],
    action: "Pause",
    danger: true,
    act: async (values) => {
      const body = { by: "dashboard", reason: values.reason };
      if (values.for_ms) body.for_ms = Number(values.for_ms);
      const { done } = await post(`admin/limits/${encodeURIComponent(one.limit)}/pause`, body, { query: { pool } });
      toast(done ? `${one.limit} is paused.` : `${one.limit} is already paused for longer.`);
    },
  });
}

export function resumeLimit(pool, one) {
  return confirm({
    title: `Resume ${one.limit}?`,
    text: one.paused_by ? `It was paused by ${one.paused_by}.` : "",
    action: "Resume",
    act: async () => {
      await post(`admin/limits/${encodeURIComponent(one.limit)}/resume`, { by: "dashboard" }, { query: { pool } });
      toast(`${one.limit} admits calls again, one by one.`);
    },
  });
}
