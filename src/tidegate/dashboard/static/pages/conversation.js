// One conversation or trace: its calls as a tree, with the wait, duration, tokens and cost of each.

import { get, Problem } from "../api.js";
import { fill, h, mark, say } from "../dom.js";
import { brief, count, length, money, NOTHING, percent, time } from "../format.js";
import { link } from "../router.js";
import { said } from "../ui.js";
import { linkTo, statusBadge } from "./request_words.js";

const EVERY_MS = 5_000;
const MOST_DEPTH = 6; // deeper threads are indented no further
const OPENING = "opening-";
const WHY = {
  answer: "continues the call above",
  trace: "within the call above, by its trace",
  time: "after the call above, by time",
};

export async function open(main, { query, signal }) {
  const page = pageOf(query, signal);
  await page.load();
  main.append(page.element);
  page.follow();
}

/** Return the URL of a conversation's page. */
export const talkLink = (tenant, conversation) => link("/requests/conversation", { tenant, conversation });

/** Return the URL of a trace's page. */
export const traceLink = (tenant, trace) => link("/requests/conversation", { tenant, trace });

/**
 * Return the displayed name; one derived from the first messages is not a name that a client chose.
 */
export const nameOf = (conversation) =>
  conversation.startsWith(OPENING) ? `unnamed, ${conversation.slice(OPENING.length)}` : conversation;

function pageOf(query, signal) {
  const tenant = query.get("tenant") ?? "";
  const [conversation, trace] = [query.get("conversation") ?? "", query.get("trace") ?? ""];
  const stale = h("p", { class: "notice", role: "status", hidden: true });
  const tiles = tilesOf();
  const part = h("p", { class: "notice", hidden: true });
  const body = h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Calls, as a table" });
  const named = trace ? ["Trace ", trace] : ["Conversation ", nameOf(conversation)];
  const requests = conversation && h("a", { class: "button", href: link("/requests", { tenant, conversation }) }, "View as a list");
  const element = h(
    "div",
    { class: "talk" },
    h("a", { class: "back", href: link("/requests") }, "← Requests"),
    h(
      "div",
      { class: "page-head" },
      h("h1", {}, named[0], h("span", { class: "mono id" }, named[1])),
      h("span", { class: "quiet-text" }, "of ", h("strong", {}, tenant)),
      h("div", { class: "end" }, requests),
    ),
    stale,
    tiles.element,
    part,
    h("section", { class: "card", "aria-label": "Calls" }, body),
  );
  let shown = "";

  function paint(view) {
    const text = JSON.stringify(view);
    if (text === shown) return;
    shown = text;
    tiles.show(view.sums);
    part.hidden = view.complete;
    const calls = view.threads.reduce((sum, one) => sum + one.calls.length, 0);
    say(part, `Showing the last ${count(calls)} of ${count(view.sums.calls)} calls. The figures above cover all of them.`);
    fill(body, tableOf(view, Boolean(trace)));
  }

  async function load() {
    const asked = new URLSearchParams({ tenant, ...(trace ? { trace } : { conversation }) });
    paint(await get(`admin/conversations?${asked}`, { signal }));
  }

  /** Refresh the page periodically, unless something in it has the focus. */
  function follow() {
    const timer = setInterval(async () => {
      const isUsed = body.contains(document.activeElement) && document.activeElement !== body;
      if (document.hidden || isUsed || String(getSelection()) !== "") return;
      try {
        await load();
        stale.hidden = true;
      } catch (error) {
        if (signal.aborted) return;
        if (!(error instanceof Problem)) throw error;
        stale.hidden = false;
        say(stale, `${said(error)} Showing the last known state.`);
      }
    }, EVERY_MS);
    signal.addEventListener("abort", () => clearInterval(timer));
  }

  return { element, load, follow };
}

const TILES = {
  calls: "Calls",
  input: "Input tokens",
  cached: "Cached input",
  output: "Output tokens",
  cost: "Cost",
  waited: "Waited",
  took: "Upstream time",
  lasted: "Total duration",
};

function tilesOf() {
  const shown = {};
  const tiles = Object.entries(TILES).map(([name, label]) => {
    const figure = h("dd", { class: "tile-figure" }, NOTHING);
    const below = h("dd", { class: "tile-note" }, " ");
    shown[name] = { figure, below };
    return h("div", { class: "tile", data: { figure: name } }, h("dt", {}, label), figure, below);
  });
  const put = (name, figure, below, kind = null) => {
    say(shown[name].figure, figure);
    say(shown[name].below, below || " ");
    mark(shown[name].figure.parentElement, "data-kind", kind);
  };
  function show(sums) {
    const each = (total) => (sums.calls > 1 ? `${length(total / sums.calls)} a call` : "");
    put("calls", count(sums.calls), sums.failed ? `${count(sums.failed)} did not succeed` : "all succeeded", sums.failed ? "bad" : null);
    put("input", brief(sums.input_tokens), sums.calls > 1 ? `${brief(Math.round(sums.input_tokens / sums.calls))} a call` : "");
    put("cached", percent(sums.cached_share), sums.cached_share === undefined ? "not reported" : `${brief(sums.cached_tokens)} tokens`);
    put("output", brief(sums.output_tokens), "");
    const isPriced = sums.cost_micros > 0 || !sums.unpriced;
    const unpriced = sums.unpriced ? `${count(sums.unpriced)} without a price` : "";
    put("cost", isPriced ? money(sums.cost_micros / 1e6) : NOTHING, unpriced);
    put("waited", length(sums.queue_ms), each(sums.queue_ms));
    put("took", length(sums.upstream_ms), each(sums.upstream_ms));
    put("lasted", length(new Date(sums.ended_at) - new Date(sums.began_at)), `from ${time(sums.began_at)}`);
  }
  return { element: h("dl", { class: "tiles", "aria-label": "Totals" }, tiles), show };
}

