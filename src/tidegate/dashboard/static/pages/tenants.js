// Tenants and API keys: search, create, change, disable and revoke.

import { allKeys, get, post, Problem, put, remove } from "../api.js";
import { fill, h } from "../dom.js";
import { ago, brief, capital, count, money, NOTHING, percent, time } from "../format.js";
import { listed } from "../listed.js";
import { link, note } from "../router.js";
import * as scope from "../scope.js";
import { may } from "../session.js";
import { confirm, copied, field, said, toast } from "../ui.js";

const SCOPES = {
  "infer,read": "Call models, read its own requests",
  infer: "Call models",
  read: "Read its own requests",
  viewer: "Viewer: read this dashboard and /admin",
  operator: "Operator: change limits, pause, requeue",
  admin: "Admin: keys, tenants, upstreams too",
};
const PEOPLE = ["viewer", "operator", "admin"];
const EXPIRES = { "": "Never", 7: "In 7 days", 30: "In 30 days", 90: "In 90 days", 365: "In a year" };
const DAY_MS = 86_400_000;

export async function open(main, { query, signal }) {
  const { pools } = await get("dashboard/session", { signal });
  scope.among(pools, query.get("pool"));
  let pool = scope.chosen() || pools[0]; // each upstream has its own weights and limits
  const state = { tenants: [], keys: [], budgets: new Map() };
  const upstream = h(
    "select",
    { class: "scope", "aria-label": "Upstream", title: "The upstream whose weights and limits are shown" },
    pools.map((one) => h("option", { value: one, selected: one === pool }, one)),
  );
  upstream.addEventListener("change", () => {
    pool = upstream.value;
    scope.choose(pool);
    note({ tenant: query.get("tenant"), pool });
    again().catch((error) => {
      if (!(error instanceof Problem)) throw error;
      toast(said(error), "bad");
    });
  });
  const tenants = listed("Tenants", TENANT_HEADS, (one) => one.tenant, (one) => tenantRow(one, pool, again, state.budgets), {
    none: ["No tenants yet", "A tenant is a team, service or customer with its own limits, budgets and usage."],
    acts: [h("label", { class: "scope-of quiet-text", hidden: pools.length < 2 }, "Weights and limits at", upstream), action("New tenant", () => changeTenant(null, pool, again))],
  });
  const keys = listed("API keys", KEY_HEADS, (one) => `${one.prefix} ${one.name} ${one.tenant}`, (one) => keyRow(one, again), {
    none: ["No API keys yet", "An API key identifies its tenant. Callers need one where keys are required."],
    acts: [action("New dashboard key", () => letIn(again), ""), action("New key", () => makeKey(state.tenants, again))],
  });
  let looking = new AbortController();
  const again = async () => {
    looking.abort(); // for the previous upstream
    looking = new AbortController();
    const within = AbortSignal.any([signal, looking.signal]);
    try {
      const read = [get("admin/tenants", { query: { pool }, signal: within }), allKeys(within), get("admin/budgets", { signal: within })];
      const [found, made, budgets] = await Promise.all(read);
      Object.assign(state, { tenants: found, keys: made, budgets: byTenant(budgets) });
    } catch (error) {
      if (within.aborted) return;
      throw error;
    }
    tenants.show(state.tenants);
    keys.show(state.keys.toSorted((a, b) => (a.created_at < b.created_at ? 1 : -1)));
  };
  await again();
  if (signal.aborted) return;
  tenants.search(query.get("tenant") ?? "");
  const did = may("admin") && h("a", { href: link("/actions") }, "Operator actions");
  main.append(h("div", { class: "page-head" }, h("h1", {}, "Keys and tenants"), h("span", { class: "end" }, did)), keys.element, tenants.element);
}

const action = (words, act, look = "main") =>
  h("button", { class: `button ${look} small`, type: "button", needs: "admin", on: { click: act } }, words);

const KEY_HEADS = [
  ["Key", ""],
  ["Tenant", ""],
  ["Permissions", "wide"],
  ["Created", "wide"],
  ["Last used", "wide"],
  ["State", ""],
  ["", "actions"],
];
const TENANT_HEADS = [
  ["Tenant", ""],
  ["Weight", "number wide"],
  ["Keys", "number wide"],
  ["Daily budget", "number"],
  ["Monthly budget", "number"],
  ["Own limits", "number wide wider"],
  ["Job tiers", "wide wider"],
  ["State", "wide wider"],
  ["", "actions"],
];

