// Batches of all tenants: the progress of each, what its lines wait for, and buttons to pause and
// cancel it.

import { ask, get, post, Problem } from "../api.js";
import { fill, h, keyed, mark, say } from "../dom.js";
import { saveBlob } from "../export.js";
import { ago, brief, count, time } from "../format.js";
import { repeat } from "../poll.js";
import { link, note } from "../router.js";
import * as session from "../session.js";
import { choice, confirm, empty, field, marked, said, toast } from "../ui.js";

const EVERY_MS = 2_000;
const TYPED_MS = 300;
const PAGE = 25;
const MOST_ASKED = 5; // batches for which waits are requested
const OPEN = new Set(["validating", "in_progress", "finalizing", "cancelling"]);
const WORDS = {
  validating: ["", "Validating"],
  in_progress: ["accent", "In progress"],
  finalizing: ["accent", "Finalizing"],
  cancelling: ["warn", "Cancelling"],
  completed: ["good", "Completed"],
  failed: ["bad", "File rejected"],
  expired: ["warn", "Expired"],
  cancelled: ["", "Cancelled"],
};
const SHOWN = { all: "All", open: "Open" };

export async function open(main, { query, signal }) {
  const view = { shown: query.get("shown") === "open" ? "open" : "all", tenant: query.get("tenant") ?? "" };
  const list = h("div", { class: "batch-list" });
  const none = h("div", { hidden: true });
  const away = h("p", { class: "notice bad", role: "alert", hidden: true });
  const more = h("button", { class: "button", type: "button", hidden: true }, "Show older batches");
  const tenant = h("input", { type: "search", "aria-label": "Tenant", placeholder: "Tenant", value: view.tenant, spellcheck: "false" });
  const draw = keyed(list, (first) => row(first, look));
  let pages = 1;
  let looks = 0;

  async function look() {
    looks += 1;
    const number = looks;
    try {
      const { items, next } = await read(view, pages, signal);
      const whys = await reasons(items, signal);
      if (number !== looks) return; // a later read draws, possibly of another tenant
      away.hidden = true;
      draw(items.map((one) => ({ ...one, why: whys.get(one.id) ?? "" })), (one) => one.id);
      more.hidden = next === null;
      none.hidden = items.length > 0;
      if (!items.length) fill(none, nothing(view));
    } catch (problem) {
      if (signal.aborted) return;
      if (!(problem instanceof Problem)) throw problem;
      if (number !== looks) return;
      away.hidden = false;
      say(away, said(problem));
    }
  }

  function change(values) {
    Object.assign(view, values);
    pages = 1;
    note({ shown: view.shown === "open" ? "open" : "", tenant: view.tenant });
    look();
  }

  let typing = 0;
  tenant.addEventListener("input", () => {
    clearTimeout(typing);
    typing = setTimeout(() => change({ tenant: tenant.value.trim() }), TYPED_MS);
  });
  more.addEventListener("click", () => {
    pages += 1;
    look();
  });
  await look();
  repeat(EVERY_MS, look, signal);
  main.append(
    h(
      "div",
      { class: "page-head" },
      h("h1", {}, "Batches"),
      h("div", { class: "end batch-tools" }, tenant, choice("Which", SHOWN, view.shown, (shown) => change({ shown }))),
    ),
    away,
    h("section", { class: "card", "aria-label": "Batches" }, none, list),
    more,
  );
}

function nothing({ shown, tenant }) {
  if (tenant || shown === "open") return empty("No batches match", "Choose All and clear the tenant to see all batches.");
  return empty(
    "No batches yet",
    "A batch is a file of up to 50,000 calls that run in the background. Create one with client.batches.create of OpenAI's SDK, or client.messages.batches.create of Anthropic's.",
  );
}

async function read(view, pages, signal) {
  const items = [];
  let after = "";
  for (let page = 0; page < pages && after !== null; page += 1) {
    const query = { tenant: view.tenant, open: view.shown === "open" ? "true" : "", after, limit: PAGE };
    const found = await get("admin/batches", { query, signal });
    items.push(...found.items);
    after = found.next_after;
  }
  return { items, next: after };
}

/** Return what the lines of the first batches in progress wait for, as the gateway words it. */
async function reasons(items, signal) {
  const wanted = items.filter((one) => one.status === "in_progress" && !one.pause && one.claimed > 0).slice(0, MOST_ASKED);
  const found = await Promise.all(wanted.map((one) => reason(one, signal)));
  return new Map(wanted.map((one, at) => [one.id, found[at]]));
}

