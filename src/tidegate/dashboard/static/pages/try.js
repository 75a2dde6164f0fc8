// The playground: a prompt or a conversation with one or two models, by any API that the gateway
// serves.

import { get, Problem } from "../api.js";
import { fill, h, mark } from "../dom.js";
import { bytes } from "../format.js";
import * as session from "../session.js";
import { field, said } from "../ui.js";
import { KINDS } from "./request_words.js";
import { answering, callOf, STOPPED } from "./try_answer.js";
import { codeCard } from "./try_code.js";
import { APIS, readFile } from "./try_dialects.js";

const MOST_FILES = 10;
const LOOKED_BACK_DAYS = 30;
const DAY_MS = 86_400_000;
const ANY = "Chosen by Tidegate";
const DEFAULT = "default"; // the tenant of calls that name none, where no key is required
const OF_KEY = "That of the API key";
const OWN_KEY = /^tg_/;
const OF_PROMPTS = ["gemini", "openai", "anthropic"]; // dialects in which prompts are sent
const CLOSED = ["drained", "draining", "missing"]; // states without new calls
const EXAMPLES = [
  "Explain in three sentences what a tidal gate is for.",
  "Generate an image of a lighthouse at dusk.",
];

export async function open(main, { signal }) {
  const [{ asks_for: asksFor }, upstreams, used, tenants] = await Promise.all([
    get("dashboard/session", { signal }),
    get("admin/upstreams", { signal }),
    recently("model", signal),
    session.may("operator") ? tenantsKnown(signal) : [],
  ]);
  const files = filesPicker();
  const text = textField();
  const more = options(asksFor);
  const caller = callerOf(asksFor === "keys", tenants, more.showKey);
  const target = targetOf(upstreams.upstreams.filter((one) => !CLOSED.includes(one.state)), used, caller.field, apiChosen);
  const go = h("button", { class: "button main", type: "submit" }, "Send");
  const stop = h("button", { class: "button", type: "button", hidden: true }, "Stop");
  const again = h("button", { class: "button", type: "button", hidden: true }, "New conversation");
  const wrong = h("p", { class: "notice bad", role: "alert", hidden: true });
  const sides = [answering("Answer", signal), answering("Second answer", signal)];
  const code = codeCard(() => sides[0].sent() ?? callOf(asked(), target.models()[0] ?? "", []));
  const place = h("div", { class: "try-sides" }, sides[0].element);

  function asked(read = []) {
    const given = { ...more.values(), tenant: caller.named() };
    return { api: target.api(), text: text.value(), files: read, options: given, as: caller.as(), pools: target.pools };
  }

  function apiChosen() {
    more.show(APIS[target.api()].dialect);
    code.draw();
  }

  async function send() {
    wrong.hidden = true;
    [text, ...target.fields, ...more.fields].forEach((one) => one.complain(""));
    if (!text.value() && files.list.length === 0) {
      text.complain("Enter a prompt, or add a file.");
      text.input.focus();
      return;
    }
    const wrongNumber = more.fields.find((one) => Number.isNaN(one.value()));
    if (wrongNumber) {
      wrongNumber.complain("Must be a whole number.");
      wrongNumber.input.focus();
      return;
    }
    if (!target.isSound()) return;
    const models = target.models();
    [go.disabled, stop.hidden] = [true, false];
    if (models.length > 1) place.append(sides[1].element);
    else sides[1].element.remove();
    const isChat = APIS[target.api()].dialect !== null;
    const read = await filesRead();
    if (read === null) {
      [go.disabled, stop.hidden] = [false, true];
      return;
    }
    const sent = asked(read);
    const running = models.map((model, at) => sides[at].run(sent, model));
    code.draw();
    const unanswered = (await Promise.all(running)).filter((one) => one !== null);
    const problems = unanswered.filter((one) => one !== STOPPED);
    if (signal.aborted) return;
    [go.disabled, stop.hidden] = [false, true];
    again.hidden = !sides.some((one) => one.turns().length);
    if (isChat && unanswered.length < models.length) {
      // Text and files added meanwhile are kept for the next turn.
      if (text.value() === sent.text) text.input.value = "";
      files.drop(sent.files.map((one) => one.file));
      text.input.focus();
    }
    if (problems.length) complain(problems[0]);
  }

  /** Return the selected files; null if one cannot be read. */
  async function filesRead() {
    const read = files.list.map((file) =>
      readFile(file).then(
        (found) => ({ ...found, file }),
        () => complain(new Problem({ detail: `${file.name} can't be read: it has changed since it was chosen, or is a folder.`, field: "files" })),
      ),
    );
    const found = await Promise.all(read);
    return found.every(Boolean) ? found : null;
  }

  function complain(problem) {
    const names = { data: text, text, files: text, file: text, as_tenant: caller.field };
    // In a native call an option is a header, such as `X-Tidegate-Deadline-Ms`.
    const name = problem.field?.toLowerCase().replace(/^x-tidegate-/, "").replaceAll("-", "_");
    const at = names[name] ?? [...target.fields, ...more.fields].find((one) => one.name === name);
    if (at) {
      at.complain(said(problem));
      const folded = at.element.closest("details");
      if (folded) folded.open = true;
    } else {
      wrong.hidden = false;
      fill(wrong, said(problem));
    }
  }

  stop.addEventListener("click", () => sides.forEach((one) => one.stop()));
  again.addEventListener("click", () => {
    sides.forEach((one) => one.clear());
    again.hidden = true;
    text.input.focus();
    code.draw();
  });
  const form = h(
    "form",
    { class: "card card-body try-form", novalidate: true, "aria-label": "Request" },
    target.element,
    text.element,
    h("div", { class: "examples" }, EXAMPLES.map((one) => example(one, text))),
    files.element,
    more.element,
    wrong,
    h("div", { class: "try-actions" }, go, stop, again, h("span", { class: "quiet-text" }, "Ctrl + Enter sends")),
  );
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    send();
  });
  form.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !go.disabled) form.requestSubmit();
  });
  form.addEventListener("change", () => code.draw());
  apiChosen();
  main.append(
    h("div", { class: "page-head" }, h("h1", {}, "Playground")),
    h("div", { class: "try" }, form, place),
    code.element,
  );
}

