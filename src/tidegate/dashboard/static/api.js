// Client of the gateway's HTTP API. Requests carry the key of this tab, or the cookie that the
// start-up page's link sets. Every failure is a Problem.

import * as session from "./session.js";

// The document is at <prefix>/dashboard/, so the API is one level up, behind any proxy.
const BASE = new URL("..", document.baseURI);

/** An error response as problem JSON (RFC 9457), or the lack of a response. */
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

  /** Whether there was no response: the process or the network is down. */
  get isAway() {
    return this.status === 0;
  }
}

/** Return the URL of a path of the API, such as `admin/limits`, with a query from an object. */
export function address(path, query = {}) {
  const url = new URL(path.replace(/^\//, ""), BASE);
  for (const [name, value] of Object.entries(query)) {
    if (value !== null && value !== undefined && value !== "") url.searchParams.set(name, value);
  }
  return url;
}

/**
 * Send a request, and return the Response if its status is a success.
 *
 * `body` is sent as JSON unless it is FormData. Throws a Problem; an AbortError of `signal` passes
 * through. A 401 signs out, unless `keepSession`: other APIs than /admin and /dashboard may refuse
 * a token that is valid for those.
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

const KEYS = 1_000; // maximum keys of a page

/** Return all API keys, oldest first, read by pages. */
export async function allKeys(signal) {
  const keys = [];
  for (;;) {
    const page = await get("admin/keys", { query: { limit: KEYS, after: keys.at(-1)?.prefix }, signal });
    keys.push(...page);
    if (page.length < KEYS) return keys;
  }
}

/**
 * Return an object URL of a file for <img src>, since an image request cannot carry a key. The
 * caller revokes it.
 */
export async function fileUrl(path, options = {}) {
  const response = await ask("GET", path, { ...options, headers: { Accept: "*/*" } });
  return URL.createObjectURL(await response.blob());
}

/** Read the next piece. Throws a Problem if the connection broke, or an AbortError. */
async function next(reader) {
  try {
    return await reader.read();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem({ detail: "The connection closed before the response was complete.", code: "away" });
  }
}

/**
 * Yield the server-sent events of a response as they arrive: `{ event, data, id }` with data as
 * text.
 *
 * EventSource cannot send a key, so the stream is parsed here. It ends with the stream. Comments
 * are skipped, after a call of `onComment`. Throws a Problem if the connection breaks.
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
const TEXT = 7; // the type of a text header; a model's stream sends no other type

/**
 * Yield the messages of a response in AWS's framing, `{ type, problem, data }` with their JSON as
 * `data`. The checksums are not verified, since TLS and TCP verify the bytes.
 */
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
    const value = at + 2 + bytes[at]; // after its length of two bytes
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
