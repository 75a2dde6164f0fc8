// Records compared with the providers' reports by `tidegate reconcile`.

import { h } from "./dom.js";
import { capital, count, money } from "./format.js";
import { link } from "./router.js";

export const BOOK_HEADS = [
  ["Day", ""],
  ["Upstream", "wide"],
  ["Model", ""],
  ["Recorded", "number wide"],
  ["Provider", "number wide"],
  ["Difference", "number"],
  ["Verdict", ""],
  ["Reason", "wrap wide"],
];
const LOOKS = { equal: "good", explained: "", unexplained: "bad" };
const NAMED = 5; // calls

export const bookText = (one) => `${one.day} ${one.upstream} ${one.model} ${one.verdict}`;

const micros = (value, look) => h("td", { class: `number ${look}` }, money(value / 1e6));

export function bookRow(one) {
  const calls = one.calls.slice(0, NAMED).flatMap(({ request_id: id }) => [
    " ",
    h("a", { class: "mono", href: link(`/requests/${id}`), title: id }, `…${id.slice(-12)}`),
  ]);
  const more = one.calls.length > NAMED ? ` and ${count(one.calls.length - NAMED)} more` : "";
  return h(
    "tr",
    { data: { verdict: one.verdict } },
    h("td", {}, one.day),
    h("td", { class: "wide" }, one.upstream),
    h("th", { scope: "row", class: "name", title: one.model }, one.model || "(none)"),
    micros(one.ours_micros, "wide"),
    micros(one.theirs_micros, "wide"),
    micros(one.difference_micros, ""),
    h("td", {}, h("span", { class: `badge ${LOOKS[one.verdict] ?? ""}` }, capital(one.verdict))),
    h("td", { class: "wrap wide" }, one.reason, calls, more),
  );
}
