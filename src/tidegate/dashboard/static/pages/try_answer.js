// One side of the playground: a conversation with a model, its answer as it streams, and its
// figures.

import { address, events, framed, get, Problem } from "../api.js";
import { fill, h, mark, say } from "../dom.js";
import { count, length, money, NOTHING } from "../format.js";
import * as session from "../session.js";
import { empty, said } from "../ui.js";
import { Files, shownFile } from "./request_files.js";
import { isOpen, KINDS, linkTo, ordinal } from "./request_words.js";
import { APIS } from "./try_dialects.js";

const LOOK_MS = 700;
const KEY = /^tg_([a-z0-9]{10})_/;
export const STOPPED = "stopped";
const LOOKS = 20; // reads of a call's cost, which is recorded soon after its end
const FIELDS = ["type", "model", "image_uri", "priority", "deadline_ms"];
const FIGURES = { first: "First token", duration: "Duration", waited: "Waited", tokens: "Tokens in, out", cost: "Cost", upstream: "Upstream" };

/**
 * Return the call to be sent: `{ api, model, body, headers, files }`, with headers besides the key.
 * `turns` are earlier turns.
 */
export function callOf(asked, model, turns) {
  const { api, options, files } = asked;
  const headers = options.tenant ? { "X-Tidegate-Tenant": options.tenant } : {};
  if (APIS[api].dialect === null) {
    const values = { ...options, model };
    const given = FIELDS.filter((name) => values[name] !== "" && values[name] !== null && values[name] !== undefined);
    const data = asked.text || !files.length ? { data: asked.text } : {};
    return { api, model, headers, files, body: { ...data, ...Object.fromEntries(given.map((name) => [name, values[name]])) } };
  }
  if (options.priority !== null) headers["X-Tidegate-Priority"] = String(options.priority);
  if (options.deadline_ms !== null) headers["X-Tidegate-Deadline-Ms"] = String(options.deadline_ms);
  const body = APIS[api].body(model, [...turns, { role: "user", text: asked.text, files }], options);
  const all = [...turns.flatMap((one) => one.files ?? []), ...files];
  return { api, model, headers, files: all.filter((one) => one.text === undefined), body };
}

/**
 * Create a side: `{ element, run(asked, model), stop(), clear(), sent() }`.
 *
 * `run` resolves with a Problem, with `STOPPED`, or with null after a complete answer. `sent()`
 * returns the last call, or null.
 */
export function answering(label, signal) {
  const who = h("h2", {});
  const state = h("p", { class: "try-state", role: "status" });
  const log = h("ol", { class: "try-turns", tabindex: "0", "aria-label": `${label}: earlier turns` });
  const question = h("p", { class: "try-asked" });
  const text = h("pre", { class: "text", tabindex: "0", role: "region", "aria-label": label });
  const pictures = h("ul", { class: "gallery" });
  const values = Object.fromEntries(Object.keys(FIGURES).map((name) => [name, h("dd", {}, NOTHING)]));
  const figures = h("dl", { class: "try-figures" }, Object.entries(FIGURES).map(([name, words]) => h("div", {}, h("dt", {}, words), values[name])));
  const whole = h("p", { class: "try-whole" });
  const before = empty("The answer appears here", "While a call waits, its limit is shown. Enter a second model to compare two answers.");
  const content = h("div", { class: "try-content", hidden: true }, who, log, question, state, text, pictures, figures, whole);
  const element = h("section", { class: "card card-body try-answer", "aria-label": `${label} and its figures` }, before, content);
  const files = new Files(signal);
  let running = new AbortController();
  let [turns, asking, made] = [[], "", null];

  const show = {
    say: (words, look = "") => {
      say(state, words);
      mark(state, "data-look", look);
    },
    write: (piece) => text.append(piece),
    replace: (words) => say(text, words),
    picture: (file) => pictures.append(h("li", {}, shownFile(file, files))),
    drawn: ({ mimeType, data }) => pictures.append(h("li", {}, h("img", { src: `data:${mimeType};base64,${data}`, alt: "Picture" }))),
    figure: (name, words) => say(values[name], words),
    link: (id) => fill(whole, linkTo(id, "View details")),
  };

  function begin(asked, model) {
    const isChat = APIS[asked.api].dialect !== null;
    if (!isChat) turns = [];
    fill(log, turns.map((one) => h("li", { data: { role: one.role } }, one.text)));
    before.hidden = true;
    content.hidden = false;
    log.scrollTop = log.scrollHeight;
    [text, pictures, whole].forEach((one) => fill(one));
    asking = [asked.text, ...asked.files.map((one) => one.name)].filter(Boolean).join(" · ");
    say(question, turns.length ? asking : "");
    say(who, model || "Default model");
    for (const name of Object.keys(FIGURES)) show.figure(name, NOTHING);
    show.say("Sending …");
  }

  async function run(asked, model) {
    running.abort(); // late figures of the previous call must not replace those of this one
    running = new AbortController();
    const both = AbortSignal.any([signal, running.signal]);
    begin(asked, model);
    made = callOf(asked, model, turns);
    mark(element, "aria-busy", "true");
    try {
      await WAYS[asked.api](asked, made, show, both);
      if (APIS[asked.api].dialect !== null) {
        turns.push({ role: "user", text: asked.text, files: asked.files }, { role: "assistant", text: text.textContent });
      }
      return null;
    } catch (error) {
      if (error.name === "AbortError" || both.aborted) {
        show.say("Stopped. A stream is cancelled; a job continues.");
        return STOPPED;
      }
      const problem = error instanceof Problem ? error : new Problem({ detail: `The answer can't be read: ${error.message}.` });
      show.say(said(problem), "bad");
      return problem;
    } finally {
      mark(element, "aria-busy", null);
    }
  }

  return {
    element,
    run,
    stop: () => running.abort(),
    sent: () => made,
    turns: () => turns,
    clear() {
      running.abort();
      [turns, made] = [[], null];
      before.hidden = false;
      content.hidden = true;
    },
  };
}

