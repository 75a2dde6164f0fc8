// Recorded spend by tenant and by model.

import { fill, h, say } from "../../dom.js";
import { brief, count, counted, money } from "../../format.js";
import { link } from "../../router.js";
import { choice, empty } from "../../ui.js";

const SPANS = { day: "Today", month: "This month" };
const SHOWN = 8;

export function spendCard() {
  let span = "day";
  let latest = null;
  const tables = h("div", { class: "pair" });
  const note = h("span", { class: "quiet-text" });
  const judged = h("p", { class: "quiet-text card-body", hidden: true });
  const show = () => {
    if (latest === null) return;
    const { tenants, models, total } = latest[span];
    const cost = total.cost_micros ? `, ${money(total.cost_micros / 1e6)}` : "";
    say(note, `${counted(total.requests, "request", "requests", brief)}${cost}, days in UTC`);
    fill(
      tables,
      total.requests
        ? [table("Tenant", tenants, total), table("Model", models, total)]
        : empty("No spend yet", "A request counts once it is on record."),
    );
  };
  return {
    element: h(
      "section",
      { class: "card", "aria-label": "Spend" },
      h(
        "div",
        { class: "card-head" },
        h("h2", {}, "Spend"),
        note,
        h(
          "div",
          { class: "end" },
          h("a", { class: "quiet-text", href: link("/usage") }, "Details"),
          choice("Period", SPANS, span, (chosen) => {
            span = chosen;
            show();
          }),
        ),
      ),
      tables,
      judged,
    ),
    /** Calls of the classifier are charged to no tenant, and so are not in the tables. */
    trend({ totals, words }) {
      judged.hidden = !totals.judged;
      if (!totals.judged) return;
      const cost = totals.judged_cost_micros ? `, ${money(totals.judged_cost_micros / 1e6)}` : "";
      const asked = totals.judged === 1 ? "1 question" : `${brief(totals.judged)} questions`;
      const tokens = `${brief(totals.judged_tokens)} tokens${cost}`;
      say(judged, `Not included: ${asked} of the classifier in the last ${words}, ${tokens}`);
    },
    record(frame) {
      if (JSON.stringify(latest) === JSON.stringify(frame.spent)) return;
      latest = frame.spent;
      show();
    },
  };
}

function table(label, rows, total) {
  const shown = rows.slice(0, SHOWN);
  const isPriced = total.cost_micros > 0;
  const body = shown.map((one) => {
    const tokens = one.input_tokens + one.output_tokens + one.thoughts_tokens;
    const cost = one.unpriced && !one.cost_micros ? "no price" : money(one.cost_micros / 1e6);
    return h(
      "tr",
      {},
      h("th", { scope: "row", class: "name", title: one.name }, one.name || "(none)"),
      h("td", { class: "number" }, brief(one.requests)),
      h("td", { class: "number", title: `${count(tokens)} tokens` }, brief(tokens)),
      isPriced && h("td", { class: "number" }, cost),
    );
  });
  const heads = ["Requests", "Tokens", isPriced && "Cost"].filter(Boolean);
  return h(
    "div",
    { class: "scroll", tabindex: "0", role: "group", "aria-label": `Spend by ${label}, a table` },
    h(
      "table",
      { class: "table" },
      h(
        "thead",
        {},
        h(
          "tr",
          {},
          h("th", { scope: "col" }, label),
          heads.map((words) => h("th", { scope: "col", class: "number" }, words)),
        ),
      ),
      h("tbody", {}, body),
    ),
    rows.length > SHOWN &&
      h("p", { class: "quiet-text card-body" }, `and ${count(rows.length - SHOWN)} more`),
  );
}