const STATES = { works: "good", expired: "warn", revoked: "" };

function keyRow(one, again) {
  const works = one.state === "works";
  const revoke = h("button", { class: "button quiet small", type: "button", needs: "admin", "aria-label": `Revoke tg_${one.prefix}` }, "Revoke");
  revoke.addEventListener("click", () => revokeKey(one, again));
  return h(
    "tr",
    { data: { key: one.prefix } },
    h("th", { scope: "row", class: "name key-name", title: one.name }, h("b", {}, one.name || "(no name)"), " ", h("span", { class: "mono quiet-text" }, `tg_${one.prefix}…`)),
    h("td", { class: "name" }, h("a", { href: link("/requests", { tenant: one.tenant }), title: `Requests of ${one.tenant}` }, one.tenant)),
    h("td", { class: "wide" }, one.scopes.join(", ")),
    h("td", { class: "wide", title: one.made_by ?? "" }, time(one.created_at)),
    h("td", { class: "wide" }, one.last_used_at ? ago(one.last_used_at) : "never"),
    h("td", {}, h("span", { class: `badge ${STATES[one.state] ?? ""}`, title: one.expires_at ? `expires ${time(one.expires_at)}` : null }, capital(one.state))),
    h("td", { class: "actions" }, works && revoke),
  );
}

/** Return the budgets of all calls of a tenant, by tenant. A budget of some of its calls is on the overview. */
function byTenant(budgets) {
  const found = new Map();
  for (const one of budgets) {
    const isOfAll = !one.each.length && ["key", "model", "subject", "conversation"].every((part) => one[part] === null);
    if (one.tenant !== null && isOfAll) found.set(one.tenant, [...(found.get(one.tenant) ?? []), one]);
  }
  return found;
}

/** A cell with the budgets of a tenant in a period, and the spent part. */
function budgetCell(one, period, budgets) {
  const bars = (budgets.get(one.tenant) ?? [])
    .filter((budget) => budget.period === period)
    .map((budget) => budgetBar(`${one.tenant}, ${period}`, budget));
  return h("td", { class: "number" }, bars.length ? bars : NOTHING);
}

/** `$0.83 of $5.00`; without a book nothing was spent in the period, or other books are used more. */
function budgetBar(label, { name, unit, amount, most_used: book }) {
  const words = unit === "usd" ? (value) => money(value / 1e6) : (value) => `${brief(value)} tokens`;
  const most = book?.amount ?? amount;
  const text = book ? `${words(book.spent)} of ${words(most)}` : words(most);
  const shareOf = (part) => Math.min(1, part / Math.max(most, 1));
  const [spent, held] = [shareOf(book?.spent ?? 0), shareOf((book?.spent ?? 0) + (book?.held ?? 0))];
  const parts = [spent, held - spent].map((share, at) => {
    const part = h("i", { class: at ? "held" : null });
    part.style.width = `${share * 100}%`;
    return part;
  });
  const looks = { role: "meter", "aria-label": `Budget of ${label}`, "aria-valuemin": 0, "aria-valuemax": 100 };
  const now = { "aria-valuenow": Math.round(spent * 100), "aria-valuetext": text, title: `${name}: ${percent(spent)} spent` };
  return h("div", { class: "spent-of", data: (book?.spent ?? 0) >= most ? { full: "" } : {} }, h("span", {}, text), h("div", { class: "spent-bar", ...looks, ...now }, parts));
}

// Own limits that the dialog sets: field, scope of the limit, label, unit of a figure.
const OWN_LIMITS = [
  ["own_calls", "tenant:", "Concurrent calls", "concurrent"],
  ["own_rpm", "rpm:tenant/", "Requests per minute", "requests a minute"],
  ["own_tpm", "tpm:tenant/", "Tokens per minute", "tokens a minute"],
];

const boundOf = (value) => (value !== null && typeof value === "object" ? value.bound : value);

/** A cell with the tenant's own limits, or their number. */
function limitsCell({ tenant, limits }) {
  const words = Object.entries(limits).map(([name, value]) => {
    const known = OWN_LIMITS.find(([, scope]) => name === `${scope}${tenant}`);
    return known ? `${brief(boundOf(value))} ${known[3]}` : name;
  });
  return h("td", { class: "number wide wider", title: words.join(", ") }, words.length > 1 ? count(words.length) : words.join("") || NOTHING);
}

