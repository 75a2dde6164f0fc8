// The upstream that all pages show, or all upstreams: one selection, kept for the tab.

import { fill, h, mark } from "./dom.js";

const NAME = "tidegate.scope";

/** The value that means all upstreams. */
export const ALL = "";

let pools = [];
let gone = null; // a removed upstream that the URL names

/** Set the pools to choose from; `asked` is the selection in the URL, if any. */
export function among(found, asked = null) {
  [pools, gone] = [found, null];
  if (asked !== null) choose(asked);
}

/** The same for pages of records, where the URL may name an upstream that no longer exists. */
export function amongRecorded(found, asked = null) {
  among(found, asked);
  if (asked && !found.includes(asked)) gone = asked;
}

export function chosen() {
  const kept = sessionStorage.getItem(NAME) ?? ALL;
  if (pools.length === 1) return pools[0];
  return pools.includes(kept) ? kept : ALL;
}

/** Return the upstream by which records are filtered; `ALL` also if there is only one. */
export function narrowed() {
  if (gone !== null) return gone;
  return pools.length === 1 ? ALL : chosen();
}

export function choose(pool) {
  gone = null;
  sessionStorage.setItem(NAME, pool);
}

/**
 * The upstream switch, with all upstreams first; hidden if there is no choice.
 *
 * `changed(upstream)` is called after a selection. `show()` updates the switch after a selection
 * elsewhere.
 */
export function scopeSwitch(changed) {
  const select = h("select", { class: "scope", "aria-label": "Upstream" });
  function show() {
    const named = gone === null ? pools : [...pools, gone];
    fill(
      select,
      h("option", { value: ALL }, "All upstreams"),
      named.map((one) => h("option", { value: one }, one === gone ? `${one} (removed)` : one)),
    );
    select.hidden = named.length < 2 && gone === null;
    select.value = gone ?? chosen();
    mark(select, "data-narrowed", narrowed() === ALL ? null : "");
  }
  select.addEventListener("change", () => {
    choose(select.value);
    show();
    changed(select.value);
  });
  show();
  return { element: select, show };
}

/**
 * Return the part of the live frame within the scope, merged into one pool; null if nothing is
 * known.
 */
export function within(live, pool) {
  const known = live.pools.filter((one) => !one.problem && (pool === ALL || one.pool === pool));
  const labelled = known.map((one) => ({
    ...one,
    limits: one.limits.map((limit) => ({ ...limit, pool: one.pool })),
    learned: one.learned.map((limit) => ({ ...limit, pool: one.pool })),
  }));
  if (labelled.length < 2) return labelled[0] ?? null;
  return merged(labelled, live);
}

/** A tenant or a process may be in several pools, so the live frame itself has their numbers. */
function merged(frames, live) {
  const sum = (name) => frames.reduce((total, one) => total + one[name], 0);
  const tenants = together(frames.flatMap((one) => one.tenants), "tenant", tenantsOf);
  const processes = together(frames.flatMap((one) => one.processes), "process", processesOf);
  return {
    pool: ALL,
    revision: null,
    fair_by: frames[0].fair_by,
    in_flight: sum("in_flight"),
    waiting: sum("waiting"),
    limits: frames.flatMap((one) => one.limits),
    learned: frames.flatMap((one) => one.learned),
    more_limits: sum("more_limits"),
    all_limits: sum("all_limits"),
    paused_limits: sum("paused_limits"),
    tenants,
    more_tenants: live.all_tenants - tenants.length,
    processes,
    more_processes: live.all_processes - processes.length,
  };
}

function together(rows, key, merge) {
  const found = new Map();
  for (const row of rows) found.set(row[key], found.has(row[key]) ? merge(found.get(row[key]), row) : row);
  return [...found.values()];
}

const tenantsOf = (a, b) => ({
  ...(a.waiting >= b.waiting ? a : b),
  weight: a.weight === b.weight ? a.weight : null, // each upstream has its own weight
  waiting: a.waiting + b.waiting,
});

/** A process has a session in every pool. */
const processesOf = (a, b) => ({
  ...a,
  held: a.held + b.held,
  waiting: a.waiting + b.waiting,
  left_ms: Math.min(a.left_ms, b.left_ms),
  blocked: a.blocked || b.blocked,
});
