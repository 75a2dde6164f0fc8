// How much waits for a person: told in the navigation, on whatever page. The overview's feed brings it
// along; on all others it is asked for.

import { get, Problem } from "./api.js";
import { say } from "./dom.js";
import { brief } from "./format.js";

const EVERY_MS = 10_000;
const SETTLED_MS = 1_500; // after an act, until the feed has it
const MOST_COUNTED = 1_000; // of either
const TOLD_MS = 15_000; // the feed tells every 10 s
let toldAt = -TOLD_MS;

/** Look again and again, until `signal` is aborted. */
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

/** Somebody has dealt with one of them. */
export const settled = () => document.dispatchEvent(new CustomEvent("tidegate:settled"));

/** Show what the feed has brought. */
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
    // The page itself says what is away; the last number stays.
    if (!(error instanceof Problem) && error.name !== "AbortError") throw error;
  }
}