async function reason(one, signal) {
  try {
    return (await get(`admin/why/${one.id}`, { signal })).sentence;
  } catch (problem) {
    if (problem instanceof Problem) return ""; // it has ended, or a store is unavailable, which the list reports
    throw problem;
  }
}

function row(first, again) {
  let latest = first;
  const pace = paceOf();
  const badge = h("span", { class: "badge" });
  const [done, failed] = [h("i"), h("i", { class: "failed" })];
  const bar = h("div", { class: "batch-bar", role: "meter", "aria-label": `Lines of ${shortly(first.id)} that have ended`, "aria-valuemin": "0" }, done, failed);
  const counts = h("span");
  const wrong = h("span", { class: "bad" });
  const left = h("span", { class: "quiet-text" });
  const why = h("p", { class: "quiet-text" });
  const made = h("span", { class: "quiet-text", title: time(first.created_at) });
  const metadata = Object.entries(first.metadata ?? {}).map(([name, value]) => `${name}: ${value}`).join(", ");
  const named = shortly(first.id);
  const button = (words, needs, act, look = "") => {
    const one = h("button", { class: `button small ${look}`, type: "button", needs, "aria-label": `${words} ${named}` }, words);
    one.addEventListener("click", () => act(latest, again, one));
    return one;
  };
  const reader = session.readsBodies() ? "viewer" : "operator";
  const pause = button("Pause", "operator", pauseIt);
  const resume = button("Resume", "operator", resumeIt);
  const cancel = button("Cancel", "operator", cancelIt, "danger");
  const output = button("Results", reader, (one, _, self) => download(one, "output", self));
  const errors = button("Errors", reader, (one, _, self) => download(one, "errors", self));
  return {
    element: h(
      "article",
      { class: "batch", data: { batch: first.id } },
      h(
        "div",
        { class: "batch-head" },
        h("h2", { class: "mono", title: first.id }, named),
        badge,
        h("a", { href: link("/usage", { tenant: first.tenant, by: "day" }), title: `Usage of ${first.tenant}` }, first.tenant),
        h("span", { class: "quiet-text" }, [first.endpoint, metadata].filter(Boolean).join(", ")),
        made,
        h("div", { class: "batch-acts" }, output, errors, pause, resume, cancel),
      ),
      bar,
      h("div", { class: "batch-figures" }, counts, wrong, left),
      why,
    ),
    update(one) {
      latest = one;
      const [look, words] = one.pause ? ["warn", "Paused"] : (WORDS[one.status] ?? ["", one.status]);
      const ended = one.completed + one.failed;
      mark(badge, "class", `badge ${look}`);
      say(badge, words);
      say(made, `${one.key ? `by ${one.key.includes(":") ? one.key : `tg_${one.key}`}, ` : ""}${ago(one.created_at)}`);
      mark(done.closest("article"), "data-paused", one.pause !== null);
      done.style.width = `${(100 * one.completed) / Math.max(1, one.total)}%`;
      failed.style.width = `${(100 * one.failed) / Math.max(1, one.total)}%`;
      mark(bar, "aria-valuemax", Math.max(1, one.total));
      mark(bar, "aria-valuenow", Math.min(ended, Math.max(1, one.total)));
      mark(bar, "aria-valuetext", `${count(ended)} of ${count(one.total)}`);
      say(counts, `${count(one.completed)} of ${count(one.total)} done`);
      say(wrong, one.failed ? `${count(one.failed)} failed` : "");
      say(left, leftOf(one, pace));
      if (why.textContent !== whyOf(one).replaceAll("`", "")) fill(why, marked(whyOf(one)));
      why.hidden = !whyOf(one);
      const canPause = one.status === "in_progress" || one.status === "validating";
      pause.hidden = !canPause || one.pause !== null;
      resume.hidden = !canPause || one.pause === null;
      cancel.hidden = !canPause;
      output.hidden = !one.has_output;
      errors.hidden = !one.has_errors;
    },
  };
}

/** `batch_01a2…8f3c`: the beginning and the end, which differ. */
const shortly = (id) => `${id.slice(0, id.indexOf("_") + 9)}…${id.slice(-4)}`;

function whyOf(one) {
  if (one.pause) return `Paused by ${one.pause.by}${one.pause.reason ? `: ${one.pause.reason}` : ""}, ${ago(one.pause.at)}. Its 24 hours continue to run.`;
  if (one.is_disabled && OPEN.has(one.status)) return "Its tenant is disabled: no more lines start until it is enabled.";
  if (one.errors.length) return one.errors.join("; ");
  return one.why ? `It ${one.why}.` : "";
}

