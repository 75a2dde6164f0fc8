// The limits of an upstream with their current values, and new values for some of them.

import { get } from "../api.js";
import { fill, h, mark, say } from "../dom.js";
import { count, grouped } from "../format.js";
import { numberOf, said } from "../ui.js";

const TYPED_MS = 200;

/** Return pairs as `kind:text_only=20;rpm:total=60`; separators within names are escaped. */
export const textOf = (pairs) => pairs.map((pair) => pair.map((one) => one.replaceAll(/[%=;]/g, encodeURIComponent)).join("=")).join(";");

/** Return the same text as a map. */
export function written(text) {
  const pairs = text.split(";").map((one) => one.split("="));
  const plain = (one) => one.replaceAll(/%(?:25|3B|3D)/g, decodeURIComponent);
  return new Map(pairs.filter((one) => one.length === 2).map((pair) => pair.map(plain)));
}

/**
 * A searchable list, limits with a new value first. `wanted`: limit -> new value as typed.
 * `changed()` is called for each change.
 */
export function limitsToChange(pool, wanted, changed, signal) {
  const known = new Map(); // the last view of each limit
  const list = h("ul", { class: "what-if-limits" });
  const words = h("p", { class: "wrong", role: "alert" });
  const more = h("span", { class: "quiet-text" });
  const find = h("input", { type: "search", placeholder: "Search limits", "aria-label": "Search limits", spellcheck: "false" });
  const bad = new Map(); // limit -> problem of its new value
  let [page, total, typing] = [[], 0, 0];

  async function again() {
    const search = find.value.trim();
    const found = await get("dashboard/limits", { query: { pool, search }, signal });
    if (search !== find.value.trim()) return; // the search has changed meanwhile
    [page, total] = [found.limits, found.total];
    for (const one of page) known.set(one.limit, one);
    const missing = [...wanted.keys()].filter((limit) => !known.has(limit));
    for (const limit of missing) {
      const { limits } = await get("dashboard/limits", { query: { pool, search: limit }, signal });
      const one = limits.find((each) => each.limit === limit);
      if (one) known.set(limit, one);
      else wanted.delete(limit);
    }
    draw();
  }

  function draw() {
    const chosen = [...wanted.keys()].filter((limit) => !page.some((one) => one.limit === limit));
    const shown = [...chosen.map((limit) => known.get(limit)), ...page];
    fill(list, shown.map(row));
    find.hidden = total <= page.length && !find.value;
    const hidden = total - page.length;
    say(more, hidden > 0 ? `${count(hidden)} more: search by name` : page.length ? "" : `No limit matches ${find.value}.`);
  }

  function row(one) {
    const id = `new-${one.limit}`;
    const input = h("input", {
      id,
      name: one.limit,
      inputmode: "decimal",
      autocomplete: "off",
      placeholder: "unchanged",
      value: wanted.get(one.limit) ?? "",
      "aria-label": `New value of ${one.limit}`,
      "aria-invalid": bad.has(one.limit) ? "true" : "false",
    });
    input.addEventListener("input", () => {
      const text = input.value.trim();
      if (text) wanted.set(one.limit, text);
      else wanted.delete(one.limit);
      bad.delete(one.limit);
      mark(input, "aria-invalid", "false");
      changed();
    });
    return h(
      "li",
      { data: { limit: one.limit } },
      h("span", { class: "what-if-name" }, h("b", { title: one.limit }, one.limit), h("span", { class: "quiet-text" }, `now ${grouped(one.words)}`)),
      input,
    );
  }

  find.addEventListener("input", () => {
    clearTimeout(typing);
    typing = setTimeout(again, TYPED_MS);
  });

  function show(limit, why) {
    bad.set(limit, why);
    const input = list.querySelector(`[data-limit="${CSS.escape(limit)}"] input`);
    if (input) {
      mark(input, "aria-invalid", "true");
      input.focus();
    }
    say(words, why);
  }

  return {
    element: h(
      "fieldset",
      { class: "what-if-change" },
      h("legend", {}, "New values of limits"),
      find,
      list,
      more,
      words,
    ),
    again,
    text: () => textOf([...wanted]),
    isSound() {
      if (wanted.size === 0) {
        say(words, "Enter a new value for at least one limit.");
        list.querySelector("input")?.focus();
        return false;
      }
      for (const [limit, text] of wanted) {
        const value = numberOf(text);
        const isWhole = known.get(limit)?.unit === "usd" || Number.isInteger(value);
        if (Number.isFinite(value) && value >= 0 && isWhole) continue;
        show(limit, `${limit}: must be ${known.get(limit)?.unit === "usd" ? "an amount in dollars" : "a whole number"} of at least 0. 0 admits no calls.`);
        return false;
      }
      return true;
    },
    /**
     * Show a problem at the limit that it names, and return whether there is one; null removes all
     * messages.
     */
    complain(problem) {
      say(words, "");
      bad.clear();
      for (const input of list.querySelectorAll("input")) mark(input, "aria-invalid", "false");
      const limit = problem && [...wanted.keys()].find((one) => problem.field?.endsWith(one) || problem.field?.includes(`${one}.`));
      if (limit) show(limit, said(problem));
      return Boolean(limit);
    },
    /** Return the value in force and the new value of each changed limit. */
    async changes(within) {
      const { policy } = await get("admin/limits", { query: { pool }, signal: within });
      return [...wanted].map(([limit, text]) => {
        const before = policy.limits[limit] ?? null;
        const isTable = before !== null && typeof before === "object";
        return { limit, before, after: isTable ? { ...before, bound: numberOf(text) } : numberOf(text) };
      });
    },
  };
}
