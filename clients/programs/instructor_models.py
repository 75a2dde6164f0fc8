"""instructor: each of its ways to a structured answer."""

import instructor
from anthropic import Anthropic
from cases import CLAUDE, GEMINI, GPT, KEY, OPENAI_URL, QUESTION, URL, case, run
from google import genai
from google.genai.types import HttpOptions
from openai import OpenAI
from pydantic import BaseModel

ASKED = [{"role": "user", "content": QUESTION}]


class Person(BaseModel):
    name: str
    age: int


def openai(mode):
    return instructor.from_openai(OpenAI(base_url=OPENAI_URL, api_key=KEY), mode=mode)


def ask_openai(name):
    client = openai(instructor.Mode[name])
    made = client.chat.completions.create(model=GPT, messages=ASKED, response_model=Person)
    assert isinstance(made, Person)


for name in ("TOOLS", "JSON", "JSON_SCHEMA", "MD_JSON"):
    case(f"openai, {name}")(lambda name=name: ask_openai(name))


@case("openai, streamed partly")
def _():
    stream = openai(instructor.Mode.TOOLS).chat.completions.create_partial(
        model=GPT, messages=ASKED, response_model=Person
    )
    assert list(stream)[-1].name


@case("anthropic")
def _():
    client = instructor.from_anthropic(Anthropic(base_url=URL, api_key=KEY))
    made = client.messages.create(
        model=CLAUDE, max_tokens=500, messages=ASKED, response_model=Person
    )
    assert isinstance(made, Person)


@case("google, tools")
def _():
    client = genai.Client(api_key=KEY, http_options=HttpOptions(base_url=URL))
    made = instructor.from_genai(client, mode=instructor.Mode.GENAI_TOOLS).chat.completions.create(
        model=GEMINI, messages=ASKED, response_model=Person
    )
    assert isinstance(made, Person)


run()
