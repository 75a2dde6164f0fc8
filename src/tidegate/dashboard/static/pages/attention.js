// Items that need an operator: failed jobs, dead jobs, failed webhooks, and unexplained costs.

import { get, post } from "../api.js";
import { BOOK_HEADS, bookRow, bookText } from "../books.js";
import { fill, h } from "../dom.js";
import { ago, count, time } from "../format.js";
import { listed } from "../listed.js";
import { link } from "../router.js";
import { settled } from "../stuck.js";
import { confirm, empty, failed, loading, toast } from "../ui.js";

const MOST = 1_000; // dead jobs, and failed webhooks
const NEWEST = "the newest 1,000";

export async function open(main, { signal }) {
  const failures = h("div", {}, loading(2));
  const again = () => {
    settled();
    return show();
  };
  const jobs = list("Dead jobs", "Their workers died three times, so they are not retried.", `admin/dead?most=${MOST}`, signal, again, {
    note: NEWEST,
    heads: JOB_HEADS,
    textOf: (one) => `${one.request_id} ${one.tenant} ${one.type} ${one.problem}`,
    row: jobRow,
    none: "No dead jobs",
  });
  const webhooks = list("Failed webhooks", "Webhooks whose deliveries have all failed.", `admin/webhooks?most=${MOST}`, signal, again, {
    note: NEWEST,
    heads: HOOK_HEADS,
    textOf: (one) => `${one.request_id} ${one.tenant} ${one.event} ${one.url} ${one.problem}`,
    row: hookRow,
    none: "No failed webhooks",
  });
  const unexplained = list(
    "Unexplained costs",
    () => ["Models and days of the last 31 days whose recorded cost differs from the provider's. ", h("a", { href: link("/usage", { range: "30" }) }, "All reconciliations")],
    "admin/reconciliations",
    signal,
    again,
    { heads: BOOK_HEADS, textOf: bookText, row: bookRow, none: "No unexplained costs", isShown: (one) => one.verdict === "unexplained" },
  );
  const reading = loading(8);
  main.append(h("div", { class: "page-head" }, h("h1", {}, "Attention")), reading);
  const show = () => Promise.all([failedJobs(failures, signal, again), jobs.look(), webhooks.look(), unexplained.look()]);
  await show();
  // Together, so that none of them moves another.
  reading.replaceWith(
    card("Failed jobs", "Jobs that failed in the last 24 hours, by error.", failures),
    jobs.element,
    webhooks.element,
    unexplained.element,
  );
}

const headsOf = (...words) => [...words.map((one) => [one, ""]), ["", "actions"]];
const JOB_HEADS = headsOf("Job", "Tenant", "Type", "Attempts", "Died", "Reason");
const HOOK_HEADS = headsOf("Request", "Tenant", "Event", "Deliveries", "Given up", "Last answer");

const card = (title, words, body) =>
  h(
    "section",
    { class: "card", "aria-label": title },
    h("div", { class: "card-head" }, h("h2", {}, title)),
    h("p", { class: "quiet-text card-body" }, words),
    body,
  );

/**
 * A card with a table that has a search and pages. `look()` reads it again. `given`: the text, or a
 * function that creates it for each place.
 */
function list(title, given, path, signal, again, { heads, textOf, row, none, note = "", isShown = () => true }) {
  const words = () => (typeof given === "function" ? given() : given);
  const table = listed(title, heads, textOf, (one) => row(one, again), {
    none: [none],
    note,
    above: h("p", { class: "quiet-text card-body" }, words()),
  });
  const place = h("div", {}, card(title, words(), loading(2)));
  return {
    element: place,
    async look() {
      try {
        const answer = await get(path, { signal });
        table.show((answer.items ?? answer).filter(isShown));
        if (!place.contains(table.element)) fill(place, table.element);
      } catch (problem) {
        if (problem.name === "AbortError") return;
        if (problem.status === undefined) throw problem;
        fill(place, card(title, words(), failed(problem, again)));
      }
    },
  };
}

const request = (id) =>
  h("a", { href: link(`/requests/${id}`), class: "mono", title: id }, `…${id.slice(-12)}`);

const when = (at) => h("td", { title: time(at) }, ago(at));

function button(words, label, act, danger = false) {
  const made = h("button", { class: `button small ${danger ? "danger" : ""}`, type: "button", needs: "operator" }, words);
  made.setAttribute("aria-label", label);
  made.addEventListener("click", act);
  return made;
}

