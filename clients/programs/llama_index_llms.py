"""llama-index: OpenAILike, GoogleGenAI, Anthropic."""

from cases import (
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
from google.genai.types import HttpOptions
from llama_index.core.agent.workflow import FunctionAgent
from llama_index.core.llms import ChatMessage
from llama_index.embeddings.openai_like import OpenAILikeEmbedding
from llama_index.llms.anthropic import Anthropic
from llama_index.llms.google_genai import GoogleGenAI
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel


def openai():
    return OpenAILike(
        model=GPT,
        api_base=OPENAI_URL,
        api_key=KEY,
        is_chat_model=True,
        is_function_calling_model=True,
    )


def google():
    return GoogleGenAI(model=GEMINI, api_key=KEY, http_options=HttpOptions(base_url=URL))


def anthropic():
    return Anthropic(model="claude-sonnet-4-5", base_url=URL, api_key=KEY)


class Person(BaseModel):
    name: str
    age: int


def text(model):
    answered(model.chat([ChatMessage(role="user", content=QUESTION)]).message.content)


def streamed(model):
    answered("".join(chunk.delta or "" for chunk in model.stream_complete(QUESTION)))


async def agent(model):
    told(await FunctionAgent(tools=[get_weather], llm=model).run(TOOL_QUESTION))


def structured(model):
    asked = [ChatMessage(role="user", content=QUESTION)]
    assert isinstance(model.as_structured_llm(Person).chat(asked).raw, Person)


for make in (openai, google, anthropic):
    for what in (text, streamed, agent, structured):
        case(f"{make.__name__}, {what.__name__}")(lambda what=what, make=make: what(make()))


@case("openai, embeddings")
def _():
    made = OpenAILikeEmbedding(model_name=EMBEDDER, api_base=OPENAI_URL, api_key=KEY)
    assert made.get_text_embedding("one")


run()
