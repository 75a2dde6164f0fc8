// Alerts: what needs a look now, what was posted to the operators' webhook, and which budgets post.

import { get, post, Problem } from "../api.js";
import { fill, h, say } from "../dom.js";
import { ago, count, length, money, time } from "../format.js";
import { listed } from "../listed.js";
import { repeat } from "../poll.js";
import { link } from "../router.js";
import { confirm, empty, said, toast } from "../ui.js";

const EVERY_MS = 5_000;
const SIGNS = { healthy: "●", degraded: "▲", down: "■" };
const LOOKS = { healthy: "", degraded: "warn", down: "bad" };
const STATES = { pending: ["warn", "Pending"], delivered: ["good", "Delivered"], given_up: ["bad", "Given up"] };
const KINDS = { budget_share: "A share of a budget", budget_out: "A budget is spent", budget_paused: "A budget is paused",
  upstreams_out: "No upstream takes calls", upstream_out: "An upstream is out", key_refused: "A key is refused",
  limit_paused: "A limit is paused", drift: "The provider's limit differs", test: "Test" };
const HEADS = [
  ["Raised", ""],
  ["What", "wide"],
  ["Text", "wrap"],
  ["State", ""],
  ["", "actions"],
];
const RULES = [
  ["Budget", ""],
  ["Amount", "number"],
  ["Alerts", ""],
];

export async function open(main, { signal }) {
  const away = h("p", { class: "notice bad", role: "alert", hidden: true });
  const now = h("ul", { class: "alert-causes" });
  const channel = h("div", { class: "card-body" });
  const test = h("button", { class: "button small", type: "button", needs: "operator", on: { click: () => sendTest(look) } }, "Send a test");
  const sent = listed("Posted", HEADS, (one) => `${one.text} ${one.kind} ${one.state}`, (one) => row(one, look), {
    none: ["No alert was raised yet", "A budget raises one at each share that it names (tidegate budgets set NAME --alert 80), when it refuses its first call, and when it is paused."],
  });
  const rules = listed("Budgets that raise alerts", RULES, (one) => one.name, rule, {
    none: ["There are no budgets", "tidegate budgets set all --usd 3000 --alert 80 --alert 100 makes one that raises an alert at 80 and at 100 percent."],
  });
  const kept = new Map();
  // A row that is the same keeps its focus.
  const whenNew = (name, value, show) => {
    const text = JSON.stringify(value);
    if (kept.get(name) !== text) show(value);
    kept.set(name, text);
  };

  async function look() {
    try {
      const [found, budgets] = await Promise.all([get("admin/alerts", { signal }), get("admin/budgets", { signal })]);
      away.hidden = true;
      whenNew("causes", found.causes, (causes) => fill(now, causes.length ? causes.map(cause) : h("li", { class: "quiet-text" }, "Nothing needs a look.")));
      whenNew("channel", found.channel, (given) => fill(channel, channelWords(given)));
      test.hidden = found.channel.place === null;
      whenNew("items", found.items, sent.show);
      for (const one of sent.element.querySelectorAll("time")) say(one, ago(one.dateTime));
      whenNew("rules", budgets.items ?? budgets, rules.show);
    } catch (problem) {
      if (signal.aborted) return;
      if (!(problem instanceof Problem)) throw problem;
      away.hidden = false;
      say(away, said(problem));
    }
  }

  await look();
  repeat(EVERY_MS, look, signal);
  main.append(
    h("div", { class: "page-head" }, h("h1", {}, "Alerts")),
    away,
    h(
      "section",
      { class: "card", "aria-label": "Now" },
      h("div", { class: "card-head" }, h("h2", {}, "Now"), h("span", { class: "quiet-text" }, "as tidegate status says it; act on the overview"), h("div", { class: "end" }, h("a", { class: "button small", href: link("/") }, "Overview"))),
      now,
    ),
    h("section", { class: "card", "aria-label": "Channel" }, h("div", { class: "card-head" }, h("h2", {}, "Where alerts go"), h("div", { class: "end" }, test)), channel),
    sent.element,
    rules.element,
  );
}

