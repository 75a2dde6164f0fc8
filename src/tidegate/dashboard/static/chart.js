// A line chart over time: uPlot with the dashboard's colours, units and legend.

import { fill, h, say } from "./dom.js";
import { NOTHING } from "./format.js";
import uPlot from "./vendor/uplot/uPlot.esm.js";

const HEIGHT = 150;
const AXIS_FONT = "11px system-ui, sans-serif";
const minutes = new Intl.DateTimeFormat("en-GB", { hour: "2-digit", minute: "2-digit" });
const seconds = new Intl.DateTimeFormat("en-GB", {
  hour: "2-digit",
  minute: "2-digit",
  second: "2-digit",
});

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

/**
 * A card with a chart. `series`: `[label, name of the colour, filled?]` of each line.
 * `words(value)` formats a value.
 *
 * `update(at, lines)` takes times in seconds and the values of each line (null: no call in that
 * span). `marks(events)` draws events `{ at, words }` as vertical lines. `pick(at)` is called for a
 * click at a time. `stacked`: each line is added to those after it. `peaks`: the legend has the
 * maxima instead of the newest values. `signal` removes the chart; without data it keeps its size.
 */
export function chart(title, series, words, { signal, least = 0, pick = null, stacked = false, peaks = false }) {
  const host = h("div", { class: "chart-canvas" });
  const figures = series.map(() => h("b", {}, NOTHING));
  const legend = series.map(([label, name], at) => {
    const swatch = h("i", { class: "swatch", "aria-hidden": "true" });
    swatch.style.background = `var(${name})`;
    return h("li", { title: label }, swatch, h("span", {}, label), " ", figures[at]);
  });
  const when = h("span", { class: "quiet-text" });
  const element = h(
    "section",
    { class: "card chart" },
    h("div", { class: "card-head" }, h("h2", {}, title), when),
    h("div", { class: "card-body" }, h("ul", { class: "legend" }, legend), host),
  );
  let data = [[], ...series.map(() => [])];
  let drawn = data;
  let plot = null;
  let marked = [];

  function tell(at) {
    const still = (line) => (peaks ? Math.max(...line) : line.at(-1));
    figures.forEach((figure, number) => {
      const line = data[number + 1];
      const value = at === null || at === undefined ? still(line) : line[at];
      say(figure, value === null || value === undefined ? NOTHING : words(value));
    });
    say(when, at === null || at === undefined ? "" : momentOf(data[0], at, marked));
  }

  function draw() {
    plot?.destroy();
    fill(host);
    const look = { series, words, least, tell, stacked, marks: () => marked };
    plot = new uPlot(options(host.clientWidth || 300, look), drawn, host);
  }

  const resized = new ResizeObserver(() => {
    if (plot === null) draw();
    else if (host.clientWidth) plot.setSize({ width: host.clientWidth, height: HEIGHT });
  });
  resized.observe(host);
  if (pick) {
    host.classList.add("picked");
    host.addEventListener("click", () => {
      const at = plot?.cursor.idx;
      if (at !== null && at !== undefined) pick(data[0][at]);
    });
  }
  document.addEventListener("tidegate:theme", draw, { signal });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw, { signal });
  signal.addEventListener("abort", () => {
    resized.disconnect();
    plot?.destroy();
  });
  return {
    element,
    update(at, lines) {
      data = [at, ...lines];
      drawn = stacked ? [at, ...stackedUp(lines)] : data;
      plot?.setData(drawn);
      if (plot?.cursor.idx === null || plot === null) tell(null);
      const latest = series.map(([label], line) => `${label} ${figures[line].textContent}`);
      host.setAttribute("role", "img");
      host.setAttribute("aria-label", `${title}, ${peaks ? "at most" : "newest"}: ${latest.join(", ") || "nothing"}`);
    },
    marks(events) {
      if (JSON.stringify(events) === JSON.stringify(marked)) return;
      marked = events;
      plot?.redraw(false);
    },
  };
}

const STACK = ["--chart-2", "--chart-1", "--chart-3", "--chart-5", "--chart-6", "--chart-7", "--line-strong"];