const HEADS = [
  ["Call", "c-id"],
  ["Status", "c-status"],
  ["Received", "c-time wide"],
  ["Upstream", "c-upstream wide"],
  ["Waited", "c-number number wide"],
  ["Call time", "c-number number wide"],
  ["Input", "c-number number wide"],
  ["Cached", "c-number number wide"],
  ["Output", "c-number number wide"],
  ["Cost", "c-number number wide"],
];

function tableOf(view, isTrace) {
  const under = new Map();
  const roots = [];
  for (const thread of view.threads) {
    if (thread.under === undefined) roots.push(thread);
    else under.set(thread.under, [...(under.get(thread.under) ?? []), thread]);
  }
  const rows = [];
  const headed = view.threads.length > 1;
  let number = 0;
  // Each thread is drawn once, so that recursion is no deeper than the nesting of threads.
  const draw = (thread, depth) => {
    number += 1;
    if (headed) rows.push(headOf(thread, number, Math.min(depth, MOST_DEPTH), isTrace));
    for (const call of thread.calls) {
      rows.push(rowOf(call, Math.min(headed ? depth + 1 : 0, MOST_DEPTH)));
      const below = under.get(call.request_id) ?? [];
      under.delete(call.request_id);
      for (const one of below) draw(one, depth + 1);
    }
  };
  for (const thread of roots) draw(thread, 0);
  return h(
    "table",
    { class: "table requests calls" },
    h("thead", {}, h("tr", {}, HEADS.map(([words, look]) => h("th", { scope: "col", class: look }, words)))),
    h("tbody", {}, rows),
  );
}

const known = (calls, name) => calls.reduce((sum, one) => sum + (one[name] ?? 0), 0);

/** Return the heading of a thread: what its calls have in common, and their sums. */
function headOf(thread, number, depth, isTrace) {
  const { calls } = thread;
  const all = (name) => [...new Set(calls.map((one) => one[name]).filter(Boolean))];
  const some = (list) => (list.length > 2 ? `${list.slice(0, 2).join(", ")} and ${list.length - 2} more` : list.join(", "));
  const [input, cached, output] = ["input", "cached", "output"].map((one) => known(calls, `${one}_tokens`));
  const priced = calls.some((one) => one.cost_micros !== undefined);
  const cost = priced ? money(known(calls, "cost_micros") / 1e6) : NOTHING;
  // As in the share of all calls, only calls that report cached tokens count.
  const cachedOf = known(calls.filter((one) => one.cached_tokens !== undefined), "input_tokens");
  const share = cachedOf ? percent(cached / cachedOf) : NOTHING;
  const words = [
    calls.length === 1 ? "1 call" : `${count(calls.length)} calls`,
    isTrace && some(all("conversation").map(nameOf)),
    thread.by && WHY[thread.by],
  ];
  const briefly = [`${brief(input)} in, ${brief(output)} out`, cost === NOTHING ? "" : cost];
  const figure = (value) => h("td", { class: "c-number number wide" }, value);
  return h(
    "tr",
    { class: "thread", data: { depth } },
    h(
      "th",
      { scope: "row", colspan: 2 },
      h("strong", {}, `Thread ${number}`),
      h("span", { class: "quiet-text" }, words.filter(Boolean).join(" · ")),
      h("span", { class: "narrow quiet-text" }, briefly.filter(Boolean).join(" · ")),
    ),
    h("td", { class: "c-time wide" }),
    h("td", { class: "c-upstream wide" }, some(all("upstream"))),
    figure(length(known(calls, "queue_ms"))),
    figure(length(known(calls, "upstream_ms"))),
    figure(brief(input)),
    figure(share),
    figure(brief(output)),
    figure(cost),
  );
}

function rowOf(call, depth) {
  const cell = (look, ...inner) => h("td", { class: look }, inner);
  const cost = call.cost_micros === undefined ? NOTHING : money(call.cost_micros / 1e6);
  const failed = call.error_code && call.error_code !== call.status ? call.error_code : "";
  const guess = call.usage_state === "estimated" ? "Estimated" : null;
  const input = call.input_tokens;
  const tokens = input === undefined ? "" : `${brief(input)} in, ${brief(call.output_tokens)} out`;
  const briefly = [time(call.submitted_at), length(call.upstream_ms), tokens, cost === NOTHING ? "" : cost];
  const figure = (value, title = null) => h("td", { class: "c-number number wide", title }, value);
  return h(
    "tr",
    { data: { depth } },
    cell(
      "c-id",
      linkTo(call.request_id, call.model || call.endpoint || "Call"),
      h("span", { class: "narrow quiet-text" }, briefly.filter(Boolean).join(" · ")),
    ),
    cell("c-status", failed ? h("span", { class: "badge bad", title: failed }, failed) : statusBadge(call.status)),
    cell("c-time wide", time(call.submitted_at)),
    cell("c-upstream wide", call.upstream ?? NOTHING),
    figure(length(call.queue_ms)),
    figure(length(call.upstream_ms)),
    figure(count(input), guess),
    figure(call.cached_tokens === undefined || !input ? NOTHING : percent(call.cached_tokens / input)),
    figure(count(call.output_tokens), guess),
    figure(cost, guess),
  );
}
