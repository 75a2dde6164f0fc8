// First steps, on the overview of a deployment without a request on record.

import { get, Problem } from "../../api.js";
import { h } from "../../dom.js";
import { link } from "../../router.js";
import { copied, toast } from "../../ui.js";
import { command } from "../request_curl.js";

/** A card for a deployment whose default model is `text_model`; `asks_for` as in the session. */
export function firstSteps({ text_model: model, asks_for: asksFor }, signal) {
  const needsKey = asksFor === "keys";
  const body = JSON.stringify({ model, messages: [{ role: "user", content: "Say hello" }] });
  const shown = h("pre", { class: "text code", tabindex: "0", role: "region", "aria-label": "A first request" }, command("/v1/chat/completions", body, { needsKey }));
  const copy = h("button", { class: "button small", type: "button" }, "Copy");
  copy.addEventListener("click", async () => {
    if (await copied(shown.textContent, shown)) toast("Copied.");
    else toast("The browser does not allow copying. The command is selected: press Ctrl + C.", "bad");
  });
  const base = new URL("..", document.baseURI).href.replace(/\/$/, "");
  const steps = [
    needsKey && [h("b", {}, "Create a key"), " under ", h("a", { href: link("/tenants") }, "Keys and tenants"), ": callers need one here."],
    [h("b", {}, "Send a request."), " Set the base URL of your SDK to ", h("code", {}, `${base}/v1`), " (OpenAI) or ", h("code", {}, base), " (Anthropic, Gemini), or run:", shown, h("div", { class: "first-acts" }, copy, h("a", { class: "button small quiet", href: link("/try") }, "Open the playground"))],
    [h("b", {}, "See a limit hold."), " Change the limit of a type below to 1, and send several requests together: they wait instead of failing."],
    [h("b", {}, "Call your provider."), " Add its key under ", h("a", { href: link("/upstreams") }, "Upstreams"), "."],
  ];
  const element = h(
    "section",
    { class: "card", "aria-label": "First steps", hidden: true },
    h("div", { class: "card-head" }, h("h2", {}, "First steps"), h("span", { class: "quiet-text" }, "until the first request is on record")),
    h("ol", { class: "first-steps card-body" }, steps.filter(Boolean).map((one) => h("li", {}, one))),
  );
  let isLooked = false;
  return {
    element,
    /** Show the card if no request is on record, which is looked up once; hide it after the first. */
    async record({ spent }) {
      if (spent.month.total.requests > 0) element.hidden = true;
      else if (!isLooked) {
        isLooked = true;
        try {
          const { items } = await get("admin/requests", { query: { limit: 1 }, signal });
          element.hidden = items.length > 0;
        } catch (error) {
          if (!signal.aborted && !(error instanceof Problem)) throw error;
        }
      }
    },
  };
}
