// Requests of all tenants: searched, and updated live.

import { get, Problem } from "../api.js";
import { fill, h, keyed, mark, say, sayComposed } from "../dom.js";
import { count, money, NOTHING, time } from "../format.js";
import { note } from "../router.js";
import * as scope from "../scope.js";
import { empty, failed, loading, said } from "../ui.js";
import { talkLink } from "./conversation.js";
import { asked, filters } from "./request_filters.js";
import { panel } from "./request_panel.js";
import { calledMs, goesOn, isOpen, kindOf, linkTo, SOURCES, statusBadge, tierOf, timeOfId } from "./request_words.js";
import { exporting, saved } from "./requests_kept.js";
import { runningCard } from "./requests_running.js";

const PAGE = 50;
const MOST_REFRESHED = 200; // per page
const MOST_PAGES = 5; // pages of a refresh
const EVERY_MS = 3_000;
const MOST_KEPT = 500; // in an open list; older rows are requested again
const LOOKS = 60; // pages of 20,000 scanned requests, before the person decides whether to continue
const NEAR_TOP_PX = 120;

export async function open(main, { query, signal }) {
  const { pools } = await get("dashboard/session", { signal });
  scope.amongRecorded(pools, query.get("upstream"));
  const list = listOf(signal, () => beside.mark());
  const keep = () => note({ ...bar.values(), open: beside.shown() });
  const beside = panel(list.element, signal, keep);
  const running = runningCard(signal);
  const bar = filters(query, () => {
    keep();
    running.show();
    list.search(bar);
  });
  const live = h("button", { class: "button small", type: "button", "aria-pressed": "true" }, "● Live");
  live.addEventListener("click", () => {
    const isLive = list.pause();
    live.setAttribute("aria-pressed", String(isLive));
    say(live, isLive ? "● Live" : "‖ Paused");
  });
  main.append(
    h(
      "div",
      { class: "page-head" },
      h("h1", {}, "Requests"),
      bar.upstreams,
      saved(bar.values),
      h("div", { class: "end" }, list.state, exporting(bar.values, signal), live),
    ),
    bar.element,
    running.element,
    h("div", { class: "list-and-panel" }, list.element, beside.element),
  );
  beside.open(query.get("open") ?? "");
  if (scope.narrowed() !== scope.ALL) keep(); // a selection made elsewhere is in the URL too
  await list.search(bar);
  list.follow();
}

