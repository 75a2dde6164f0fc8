// The APIs of the playground: the body of a conversation in each, and how its answer is read.

const MOST_TOKENS = 1_024; // for dialects that require a bound, if none is given

/** The content of a file within a body: sent as base64; generated code reads it from the file. */
export class FileData {
  constructor(file, prefix = "") {
    this.name = file.name;
    this.prefix = prefix;
    this.base64 = file.base64;
  }

  toJSON() {
    return this.prefix + this.base64;
  }
}

const isText = ({ type }) => type.startsWith("text/") || type === "application/json";
const isPicture = ({ type }) => type.startsWith("image/");

/** Return a selected file as `{ name, type, base64, text }`; `text` only for text files. */
export async function readFile(file) {
  const bytes = new Uint8Array(await file.arrayBuffer());
  let binary = "";
  for (let at = 0; at < bytes.length; at += 32_768) binary += String.fromCharCode(...bytes.subarray(at, at + 32_768));
  const read = { name: file.name, type: file.type || "application/octet-stream", size: file.size, base64: btoa(binary) };
  return isText(read) ? { ...read, text: new TextDecoder().decode(bytes) } : read;
}

/** Return a turn as parts of a dialect: its files by `ofFile`, then its text by `ofText`. */
function parts({ text, files = [] }, ofText, ofFile) {
  const shown = files.map((one) => (isText(one) ? ofText(`${one.name}:\n${one.text}`) : ofFile(one)));
  return text ? [...shown, ofText(text)] : shown;
}

const dataUrl = (file) => new FileData(file, `data:${file.type};base64,`);

function chatContent(turn) {
  if (!turn.files?.length) return turn.text;
  const ofFile = (one) =>
    isPicture(one)
      ? { type: "image_url", image_url: { url: dataUrl(one) } }
      : { type: "file", file: { filename: one.name, file_data: dataUrl(one) } };
  return parts(turn, (text) => ({ type: "text", text }), ofFile);
}

function responsesContent(turn) {
  if (!turn.files?.length) return turn.text;
  const ofFile = (one) =>
    isPicture(one)
      ? { type: "input_image", image_url: dataUrl(one) }
      : { type: "input_file", filename: one.name, file_data: dataUrl(one) };
  return parts(turn, (text) => ({ type: "input_text", text }), ofFile);
}

function messagesContent(turn) {
  if (!turn.files?.length) return turn.text;
  const ofFile = (one) => ({
    type: isPicture(one) ? "image" : "document",
    source: { type: "base64", media_type: one.type, data: new FileData(one) },
  });
  return parts(turn, (text) => ({ type: "text", text }), ofFile);
}

const geminiParts = (turn) =>
  parts(turn, (text) => ({ text }), (one) => ({ inlineData: { mimeType: one.type, data: new FileData(one) } }));

function converseContent(turn) {
  const formatOf = (one) => one.type.split("/")[1];
  const ofFile = (one) =>
    isPicture(one)
      ? { image: { format: formatOf(one), source: { bytes: new FileData(one) } } }
      : { document: { format: formatOf(one), name: one.name.replaceAll(/[^\w ()[\]-]/g, "-"), source: { bytes: new FileData(one) } } };
  return parts(turn, (text) => ({ text }), ofFile);
}

const usageOf = (input, output) => (input === undefined ? {} : { input, output });

/**
 * The APIs. `words`: the name. `dialect`: null for Tidegate's own. `path(model)`, and `body(model,
 * turns, more)` with `turns` as `{ role, text, files }`. `read(data)` returns `{ text, pictures,
 * input, output, problem }` of an event. `headers`: those that an SDK adds itself.
 * `streamed(model)`: the path of its stream if it is another one, in AWS's framing.
 */
