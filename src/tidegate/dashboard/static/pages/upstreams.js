// Upstreams: the health of each, and actions to add, test, change, drain and remove one.

import { get, patch, post, Problem, put, remove } from "../api.js";
import { fill, h, keyed, mark, say } from "../dom.js";
import { count, length, price, time } from "../format.js";
import { repeat } from "../poll.js";
import { link } from "../router.js";
import { choice, confirm, empty, field, said, toast } from "../ui.js";

const EVERY_MS = 3_000;
const MOST_CHANGES = 10;
const OTHER = ""; // no preset
const MOST_MODELS = 8;
const FEW = 8; // upstreams that need no search
const OPTIONS = ["resource", "project", "location", "region"];

export async function open(main, { signal }) {
  const list = h("div", { class: "upstream-list" });
  const none = h("div", { hidden: true }, empty(
    "No upstreams yet",
    "An upstream is an account at a provider, or a server of your own. Put its key into an environment variable of every process, or into a file that all of them can read, and add the upstream here.",
  ));
  const away = h("p", { class: "notice bad", role: "alert", hidden: true });
  const changes = h("ul", { class: "changes-list" });
  const revision = h("span", { class: "quiet-text" });
  const differing = h("p", { class: "notice", hidden: true });
  const failed = new Set(); // names of upstreams whose last test from this page failed
  const draw = keyed(list, (first) => card(first, failed, again));
  const filter = filterOf(list);
  const made = h("h2", { tabindex: "-1" }, "Changes");
  const toChanges = h("button", { class: "button", type: "button", hidden: true, on: { click: () => made.focus() } }, "Changes");

  async function look() {
    try {
      const [found, history] = await Promise.all([get("admin/upstreams", { signal }), get("admin/upstreams/history", { query: { most: MOST_CHANGES }, signal })]);
      away.hidden = true;
      const upstreams = found.upstreams.map((one) => ({ ...one, revision: found.revision, test_failed: failed.has(one.name) }));
      draw(upstreams, (one) => one.name);
      none.hidden = found.upstreams.length > 0;
      filter.show(upstreams);
      toChanges.hidden = found.upstreams.length <= FEW;
      say(revision, words(found));
      differing.hidden = !found.differing.length;
      say(differing, `The file differs from the changes made here: ${found.differing.join("; ")}`);
      showChanges(changes, history, found.revision, again);
    } catch (problem) {
      if (signal.aborted) return;
      if (!(problem instanceof Problem)) throw problem;
      away.hidden = false;
      say(away, said(problem));
    }
  }

  async function again() {
    await look();
  }

  const add = h("button", { class: "button main", type: "button", needs: "admin", on: { click: () => addUpstream(again, signal) } }, "Add an upstream");
  await look();
  repeat(EVERY_MS, look, signal);
  main.append(
    h("div", { class: "page-head" }, h("h1", {}, "Upstreams"), revision, h("div", { class: "end" }, toChanges, add)),
    away,
    differing,
    h("section", { class: "card", "aria-label": "Upstreams" }, filter.head, none, list, filter.nothing),
    h(
      "section",
      { class: "card", "aria-label": "Changes" },
      h("div", { class: "card-head" }, made, h("span", { class: "quiet-text" }, "made at run time, the newest first")),
      changes,
    ),
  );
}

/** A search among many upstreams, and a choice of those that are not healthy. */
function filterOf(list) {
  const find = h("input", { type: "search", "aria-label": "Search upstreams", placeholder: "Search", spellcheck: "false" });
  const sums = h("span", { class: "quiet-text", role: "status" });
  const nothing = h("div", { hidden: true }, empty("No matches"));
  let [upstreams, state] = [[], "all"];
  const states = choice("State", { all: "All", bad: "Not healthy" }, state, (chosen) => {
    state = chosen;
    draw();
  });
  const head = h("div", { class: "card-head upstream-filter", hidden: true }, sums, h("div", { class: "end" }, find, states));

  function draw() {
    const asked = find.value.trim().toLowerCase();
    const isWell = (one) => stateOf(one)[0] === "good";
    const fits = (one) => (state === "all" || !isWell(one)) && textOf(one).toLowerCase().includes(asked);
    const isShown = new Map(upstreams.map((one) => [one.name, head.hidden || fits(one)]));
    for (const each of list.children) each.hidden = !isShown.get(each.dataset.upstream);
    const ill = upstreams.filter((one) => !isWell(one)).length;
    say(sums, `${count(upstreams.length)} upstreams, ${ill ? `${count(ill)} not healthy` : "all healthy"}`);
    nothing.hidden = !upstreams.length || [...isShown.values()].some(Boolean);
  }

  find.addEventListener("input", draw);
  return {
    head,
    nothing,
    show(found) {
      upstreams = found;
      head.hidden = found.length <= FEW;
      draw();
    },
  };
}

