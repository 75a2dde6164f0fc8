"""smolagents: its model for OpenAI's API, alone, streamed, and under an agent that calls tools."""

from cases import GPT, KEY, OPENAI_URL, QUESTION, answered, case, run
from smolagents import OpenAIModel, ToolCallingAgent, tool

model = OpenAIModel(GPT, api_base=OPENAI_URL, api_key=KEY)
ASKED = [{"role": "user", "content": [{"type": "text", "text": QUESTION}]}]
called = []


@tool
def get_weather(city: str) -> str:
    """Get the weather of a city.

    Args:
        city: The name of the city.
    """
    called.append(city)
    return "22 degrees"


@case("text")
def _():
    answered(model.generate(ASKED).content)


@case("text, streamed")
def _():
    answered("".join(delta.content or "" for delta in model.generate_stream(ASKED)))


@case("agent, tools")
def _():
    agent = ToolCallingAgent(tools=[get_weather], model=model, max_steps=3, verbosity_level=0)
    assert agent.run("What is the weather in Oslo?")
    assert called


run()
