"""pydantic-ai: OpenAI (chat and responses), Google, Anthropic; tools, and output in two ways."""

from cases import (
    CLAUDE,
    GEMINI,
    GPT,
    KEY,
    OPENAI_URL,
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
from pydantic_ai import Agent, NativeOutput, ToolOutput
from pydantic_ai.models.anthropic import AnthropicModel
from pydantic_ai.models.google import GoogleModel
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.anthropic import AnthropicProvider
from pydantic_ai.providers.google import GoogleProvider
from pydantic_ai.providers.openai import OpenAIProvider


class Person(BaseModel):
    name: str
    age: int


def openai():
    return OpenAIChatModel(GPT, provider=OpenAIProvider(base_url=OPENAI_URL, api_key=KEY))


def responses():
    return OpenAIResponsesModel(GPT, provider=OpenAIProvider(base_url=OPENAI_URL, api_key=KEY))


def google():
    return GoogleModel(GEMINI, provider=GoogleProvider(base_url=URL, api_key=KEY))


def anthropic():
    return AnthropicModel(CLAUDE, provider=AnthropicProvider(base_url=URL, api_key=KEY))


async def text(model):
    answered((await Agent(model).run(QUESTION)).output)


async def streamed(model):
    async with Agent(model).run_stream(QUESTION) as stream:
        answered(await stream.get_output())


async def tools(model):
    told((await Agent(model, tools=[get_weather]).run(TOOL_QUESTION)).output)


async def tool_output(model):
    agent = Agent(model, output_type=ToolOutput(Person), tools=[get_weather])
    # A current Claude cannot be made to call a function: the emulator calls what is named.
    question = f"{TOOL_QUESTION}, and final result"
    assert isinstance((await agent.run(question)).output, Person)


async def native_output(model):
    agent = Agent(model, output_type=NativeOutput(Person))
    assert isinstance((await agent.run(QUESTION)).output, Person)


for make in (openai, responses, google, anthropic):
    for what in (text, streamed, tools, tool_output, native_output):
        case(f"{make.__name__}, {what.__name__}")(lambda what=what, make=make: what(make()))

run()