/** What is searched of an upstream. */
const textOf = (one) => [one.name, one.provider, stateOf(one)[1], one.key, ...one.models, ...Object.keys(one.table.aliases ?? {}), ...Object.values(one.base_urls)].join(" ");

function words({ revision, processes }) {
  const behind = processes.filter((one) => one.revision !== revision).length;
  const where = `${count(processes.length)} process${processes.length === 1 ? "" : "es"}`;
  const late = behind ? `, ${count(behind)} without the latest change` : "";
  return `${revision ? `revision ${revision}` : "as in the file"}, ${where}${late}`;
}

/** Return the style and the text of an upstream's badge. */
function stateOf({ state, health, test_failed }) {
  if (state === "drained") return ["", "Drained"];
  if (state === "draining") return ["warn", "Draining"];
  if (health.key_refused) return ["bad", health.unpaid ? "No credit" : "Key rejected"];
  if (state === "missing") return ["bad", "Can't be used"];
  if (health.state === "out" || state === "out") return ["bad", "Out of service"];
  if (health.state === "trying") return ["warn", "Probing"];
  if (test_failed) return ["warn", "Test failed"];
  return ["good", "Healthy"];
}

/** Return what is wrong, as the process reports it, and what fixes it. */
function wrongOf(one) {
  const { state, health, problems, key } = one;
  const found = Object.entries(problems).map(([process, why]) => `${process}: ${why}`);
  if (found.length) return [found.join("; "), "Fix it there and restart that process. A key file is read again automatically."];
  if (state === "drained" || state === "draining") return ["", "It takes no new calls. Resume it, or remove it."];
  const where = health.out_in && health.processes > 1 ? ` In ${count(health.out_in)} of ${count(health.processes)} processes.` : "";
  if (health.unpaid) {
    return [`${sentence(health.detail)}${where}`, "Add credit to the account, or use the key of another account. It is probed every minute."];
  }
  if (health.key_refused) {
    const from = key ? `Put a valid key into ${key}.` : "Set another key.";
    return [`${sentence(health.detail)}${where}`, `${from} A key file is read again with the button; a variable needs a restart.`];
  }
  if (health.state === "out" || state === "out") return [`${sentence(health.detail)}${where}`, "It is probed automatically within seconds."];
  return ["", ""];
}

const sentence = (text) => `${text.slice(0, 1).toUpperCase()}${text.slice(1).replace(/\.*$/, "")}.`;

