"""anthropic: messages, tools, structured output, thinking, counting, models."""

from anthropic import Anthropic, AsyncAnthropic, beta_tool
from cases import (
    CLAUDE,
    KEY,
    QUESTION,
    TOOL_QUESTION,
    URL,
    answered,
    case,
    get_weather,
    run,
    told,
)
from pydantic import BaseModel

client = Anthropic(base_url=URL, api_key=KEY)
ASKED = {
    "model": CLAUDE,
    "max_tokens": 2000,
    "messages": [{"role": "user", "content": QUESTION}],
}


class Person(BaseModel):
    name: str
    age: int


@case("messages")
def _():
    answered(client.messages.create(**ASKED).content[0].text)


@case("messages, streamed")
def _():
    with client.messages.stream(**ASKED) as stream:
        answered("".join(stream.text_stream))


@case("messages, async")
async def _():
    async with AsyncAnthropic(base_url=URL, api_key=KEY) as asynchronous:
        answered((await asynchronous.messages.create(**ASKED)).content[0].text)


@case("tools")
def _():
    messages = [{"role": "user", "content": TOOL_QUESTION}]
    runner = client.beta.messages.tool_runner(
        **ASKED | {"messages": messages}, tools=[beta_tool(get_weather)]
    )
    told(runner.until_done().content[0].text)


@case("structured")
def _():
    assert isinstance(client.messages.parse(**ASKED, output_format=Person).parsed_output, Person)


@case("thinking, streamed")
def _():
    thinking = {"type": "enabled", "budget_tokens": 1024}
    with client.messages.stream(**ASKED, thinking=thinking) as stream:
        thought, text = stream.get_final_message().content
    assert thought.signature
    answered(text.text)


@case("count, models")
def _():
    counted = client.messages.count_tokens(model=CLAUDE, messages=ASKED["messages"])
    assert counted.input_tokens
    assert client.models.list().data


run()
