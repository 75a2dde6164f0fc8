// The filters above the list of requests: kept in the URL, and converted to a query.

import { h, mark } from "../dom.js";
import { link } from "../router.js";
import * as scope from "../scope.js";
import { field } from "../ui.js";
import { KINDS, SOURCES, STATUSES } from "./request_words.js";

const TYPED_MS = 350;
const SPANS_MS = { "15m": 900_000, "1h": 3_600_000, "24h": 86_400_000, "7d": 604_800_000 };
const wordsOf = (choices) =>
  Object.fromEntries(Object.entries(choices).map(([key, [words]]) => [key, words]));
// Text, filter and value of the quick buttons above the filters.
const QUICK = [
  ["Failed", "status", "failed"],
  ["Waiting or running", "status", "open"],
  ["Yesterday", "time", "yesterday"],
];

/** In the order shown; the first ones are always visible. */
const always = () => [
  field("text", "Search", { type: "search", spellcheck: "false", placeholder: "Prompt, key, id" }),
  field("id", "Id begins with", { type: "search", spellcheck: "false" }),
  field("status", "Status", {
    options: { "": "Any", open: "Waiting or running", ...wordsOf(STATUSES) },
  }),
  field("time", "Submitted", {
    options: {
      "": "At any time",
      "15m": "In the last 15 minutes",
      "1h": "In the last hour",
      "24h": "In the last 24 hours",
      yesterday: "Yesterday",
      "7d": "In the last 7 days",
      between: "Custom range",
    },
  }),
  field("tenant", "Tenant", { type: "search", spellcheck: "false" }),
  field("source", "Source", { options: { "": "Any", ...SOURCES } }),
];
const between = () => [
  field("since", "From", { type: "datetime-local", step: "1" }),
  field("until", "Until", { type: "datetime-local", step: "1" }),
];
const more = () => [
  field("type", "Type", { options: { "": "Any", ...KINDS } }),
  field("model", "Model", { type: "search", spellcheck: "false" }),
  field("error", "Error code", {
    type: "search",
    spellcheck: "false",
    placeholder: "upstream_throttled",
  }),
  field("subject", "Subject", { type: "search", spellcheck: "false" }),
  field("conversation", "Conversation", { type: "search", spellcheck: "false" }),
];

/**
 * Create the filters: `{ element, upstreams, values(), any(), clear(), complain(problem) }`.
 *
 * `changed()` is called when a filter was selected, or shortly after the last character was typed.
 * `upstreams` is the switch that selects the upstream.
 */
