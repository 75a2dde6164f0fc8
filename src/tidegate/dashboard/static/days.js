// Amounts by day or by hour as stacked columns, with a legend of the sums.

import { fill, h, say } from "./dom.js";

// One colour for each part; the last is for all other parts.
const COLOURS = ["--chart-1", "--chart-2", "--chart-3", "--chart-5", "--chart-6", "--chart-7"];
export const MOST_PARTS = COLOURS.length;
const REST = "--line-strong";

/**
 * A card: `update({ title, days, parts, format })`.
 *
 * `days`: texts such as `2026-11-28`. `parts`: `{ name, values }` with a value for each day; parts
 * after the first `MOST_PARTS` share one colour. The legend shows the sums (by `sum`), or the
 * values of the day under the pointer. `pick(day)` is called for a click on a day. `wordsOf(day)`
 * formats a day.
 */
export function dayColumns(pick, wordsOf = dayWords, sum = sumOf) {
  const title = h("h2", {});
  const when = h("span", { class: "quiet-text" });
  const legend = h("ul", { class: "legend" });
  const marks = h("div", { class: "days-marks", "aria-hidden": "true" });
  const columns = h("div", { class: "days-columns" });
  const ends = h("div", { class: "days-ends quiet-text", "aria-hidden": "true" });
  const picture = h("div", { class: "days-picture", role: "img" }, marks, columns);
  const body = h("div", { class: "card-body days" }, legend, picture, ends);
  const element = h("section", { class: "card" }, h("div", { class: "card-head" }, title, when), body);
  let shown = { days: [], parts: [], format: String };

  function tell(at) {
    const { days, parts, format } = shown;
    const values = parts.map((one) => (at === null ? sum(one.values) : one.values[at]));
    say(when, at === null ? "" : wordsOf(days[at]));
    [...legend.children].forEach((row, place) => say(row.lastChild, format(values[place])));
  }

  columns.addEventListener("pointerover", (event) => {
    const at = [...columns.children].indexOf(event.target.closest(".day"));
    tell(at < 0 ? null : at);
  });
  columns.addEventListener("pointerleave", () => tell(null));
  columns.addEventListener("click", (event) => {
    const at = [...columns.children].indexOf(event.target.closest(".day"));
    if (at >= 0) pick(shown.days[at]);
  });
  return {
    element,
    update(found) {
      shown = found;
      const { days, parts, format } = found;
      say(title, found.title);
      element.setAttribute("aria-label", found.title);
      const sums = days.map((_, at) => parts.reduce((sum, one) => sum + one.values[at], 0));
      const most = upTo(Math.max(0, ...sums));
      fill(marks, [1, 0.5].map((share) => h("span", {}, most ? (format.short ?? format)(most * share) : "")));
      fill(columns, days.map((_, at) => column(parts.map((one) => one.values[at]), most)));
      fill(ends, days.length ? [h("span", {}, wordsOf(days[0])), h("span", {}, wordsOf(days.at(-1)))] : "");
      fill(legend, parts.map((one, at) => entry(one.name, at)));
      const said = parts.map((one) => `${one.name} ${format(sum(one.values))}`).join(", ");
      picture.setAttribute("aria-label", `${found.title}: ${said || "nothing"}`);
      tell(null);
    },
  };
}

const sumOf = (values) => values.reduce((sum, one) => sum + one, 0);
const colourOf = (at) => `var(${COLOURS[at] ?? REST})`;

function column(values, most) {
  const parts = values.map((value, at) => {
    const part = h("i", {});
    part.style.height = most ? `${(value / most) * 100}%` : "0";
    part.style.background = colourOf(at);
    return part;
  });
  return h("div", { class: "day" }, parts.toReversed());
}

function entry(name, at) {
  const swatch = h("i", { class: "swatch", "aria-hidden": "true" });
  swatch.style.background = colourOf(at);
  return h("li", { title: name }, swatch, h("span", {}, name), " ", h("b", {}));
}

/** Return the next round number that is not smaller. */
function upTo(value) {
  if (value <= 0) return 0;
  const size = 10 ** Math.floor(Math.log10(value));
  return [1, 1.2, 1.6, 2, 3, 4, 5, 6, 8, 10].map((step) => step * size).find((step) => step >= value * 0.999_999);
}

const words = new Intl.DateTimeFormat("en-GB", { day: "numeric", month: "short", timeZone: "UTC" });

/** `28 Nov` */
export const dayWords = (day) => words.format(new Date(`${day}T00:00:00Z`));