function cause(one) {
  return h(
    "li",
    { data: { cause: one.kind } },
    h("span", { class: `badge ${LOOKS[one.level]}` }, SIGNS[one.level], " ", one.level === "healthy" ? "worth a look" : one.level),
    h("div", {}, h("b", {}, one.words), one.detail && h("span", { class: "quiet-text" }, " ", one.detail), one.command && h("code", { class: "quiet-text" }, one.command)),
  );
}

function channelWords(channel) {
  const others = h(
    "p",
    { class: "quiet-text" },
    "Alerts on calls, waits, processes and stores are rules of Prometheus: deploy/prometheus/alerts.yml, each with its entry in docs/runbook.md. They fire there, and are not shown here.",
  );
  if (channel.place === null) {
    return [h("p", {}, h("b", {}, "Nowhere: "), "set ALERT_WEBHOOK_URL, and start the workers again. ALERT_FORMAT=slack posts what Slack and compatible services take."), others];
  }
  const how = channel.format === "slack" ? "as a text for Slack" : "as JSON";
  return [h("p", {}, "To ", h("b", {}, channel.place), `, ${how}, ${channel.is_signed ? "signed by WEBHOOK_SECRET" : "not signed"}. What is not answered with 2xx is tried again.`), others];
}

function row(one, again) {
  const [look, words] = STATES[one.state];
  const resend = h("button", { class: "button small quiet", type: "button", needs: "operator", "aria-label": `Post ${one.id} again` }, "Post again");
  resend.addEventListener("click", () => redeliver(one, again));
  const problem = one.problem ? `${one.problem}; ${one.tries === 1 ? "1 try" : `${count(one.tries)} tries`}` : "";
  const next = one.due_at && one.problem ? `, next ${time(one.due_at)}` : "";
  return h(
    "tr",
    { data: { alert: one.id, state: one.state } },
    h("td", {}, h("time", { datetime: one.created_at, title: time(one.created_at) }, ago(one.created_at))),
    h("td", { class: "wide" }, KINDS[one.kind] ?? one.kind),
    h("td", { class: "wrap" }, one.text, problem && h("span", { class: "quiet-text" }, ` ${problem}${next}`)),
    h("td", {}, h("span", { class: `badge ${look}` }, words)),
    h("td", { class: "actions" }, one.state !== "pending" && resend),
  );
}

function rule(one) {
  const amount = one.unit === "usd" ? money(one.amount / 1e6) : `${count(one.amount)} tokens`;
  const period = one.period === "rolling" ? `in ${length(one.window_s * 1_000)}` : `a ${one.period}`;
  const shares = one.alerts.length ? `at ${one.alerts.map((share) => `${share} %`).join(", ")}, ` : "";
  return h(
    "tr",
    { data: { rule: one.name } },
    h("th", { scope: "row", class: "name", title: one.name }, one.name),
    h("td", { class: "number" }, `${amount} ${period}`),
    h("td", {}, `${shares}when it refuses its first call${one.at_end === "pause" ? ", when it is paused" : ""}`),
  );
}

async function sendTest(again) {
  const done = await confirm({
    title: "Send a test alert?",
    text: "A worker posts it to the webhook, as every alert.",
    action: "Send it",
    act: () => post("admin/alerts/test", { by: "dashboard" }),
  });
  if (done === null) return;
  toast("It is on its way: its state is below.");
  await again();
}

async function redeliver(one, again) {
  const done = await confirm({
    title: "Post it again?",
    text: one.text,
    action: "Post again",
    act: () => post(`admin/alerts/${one.id}/redeliver`, { by: "dashboard" }),
  });
  if (done === null) return;
  toast("It is on its way again.");
  await again();
}
