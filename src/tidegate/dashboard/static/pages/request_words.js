// How requests are named and marked, alike on every page that shows one.

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

/** The processing tier of a request; others than those of jobs as the provider names them. */
export const tierOf = (tier) => (tier ? (TIERS[tier] ?? `Tier ${tier}`) : "");

export function statusBadge(status) {
  const [words, look] = STATUSES[status] ?? [status, ""];
  return h("span", { class: `badge ${look}` }, words);
}

export const kindOf = (request) => (request.type ? (KINDS[request.type] ?? request.type) : "");

/** Enough of an id to tell it from others, and to find it by: its beginning. */
export const shortId = (id) => id.slice(0, 18);

export const linkTo = (id, words = shortId(id), props = {}) =>
  h("a", { href: link(`/requests/${id}`), ...props }, words);

/** When an id was made: UUIDv7 begins with the milliseconds since 1970. */
export const timeOfId = (id) => new Date(parseInt(id.replaceAll("-", "").slice(0, 12), 16));

export const isOpen = (request) => request.status === "queued" || request.status === "running";

/** Characters as the gateway counts them: an emoji is one. */
export const charsOf = (text) => [...text].length;

/** Whether only the beginning of the prompt is here. */
export const isCut = ({ prompt, prompt_chars: whole }) => whole > charsOf(prompt ?? "");

/** A length; of what goes on since a time, how long it has lasted so far. */
export function goesOn(element, ms, since) {
  const soFar = since ? Math.max(0, Date.now() - new Date(since).getTime()) : null;
  say(element, length(soFar === null ? ms : Math.floor(soFar / 1_000) * 1_000 || soFar));
  mark(element, "class", soFar === null ? null : "so-far");
  mark(element, "title", soFar === null ? null : "So far");
}

/** `1st`, `2nd`, `3rd`, `11th` */
export function ordinal(number) {
  const tens = number % 100;
  const sign = tens >= 11 && tens <= 13 ? "th" : (["th", "st", "nd", "rd"][number % 10] ?? "th");
  return `${number}${sign}`;
}
