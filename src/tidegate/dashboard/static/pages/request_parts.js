// The parts of a request's page. Text of clients and providers is always shown as text.

import { ask, Problem } from "../api.js";
import { fill, h } from "../dom.js";
import { bytes, capital, count, length, money, time } from "../format.js";
import * as session from "../session.js";
import { said, toast } from "../ui.js";
import { nameOf, talkLink, traceLink } from "./conversation.js";
import { gallery, save } from "./request_files.js";
import { calledMs, charsOf, isCut, isOpen, kindOf, linkTo, SOURCES, tierOf } from "./request_words.js";

const LONG_CHARS = 1_200;
const MOST_SHOWN_BYTES = 256 * 1024;
const NOT_COUNTED = "Among those not counted are failures of the upstream itself, such as 429, 503 or no connection.";

const BY_OPERATOR = "operator:";

/** Return the operator who made a call as its tenant; null for calls with a key or without one. */
const byOperator = ({ key }) => (key?.startsWith(BY_OPERATOR) ? key.slice(BY_OPERATOR.length) : null);

/** Show a text unchanged; a long one is collapsed until it is expanded. */
export function text(words, label, isCode = false) {
  const look = isCode ? "text code" : "text";
  const shown = h("pre", { class: look, tabindex: "0", role: "region", "aria-label": label }, words);
  if (words.length <= LONG_CHARS) return shown;
  shown.classList.add("folded");
  const button = h("button", { class: "button small", type: "button", "aria-expanded": "false" });
  fill(button, `Show all ${count(words.length)} characters`);
  button.addEventListener("click", () => {
    const folded = shown.classList.toggle("folded");
    button.setAttribute("aria-expanded", String(!folded));
    fill(button, folded ? `Show all ${count(words.length)} characters` : "Show less");
  });
  return [shown, button];
}

export function prompt(request, files, stored = []) {
  const asked = request.prompt ?? "";
  const none = () => (stored.length ? words("No text on record. See the stored bodies below.") : notHere());
  return [
    asked ? text(asIs(asked, request.endpoint), "Prompt", Boolean(request.endpoint)) : none(),
    asked && isCut(request) && words(`The first ${count(charsOf(asked))} of ${count(request.prompt_chars)} characters.`),
    request.image_uri && h("p", { class: "wrap" }, "Picture fetched from ", h("code", {}, request.image_uri)),
    gallery(request.files, files),
  ];
}

export function answer(request, files, stored = []) {
  if (request.text) return [text(request.text, "Answer"), gallery(request.images, files)];
  if (request.answer !== undefined) {
    return text(JSON.stringify(request.answer, null, 2), "Answer of the provider", true);
  }
  if (request.images.length > 0) return gallery(request.images, files);
  if (isOpen(request)) return words("No answer yet.");
  if (stored.some((one) => one.role === "response")) {
    return words("The answer is stored as the provider sent it. See the stored bodies below.");
  }
  return request.status === "succeeded" && request.text !== "" ? notHere() : words("No answer.");
}

const words = (said) => h("p", { class: "quiet-text" }, said);

/** State that the content is not available, which does not mean that it never existed. */
function notHere() {
  if (!session.readsBodies()) return words(session.whyNot("operator"));
  return words("Not on record: it was not kept, has expired or was erased.");
}

/** Indent JSON, such as the body of a native call, for reading; return any other text unchanged. */
function asIs(written, isJson) {
  if (!isJson) return written;
  try {
    return JSON.stringify(JSON.parse(written), null, 2);
  } catch {
    return written;
  }
}

/**
 * List the details of a request. `calls`: the number of listed upstream calls, some of which do not
 * count for MAX_ATTEMPTS.
 */