const WAYS = {
  prompt: (asked, call, show, signal) => streamed(asked, call, show, signal),
  job: (asked, call, show, signal) => handedIn(asked, call, show, signal),
};
for (const [name, { dialect }] of Object.entries(APIS)) if (dialect !== null) WAYS[name] = (...given) => native(...given);

/** Return a form if a prompt has files, else JSON. */
function payload(asked, { api, body, files }, headers) {
  if (APIS[api].dialect !== null || files.length === 0) {
    headers["Content-Type"] = "application/json";
    return JSON.stringify(body);
  }
  const form = new FormData();
  for (const [name, value] of Object.entries(body)) form.append(name, value);
  for (const { file, name } of asked.files) form.append("files", file, name);
  return form;
}

const NO_KEY = "This API key is not valid: it is not of this gateway, has expired or was revoked.";
const NEEDS_KEY = "Calls need an API key with the scope infer: enter one under Options. What you signed in with is for the dashboard only.";
const OR_TENANT = " Or select a tenant, as which you call.";

/**
 * Send a call as `ask` of the API client does: as the selected tenant, which an operator may, or
 * with a key of its own, whose rejection does not sign out.
 */
async function asking(asked, call, accept, signal) {
  const headers = { Accept: accept, ...APIS[call.api].headers, ...call.headers };
  if (asked.as) headers["X-Tidegate-As-Tenant"] = asked.as;
  const key = (!asked.as && asked.options.key) || session.key();
  if (key) headers.Authorization = `Bearer ${key}`;
  const body = payload(asked, call, headers);
  const path = (APIS[call.api].streamed ?? APIS[call.api].path)(call.model);
  let response;
  try {
    response = await fetch(address(asked.as ? `admin/calls${path}` : path), { method: "POST", headers, body, signal, cache: "no-store", credentials: "same-origin" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem({ detail: "The gateway does not answer.", code: "away" });
  }
  if (response.ok) return response;
  if (response.status === 401 && !asked.as) throw new Problem({ status: 401, field: "key", detail: asked.options.key ? NO_KEY : needsKey() });
  const told = await response.json().catch(() => ({}));
  const inner = told.error ?? (Array.isArray(told) ? told[0]?.error : null) ?? {};
  const detail = told.detail ?? inner.message ?? told.message ?? `The gateway answered with status ${response.status}.`;
  const problem = new Problem({ ...told, status: response.status, detail, code: told.code ?? inner.code, field: told.field ?? inner.param ?? null });
  if (response.status === 401) session.signOut(problem);
  throw problem;
}

const needsKey = () => `${NEEDS_KEY}${session.may("operator") ? OR_TENANT : ""}`;

/** Return the response; until it arrives, show what the call waits for. */
async function admitted(asked, call, accept, show, signal) {
  const watching = new AbortController();
  const began = performance.now();
  watchQueue(asked, asked.pools(call.model), show, began, AbortSignal.any([signal, watching.signal]));
  try {
    const response = await asking(asked, call, accept, signal);
    const waited = Number(response.headers.get("x-tidegate-queue-ms"));
    show.figure("waited", length(waited));
    show.figure("upstream", response.headers.get("x-tidegate-upstream") ?? NOTHING);
    show.say(`Started after ${length(waited)}.`, "live");
    return { response, began, id: response.headers.get("x-tidegate-request-id") };
  } finally {
    watching.abort();
  }
}

async function native(asked, call, show, signal) {
  const { streamed: isFramed, read } = APIS[call.api];
  const accept = isFramed ? "application/vnd.amazon.eventstream" : "text/event-stream";
  const { response, began, id } = await admitted(asked, call, accept, show, signal);
  show.link(id);
  const since = () => performance.now() - began;
  const usage = {};
  let first = null;
  const take = (data) => {
    const { text, pictures = [], problem, ...counts } = read(data);
    if (problem) throw new Problem({ detail: problem });
    if ((text || pictures.length) && first === null) {
      first = since();
      show.figure("first", length(first));
    }
    if (text) show.write(text);
    pictures.forEach(show.drawn);
    Object.assign(usage, counts);
  };
  if (isFramed) for await (const { type, problem, data } of framed(response)) take({ [type]: data, problem });
  else for await (const { data } of events(response)) if (data !== "[DONE]") take(JSON.parse(data));
  show.figure("duration", length(since()));
  show.figure("tokens", `${count(usage.input)}, ${count(usage.output)}`);
  show.say("Done", "good");
  recorded(id, show, signal);
}

async function streamed(asked, call, show, signal) {
  const { response, began, id } = await admitted(asked, call, "text/event-stream", show, signal);
  let [first, isWhole] = [null, false];
  const pictures = [];
  for await (const { event, data } of events(response)) {
    const told = JSON.parse(data);
    if (event === "delta") {
      first ??= performance.now() - began;
      show.figure("first", length(first));
      show.write(told.text);
    } else if (event === "image") {
      pictures.push(told);
      show.say(`${count(pictures.length)} pictures generated; they are shown once the request is on record.`, "live");
    } else if (event === "usage") show.figure("tokens", tokensOf(told));
    else if (event === "error") {
      show.link(told.request_id);
      throw new Problem(told);
    } else if (event === "done") {
      isWhole = true;
      show.say(`Done${told.finish_reason ? ` (${told.finish_reason})` : ""}`, "good");
      show.figure("waited", length(told.queue_ms));
      show.figure("duration", length(performance.now() - began));
      show.link(told.request_id);
      for (const one of pictures) show.picture({ ...one, url: fileOf(id, one) });
      recorded(id, show, signal);
    }
  }
  if (!isWhole) throw new Problem({ detail: "The stream ended before the answer was complete.", code: "away" });
}

/** Return the path of an image of a request for operators, whatever its owner. */
const fileOf = (id, picture) => `admin/requests/${id}/files/${picture.url.split("/").pop()}`;

const tokensOf = (usage) =>
  usage?.input_tokens === undefined || usage.input_tokens === null ? NOTHING : `${count(usage.input_tokens)}, ${count(usage.output_tokens)}`;

/** Show the upstream and the cost of a call once it is recorded. */
async function recorded(id, show, signal) {
  try {
    for (let look = 0; look < LOOKS; look += 1) {
      const { items } = await get("admin/requests", { query: { id }, signal });
      const isRecorded = items.length && !isOpen(items[0]);
      if (isRecorded) show.figure("upstream", items[0].upstream ?? NOTHING);
      if (isRecorded) return told((await get(`admin/requests/${id}`, { signal })).request, show);
      await pause(LOOK_MS, signal);
    }
  } catch (error) {
    if (!(error instanceof Problem) && error.name !== "AbortError") throw error;
  }
  return null;
}

function told(request, show) {
  if (Number.isInteger(request.cost_micros)) show.figure("cost", money(request.cost_micros / 1e6));
  else show.figure("cost", request.usage_state === "told" ? "no price" : NOTHING);
}

const pause = (ms, signal) =>
  new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, ms);
    signal.addEventListener("abort", () => {
      clearTimeout(timer);
      reject(new DOMException("stopped", "AbortError"));
    });
  });

