// The settings of the process that serves the page, as `tidegate config check` prints them.
// Read-only.

import { get } from "../api.js";
import { fill, h, say } from "../dom.js";
import { count } from "../format.js";
import { note } from "../router.js";
import { choice, empty } from "../ui.js";

const SHOWN = { given: "Set", all: "All" };
const TYPED_MS = 200;
const EMPTY = ["", "()", "{}"];

export async function open(main, { query, signal }) {
  const found = await get("admin/settings", { signal });
  const given = found.settings.filter((one) => one.origin !== null);
  const view = { shown: query.get("shown") === "all" || !given.length ? "all" : "given" };
  const place = h("div", { class: "settings-place" });
  const words = h("span", { class: "quiet-text" });
  const find = h("input", { class: "settings-find", type: "search", "aria-label": "Search settings", placeholder: "Search", spellcheck: "false" });

  function draw() {
    const asked = find.value.trim().toLowerCase();
    const among = view.shown === "all" || asked ? found.settings : given;
    const shown = among.filter((one) => `${one.name} ${one.value ?? ""} ${one.text}`.toLowerCase().includes(asked));
    say(words, `${count(shown.length)} of ${count(found.settings.length)}${among === given ? " set" : `, ${count(given.length)} set`}`);
    const sections = [...new Set(shown.map((one) => one.section))];
    fill(place, sections.length ? sections.map((title) => card(title, shown.filter((one) => one.section === title))) : h("section", { class: "card" }, empty("No settings match")));
  }

  let typing = 0;
  find.addEventListener("input", () => {
    clearTimeout(typing);
    typing = setTimeout(draw, TYPED_MS);
  });
  draw();
  const which = choice("Which", SHOWN, view.shown, (shown) => {
    view.shown = shown;
    note({ shown: shown === "all" ? "all" : "" });
    draw();
  });
  const file = found.policy_file ?? "RATE_LIMITS and the defaults (there is no tidegate.toml)";
  main.append(
    h("div", { class: "page-head" }, h("h1", {}, "Settings"), words, h("div", { class: "end settings-tools" }, find, which)),
    h("p", { class: "quiet-text" }, `Settings of ${found.process} when it started. Limits and upstreams come from ${file}, and from changes at run time. To change a setting, set its environment variable and restart the processes; tidegate config check validates it.`),
    found.doubts.map((one) => h("p", { class: "notice" }, one)),
    place,
  );
}

function card(title, settings) {
  return h(
    "section",
    { class: "card", "aria-label": title },
    h("div", { class: "card-head" }, h("h2", {}, title)),
    h("dl", { class: "settings" }, settings.map(line)),
  );
}

/** Return a text whose parts between backticks are code. */
const withCode = (text) => text.split("`").map((part, at) => (at % 2 ? h("code", {}, part) : part));

function line(one) {
  const isNothing = one.value === null || EMPTY.includes(one.value);
  const value = isNothing ? h("span", { class: "quiet-text" }, one.value === null ? "not set" : "none") : h("span", { class: "value" }, one.value);
  const from = h("span", { class: "quiet-text" }, `, ${one.origin === null ? "the default" : `from ${one.origin}`}`);
  return h(
    "div",
    { class: "setting", data: one.origin === null ? {} : { given: "" } },
    h("dt", { class: "mono" }, one.name),
    h("dd", {}, value, from),
    h("dd", { class: "quiet-text" }, withCode(one.text)),
  );
}