export function facts(request, calls) {
  const usage = request.usage ?? {};
  const last = Math.max(calls, request.attempts) > 1 ? " (last attempt)" : "";
  const rows = [
    ["Tenant", request.tenant],
    ["Source", SOURCES[request.source]],
    ["Type", kindOf(request)],
    ["Type set by", decided(request)],
    ["Model", request.model],
    ["Requested model", request.asked_model !== request.model ? request.asked_model : null],
    ["Model version", request.model_version !== request.model ? request.model_version : null],
    ["Tier", tier(request)],
    ["Served tier", request.usage?.tier && request.usage.tier !== request.tier && tierOf(request.usage.tier)],
    ["Path", request.endpoint && h("code", {}, request.endpoint)],
    ["HTTP status", request.http_status],
    ["Priority", request.priority],
    ["Submitted", time(request.submitted_at)],
    ["Admitted", request.admitted_at && time(request.admitted_at)],
    ["Ended", request.finished_at && time(request.finished_at)],
    ["Deadline", request.deadline_at && time(request.deadline_at)],
    ["Next attempt", request.retry_at && time(request.retry_at)],
    [`Waited${last}`, request.queue_ms !== undefined && length(request.queue_ms)],
    [`First byte${last}`, request.first_byte_ms !== undefined && length(request.first_byte_ms)],
    [`Call time${last}`, calledMs(request) !== undefined && length(request.upstream_ms)],
    ["Counted attempts", calls > request.attempts ? `${request.attempts} of ${calls}` : request.attempts],
    ["Workers lost", request.lapses || null],
    ["Finish reason", request.finish_reason],
    ["Input tokens", tokens(usage.input_tokens)],
    ["of these cached", tokens(usage.cached_tokens)],
    ["written to a cache", written(usage)],
    ["of audio, images, video", media(usage, "input")],
    ["Output tokens", tokens(usage.output_tokens)],
    ["of these audio, images, video", media(usage, "output")],
    ["Thinking tokens", tokens(usage.thoughts_tokens)],
    ["Total tokens", tokens(usage.total_tokens)],
    ["Searches", tokens(usage.searches)],
    ["of stored files", tokens(usage.file_searches)],
    ["Cost", cost(request)],
    ["Cost by provider", dollars(usage.provider_cost_micros)],
    ["Upstream", request.upstream],
    ["Pool", request.source !== "job" && request.pool !== request.upstream && request.pool],
    ["Process", request.process],
    ["API key", request.key && !byOperator(request) && h("code", {}, request.key.includes(":") ? request.key : `tg_${request.key}_…`)],
    ["Called by operator", byOperator(request)],
    ["Conversation", request.conversation && talk(request)],
    ["Trace", request.trace_id && trace(request)],
    ["Subject", request.subject],
    ["Replay of", request.repeats && linkTo(request.repeats, undefined, { class: "mono" })],
    ["Bound to upstream", request.bound_upstream],
  ];
  const given = rows.filter(([, value]) => value !== null && value !== undefined && value !== false && value !== "");
  return h("dl", { class: "facts" }, given.map(([name, value]) => [h("dt", {}, name), h("dd", {}, value)]));
}

/** The tier in which a job was last sent, and why, since the cost depends on it. */
function tier(request) {
  if (!request.tier) return null;
  return [h("b", {}, tierOf(request.tier)), request.tier_why && `: ${request.tier_why}`];
}

const talk = ({ tenant, conversation }) => h("a", { href: talkLink(tenant, conversation) }, nameOf(conversation));

const trace = ({ tenant, trace_id }) => h("a", { class: "mono", href: traceLink(tenant, trace_id) }, trace_id);

const tokens = (value) => (value === undefined || value === null ? null : count(value));

function written(usage) {
  const hour = usage.cache_write_1h_tokens ? ` (${count(usage.cache_write_1h_tokens)} for an hour)` : "";
  return usage.cache_write_tokens ? `${count(usage.cache_write_tokens)}${hour}` : null;
}

/** List the tokens of the input or the output by medium. */
function media(usage, side) {
  const parts = ["audio", "image", "video"].map((name) => [name, usage[`${side}_${name}_tokens`]]);
  return parts.filter(([, tokens]) => tokens).map(([name, tokens]) => `${count(tokens)} ${name}`).join(", ");
}

const dollars = (micros) => (micros === undefined ? null : `$${micros / 1e6}`);

function decided(request) {
  if (!request.classified_by) return null;
  const why = request.classified_why ? `: ${request.classified_why}` : "";
  return `${request.classified_by}${why}`;
}

function cost(request) {
  if (request.cost_micros === undefined) return request.usage_state === "told" ? "No price is set" : null;
  const how = { partial: " (partial)", estimated: " (estimated)" }[request.usage_state] ?? "";
  const at = request.usage?.tier ? `, at the price of the tier ${request.usage.tier}` : "";
  return `${money(request.cost_micros / 1e6)}${how}${at}`;
}

/** List the attempts. `counted`: how many of the calls count for MAX_ATTEMPTS. */
export function attempts(list, counted) {
  if (list.length === 0) return null;
  const hasFirst = list.some((one) => one.first_byte_ms !== undefined);
  const first = hasFirst ? ["First byte"] : [];
  const hasUpstream = list.some((one) => one.upstream !== undefined);
  const heads = ["Attempt", "Outcome", ...(hasUpstream ? ["Upstream"] : []), "Waited", ...first, "Call time", "Tokens", "Process"];
  const numbers = new Set(["Waited", "First byte", "Call time", "Tokens"]);
  const row = (one) =>
    h(
      "tr",
      {},
      h("td", {}, one.number),
      h("td", { class: "roomy" }, outcome(one)),
      hasUpstream && h("td", { class: "one-line" }, one.upstream),
      h("td", { class: "number" }, length(one.queue_ms)),
      hasFirst && h("td", { class: "number" }, length(one.first_byte_ms)),
      h("td", { class: "number" }, length(one.upstream_ms)),
      h("td", { class: "number" }, count(one.usage?.total_tokens)),
      h("td", { class: "quiet-text one-line" }, one.process),
    );
  const table = tableOf("Attempts", heads, numbers, list.map(row));
  return counted < list.length ? [table, words(`${counted} of ${list.length} count for MAX_ATTEMPTS. ${NOT_COUNTED}`)] : table;
}

