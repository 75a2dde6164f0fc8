// Try it: submit a text, files or a wish for an image, and see the answer come.

import { get } from "../api.js";
import { fill, h } from "../dom.js";
import { bytes } from "../format.js";
import { choice, field, said } from "../ui.js";
import { KINDS } from "./request_words.js";
import { answering } from "./try_answer.js";

const MOST_FILES = 10;
const WAYS = { stream: "Stream the answer", job: "Run as background job" };
const EXAMPLES = [
  "Explain in three sentences what a tidal gate is for.",
  "Generate an image of a lighthouse at dusk.",
];

export async function open(main, { signal }) {
  const { asks_for: asksFor } = await get("dashboard/session", { signal });
  const files = filesPicker();
  const text = textField();
  const more = options(asksFor);
  let way = "stream";
  const go = h("button", { class: "button main", type: "submit" }, "Send");
  const stop = h("button", { class: "button", type: "button", hidden: true }, "Stop");
  const wrong = h("p", { class: "notice bad", role: "alert", hidden: true });
  const shown = answering(signal);

  async function send() {
    wrong.hidden = true;
    [text, ...more.fields].forEach((one) => one.complain(""));
    if (!text.value() && files.list.length === 0) {
      text.complain("Write something, or add a file.");
      text.input.focus();
      return;
    }
    [go.disabled, stop.hidden] = [true, false];
    const asked = { text: text.value(), files: files.list, ...more.values() };
    const problem = await shown.run(way, asked);
    [go.disabled, stop.hidden] = [false, true];
    if (problem === null) return;
    const names = { data: text, text, files: text, file: text };
    const at = names[problem.field] ?? more.fields.find((one) => one.name === problem.field);
    if (at) at.complain(said(problem));
    else {
      wrong.hidden = false;
      fill(wrong, said(problem));
    }
  }

  stop.addEventListener("click", () => shown.stop());
  const form = h(
    "form",
    { class: "card card-body try-form", novalidate: true, "aria-label": "What to ask" },
    text.element,
    h("div", { class: "examples" }, EXAMPLES.map((one) => example(one, text))),
    files.element,
    choice("How it is sent", WAYS, way, (chosen) => {
      way = chosen;
    }),
    more.element,
    wrong,
    h("div", { class: "try-actions" }, go, stop, h("span", { class: "quiet-text" }, "Ctrl + Enter sends")),
  );
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    send();
  });
  form.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !go.disabled) form.requestSubmit();
  });
  main.append(
    h("div", { class: "page-head" }, h("h1", {}, "Try it")),
    h("div", { class: "try" }, form, shown.element),
  );
}

function textField() {
  const id = "try-text";
  const input = h("textarea", { id, name: "data", rows: "7", "aria-describedby": `${id}-says` });
  const says = h("span", { id: `${id}-says`, class: "hint" });
  return {
    input,
    element: h("div", { class: "field" }, h("label", { for: id }, "Prompt"), input, says),
    value: () => input.value.trim(),
    complain: (words) => {
      input.setAttribute("aria-invalid", words ? "true" : "false");
      says.className = words ? "wrong" : "hint";
      fill(says, words);
    },
  };
}

function example(words, text) {
  const button = h("button", { class: "button small quiet example", type: "button" }, words);
  button.addEventListener("click", () => {
    text.input.value = words;
    text.input.focus();
  });
  return button;
}

/** Files, dropped or chosen; `list` is what is to be sent. */
function filesPicker() {
  const list = [];
  const input = h("input", { type: "file", multiple: true, class: "visually-hidden", id: "try-files" });
  const names = h("ul", { class: "picked" });
  const label = h(
    "label",
    { for: "try-files" },
    h("strong", {}, "Add files"),
    h("span", { class: "quiet-text" }, "or drop them here"),
  );
  const zone = h("div", { class: "drop" }, input, label, names);

  function add(chosen) {
    list.push(...[...chosen].slice(0, MOST_FILES - list.length));
    paint();
  }

  function paint() {
    fill(
      names,
      list.map((file, at) => {
        const words = `Remove ${file.name}`;
        const away = h("button", { class: "button small quiet", type: "button", "aria-label": words }, "✕");
        away.addEventListener("click", () => {
          list.splice(at, 1);
          paint();
          input.focus();
        });
        return h("li", {}, h("span", { class: "wrap" }, file.name), h("span", { class: "quiet-text" }, bytes(file.size)), away);
      }),
    );
  }

  input.addEventListener("change", () => {
    add(input.files);
    input.value = "";
  });
  const over = (on) => (event) => {
    event.preventDefault();
    zone.classList.toggle("over", on);
  };
  zone.addEventListener("dragover", over(true));
  zone.addEventListener("dragleave", over(false));
  zone.addEventListener("drop", (event) => {
    over(false)(event);
    add(event.dataTransfer.files);
  });
  return { element: zone, list };
}

/** What may be left as it is. */
function options(asksFor) {
  const fields = [
    field("type", "Kind", { options: { "": "Automatic", ...KINDS }, hint: "Automatic: by the prompt." }),
    field("model", "Model", { hint: "Empty: the one set for the kind." }),
    field("image_uri", "Picture's address", { type: "url", hint: "Fetched by the gateway." }),
    field("priority", "Priority", { type: "number", hint: "From −100 to 100." }),
    field("deadline_ms", "Deadline (ms)", { type: "number", hint: "Until it is admitted." }),
    asksFor === "keys"
      ? field("key", "API key", { type: "password", hint: "With the scope infer. Empty: the key of this tab." })
      : field("tenant", "Tenant", { hint: "Empty: default." }),
  ];
  const element = h(
    "details",
    { class: "more-filters" },
    h("summary", {}, "Options"),
    h("div", { class: "filters" }, fields.map((one) => one.element)),
  );
  return {
    element,
    fields,
    values: () => Object.fromEntries(fields.map((one) => [one.name, one.value()])),
  };
}
