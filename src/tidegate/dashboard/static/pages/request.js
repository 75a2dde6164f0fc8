// One request: its timeline, the limit it waits for, its prompt and answer, and its actions.

import { get, post, Problem } from "../api.js";
import { fill, h, say } from "../dom.js";
import { length } from "../format.js";
import { link } from "../router.js";
import { confirm, copied, field, marked, said, toast } from "../ui.js";
import { curlButton } from "./request_curl.js";
import { Files } from "./request_files.js";
import { answer, attempts, bodies, facts, prompt, webhooks } from "./request_parts.js";
import { isOpen, linkTo, ordinal, statusBadge } from "./request_words.js";
import { timeline } from "./timeline.js";

// A URL may contain anything: an id with a slash could make this page show a body of a tenant
// instead of the record.
const IS_ID = /^[\w-]+$/;
const OPEN_MS = 1_000;
const QUIET_MS = 10_000; // for an ended request: a webhook may still be in progress

const ACTIONS = {
  cancel: {
    words: "Cancel",
    title: "Cancel this request?",
    text: "A waiting job ends immediately. A running call to the provider is aborted, and its partial output is kept.",
    danger: true,
    done: "Cancelled",
  },
  retry: {
    words: "Retry",
    title: "Submit this job again?",
    text: "The same prompt and files are submitted as a new job of the same tenant, which is charged again.",
    done: "Submitted again",
  },
  replay: {
    words: "Replay",
    title: "Replay this request at an upstream?",
    text: "The request is submitted as a new job of the same tenant, which runs only at the chosen upstream and is charged at its price.",
    done: "Submitted again",
  },
  discard: {
    words: "Discard",
    title: "Discard this dead job?",
    text: "It is cancelled permanently, and is no longer listed under Attention.",
    danger: true,
    path: "admin/dead",
    done: "Discarded",
  },
  requeue: {
    words: "Requeue",
    title: "Requeue this dead job?",
    text: "It is queued again under the same id, with all its attempts. If the job itself crashed its workers, up to three more may crash.",
    danger: true,
    path: "admin/dead",
    done: "Requeued",
  },
};

export async function open(main, { params, signal }) {
  const page = pageOf(params.id, signal);
  await page.load();
  main.append(page.element);
  page.follow();
}

/**
 * Create the page of a request. `isBeside` another page, which has the window's title and the back
 * link.
 */
export function pageOf(id, signal, { isBeside = false } = {}) {
  const badge = h("span");
  const buttons = h("div", { class: "end" });
  const stale = h("p", { class: "notice", role: "status", hidden: true });
  const now = h("div", { role: "status" });
  const parts = {};
  const section = (name, title) => {
    const body = h("div", { class: "card-body" });
    const heading = h("h2", { id: `part-${name}` }, title);
    const card = h(
      "section",
      { class: `card part-${name}`, "aria-labelledby": `part-${name}` },
      h("div", { class: "card-head" }, heading),
      body,
    );
    parts[name] = { card, body, shown: null };
    return card;
  };
  const element = h(
    "div",
    { class: "request" },
    isBeside ? null : h("a", { class: "back", href: link("/requests") }, "← Requests"),
    h(
      "div",
      { class: "page-head" },
      h(isBeside ? "h2" : "h1", {}, "Request ", h("span", { class: "mono id" }, id)),
      badge,
      copyButton(id),
      curlButton(() => view, signal),
      buttons,
    ),
    stale,
    now,
    h(
      "div",
      { class: "request-columns" },
      h(
        "div",
        { class: "request-main" },
        section("timeline", "Timeline"),
        section("prompt", "Input"),
        section("answer", "Output"),
        section("attempts", "Attempts"),
        section("webhooks", "Webhooks"),
        section("bodies", "Stored bodies"),
      ),
      h("div", { class: "request-side" }, section("facts", "Details")),
    ),
  );
  const files = new Files(signal);
  let view = null;
  let [asked, painted] = [0, 0]; // numbers of loads

  /**
   * Draw a part again only if its data has changed, so that nothing moves and open parts stay open.
   */
  function part(name, data, draw) {
    const one = parts[name];
    const text = JSON.stringify(data);
    if (one.shown === text) return;
    one.shown = text;
    const drawn = draw();
    one.card.hidden = drawn === null;
    fill(one.body, drawn);
  }

  function paint() {
    const { request } = view;
    if (badge.firstChild?.textContent !== statusBadge(request.status).textContent) {
      fill(badge, statusBadge(request.status));
    }
    if (!isBeside) document.title = `${statusBadge(request.status).textContent} request · Tidegate`;
    paintActions();
    paintNow();
    const ticks = isOpen(request) ? view.now : null;
    part("timeline", [view.timeline, ticks], () => timeline(view.timeline, view.now));
    const { bodies: stored } = view;
    part("prompt", [request.prompt, request.files, request.image_uri, stored], () => prompt(request, files, stored));
    const answered = [request.text, request.answer, request.images, request.status, stored];
    part("answer", answered, () => answer(request, files, stored));
    part("attempts", [view.attempts, request.attempts], () => attempts(view.attempts, request.attempts));
    part("webhooks", view.webhooks, () => webhooks(view.webhooks, redeliver));
    part("bodies", view.bodies, () => bodies(view.bodies, id, signal));
    part("facts", [request, view.attempts.length], () => facts(request, view.attempts.length));
  }

  function paintActions() {
    const wanted = view.actions.join(" ");
    if (buttons.dataset.shown === wanted) return;
    buttons.dataset.shown = wanted;
    fill(
      buttons,
      view.actions.map((name) => {
        const { words, danger } = ACTIONS[name];
        const look = danger ? "button danger" : "button";
        return h("button", { class: look, type: "button", needs: "operator", on: { click: () => act(name) } }, words);
      }),
    );
  }

  /** Show what the request waits for, or what failed and what to do about it. */
  function paintNow() {
    const { waiting, request, advice } = view;
    const held = holdersOf(waiting).map((one) => one.request_id);
    const key = JSON.stringify([waiting?.sentence, held, request.place, request.error, request.status, advice]);
    if (now.dataset.shown === key) return;
    now.dataset.shown = key;
    fill(now, isOpen(view.request) ? waits(view) : fault(view));
  }

  async function act(name) {
    const { title, text, words, danger, done, path } = ACTIONS[name];
    const reason = field("reason", "Reason", { hint: "Optional. Written to the log.", maxlength: 500 });
    const places = name === "replay" ? [await upstreamField(signal)] : [];
    const signed = (values) => (path ? undefined : { by: "dashboard", ...values });
    const result = await confirm({
      title,
      text,
      danger,
      fields: path ? [] : [...places, reason],
      action: words,
      act: (values) => post(`${path ?? "admin/requests"}/${id}/${name}`, signed(values), { signal }),
    });
    if (result === null || signal.aborted) return;
    toast(done);
    if (name === "retry" || name === "replay") location.hash = link(`/requests/${result.request_id}`);
    else await refresh();
  }

  async function redeliver(webhook) {
    const result = await confirm({
      title: "Redeliver this webhook?",
      text: `It is sent to ${webhook.url} now, and retried like a new one.`,
      action: "Redeliver",
      act: () => post(`admin/webhooks/${webhook.id}/redeliver`, undefined, { signal }),
    });
    if (result === null || signal.aborted) return;
    toast("The webhook is queued for delivery.");
    await refresh();
  }

  async function load() {
    if (!IS_ID.test(id)) throw new Problem({ status: 404, detail: `${id} is not a request id.` });
    const mine = ++asked;
    const found = await get(`admin/requests/${id}`, { signal });
    if (mine < painted) return; // a later load was answered first
    [view, painted] = [found, mine];
    paint();
  }

  async function refresh() {
    try {
      await load();
      stale.hidden = true;
    } catch (error) {
      if (signal.aborted) return;
      if (!(error instanceof Problem)) throw error;
      stale.hidden = false;
      say(stale, `${said(error)} Showing the last known state.`);
    }
  }

  function follow() {
    let [lookedAt, isLooking] = [Date.now(), false];
    const timer = setInterval(async () => {
      const every = isOpen(view.request) ? OPEN_MS : QUIET_MS;
      if (document.hidden || isLooking || Date.now() - lookedAt < every) return;
      [lookedAt, isLooking] = [Date.now(), true];
      await refresh();
      isLooking = false;
    }, 250);
    signal.addEventListener("abort", () => clearInterval(timer));
  }

  return { element, load, follow };
}

