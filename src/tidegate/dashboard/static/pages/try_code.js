// A call of the playground as code: curl, Python and TypeScript. The key is a variable in each.

import { fill, h } from "../dom.js";
import { choice, copied, toast } from "../ui.js";
import { quoted } from "./request_curl.js";
import { APIS, FileData } from "./try_dialects.js";

const LANGUAGES = { curl: "curl", python: "Python", typescript: "TypeScript" };
const JSON_TYPE = { "Content-Type": "application/json" };

/** Return the URL of a path of this gateway. */
const urlOf = (path) => new URL(`..${path}`, document.baseURI).href;
const base = (path = "") => urlOf(path || "/").replace(/\/$/, "");

/**
 * Return the code of a call `{ api, model, body, headers, files }`, with headers besides the key
 * and the type.
 */
export const codeOf = (language, call) => WRITERS[language](call);

const WRITERS = { curl, python, typescript };

// -- curl

function curl(call) {
  const { api, model, body, headers } = call;
  const isForm = APIS[api].dialect === null && call.files.length > 0;
  const all = { ...APIS[api].headers, ...headers, ...(isForm ? {} : JSON_TYPE) };
  const lines = [
    `curl -N ${quoted(urlOf(APIS[api].path(model)))}`,
    '  -H "Authorization: Bearer $TIDEGATE_API_KEY"',
    ...Object.entries(all).map(([name, value]) => `  -H ${quoted(`${name}: ${value}`)}`),
  ];
  if (isForm) {
    for (const [name, value] of Object.entries(body)) lines.push(`  --form-string ${quoted(`${name}=${value}`)}`);
    for (const one of call.files) lines.push(`  -F ${quoted(`files=@"${one.name.replaceAll(/["\\]/g, "\\$&")}";type=${one.type}`)}`);
    return lines.join(" \\\n");
  }
  const pieces = cut(body);
  if (pieces.length === 1) return [...lines, `  -d ${quoted(pieces[0])}`].join(" \\\n");
  // `printf` is a shell builtin; most files are too long for an argument of a program.
  const words = pieces.map((one) => (typeof one === "string" ? quoted(one) : `"$(base64 < ${quoted(one.name)} | tr -d '\\n')"`));
  return `printf %s ${words.join(" \\\n  ")} |\n${[...lines, "  -d @-"].join(" \\\n")}`;
}

/** Return a body as JSON, split where the content of a file belongs. */
function cut(body) {
  const files = [];
  const mark = `file-${crypto.randomUUID()}-`;
  const named = replaced(body, (one) => {
    files.push(one);
    return `${one.prefix}${mark}${files.length - 1}-`;
  });
  return JSON.stringify(named)
    .split(new RegExp(`${mark}(\\d+)-`))
    .map((piece, at) => (at % 2 ? files[Number(piece)] : piece));
}

function replaced(value, put) {
  if (value instanceof FileData) return put(value);
  if (Array.isArray(value)) return value.map((one) => replaced(one, put));
  if (value === null || typeof value !== "object") return value;
  return Object.fromEntries(Object.entries(value).map(([name, one]) => [name, replaced(one, put)]));
}

// -- Python

const PYTHON = {
  words: new Map([[true, "True"], [false, "False"], [null, "None"]]),
  name: (name) => JSON.stringify(name),
  file: ({ name, prefix }) => {
    const read = `base64.b64encode(open(${JSON.stringify(name)}, "rb").read()).decode()`;
    return prefix ? `${JSON.stringify(prefix)} + ${read}` : read;
  },
};

function python(call) {
  const { api, body } = call;
  const needs = cut(body).length > 1 ? "import base64\nimport os\n" : "import os\n";
  const literal = (value, depth = 1) => written(value, PYTHON, depth);
  const args = (values) => Object.entries(values).map(([name, value]) => `    ${name}=${literal(value)},\n`).join("");
  const key = 'os.environ["TIDEGATE_API_KEY"]';
  const extra = Object.keys(call.headers).length ? `    default_headers=${literal(call.headers)},\n` : "";
  if (api === "chat" || api === "responses") {
    const [create, loop] = {
      chat: ["chat.completions", '    if chunk.choices:\n        print(chunk.choices[0].delta.content or "", end="")\n'],
      responses: ["responses", '    if chunk.type == "response.output_text.delta":\n        print(chunk.delta, end="")\n'],
    }[api];
    return `${needs}\nfrom openai import OpenAI\n\nclient = OpenAI(\n    base_url=${literal(base("/v1"))},\n    api_key=${key},\n${extra})\nstream = client.${create}.create(\n${args(body)})\nfor chunk in stream:\n${loop}`;
  }
  if (api === "messages") {
    return `${needs}\nfrom anthropic import Anthropic\n\nclient = Anthropic(\n    base_url=${literal(base())},\n    api_key=${key},\n${extra})\nstream = client.messages.create(\n${args(body)})\nfor event in stream:\n    if event.type == "content_block_delta" and event.delta.type == "text_delta":\n        print(event.delta.text, end="")\n`;
  }
  if (api === "generate") return geminiPython(call, literal, key);
  return plainPython(call, literal, key);
}

