// Names and badges of requests, the same on every page that shows one.

import { h, mark, say } from "../dom.js";
import { length } from "../format.js";
import { link } from "../router.js";

export const STATUSES = {
  queued: ["Waiting", "warn"],
  running: ["Running", "accent"],
  succeeded: ["Succeeded", "good"],
  failed: ["Failed", "bad"],
  cancelled: ["Cancelled", ""],
  expired: ["Expired", "warn"],
  dead: ["Dead", "bad"],
};
export const KINDS = {
  text_only: "Text",
  multi_modal: "Text and files",
  image_generation: "Image",
};
export const SOURCES = {
  job: "Job",
  stream: "Stream",
  relay: "Native call",
  batch: "Batch line",
};

const TIERS = { live: "Live tier", flex: "Flex tier", batch: "Provider's batch" };

/** The processing tier of a request; those not of jobs have the provider's name. */
export const tierOf = (tier) => (tier ? (TIERS[tier] ?? `Tier ${tier}`) : "");

export function statusBadge(status) {
  const [words, look] = STATUSES[status] ?? [status, ""];
  return h("span", { class: `badge ${look}` }, words);
}

export const kindOf = (request) => (request.type ? (KINDS[request.type] ?? request.type) : "");

/** The beginning of an id, which distinguishes it and is enough to search for it. */
export const shortId = (id) => id.slice(0, 18);

export const linkTo = (id, words = shortId(id), props = {}) =>
  h("a", { href: link(`/requests/${id}`), ...props }, words);

/** Return when an id was created: UUIDv7 begins with the milliseconds since 1970. */
export const timeOfId = (id) => new Date(parseInt(id.replaceAll("-", "").slice(0, 12), 16));

export const isOpen = (request) => request.status === "queued" || request.status === "running";

/** Count characters as the gateway does: an emoji is one. */
export const charsOf = (text) => [...text].length;

/** Return whether the prompt is cut off. */
export const isCut = ({ prompt, prompt_chars: whole }) => whole > charsOf(prompt ?? "");

/** Show a duration; if `since` is given, the time that has passed since then. */
export function goesOn(element, ms, since) {
  const soFar = since ? Math.max(0, Date.now() - new Date(since).getTime()) : null;
  const value = soFar === null ? ms : Math.floor(soFar / 1_000) * 1_000 || soFar;
  const exact = length(value);
  say(element, length.short(value)); // the columns of lists have no room for two units
  mark(element, "class", soFar === null ? null : "so-far");
  mark(element, "title", soFar === null ? (length.short(value) === exact ? null : exact) : `${exact} so far`);
}

/** Return the duration of a request's last call; nothing if no upstream was called. */
export const calledMs = ({ attempts, upstream_ms: ms }) => (attempts || ms ? ms : undefined);

/** `1st`, `2nd`, `3rd`, `11th` */
export function ordinal(number) {
  const tens = number % 100;
  const sign = tens >= 11 && tens <= 13 ? "th" : (["th", "st", "nd", "rd"][number % 10] ?? "th");
  return `${number}${sign}`;
}