/** Return the models or the tenants of recent calls, most requests first. */
async function recently(by, signal) {
  const day = (at) => new Date(at).toISOString().slice(0, 10);
  const span = { since: day(Date.now() - LOOKED_BACK_DAYS * DAY_MS), until: day(Date.now()) };
  const { rows } = await get("admin/usage", { query: { by, ...span }, signal });
  return rows.filter((one) => one[by]).toSorted((a, b) => b.requests - a.requests).map((one) => one[by]);
}

/** Return the names of all enabled tenants, and of those that only appear in recent calls. */
async function tenantsKnown(signal) {
  const [kept, recent] = await Promise.all([get("admin/tenants", { signal }), recently("tenant", signal)]);
  const disabled = new Set(kept.filter((one) => one.disabled).map((one) => one.tenant));
  const names = new Set([...kept.map((one) => one.tenant), ...recent]);
  return [...names].filter((one) => !disabled.has(one)).toSorted((a, b) => a.localeCompare(b));
}

/**
 * The field for the tenant. `as()`: as which an operator calls, empty if with a key; `named()`: the
 * tenant that the call itself names, where no key is required.
 */
function callerOf(needsKey, tenants, showKey) {
  if (!session.may("operator")) {
    const own = needsKey
      ? field("tenant", "Tenant", { options: { "": OF_KEY }, disabled: true, title: session.whyNot("operator") })
      : field("tenant", "Tenant", { placeholder: DEFAULT });
    return { field: own, as: () => "", named: own.value };
  }
  const known = needsKey || tenants.includes(DEFAULT) ? tenants : [DEFAULT, ...tenants];
  const own = session.key() ?? "";
  const isOther = !needsKey || (!OWN_KEY.test(own) && known.includes(DEFAULT));
  const chosen = field("tenant", "Tenant", {
    options: { ...(needsKey ? { "": OF_KEY } : {}), ...Object.fromEntries(known.map((one) => [one, one])) },
    value: isOther ? DEFAULT : "",
    hint: "Its limits, budgets and models apply.",
  });
  const show = () => showKey(chosen.value() === "");
  chosen.input.addEventListener("change", show);
  show();
  return { field: chosen, as: chosen.value, named: () => (needsKey || chosen.value() === DEFAULT ? "" : chosen.value()) };
}