function card(first, failed, again) {
  let latest = first;
  const badge = h("span", { class: "badge" });
  const source = h("span", { class: "quiet-text" });
  const wrong = h("p", { class: "notice", hidden: true });
  const what = h("b");
  const remedy = h("span", {});
  const readAgain = act("Read the key again", `Read the key of ${first.name} again`, "admin", () => readKey(latest, again));
  const tryNow = act("Try it now", `Try ${first.name} now`, "operator", () => triedNow(latest, again));
  wrong.append(what, remedy, tryNow, readAgain);
  const tests = h("ul", { class: "tests quiet-text" });
  const drain = act("", "", "operator", () => (isOut(latest) ? resume(latest, again) : drainIt(latest, again)));
  const drop = act("Remove", `Remove ${first.name}`, "admin", () => removeIt(latest, again), "danger");
  const test = act("Test", `Test ${first.name}`, "operator", () => tested(latest, tests, test, failed).then(again));
  const change = act("Change", `Change ${first.name}`, "admin", () => changeIt(latest, again));
  const rotate = act("Rotate key", `Rotate the key of ${first.name}`, "admin", () => rotateKey(latest, again));
  const facts = Object.fromEntries(["Models", "Address", "Key", "Limits", "Prices", "In progress", "Waiting", "Load"].map((name) => [name, h("dd", {})]));
  const rows = Object.entries(facts).map(([name, dd]) => h("div", { class: ["Models", "Address"].includes(name) ? "long" : null }, h("dt", {}, name), dd));
  fill(facts.Limits, h("a", { href: link("/", { pool: first.name }) }));
  const prices = h("button", { class: "as-link", type: "button", "aria-label": `Prices of ${first.name}` }, "Show");
  prices.addEventListener("click", () => showPrices(first.name));
  fill(facts.Prices, prices);
  return {
    element: h(
      "article",
      { class: "upstream", data: { upstream: first.name } },
      h("div", { class: "upstream-head" }, h("h2", {}, first.name), badge, source, h("div", { class: "upstream-acts" }, test, change, rotate, drain, drop)),
      wrong,
      h("dl", { class: "upstream-facts" }, rows),
      h("div", { role: "status" }, tests),
    ),
    update(one) {
      latest = one;
      const [look, state] = stateOf(one);
      mark(badge, "class", `badge ${look}`);
      say(badge, state);
      say(source, [one.provider, SOURCES[one.source] ?? one.source].filter(Boolean).join(", "));
      const [why, how] = wrongOf(one);
      wrong.hidden = !how;
      mark(wrong, "class", `notice ${look === "bad" ? "bad" : ""}`);
      say(what, why);
      what.hidden = !why;
      say(remedy, how);
      tryNow.hidden = look !== "bad" || one.state === "missing";
      rotate.hidden = !one.key;
      readAgain.hidden = !one.health.key_refused || isOut(one);
      say(drain, isOut(one) ? "Resume" : "Drain");
      mark(drain, "aria-label", `${isOut(one) ? "Resume" : "Drain"} ${one.name}`);
      drop.hidden = !isOut(one) && one.state !== "missing";
      say(facts.Models, modelsOf(one));
      mark(facts.Models, "title", one.models.length > MOST_MODELS ? one.models.join(", ") : null);
      say(facts.Address, Object.entries(one.base_urls).map(([dialect, url]) => `${dialect}: ${url}`).join("\n") || "none");
      say(facts.Key, one.key || "none");
      say(facts.Limits.firstChild, one.limits === null ? "none" : count(one.limits));
      say(facts["In progress"], count(one.in_progress));
      say(facts.Waiting, count(one.waiting));
      say(facts.Load, one.load);
      facts.Load.parentElement.hidden = !one.load;
    },
  };
}

const SOURCES = { deployment: "from the file or the environment", live: "added at run time" };
const isOut = (one) => one.state === "drained" || one.state === "draining";

function modelsOf({ models, table }) {
  const aliases = Object.entries(table.aliases ?? {}).map(([name, model]) => `${name} → ${model}`);
  const all = [...models, ...aliases];
  const more = all.length > MOST_MODELS ? `, and ${count(all.length - MOST_MODELS)} more` : "";
  return all.length ? `${all.slice(0, MOST_MODELS).join(", ")}${more}` : "all";
}

function act(words, label, needs, run, look = "") {
  const button = h("button", { class: `button small ${look}`, type: "button", needs, "aria-label": label }, words);
  button.addEventListener("click", run);
  return button;
}

const PRICE_HEADS = [["Models", ""], ["Input", "number"], ["Cached", "number"], ["Output", "number"], ["Picture", "number"], ["From", ""]];

/** A dialog with the prices by which calls to an upstream are charged. */
async function showPrices(name) {
  let found = [];
  try {
    found = await get(path(name, "/prices"));
  } catch (problem) {
    if (!(problem instanceof Problem)) throw problem;
    toast(said(problem), "bad");
    return;
  }
  const close = h("button", { class: "button", type: "submit" }, "Close");
  const heads = PRICE_HEADS.map(([words, look]) => h("th", { scope: "col", class: look }, words));
  const table = h("table", { class: "table" }, h("thead", {}, h("tr", {}, heads)), h("tbody", {}, found.map(priceRow)));
  const none = empty("No prices", "The cost of calls to this upstream is not known. State its prices in tidegate.toml, or with tidegate upstreams set.");
  const dialog = h(
    "dialog",
    { class: "prices", "aria-labelledby": "prices-title" },
    h(
      "form",
      { method: "dialog" },
      h("h2", { id: "prices-title" }, `Prices of ${name}`),
      h("p", { class: "quiet-text" }, "US dollars per million tokens, and per picture. Calls are charged by these prices."),
      found.length ? h("div", { class: "scroll", tabindex: "0", role: "group", "aria-label": "Prices, a table" }, table) : none,
      h("div", { class: "actions" }, close),
    ),
  );
  dialog.addEventListener("close", () => dialog.remove());
  document.body.append(dialog);
  dialog.showModal();
  close.focus();
}