export function filters(query, changed) {
  const upstreams = scope.scopeSwitch(() => tell());
  const [first, times, rest] = [always(), between(), more()];
  const fields = [...first, ...times, ...rest];
  const set = (one) => one.input.value !== "";
  const named = (name) => fields.find((one) => one.name === name);
  const moments = new Map(times.map((one) => [one, momentIn(one.input)]));
  for (const one of fields) {
    const given = query.get(one.name) ?? "";
    if (moments.has(one)) moments.get(one).show(given);
    else one.input.value = given;
  }
  const timed = h("div", { class: "filters" }, times.map((one) => one.element));
  const folded = h(
    "details",
    { class: "more-filters", open: rest.some(set) },
    h("summary", {}, "More filters"),
    h("div", { class: "filters" }, rest.map((one) => one.element)),
  );
  const quick = QUICK.map(([words, name, value]) => {
    const on = () => named(name).input.value === value;
    const button = h("button", { class: "button small", type: "button" }, words);
    button.addEventListener("click", () => {
      named(name).input.value = on() ? "" : value;
      tell();
    });
    return { button, fit: () => mark(button, "aria-pressed", String(on())) };
  });
  const element = h(
    "form",
    { class: "card card-body filter-card", role: "search", "aria-label": "Requests" },
    h("div", { class: "quick-filters", role: "group", "aria-label": "Quick filters" }, quick.map((one) => one.button)),
    h("div", { class: "filters" }, first.map((one) => one.element)),
    timed,
    folded,
  );
  const fit = () => {
    timed.hidden = named("time").value() !== "between";
    for (const one of quick) one.fit();
  };
  fit();
  const values = () => {
    const found = Object.fromEntries(fields.map((one) => [one.name, moments.get(one)?.value() ?? one.value()]));
    if (found.time !== "between") found.since = found.until = "";
    return { ...found, upstream: scope.narrowed() };
  };
  let typing = 0;
  let told = JSON.stringify(values());
  const tell = () => {
    clearTimeout(typing);
    fit();
    // A typed text is reported once: leaving the field fires another "change" event for it.
    const now = JSON.stringify(values());
    if (now === told) return;
    told = now;
    changed();
  };
  element.addEventListener("change", tell);
  element.addEventListener("input", (event) => {
    if (event.target.type !== "search") return;
    clearTimeout(typing);
    typing = setTimeout(tell, TYPED_MS);
  });
  element.addEventListener("submit", (event) => {
    event.preventDefault();
    tell();
  });
  return {
    element,
    upstreams: upstreams.element,
    values,
    any: () => Object.values(values()).some((value) => value !== ""),
    clear: () => {
      for (const one of fields) one.input.value = "";
      scope.choose(scope.ALL);
      upstreams.show();
      tell();
    },
    complain: (problem, text) => {
      const named = problem?.field === "error_code" ? "error" : problem?.field;
      const at = fields.find((one) => one.name === named);
      fields.forEach((one) => one.complain(one === at ? text : ""));
      return at !== undefined;
    },
  };
}

/** Return the query of `admin/requests` for the filters, as text. */
export function asked(values, more = {}) {
  const query = new URLSearchParams();
  const give = (name, value) => {
    if (value !== "" && value !== undefined && value !== null) query.append(name, value);
  };
  for (const one of values.status === "open" ? ["queued", "running"] : [values.status]) {
    give("status", one);
  }
  for (const name of ["text", "id", "tenant", "source", "type", "model", "upstream", "subject", "conversation"]) {
    give(name, values[name]);
  }
  give("error_code", values.error);
  if (values.time === "yesterday") {
    give("since", midnight(-1));
    give("until", midnight(0));
  }
  if (SPANS_MS[values.time]) give("since", new Date(Date.now() - SPANS_MS[values.time]).toISOString());
  for (const name of ["since", "until"]) give(name, values[name]);
  for (const [name, value] of Object.entries(more)) give(name, value);
  return query.toString();
}

/** Return the start of a day in the local time zone: 0 is today. */
function midnight(days) {
  const at = new Date();
  return new Date(at.getFullYear(), at.getMonth(), at.getDate() + days).toISOString();
}

/** Convert between a field in the local time zone and UTC, as in the URL and the API. */
function momentIn(input) {
  let [text, at] = ["", ""]; // as in the field, and in UTC: a repeated hour has one text
  return {
    show(given) {
      const ms = Date.parse(given); // without a zone: in the local time zone
      input.value = Number.isNaN(ms) ? "" : local(ms);
      [text, at] = [input.value, input.value && inUtc(ms)];
    },
    value: () => (input.value === text ? at : inUtc(Date.parse(input.value))),
  };
}

/** Format a time in UTC; empty if invalid, such as a year with five digits. */
const inUtc = (ms) => (Number.isNaN(ms) ? "" : new Date(ms).toISOString().replace(".000Z", "Z"));

/** Return the URL of the list of requests submitted between two times, with more filters. */
export const requestsIn = (sinceMs, untilMs, more = {}) =>
  link("/requests", { time: "between", since: inUtc(sinceMs), until: inUtc(untilMs), ...more });

/** Format a time for a `datetime-local` field. */
function local(ms) {
  const at = new Date(ms);
  return new Date(at.getTime() - at.getTimezoneOffset() * 60_000).toISOString().slice(0, 19);
}