/** Return the tenant that is named, or that owns the key; null if neither is known. */
async function tenantOf({ tenant, key }, signal) {
  const [, prefix] = KEY.exec(key || session.key() || "") ?? [];
  if (tenant || !prefix) return tenant || null;
  const keys = await get("admin/keys", { query: { prefix }, signal });
  return keys.find((one) => one.prefix === prefix)?.tenant ?? null;
}

/**
 * Until the stream is admitted, show the state of the limit that blocks its tenant at these
 * upstreams.
 */
async function watchQueue({ as, options }, pools, show, began, signal) {
  try {
    const tenant = as || (await tenantOf(options, signal));
    for (;;) {
      await pause(LOOK_MS, signal);
      const found = await Promise.all(pools.map((pool) => get("admin/limits", { query: { pool }, signal })));
      const waited = `${length(performance.now() - began)} so far`;
      const queues = found.map((pool) => ({ pool, queue: fullest(pool.queues.filter((one) => isOf(one, tenant) && fits(one, options))) }));
      const [longest] = queues.filter((one) => one.queue).toSorted((a, b) => b.queue.waiting - a.queue.waiting);
      if (!longest) show.say(`Sent, ${waited}`);
      else show.say(`Waiting for ${longest.queue.held_up_by}: ${inWords(longest.queue, longest.pool)}, ${waited}`, "waiting");
    }
  } catch (error) {
    if (!(error instanceof Problem) && error.name !== "AbortError") throw error;
  }
}

