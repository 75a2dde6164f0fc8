// Sending a request, and showing what becomes of it: waiting, the answer as it comes, its end.

import { address, events, get, Problem } from "../api.js";
import { fill, h, mark, say } from "../dom.js";
import { count, length } from "../format.js";
import * as session from "../session.js";
import { empty, said } from "../ui.js";
import { Files, shownFile } from "./request_files.js";
import { isOpen, KINDS, linkTo, ordinal } from "./request_words.js";

const LOOK_MS = 700;
const FIELDS = ["type", "model", "image_uri", "priority", "deadline_ms"];

/** `{ element, run(way, asked), stop() }`; `run` resolves with a Problem, or null. */
export function answering(signal) {
  const state = h("p", { class: "try-state", role: "status" });
  const text = h("pre", { class: "text", tabindex: "0", role: "region", "aria-label": "Answer" });
  const pictures = h("ul", { class: "gallery" });
  const figures = h("p", { class: "quiet-text" });
  const whole = h("p", {});
  const before = empty("The answer appears here", "Where it has to wait, it says for what.");
  const content = h("div", { class: "try-content", hidden: true }, state, text, pictures, figures, whole);
  const element = h("section", { class: "card card-body try-answer", "aria-label": "The answer" }, before, content);
  const files = new Files(signal);
  let running = new AbortController();

  const show = {
    say: (words, look = "") => {
      say(state, words);
      mark(state, "data-look", look);
    },
    write: (piece) => text.append(piece),
    replace: (words) => say(text, words),
    picture: (file) => pictures.append(h("li", {}, shownFile(file, files))),
    figures: (words) => say(figures, words),
    link: (id) => fill(whole, linkTo(id, "View details")),
  };

  function clear() {
    before.hidden = true;
    content.hidden = false;
    [text, pictures, whole].forEach((one) => fill(one));
    show.figures("");
    show.say("Sending …");
  }

  async function run(way, asked) {
    running = new AbortController();
    const both = AbortSignal.any([signal, running.signal]);
    clear();
    mark(element, "aria-busy", "true");
    try {
      await (way === "job" ? handedIn : streamed)(asked, show, both);
      return null;
    } catch (error) {
      if (error.name === "AbortError" || both.aborted) {
        show.say("Stopped. What runs is cancelled by the gateway, where it was a stream.");
        return null;
      }
      if (!(error instanceof Problem)) throw error;
      show.say(said(error), "bad");
      return error;
    } finally {
      mark(element, "aria-busy", null);
    }
  }

  return { element, run, stop: () => running.abort() };
}

/** The body and headers of what is asked; a form where there are files. */
function sent(asked, accept) {
  const headers = { Accept: accept };
  const key = asked.key || session.key();
  if (key) headers.Authorization = `Bearer ${key}`;
  if (asked.tenant) headers["X-Tidegate-Tenant"] = asked.tenant;
  const given = FIELDS.filter((name) => asked[name] !== "" && asked[name] !== null);
  if (asked.files.length === 0) {
    const values = Object.fromEntries(given.map((name) => [name, asked[name]]));
    headers["Content-Type"] = "application/json";
    return { headers, body: JSON.stringify({ data: asked.text, ...values }) };
  }
  const form = new FormData();
  if (asked.text) form.append("data", asked.text);
  for (const name of given) form.append(name, asked[name]);
  for (const file of asked.files) form.append("files", file, file.name);
  return { headers, body: form };
}

