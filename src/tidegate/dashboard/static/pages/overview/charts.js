// Charts of waits, ended calls, cost and durations over the selected time, with changes by
// operators and deployments.

import { chart, stack } from "../../chart.js";
import { h, keyed, say, sayComposed } from "../../dom.js";
import { brief, counted, length, money, rate, time } from "../../format.js";
import * as scope from "../../scope.js";
import { requestsIn } from "../request_filters.js";

const MICROS = 1_000_000;
const MOST_TOLD = 4;
const PERCENTILES = [
  ["p50", "--chart-1", true],
  ["p95", "--chart-2"],
];
const perMinute = (dollars) => (dollars === 0 ? "$0.00" : money(dollars));
// The axis has whole calls only, since averages are fractions.
const CALLS = [1, 2, 5].flatMap((first) => Array.from({ length: 7 }, (_, zeros) => first * 10 ** zeros));
const waiting = (value) => (value < 10 ? String(Math.round(value * 10) / 10) : brief(Math.round(value)));

waiting.steps = CALLS.toSorted((a, b) => a - b);

export function charts(signal) {
  let step = 60;
  const pick = (at) => {
    const from = Math.floor(at / 60) * 60;
    const until = Math.max(from + 60, at + step);
    location.hash = requestsIn(from * 1_000, until * 1_000);
  };
  const shared = { signal, pick };
  const depth = stack("Queue depth", waiting, { ...shared, least: 1 });
  const calls = chart(
    "Requests",
    [
      ["ended", "--chart-1", true],
      ["failed", "--chart-4"],
      ["429s", "--chart-2"],
    ],
    rate,
    { ...shared, least: 0.1 },
  );
  const cost = chart("Cost per minute", [["cost", "--chart-3", true]], perMinute, { ...shared, least: 0.01 });
  const waits = chart("Queue wait", PERCENTILES, length, { ...shared, least: 10 });
  const lengths = chart("Upstream latency", [...PERCENTILES, ["p99", "--chart-3"]], length, { ...shared, least: 10 });
  const all = [depth, calls, cost, waits, lengths];
  const told = h("ul", { class: "events quiet-text", "aria-label": "Changes", hidden: true });
  const draw = keyed(told, eventRow);
  let [events, starts, begin] = [[], [], 0];
  const show = () => {
    const known = [...events, ...starts].filter((one) => one.at >= begin).toSorted((a, b) => b.at - a.at);
    for (const one of all) one.marks(known);
    told.hidden = known.length === 0;
    draw(known.slice(0, MOST_TOLD), (one) => `${one.at} ${one.words}`);
  };
  return {
    element: h("div", { class: "charts" }, all.map((one) => one.element), told),
    update(trend) {
      step = trend.step_s;
      begin = trend.at[0];
      starts = (trend.started ?? []).map((one) => ({ at: one.at, words: startWords(one) }));
      depth.update(trend.at, trend.queue.map((one) => [nameIn(one), one.line]));
      calls.update(trend.at, [trend.calls, trend.failed, trend.throttled]);
      cost.update(trend.at, [trend.cost_micros.map((value) => (value * 60) / MICROS)]);
      waits.update(trend.at, trend.waits.slice(0, 2));
      lengths.update(trend.at, trend.lengths);
      show();
    },
    /** Show the changes of a pool, and those of all pools, newest first. */
    events(frame, pool) {
      events = frame.filter((one) => [pool, one.pool].includes(scope.ALL) || one.pool === pool);
      show();
    },
  };
}

/** A limit's id, with its pool if several pools are shown. */
const nameIn = ({ pool, name }) => (name ? (scope.chosen() === scope.ALL ? `${name}, ${pool}` : name) : "others");

const startWords = ({ version, processes }) => `${counted(processes, "process", "processes")} of Tidegate ${version} started`;

function eventRow() {
  const when = h("time");
  const words = h("span");
  return {
    element: h("li", {}, when, " ", words),
    update(one) {
      say(when, time(one.at * 1_000));
      sayComposed(words, one.words);
    },
  };
}
