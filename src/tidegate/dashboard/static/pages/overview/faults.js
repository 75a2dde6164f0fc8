// Refused, throttled and failed calls, with their causes.

import { h, keyed, say } from "../../dom.js";
import { brief, count } from "../../format.js";
import { link } from "../../router.js";

const OTHERS = "others";
const KINDS = {
  told_429: ["429 to clients", "429 responses that clients received from this gateway"],
  throttled: ["429 from upstreams", "Calls that a provider answered with 429"],
  refused: ["Rejected", "Rejected before queueing, such as for a wrong key, a used-up budget or a body that is too large"],
  expired: ["Deadline exceeded", "Not admitted before their deadline"],
  retried: ["Retries", "Attempts after which a job returned to its queue"],
  failed: ["Failed", "Requests that failed permanently"],
  cancelled: ["Cancelled", "Cancelled by their clients"],
};

export function faultsCard() {
  const figures = {};
  const list = Object.entries(KINDS).map(([name, [label, title]]) => {
    figures[name] = h("dd", { class: "figures" });
    return h("div", { title }, h("dt", {}, label), figures[name]);
  });
  const codes = h("ol", { class: "bars" });
  const draw = keyed(codes, ([code]) => {
    const figure = h("span", { class: "figures" });
    const bar = h("span", { class: "bar bad" });
    const to = { href: link("/requests", { error: code }), title: `Requests with ${code}` };
    const name = code === OTHERS ? code : h("a", to, code);
    const element = h("li", {}, h("code", {}, name), h("span", { class: "bar-room" }, bar), figure);
    return {
      element,
      update([, amount, most]) {
        bar.style.width = `${(amount / most) * 100}%`;
        say(figure, brief(amount));
      },
    };
  });
  const none = h("p", { class: "quiet-text" }, "No errors.");
  const span = h("span", { class: "quiet-text" });
  return {
    element: h(
      "section",
      { class: "card", "aria-label": "429s and failures" },
      h("div", { class: "card-head" }, h("h2", {}, "429s and failures"), span),
      h("div", { class: "card-body faults" }, h("dl", { class: "pairs" }, list), none, codes),
    ),
    trend(frame) {
      say(span, `last ${frame.words}`);
      for (const name of Object.keys(KINDS)) say(figures[name], count(frame.totals[name] ?? 0));
      const most = Math.max(1, ...frame.codes.map(([, amount]) => amount));
      none.hidden = frame.codes.length > 0;
      draw(
        frame.codes.map(([code, amount]) => [code || OTHERS, amount, most]),
        ([code]) => code,
      );
    },
  };
}