const isOf = (queue, tenant) => queue.held_up_by && (tenant === null || queue.tenant === tenant);

/** Return the limit with the most waiting calls in all processes: `{ held_up_by, waiting }`. */
function fullest(queues) {
  const sums = new Map();
  for (const { held_up_by: limit, waiting } of queues) sums.set(limit, (sums.get(limit) ?? 0) + waiting);
  const [found] = [...sums].sort(([, a], [, b]) => b - a);
  return found && { held_up_by: found[0], waiting: found[1] };
}

const fits = (queue, options) => !options.type || queue.limits.includes(`kind:${options.type}`);

function inWords(queue, pool) {
  const limit = pool.limits.find((one) => one.limit === queue.held_up_by);
  if (limit?.paused_ms) return `paused${limit.paused_by ? ` by ${limit.paused_by}` : ""}`;
  const used = limit ? `${count(limit.used)} of ${count(limit.current)} in use, ` : "";
  return `${used}${count(queue.waiting)} waiting`;
}

async function handedIn(asked, call, show, signal) {
  const began = performance.now();
  const response = await asking(asked, call, "application/json", signal);
  const { request_id: id } = await response.json();
  show.link(id);
  const seen = new Set();
  for (;;) {
    const view = await get(`admin/requests/${id}`, { signal });
    const { request } = view;
    for (const file of request.images) {
      if (seen.has(file.url)) continue;
      seen.add(file.url);
      show.picture(file);
    }
    if (!isOpen(request)) {
      if (request.error) throw new Problem({ detail: request.error.message, code: request.error.code });
      show.replace(request.text ?? "");
      show.say("Done", "good");
      show.figure("waited", length(request.queue_ms));
      show.figure("duration", length(performance.now() - began));
      show.figure("tokens", tokensOf(request.usage));
      recorded(id, show, signal);
      return;
    }
    show.say(jobState(view), request.status === "running" ? "live" : "waiting");
    await pause(LOOK_MS, signal);
  }
}

function jobState({ request, waiting }) {
  if (request.status === "running") return `Running${KINDS[request.type] ? `: ${KINDS[request.type].toLowerCase()}` : ""}`;
  const place = request.place ? `${ordinal(request.place)} in its queue` : "";
  if (waiting?.held_up_by) return [`Waiting for ${waiting.held_up_by}`, place].filter(Boolean).join(", ");
  return [`It ${waiting?.sentence ?? "waits"}`, place].filter(Boolean).join(", ");
}