function tenantRow(one, pool, again, budgets) {
  const change = h("button", { class: "button quiet small", type: "button", needs: "admin", "aria-label": `Change ${one.tenant}` }, "Change");
  const flip = h("button", { class: "button quiet small", type: "button", needs: "admin", "aria-label": `${one.disabled ? "Enable" : "Disable"} ${one.tenant}` }, one.disabled ? "Enable" : "Disable");
  change.addEventListener("click", () => changeTenant(one, pool, again));
  flip.addEventListener("click", () => disable(one, again));
  return h(
    "tr",
    { data: { tenant: one.tenant } },
    h("th", { scope: "row", class: "name" }, h("a", { href: link("/requests", { tenant: one.tenant }), title: `Requests of ${one.tenant}` }, one.tenant)),
    h("td", { class: "number wide" }, count(one.weight)),
    h("td", { class: "number wide" }, count(one.keys)),
    budgetCell(one, "day", budgets),
    budgetCell(one, "month", budgets),
    limitsCell(one),
    h("td", { class: "wide wider", title: one.tiers ? "Jobs that name no tiers use the cheapest of these that meets their deadline" : "Jobs that name no tiers run in tier live" }, one.tiers ? one.tiers.join(", ") : NOTHING),
    h("td", { class: "wide wider" }, h("span", { class: `badge ${one.disabled ? "bad" : "good"}` }, one.disabled ? "Disabled" : "Open")),
    h("td", { class: "actions" }, change, flip),
  );
}

async function changeTenant(one, pool, again) {
  const amount = (value) => (value === null || value === undefined ? "" : String(value));
  const name = field("tenant", "Name", { maxlength: 200, spellcheck: "false" });
  const weight = field("weight", "Weight", { type: "number", value: amount(one?.weight ?? 1), hint: "Its share while tenants compete: weight 2 gets twice as much as weight 1." });
  const day = field("budget_day_money", "Daily budget (USD)", { type: "number", value: amount(one?.budget_day_money), hint: "Empty: no budget. Calls that do not fit are rejected." });
  const month = field("budget_month_money", "Monthly budget (USD)", { type: "number", value: amount(one?.budget_month_money) });
  const own = OWN_LIMITS.map(([each, scope, label], at) =>
    field(each, label, { type: "number", value: amount(boundOf(one?.limits[`${scope}${one.tenant}`])), hint: at ? "" : `At ${pool}, beside the limits of all. Empty: no limit of its own.` }),
  );
  for (const each of [day, month]) each.input.setAttribute("inputmode", "decimal");
  const done = await confirm({
    title: one ? `Change ${one.tenant}` : "New tenant",
    text: "Takes effect in all processes within two seconds.",
    fields: [...(one ? [] : [name]), weight, ...own, day, month],
    action: one ? "Change the tenant" : "Create the tenant",
    act: async ({ tenant, own_calls, own_rpm, own_tpm, ...values }) => {
      const known = one ?? { tenant, limits: {} };
      if (!one && (await get("admin/tenants")).some((each) => each.tenant === tenant)) throw new Problem({ detail: `The tenant ${tenant} already exists. Change it in the list.`, field: "tenant" });
      // Unchanged values are not sent, because another operator may have changed them meanwhile.
      const changed = Object.fromEntries(Object.entries(values).filter(([each, value]) => value !== (known[each] ?? null)));
      const limits = changedLimits(known, { own_calls, own_rpm, own_tpm });
      if (Object.keys(limits).length) changed.limits = limits;
      const expected = one ? Object.fromEntries(Object.keys(changed).map((each) => [each, one[each]])) : {};
      await put(`admin/tenants/${encodeURIComponent(known.tenant)}`, { ...changed, expected, by: "dashboard" }, { query: { pool } });
      return one?.tenant ?? tenant;
    },
  });
  if (done === null) return;
  toast(one ? `${done} is changed.` : `${done} is created. Its callers need an API key.`);
  await again();
}

