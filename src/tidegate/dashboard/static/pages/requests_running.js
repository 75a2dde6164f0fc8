// Streams and native calls in progress, which enter the list when they have ended.

import { get, Problem } from "../api.js";
import { h, keyed, mark, say } from "../dom.js";
import { count, time } from "../format.js";
import * as scope from "../scope.js";
import { said } from "../ui.js";
import { goesOn, kindOf, shortId, SOURCES, statusBadge } from "./request_words.js";

const EVERY_MS = 3_000;
const OPEN = "tidegate.running";

/**
 * A card that refreshes itself. Collapsed, it shows the numbers of the selected upstream. Call
 * `show()` when another upstream is selected.
 */
export function runningCard(signal) {
  const summary = h("span", { class: "quiet-text", role: "status" }, "…");
  const note = h("p", { class: "quiet-text running-note" });
  const body = h("tbody");
  const heads = [
    ["Request", "c-id"],
    ["Status", "c-status"],
    ["Received", "c-time wide"],
    ["Tenant", "c-tenant wide"],
    ["Model", "c-what wide"],
    ["Upstream or limit", "c-at wide"],
    ["Elapsed", "c-number number wide"],
  ].map(([words, look]) => h("th", { scope: "col", class: look }, words));
  const rows = h(
    "div",
    { class: "scroll running-rows", tabindex: "0", role: "group", "aria-label": "In progress, a table" },
    h("table", { class: "table requests" }, h("thead", {}, h("tr", {}, heads)), body),
    note,
  );
  const element = h(
    "details",
    { class: "card running-card", open: localStorage.getItem(OPEN) === "yes" },
    h("summary", { class: "card-head" }, h("h2", {}, "In progress"), summary),
    rows,
  );
  element.addEventListener("toggle", () => localStorage.setItem(OPEN, element.open ? "yes" : "no"));
  const draw = keyed(body, rowOf);

  let latest = null;

  function show() {
    if (latest === null) return;
    const of = scope.narrowed();
    const isOf = (item) => of === scope.ALL || (item.upstream || item.pool) === of;
    const { complete } = latest;
    const items = latest.items.filter(isOf);
    // The upstream of calls that no process lists is unknown.
    const under_way = of === scope.ALL ? latest.under_way : items.length;
    draw(items, (item) => item.request_id);
    const waiting = items.filter((item) => item.status === "queued").length;
    const told = [
      [items.length - waiting, "running"],
      [waiting, "waiting"],
      [Math.max(0, under_way - items.length), "more"],
    ].filter(([amount]) => amount > 0);
    const words = told.map(([amount, of]) => `${count(amount)} ${of}`).join(", ");
    say(summary, words ? `Streams and native calls: ${words}` : "No streams or native calls");
    body.parentElement.hidden = items.length === 0;
    if (items.length === 0) say(note, "Jobs are in the list below as soon as they are submitted.");
    else say(note, complete ? "" : "Not all are shown: each process reports only its oldest ones.");
  }

  async function look() {
    if (document.hidden) return;
    try {
      latest = await get("admin/requests/running", { signal });
      show();
    } catch (error) {
      if (error.name === "AbortError") return;
      if (!(error instanceof Problem)) throw error;
      say(note, `${said(error)} Showing the last known requests.`);
    }
  }

  const timer = setInterval(look, EVERY_MS);
  document.addEventListener("visibilitychange", look);
  signal.addEventListener("abort", () => {
    clearInterval(timer);
    document.removeEventListener("visibilitychange", look);
  });
  look();
  return { element, show };
}

function rowOf(first) {
  const cell = (look, ...inner) => h("td", { class: look }, inner);
  const [badge, what, at, soFar, brief] = [0, 1, 2, 3, 4].map(() => h("span"));
  const element = h(
    "tr",
    { data: { request: first.request_id } },
    cell(
      "c-id",
      h("span", { class: "mono", title: first.request_id }, shortId(first.request_id)),
      h("span", { class: "narrow quiet-text" }, brief),
    ),
    cell("c-status", badge),
    cell("c-time wide", time(first.submitted_at)),
    cell("c-tenant wide", first.tenant),
    cell("c-what wide", what),
    cell("c-at wide", at),
    cell("c-number number wide", soFar),
  );
  let status = null;
  function update(item) {
    if (item.status !== status) badge.replaceChildren(statusBadge(item.status));
    status = item.status;
    const words = [SOURCES[item.source], kindOf(item), item.model, item.endpoint].filter(Boolean).join(" · ");
    say(what, words);
    mark(what, "title", words);
    const where = item.status === "queued" ? waitsFor(item) : (item.upstream ?? "");
    say(at, where);
    mark(at, "title", item.process);
    goesOn(soFar, null, item.admitted_at ?? item.submitted_at);
    say(brief, [`${soFar.textContent} so far`, item.tenant, where, words].filter(Boolean).join(" · "));
  }
  return { element, update };
}

const waitsFor = (item) => (item.waits_for ? `waits for ${item.waits_for}` : "");
