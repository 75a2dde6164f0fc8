// The timeline of a request, drawn to scale: where its time went, and step by step.

import { h } from "../dom.js";
import { length, time } from "../format.js";

const LOOKS = {
  waiting: ["Waiting", "waiting"],
  calling: ["Calling the provider", "calling"],
  parked: ["Waiting for retry", "parked"],
};
const MARKS = {
  submitted: "neutral",
  classified: "neutral",
  waiting: "waiting",
  calling: "calling",
  parked: "parked",
  cancelling: "bad",
  webhook: "neutral",
};
const ENDED_WELL = new Set(["succeeded", "delivered"]);
const LEAST_PERCENT = 0.4;

const at = (step) => new Date(step.at).getTime();

/**
 * Return when a step ended, or `now` if it continues; a step without a duration ends when it
 * begins.
 */
function until(step, now) {
  if (step.goes_on && step.what !== "parked") return now;
  if (step.until) return Math.min(new Date(step.until).getTime(), Math.max(now, at(step)));
  return at(step);
}

/** Return the card's content: a bar of the whole time, the sums by phase, and the list of steps. */
export function timeline(steps, nowText) {
  const now = new Date(nowText).getTime();
  const life = steps.filter((step) => step.what !== "webhook");
  const from = at(steps[0]);
  const to = Math.max(from + 1, ...life.map((step) => until(step, now)));
  const scale = (ms) => ((ms - from) / (to - from)) * 100;
  return h(
    "div",
    { class: "timeline" },
    whole(life, now, scale),
    h("ol", { class: "steps", "aria-label": "Steps" }, steps.map((step) => row(step, now, from, scale))),
  );
}

function whole(steps, now, scale) {
  const sums = new Map();
  const parts = [];
  for (const step of steps) {
    if (!LOOKS[step.what]) continue;
    const [words, look] = LOOKS[step.what];
    const ms = until(step, now) - at(step);
    const before = sums.get(words) ?? { ms: 0, first: 0 };
    const first = before.first + Math.min(step.first_byte_ms ?? 0, ms);
    sums.set(words, { look, ms: before.ms + ms, first });
    parts.push(...bars(step, now, scale, look));
  }
  const total = [...sums.values()].reduce((sum, one) => sum + one.ms, 0);
  const legend = [...sums].map(([words, { look, ms, first }]) =>
    h(
      "li",
      {},
      h("span", { class: `swatch ${look}` }),
      `${words} `,
      h("strong", {}, length(ms)),
      share(ms, total),
      first > 0 && h("span", { class: "swatch calling first" }),
      first > 0 && h("span", { class: "quiet-text" }, `${length(first)} before the first byte`),
    ),
  );
  return h(
    "div",
    { class: "whole" },
    h("div", { class: "track", "aria-hidden": "true" }, parts),
    h("ul", { class: "legend" }, legend),
  );
}

const share = (ms, total) =>
  total > 0 ? h("span", { class: "quiet-text" }, `${Math.round((ms / total) * 100)} %`) : null;

/** Return the bar of a step; for a call two bars, before and after the first byte of the answer. */
function bars(step, now, scale, look) {
  const [begin, end] = [at(step), until(step, now)];
  if (!step.first_byte_ms) return [bar(scale(begin), scale(end), look)];
  const first = Math.min(begin + step.first_byte_ms, end);
  return [
    bar(scale(begin), scale(first), `${look} first`),
    bar(scale(first), scale(end), look),
  ];
}

function bar(left, right, look) {
  const element = h("span", { class: `bar ${look}` });
  // Set by script, because the content security policy allows no style attributes.
  element.style.left = `${Math.min(left, 100 - LEAST_PERCENT)}%`;
  element.style.width = `${Math.max(right - left, LEAST_PERCENT)}%`;
  return element;
}

function row(step, now, from, scale) {
  const isSpan = LOOKS[step.what] !== undefined;
  const [begin, end] = [at(step), until(step, now)];
  const look = isSpan ? LOOKS[step.what][1] : markOf(step);
  const drawn = isSpan ? bars(step, now, scale, look) : [];
  if (!isSpan && step.what !== "webhook") drawn.push(bar(scale(begin), scale(begin), `dot ${look}`));
  return h(
    "li",
    { class: "step", data: { what: step.what, outcome: step.outcome ?? "" } },
    h("span", { class: `mark ${look}`, "aria-hidden": "true" }),
    h(
      "div",
      { class: "said" },
      h("span", { class: "words" }, title(step), step.code && step.what === "calling" && h("span", { class: "badge bad" }, step.code)),
      h("span", { class: "quiet-text" }, details(step, begin, from)),
    ),
    h("span", { class: "number lasted" }, isSpan ? lasted(step, begin, end, now) : ""),
    h("div", { class: step.what === "webhook" ? "" : "track", "aria-hidden": "true" }, drawn),
  );
}

const markOf = (step) => {
  if (step.what !== "ended") return MARKS[step.what];
  return ENDED_WELL.has(step.outcome) ? "good" : "bad";
};

function title(step) {
  const words = step.words.charAt(0).toUpperCase() + step.words.slice(1);
  return step.attempt && step.what === "calling" ? `${words}, attempt ${step.attempt}` : words;
}

function details(step, begin, from) {
  const parts = [begin === from ? time(step.at) : `${time(step.at)}, after ${length(begin - from)}`];
  if (step.first_byte_ms) parts.push(`first byte after ${length(step.first_byte_ms)}`);
  if (step.process && step.what === "calling") parts.push(`in ${step.process}`);
  return parts.join(" · ");
}

function lasted(step, begin, end, now) {
  if (step.goes_on && step.what === "parked") {
    return `${length(Math.max(0, new Date(step.until).getTime() - now))} more`;
  }
  if (!step.goes_on && !step.until) return "";
  return step.goes_on ? `${length(end - begin)} so far` : length(end - begin);
}