function leftOf(one, pace) {
  if (one.ended_at) return `ended ${ago(one.ended_at)}`;
  if (one.status !== "in_progress") return "";
  const under = one.calling ? `${brief(one.calling)} running` : "";
  const expires = new Date(one.expires_at).getTime() - Date.now();
  if (one.pause) return [under, `expires in ${about(expires)}`].filter(Boolean).join(", ");
  const ms = pace(one);
  if (ms === null) return [under, `expires in ${about(expires)}`].filter(Boolean).join(", ");
  const late = ms > expires ? `, but it expires in ${about(expires)}` : "";
  return [under, `${about(ms)} left${late}`].filter(Boolean).join(", ");
}

const MOST_SAMPLES_MS = 600_000;
const LEAST_SPAN_MS = 60_000;
const LEAST_SHARE = 0.02;

/**
 * Estimate the remaining time of a batch.
 *
 * It uses the pace of the last ten minutes seen here, or else the pace since the beginning; null
 * while too few lines have ended.
 */
export function paceOf(clock = Date.now) {
  let samples = [];
  let [left, lookedAt] = [null, 0];
  return (one) => {
    const now = clock();
    const ended = one.completed + one.failed;
    samples = samples.filter(({ at }) => now - at < MOST_SAMPLES_MS);
    samples.push({ at: now, ended });
    const rest = one.total - ended;
    const since = new Date(one.in_progress_at).getTime();
    const isKnown = ended >= LEAST_SHARE * one.total && now - since >= LEAST_SPAN_MS;
    if (!isKnown) return null;
    const [first] = samples;
    const seen = now - first.at >= 2 * LEAST_SPAN_MS && ended > first.ended;
    const perMs = seen ? (ended - first.ended) / (now - first.at) : ended / (now - since);
    const [found, expected] = [rest / perMs, Math.max(0, left - (now - lookedAt))];
    // Lines end in bursts, so the previous estimate has more weight, unless the pace has changed.
    const isLike = left !== null && Math.abs(found - expected) < expected / 2;
    left = isLike ? expected + (found - expected) / 20 : found;
    lookedAt = now;
    return left;
  };
}

const STEPS_MIN = [1, 2, 3, 5, 10, 15, 20, 30, 45, 60, 90, 120, 180, 240, 360, 480, 720, 1_080, 1_440];

/**
 * A rounded duration that does not change with every update: `about 20 min`, `about 3 h`, `more
 * than a day`.
 */
export function about(ms) {
  const step = STEPS_MIN.find((one) => ms <= one * 60_000);
  if (step === undefined) return "more than a day";
  if (step === 1) return "less than a minute";
  return step < 60 ? `about ${step} min` : `about ${step / 60} h`;
}

const path = (one, verb) => `admin/batches/${one.id}/${verb}`;
const reasonField = () => field("reason", "Reason (recorded)", { maxlength: 500 });

async function pauseIt(one, again) {
  const done = await confirm({
    title: `Pause ${shortly(one.id)}?`,
    text: "Running lines finish, and no more lines start until the batch is resumed. Its 24 hours continue to run.",
    fields: [reasonField()],
    action: "Pause",
    act: (values) => post(path(one, "pause"), { ...values, by: "dashboard" }),
  });
  if (done === null) return;
  toast(`${shortly(one.id)} is paused.`);
  await again();
}

async function resumeIt(one, again) {
  const done = await confirm({
    title: `Resume ${shortly(one.id)}?`,
    text: `${count(one.total - one.completed - one.failed)} lines are left.`,
    action: "Resume",
    act: () => post(path(one, "resume"), { by: "dashboard" }),
  });
  if (done === null) return;
  toast(`${shortly(one.id)} is resumed.`);
  await again();
}

async function cancelIt(one, again) {
  const done = await confirm({
    title: `Cancel ${shortly(one.id)}?`,
    text: `This is permanent. ${count(one.total - one.completed - one.failed)} lines are left: running lines finish, and no more start. The results so far can be fetched.`,
    fields: [reasonField()],
    action: "Cancel the batch",
    danger: true,
    act: (values) => post(path(one, "cancel"), { ...values, by: "dashboard" }),
  });
  if (done === null) return;
  toast(`${shortly(one.id)} is cancelled.`);
  await again();
}

async function download(one, which, button) {
  button.disabled = true;
  try {
    const response = await ask("GET", path(one, `results/${which}`), { headers: { Accept: "*/*" } });
    saveBlob(`${one.id}-${which}.jsonl`, await response.blob());
  } catch (problem) {
    if (!(problem instanceof Problem)) throw problem;
    toast(said(problem), "bad");
  } finally {
    button.disabled = false;
  }
}
