// The upstream that all pages are about, or all of them: one choice, kept for the tab.

const NAME = "tidegate.scope";

/** The value that means all upstreams. */
export const ALL = "";

let pools = [];

/** Have these pools to choose from; `asked` is what the address says, if anything. */
export function among(found, asked = null) {
  pools = found;
  if (asked !== null) choose(asked);
}

export function chosen() {
  const kept = sessionStorage.getItem(NAME) ?? ALL;
  if (pools.length === 1) return pools[0];
  return pools.includes(kept) ? kept : ALL;
}

export function choose(pool) {
  sessionStorage.setItem(NAME, pool);
}

/** The options of the switch: all first. */
export const options = () => ({
  [ALL]: "All upstreams",
  ...Object.fromEntries(pools.map((one) => [one, one])),
});

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
