// openai of npm: chat, responses, tools, structured output, embeddings, pictures.
import OpenAI from "openai";
import * as cases from "./cases.mjs";

const { add, answered, told, expect, GPT, QUESTION, PARAMETERS, RESULT } = cases;
const client = new OpenAI({ baseURL: cases.OPENAI_URL, apiKey: cases.KEY });
const asked = { model: GPT, messages: [{ role: "user", content: QUESTION }] };

add("chat", async () => {
  answered((await client.chat.completions.create(asked)).choices[0].message.content);
});

add("chat, streamed", async () => {
  let text = "";
  for await (const chunk of await client.chat.completions.create({ ...asked, stream: true }))
    text += chunk.choices[0]?.delta.content ?? "";
  answered(text);
});

add("chat, runTools", async () => {
  const runner = client.chat.completions.runTools({
    model: GPT,
    messages: [{ role: "user", content: cases.TOOL_QUESTION }],
    tools: [
      {
        type: "function",
        function: {
          name: "get_weather",
          parameters: PARAMETERS,
          parse: JSON.parse,
          function: () => RESULT,
        },
      },
    ],
  });
  told(await runner.finalContent());
});

add("responses", async () => {
  answered((await client.responses.create({ model: GPT, input: QUESTION })).output_text);
});

add("responses, streamed", async () => {
  const stream = client.responses.stream({ model: GPT, input: QUESTION });
  answered((await stream.finalResponse()).output_text);
});

add("responses, structured", async () => {
  const format = { type: "json_schema", name: "person", schema: cases.PERSON, strict: true };
  const made = await client.responses.create({ model: GPT, input: QUESTION, text: { format } });
  expect(JSON.parse(made.output_text).name, made.output_text);
});

add("embeddings", async () => {
  const made = await client.embeddings.create({ model: cases.EMBEDDER, input: ["one", "two"] });
  expect(made.data.length === 2 && made.data[0].embedding.length, made.data.length);
});

add("pictures", async () => {
  const made = await client.images.generate({ model: "gpt-image-1", prompt: "A harbour" });
  expect(made.data[0].b64_json, Object.keys(made.data[0]));
});

await cases.run();
