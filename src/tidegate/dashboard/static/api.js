// The gateway's own HTTP API, asked with the key of this tab, or the cookie of the start-up page's
// address. Every failure is a Problem.

import * as session from "./session.js";

// The document is at <prefix>/dashboard/, so that the API is one step up, behind any proxy.
const BASE = new URL("..", document.baseURI);

/** An answer that is an error, as problem JSON (RFC 9457) says it; or no answer at all. */
export class Problem extends Error {
  constructor(fields) {
    super(fields.detail || fields.title || "Unknown error.");
    this.name = "Problem";
    this.status = fields.status ?? 0;
    this.code = fields.code ?? "";
    this.field = fields.field ?? null;
    this.allowed = fields.allowed ?? null;
    this.limit = fields.limit ?? null;
    this.retryAfterMs = fields.retry_after_ms ?? null;
  }

  /** Whether nobody answered: the process is away, or the network. */
  get isAway() {
    return this.status === 0;
  }
}

/** The address of a path of the API, such as `admin/limits`, with a query from an object. */
export function address(path, query = {}) {
  const url = new URL(path.replace(/^\//, ""), BASE);
  for (const [name, value] of Object.entries(query)) {
    if (value !== null && value !== undefined && value !== "") url.searchParams.set(name, value);
  }
  return url;
}

/**
 * Ask, and return the Response once it is known to be a good one.
 *
 * `body` is sent as JSON, unless it is FormData. Throws Problem; an AbortError of `signal` passes.
 * A 401 signs out, unless `keepSession`: what a page asks of another API than /admin and /dashboard
 * may be refused to a token that opens those.
 */
export async function ask(method, path, options = {}) {
  const { query, body, signal, headers = {}, keepSession = false } = options;
  const sent = { Accept: "application/json", ...headers };
  const key = session.key();
  if (key) sent.Authorization = `Bearer ${key}`;
  let payload = body;
  if (body !== undefined && !(body instanceof FormData)) {
    sent["Content-Type"] = "application/json";
    payload = JSON.stringify(body);
  }
  const request = { method, headers: sent, body: payload, signal, cache: "no-store" };
  let response;
  try {
    response = await fetch(address(path, query), { ...request, credentials: "same-origin" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem({ detail: "The gateway does not answer.", code: "away" });
  }
  if (response.ok) return response;
  const problem = await problemOf(response);
  if (response.status === 401 && !keepSession) session.signOut(problem);
  throw problem;
}

async function problemOf(response) {
  try {
    return new Problem({ status: response.status, ...(await response.json()) });
  } catch {
    return new Problem({ status: response.status, detail: `The gateway answered with status ${response.status}.` });
  }
}

const json = async (response) => (response.status === 204 ? null : response.json());

export const get = async (path, options) => json(await ask("GET", path, options));
export const post = async (path, body = {}, options = {}) =>
  json(await ask("POST", path, { ...options, body }));
export const put = async (path, body = {}, options = {}) =>
  json(await ask("PUT", path, { ...options, body }));
export const patch = async (path, body = {}, options = {}) =>
  json(await ask("PATCH", path, { ...options, body }));
export const remove = async (path, options) => json(await ask("DELETE", path, options));

const KEYS = 1_000; // the most in a page of keys

/** All API keys, the oldest first, read by pages. */
export async function allKeys(signal) {
  const keys = [];
  for (;;) {
    const page = await get("admin/keys", { query: { limit: KEYS, after: keys.at(-1)?.prefix }, signal });
    keys.push(...page);
    if (page.length < KEYS) return keys;
  }
}

/** A file as an address for <img src>, since an image can't show a key. Revoke it when done. */
export async function fileUrl(path, options = {}) {
  const response = await ask("GET", path, { ...options, headers: { Accept: "*/*" } });
  return URL.createObjectURL(await response.blob());
}

/** What `reader` reads next. Throws a Problem where the connection broke, or an AbortError. */
async function next(reader) {
  try {
    return await reader.read();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem({ detail: "The connection closed before the response was complete.", code: "away" });
  }
}

/**
 * The server-sent events of a response, as they come: `{ event, data, id }`, data as text.
 *
 * EventSource can't show a key, so the stream is read here. Ends with the stream; comments pass in
 * silence, but `onComment` is called for them. Throws a Problem where the connection breaks.
 */
export async function* events(response, onComment = () => {}) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await next(reader);
      if (done) return;
      const blocks = (rest + value).split(/\r?\n\r?\n/);
      rest = blocks.pop();
      for (const block of blocks) {
        const event = parsed(block);
        if (event) yield event;
        else onComment();
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

function parsed(block) {
  const found = { event: "message", data: null, id: null };
  for (const line of block.split(/\r?\n/)) {
    const [, name, value] = /^([^:]*):? ?(.*)$/.exec(line);
    if (name === "data") found.data = found.data === null ? value : `${found.data}\n${value}`;
    else if (name === "event" || name === "id") found[name] = value;
  }
  return found.data === null ? null : found;
}

const PRELUDE = 12; // lengths of the message and of its headers, and a checksum: 4 bytes each
const TEXT = 7; // the type of a header's value that is a text; no other is sent in a stream of a model

/** The messages of a response in AWS's framing, `{ type, problem, data }`; `data` is their JSON. What TLS and TCP check is not checked again. */
export async function* framed(response) {
  const reader = response.body.getReader();
  let rest = new Uint8Array();
  try {
    for (;;) {
      const { value, done } = await next(reader);
      if (done) return;
      const bytes = new Uint8Array(rest.length + value.length);
      bytes.set(rest);
      bytes.set(value, rest.length);
      let at = 0;
      const view = new DataView(bytes.buffer);
      while (bytes.length - at >= PRELUDE && bytes.length - at >= view.getUint32(at)) {
        const [size, named] = [view.getUint32(at), view.getUint32(at + 4)];
        const data = bytes.subarray(at + PRELUDE + named, at + size - 4);
        yield messageOf(headersIn(bytes.subarray(at + PRELUDE, at + PRELUDE + named)), JSON.parse(new TextDecoder().decode(data)));
        at += size;
      }
      rest = bytes.subarray(at);
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

function headersIn(bytes) {
  const text = (from, size) => new TextDecoder().decode(bytes.subarray(from, from + size));
  const found = {};
  for (let at = 0; at < bytes.length && bytes[at + 1 + bytes[at]] === TEXT; ) {
    const value = at + 2 + bytes[at]; // its length, in two bytes
    const size = bytes[value] * 256 + bytes[value + 1];
    found[text(at + 1, bytes[at])] = text(value + 2, size);
    at = value + 2 + size;
  }
  return found;
}

function messageOf(headers, data) {
  if (headers[":message-type"] === "event") return { type: headers[":event-type"], data };
  return { type: headers[":exception-type"], problem: data.message ?? headers[":exception-type"] ?? "The stream ended with an error.", data };
}