function outcome(one) {
  const badge = h("span", { class: `badge ${one.outcome === "succeeded" ? "good" : one.outcome === "running" ? "accent" : "bad"}` }, capital(one.outcome));
  if (!one.error) return badge;
  return [badge, " ", h("span", { class: "quiet-text wrap" }, `${one.error.code}: ${one.error.message}`)];
}

export function webhooks(list, redeliver) {
  if (list.length === 0) return null;
  const looks = { delivered: "good", given_up: "bad", pending: "warn" };
  const names = { delivered: "Delivered", given_up: "Given up", pending: "Pending" };
  const row = (one) =>
    h(
      "tr",
      {},
      h("td", {}, h("span", { class: `badge ${looks[one.state]}` }, names[one.state])),
      h("td", { class: "wrap roomy" }, h("code", {}, one.url)),
      h("td", { class: "number" }, one.tries),
      h("td", { class: "quiet-text wrap roomy" }, [one.answer_status, one.problem].filter(Boolean).join(" · ")),
      h("td", { class: "number" }, time(one.next_try_at ?? one.ended_at)),
      h("td", {}, h("button", { class: "button small", type: "button", needs: "operator", on: { click: () => redeliver(one) } }, "Redeliver")),
    );
  const heads = ["State", "To", "Deliveries", "Answer", "Next or ended", "Action"];
  return tableOf("Webhooks", heads, new Set(["Deliveries", "Next or ended"]), list.map(row));
}

function tableOf(label, heads, numbers, rows) {
  const head = heads.map((one) =>
    h(
      "th",
      { scope: "col", class: numbers.has(one) ? "number" : null },
      one === "Action" ? h("span", { class: "visually-hidden" }, one) : one,
    ),
  );
  return h(
    "div",
    { class: "scroll", tabindex: "0", role: "region", "aria-label": `${label}, as a table` },
    h("table", { class: "table" }, h("thead", {}, h("tr", {}, head)), h("tbody", {}, rows)),
  );
}

/** List the stored bodies, shown as text on demand or downloaded. */
export function bodies(list, id, signal) {
  if (list.length === 0) {
    if (!session.readsBodies()) return words(`${session.whyNot("operator")} VIEWERS_READ_BODIES allows viewers to read them too.`);
    return words("Bodies are stored when a request ends, for the retention time of its tenant.");
  }
  return list.map((one) => body(one, `admin/requests/${id}/${one.role}`, signal));
}

function body(one, path, signal) {
  const shown = h("div", {});
  const title = one.role === "request" ? "Request" : "Response";
  const show = h("button", { class: "button small", type: "button", "aria-expanded": "false" }, "Show");
  const keep = h("button", { class: "button small", type: "button" }, "Download");
  const whenever = (what) => async () => {
    try {
      await what();
    } catch (error) {
      if (signal.aborted) return;
      if (!(error instanceof Problem)) throw error;
      toast(said(error), "bad");
    }
  };
  show.addEventListener(
    "click",
    whenever(async () => {
      const isShown = show.getAttribute("aria-expanded") === "true";
      if (isShown) fill(shown);
      else fill(shown, await read(path, one, signal, title));
      show.setAttribute("aria-expanded", String(!isShown));
      fill(show, isShown ? "Show" : "Hide");
    }),
  );
  keep.addEventListener(
    "click",
    whenever(async () => {
      const response = await ask("GET", path, { signal, headers: { Accept: "*/*" } });
      save(await response.blob(), `${path.split("/")[2]}-${one.role}`);
    }),
  );
  const omitted = one.omitted_bytes ? `, ${bytes(one.omitted_bytes)} in the middle not stored` : "";
  return h(
    "div",
    { class: "body" },
    h(
      "div",
      { class: "body-head" },
      h("strong", {}, title),
      h("span", { class: "quiet-text" }, `${one.content_type}, ${bytes(one.size_bytes)}${omitted}`),
      show,
      keep,
    ),
    shown,
  );
}

/** Read as much of a body as a page can show. */
async function read(path, one, signal, title) {
  const response = await ask("GET", path, { signal, headers: { Accept: "*/*" } });
  const reader = response.body.getReader();
  const pieces = [];
  let size = 0;
  while (size < MOST_SHOWN_BYTES) {
    const { value, done } = await reader.read();
    if (done) break;
    pieces.push(value);
    size += value.length;
  }
  await reader.cancel();
  const raw = await new Blob(pieces).slice(0, MOST_SHOWN_BYTES).text();
  const isWhole = size <= MOST_SHOWN_BYTES && size >= one.size_bytes;
  const shown = asIs(raw, isWhole && one.content_type.includes("json"));
  return [text(shown, title, true), !isWhole && words(`The first ${bytes(MOST_SHOWN_BYTES)}. Download it to see the rest.`)];
}