/** Return the own limits whose bound was changed, null for those that were emptied. */
function changedLimits({ tenant, limits }, bounds) {
  const found = {};
  for (const [each, scope] of OWN_LIMITS) {
    const name = `${scope}${tenant}`;
    const [before, bound] = [limits[name] ?? null, bounds[each]];
    if (bound === boundOf(before)) continue;
    const isTable = bound !== null && before !== null && typeof before === "object";
    found[name] = isTable ? { ...before, bound } : bound;
  }
  return found;
}

async function disable(one, again) {
  const done = await confirm({
    title: one.disabled ? `Enable ${one.tenant}?` : `Disable ${one.tenant}?`,
    text: one.disabled ? "Its API keys are accepted again." : "Its API keys are rejected. Its requests stay on record, and jobs that it has submitted still run.",
    action: one.disabled ? "Enable" : "Disable",
    danger: !one.disabled,
    act: () => put(`admin/tenants/${encodeURIComponent(one.tenant)}`, { disabled: !one.disabled, by: "dashboard" }),
  });
  if (done !== null) await again();
}

async function revokeKey(one, again) {
  const done = await confirm({
    title: `Revoke ${one.name || `tg_${one.prefix}`}?`,
    text: "This is permanent. Calls with this key are rejected within two seconds.",
    action: "Revoke",
    danger: true,
    act: () => remove(`admin/keys/${one.prefix}`, { query: { by: "dashboard" } }),
  });
  if (done === null) return;
  toast("The key is revoked.");
  await again();
}

async function makeKey(tenants, again) {
  const names = Object.fromEntries(["default", ...tenants.map((one) => one.tenant)].map((name) => [name, name]));
  const made = await confirm({
    title: "New key",
    fields: [
      field("tenant", "Tenant", { options: names, value: "default" }),
      field("name", "Name", { maxlength: 200 }),
      field("scopes", "Permissions", { options: SCOPES, value: "infer,read" }),
      field("days", "Expires", { options: EXPIRES, value: "" }),
    ],
    action: "Create the key",
    act: ({ days, scopes, ...values }) => {
      return post("admin/keys", { ...values, scopes: scopes.split(","), expires_at: expiry(days), by: "dashboard" });
    },
  });
  if (made === null) return;
  await shownOnce(made.key);
  await again();
}

/** A dialog for a key that opens this dashboard for a person, and is no tenant's. */
async function letIn(again) {
  const made = await confirm({
    title: "New dashboard key",
    text: "A key for one person to sign in to this dashboard. It is not for programs that call models, and changes are recorded under its name. With OIDC_ISSUER people sign in with their accounts instead.",
    fields: [
      field("name", "Name of the person", { maxlength: 200, placeholder: "ann" }),
      field("scopes", "Role", { options: Object.fromEntries(PEOPLE.map((role) => [role, SCOPES[role]])), value: "viewer" }),
      field("days", "Expires", { options: EXPIRES, value: "90" }),
    ],
    action: "Create the key",
    act: ({ days, scopes, name }) => {
      if (!name) throw new Problem({ detail: "Enter a name.", field: "name" });
      return post("admin/keys", { name, scopes: [scopes], expires_at: expiry(days), by: "dashboard" });
    },
  });
  if (made === null) return;
  await shownOnce(made.key, `The person signs in with it at ${new URL(".", document.baseURI).href}`);
  await again();
}

const expiry = (days) => (days ? new Date(Date.now() + Number(days) * DAY_MS).toISOString() : null);

/** A dialog with the new key, which cannot be displayed again. */
function shownOnce(key, words = "") {
  const copy = h("button", { class: "button", type: "button" }, "Copy");
  const shown = h("p", { class: "made-key mono", tabindex: "0" }, key);
  const dialog = h(
    "dialog",
    { "aria-labelledby": "made-key" },
    h(
      "form",
      { method: "dialog" },
      h("h2", { id: "made-key" }, "Key created"),
      h("p", {}, "Copy it now: it is not shown again. Only its digest is stored.", words && ` ${words}`),
      shown,
      h("div", { class: "actions" }, copy, h("button", { class: "button main", type: "submit" }, "Done")),
    ),
  );
  copy.addEventListener("click", async () => {
    fill(copy, (await copied(key, shown)) ? "Copied" : "Selected: press Ctrl + C");
  });
  document.body.append(dialog);
  dialog.showModal();
  copy.focus();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.remove()));
  });
}
