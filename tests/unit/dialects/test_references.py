"""References in bodies: what a request names, however it is written, and what is only a word."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tidegate.dialects import DIALECTS
from tidegate.dialects.resources import early_text
from tidegate.dialects.spec import Dialect
from tidegate.errors import InvalidRequest, NotFound

GOOGLE = "https://generativelanguage.googleapis.com"


def named(dialect: Dialect, body: Any) -> list[tuple[str, str]]:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    found = DIALECTS[dialect].references(json.loads(raw), raw)
    return [(one.kind, one.resource_id) for one in found]


def part(uri: str) -> dict[str, Any]:
    return {"contents": [{"parts": [{"fileData": {"fileUri": uri}}]}]}


@pytest.mark.parametrize(
    "uri",
    [
        *(f"{GOOGLE}/v1beta/files/abc", f"{GOOGLE}/v1/files/abc", "files/abc", "v1beta/files/abc"),
        "https://%67enerativelanguage.googleapis.com/v1beta/files/abc",
    ],
)
def test_a_file_of_the_account_is_known_by_its_uri(uri: str) -> None:
    assert named(Dialect.GEMINI, part(uri)) == [("file", "abc")]
    escaped = json.dumps(part(uri)).replace("fileUri", "\\u0066ileUri").replace("/", "\\/")
    assert named(Dialect.GEMINI, escaped.encode()) == [("file", "abc")]


@pytest.mark.parametrize(
    "uri",
    ["gs://bucket/files/abc", "https://www.youtube.com/watch?v=abc", "https://a.b/files/abc"],
)
def test_what_is_somewhere_else_is_nobody_s(uri: str) -> None:
    assert named(Dialect.GEMINI, part(uri)) == []


@pytest.mark.parametrize(
    "uri",
    [
        f"{GOOGLE}//v1beta/files/abc",
        f"{GOOGLE}/v1beta/files/abc?x",
        f"{GOOGLE}/v1beta/%66iles/abc",
        "HTTPS://GenerativeLanguage.googleapis.com/v1beta/files/abc",
        "x/files/abc",
    ],
)
def test_what_only_the_provider_might_read_as_a_file_is_refused(uri: str) -> None:
    with pytest.raises(NotFound):
        named(Dialect.GEMINI, part(uri))


def test_caches_and_interactions_are_named_anywhere() -> None:
    asked = {"cachedContent": "cachedContents/a", "previous_interaction_id": "v1_b"}
    both = [("cached_content", "a"), ("interaction", "v1_b")]
    assert named(Dialect.GEMINI, asked) == both
    assert named(Dialect.GEMINI, {"generateContentRequest": asked}) == both
    with pytest.raises(NotFound):
        named(Dialect.GEMINI, {"cachedContent": "projects/p/cachedContents/a"})


@pytest.mark.parametrize("field", ["fileSearchStoreNames", "file_search_store_names"])
def test_stores_are_named_by_a_tool(field: str) -> None:
    body = {"contents": [], "tools": [{"fileSearch": {field: ["fileSearchStores/a"]}}]}
    assert named(Dialect.GEMINI, body) == [("file_search_store", "a")]
    body["tools"] = [{"fileSearch": {field: ["fileSearchStores/a/../b"]}}]
    with pytest.raises(NotFound):
        named(Dialect.GEMINI, body)


def test_an_imported_file_is_named_by_the_body_of_a_request_on_a_store() -> None:
    references = DIALECTS[Dialect.GEMINI].references
    (found,) = references({}, b'{"fileName": "files/abc"}')
    assert (found.kind, found.resource_id) == ("file", "abc")
    with pytest.raises(NotFound):
        references({}, b'{"\\u0066ile_name": "filesx/abc"}')


def test_of_a_field_that_stands_twice_both_count() -> None:
    twice = b'{"input":[{"content":[{"type":"input_file","file_id":"a","file_id":"b"}]}]}'
    assert named(Dialect.OPENAI, twice) == [("file", "a"), ("file", "b")]
    tools = {"tools": [{"type": "code_interpreter", "container": {"file_ids": ["a", "c"]}}]}
    assert named(Dialect.OPENAI, tools) == [("file", "a"), ("file", "c")]


def test_words_of_models_and_functions_name_nothing() -> None:
    cited = {"annotations": [{"type": "file_citation", "file_id": "a"}]}
    schema = {"tools": [{"parameters": {"properties": {"x": {"file_id": "a"}}}}]}
    assert named(Dialect.OPENAI, {"input": [cited], **schema}) == []
    used = {"type": "tool_use", "input": {"file_id": "a"}}
    output = {"type": "bash_code_execution_output", "file_id": "b"}
    said = {"messages": [{"content": [used, {"content": [output]}]}]}
    assert named(Dialect.ANTHROPIC, said) == []
    # A second type, which a server might go by, takes the exception away.
    double = b'{"messages":[{"type":"file_citation","type":"file","file_id":"a"}]}'
    assert named(Dialect.ANTHROPIC, double) == [("file", "a")]


def test_pages_are_read_in_each_dialect_s_words() -> None:
    shown = [("a", {"id": "a"}), ("b", {"id": "b"})]
    gemini = DIALECTS[Dialect.GEMINI].page("file", "pageSize=2&pageToken=z")
    assert (gemini.limit, gemini.after, gemini.newest_first) == (2, "z", False)
    assert gemini.whole(shown, True, "b")["nextPageToken"] == "b"
    assert gemini.whole([], False, None) == {}
    anthropic = DIALECTS[Dialect.ANTHROPIC].page("file", "limit=2&page=page_z")
    assert (anthropic.limit, anthropic.after, anthropic.newest_first) == (2, "z", True)
    assert anthropic.whole(shown, False, "b")["next_page"] is None
    openai = DIALECTS[Dialect.OPENAI].page("file", "limit=10000&purpose=vision")
    assert (openai.limit, openai.newest_first) == (100, True)
    assert not openai.matches({"purpose": "evals"})


def test_a_page_of_nothing_is_one_where_the_provider_has_it_so() -> None:
    openai = DIALECTS[Dialect.OPENAI].page
    assert openai("chat_completion", "limit=0").limit == 0
    with pytest.raises(InvalidRequest):
        openai("file", "limit=0")
    assert DIALECTS[Dialect.GEMINI].page("file", "pageSize=0").limit == 10


@pytest.mark.parametrize(
    ("dialect", "query", "field"),
    [
        (Dialect.GEMINI, "pageSize=101", "pageSize"),
        (Dialect.ANTHROPIC, "before_id=a", "before_id"),
        (Dialect.ANTHROPIC, "&".join(f"ids=a{n}" for n in range(101)), "ids"),
        (Dialect.OPENAI, "order=up", "order"),
        (Dialect.OPENAI, f"after={'a' * 401}", "after"),
    ],
)
def test_a_page_that_can_t_be_is_refused_by_its_field(
    dialect: Dialect, query: str, field: str
) -> None:
    with pytest.raises(InvalidRequest) as refused:
        DIALECTS[dialect].page("file", query)
    assert refused.value.field == field


def test_a_conversation_has_one_id_that_no_server_reads_otherwise() -> None:
    own = {"conversation": {"id": "conv_own"}}
    assert named(Dialect.OPENAI, own) == [("conversation", "conv_own")]
    for inner in ('"id":"conv_other","id":"conv_own"', '"ID":"conv_other","id":"conv_own"'):
        raw = f'{{"model":"m","conversation":{{{inner}}}}}'.encode()
        with pytest.raises(InvalidRequest) as refused:
            named(Dialect.OPENAI, raw)
        assert refused.value.field == "conversation"


@pytest.mark.parametrize("field", ["previous_interaction_id", "previousInteractionId"])
def test_an_interaction_is_continued_under_either_form_of_the_name(field: str) -> None:
    body = {"model": "m", "input": "more", field: "v1_abc"}
    assert named(Dialect.GEMINI, body) == [("interaction", "v1_abc")]


@pytest.mark.parametrize(
    ("beginning", "found"),
    [
        (b'{"error": null, "id" : "r\\u0031", "output": [{"id": "x", "result": "AAA', "r1"),
        (b'{"a": {"id": "no"}, "b": ["id", "no"], "c": "id", "id": "yes", "d": ', "yes"),
        (b'{"said": "say \\"id\\": \\"no\\", ', None),
        (b'{"output": [{"id": "no"}], "id": 5, "x": "id"', None),
        (b'{"id": "\xff", ', None),
        (b'{"id": "cut', None),
        (b'{"id"', None),
        (b"{", None),
    ],
)
def test_an_object_whose_end_is_missing_names_itself(beginning: bytes, found: str | None) -> None:
    assert early_text(beginning, "id") == found


ITEM = "msg_0123456789abcdef01234567"


@pytest.mark.parametrize(
    "item",
    [
        {"type": "item_reference", "id": ITEM},
        {"id": ITEM},
        {"id": ITEM, "type": None},
        {"type": "reasoning", "id": ITEM, "summary": [], "encrypted_content": None},
        {"type": "image_generation_call", "id": ITEM},
        {"type": "web_search_call", "id": ITEM, "status": "completed"},
        {"type": "message", "id": ITEM, "role": "assistant", "content": []},
    ],
)
def test_an_item_that_is_not_whole_is_taken_by_its_id(item: dict[str, Any]) -> None:
    assert named(Dialect.OPENAI, {"input": [item, item]}) == [("item", ITEM)]
    escaped = json.dumps({"input": [item]}).replace('"id"', '"\\u0069d"').encode()
    assert named(Dialect.OPENAI, escaped) == [("item", ITEM)]


@pytest.mark.parametrize(
    "item",
    [
        {"type": "reasoning", "id": ITEM, "summary": [], "encrypted_content": "gAAA"},
        {"type": "message", "id": ITEM, "role": "assistant", "content": [{"text": "Hello"}]},
        {"id": ITEM, "role": "assistant", "content": "Hello"},
        {"type": "function_call", "id": ITEM, "call_id": "c", "name": "f", "arguments": ""},
        {"type": "function_call_output", "id": ITEM, "call_id": "c", "output": "1"},
    ],
)
def test_an_item_with_its_content_refers_to_nothing(item: dict[str, Any]) -> None:
    assert named(Dialect.OPENAI, {"input": [item]}) == []


def test_of_two_ids_or_types_of_an_item_both_count() -> None:
    twice = (
        b'{"input":[{"type":"item_reference","id":"a","type":"message","id":"b","content":"x"}]}'
    )
    assert named(Dialect.OPENAI, twice) == [("item", "a"), ("item", "b")]


def test_what_else_an_answer_has_named_is_named_by_its_field() -> None:
    tools = [{"type": "file_search", "vector_store_ids": ["vs_1", "vs_2"]}]
    found = [("vector_store", "vs_1"), ("vector_store", "vs_2")]
    assert named(Dialect.OPENAI, {"input": "?", "tools": tools}) == found
    spoken = [{"role": "assistant", "audio": {"id": "audio_1"}}]
    assert named(Dialect.OPENAI, {"messages": spoken}) == [("audio", "audio_1")]
    skill = {"type": "custom", "skill_id": "skill_1", "version": "latest"}
    shell = {"type": "shell", "environment": {"type": "container_auto", "skills": [skill]}}
    assert named(Dialect.OPENAI, {"input": "?", "tools": [shell]}) == [("skill", "skill_1")]
    body = {"container": {"id": "c", "skills": [skill]}, "messages": []}
    assert named(Dialect.ANTHROPIC, body) == [("container", "c"), ("skill", "skill_1")]