function priceRow(one) {
  const amount = (value) => h("td", { class: "number" }, price(value));
  const notes = [one.long_above_tokens && `other prices above ${count(one.long_above_tokens)} input tokens`, one.tiers.length > 0 && `own prices for ${one.tiers.join(", ")}`].filter(Boolean);
  const models = h("td", {}, one.models.join(", "), notes.length > 0 && h("span", { class: "below quiet-text" }, notes.join("; ")));
  if (!one.is_known) return h("tr", {}, models, h("td", { colspan: PRICE_HEADS.length - 1 }, h("span", { class: "badge warn" }, "No price")));
  const from = one.checked === null ? "stated here" : h("a", { href: one.source, rel: "noreferrer", target: "_blank" }, `public, read ${one.checked}`);
  return h("tr", {}, models, amount(one.input), amount(one.cached), amount(one.output), amount(one.image), h("td", {}, from));
}

const path = (name, verb = "") => `admin/upstreams/${encodeURIComponent(name)}${verb}`;

/** Report a change as done, with the processes that have not applied it yet. */
async function told(done, text, again) {
  if (done === null) return;
  toast(text);
  if (done.unreached?.length) toast(`Not in force yet in ${done.unreached.join(", ")}.`, "bad");
  await again();
}

/** Test an upstream, show what each of its APIs answers and when, and note in `failed` whether one failed. */
async function tested({ name }, place, button, failed) {
  button.disabled = true;
  fill(place, h("li", {}, "Requesting its models ..."));
  try {
    const found = await post(path(name, "/test"));
    if (found.some((one) => one.problem)) failed.add(name);
    else failed.delete(name);
    fill(place, [h("li", {}, `Tested at ${time(Date.now())}`), ...found.map((one) => h("li", { class: one.problem ? "bad" : null }, testWords(one)))]);
  } catch (problem) {
    if (!(problem instanceof Problem)) throw problem;
    fill(place, h("li", { class: "bad" }, said(problem)));
  } finally {
    button.disabled = false;
  }
}

function testWords(one) {
  const status = one.status === null ? "no answer" : `status ${one.status}`;
  const line = `${one.dialect} at ${one.url}: ${status} in ${length(one.took_ms)}`;
  const unlisted = one.unlisted.length ? `; not in its list of models: ${one.unlisted.join(", ")}` : "";
  if (one.problem) return `${line}: ${one.problem}`;
  if (!one.model_count) return one.status === 200 ? line : `${line}, no list of models, so the key is not tested`;
  return `${line}, ${count(one.model_count)} models: ${one.models.slice(0, 5).join(", ")}${one.model_count > 5 ? " ..." : ""}${unlisted}`;
}

const reasonField = () => field("reason", "Reason (recorded)", { maxlength: 500 });

async function drainIt({ name }, again) {
  const done = await confirm({
    title: `Drain ${name}?`,
    text: "It takes no new calls. Waiting calls move to other upstreams that serve their model, or are rejected if there are none. Calls in progress finish.",
    fields: [reasonField()],
    action: "Drain",
    act: (values) => post(path(name, "/drain"), { ...values, by: "dashboard" }),
  });
  await told(done, `${name} takes no new calls.`, again);
}

async function resume({ name }, again) {
  const done = await confirm({
    title: `Resume ${name}?`,
    text: "It takes calls again, in all processes within a second.",
    fields: [reasonField()],
    action: "Resume",
    act: (values) => post(path(name, "/resume"), { ...values, by: "dashboard" }),
  });
  await told(done, `${name} takes calls again.`, again);
}