/** Return the SDK's arguments besides the contents. */
function geminiConfig({ systemInstruction, generationConfig }) {
  return { ...(systemInstruction ? { systemInstruction: systemInstruction.parts[0].text } : {}), ...generationConfig };
}

function geminiPython({ model, body, headers }, literal, key) {
  const bytes = { ...PYTHON, file: ({ name }) => `open(${JSON.stringify(name)}, "rb").read()` };
  const more = Object.keys(headers).length ? `, headers=${literal(headers)}` : "";
  const config = geminiConfig(body);
  const configured = Object.keys(config).length ? `    config=${literal(config)},\n` : "";
  return `import os\n\nfrom google import genai\nfrom google.genai import types\n\nclient = genai.Client(\n    api_key=${key},\n    http_options=types.HttpOptions(base_url=${literal(base())}${more}),\n)\nstream = client.models.generate_content_stream(\n    model=${literal(model)},\n    contents=${written(body.contents, bytes, 1)},\n${configured})\nfor chunk in stream:\n    print(chunk.text or "", end="")\n`;
}

/** Return code that uses HTTP, for APIs without a suitable SDK. */
function plainPython(call, literal, key) {
  const { api, model, body, files, headers } = call;
  const isForm = files.length > 0 && APIS[api].dialect === null;
  const shown = Object.entries(headers).map(([name, value]) => `, ${literal(name)}: ${literal(value)}`).join("");
  const values = isForm ? Object.fromEntries(Object.entries(body).map(([name, value]) => [name, String(value)])) : body;
  const listed = files.map((one) => `    ("files", (${literal(one.name)}, open(${literal(one.name)}, "rb"), ${literal(one.type)})),\n`).join("");
  const sent = isForm ? `data=${literal(values)}, files=[\n${listed}]` : `json=${literal(values, 0)}`;
  const imports = cut(body).length > 1 ? "import base64\nimport json\nimport os\n" : "import json\nimport os\n";
  const url = literal(urlOf(APIS[api].path(model)));
  const begin = `${api === "prompt" ? imports : imports.replace("import json\n", "")}\nimport httpx\n\nheaders = {"Authorization": "Bearer " + ${key}${shown}}\n`;
  if (api === "prompt") {
    return `${begin}event = ""\nwith httpx.stream("POST", ${url}, headers=headers, timeout=None, ${sent}) as answer:\n    answer.raise_for_status()\n    for line in answer.iter_lines():\n        if line.startswith("event: "):\n            event = line[7:]\n        elif line.startswith("data: ") and event == "delta":\n            print(json.loads(line[6:])["text"], end="")\n`;
  }
  const asked = `${begin}answer = httpx.post(${url}, headers=headers, timeout=None, ${sent})\nanswer.raise_for_status()\n`;
  if (api !== "job") return `${asked}for part in answer.json()["output"]["message"]["content"]:\n    print(part.get("text", ""), end="")\n`;
  const status = `${literal(`${base("/status")}/`)} + answer.json()["request_id"]`;
  return `${asked}url = ${status}\njob = {"status": "queued"}\nwhile job["status"] in ("queued", "running"):\n    job = httpx.get(url, headers=headers, params={"wait": 30}, timeout=None).json()\nprint(job.get("text") or job["status"])\n`;
}

// -- TypeScript

const TYPESCRIPT = {
  words: new Map(),
  name: (name) => (/^[a-z_]\w*$/i.test(name) ? name : JSON.stringify(name)),
  file: ({ name, prefix }) => {
    const read = `readFileSync(${JSON.stringify(name)}).toString("base64")`;
    return prefix ? `${JSON.stringify(prefix)} + ${read}` : read;
  },
};

function typescript(call) {
  const { api, model, body, headers } = call;
  const literal = (value, depth = 0) => written(value, TYPESCRIPT, depth);
  const key = "process.env.TIDEGATE_API_KEY";
  const fs = cut(body).length > 1 ? 'import { readFileSync } from "node:fs";\n' : "";
  const extra = Object.keys(headers).length ? `,\n  defaultHeaders: ${literal(headers, 1)}` : "";
  if (api === "chat" || api === "responses") {
    const [create, piece] = {
      chat: ["chat.completions", 'process.stdout.write(chunk.choices[0]?.delta?.content ?? "");'],
      responses: ["responses", 'if (chunk.type === "response.output_text.delta") process.stdout.write(chunk.delta);'],
    }[api];
    return `${fs}import OpenAI from "openai";\n\nconst client = new OpenAI({\n  baseURL: ${literal(base("/v1"))},\n  apiKey: ${key}${extra},\n});\nconst stream = await client.${create}.create(${literal(body)});\nfor await (const chunk of stream) ${piece}\n`;
  }
  if (api === "messages") {
    return `${fs}import Anthropic from "@anthropic-ai/sdk";\n\nconst client = new Anthropic({\n  baseURL: ${literal(base())},\n  apiKey: ${key}${extra},\n});\nconst stream = await client.messages.create(${literal(body)});\nfor await (const event of stream) {\n  if (event.type === "content_block_delta" && event.delta.type === "text_delta") process.stdout.write(event.delta.text);\n}\n`;
  }
  if (api === "generate") {
    const config = geminiConfig(body);
    const asked = { model, contents: body.contents, ...(Object.keys(config).length ? { config } : {}) };
    const more = Object.keys(headers).length ? `, headers: ${literal(headers, 1)}` : "";
    return `${fs}import { GoogleGenAI } from "@google/genai";\n\nconst client = new GoogleGenAI({\n  apiKey: ${key},\n  httpOptions: { baseUrl: ${literal(base())}${more} },\n});\nconst stream = await client.models.generateContentStream(${literal(asked)});\nfor await (const chunk of stream) process.stdout.write(chunk.text ?? "");\n`;
  }
  return plainTypescript(call, literal, fs);
}

