// The verdict at the top: the state of the deployment, and each cause with its actions.

import { get, Problem } from "../../api.js";
import { fill, h, keyed, mark, say, sayComposed } from "../../dom.js";
import { count } from "../../format.js";
import { link } from "../../router.js";
import { copied, toast } from "../../ui.js";
import { resumeBudget, titleOf } from "./budgets.js";
import { acceptLimit, changeLimit, resumeLimit } from "./limits.js";

const SIGNS = { healthy: "●", degraded: "▲", down: "■" };
const WORDS = { healthy: "Healthy", degraded: "Degraded", down: "Down" };

/** A card of the verdict; `latest()` returns the newest frames: `{ live, budgets }`. */
export function verdictCard(latest) {
  const sign = h("span", { class: "verdict-sign", "aria-hidden": "true" });
  const word = h("b", { class: "verdict-word" }, "Loading");
  const words = h("span", { class: "verdict-words" });
  const ofAll = h("span", { class: "quiet-text", hidden: true }, "Of all upstreams");
  const list = h("ul", { class: "causes", "aria-label": "Problems", hidden: true });
  const more = h("p", { class: "quiet-text causes-more", hidden: true });
  const draw = keyed(list, (first) => causeRow(first, latest));
  const element = h(
    "section",
    { class: "card verdict", "aria-label": "State", data: { health: "unknown" } },
    h("p", { class: "verdict-head", role: "status" }, sign, word, words, ofAll),
    list,
    more,
  );
  return {
    element,
    ofAll,
    live({ verdict }) {
      mark(element, "data-health", verdict.health);
      say(sign, SIGNS[verdict.health]);
      say(word, `${WORDS[verdict.health]}:`);
      say(words, verdict.sentence.slice(WORDS[verdict.health].length + 2));
      list.hidden = !verdict.causes.length;
      draw(verdict.causes, keyOf);
      more.hidden = !verdict.more;
      say(more, `and ${count(verdict.more)} more`);
    },
  };
}

/** The text of a cause changes every second; its command, which names a budget's book, does not. */
const keyOf = ({ kind, pool, subject, command }) => [kind, pool, subject, command].join(" ");

function causeRow(first, latest) {
  let now = first;
  const sign = h("span", { class: "verdict-sign", "aria-hidden": "true" });
  const words = h("b");
  const detail = h("span", { class: "quiet-text" });
  const acts = h("div", { class: "cause-acts" });
  fill(acts, actsOn(first, () => now, latest));
  return {
    element: h(
      "li",
      { class: "cause", data: { cause: first.kind, subject: first.subject ?? "" } },
      sign,
      h("div", { class: "cause-words" }, words, detail),
      acts,
    ),
    update(one) {
      now = one;
      mark(sign.parentElement, "data-level", one.level);
      say(sign, SIGNS[one.level]);
      sayComposed(words, one.words);
      sayComposed(detail, one.detail);
      detail.hidden = !one.detail;
    },
  };
}

/** Return the buttons and links of a cause; the command is for a terminal. */
function actsOn(first, now, latest) {
  const button = (text, act) =>
    h("button", { class: "button small", type: "button", needs: "operator", on: { click: act } }, text);
  const { kind, pool, subject } = first;
  const found = [];
  if (kind === "limit_paused") {
    found.push(button("Resume", async () => resumeLimit(pool, await viewOf(latest, pool, subject))));
  } else if (kind === "bottleneck" || kind === "limit_closed") {
    found.push(
      h("a", { class: "button small quiet", href: link("/requests", { status: "open" }) }, "Waiting requests"),
      button("Change the limit", async () => changeLimit(pool, await viewOf(latest, pool, subject))),
    );
  } else if (kind === "drift") {
    found.push(button("Accept", () => acceptLimit(pool, subject)));
  } else if (kind.startsWith("budget_")) {
    found.push(button("Allow more", () => resumeOf(latest, subject, now())));
  } else if (kind === "key_refused" || kind === "upstream_out" || kind === "upstreams_out") {
    found.push(h("a", { class: "button small", href: link("/upstreams") }, "View upstreams"));
  } else if (kind === "dead_jobs" || kind === "webhooks_given_up") {
    found.push(h("a", { class: "button small", href: link("/attention") }, "View"));
  } else if (kind === "alerts_given_up") {
    found.push(h("a", { class: "button small", href: link("/alerts") }, "View alerts"));
  }
  if (first.command) found.push(copyButton(first.command));
  return found;
}

/**
 * Return a limit from the newest frame, which has the busiest limits of a pool, or else from the
 * list of all.
 */
async function viewOf(latest, pool, limit) {
  const isIt = (one) => one.limit === limit;
  const frame = latest().live?.pools.find((one) => one.pool === pool);
  const shown = frame?.limits?.find(isIt);
  if (shown) return shown;
  for (let offset = 0; ; ) {
    const page = await get("dashboard/limits", { query: { pool, search: limit, offset } });
    const found = page.limits.find(isIt);
    if (found) return found;
    offset += page.limits.length;
    if (offset >= page.total || !page.limits.length) throw new Problem({ detail: `The limit ${limit} no longer exists.` });
  }
}

function resumeOf(latest, name, cause) {
  const whose = ({ scope }) => (scope.length ? ` (${scope.map((value) => value || "none").join(", ")})` : "");
  const isOf = (one) => one.name === name && cause.words.startsWith(`Budget ${name}${whose(one)} is `);
  const one = latest().budgets?.budgets.find(isOf);
  if (one) resumeBudget(one, titleOf(one));
  else toast(`This budget is not among those shown below. Use the command: ${cause.command}`, "bad");
}

function copyButton(command) {
  const button = h(
    "button",
    { class: "button small quiet", type: "button", title: command },
    "Copy command",
  );
  button.addEventListener("click", async () => {
    const isCopied = await copied(command);
    toast(isCopied ? `Copied: ${command}` : `The browser does not allow copying. The command is: ${command}`, isCopied ? "good" : "bad");
  });
  return button;
}