/** Fields for the API, the upstream, and one or two models: `fields`, `api()`, `models()`. */
function targetOf(upstreams, used, tenant, changed) {
  const servedBy = (dialect) => upstreams.filter((one) => Object.hasOwn(one.base_urls, dialect));
  const apis = Object.entries(APIS).filter(([, { dialect }]) => dialect === null || servedBy(dialect).length > 0);
  const api = field("api", "API", { options: Object.fromEntries(apis.map(([name, { words }]) => [name, words])) });
  const upstream = field("upstream", "Upstream", { options: { "": ANY } });
  const list = h("datalist", { id: "try-models" });
  const model = field("model", "Model", { list: "try-models", spellcheck: "false" });
  const second = field("second", "Compare with", { list: "try-models", spellcheck: "false", placeholder: "a second model" });
  const dialect = () => APIS[api.value()].dialect;

  const ofPrompts = upstreams.filter((one) => OF_PROMPTS.some((dialect) => Object.hasOwn(one.base_urls, dialect)));
  const among = () => (dialect() === null ? ofPrompts : servedBy(dialect()));

  /**
   * Return the upstreams that a model can go to: those that name it, else those that accept any.
   */
  function serving(name) {
    const naming = among().filter((one) => one.models.some((pattern) => pattern !== "*" && isLike(pattern, name)));
    return (naming.length ? naming : among().filter((one) => one.models.includes("*"))).map((one) => one.name);
  }

  /**
   * Return whether a call of the model goes to the selected upstream: only if no other upstream
   * serves the model.
   */
  const isFor = (chosen) => (name) => {
    const names = serving(name);
    return names.length > 0 && (chosen === "" || (names.length === 1 && names[0] === chosen));
  };

  function show() {
    const names = among().map((one) => one.name);
    const chosen = names.includes(upstream.value()) ? upstream.value() : "";
    const choices = { "": ANY, ...Object.fromEntries(names.map((name) => [name, name])) };
    fill(upstream.input, Object.entries(choices).map(([value, words]) => h("option", { value, selected: value === chosen }, words)));
    const named = among().flatMap((one) => one.models).filter((one) => !one.includes("*"));
    const known = [...new Set([...named, ...used])].filter(isFor(chosen));
    fill(list, known.map((value) => h("option", { value })));
    const isNeeded = dialect() !== null || chosen !== "";
    mark(model.input, "placeholder", isNeeded ? (known[0] ?? "required") : "the default of the type");
    if (chosen !== "" && !isFor(chosen)(model.value())) model.input.value = "";
    if (isNeeded && !model.value() && known.length) model.input.value = known[0];
    model.complain("");
    second.complain("");
    const own = { prompt: "Each prompt is sent on its own.", job: "Each prompt is sent on its own." }[api.value()] ?? "Earlier turns are sent along.";
    api.complain("");
    fill(says, chosen === "" ? `${own} Upstreams: ${names.join(", ")}.` : `${own} Only models that no other upstream serves are offered, so that calls go to ${chosen}.`);
  }

  const says = h("p", { class: "quiet-text try-served" });
  api.input.addEventListener("change", () => {
    show();
    changed();
  });
  upstream.input.addEventListener("change", show);
  show();
  return {
    fields: [api, upstream, tenant, model, second],
    element: h("div", { class: "try-target" }, api.element, upstream.element, tenant.element, model.element, second.element, list, says),
    api: () => api.value(),
    /** Return the upstreams that a call of the model may go to. */
    pools(name) {
      const known = serving(name);
      return among().filter((one) => one.limits !== null && (!known.length || known.includes(one.name))).map((one) => one.name);
    },
    models: () => [model.value(), second.value()].filter((one, at) => at === 0 || one),
    isSound() {
      const chosen = upstream.value();
      for (const one of [model, second].filter((field, at) => at === 0 || field.value())) {
        const wrong = wrongModel(one.value(), chosen, dialect() === null, serving);
        if (!wrong) continue;
        one.complain(wrong);
        one.input.focus();
        return false;
      }
      return true;
    },
  };
}

