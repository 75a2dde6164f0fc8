// @anthropic-ai/sdk: messages, tools, structured output, thinking.
import Anthropic from "@anthropic-ai/sdk";
import * as cases from "./cases.mjs";

const { add, answered, told, expect } = cases;
const client = new Anthropic({ baseURL: cases.URL, apiKey: cases.KEY });
const user = (content) => ({ role: "user", content });
const asked = { model: cases.CLAUDE, max_tokens: 2000, messages: [user(cases.QUESTION)] };

add("messages", async () => answered((await client.messages.create(asked)).content[0].text));

add("messages, streamed", async () => {
  answered(await client.messages.stream(asked).finalText());
});

add("tools", async () => {
  const tools = [{ name: "get_weather", input_schema: cases.PARAMETERS }];
  const messages = [user(cases.TOOL_QUESTION)];
  const { content } = await client.messages.create({ ...asked, messages, tools });
  expect(content[0].input.city, content);
  const result = { type: "tool_result", tool_use_id: content[0].id, content: cases.RESULT };
  messages.push({ role: "assistant", content }, user([result]));
  told((await client.messages.create({ ...asked, messages, tools })).content[0].text);
});

add("structured", async () => {
  const format = { type: "json_schema", schema: cases.PERSON };
  const made = await client.messages.create({ ...asked, output_config: { format } });
  expect(JSON.parse(made.content[0].text).name, made.content);
});

add("thinking, streamed", async () => {
  const thinking = { type: "enabled", budget_tokens: 1024 };
  const { content } = await client.messages.stream({ ...asked, thinking }).finalMessage();
  expect(content[0].type === "thinking" && content[0].signature, content);
  answered(content[1].text);
});

await cases.run();
