// Cases of one client of npm: each prints a line of JSON, and one that fails stops no other.

export const URL = process.env.TIDEGATE_URL;
export const OPENAI_URL = `${URL}/v1`;
export const KEY = "no-key-is-needed";
export const [GPT, GEMINI, CLAUDE] = ["gpt-4o-mini", "gemini-2.5-flash", "claude-sonnet-5-5"];
export const EMBEDDER = "text-embedding-3-small";
export const QUESTION = "Why is the sky blue?";
export const TOOL_QUESTION = "Please call get weather for Oslo";
export const RESULT = "22 degrees";
export const PARAMETERS = {
  type: "object",
  properties: { city: { type: "string" } },
  required: ["city"],
};
export const PERSON = {
  type: "object",
  properties: { name: { type: "string" }, age: { type: "integer" } },
  required: ["name", "age"],
  additionalProperties: false,
};
const cases = [];

export function add(name, tried) {
  cases.push([name, tried]);
}

export function expect(held, said) {
  if (!held) throw new Error(`not as expected: ${JSON.stringify(said)}`);
}

// The emulator's answer to QUESTION.
export const answered = (text) => expect(String(text).includes("emulated answer"), text);

// The answer after a call of the tool, which quotes what the tool returned.
export const told = (text) => expect(String(text).includes(RESULT), text);

export async function run() {
  for (const [name, tried] of cases) {
    let failed = null;
    try {
      await tried();
    } catch (error) {
      failed = `${error.name}: ${error.message}`.replace(/\s+/g, " ").slice(0, 300);
    }
    process.stdout.write(`${JSON.stringify({ case: name, failed })}\n`);
  }
  process.exit(0);
}
