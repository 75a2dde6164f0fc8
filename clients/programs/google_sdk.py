"""google-genai: text, functions, structured output, embeddings, pictures, sound, files, chat."""

import io

from cases import (
    GEMINI,
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
from google import genai
from google.genai.types import GenerateContentConfig, HttpOptions
from pydantic import BaseModel

client = genai.Client(api_key=KEY, http_options=HttpOptions(base_url=URL))
models = client.models


class Person(BaseModel):
    name: str
    age: int


@case("text")
def _():
    answered(models.generate_content(model=GEMINI, contents=QUESTION).text)


@case("text, streamed")
def _():
    stream = models.generate_content_stream(model=GEMINI, contents=QUESTION)
    answered("".join(chunk.text or "" for chunk in stream))


@case("text, async")
async def _():
    answered((await client.aio.models.generate_content(model=GEMINI, contents=QUESTION)).text)


@case("tools")
def _():
    config = GenerateContentConfig(tools=[get_weather])
    told(models.generate_content(model=GEMINI, contents=TOOL_QUESTION, config=config).text)


@case("tools, streamed")
def _():
    config = GenerateContentConfig(tools=[get_weather])
    stream = models.generate_content_stream(model=GEMINI, contents=TOOL_QUESTION, config=config)
    told("".join(chunk.text or "" for chunk in stream))


@case("structured")
def _():
    config = GenerateContentConfig(response_mime_type="application/json", response_schema=Person)
    made = models.generate_content(model=GEMINI, contents=QUESTION, config=config)
    assert isinstance(made.parsed, Person)


@case("embeddings")
def _():
    made = models.embed_content(model="gemini-embedding-001", contents=["one", "two"])
    assert len(made.embeddings) == 2


@case("pictures")
def _():
    made = models.generate_content(model="gemini-2.5-flash-image", contents="Draw a harbour")
    assert any(part.inline_data for part in made.parts)


@case("sound")
def _():
    config = GenerateContentConfig(response_modalities=["AUDIO"])
    made = models.generate_content(model=GEMINI, contents="Say hello", config=config)
    assert made.parts[0].inline_data.mime_type.startswith("audio/")


@case("files, count, chat")
def _():
    file = client.files.upload(file=io.BytesIO(b"x"), config={"mime_type": "text/plain"})
    assert models.count_tokens(model=GEMINI, contents=QUESTION).total_tokens
    answered(client.chats.create(model=GEMINI).send_message(QUESTION).text)
    client.files.delete(name=file.name)


run()