/** Create the list with its head and foot; `painted` is called after its rows are drawn. */
function listOf(signal, painted) {
  const body = h("tbody");
  const table = tableOf(body);
  const state = h("span", { class: "quiet-text", role: "status" });
  const place = h("div", { class: "list-state" });
  const foot = h("div", { class: "list-foot" });
  const fresh = h("button", { class: "button small fresh", type: "button", hidden: true });
  const element = h(
    "section",
    { class: "card list-card", "aria-label": "Requests that match" },
    fresh,
    h("div", { class: "scroll" }, table),
    place,
    foot,
  );
  const show = keyed(body, rowOf);
  let bar = null;
  let searched = {}; // not the text being typed: half a word would empty the list
  let items = [];
  let newer = [];
  let gap = false;
  let cursor = null;
  let reach = null; // the end of the last refreshed page
  let shown = null;
  let searching = new AbortController();
  let isPaused = false;
  let [begun, answered] = [0, 0]; // numbers of refreshes

  function paint() {
    show(items, (item) => item.request_id);
    painted();
    table.hidden = items.length === 0;
    fresh.hidden = newer.length === 0;
    say(fresh, `Show ${count(newer.length)}${gap ? " or more" : ""} new`);
  }

  /** Show something in place of the rows; drawn only once, so that clicks on it are not lost. */
  function put(what, draw) {
    if (shown === what) return;
    shown = what;
    fill(place, draw());
  }

  function nothing() {
    if (items.length > 0) put("rows", () => null);
    else if (bar.any()) put("no match", () => noMatch(bar.clear));
    else put("none", noneYet);
  }

  async function ask(more, from) {
    const path = `admin/requests?${asked(searched, more)}`;
    return get(path, { signal: AbortSignal.any([signal, from.signal]) });
  }

  /** Read pages until enough rows are found; each page scans at most 20,000 requests. */
  async function gather(from) {
    const wanted = items.length + PAGE;
    for (let look = 0; look < LOOKS; look += 1) {
      const more = { limit: PAGE, cursor: cursor ?? "" };
      const page = await ask(more, from);
      const known = new Set(items.map((item) => item.request_id));
      items = [...items, ...page.items.filter((item) => !known.has(item.request_id))];
      cursor = page.next_cursor ?? null;
      paint();
      if (items.length > 0) nothing();
      if (cursor === null || items.length >= wanted) return;
      say(state, `Searching: back to ${time(timeOfId(cursor))}`);
    }
  }

  async function goOn() {
    const from = searching;
    mark(element, "aria-busy", "true");
    try {
      await gather(from);
      bar.complain(null, "");
      nothing();
      say(state, "");
    } catch (error) {
      if (from.signal.aborted || signal.aborted) return;
      if (!(error instanceof Problem)) throw error;
      say(state, "");
      const atField = bar.complain(error, said(error));
      if (items.length === 0) {
        table.hidden = true;
        shown = "failed";
        fill(place, atField ? empty("No requests match", said(error)) : failed(error, () => search(bar)));
      }
    } finally {
      if (!from.signal.aborted) {
        mark(element, "aria-busy", null);
        footer();
      }
    }
  }

  function footer() {
    if (cursor === null) return fill(foot);
    const words = items.length === 0 ? "Search further back" : "Older requests";
    const button = h("button", { class: "button", type: "button", on: { click: goOn } }, words);
    const back = `Searched back to ${time(timeOfId(cursor))}`;
    return fill(foot, button, h("span", { class: "quiet-text" }, back));
  }

  function search(given) {
    [bar, searched] = [given, given.values()];
    searching.abort();
    searching = new AbortController();
    if (items.length === 0) put("loading", () => loading(6));
    [items, newer, cursor] = [[], [], null];
    fill(foot);
    return goOn();
  }

  /** Return whether rows may be inserted above the visible ones. */
  const mayMove = () =>
    window.scrollY < NEAR_TOP_PX && !body.contains(document.activeElement) && !body.matches(":hover");

  function take() {
    items = gap ? newer : isByWords() ? [...newer, ...items] : [...newer, ...items].toSorted(byId);
    if (gap || (items.length > MOST_KEPT && !isByWords())) {
      items = items.slice(0, MOST_KEPT);
      cursor = isByWords() ? reach : items.at(-1).request_id;
      footer();
    }
    newer = [];
    paint();
    nothing();
  }

  /**
   * Whether the search is by words: rows are then in the order of their ends, and cursors are not
   * ids.
   */
  const isByWords = () => Boolean(searched.text);

  /**
   * Return rows of a page that the list lacks. They may be older ones, because a call has its row
   * only after it has ended.
   */
  function missing(page) {
    const known = new Set(items.map((item) => item.request_id));
    const last = page.items.findLastIndex((item) => known.has(item.request_id));
    const isOfList = isByWords()
      ? (_, at) => cursor === null || last < 0 || at < last
      : (item) => cursor === null || item.request_id >= cursor;
    return page.items.filter((item, at) => !known.has(item.request_id) && isOfList(item, at));
  }

  /** Read the newest rows, back to the first row of the list that has not ended. */
  async function newest(from) {
    const oldest = items.findLast(isOpen)?.request_id;
    let [found, cursor] = [[], ""];
    for (let look = 0; look < MOST_PAGES; look += 1) {
      const limit = Math.min(MOST_REFRESHED, Math.max(PAGE, items.length - found.length));
      const page = await ask({ limit, cursor }, from);
      found = [...found, ...page.items];
      cursor = page.next_cursor;
      if (!cursor || !oldest || cursor <= oldest) break;
    }
    return { items: found, next_cursor: cursor };
  }

  async function refresh() {
    const from = searching;
    if (element.getAttribute("aria-busy")) return;
    begun += 1;
    const number = begun;
    try {
      const page = await newest(from);
      if (from !== searching || number < answered) return; // a later answer arrived first
      answered = number;
      const now = new Map(page.items.map((item) => [item.request_id, item]));
      newer = missing(page);
      reach = page.next_cursor ?? null;
      items = items.map((item) => now.get(item.request_id) ?? left(item, page, isByWords()));
      if (mayMove()) items = items.filter((item) => !item.left);
      // More rows arrived than a page holds: the rows in between are loaded on demand, after the
      // new ones.
      const isCut = items.length > 0 || (cursor === null && reach !== null);
      gap = isCut && newer.length > 0 && newer.length === page.items.length;
      if (newer.length > 0 && mayMove()) take();
      else paint();
      nothing();
      say(state, "");
    } catch (error) {
      if (from.signal.aborted || signal.aborted) return;
      if (!(error instanceof Problem)) throw error;
      say(state, `${said(error)} Showing the last known requests.`);
    }
  }

  function follow() {
    const timer = setInterval(() => {
      if (!document.hidden && !isPaused) refresh();
    }, EVERY_MS);
    const seen = () => !document.hidden && !isPaused && refresh();
    document.addEventListener("visibilitychange", seen);
    signal.addEventListener("abort", () => {
      clearInterval(timer);
      document.removeEventListener("visibilitychange", seen);
    });
  }

  /** Pause or resume updates; return whether they are live now. */
  function pause() {
    isPaused = !isPaused;
    if (!isPaused) refresh();
    return !isPaused;
  }

  fresh.addEventListener("click", () => {
    take();
    window.scrollTo({ top: 0 });
  });
  return { element, state, search, follow, pause };
}