async function removeIt({ name }, again) {
  const force = field("force", "If it is still needed", { options: { "": "Do not remove it, and show what needs it", true: "Remove it anyway" } });
  const done = await confirm({
    title: `Remove ${name}?`,
    text: "It is removed from all processes permanently. Its files, stored responses and batches can no longer be reached through the gateway.",
    fields: [force, reasonField()],
    action: "Remove",
    danger: true,
    act: ({ force: isForced, reason }) => remove(path(name), { query: { force: isForced, reason, by: "dashboard" } }),
  });
  await told(done, `${name} is removed.`, again);
}

/** End the pause of an upstream early: the next call shows whether it works. */
async function triedNow({ name }, again) {
  const done = await confirm({
    title: `Try ${name} now?`,
    text: "Calls are sent to it again. If the first ones fail, it is out of service again.",
    fields: [reasonField()],
    action: "Try it now",
    act: (values) => post(`admin/limits/${encodeURIComponent(`upstream:${name}`)}/resume`, { ...values, by: "dashboard" }, { query: { pool: name } }),
  });
  await told(done, `Calls are sent to ${name} again.`, again);
}

async function readKey({ name, key }, again) {
  const done = await confirm({
    title: `Read the key of ${name} again?`,
    text: `Every process reads ${key || "its secrets and files"} again and tests it at the upstream.`,
    action: "Read again",
    act: () => patch(path(name), { read_again: true, by: "dashboard" }),
  });
  await told(done, `The key of ${name} was read again.`, again);
}

/**
 * Read a new key from the place of the old one, or from another place; the page never gets the key.
 */
async function rotateKey({ name, key, table }, again) {
  const fields = [
    field("key", "Key variable", { value: table.key ?? "", placeholder: table.key_file ? "" : key, spellcheck: "false", hint: "The variable's name, never the key. Every process must have it; a new value needs a restart." }),
    field("key_file", "Or key file", { value: table.key_file ?? "", spellcheck: "false", hint: "A path that every process can read. A new key in the same file needs no restart." }),
  ];
  const done = await confirm({
    title: `Rotate the key of ${name}`,
    text: `The key comes from ${key}. Put the new key there, or enter another variable or file. All processes read it, and calls in progress finish with the old key. Revoke the old key at the provider afterwards.`,
    fields: [...fields, reasonField()],
    action: "Read the new key",
    act: ({ reason, ...values }) => {
      const set = Object.fromEntries(Object.entries(values).filter(([each, value]) => value && value !== table[each]));
      const gone = Object.keys(values).filter((each) => table[each] && (!values[each] || (Object.keys(set).length > 0 && !set[each])));
      const change = Object.keys(set).length || gone.length ? { set, remove: gone, reason } : { read_again: true, reason };
      return patch(path(name), { ...change, by: "dashboard" });
    },
  });
  await told(done, `The key of ${name} was read. Test the upstream.`, again);
}

const listOf = (text) => text.split(",").map((one) => one.trim()).filter(Boolean);

async function changeIt(one, again) {
  const { name, table, revision } = one;
  const models = field("models", "Models", { value: one.models.join(", "), spellcheck: "false", hint: "Patterns, separated by commas; * matches anything." });
  const weight = field("weight", "Weight", { type: "number", value: String(table.weight ?? 1), hint: "Its share of calls among upstreams that serve the same model." });
  const key = field("key", "Key variable", { value: table.key ?? "", placeholder: one.key, spellcheck: "false", hint: "The variable's name, never the key. Every process must have it." });
  const done = await confirm({
    title: `Change ${name}`,
    text: "Takes effect in all processes, permanently. Calls in progress are not affected.",
    fields: [models, weight, key, reasonField()],
    action: "Change",
    act: ({ reason, ...values }) => {
      const set = {};
      if (values.models !== one.models.join(", ")) set.models = listOf(values.models);
      if (values.weight !== (table.weight ?? 1)) set.weight = values.weight;
      if (values.key && values.key !== table.key) set.key = values.key;
      const gone = table.key && !values.key ? ["key"] : [];
      // Changes of another operator since the dialog opened are not overwritten.
      return patch(path(name), { set, remove: gone, reason, expected: revision, by: "dashboard" });
    },
  });
  await told(done, `${name} is changed.`, again);
}

