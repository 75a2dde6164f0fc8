"""haystack: its generators for OpenAI, Anthropic and Google, with streams, tools and embeddings."""

import os

from cases import (
    CLAUDE,
    EMBEDDER,
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

os.environ |= {
    "OPENAI_API_KEY": KEY,
    "ANTHROPIC_API_KEY": KEY,
    "GOOGLE_API_KEY": KEY,
    "ANTHROPIC_BASE_URL": URL,
    "GOOGLE_GEMINI_BASE_URL": URL,
}

from haystack.components.agents import Agent
from haystack.components.embedders import OpenAITextEmbedder
from haystack.components.generators.chat import OpenAIChatGenerator
from haystack.dataclasses import ChatMessage
from haystack.tools import create_tool_from_function
from haystack_integrations.components.generators.anthropic import (
    AnthropicChatGenerator,
)
from haystack_integrations.components.generators.google_genai import (
    GoogleGenAIChatGenerator,
)

GENERATORS = {
    "openai": lambda: OpenAIChatGenerator(model=GPT, api_base_url=OPENAI_URL),
    "anthropic": lambda: AnthropicChatGenerator(model=CLAUDE),
    "google": lambda: GoogleGenAIChatGenerator(model=GEMINI),
}
ASKED = [ChatMessage.from_user(QUESTION)]


def text(generator):
    answered(generator.run(messages=ASKED)["replies"][0].text)


def streamed(generator):
    pieces = []
    generator.run(messages=ASKED, streaming_callback=lambda chunk: pieces.append(chunk.content))
    answered("".join(piece or "" for piece in pieces))


def agent(generator):
    made = Agent(chat_generator=generator, tools=[create_tool_from_function(get_weather)])
    told(made.run(messages=[ChatMessage.from_user(TOOL_QUESTION)])["messages"][-1].text)


for name, make in GENERATORS.items():
    for what in (text, streamed, agent):
        case(f"{name}, {what.__name__}")(lambda what=what, make=make: what(make()))


@case("openai, embeddings")
def _():
    embedder = OpenAITextEmbedder(model=EMBEDDER, api_base_url=OPENAI_URL)
    assert embedder.run(text="one")["embedding"]


run()