/** Return a field to select one of the upstreams that accept calls. */
async function upstreamField(signal) {
  const { upstreams } = await get("admin/upstreams", { signal });
  const names = upstreams.filter((one) => !["drained", "draining", "missing"].includes(one.state)).map((one) => one.name);
  return field("upstream", "Upstream", { options: Object.fromEntries(names.map((one) => [one, one])), hint: "It must serve the model in the same dialect." });
}

function waits({ request, waiting }) {
  if (request.status === "running") {
    const words = waiting ? `It ${waiting.sentence}.` : "";
    return h("p", { class: "notice now" }, h("strong", {}, "Running."), h("span", {}, words));
  }
  const place = request.place ? ` It is ${ordinal(request.place)} in its queue.` : "";
  const limit = waiting?.held_up_by;
  const [head, rest] = parted(waiting?.sentence ?? "waits", limit);
  return h(
    "div",
    { class: "notice now" },
    h("p", {}, h("strong", {}, head), marked(`${rest}.${place}`)),
    limit && h("a", { href: "#/" }, "See the limits"),
    holders(waiting),
  );
}

/** Split a sentence of `why` into its beginning, which names the limit, and the rest. */
function parted(sentence, limit) {
  const whole = sentence.charAt(0).toUpperCase() + sentence.slice(1);
  const at = limit && whole.startsWith(`Waits for ${limit}`) ? `Waits for ${limit}`.length : 0;
  return [whole.slice(0, at), whole.slice(at)];
}

const holdersOf = (waiting) => (waiting?.holders ?? []).filter((one) => one.request_id);

/** List the requests that hold the limit that it waits for. */
function holders(waiting) {
  const held = holdersOf(waiting);
  if (held.length === 0) return null;
  const shown = held.slice(0, 5).map((one) => [" ", linkTo(one.request_id, undefined, { class: "mono" })]);
  return h("span", { class: "quiet-text" }, "In use by", shown, held.length > 5 && ` and ${held.length - 5} more`);
}

function fault({ request, advice }) {
  const { error } = request;
  if (!error) return null;
  const upstream = error.upstream_status >= 400 ? ` (the provider answered ${error.upstream_status})` : "";
  return h(
    "div",
    { class: `notice ${request.status === "cancelled" ? "" : "bad"}` },
    h("strong", {}, error.code),
    h("span", { class: "wrap" }, `${error.message}${upstream}`),
    error.retry_after_ms ? h("span", {}, `The provider asks to retry after ${length(error.retry_after_ms)}.`) : null,
    advice && h("p", { class: "advice" }, advice),
  );
}

function copyButton(id) {
  const button = h("button", { class: "button quiet small", type: "button" }, "Copy id");
  button.addEventListener("click", async () => {
    if (await copied(id)) toast("Id copied.");
    else toast("The browser does not allow copying. Select the id instead.", "bad");
  });
  return button;
}