/** The same for stacked areas that may change: `update(at, [[name, values], ...])`. */
export function stack(title, words, { signal, ...more }) {
  const element = h("div", { class: "chart-place" });
  let [names, inner, round] = [null, null, null];
  let marked = [];

  function made(labels) {
    round?.abort();
    round = new AbortController();
    const series = labels.map((label, at) => [label, STACK[at % STACK.length], true]);
    inner = chart(title, series, words, {
      ...more,
      signal: AbortSignal.any([signal, round.signal]),
      stacked: true,
    });
    inner.marks(marked);
    fill(element, inner.element);
  }

  return {
    element,
    update(at, named) {
      const rows = named.length ? named : [["no waiting calls", at.map(() => 0)]];
      const labels = rows.map(([name]) => name);
      if (JSON.stringify(labels) !== names) {
        names = JSON.stringify(labels);
        made(labels);
      }
      inner.update(at, rows.map(([, values]) => values));
    },
    marks(events) {
      marked = events;
      inner?.marks(events);
    },
  };
}

/**
 * Return each line plus the sum of all lines after it. The first line is drawn first, and the
 * others over it.
 */
function stackedUp(lines) {
  const found = [];
  let below = null;
  for (const line of lines.toReversed()) {
    below = line.map((value, at) => (value ?? 0) + (below?.[at] ?? 0));
    found.unshift(below);
  }
  return found;
}

/** Return the time under the pointer, and the event at that time. */
function momentOf(times, at, marked) {
  const [from, until] = [times[at], times[at + 1] ?? times[at] + (times[at] - (times[at - 1] ?? times[at]))];
  const event = marked.find((one) => one.at >= from && one.at < until);
  const moment = seconds.format(from * 1_000);
  return event ? `${moment} · ${event.words}` : moment;
}

/** Format a value for an axis, without trailing zeros. */
const marked = (words) => (value) =>
  value === 0 ? "0" : words(value).replace(/(\.\d*?)0+(?=\D)/, "$1").replace(/\.(?=\D)/, "");

/**
 * Return the indexes of values without a neighbour, which are drawn as dots because no line leads
 * to them.
 */
function alone(plot, line) {
  const values = plot.data[line];
  const isThere = (at) => values[at] !== null && values[at] !== undefined;
  return [...values.keys()].filter((at) => isThere(at) && !isThere(at - 1) && !isThere(at + 1));
}

/** Return the times of an axis, with seconds where two marks are of one minute. */
function timesOf(at) {
  const words = at.map((s) => minutes.format(s * 1e3));
  return new Set(words).size < words.length ? at.map((s) => seconds.format(s * 1e3)) : words;
}

function options(width, { series, words, least, tell, stacked, marks }) {
  const axis = {
    stroke: colour("--text-quiet"),
    font: AXIS_FONT,
    grid: { stroke: colour("--line"), width: 1 },
    ticks: { show: false },
  };
  return {
    width,
    height: HEIGHT,
    legend: { show: false },
    cursor: { y: false, drag: { x: false, y: false }, points: { size: 5 } },
    scales: { y: { range: (_plot, _min, max) => [0, Math.max(least, (max ?? 0) * 1.08)] } },
    axes: [
      { ...axis, size: 24, space: 64, values: (_plot, at) => timesOf(at) },
      {
        ...axis,
        ...(words.steps ? { incrs: words.steps } : {}),
        size: 58,
        space: 26,
        gap: 4,
        values: (_plot, all) => all.map(marked(words.axis?.(all) ?? words.short ?? words)),
      },
    ],
    series: [
      {},
      ...series.map(([label, name, filled]) => ({
        label,
        stroke: colour(name),
        width: 1.5,
        fill: filled ? `${colour(name)}${stacked ? "" : "22"}` : undefined,
        points: { show: false, filter: alone, size: 5, width: 1, fill: colour(name) },
        spanGaps: false,
      })),
    ],
    hooks: {
      setCursor: [(plot) => tell(plot.cursor.idx)],
      draw: [(plot) => upright(plot, marks())],
    },
  };
}

/** Draw a vertical line for each event within the shown times. */
function upright(plot, events) {
  const { ctx, bbox } = plot;
  ctx.save();
  ctx.strokeStyle = colour("--text-quiet");
  ctx.lineWidth = devicePixelRatio;
  ctx.setLineDash([4, 3]);
  for (const { at } of events) {
    const x = Math.round(plot.valToPos(at, "x", true));
    if (x < bbox.left || x > bbox.left + bbox.width) continue;
    ctx.beginPath();
    ctx.moveTo(x, bbox.top);
    ctx.lineTo(x, bbox.top + bbox.height);
    ctx.stroke();
  }
  ctx.restore();
}
