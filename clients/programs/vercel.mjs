// Vercel's ai with its four providers: text, streams, tools, structured output, embeddings.
import { createAnthropic } from "@ai-sdk/anthropic";
import { createGoogleGenerativeAI } from "@ai-sdk/google";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { Output, embedMany, generateText, stepCountIs, streamText, tool } from "ai";
import { z } from "zod";
import * as cases from "./cases.mjs";

const { add, answered, told, expect, KEY, QUESTION, OPENAI_URL } = cases;
const openai = createOpenAI({ baseURL: OPENAI_URL, apiKey: KEY });
const google = createGoogleGenerativeAI({ baseURL: `${cases.URL}/v1beta`, apiKey: KEY });
const anthropic = createAnthropic({ baseURL: OPENAI_URL, apiKey: KEY });
const compatible = createOpenAICompatible({
  name: "here",
  baseURL: OPENAI_URL,
  apiKey: KEY,
  supportsStructuredOutputs: true,
});
const models = {
  openai: openai(cases.GPT),
  "openai chat": openai.chat(cases.GPT),
  compatible: compatible(cases.GPT),
  google: google(cases.GEMINI),
  anthropic: anthropic(cases.CLAUDE),
};
const get_weather = tool({
  description: "The weather of a city",
  inputSchema: z.object({ city: z.string() }),
  execute: async () => cases.RESULT,
});

for (const [name, model] of Object.entries(models)) {
  add(`${name}, text`, async () => answered((await generateText({ model, prompt: QUESTION })).text));

  add(`${name}, streamed`, async () => {
    let text = "";
    for await (const piece of streamText({ model, prompt: QUESTION }).textStream) text += piece;
    answered(text);
  });

  add(`${name}, tools`, async () => {
    const stopWhen = stepCountIs(3);
    const asked = { model, prompt: cases.TOOL_QUESTION, tools: { get_weather }, stopWhen };
    told((await generateText(asked)).text);
  });

  add(`${name}, structured`, async () => {
    const schema = z.object({ name: z.string(), age: z.number() });
    const output = Output.object({ schema });
    const made = await generateText({ model, prompt: QUESTION, output });
    expect(made.output.name, made.output);
  });
}

const embedders = {
  openai: openai.embedding(cases.EMBEDDER),
  compatible: compatible.textEmbeddingModel(cases.EMBEDDER),
  google: google.textEmbedding("gemini-embedding-001"),
};
for (const [name, model] of Object.entries(embedders))
  add(`${name}, embeddings`, async () => {
    const made = await embedMany({ model, values: ["one", "two"] });
    expect(made.embeddings.length === 2, made.embeddings.length);
  });

await cases.run();
