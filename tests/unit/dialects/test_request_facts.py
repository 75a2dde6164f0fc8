"""What native bodies ask for."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Callable
from random import Random
from typing import Any

import pytest

from tests.unit.admission.pictures import png
from tidegate.admission.estimator import Learning, Modality
from tidegate.call import Kind
from tidegate.dialects import DIALECTS, endpoint_of, parsing
from tidegate.dialects.parsing import MOST_PARTS, has_too_many_parts, parsed
from tidegate.dialects.spec import Dialect, RequestFacts
from tidegate.errors import InvalidRequest, PayloadTooLarge

PICTURE = b64encode(png(1000, 800)).decode()
PICTURE_URL = f"data:image/png;base64,{PICTURE}"


def asked(path: str, body: dict[str, Any]) -> RequestFacts:
    endpoint = endpoint_of("POST", path, Dialect.OPENAI)
    assert endpoint is not None
    return DIALECTS[endpoint.dialect].request_facts(endpoint, body)


def chat(**body: Any) -> RequestFacts:
    return asked("/v1/chat/completions", {"model": "m", **body})


def claude(**body: Any) -> RequestFacts:
    endpoint = endpoint_of("POST", "/v1/messages", Dialect.ANTHROPIC)
    assert endpoint is not None
    return DIALECTS[endpoint.dialect].request_facts(endpoint, {"model": "m", **body})


def gemini(do: str = "generateContent", **body: Any) -> RequestFacts:
    return asked(f"/v1beta/models/g:{do}", body)


def test_text_is_text_only() -> None:
    found = chat(messages=[{"role": "user", "content": "x" * 400}])
    assert (found.model, found.kind, found.images) == ("m", Kind.TEXT_ONLY, 0)
    assert found.pieces[Modality.LATIN] == pytest.approx(100, abs=3)


@pytest.mark.parametrize(
    ("part", "ask", "tokens"),
    [
        ({"image_url": {"url": PICTURE_URL}}, chat, 765),
        ({"type": "input_image", "image_url": PICTURE_URL}, chat, 765),
        ({"role": "user", "images": [PICTURE]}, chat, 765),
        (
            {"source": {"type": "base64", "media_type": "image/png", "data": PICTURE}},
            claude,
            1000 * 800 / 750,
        ),
        ({"inlineData": {"mimeType": "image/png", "data": PICTURE}}, gemini, 4 * 258),
        ({"inline_data": {"mime_type": "image/png", "data": PICTURE}}, gemini, 4 * 258),
    ],
)
def test_a_picture_is_known_in_every_dialect_and_counted_by_its_size(
    part: dict[str, Any], ask: Callable[..., RequestFacts], tokens: float
) -> None:
    found = ask(messages=[{"role": "user", "content": [{"text": "What is it?"}, part]}])
    assert found.kind is Kind.MULTI_MODAL
    assert found.pieces[Modality.IMAGE] == tokens
    assert found.pieces[Modality.LATIN] < 20


@pytest.mark.parametrize(
    ("part", "modality"),
    [
        ({"input_audio": {"data": b64encode(b"x" * 64_000).decode(), "format": "mp3"}}, "audio"),
        ({"type": "input_audio", "input_audio": "A" * 64_000}, "audio"),
        ({"type": "input_audio", "input_audio": f"data:audio/mpeg;base64,{PICTURE}"}, "audio"),
        ({"type": "input_audio", "input_audio": "https://host/a.mp3"}, "audio"),
        ({"file": {"file_data": f"data:application/pdf;base64,{PICTURE}"}}, "document"),
        ({"fileData": {"mimeType": "video/mp4", "fileUri": "https://host/files/a"}}, "video"),
        ({"image_url": {"url": "https://host/cat.png"}}, "image"),
        ({"video_url": {"url": "data:video/mp4;base64,AAAA"}}, "video"),
        ({"type": "document_url", "document_url": "data:application/pdf;base64,AAAA"}, "document"),
        ({"images": [PICTURE_URL]}, "image"),
        (
            {
                "functionResponse": {
                    "parts": [{"inlineData": {"mimeType": "image/png", "data": PICTURE}}]
                }
            },
            "image",
        ),
        ({"type": "input_file", "file_id": "file-1"}, "document"),
    ],
)
def test_other_files_count_by_their_sort(part: dict[str, Any], modality: str) -> None:
    found = chat(messages=[{"content": [part]}])
    assert found.kind is Kind.MULTI_MODAL
    assert found.pieces[Modality(modality)] > 0
    assert found.pieces.get(Modality.LATIN, 0) < 20


@pytest.mark.parametrize("image", [PICTURE_URL, [PICTURE_URL, PICTURE_URL]])
def test_a_picture_may_stand_beside_the_prompt(image: Any) -> None:
    found = asked("/v1/images/generations", {"model": "m", "prompt": "a cat", "image": image})
    assert found.pieces[Modality.IMAGE] == 765 * (1 if image == PICTURE_URL else 2)
    assert found.pieces[Modality.LATIN] < 20


def test_base64_is_never_counted_as_text() -> None:
    found = chat(messages=[{"content": [{"image_url": {"url": "data:;base64," + "A" * 100_000}}]}])
    assert sum(found.pieces.values()) < 2_000


@pytest.mark.parametrize(
    ("found", "images"),
    [
        (asked("/v1/images/generations", {"model": "m", "prompt": "a cat"}), 1),
        (asked("/v1/images/generations", {"model": "m", "prompt": "a cat", "n": 3}), 3),
        (asked("/v1/images/generations", {"model": "m", "prompt": "a cat", "n": "3"}), 3),
        (asked("/v1/images/generations", {"model": "m", "prompt": "a cat", "n": 300}), 300),
        (asked("/v1/images/generations", {"model": "m", "prompt": "a cat", "n": "some"}), 1),
        (gemini(generationConfig={"responseModalities": ["TEXT", "IMAGE"]}), 1),
        (gemini(generation_config={"response_modalities": ["image"]}), 1),
        (asked("/v1/responses", {"model": "m", "tools": [{"type": "image_generation"}]}), 1),
        (asked("/v1/responses", {"model": "m", "tools": [{"type": "web_search"}, "odd"]}), 0),
        (asked("/v1/chat/completions", {"model": "m", "tools": [{"type": "image_generation"}]}), 0),
        (asked("/v1beta/models/gemini-x-image:generateContent", {"contents": []}), 1),
        (gemini(contents=[]), 0),
        (asked("/v1beta/models/gemini-x-image:countTokens", {"contents": []}), 0),
    ],
)
def test_what_makes_pictures_is_image_generation(found: RequestFacts, images: int) -> None:
    assert found.images == images
    assert (found.kind is Kind.IMAGE_GENERATION) == bool(images)


@pytest.mark.parametrize(
    ("found", "bound"),
    [
        (chat(max_tokens=50), 50),
        (chat(max_completion_tokens=60, n=2), 120),
        # What a server reads of several, and how many answers it makes, is to its taste.
        (chat(max_completion_tokens=1, max_tokens=4_000), 4_000),
        (gemini(generationConfig={"max_tokens": 1, "maxOutputTokens": 80}), 80),
        (chat(max_tokens=1, n=128), 128),
        (asked("/v1/completions", {"model": "m", "max_tokens": 10, "best_of": 20, "n": 1}), 200),
        (gemini(generation_config={"max_output_tokens": 8, "candidate_count": 4}), 32),
        (asked("/v1/responses", {"model": "m", "input": "x", "max_output_tokens": 70}), 70),
        (gemini(generationConfig={"maxOutputTokens": 80}), 80),
        # Google reads a number in a text, other servers with a point too.
        (gemini(generationConfig={"maxOutputTokens": 80, "candidateCount": "8"}), 640),
        (gemini(generationConfig={"maxOutputTokens": 8, "max_output_tokens": "80"}), 80),
        (chat(max_tokens=50, n=" 010 "), 500),
        (chat(max_tokens=50, n=9.5), 500),
        (chat(max_tokens=1, max_completion_tokens=4_000.0), 4_000),
        (chat(max_tokens=1, max_completion_tokens=[4_000]), None),
        (chat(max_tokens="1e999", n=10**400), 10**24),
        (chat(max_tokens=5, n="nan"), 5),
        (chat(max_tokens=-5, n=-5), None),
        (chat(max_tokens=None), None),
        (chat(max_tokens=True), None),
        (asked("/v1/embeddings", {"model": "m", "input": "x"}), 1),
    ],
)
def test_the_bound_on_the_answer(found: RequestFacts, bound: int | None) -> None:
    assert found.max_output_tokens == bound


def test_an_input_of_token_numbers_counts_each() -> None:
    found = asked("/v1/embeddings", {"model": "m", "input": [[1, 2, 3], [4, 5]]})
    assert sum(found.pieces.values()) == pytest.approx(5, abs=1.1)


LONG = "long " * 4_000


@pytest.mark.parametrize(
    "body",
    [
        # Beside a file, in a list that begins with a number, as a name, behind very many values.
        {"messages": [{"role": "user", "content": LONG, "url": "https://host/a.png"}]},
        {"tools": [{"parameters": {"p": {"description": LONG, "file_id": "f", "type": "string"}}}]},
        {"tools": [{"data": "AAAA", "mimeType": "image/png", "description": LONG}]},
        {"tools": [{"parameters": {"enum": [1, LONG]}}]},
        {"tools": [{"parameters": {"properties": {LONG: {"type": "string"}}}}]},
        {"messages": [{"role": "user", "content": LONG}], "x": [""] * 200_001},
        # As what looks like a file where a provider takes a text.
        {"messages": [{"role": "user", "content": f"data:text/plain;base64,{LONG}"}]},
        {"messages": [{"content": [{"type": "text", "text": f"data:;base64,{LONG}"}]}]},
        {"instructions": f"data:image/png;base64,{LONG}"},
        {"input": f"data:image/png;base64,{LONG}"},
        {"messages": [{"tool_calls": [{"function": {"arguments": f"data:;base64,{LONG}"}}]}]},
        {"input": [{"type": "function_call_output", "output": f"data:;base64,{LONG}"}]},
        {"messages": [{"type": "tool_use", "input": {"data": LONG, "media_type": "image/png"}}]},
        {"contents": [{"functionCall": {"args": {"a": [{"url": f"data:;base64,{LONG}"}]}}}]},
        {"contents": [{"functionResponse": {"response": {"data": LONG, "mimeType": "a/b"}}}]},
        {"contents": [{"functionResponse": {"response": {"images": [PICTURE], "url": LONG}}}]},
        {"tools": [{"parameters": {"default": {"data": LONG, "mimeType": "image/png"}}}]},
        {"response_format": {"json_schema": {"schema": {"properties": {LONG: {}}}}}},
        {"messages": [{"image_url": f"data:image/svg+xml,{LONG}"}]},
    ],
)
def test_no_place_hides_a_text_from_the_first_guess(body: dict[str, Any]) -> None:
    found = chat(**body)
    assert found.pieces[Modality.LATIN] >= len(LONG) / 4


def test_a_file_says_a_few_words_of_itself_that_do_not_count() -> None:
    part = {"type": "input_file", "filename": "a.pdf", "file_id": "file-1", "detail": "high"}
    found = chat(content=[part]).pieces
    assert found[Modality.DOCUMENT] > 0
    assert found[Modality.LATIN] <= 1  # the model's own name


def test_the_names_of_a_schemas_properties_count() -> None:
    def schema(*names: str) -> dict[str, Any]:
        return {"type": "object", "properties": {name: {"type": "string"} for name in names}}

    few, many = (
        chat(tools=[{"function": {"name": "f", "parameters": schema(*names)}}]).pieces
        for names in (["a", "b"], ["departure_airport", "arrival_airport"])
    )
    assert many[Modality.LATIN] - few[Modality.LATIN] == pytest.approx(30 / 4)
    nested = chat(response_format={"json_schema": {"schema": {"items": schema("x" * 100)}}}).pieces
    assert nested[Modality.LATIN] >= 25


WEB = {"type": "web_search_20250305", "name": "web_search"}
OWN = {"type": "function", "function": {"name": "web_search"}}


@pytest.mark.parametrize(
    ("found", "learning"),
    [
        (chat(messages=[]), Learning.TEXT),
        (chat(tools=[OWN], tool_choice="auto"), Learning.TEXT),
        (chat(functions=[{"name": "code_execution"}]), Learning.TEXT),
        (claude(tools=[{"name": "web_search", "input_schema": {}}]), Learning.TEXT),
        (claude(tools=[{"type": "custom", "name": "x", "input_schema": {}}]), Learning.TEXT),
        (gemini(tools=[{"functionDeclarations": []}]), Learning.TEXT),
        (gemini(tools={"function_declarations": []}), Learning.TEXT),
        (chat(previous_response_id=None, plugins=[], tools=None), Learning.TEXT),
        (asked("/v1/completions", {"model": "m", "prompt": "hi"}), Learning.TEXT),
        (claude(tools=[OWN, WEB]), Learning.HOSTED),
        (claude(mcp_servers=[{"url": "https://host"}]), Learning.HOSTED),
        (chat(tools=[{"type": "openrouter:web_search"}]), Learning.HOSTED),
        (chat(web_search_options={"search_context_size": "low"}), Learning.HOSTED),
        (asked("/v1/responses", {"model": "m", "tools": [{"type": "mcp"}]}), Learning.HOSTED),
        (gemini(tools=[{"functionDeclarations": []}, {"googleSearch": {}}]), Learning.HOSTED),
        (gemini(tools=[{"url_context": {}}], cachedContent="c/1"), Learning.HOSTED),
        (gemini(cachedContent="cachedContents/1"), Learning.STATE),
        (asked("/v1/responses", {"model": "m", "previous_response_id": "r"}), Learning.STATE),
        (asked("/v1/responses", {"prompt": {"id": "pmpt_1"}}), Learning.STATE),
        (gemini(contents=[{"fileData": {"fileUri": "https://host/f"}}]), Learning.FILES),
    ],
)
def test_calls_that_read_more_than_they_say_are_learned_from_apart(
    found: RequestFacts, learning: Learning
) -> None:
    assert found.pieces.learning is learning
    added = found.pieces.whole.keys() - found.pieces.keys()
    assert (Modality.HOSTED in added) == (learning is Learning.HOSTED)
    assert (Modality.STATE in added) == (learning is Learning.STATE)


def test_what_the_provider_adds_is_no_part_of_the_first_guess() -> None:
    own, hosted = (claude(messages="x" * 400, tools=[tool]).pieces for tool in (OWN, WEB))
    assert own.whole[Modality.TOOLS] == 500
    assert hosted.whole[Modality.HOSTED] == 2_500
    assert own.keys() == hosted.keys() == {Modality.LATIN}
    assert Modality.TOOLS not in claude(messages="x" * 400).pieces.whole
    embedding = asked("/v1/embeddings", {"model": "m", "input": "x" * 400}).pieces
    assert embedding.whole == embedding


def test_the_same_tools_are_known_by_whatever_is_said_beside_them() -> None:
    tools = [{"type": "function", "function": {"name": "look_up", "parameters": {}}}]
    first, second = (chat(messages=text, tools=tools).pieces for text in ("hi", LONG))
    assert first.tools == second.tools > 0
    assert chat(messages=LONG, tools=[OWN]).pieces.tools not in (0, first.tools)
    assert chat(messages=LONG).pieces.tools == 0


BASE64 = b64encode(Random(1).randbytes(3_000)).decode()


def test_base64_counts_for_more_than_a_text_of_its_length() -> None:
    assert chat(messages=BASE64).pieces[Modality.LATIN] == pytest.approx(3_000, rel=0.05)
    mixed = chat(messages=["Ж" * 40, BASE64]).pieces
    assert mixed[Modality.LATIN] == pytest.approx(3_000, rel=0.05)
    assert mixed[Modality.LETTERS] == 16
    million = chat(messages=BASE64 * 250).pieces[Modality.LATIN]
    assert million == pytest.approx(750_000, rel=0.05)
    ids = [{"id": f"call_{BASE64[number : number + 24]}"} for number in range(40)]
    assert chat(messages=ids).pieces[Modality.LATIN] == pytest.approx(40 * 29 / 4, abs=1)
    for text in (
        "x" * 4_000,
        "0" * 4_000,
        "BLOCK_NONEuser" * 300,
        "/some/folder/of " * 300,
        '{"a":1,"b":["C",2]},' * 200,
    ):
        assert chat(messages=text).pieces[Modality.LATIN] == pytest.approx(len(text) / 4, abs=1)


@pytest.mark.parametrize("name", ["signature", "thoughtSignature", "encrypted_content"])
def test_what_a_provider_has_sealed_counts_as_a_text_of_its_length(name: str) -> None:
    found = chat(messages=[{"parts": [{name: BASE64, "text": "y" * 400}]}]).pieces
    assert found[Modality.LATIN] == pytest.approx(1_000 + 100, abs=2)


@pytest.mark.parametrize("images", [[LONG], "iVBOR" + LONG, [PICTURE, LONG], {"a": LONG}])
def test_what_is_named_images_and_is_none_is_a_text(images: Any) -> None:
    found = chat(messages=[{"images": images}]).pieces
    assert Modality.IMAGE not in found
    assert found[Modality.LATIN] >= len(LONG) / 4


def test_what_is_deep_and_numerous_is_refused() -> None:
    deep: Any = "x"
    for _ in range(400):
        deep = [deep]
    with pytest.raises(InvalidRequest):
        chat(x=[deep] * 200_001)


@pytest.mark.parametrize(
    ("found", "streams", "wants"),
    [
        (chat(stream=True), True, True),
        (chat(stream=True, stream_options={"include_usage": True}), True, False),
        (chat(stream=True, stream_options={"include_usage": False}), True, True),
        (chat(stream=True, stream_options=None), True, True),
        (chat(stream=True, stream_options={"include_usage": "yes"}), True, False),
        (chat(stream=True, stream_options="all"), True, False),
        (chat(), False, False),
        (asked("/v1/responses", {"model": "m", "stream": True}), True, False),
        (gemini("streamGenerateContent"), True, False),
        (asked("/v1/audio/speech", {"model": "m", "stream_format": "sse"}), True, False),
        (asked("/v1/audio/speech", {"model": "m", "stream_format": "audio"}), False, False),
    ],
)
def test_streams_and_their_usage(found: RequestFacts, streams: bool, wants: bool) -> None:
    assert (found.streams, found.wants_usage) == (streams, wants)


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'"text"', b"1"])
def test_a_body_that_is_no_object_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidRequest) as refused:
        parsed(body)
    assert refused.value.field == "body"


@pytest.mark.parametrize("model", [None, "", 5, ["m"], "x" * 201])
def test_a_body_without_a_model_is_refused(model: object) -> None:
    with pytest.raises(InvalidRequest) as refused:
        asked("/v1/chat/completions", {"model": model})
    assert refused.value.field == "model"


def test_depth_and_unknown_fields_are_no_fault() -> None:
    deep: Any = "end"
    for _ in range(900):
        deep = {"next": [deep]}
    found = chat(messages=[], field_of_next_year=deep)
    assert found.kind is Kind.TEXT_ONLY


@pytest.mark.parametrize("kind", [None, [None], {"type": "image"}, 7])
def test_a_type_that_is_no_text_is_no_fault(kind: object) -> None:
    linked = {"type": kind, "image_url": {"url": "https://host/a.png"}}
    message = {"role": "user", "content": [{"type": "text", "text": "a"}, linked]}
    assert chat(messages=[message]).model == "m"
    part = {"text": "a", "uri": "https://host/a.png", "type": kind}
    assert gemini(contents=[{"parts": [part]}]).model == "g"


def test_parts_are_counted_outside_of_texts_alone() -> None:
    most = b"[" + b"0," * (MOST_PARTS - 1)
    assert not has_too_many_parts(most)
    assert has_too_many_parts(most + b"[")
    assert has_too_many_parts(b'["' + b",[{" * 9 + b'\\\\",' + most)
    for text in (b",[{" * MOST_PARTS, b'\\",' * MOST_PARTS, b"\\\\" * MOST_PARTS + b'\\",' * 9):
        assert not has_too_many_parts(b'{"a":"' + text + b'"}')
        assert not has_too_many_parts(b'{"a":"' + text)
    with pytest.raises(PayloadTooLarge, match="too many values"):
        parsed(most + b"0,0]")


@pytest.mark.parametrize(
    ("path", "body", "is_optional"),
    [
        ("/v1/responses", {"prompt": {"id": "pmpt_1"}, "input": "hi"}, True),
        ("/v1/images/generations", {"prompt": "a cat"}, True),
        ("/v1/moderations", {"input": "hi"}, True),
        ("/v1/responses/input_tokens", {"input": "hi"}, True),
        ("/v1/responses/compact", {"input": "hi"}, False),
        ("/v1/rerank", {"query": "hi", "documents": ["a"]}, False),
        ("/v1/audio/speech", {"input": "hi", "voice": "alloy"}, False),
        ("/v1/responses", {"input": "hi"}, True),
        ("/v1/responses", {"input": "hi", "model": 5}, False),
        ("/v1/chat/completions", {"messages": [], "prompt": {"id": "x"}}, False),
        ("/v1/images/generations", {"prompt": "a cat", "model": ""}, False),
    ],
)
def test_the_model_is_optional_where_the_provider_has_it_so(
    path: str, body: dict[str, Any], is_optional: bool
) -> None:
    if is_optional:
        assert asked(path, body).model == ""
        return
    with pytest.raises(InvalidRequest, match="model"):
        asked(path, body)


def test_a_form_where_json_is_expected_is_refused_by_its_content_type() -> None:
    form = b'--b\r\nContent-Disposition: form-data; name="file"\r\n\r\n\xff\xd8\r\n--b--\r\n'
    for body, field, said in (
        (form, "Content-Type", "a form"),
        (b"\xff", "body", "UTF-8"),
        (b'\xef\xbb\xbf{"model":"m"}', "body", "without a byte order mark"),
    ):
        with pytest.raises(InvalidRequest, match=f"not JSON: it .*{said}") as refused:
            parsed(body)
        assert refused.value.field == field


def test_what_answers_with_a_judgement_or_an_order_writes_next_to_nothing() -> None:
    ranked = asked("/v1/rerank", {"model": "m", "query": "q" * 400, "documents": ["d" * 4_000]})
    judged = asked("/v1/moderations", {"model": "m", "input": "a" * 400})
    assert (ranked.max_output_tokens, judged.max_output_tokens) == (1, 1)
    assert ranked.pieces[Modality.LATIN] == pytest.approx(1_100, abs=1)
    assert ranked.kind is Kind.TEXT_ONLY


def test_the_letters_that_a_request_has_spoken_are_counted() -> None:
    spoken = asked("/v1/audio/speech", {"model": "tts-1", "input": "Zwölf!", "instructions": "x"})
    assert (spoken.characters, spoken.images, spoken.kind) == (6, 0, Kind.TEXT_ONLY)
    assert chat(input="text").characters == 0


def test_values_are_counted_in_steps_of_a_bounded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """No text is so long, and no escape so placed, that what is in it counts, or what follows it
    does not."""
    monkeypatch.setattr(parsing, "MOST_PARTS", 10)
    for size_bytes in (2, 3, 4, 5, 7, 64):
        monkeypatch.setattr(parsing, "LARGE_BYTES", size_bytes)
        for text in (b"", b"a", b",,,[[{", b'\\"', b'\\"' * 9, b"\\\\" * 7, b'\\\\\\",' * 5):
            for count in (1, 2, 9):
                texts = b",".join([b'"%b"' % text] * count)
                for values, too_many in ((10 - count, False), (11 - count, True)):
                    body = b"[" + texts + b",1" * values + b"]"
                    assert has_too_many_parts(body) is too_many, (size_bytes, body)
        assert not has_too_many_parts(b'["' + b",{[" * 50)
