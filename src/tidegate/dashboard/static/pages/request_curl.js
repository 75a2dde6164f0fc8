// A request as a shell command: the original body, sent to this gateway with the caller's own key.

import { ask } from "../api.js";
import { h } from "../dom.js";
import * as session from "../session.js";
import { copied, toast } from "../ui.js";
import { isCut } from "./request_words.js";
import { APIS } from "./try_dialects.js";

const MOST_BYTES = 131_071; // Linux's maximum length of one argument

/** Quote a text for a shell. Within single quotes, only the single quote needs escaping. */
export const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;

/** Headers that the provider requires for a path. */
const headersOf = (path) => (/^\/v1\/messages\b/.test(path) ? APIS.messages.headers : {});

/** Return a command that sends `body` to `path` of this gateway, with a key if callers need one. */
export function command(path, body, { needsKey = true } = {}) {
  const url = new URL(`..${path}`, document.baseURI);
  return [
    `curl ${quoted(url.href)}`,
    ...(needsKey ? ['  -H "Authorization: Bearer $TIDEGATE_API_KEY"'] : []),
    "  -H 'Content-Type: application/json'",
    ...Object.entries(headersOf(path)).map(([name, value]) => `  -H ${quoted(`${name}: ${value}`)}`),
    `  --data-raw ${quoted(body)}`, // of `-d`, curl would send the file that a body such as @path names
  ].join(" \\\n");
}

/**
 * A button that copies the command. `view()` returns the current response of `admin/requests/{id}`.
 */
export function curlButton(view, signal) {
  const button = h("button", { class: "button quiet small", type: "button" }, "Copy as curl");
  button.addEventListener("click", async () => {
    try {
      if (await copied(await written(view(), signal))) toast("Copied. Set TIDEGATE_API_KEY before you run it.");
      else toast("The browser does not allow copying.", "bad");
    } catch (error) {
      if (!signal.aborted) toast(error.message, "bad");
    }
  });
  return button;
}

const notHere = () => (session.readsBodies() ? "not on record" : "not shown to your role");
const sizeOf = (text) => new TextEncoder().encode(text).length;

async function written({ request, bodies }, signal) {
  if (!request.endpoint) {
    if (!request.prompt) throw new Error(`The prompt is ${notHere()}.`);
    if (request.files?.length || request.image_uri) throw new Error("The request has files, which a curl command can't include. Use Retry.");
    const sent = { [request.source === "stream" ? "text" : "data"]: request.prompt, type: request.type, model: request.asked_model };
    const body = JSON.stringify(sent, (_, value) => value ?? undefined);
    if (isCut(request) || sizeOf(body) > MOST_BYTES) throw new Error("The prompt is too long for a curl command. Use Replay.");
    return command(request.source === "stream" ? "/stream" : "/submit", body);
  }
  const body = bodies.find((one) => one.role === "request");
  if (!body) throw new Error(`The body is ${notHere()}.`);
  if (body.omitted_bytes || body.size_bytes > MOST_BYTES) throw new Error("The body is too long for a curl command. Download it below.");
  if (!body.content_type.includes("json")) throw new Error("The body is not JSON. Download it below.");
  const path = `admin/requests/${request.request_id}/request`;
  const response = await ask("GET", path, { signal, headers: { Accept: "*/*" } });
  return command(request.endpoint, await response.text());
}
