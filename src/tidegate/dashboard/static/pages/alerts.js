// Alerts: what needs attention now, which alerts were raised and posted to the operators' webhook,
// and which budgets raise them.

import { get, post, Problem } from "../api.js";
import { fill, h, say } from "../dom.js";
import { ago, capital, count, length, money, time } from "../format.js";
import { listed } from "../listed.js";
import { repeat } from "../poll.js";
import { link } from "../router.js";
import { confirm, empty, said, toast } from "../ui.js";

const EVERY_MS = 5_000;
const SIGNS = { healthy: "●", degraded: "▲", down: "■" };
const LOOKS = { healthy: "", degraded: "warn", down: "bad" };
const STATES = { unposted: ["", "Not posted"], pending: ["warn", "Pending"], delivered: ["good", "Delivered"], given_up: ["bad", "Given up"] };
const KINDS = { budget_share: "Budget share reached", budget_out: "Budget used up", budget_paused: "Budget paused",
  upstreams_out: "All upstreams out of service", upstream_out: "Upstream out of service", key_refused: "Key rejected",
  limit_paused: "Limit paused", drift: "Provider's limit differs", test: "Test" };
const HEADS = [
  ["Raised", ""],
  ["Alert", "wide"],
  ["Message", "wrap"],
  ["State", ""],
  ["", "actions"],
];
const RULES = [
  ["Budget", ""],
  ["Amount", "number"],
  ["Alerts", "wrap"],
];

export async function open(main, { signal }) {
  const away = h("p", { class: "notice bad", role: "alert", hidden: true });
  const now = h("ul", { class: "alert-causes" });
  const channel = h("div", { class: "card-body" });
  const test = h("button", { class: "button small", type: "button", needs: "operator", on: { click: () => sendTest(look) } }, "Send a test");
  const sent = listed("Raised", HEADS, (one) => `${one.text} ${one.kind} ${one.state}`, (one) => row(one, look), {
    none: ["No alerts yet", "A budget raises an alert at each share set with tidegate budgets set NAME --alert 80, when it rejects its first call, and when it is paused."],
  });
  const rules = listed("Budgets that raise alerts", RULES, (one) => one.name, rule, {
    none: ["No budgets", "tidegate budgets set all --usd 3000 --alert 80 --alert 100 creates a budget with alerts at 80 % and 100 %."],
  });
  const kept = new Map();
  // An unchanged row keeps its focus.
  const whenNew = (name, value, show) => {
    const text = JSON.stringify(value);
    if (kept.get(name) !== text) show(value);
    kept.set(name, text);
  };

  async function look() {
    try {
      const [found, budgets] = await Promise.all([get("admin/alerts", { signal }), get("admin/budgets", { signal })]);
      away.hidden = true;
      whenNew("causes", found.causes, (causes) => fill(now, causes.length ? causes.map(cause) : h("li", { class: "quiet-text" }, "No problems.")));
      whenNew("channel", found.channel, (given) => fill(channel, channelWords(given)));
      test.hidden = found.channel.place === null;
      const isPosted = found.channel.place !== null;
      whenNew("items", found.items.map((one) => (isPosted || one.state !== "pending" ? one : { ...one, state: "unposted" })), sent.show);
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
      h("div", { class: "card-head" }, h("h2", {}, "Now"), h("span", { class: "quiet-text" }, "as in tidegate status; actions are on the overview"), h("div", { class: "end" }, h("a", { class: "button small", href: link("/") }, "Overview"))),
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
    h("span", { class: `badge ${LOOKS[one.level]}` }, SIGNS[one.level], " ", one.level === "healthy" ? "Notice" : capital(one.level)),
    h("div", {}, h("b", {}, one.words), one.detail && h("span", { class: "quiet-text" }, " ", one.detail), one.command && h("code", { class: "quiet-text" }, one.command)),
  );
}

function channelWords(channel) {
  const others = h(
    "p",
    { class: "quiet-text" },
    "Alerts on calls, waits, processes and stores are Prometheus rules: deploy/prometheus/alerts.yml, with an entry for each in docs/runbook.md. They fire in Prometheus and are not shown here.",
  );
  if (channel.place === null) {
    return [h("p", {}, h("b", {}, "Not set up: "), "set ALERT_WEBHOOK_URL and restart the workers. ALERT_FORMAT=slack posts in the format of Slack and compatible services."), others];
  }
  const how = channel.format === "slack" ? "in Slack's format" : "as JSON";
  return [h("p", {}, "To ", h("b", {}, channel.place), `, ${how}, ${channel.is_signed ? "signed by WEBHOOK_SECRET" : "not signed"}. Alerts that are not answered with 2xx are retried.`), others];
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
    h("td", { class: "actions" }, !["pending", "unposted"].includes(one.state) && resend),
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
    h("td", { class: "wrap" }, `${shares}at the first rejected call${one.at_end === "pause" ? ", when paused" : ""}`),
  );
}

async function sendTest(again) {
  const done = await confirm({
    title: "Send a test alert?",
    text: "A worker posts it to the alert webhook.",
    action: "Send",
    act: () => post("admin/alerts/test", { by: "dashboard" }),
  });
  if (done === null) return;
  toast("Test alert queued. Its state is in the list.");
  await again();
}

async function redeliver(one, again) {
  const done = await confirm({
    title: "Post this alert again?",
    text: one.text,
    action: "Post again",
    act: () => post(`admin/alerts/${one.id}/redeliver`, { by: "dashboard" }),
  });
  if (done === null) return;
  toast("Alert queued again.");
  await again();
}