const DAY_MS = 86_400_000;

/** Show the number of failed jobs by error, each with a button to queue them again. */
async function failedJobs(place, signal, again) {
  const since = new Date(Date.now() - DAY_MS).toISOString();
  try {
    const found = await post("admin/requests/requeue", { since, limit: 10_000 }, { signal });
    const codes = Object.entries(found.by_code);
    if (!codes.length) {
      fill(place, empty("No failed jobs"));
      return;
    }
    const more = found.has_more && h("p", { class: "quiet-text card-body" }, `Only the ${count(found.matching)} jobs that ended first are counted. Requeue these to see the others.`);
    const rows = codes.map(([code, jobs]) => failureRow(code, jobs, since, again));
    fill(
      place,
      h(
        "div",
        { class: "scroll", tabindex: "0", role: "group", "aria-label": "Failed jobs, a table" },
        h(
          "table",
          { class: "table" },
          h(
            "thead",
            {},
            h(
              "tr",
              {},
              h("th", { scope: "col" }, "Error"),
              h("th", { scope: "col" }, "Jobs"),
              h("th", { scope: "col" }, h("span", { class: "visually-hidden" }, "Actions")),
            ),
          ),
          h("tbody", {}, rows),
        ),
      ),
      more,
    );
  } catch (problem) {
    if (problem.name === "AbortError") return;
    if (problem.status === undefined) throw problem;
    fill(place, failed(problem, again));
  }
}

function failureRow(code, jobs, since, again) {
  const requeue = () =>
    confirm({
      title: `Requeue ${count(jobs)} failed jobs?`,
      text: `Jobs of the last 24 hours with ${code ? `the error ${code}` : "no error code"} are queued again under the same ids. Each sends a new webhook when it ends.`,
      action: "Requeue",
      act: async () => {
        const order = { since, error_code: code, limit: 10_000, dry_run: false, by: "dashboard" };
        const done = await post("admin/requests/requeue", order);
        toast(`${count(done.requeued)} jobs are queued again.`);
        again();
      },
    });
  return h(
    "tr",
    { data: { code } },
    h("td", {}, code || "none"),
    h("td", {}, count(jobs)),
    h("td", { class: "actions" }, button("Requeue", `Requeue jobs with ${code || "no code"}`, requeue)),
  );
}

function jobRow(job, again) {
  const path = `admin/dead/${job.request_id}`;
  const requeue = () =>
    confirm({
      title: "Requeue this job?",
      text: "It is queued again with all its attempts. If the job itself crashed its workers, it may crash them again.",
      action: "Requeue",
      act: async () => {
        await post(`${path}/requeue`);
        toast("The job is queued again.");
        again();
      },
    });
  const discard = () =>
    confirm({
      title: "Discard this job?",
      text: "It is cancelled permanently, and stays in the request log.",
      action: "Discard",
      danger: true,
      act: async () => {
        await post(`${path}/discard`);
        toast("The job is cancelled.");
        again();
      },
    });
  return h(
    "tr",
    { data: { request: job.request_id } },
    h("th", { scope: "row", class: "name" }, request(job.request_id)),
    h("td", {}, job.tenant),
    h("td", {}, job.type ?? "unsure"),
    h("td", {}, count(job.attempts)),
    when(job.died_at),
    h("td", { class: "wrap" }, job.problem),
    h(
      "td",
      { class: "actions" },
      button("Requeue", `Requeue ${job.request_id}`, requeue),
      " ",
      button("Discard", `Discard ${job.request_id}`, discard, true),
    ),
  );
}

function hookRow(hook, again) {
  const redeliver = () =>
    confirm({
      title: "Redeliver this webhook?",
      text: `It is sent to ${hook.url} now, and retried like a new one.`,
      action: "Redeliver",
      act: async () => {
        await post(`admin/webhooks/${hook.webhook_id}/redeliver`);
        toast("The webhook is queued for delivery.");
        again();
      },
    });
  return h(
    "tr",
    { data: { webhook: hook.webhook_id } },
    h("th", { scope: "row", class: "name" }, request(hook.request_id)),
    h("td", {}, hook.tenant),
    h("td", {}, hook.event),
    h("td", {}, count(hook.tries)),
    when(hook.given_up_at),
    h("td", { class: "wrap" }, hook.problem ?? `status ${hook.answer_status}`),
    h("td", { class: "actions" }, button("Redeliver", `Redeliver ${hook.webhook_id}`, redeliver)),
  );
}
