// Each limit as a gauge: how much of it is used, who waits, whether it is paused, and what to do.

import { get, patch, post } from "../../api.js";
import { fill, h, keyed, mark, say } from "../../dom.js";
import { brief, count, length } from "../../format.js";
import { confirm, field, toast } from "../../ui.js";

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

/** `pool()` names the pool that is shown; `refresh()` is not needed: the feed shows the effect. */
export function limitsCard(pool) {
  const list = h("ul", { class: "limits" });
  const more = h("p", { class: "quiet-text card-body", hidden: true });
  const draw = keyed(list, (first) => row(first.limit, pool));
  const learned = h("ul", { class: "learned-limits", "aria-label": "Learned limits", hidden: true });
  const drawLearned = keyed(learned, (first) => learnedRow(first.limit, pool));
  const revision = h("span", { class: "quiet-text" });
  return {
    element: h(
      "section",
      { class: "card", "aria-label": "Limits" },
      h("div", { class: "card-head" }, h("h2", {}, "Limits"), revision),
      h(
        "div",
        { class: "limit limit-heads", "aria-hidden": "true" },
        ["Limit", "", "Used", "Waiting", "State", ""].map((words) => h("div", {}, words)),
      ),
      list,
      learned,
      more,
    ),
    update(frame) {
      draw(frame.limits, (one) => one.limit);
      drawLearned(frame.learned ?? [], (one) => one.limit);
      learned.hidden = !frame.learned?.length;
      say(revision, `revision ${frame.revision}`);
      more.hidden = !frame.more_limits;
      say(more, `${count(frame.more_limits)} more, less pressed: see tidegate limits`);
    },
  };
}

