// A long list as a table with a search and pages.

import { fill, h, say } from "./dom.js";
import { count } from "./format.js";
import { empty } from "./ui.js";

const PAGE = 25;
const TYPED_MS = 200;

/**
 * A card with a table that has a search and pages: `show(items)`.
 *
 * `heads`: the text and the class of each column. `textOf(item)`: the searched text. `rowOf(item)`:
 * its row. `none`: arguments of `empty` for no items. `acts`: buttons of the card. `note` is added
 * from 1,000 items on. `above` is placed between the head and the table.
 */
export function listed(title, heads, textOf, rowOf, { none, acts = [], note = "", above = null }) {
  const body = h("tbody");
  const head = heads.map(([words, look]) =>
    h("th", { scope: "col", class: look }, words || h("span", { class: "visually-hidden" }, "Actions")),
  );
  const table = h("table", { class: "table" }, h("thead", {}, h("tr", {}, head)), body);
  const words = h("span", { class: "quiet-text" });
  const find = h("input", { type: "search", "aria-label": `Search ${title}`, placeholder: "Search", spellcheck: "false" });
  const place = h("div", { class: "scroll", tabindex: "0", role: "group", "aria-label": `${title}, a table` }, table);
  const nothing = h("div", { hidden: true });
  const [back, on] = ["Previous", "Next"].map((text) => h("button", { class: "button small", type: "button" }, text));
  const where = h("span", { class: "quiet-text" });
  const foot = h("div", { class: "list-foot", hidden: true }, where, back, on);
  let [items, offset] = [[], 0];

  function draw() {
    const asked = find.value.trim().toLowerCase();
    const found = items.filter((one) => textOf(one).toLowerCase().includes(asked));
    offset = Math.min(offset, Math.max(0, Math.ceil(found.length / PAGE) - 1) * PAGE);
    const shown = found.slice(offset, offset + PAGE);
    fill(body, shown.map(rowOf));
    place.hidden = shown.length === 0;
    nothing.hidden = shown.length > 0;
    if (!shown.length) fill(nothing, items.length ? empty("No matches") : empty(...none));
    say(words, [count(items.length), items.length >= 1_000 ? note : ""].filter(Boolean).join(", "));
    say(where, `${count(offset + 1)} to ${count(offset + shown.length)} of ${count(found.length)}`);
    foot.hidden = found.length <= PAGE;
    find.hidden = items.length === 0;
    back.disabled = offset === 0;
    on.disabled = offset + PAGE >= found.length;
  }

  const turn = (by) => () => {
    offset = Math.max(0, offset + by);
    draw();
  };
  back.addEventListener("click", turn(-PAGE));
  on.addEventListener("click", turn(PAGE));
  let typing = 0;
  find.addEventListener("input", () => {
    clearTimeout(typing);
    typing = setTimeout(draw, TYPED_MS);
  });
  return {
    element: h(
      "section",
      { class: "card listed", "aria-label": title },
      h("div", { class: "card-head" }, h("h2", {}, title), words, h("div", { class: "end" }, find, acts)),
      above,
      place,
      nothing,
      foot,
    ),
    show(found) {
      items = found;
      draw();
    },
    search(text) {
      find.value = text;
      draw();
    },
  };
}
