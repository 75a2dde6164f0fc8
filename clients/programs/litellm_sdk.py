"""litellm: each of its ways to a gateway, with text, streams, tools, JSON and embeddings."""

import json

import litellm
from cases import (
    CLAUDE,
    EMBEDDER,
    GEMINI,
    GEMINI_URL,
    GPT,
    KEY,
    OPENAI_URL,
    QUESTION,
    RESULT,
    TOOL_QUESTION,
    URL,
    answered,
    case,
    run,
    told,
)
from pydantic import BaseModel

WAYS = {
    f"openai/{GPT}": OPENAI_URL,
    f"hosted_vllm/{GPT}": OPENAI_URL,
    f"anthropic/{CLAUDE}": URL,
    f"gemini/{GEMINI}": GEMINI_URL,
}
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS = [{"type": "function", "function": {"name": "get_weather", "parameters": PARAMETERS}}]


class Person(BaseModel):
    name: str
    age: int


def ask(model, content, **options):
    messages = content if isinstance(content, list) else [{"role": "user", "content": content}]
    return litellm.completion(
        model=model, api_base=WAYS[model], api_key=KEY, messages=messages, **options
    )


def text(model):
    answered(ask(model, QUESTION).choices[0].message.content)


def streamed(model):
    stream = ask(model, QUESTION, stream=True)
    answered("".join(chunk.choices[0].delta.content or "" for chunk in stream))


def tools(model):
    messages = [{"role": "user", "content": TOOL_QUESTION}]
    message = ask(model, messages, tools=TOOLS).choices[0].message
    (call,) = message.tool_calls
    assert json.loads(call.function.arguments)["city"]
    messages += [message, {"role": "tool", "tool_call_id": call.id, "content": RESULT}]
    told(ask(model, messages, tools=TOOLS).choices[0].message.content)


def structured(model):
    made = ask(model, QUESTION, response_format=Person).choices[0].message.content
    Person.model_validate_json(made)


for way in WAYS:
    for what in (text, streamed, tools, structured):
        case(f"{way.partition('/')[0]}, {what.__name__}")(lambda what=what, way=way: what(way))


@case("embeddings")
def _():
    made = litellm.embedding(
        model=f"openai/{EMBEDDER}", input=["one"], api_base=OPENAI_URL, api_key=KEY
    )
    assert made.data[0]["embedding"]


@case("pictures")
def _():
    made = litellm.image_generation(
        model="openai/gpt-image-1", prompt="A harbour", api_base=OPENAI_URL, api_key=KEY
    )
    assert made.data[0].b64_json


run()