function noMatch(clear) {
  const button = h("button", { class: "button", type: "button", on: { click: clear } }, "Clear all filters");
  return empty("No requests match", "Change or clear the filters.", button);
}

function noneYet() {
  const tryIt = h("a", { class: "button", href: "#/try" }, "Playground");
  const hint =
    "Jobs appear when they are submitted, streams and native calls when they have ended. Until then they are listed above, under In progress.";
  return empty("No requests yet", hint, tryIt);
}

/**
 * Mark a row that the newest page should contain and does not, because it no longer matches. The
 * page ends at its cursor, or in a search by words, whose cursor is not an id, at its last row.
 */
function left(item, page, isByWords) {
  const end = isByWords && page.next_cursor ? page.items.at(-1).request_id : (page.next_cursor ?? "");
  return item.request_id >= end ? { ...item, left: true } : item;
}

/** Name a key as on the page of keys; a service's token by its own claims. */
const keyOf = ({ key }) => (key && !key.includes(":") ? `tg_${key}` : (key ?? ""));

const byId = (one, other) => (one.request_id < other.request_id ? 1 : -1);

function tableOf(body) {
  const heads = [
    ["Request", "c-id"],
    ["Status", "c-status"],
    ["Submitted", "c-time wide"],
    ["Tenant, key", "c-tenant wide"],
    ["Model, prompt", "c-what wide"],
    ["Waited", "c-number number wide"],
    ["Call time", "c-number number wide"],
    ["Tokens", "c-number number wide"],
    ["Cost", "c-cost number wide"],
    ["Attempts", "c-tries number wide"],
    ["Conversation", "c-talk wide"],
  ];
  return h(
    "table",
    { class: "table requests found" },
    h("thead", {}, h("tr", {}, heads.map(([words, look]) => h("th", { scope: "col", class: look }, words)))),
    body,
  );
}

function rowOf(first) {
  const cell = (look, ...inner) => h("td", { class: look }, inner);
  const badge = h("span");
  const [what, waited, call, tokens, cost, tries] = [0, 1, 2, 3, 4, 5].map(() => h("span"));
  // Separate paragraphs, so that right-to-left text does not reorder its surroundings.
  const [said, saidBriefly] = [0, 1].map(() => h("span", { class: "below quiet-text", dir: "auto" }));
  const key = h("span", { class: "below quiet-text mono", title: first.key }, keyOf(first));
  const wrong = h("span", { class: "badge bad wrong-code" });
  const code = h("span", { class: "badge bad wrong-code" });
  const briefly = h("span");
  /**
   * A job is not part of its conversation's page until it has ended, but may link to the calls that
   * are.
   */
  const talk = (words) =>
    first.conversation &&
    h("a", { class: "talk-link", href: talkLink(first.tenant, first.conversation) }, words);
  const brief = h("span", { class: "narrow quiet-text" }, code, briefly, " ", talk("Conversation"), saidBriefly);
  const element = h(
    "tr",
    {},
    cell("c-id", linkTo(first.request_id, undefined, { class: "mono" }), brief),
    cell("c-status", badge),
    cell("c-time wide", time(first.submitted_at)),
    cell("c-tenant wide", h("span", { title: first.tenant }, first.tenant), key),
    cell("c-what wide", wrong, what, said),
    cell("c-number number wide", waited),
    cell("c-number number wide", call),
    cell("c-number number wide", tokens),
    cell("c-cost number wide", cost),
    cell("c-tries number wide", tries),
    cell("c-talk wide", talk(["Open", h("span", { class: "visually-hidden" }, " conversation")])),
  );
  let status = null;
  function update(item) {
    if (item.status !== status) fill(badge, statusBadge(item.status));
    status = item.status;
    const of = [item.model, item.upstream, tierOf(item.tier), SOURCES[item.source], kindOf(item), item.endpoint];
    const words = of.filter(Boolean).join(" · ");
    say(what, words);
    mark(what, "title", words);
    const spent = item.cost_micros === undefined ? "" : money(item.cost_micros / 1e6);
    sayComposed(briefly, [time(item.submitted_at), item.tenant, keyOf(item), words, spent].filter(Boolean).join(" · "));
    for (const one of [said, saidBriefly]) {
      say(one, item.prompt ?? "");
      mark(one, "title", item.prompt ?? null);
    }
    say(cost, spent || NOTHING);
    goesOn(waited, item.queue_ms, item.status === "queued" && item.submitted_at);
    goesOn(call, calledMs(item), item.status === "running" && item.admitted_at);
    say(tokens, count(item.total_tokens));
    say(tries, count(item.attempts));
    mark(element, "data-left", item.left ?? null);
    const failed = item.error_code && item.error_code !== item.status ? item.error_code : "";
    say(wrong, failed);
    say(code, failed);
  }
  return { element, update };
}
