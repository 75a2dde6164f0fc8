// The processes that share the limits, and the upstreams that they call.

import { h, keyed, mark, say } from "../../dom.js";
import { NOTHING, brief, capital, count, length } from "../../format.js";
import { link } from "../../router.js";
import { ALL } from "../../scope.js";

/** `api-host-4711-1a2b3c4d` as its role and the rest. */
function parted(process) {
  const [, role, place] = /^([a-z]+)-(.*)-[0-9a-f]{8}$/.exec(process) ?? [null, "process", process];
  return { role, place };
}

export function processesCard() {
  const body = h("tbody");
  const draw = keyed(body, (first) => {
    const { role, place } = parted(first.process || first.session);
    const held = h("td", { class: "number" });
    const waiting = h("td", { class: "number" });
    const left = h("td", { class: "number wide" });
    const badge = h("span", { class: "badge" });
    const name = h("th", { scope: "row", class: "name" }, h("b", {}, role), " ", place);
    name.title = `${first.process}, session ${first.session}`;
    return {
      element: h("tr", {}, name, held, waiting, left, h("td", {}, badge)),
      update(one) {
        say(held, count(one.held));
        say(waiting, brief(one.waiting));
        say(left, one.left_ms > 0 ? length(one.left_ms) : NOTHING);
        const gone = one.left_ms <= 0;
        mark(badge, "class", `badge ${gone ? "bad" : one.blocked ? "warn" : "good"}`);
        say(badge, gone ? "Not responding" : one.blocked ? "Accepts no permits" : "Healthy");
      },
    };
  });
  const heads = [
    ["Process", ""],
    ["Permits", "number"],
    ["Waiting", "number"],
    ["Lease left", "number wide"],
    ["State", ""],
  ].map(([words, kind]) => h("th", { scope: "col", class: kind }, words));
  const note = h("span", { class: "quiet-text" });
  return {
    element: h(
      "section",
      { class: "card", "aria-label": "Processes" },
      h("div", { class: "card-head" }, h("h2", {}, "Processes"), note),
      h(
        "div",
        { class: "scroll", tabindex: "0", role: "group", "aria-label": "Processes, a table" },
        h("table", { class: "table" }, h("thead", {}, h("tr", {}, heads)), body),
      ),
    ),
    live(frame) {
      const more = frame.more_processes ? `, ${count(frame.more_processes)} not shown` : "";
      say(note, `${count(frame.processes.length + frame.more_processes)} sessions${more}`);
      const named = (one) => `${one.process} ${one.session}`;
      draw(
        frame.processes.toSorted((a, b) => (named(a) < named(b) ? -1 : 1)),
        (one) => one.session,
      );
    },
  };
}

const STATES = {
  ok: ["good", "Healthy"],
  out: ["bad", "Out of service"],
  trying: ["warn", "Probing"],
};

/** A card of upstreams; `pool()` is the scope. */
export function upstreamsCard(pool) {
  const list = h("ul", { class: "upstreams" });
  let past = new Map();
  const draw = keyed(list, (first) => {
    const badge = h("span", { class: "badge" });
    const calls = h("span", { class: "quiet-text" });
    const detail = h("p", { class: "quiet-text" });
    const places = h("p", { class: "quiet-text" });
    const load = h("p", { class: "quiet-text" });
    return {
      element: h(
        "li",
        { data: { upstream: first.upstream } },
        h("div", { class: "upstream-head" }, h("b", {}, first.upstream), badge, calls),
        detail,
        places,
        load,
      ),
      update(one) {
        const refused = ["bad", one.unpaid ? "No credit" : "Key rejected"];
        const [kind, words] = one.drained ? ["", "Drained"] : one.key_refused ? refused : STATES[one.state];
        const isEverywhere = one.drained && one.out_in === one.processes;
        const some = one.out_in && one.processes > 1 && !isEverywhere;
        mark(badge, "class", `badge ${kind}`);
        say(badge, some ? `${words} in ${count(one.out_in)} of ${count(one.processes)} processes` : words);
        const seen = past.get(one.upstream);
        say(calls, seen ? callsOf(seen) : "no calls");
        detail.hidden = !one.detail;
        say(detail, capital(one.detail ?? ""));
        places.hidden = !some;
        if (some) say(places, placesOf(one));
        load.hidden = !one.load;
        say(load, one.load);
      },
    };
  });
  const span = h("span", { class: "quiet-text" });
  return {
    element: h(
      "section",
      { class: "card", "aria-label": "Upstreams" },
      h("div", { class: "card-head" }, h("h2", {}, "Upstreams"), span, h("div", { class: "end" }, h("a", { class: "quiet-text", href: link("/upstreams") }, "Details"))),
      list,
      h("p", { class: "quiet-text card-body" }, "The worst state that any process reports."),
    ),
    live(frame) {
      draw(frame.upstreams.filter((one) => [ALL, one.upstream].includes(pool())), (one) => one.upstream);
    },
    trend(frame) {
      say(span, `calls of the last ${frame.words}`);
      past = new Map(frame.upstreams.map((one) => [one.name, one]));
    },
  };
}

/** Name the processes in which the upstream is not healthy. */
function placesOf({ found, out_in }) {
  const named = found.map(({ process, state }) => {
    const { role, place } = parted(process);
    return `${role} ${place}: ${STATES[state][1].toLowerCase()}`;
  });
  const more = out_in - found.length;
  return [...named, more > 0 && `and ${count(more)} more`].filter(Boolean).join("; ");
}

function callsOf({ calls, failed, throttled }) {
  const said = [`${brief(calls)} calls`];
  if (failed) said.push(`${brief(failed)} failed`);
  if (throttled) said.push(`${brief(throttled)} times 429`);
  return said.join(", ");
}
