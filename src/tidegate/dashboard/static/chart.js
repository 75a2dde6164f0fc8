// A line chart over time: uPlot, with our colours, units and legend.

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
 * `series`: `[label, name of the colour, filled?]` of each line; `words(value)` says a value.
 *
 * `update(at, lines)`: times in seconds, and the values of each line (null: no call in that span).
 * Its room is kept while there is nothing to draw. `signal` takes it away.
 */
export function chart(title, series, words, { signal, least = 0 }) {
  const host = h("div", { class: "chart-canvas" });
  const figures = series.map(() => h("b", {}, NOTHING));
  const legend = series.map(([label, name], at) => {
    const swatch = h("i", { class: "swatch", "aria-hidden": "true" });
    swatch.style.background = `var(${name})`;
    return h("li", {}, swatch, label, " ", figures[at]);
  });
  const when = h("span", { class: "quiet-text" });
  const element = h(
    "section",
    { class: "card chart" },
    h("div", { class: "card-head" }, h("h2", {}, title), when),
    h("div", { class: "card-body" }, h("ul", { class: "legend" }, legend), host),
  );
  let data = [[], ...series.map(() => [])];
  let plot = null;

  function tell(at) {
    const place = at ?? data[0].length - 1;
    figures.forEach((figure, line) => {
      const value = data[line + 1][place];
      say(figure, value === null || value === undefined ? NOTHING : words(value));
    });
    say(when, at === null || at === undefined ? "" : seconds.format(data[0][at] * 1_000));
  }

  function draw() {
    plot?.destroy();
    fill(host);
    plot = new uPlot(options(host.clientWidth || 300, series, words, least, tell), data, host);
  }

  const resized = new ResizeObserver(() => {
    if (plot === null) draw();
    else if (host.clientWidth) plot.setSize({ width: host.clientWidth, height: HEIGHT });
  });
  resized.observe(host);
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
      plot?.setData(data);
      if (plot?.cursor.idx === null || plot === null) tell(null);
      const latest = series.map(([label], line) => `${label} ${figures[line].textContent}`);
      host.setAttribute("role", "img");
      host.setAttribute("aria-label", `${title}, newest: ${latest.join(", ")}`);
    },
  };
}

/** A value at an axis, in few letters: without the zeros that figures keep for their width. */
const marked = (words) => (value) =>
  value === 0 ? "0" : words(value).replace(/(\.\d*?)0+(?=\D)/, "$1").replace(/\.(?=\D)/, "");

/** The places of values that have none beside them: no line goes there, so each is drawn as a dot. */
function alone(plot, line) {
  const values = plot.data[line];
  const isThere = (at) => values[at] !== null && values[at] !== undefined;
  return [...values.keys()].filter((at) => isThere(at) && !isThere(at - 1) && !isThere(at + 1));
}

function options(width, series, words, least, tell) {
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
      { ...axis, size: 24, space: 64, values: (_plot, at) => at.map((s) => minutes.format(s * 1e3)) },
      {
        ...axis,
        ...(words.steps ? { incrs: words.steps } : {}),
        size: 58,
        space: 26,
        gap: 4,
        values: (_plot, all) => all.map(marked(words.short ?? words)),
      },
    ],
    series: [
      {},
      ...series.map(([label, name, filled]) => ({
        label,
        stroke: colour(name),
        width: 1.5,
        fill: filled ? `${colour(name)}22` : undefined,
        points: { show: false, filter: alone, size: 5, width: 1, fill: colour(name) },
        spanGaps: false,
      })),
    ],
    hooks: { setCursor: [(plot) => tell(plot.cursor.idx)] },
  };
}