/** As `ask` of the API's client does, with a key of its own; a refusal signs nobody out. */
async function asking(path, asked, accept, signal) {
  let response;
  try {
    response = await fetch(address(path), {
      method: "POST",
      ...sent(asked, accept),
      signal,
      cache: "no-store",
      credentials: "same-origin",
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem({ detail: "The gateway does not answer.", code: "away" });
  }
  if (response.ok) return response;
  const problem = await response.json().catch(() => ({ detail: `The answer was ${response.status}.` }));
  throw new Problem({ status: response.status, ...problem });
}

async function streamed(asked, show, signal) {
  const watching = new AbortController();
  const stopped = AbortSignal.any([signal, watching.signal]);
  const began = performance.now();
  watchQueue(asked, show, began, stopped);
  let response;
  try {
    response = await asking("stream", asked, "text/event-stream", signal);
  } finally {
    watching.abort();
  }
  const id = response.headers.get("x-tidegate-request-id");
  const waited = Number(response.headers.get("x-tidegate-queue-ms"));
  const kind = KINDS[response.headers.get("x-tidegate-type")] ?? "";
  show.say(`Started after ${length(waited)}.`, "live");
  let usage = {};
  let first = null;
  const pictures = [];
  for await (const { event, data } of events(response)) {
    first ??= performance.now() - began;
    const told = JSON.parse(data);
    if (event === "delta") show.write(told.text);
    else if (event === "image") {
      pictures.push(told);
      show.say(`${count(pictures.length)} of its pictures made; shown once all is on record.`, "live");
    }
    else if (event === "usage") usage = told;
    else if (event === "error") {
      show.link(told.request_id);
      throw new Problem(told);
    } else if (event === "done") {
      show.say(`Done${told.finish_reason ? ` (${told.finish_reason})` : ""}`, "good");
      const parts = [
        kind,
        `waited ${length(told.queue_ms)}`,
        `first word after ${length(first)}`,
        `call ${length(told.upstream_ms)}`,
        tokensOf(usage),
      ];
      show.figures(parts.filter(Boolean).join(" · "));
      show.link(told.request_id);
      for (const one of pictures) show.picture({ ...one, url: recorded(id, one) });
    }
  }
}

/** Where an operator finds a picture of a request, whatever its owner. */
const recorded = (id, picture) =>
  `admin/requests/${id}/files/${picture.url.split("/").pop()}`;

const tokensOf = (usage) =>
  usage?.total_tokens === undefined || usage.total_tokens === null
    ? ""
    : `${count(usage.input_tokens)} tokens in, ${count(usage.output_tokens)} out`;

const pause = (ms, signal) =>
  new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, ms);
    signal.addEventListener("abort", () => {
      clearTimeout(timer);
      reject(new DOMException("stopped", "AbortError"));
    });
  });

/** Until the stream is admitted: how the limit stands that holds its tenant up. */
async function watchQueue(asked, show, began, signal) {
  const tenant = asked.tenant || null; // whose key it is, where one is shown, is not known here
  try {
    for (;;) {
      await pause(LOOK_MS, signal);
      const pool = await get("admin/limits", { signal });
      const waited = `${length(performance.now() - began)} so far`;
      const queue = fullest(pool.queues.filter((one) => isOf(one, tenant) && fits(one, asked)));
      if (!queue) show.say(`On its way, ${waited}`);
      else show.say(`Waiting for ${queue.held_up_by}: ${inWords(queue, pool)}, ${waited}`, "waiting");
    }
  } catch (error) {
    if (!(error instanceof Problem) && error.name !== "AbortError") throw error;
  }
}

const isOf = (queue, tenant) => queue.held_up_by && (tenant === null || queue.tenant === tenant);

/** The limit that most wait for, over all processes: `{ held_up_by, waiting }`. */
function fullest(queues) {
  const sums = new Map();
  for (const { held_up_by: limit, waiting } of queues) sums.set(limit, (sums.get(limit) ?? 0) + waiting);
  const [found] = [...sums].sort(([, a], [, b]) => b - a);
  return found && { held_up_by: found[0], waiting: found[1] };
}

const fits = (queue, asked) => !asked.type || queue.limits.includes(`kind:${asked.type}`);

function inWords(queue, pool) {
  const limit = pool.limits.find((one) => one.limit === queue.held_up_by);
  if (limit?.paused_ms) return `paused${limit.paused_by ? ` by ${limit.paused_by}` : ""}`;
  const used = limit ? `${count(limit.used)} of ${count(limit.current)} in use, ` : "";
  return `${used}${count(queue.waiting)} in line`;
}

async function handedIn(asked, show, signal) {
  const response = await asking("submit", asked, "application/json", signal);
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
      const parts = [`waited ${length(request.queue_ms)}`, `call ${length(request.upstream_ms)}`, tokensOf(request.usage)];
      show.figures(parts.filter(Boolean).join(" · "));
      return;
    }
    show.say(jobState(view), request.status === "running" ? "live" : "waiting");
    await pause(LOOK_MS, signal);
  }
}

function jobState({ request, waiting }) {
  if (request.status === "running") return "Running";
  const place = request.place ? `${ordinal(request.place)} in its queue` : "";
  if (waiting?.held_up_by) return [`Waiting for ${waiting.held_up_by}`, place].filter(Boolean).join(", ");
  return [`It ${waiting?.sentence ?? "waits"}`, place].filter(Boolean).join(", ");
}