/** A limit that the headers of answers report, and that is not in force so. */
function learnedRow(limit, pool) {
  const words = h("span", { class: "quiet-text" });
  const accept = h("button", { class: "button quiet small", type: "button" }, "Accept");
  accept.setAttribute("aria-label", `Accept ${limit}`);
  accept.addEventListener("click", () => acceptLimit(pool(), limit));
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

function acceptLimit(pool, limit) {
  const reason = field("reason", "Reason (goes on record)", { maxlength: 500 });
  return confirm({
    title: `Accept ${limit} as learned?`,
    text: "The bound that the provider's answers report is in force in every process within a second.",
    fields: [reason],
    action: "Accept",
    act: async (values) => {
      const body = { limits: [limit], by: "dashboard", reason: values.reason };
      await post("admin/limits/accept", body, { query: { pool } });
      toast(`${limit} is in force as learned.`);
    },
  });
}

function row(limit, pool) {
  let latest = null;
  const used = h("div", { class: "gauge-used" });
  const held = h("div", { class: "gauge-held" });
  const tick = h("div", { class: "gauge-tick", hidden: true });
  const gauge = h("div", { class: "gauge", role: "meter", "aria-label": limit }, used, held, tick);
  const words = h("span", { class: "quiet-text" });
  const figure = h("span", { class: "figures" });
  const left = h("span", { class: "quiet-text" });
  const waiting = h("span", { class: "figures" });
  const badges = h("span", { class: "badges" });
  const change = h("button", { class: "button quiet small", type: "button" }, "Change");
  const pause = h("button", { class: "button quiet small", type: "button" }, "Pause");
  change.setAttribute("aria-label", `Change ${limit}`);
  change.addEventListener("click", () => changeLimit(pool(), latest));
  pause.addEventListener("click", () =>
    latest.paused_ms > 0 ? resumeLimit(pool(), latest) : pauseLimit(pool(), latest),
  );
  const element = h(
    "li",
    { class: "limit", data: { limit } },
    h("div", { class: "limit-name" }, h("b", { title: limit }, limit), words),
    h("div", { class: "limit-gauge" }, gauge),
    h("div", { class: "limit-used" }, figure, left),
    h("div", { class: "limit-waiting" }, waiting, h("span", { class: "quiet-text limit-label" }, "waiting")),
    h("div", { class: "limit-state" }, badges),
    h("div", { class: "limit-actions" }, change, pause),
  );
  return {
    element,
    update(one) {
      latest = one;
      const isPaused = one.paused_ms > 0;
      const isFull = one.used >= one.current;
      say(words, one.words);
      mark(words, "title", one.words);
      say(figure, `${amount(one, one.used)} / ${amount(one, one.current)}`);
      mark(figure, "title", `${exact(one, one.used)} of ${exact(one, one.current)}`);
      say(left, leftOf(one));
      say(waiting, brief(one.waiting));
      mark(waiting, "data-some", one.waiting > 0);
      drawGauge(one, { gauge, used, held, tick });
      mark(element, "data-full", isFull && !one.shadow);
      mark(element, "data-paused", isPaused);
      drawBadges(badges, one, isPaused, isFull);
      say(pause, isPaused ? "Resume" : "Pause");
      mark(pause, "aria-label", `${isPaused ? "Resume" : "Pause"} ${limit}`);
    },
  };
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

const MICROS = 1_000_000; // money is counted in millionths of a dollar

/** An amount of what a limit counts, briefly: `12.5K`, `$0.79` */
const amount = (one, value) => (one.unit === "usd" ? dollars(value) : brief(value));
const exact = (one, value) => (one.unit === "usd" ? dollars(value) : count(value));
const dollars = (micros) => `$${(micros / MICROS).toFixed(2)}`;

/** Under the figures: what else there is to know of them. */
function leftOf(one) {
  if (one.sort === "concurrency") {
    return one.lapsing ? `${count(one.lapsing)} held for the dead` : " ";
  }
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
    said.push(["warn", `Room in ${length(secondsOf(one.room_in_ms))}`, "When the window lets go"]);
  } else if (isFull && !one.shadow) said.push(["warn", "Full", ""]);
  if (one.adaptive && one.current < one.bound) {
    said.push(["accent", `Adapting: ${count(one.current)} of ${count(one.bound)}`, ""]);
  }
  if (one.others_share > 0) {
    const share = `${Math.round(one.others_share * 100)} %`;
    said.push(["warn", `Others take ${share}`, "Of the same account: that much is kept free for them"]);
  }
  if (one.source && one.source !== "set") said.push(["", one.source === "learned" ? "Learned" : "Imported", ""]);
  if (one.shadow) said.push(["", `Only counts: ${brief(one.shadowed)} would have waited`, ""]);
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

function changeLimit(pool, one) {
  const unit = UNITS[one.unit] ?? one.unit ?? "concurrent calls";
  const told = one.unit === "usd" ? one.bound / MICROS : one.bound;
  const bound = field("bound", `New limit, in ${unit}`, {
    type: "number",
    value: String(told),
    hint: `Now ${one.words}. 0 admits no calls. Lowering it drains: no call is cut off.`,
  });
  const reason = field("reason", "Reason (goes on record)", { maxlength: 500 });
  return confirm({
    title: `Change ${one.limit}`,
    text: "In force in every process within a second.",
    fields: [bound, reason],
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
          expected: to(told), // as it was when it was looked at
          by: "dashboard",
          reason: values.reason,
        },
        { query: { pool } },
      );
      toast(`${one.limit} is ${one.unit === "usd" ? "$" : ""}${count(values.bound)} from now on.`);
    },
  });
}

function pauseLimit(pool, one) {
  const forMs = field("for_ms", "For how long", {
    options: {
      60000: "1 minute",
      300000: "5 minutes",
      1800000: "30 minutes",
      3600000: "1 hour",
      "": "Until it is resumed",
    },
    value: "300000",
  });
  const reason = field("reason", "Reason", { maxlength: 500 });
  return confirm({
    title: `Pause ${one.limit}?`,
    text: "No call is admitted under it meanwhile. Calls that run go on, those that wait keep their places.",
    fields: [forMs, reason],
    action: "Pause",
    danger: true,
    act: async (values) => {
      const body = { by: "dashboard", reason: values.reason };
      if (values.for_ms) body.for_ms = Number(values.for_ms);
      const { done } = await post(`admin/limits/${one.limit}/pause`, body, { query: { pool } });
      toast(done ? `${one.limit} is paused.` : `A longer pause of ${one.limit} stays.`);
    },
  });
}

function resumeLimit(pool, one) {
  return confirm({
    title: `Resume ${one.limit}?`,
    text: one.paused_by ? `It was paused by ${one.paused_by}.` : "",
    action: "Resume",
    act: async () => {
      await post(`admin/limits/${one.limit}/resume`, { by: "dashboard" }, { query: { pool } });
      toast(`${one.limit} admits calls again, one by one.`);
    },
  });
}
