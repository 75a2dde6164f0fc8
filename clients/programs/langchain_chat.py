"""langchain: ChatOpenAI (chat and responses), ChatAnthropic, ChatGoogleGenerativeAI."""

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
from langchain.agents import create_agent
from langchain_anthropic import ChatAnthropic
from langchain_google_genai import ChatGoogleGenerativeAI, GoogleGenerativeAIEmbeddings
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from pydantic import BaseModel

OPENAI = {"model": GPT, "base_url": OPENAI_URL, "api_key": KEY}
# A current Claude cannot be made to call a function: the emulator calls what is named.
NAMED = "Please describe a Person"
MODELS = {
    "openai": ChatOpenAI(**OPENAI),
    "openai responses": ChatOpenAI(**OPENAI, use_responses_api=True),
    "anthropic": ChatAnthropic(model=CLAUDE, base_url=URL, api_key=KEY),
    "google": ChatGoogleGenerativeAI(model=GEMINI, base_url=URL, api_key=KEY),
}


class Person(BaseModel):
    """A person."""

    name: str
    age: int


def text(model):
    answered(model.invoke(QUESTION).text)


def streamed(model):
    answered("".join(chunk.text for chunk in model.stream(QUESTION)))


def agent(model):
    made = create_agent(model, tools=[get_weather])
    done = made.invoke({"messages": [{"role": "user", "content": TOOL_QUESTION}]})
    told(done["messages"][-1].text)


def structured(model):
    assert isinstance(model.with_structured_output(Person).invoke(NAMED), Person)


def function_calling(model):
    bound = model.with_structured_output(Person, method="function_calling")
    assert isinstance(bound.invoke(NAMED), Person)


for name, model in MODELS.items():
    for what in (text, streamed, agent, structured, function_calling):
        case(f"{name}, {what.__name__}")(lambda what=what, model=model: what(model))


@case("openai, embeddings")
def _():
    # Counting tokens would fetch their table from the internet.
    made = OpenAIEmbeddings(
        model=EMBEDDER, base_url=OPENAI_URL, api_key=KEY, check_embedding_ctx_length=False
    )
    assert len(made.embed_documents(["one", "two"])) == 2


@case("google, embeddings")
def _():
    made = GoogleGenerativeAIEmbeddings(
        model="models/gemini-embedding-001", base_url=URL, google_api_key=KEY
    )
    assert len(made.embed_documents(["one", "two"])) == 2


run()
