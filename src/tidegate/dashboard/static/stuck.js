// The number of items that need a person, shown in the navigation of every page. The overview's
// feed contains it; other pages request it.

import { get, Problem } from "./api.js";
import { say } from "./dom.js";
import { brief } from "./format.js";

const EVERY_MS = 10_000;
const SETTLED_MS = 1_500; // after an action, until the feed has its effect
const MOST_COUNTED = 1_000; // of each kind
const TOLD_MS = 15_000; // the feed sends it every 10 s
let toldAt = -TOLD_MS;

/** Refresh the number periodically until `signal` is aborted. */
export function follow(signal) {
  const look = () => {
    if (!document.hidden && performance.now() - toldAt > TOLD_MS) ask(signal);
  };
  const soon = () => setTimeout(() => ask(signal), SETTLED_MS);
  const timer = setInterval(look, EVERY_MS);
  document.addEventListener("visibilitychange", look);
  document.addEventListener("tidegate:settled", soon);
  signal.addEventListener("abort", () => {
    clearInterval(timer);
    document.removeEventListener("visibilitychange", look);
    document.removeEventListener("tidegate:settled", soon);
  });
  look();
}

/** Announce that a person has handled an item. */
export const settled = () => document.dispatchEvent(new CustomEvent("tidegate:settled"));

/** Show the numbers from the feed. */
export function told(counts) {
  toldAt = performance.now();
  show(counts);
}

function show({ dead_jobs, webhooks_given_up }) {
  const link = document.querySelector('#nav a[href="#/attention"]');
  if (!link || dead_jobs === null) return;
  const amount = dead_jobs + webhooks_given_up;
  const more = Math.max(dead_jobs, webhooks_given_up) >= MOST_COUNTED ? "+" : "";
  say(link, amount ? `Attention (${brief(amount)}${more})` : "Attention");
}

async function ask(signal) {
  try {
    show(await get("dashboard/stuck", { signal }));
  } catch (error) {
    // The page itself reports what is unavailable; the last number stays.
    if (!(error instanceof Problem) && error.name !== "AbortError") throw error;
  }
}