async function addUpstream(again, signal) {
  const providers = await get("admin/upstreams/providers", { signal });
  const known = new Map(providers.map((one) => [one.name, one]));
  const choices = { ...Object.fromEntries(providers.map((one) => [one.name, one.name])), [OTHER]: "Other, by address" };
  const provider = field("provider", "Provider", { options: choices, value: "openai" });
  const name = field("name", "Name", { maxlength: 100, spellcheck: "false", hint: "Shown with calls, limits and charts." });
  const address = field("base_url", "Address", { spellcheck: "false" });
  const options = OPTIONS.map((each) => field(each, `${each[0].toUpperCase()}${each.slice(1)}`, { spellcheck: "false" }));
  const key = field("key", "Key variable", { spellcheck: "false", hint: "The variable's name, never the key. Every process must have it." });
  const keyFile = field("key_file", "Or key file", { spellcheck: "false", hint: "A path that every process can read. A new key in the same file needs no restart." });
  const models = field("models", "Models", { spellcheck: "false", hint: "Patterns, separated by commas, such as llama-*. Empty: the usual models of the provider." });
  const most = field("most", "Concurrent calls", { type: "number", hint: "Its limit pool:total. Empty: 64. Others are set on the overview." });
  const test = field("test", "Test before use", { options: { true: "Request its models", "": "No test" }, value: "true" });

  function fit() {
    const one = known.get(provider.value());
    name.input.placeholder = one?.name ?? "gpu-1";
    key.input.placeholder = one ? (one.key ?? (one.is_own ? "none needed" : "")) : "EXAMPLE_API_KEY";
    address.input.placeholder = one?.base_url ?? "https://api.example.com/v1";
    address.element.hidden = Boolean(one) && !one.is_own;
    for (const each of options) {
      each.element.hidden = !one || !Object.hasOwn(one.options, each.name);
      each.input.placeholder = one?.options[each.name] ?? "";
    }
    models.input.placeholder = one ? one.models.join(", ") : "*";
  }
  provider.input.addEventListener("change", fit);
  fit();
  const done = await confirm({
    title: "Add an upstream",
    text: "Takes effect in all processes, permanently, without a restart.",
    fields: [provider, name, address, ...options, key, keyFile, models, most, test],
    action: "Add",
    act: (values) => {
      const table = {};
      const chosen = known.get(values.provider);
      if (chosen) table.provider = chosen.name;
      for (const each of [address, ...options, key, keyFile]) if (!each.element.hidden && values[each.name]) table[each.name] = values[each.name];
      if (values.models) table.models = listOf(values.models);
      if (values.most !== null) table.limits = { "pool:total": values.most };
      const called = values.name || chosen?.name;
      if (!called) throw new Problem({ detail: "Enter a name.", field: "name" });
      return put(path(called), { table, test: Boolean(values.test), by: "dashboard" }).then((answer) => ({ ...answer, name: called }));
    },
  });
  await told(done, `${done?.name} takes calls.`, again);
}

function showChanges(place, history, current, again) {
  const text = JSON.stringify([history, current]);
  if (place.dataset.shown === text) return;
  place.dataset.shown = text;
  if (!history.length) {
    fill(place, h("li", { class: "quiet-text" }, "No changes at run time: all upstreams are as in tidegate.toml and the environment."));
    return;
  }
  fill(
    place,
    history.map((one, at) => {
      const back = h("button", { class: "button small quiet", type: "button", needs: "admin", "aria-label": `Go back to revision ${one.revision}` }, "Go back to this");
      back.addEventListener("click", () => rollBack(one, current, again));
      return h(
        "li",
        { data: { revision: one.revision } },
        h("b", {}, `Revision ${one.revision}`),
        h("span", { class: "quiet-text" }, `${time(one.created_at)}, ${one.set_by}${one.reason ? `: ${one.reason}` : ""}`),
        h("span", {}, one.changes.join("; ") || "no change"),
        at > 0 && back,
      );
    }),
  );
}

async function rollBack({ revision }, current, again) {
  const done = await confirm({
    title: `Go back to revision ${revision}?`,
    text: "Its upstreams are put in force in all processes, as a new revision.",
    fields: [reasonField()],
    action: "Go back",
    act: (values) => post("admin/upstreams/rollback", { revision, ...values, expected: current, by: "dashboard" }),
  });
  await told(done, `The upstreams of revision ${revision} are in force.`, again);
}
