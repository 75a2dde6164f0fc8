// The strip of key figures: the current state at a glance.

import { h, mark, say } from "../../dom.js";
import { NOTHING, brief, count, counted, length, money, rate } from "../../format.js";
import { link } from "../../router.js";

const FIGURES = {
  flight: "In flight",
  waiting: "Waiting",
  calls: "Calls ended",
  waits: "Queue wait",
  lengths: "Upstream latency",
  throttled: "429s",
  failed: "Failed",
  spent: "Spent today",
};

// The link of each figure.
const LEADS = {
  waiting: ["/requests", { status: "open" }],
  failed: ["/requests", { status: "failed" }],
  spent: ["/usage", {}],
};

export function figuresStrip() {
  const shown = {};
  const tiles = Object.entries(FIGURES).map(([name, label]) => {
    const figure = h("dd", { class: "tile-figure" }, NOTHING);
    const note = h("dd", { class: "tile-note" }, " ");
    shown[name] = { figure, note };
    return h("div", { class: "tile", data: { figure: name } }, h("dt", {}, LEADS[name] ? h("a", { href: link(...LEADS[name]) }, label) : label), figure, note);
  });
  // A tile has room for eight or nine characters: if `figure` is shortened, `exact` is the full
  // figure.
  const put = (name, figure, note, kind = null, exact = null) => {
    say(shown[name].figure, figure);
    mark(shown[name].figure, "title", exact === figure ? null : exact);
    say(shown[name].note, note || " ");
    mark(shown[name].figure.parentElement, "data-kind", kind);
  };
  return {
    element: h("dl", { class: "tiles", "aria-label": "Now" }, tiles),
    live(pool) {
      const paused = pool.paused_limits;
      put("flight", brief(pool.in_flight), `in ${counted(pool.processes.length + pool.more_processes, "process", "processes")}`);
      const held = paused ? `${count(paused)} paused` : counted(pool.tenants.length + pool.more_tenants, "tenant");
      put("waiting", brief(pool.waiting), held, pool.waiting ? "warn" : null);
    },
    now(one) {
      put("calls", rate(one.per_second), "last minute");
      put("waits", length.short(one.waits[0]), `p95 ${length(one.waits[1])}`, null, length(one.waits[0]));
      put("lengths", length.short(one.lengths[0]), `p95 ${length(one.lengths[1])}`, null, length(one.lengths[0]));
      const told = one.told_429 ? `${count(one.told_429)} to clients` : "from upstreams";
      put("throttled", count(one.throttled), told, one.throttled || one.told_429 ? "warn" : null);
      put("failed", count(one.failed), "last minute", one.failed ? "bad" : null);
    },
    record(frame) {
      const { total } = frame.spent.day;
      const tokens = total.input_tokens + total.output_tokens + total.thoughts_tokens;
      const isPriced = total.cost_micros > 0 || total.unpriced < total.requests;
      const cost = total.cost_micros / 1e6;
      const isShown = isPriced || !total.requests;
      put("spent", isShown ? money.short(cost) : "no prices", `${brief(tokens)} tokens`, null, isShown ? money(cost) : null);
    },
  };
}