function plainTypescript({ api, model, body, headers, files }, literal, fs) {
  const isForm = files.length > 0 && APIS[api].dialect === null;
  const shown = { ...headers, ...(isForm ? {} : JSON_TYPE) };
  const head = ["Authorization: `Bearer ${process.env.TIDEGATE_API_KEY}`", ...Object.entries(shown).map(([name, value]) => `${TYPESCRIPT.name(name)}: ${literal(value)}`)];
  const url = literal(urlOf(APIS[api].path(model)));
  const form = [
    "const form = new FormData();\n",
    ...Object.entries(body).map(([name, value]) => `form.append(${literal(name)}, ${literal(String(value))});\n`),
    ...files.map((one) => `form.append("files", new Blob([readFileSync(${literal(one.name)})], { type: ${literal(one.type)} }), ${literal(one.name)});\n`),
  ].join("");
  const imports = isForm ? 'import { readFileSync } from "node:fs";\n\n' : fs && `${fs}\n`;
  const sent = isForm ? "form" : `JSON.stringify(${literal(body, 1)})`;
  const asked = `${imports}${isForm ? form : ""}const headers = { ${head.join(", ")} };\nconst answer = await fetch(${url}, {\n  method: "POST",\n  headers,\n  body: ${sent},\n});\nif (!answer.ok) throw new Error(await answer.text());\n`;
  if (api === "prompt") return `${asked}process.stdout.write(await answer.text()); // server-sent events\n`;
  if (api !== "job") return `${asked}const { output } = await answer.json();\nfor (const part of output.message.content) process.stdout.write(part.text ?? "");\n`;
  return `${asked}const { request_id } = await answer.json();\nlet job = { status: "queued", text: "" };\nwhile (job.status === "queued" || job.status === "running") {\n  const status = await fetch(${literal(`${base("/status")}/`)} + request_id + "?wait=30", { headers });\n  job = await status.json();\n}\nconsole.log(job.text ?? job.status);\n`;
}

/** Return a value as an indented literal of a language. */
function written(value, language, depth) {
  if (value instanceof FileData) return language.file(value);
  if (language.words.has(value)) return language.words.get(value);
  if (value === null || typeof value !== "object") return JSON.stringify(value);
  const unit = language === TYPESCRIPT ? "  " : "    ";
  const [open, close] = Array.isArray(value) ? "[]" : "{}";
  const inner = Array.isArray(value)
    ? value.map((one) => written(one, language, depth + 1))
    : Object.entries(value).map(([name, one]) => `${language.name(name)}: ${written(one, language, depth + 1)}`);
  if (inner.length === 0) return open + close;
  const gap = unit.repeat(depth + 1);
  return `${open}\n${inner.map((one) => `${gap}${one},\n`).join("")}${unit.repeat(depth)}${close}`;
}

/** A card with the code of the last call, or of the next one: `call()`, null if there is none. */
export function codeCard(call) {
  let language = "curl";
  const shown = h("pre", { class: "text code try-code", tabindex: "0", role: "region", "aria-label": "Code" });
  const hint = h("p", { class: "quiet-text" });
  const copy = h("button", { class: "button small", type: "button" }, "Copy");
  copy.addEventListener("click", async () => {
    if (await copied(shown.textContent, shown)) toast("Copied. Set TIDEGATE_API_KEY before you run it.");
    else toast("The browser does not allow copying. The code is selected: press Ctrl + C.", "bad");
  });
  const element = h(
    "details",
    { class: "card try-code-card" },
    h("summary", {}, "Code"),
    h(
      "div",
      { class: "card-body" },
      h("div", { class: "try-actions" }, choice("Language", LANGUAGES, language, (chosen) => {
        language = chosen;
        draw();
      }), copy),
      shown,
      hint,
    ),
  );
  function draw() {
    if (!element.open) return;
    const now = call();
    fill(shown, codeOf(language, now));
    const files = now.files.map((one) => one.name).join(", ");
    fill(hint, `Set TIDEGATE_API_KEY to your key.${files ? ` Run the code in the folder with ${files}.` : ""}`);
  }
  element.addEventListener("toggle", draw);
  return { element, draw };
}