/** Return why a call of the model cannot be sent to the selected upstream; empty if it can. */
function wrongModel(name, chosen, hasUsual, serving) {
  if (!name && chosen === "") return hasUsual ? "" : "Enter a model: this API has no default.";
  if (!name) return `Enter a model that only ${chosen} serves.`;
  if (chosen === "") return "";
  const others = serving(name).filter((one) => one !== chosen);
  if (others.length) return `${others.join(", ")} ${others.length > 1 ? "serve" : "serves"} this model too, so the call could go there.`;
  return serving(name).length ? "" : `${chosen} does not serve this model.`;
}

const isLike = (pattern, name) => new RegExp(`^${pattern.split("*").map(RegExp.escape ?? escaped).join(".*")}$`).test(name);
const escaped = (text) => text.replaceAll(/[.+?^${}()|[\]\\]/g, "\\$&");

function textField() {
  const id = "try-text";
  const input = h("textarea", { id, name: "data", rows: "6", "aria-describedby": `${id}-says` });
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

/** Files, dropped or selected; `list` contains those to be sent. */
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
  return {
    element: zone,
    list,
    drop(sent) {
      list.splice(0, list.length, ...list.filter((one) => !sent.includes(one)));
      paint();
    },
  };
}

/** Optional fields. `show(dialect)` shows those of an API; null is Tidegate's own. */
function options(asksFor) {
  const own = [
    field("type", "Type", { options: { "": "Automatic", ...KINDS }, hint: "Automatic: determined by the prompt." }),
    field("image_uri", "Picture URL", { type: "url", hint: "Fetched by the gateway." }),
  ];
  const natives = [
    field("system", "Instructions", { hint: "The system prompt of the conversation." }),
    field("most", "Maximum output tokens", { type: "number", hint: "Empty: the model's maximum." }),
  ];
  const always = [
    field("priority", "Priority", { type: "number", hint: "From −100 to 100." }),
    field("deadline_ms", "Deadline (ms)", { type: "number", hint: "Maximum wait for admission." }),
  ];
  const key = field("key", "API key", { type: "password", hint: "Needs the scope infer. Empty: the key that you signed in with." });
  if (asksFor === "keys") always.push(key);
  const fields = [...own, ...natives, ...always];
  const element = h(
    "details",
    { class: "more-filters" },
    h("summary", {}, "Options"),
    h("div", { class: "filters" }, fields.map((one) => one.element)),
  );
  return {
    element,
    fields,
    show(dialect) {
      for (const one of own) one.element.hidden = dialect !== null;
      for (const one of natives) one.element.hidden = dialect === null;
    },
    /** Show the field for the key, or hide and empty it. */
    showKey(isShown) {
      key.element.hidden = !isShown;
      if (!isShown) key.input.value = "";
    },
    values: () => Object.fromEntries(fields.map((one) => [one.name, one.value()])),
  };
}
