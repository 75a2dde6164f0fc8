"""google-adk: an agent's text, stream, tools and structured output."""

import os

from cases import GEMINI, KEY, QUESTION, TOOL_QUESTION, URL, answered, case, get_weather, run, told

os.environ |= {"GOOGLE_API_KEY": KEY, "GOOGLE_GEMINI_BASE_URL": URL}

from google.adk.agents import Agent
from google.adk.agents.run_config import RunConfig, StreamingMode
from google.adk.runners import InMemoryRunner
from google.genai.types import Content, Part
from pydantic import BaseModel


class Person(BaseModel):
    name: str
    age: int


async def ask(question, mode=StreamingMode.NONE, **options):
    agent = Agent(name="helper", model=GEMINI, instruction="Help.", **options)
    runner = InMemoryRunner(agent=agent, app_name="tried")
    session = await runner.session_service.create_session(app_name="tried", user_id="one")
    message = Content(role="user", parts=[Part(text=question)])
    said = ""
    async for event in runner.run_async(
        user_id="one",
        session_id=session.id,
        new_message=message,
        run_config=RunConfig(streaming_mode=mode),
    ):
        parts = event.content.parts if event.content and not event.partial else None
        said += "".join(part.text or "" for part in parts or [])
    return said


@case("text")
async def _():
    answered(await ask(QUESTION))


@case("text, streamed")
async def _():
    answered(await ask(QUESTION, StreamingMode.SSE))


@case("tools")
async def _():
    told(await ask(TOOL_QUESTION, tools=[get_weather]))


@case("tools, streamed")
async def _():
    told(await ask(TOOL_QUESTION, StreamingMode.SSE, tools=[get_weather]))


@case("structured")
async def _():
    Person.model_validate_json(await ask(QUESTION, output_schema=Person))


run()
