// Throughput, queue wait and upstream latency over the chosen time.

import { chart } from "../../chart.js";
import { h } from "../../dom.js";
import { length, rate } from "../../format.js";

const PERCENTILES = [
  ["p50", "--chart-1", true],
  ["p95", "--chart-2"],
  ["p99", "--chart-3"],
];

export function charts(signal) {
  const calls = chart(
    "Throughput",
    [
      ["ended", "--chart-1", true],
      ["failed", "--chart-4"],
      ["429s", "--chart-2"],
    ],
    rate,
    { signal, least: 0.1 },
  );
  const waits = chart("Queue wait", PERCENTILES, length, { signal, least: 10 });
  const lengths = chart("Upstream latency", PERCENTILES, length, { signal, least: 10 });
  return {
    element: h("div", { class: "charts" }, calls.element, waits.element, lengths.element),
    update(trend) {
      calls.update(trend.at, [trend.calls, trend.failed, trend.throttled]);
      waits.update(trend.at, trend.waits);
      lengths.update(trend.at, trend.lengths);
    },
  };
}
