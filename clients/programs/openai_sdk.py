"""openai: chat, responses, completions, tools, structured output, embeddings, pictures, models."""

import json

from cases import (
    EMBEDDER,
    GPT,
    KEY,
    OPENAI_URL,
    QUESTION,
    RESULT,
    TOOL_QUESTION,
    answered,
    case,
    run,
    told,
)
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel

client = OpenAI(base_url=OPENAI_URL, api_key=KEY)
ASKED = [{"role": "user", "content": QUESTION}]
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}
FUNCTION = {"name": "get_weather", "parameters": PARAMETERS}


class Person(BaseModel):
    name: str
    age: int


@case("chat")
def _():
    made = client.chat.completions.create(model=GPT, messages=ASKED)
    answered(made.choices[0].message.content)


@case("chat, streamed")
def _():
    stream = client.chat.completions.create(model=GPT, messages=ASKED, stream=True)
    answered("".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices))


@case("chat, async")
async def _():
    async with AsyncOpenAI(base_url=OPENAI_URL, api_key=KEY) as asynchronous:
        made = await asynchronous.chat.completions.create(model=GPT, messages=ASKED)
    answered(made.choices[0].message.content)


@case("chat, tools")
def _():
    messages = [{"role": "user", "content": TOOL_QUESTION}]
    tools = [{"type": "function", "function": FUNCTION}]
    message = client.chat.completions.create(model=GPT, messages=messages, tools=tools)
    message = message.choices[0].message
    (call,) = message.tool_calls
    assert json.loads(call.function.arguments)["city"]
    messages += [message, {"role": "tool", "tool_call_id": call.id, "content": RESULT}]
    made = client.chat.completions.create(model=GPT, messages=messages, tools=tools)
    told(made.choices[0].message.content)


@case("chat, structured")
def _():
    made = client.chat.completions.parse(model=GPT, messages=ASKED, response_format=Person)
    assert isinstance(made.choices[0].message.parsed, Person)


@case("responses")
def _():
    answered(client.responses.create(model=GPT, input=QUESTION).output_text)


@case("responses, streamed")
def _():
    with client.responses.stream(model=GPT, input=QUESTION) as stream:
        answered(stream.get_final_response().output_text)


@case("responses, tools")
def _():
    tools = [{"type": "function", "strict": True, **FUNCTION}]
    given = [{"role": "user", "content": TOOL_QUESTION}]
    first = client.responses.create(model=GPT, input=given, tools=tools)
    (call,) = first.output
    result = {"type": "function_call_output", "call_id": call.call_id, "output": RESULT}
    told(client.responses.create(model=GPT, input=[*given, call, result]).output_text)


@case("responses, structured")
def _():
    made = client.responses.parse(model=GPT, input=QUESTION, text_format=Person)
    assert isinstance(made.output_parsed, Person)


@case("completions")
def _():
    made = client.completions.create(model="gpt-3.5-turbo-instruct", prompt=QUESTION, max_tokens=99)
    answered(made.choices[0].text)


@case("embeddings")
def _():
    made = client.embeddings.create(model=EMBEDDER, input=["one", "two"])
    assert len(made.data) == 2
    assert made.data[0].embedding


@case("pictures")
def _():
    made = client.images.generate(model="gpt-image-1", prompt="A harbour")
    assert made.data[0].b64_json


@case("models")
def _():
    assert client.models.list().data


run()
