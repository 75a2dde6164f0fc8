// Each budget as a gauge: spent and reserved amounts, the reset time, and what happens at its end.

import { post, Problem } from "../../api.js";
import { fill, h, keyed, mark, say } from "../../dom.js";
import { brief, count, length, money, time } from "../../format.js";
import { confirm, field, toast } from "../../ui.js";

const MICROS = 1_000_000;

/** Hidden while there is no budget. */
export function budgetsCard() {
  const list = h("ul", { class: "limits budgets" });
  const draw = keyed(list, row);
  const note = h("span", { class: "quiet-text" });
  const ofAll = h("span", { class: "quiet-text", hidden: true }, "of all upstreams");
  const more = h("p", { class: "quiet-text card-body", hidden: true });
  const element = h(
    "section",
    { class: "card", "aria-label": "Budgets", hidden: true },
    h("div", { class: "card-head" }, h("h2", {}, "Budgets"), ofAll, note),
    h(
      "div",
      { class: "limit budget limit-heads", "aria-hidden": "true" },
      ["Budget", "", "Spent", "State", ""].map((words) => h("div", {}, words)),
    ),
    list,
    more,
  );
  return {
    element,
    ofAll,
    update(frame) {
      element.hidden = !frame.budgets.length;
      draw(frame.budgets, (one) => JSON.stringify([one.name, one.scope]));
      const paused = frame.paused ? `${count(frame.paused)} paused: calls are rejected until a person resumes the budget` : "";
      say(note, paused || "spent and reserved in the current period");
      more.hidden = !frame.more;
      say(more, `${count(frame.more)} more with lower usage: tidegate budgets list`);
    },
  };
}

/** `people: ann`, or only the name for a budget with a single book. */
export function titleOf(one) {
  const whose = one.scope.map((value, place) => value ?? `no ${one.each[place]}`).join(", ");
  return whose ? `${one.name}: ${whose}` : one.name;
}

function row(first) {
  let latest = first;
  const title = titleOf(first);
  const spent = h("div", { class: "gauge-used" });
  const held = h("div", { class: "gauge-held" });
  const gauge = h("div", { class: "gauge", role: "meter", "aria-label": title }, spent, held);
  const words = h("span", { class: "quiet-text" });
  const figure = h("span", { class: "figures" });
  const left = h("span", { class: "quiet-text" });
  const badges = h("span", { class: "badges" });
  const go = h("button", { class: "button small", type: "button", needs: "operator" }, "");
  go.addEventListener("click", () => resumeBudget(latest, title));
  const element = h(
    "li",
    { class: "limit budget", data: { budget: first.name } },
    h("div", { class: "limit-name" }, h("b", { title }, title), words),
    h("div", { class: "limit-gauge" }, gauge),
    h("div", { class: "limit-used" }, figure, left),
    h("div", { class: "limit-state" }, badges),
    h("div", { class: "limit-actions" }, go),
  );
  return {
    element,
    update(one) {
      latest = one;
      const isPaused = one.paused_since !== null;
      say(words, one.words);
      mark(words, "title", one.words);
      say(figure, `${amount(one, one.spent)} of ${amount(one, one.amount)}`);
      mark(figure, "title", one.estimated ? `${amount(one, one.estimated)} of it is estimated` : null);
      say(left, leftOf(one));
      drawGauge(one, { gauge, spent, held });
      mark(element, "data-full", one.spent >= one.amount);
      mark(element, "data-paused", isPaused);
      drawState(badges, one, isPaused);
      say(go, isPaused ? "Resume" : "Allow more");
      mark(go, "class", `button small ${isPaused ? "" : "quiet"}`);
      mark(go, "aria-label", isPaused ? `Resume ${title}` : `Allow more of ${title}`);
    },
  };
}

const amount = (one, value) => (one.unit === "usd" ? money(value / MICROS) : brief(value));

function leftOf(one) {
  const unit = one.unit === "usd" ? "" : " tokens";
  const left = `${amount(one, Math.max(0, one.amount - one.spent - one.held))}${unit} left`;
  return one.held ? `${left}, ${amount(one, one.held)} reserved` : left;
}

function drawGauge(one, { gauge, spent, held }) {
  const most = Math.max(one.amount, 1);
  const share = (value) => `${Math.min(100, (value / most) * 100)}%`;
  spent.style.width = share(one.spent);
  held.style.width = share(Math.min(one.held, Math.max(0, most - one.spent)));
  mark(gauge, "aria-valuemin", 0);
  mark(gauge, "aria-valuemax", most);
  mark(gauge, "aria-valuenow", Math.min(one.spent, most));
  mark(gauge, "aria-valuetext", `${amount(one, one.spent)} of ${amount(one, one.amount)} spent`);
}

function drawState(badges, one, isPaused) {
  const said = [];
  if (isPaused) said.push(["bad", "Paused", `since ${time(one.paused_since)}`]);
  else if (one.spent >= one.amount) said.push(["warn", "Used up", atEnd(one)]);
  const until = one.reset_at === null ? 0 : new Date(one.reset_at).getTime() - Date.now();
  const resets = one.reset_at === null ? "" : `resets in ${length(minutesOf(until))}`;
  const text = JSON.stringify([said, resets]);
  if (badges.dataset.said === text) return;
  badges.dataset.said = text;
  fill(
    badges,
    said.map(([kind, words, title]) => h("span", { class: `badge ${kind}`, title }, words)),
    isPaused && h("span", { class: "quiet-text" }, `since ${time(one.paused_since)}`),
    !isPaused && resets && h("span", { class: "quiet-text", title: time(one.reset_at) }, resets),
    !isPaused && !resets && h("span", { class: "quiet-text" }, "rolling window"),
  );
}

const minutesOf = (ms) => Math.max(60_000, Math.ceil(ms / 60_000) * 60_000);
const atEnd = (one) => (one.fallback ? `calls use ${one.fallback}` : "calls are rejected");

export function resumeBudget(one, title) {
  const isPaused = one.paused_since !== null;
  const unit = one.unit === "usd" ? "USD" : "tokens";
  const extra = field("extra", `Extra amount for this period, in ${unit}`, {
    type: "number",
    value: isPaused ? "0" : "",
    hint: `Spent: ${amount(one, one.spent)} of ${amount(one, one.amount)}. The extra amount ends with the period.`,
  });
  return confirm({
    title: isPaused ? `Resume ${title}?` : `Allow more of ${title}`,
    text: isPaused ? "Calls are admitted again while the budget has room. Without room it pauses again, unless you add an extra amount." : "",
    fields: [extra],
    action: isPaused ? "Resume" : "Allow more",
    act: async (values) => {
      if (!isPaused && !(values.extra > 0)) throw new Problem({ detail: "Enter an amount above 0.", field: "extra" });
      const body = { by: "dashboard", scope: one.scope };
      body[one.unit === "usd" ? "extra_usd" : "extra_tokens"] = values.extra ?? 0;
      await post(`admin/budgets/${encodeURIComponent(one.name)}/resume`, body);
      toast(isPaused ? `${title} is resumed.` : `${title} allows ${amount(one, (values.extra ?? 0) * (one.unit === "usd" ? MICROS : 1))} more.`);
    },
  });
}
