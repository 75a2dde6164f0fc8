"""openai-agents: text, streams, tools, hand-offs and structured output on both of OpenAI's APIs."""

from agents import (
    Agent,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from cases import (
    GPT,
    KEY,
    OPENAI_URL,
    QUESTION,
    TOOL_QUESTION,
    answered,
    case,
    get_weather,
    run,
    told,
)
from openai import AsyncOpenAI
from pydantic import BaseModel

set_tracing_disabled(True)


class Person(BaseModel):
    name: str
    age: int


def agent(kind, **options):
    model = kind(model=GPT, openai_client=AsyncOpenAI(base_url=OPENAI_URL, api_key=KEY))
    return Agent(name="helper", model=model, **options)


async def text(kind):
    answered((await Runner.run(agent(kind), QUESTION)).final_output)


async def streamed(kind):
    result = Runner.run_streamed(agent(kind), QUESTION)
    async for _ in result.stream_events():
        pass
    answered(result.final_output)


async def tools(kind):
    weather = agent(kind, tools=[function_tool(get_weather)])
    told((await Runner.run(weather, TOOL_QUESTION)).final_output)


async def structured(kind):
    found = await Runner.run(agent(kind, output_type=Person), QUESTION)
    assert isinstance(found.final_output, Person)


async def handoff(kind):
    clerk = agent(kind, handoffs=[agent(kind)])
    found = await Runner.run(clerk, "Please transfer to helper")
    assert found.final_output


for kind in (OpenAIResponsesModel, OpenAIChatCompletionsModel):
    for what in (text, streamed, tools, structured, handoff):
        case(f"{kind.__name__.removeprefix('OpenAI').removesuffix('Model')}, {what.__name__}")(
            lambda what=what, kind=kind: what(kind)
        )

run()
