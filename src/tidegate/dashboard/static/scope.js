// The upstream that all pages are about, or all of them: one choice, kept for the tab.

import { fill, h, mark } from "./dom.js";

const NAME = "tidegate.scope";

/** The value that means all upstreams. */
export const ALL = "";

let pools = [];
let gone = null; // an upstream that the address names, and that is on record alone

/** Have these pools to choose from; `asked` is what the address says, if anything. */
export function among(found, asked = null) {
  [pools, gone] = [found, null];
  if (asked !== null) choose(asked);
}

/** The same of a page of what is on record, where an upstream may be named that is there no more. */
export function amongRecorded(found, asked = null) {
  among(found, asked);
  if (asked && !found.includes(asked)) gone = asked;
}

export function chosen() {
  const kept = sessionStorage.getItem(NAME) ?? ALL;
  if (pools.length === 1) return pools[0];
  return pools.includes(kept) ? kept : ALL;
}

/** By which upstream what is on record is narrowed; `ALL` also where there is only one. */
export function narrowed() {
  if (gone !== null) return gone;
  return pools.length === 1 ? ALL : chosen();
}

export function choose(pool) {
  gone = null;
  sessionStorage.setItem(NAME, pool);
}

/**
 * The switch, all first: hidden where there is nothing to choose. `changed(upstream)` is called once
 * another was chosen; `show()` has it say what was chosen elsewhere.
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

/** What the live frame says of the scope as one pool; null where nothing is known of it. */
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

/** A tenant or a process is in several pools: how many there are is said by the live frame itself. */
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
  weight: a.weight === b.weight ? a.weight : null, // each upstream has its own
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
