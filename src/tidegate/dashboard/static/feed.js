// The live feed of this page: one connection, reopened whenever it is lost.

import { ask, events, Problem } from "./api.js";
import { mark } from "./dom.js";

const SILENT_MS = 10_000;
const HIDDEN_MS = 20_000;
const WAIT_MS = 1_000;
const MOST_WAIT_MS = 10_000;

const STATES = { opening: "Connecting", live: "Live", waiting: "Reconnecting", resting: "Paused" };
const FULL = "too_many_followers"; // it may end at any moment, so the request is repeated

/**
 * Call `on(event, data)` for each event until `signal` is aborted.
 *
 * While the tab is hidden there are no requests. Throws the Problem if the gateway refuses the
 * request; a lost connection is opened again.
 */
export async function follow(path, { query, signal, on }) {
  let waitMs = WAIT_MS;
  if (document.getElementById("live").hidden) show("opening");
  while (!signal.aborted) {
    await visible(signal);
    if (signal.aborted) return;
    const round = rounded(signal);
    let full = null;
    try {
      const response = await ask("GET", path, { query, signal: round.signal });
      show("live");
      for await (const { event, data } of events(response)) {
        round.heard();
        waitMs = WAIT_MS;
        if (data !== null && !signal.aborted) on(event, JSON.parse(data));
      }
    } catch (error) {
      if (signal.aborted) return;
      if (error instanceof Problem && [400, 401, 403, 404].includes(error.status)) {
        show(null);
        throw error;
      }
      if (error instanceof Problem && error.code === FULL) full = error;
      if (error instanceof SyntaxError || error instanceof RangeError) throw error;
    } finally {
      round.end();
    }
    if (signal.aborted) return;
    show(document.hidden ? "resting" : "waiting", full);
    if (!document.hidden) await pause(waitMs * (0.75 + Math.random() / 2), signal);
    waitMs = Math.min(waitMs * 2, MOST_WAIT_MS);
  }
}

/**
 * The abort signal of one connection, which ends after long silence, or if the tab is hidden for
 * long.
 */
function rounded(signal) {
  const giveUp = new AbortController();
  let silent;
  let hidden;
  const heard = () => {
    clearTimeout(silent);
    silent = setTimeout(() => giveUp.abort(), SILENT_MS);
  };
  const look = () => {
    clearTimeout(hidden);
    if (document.hidden) hidden = setTimeout(() => giveUp.abort(), HIDDEN_MS);
  };
  document.addEventListener("visibilitychange", look);
  heard();
  look();
  return {
    signal: AbortSignal.any([signal, giveUp.signal]),
    heard,
    end: () => {
      clearTimeout(silent);
      clearTimeout(hidden);
      document.removeEventListener("visibilitychange", look);
      giveUp.abort();
    },
  };
}

function pause(ms, signal) {
  return new Promise((resolve) => {
    const timer = setTimeout(resolve, ms);
    signal.addEventListener("abort", () => resolve(clearTimeout(timer)), { once: true });
  });
}

function visible(signal) {
  if (!document.hidden) return Promise.resolve();
  return new Promise((resolve) => {
    document.addEventListener("visibilitychange", resolve, { once: true });
    signal.addEventListener("abort", resolve, { once: true });
  });
}

/** Hide the state of the feed at the top of the page. */
export const hide = () => show(null);

/** Show the state of the feed. `full`: the Problem if the process has its maximum of viewers. */
function show(state, full = null) {
  const live = document.getElementById("live");
  live.hidden = state === null;
  const words = full ? "Too many viewers" : STATES[state];
  if (state === null || live.textContent === words) return;
  live.dataset.state = state;
  live.textContent = words;
  mark(live, "title", full && `${full.message}. Retrying.`);
}
