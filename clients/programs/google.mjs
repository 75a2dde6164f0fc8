// @google/genai: text, functions, structured output, embeddings, pictures, files.
import { GoogleGenAI } from "@google/genai";
import * as cases from "./cases.mjs";

const { add, answered, told, expect, GEMINI, QUESTION } = cases;
const client = new GoogleGenAI({ apiKey: cases.KEY, httpOptions: { baseUrl: cases.URL } });
const asked = { model: GEMINI, contents: QUESTION };
const user = (...parts) => ({ role: "user", parts });

add("text", async () => answered((await client.models.generateContent(asked)).text));

add("text, streamed", async () => {
  let text = "";
  for await (const chunk of await client.models.generateContentStream(asked)) text += chunk.text ?? "";
  answered(text);
});

add("tools", async () => {
  const declared = { name: "get_weather", parametersJsonSchema: cases.PARAMETERS };
  const config = { tools: [{ functionDeclarations: [declared] }] };
  const contents = [user({ text: cases.TOOL_QUESTION })];
  const made = await client.models.generateContent({ model: GEMINI, contents, config });
  const [call] = made.functionCalls;
  expect(call.args.city, call);
  const functionResponse = { name: call.name, response: { output: cases.RESULT } };
  contents.push(made.candidates[0].content, user({ functionResponse }));
  told((await client.models.generateContent({ model: GEMINI, contents, config })).text);
});

add("structured", async () => {
  const config = { responseMimeType: "application/json", responseJsonSchema: cases.PERSON };
  const made = await client.models.generateContent({ ...asked, config });
  expect(JSON.parse(made.text).name, made.text);
});

add("embeddings", async () => {
  const contents = ["one", "two"];
  const made = await client.models.embedContent({ model: "gemini-embedding-001", contents });
  expect(made.embeddings.length === 2, made);
});

add("pictures", async () => {
  const model = "gemini-2.5-flash-image";
  const made = await client.models.generateContent({ model, contents: "Draw a harbour" });
  expect(made.candidates[0].content.parts.some((part) => part.inlineData), made);
});

add("files, chat", async () => {
  const file = await client.files.upload({
    file: new Blob(["x"], { type: "text/plain" }),
    config: { mimeType: "text/plain" },
  });
  const chat = client.chats.create({ model: GEMINI });
  answered((await chat.sendMessage({ message: QUESTION })).text);
  await client.files.delete({ name: file.name });
});

await cases.run();