export const APIS = {
  prompt: { words: "Prompt, streamed", dialect: null, path: () => "/stream" },
  job: { words: "Prompt, as a background job", dialect: null, path: () => "/submit" },
  chat: {
    words: "OpenAI Chat Completions",
    dialect: "openai",
    path: () => "/v1/chat/completions",
    body: (model, turns, { system, most }) => ({
      model,
      messages: [
        ...(system ? [{ role: "system", content: system }] : []),
        ...turns.map((one) => ({ role: one.role, content: chatContent(one) })),
      ],
      ...(most ? { max_completion_tokens: most } : {}),
      stream: true,
      stream_options: { include_usage: true },
    }),
    read: ({ choices, usage, error }) => ({
      text: choices?.[0]?.delta?.content,
      ...usageOf(usage?.prompt_tokens, usage?.completion_tokens),
      problem: error?.message,
    }),
  },
  responses: {
    words: "OpenAI Responses",
    dialect: "openai",
    path: () => "/v1/responses",
    body: (model, turns, { system, most }) => ({
      model,
      ...(system ? { instructions: system } : {}),
      input: turns.map((one) => ({ role: one.role, content: responsesContent(one) })),
      ...(most ? { max_output_tokens: most } : {}),
      stream: true,
    }),
    read: ({ type, delta, response, message, error }) => ({
      text: type === "response.output_text.delta" ? delta : "",
      ...usageOf(response?.usage?.input_tokens, response?.usage?.output_tokens),
      problem: error?.message ?? response?.error?.message ?? (type === "error" ? message : undefined),
    }),
  },
  messages: {
    words: "Anthropic Messages",
    dialect: "anthropic",
    headers: { "anthropic-version": "2023-06-01" },
    path: () => "/v1/messages",
    body: (model, turns, { system, most }) => ({
      model,
      max_tokens: most || MOST_TOKENS,
      ...(system ? { system } : {}),
      messages: turns.map((one) => ({ role: one.role, content: messagesContent(one) })),
      stream: true,
    }),
    read: ({ delta, message, usage, error }) => ({
      text: delta?.text,
      ...(message?.usage ? { input: message.usage.input_tokens } : {}),
      ...(usage ? { output: usage.output_tokens } : {}),
      problem: error?.message,
    }),
  },
  generate: {
    words: "Gemini generateContent",
    dialect: "gemini",
    path: (model) => `/v1beta/models/${encodeURIComponent(model)}:streamGenerateContent?alt=sse`,
    body: (_model, turns, { system, most }) => ({
      contents: turns.map((one) => ({ role: one.role === "user" ? "user" : "model", parts: geminiParts(one) })),
      ...(system ? { systemInstruction: { parts: [{ text: system }] } } : {}),
      ...(most ? { generationConfig: { maxOutputTokens: most } } : {}),
    }),
    read({ candidates, usageMetadata: usage, error }) {
      const found = candidates?.[0]?.content?.parts ?? [];
      const output = (usage?.candidatesTokenCount ?? 0) + (usage?.thoughtsTokenCount ?? 0);
      return {
        text: found.filter((one) => !one.thought).map((one) => one.text ?? "").join(""),
        pictures: found.map((one) => one.inlineData).filter(Boolean),
        ...usageOf(usage?.promptTokenCount, output),
        problem: error?.message,
      };
    },
  },
  converse: {
    words: "Bedrock Converse",
    dialect: "bedrock",
    path: (model) => `/model/${encodeURIComponent(model)}/converse`,
    streamed: (model) => `/model/${encodeURIComponent(model)}/converse-stream`,
    body: (_model, turns, { system, most }) => ({
      messages: turns.map((one) => ({ role: one.role, content: converseContent(one) })),
      ...(system ? { system: [{ text: system }] } : {}),
      ...(most ? { inferenceConfig: { maxTokens: most } } : {}),
    }),
    read: ({ contentBlockDelta, metadata, problem }) => ({
      text: contentBlockDelta?.delta?.text,
      ...usageOf(metadata?.usage?.inputTokens, metadata?.usage?.outputTokens),
      problem,
    }),
  },
};
