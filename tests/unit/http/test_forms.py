"""JSON and URL-encoded bodies: what is taken, and how each wrong one is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.unit.http.asgi import Sender, request
from tidegate.call import Kind, Tier
from tidegate.errors import FetchRefused, InvalidRequest, PayloadTooLarge, UnsupportedMedia
from tidegate.http.submission import Submission, read_submission
from tidegate.settings import Config
from tidegate.store.blobs import Blobs

FORM = "application/x-www-form-urlencoded"


async def read_json(value: Any, config: Config, blobs: Blobs) -> Submission:
    return await read_submission(request(json.dumps(value).encode()), config, blobs)


@pytest.mark.parametrize("name", ["data", "text"])
async def test_json_carries_a_prompt_as_data_or_text(
    name: str, config: Config, blobs: Blobs
) -> None:
    got = await read_json({name: "What is modern family?"}, config, blobs)
    assert got == Submission("What is modern family?", (), None, None, None, 0, None)


async def test_json_carries_every_option(config: Config, blobs: Blobs) -> None:
    got = await read_json(
        {
            "data": "a fox",
            "image_uri": "https://example.com/fox.png",
            "type": "image_generation",
            "model": "models/gemini-2.5-flash",
            "priority": -3,
            "deadline_ms": 60_000,
        },
        config,
        blobs,
    )
    assert got.kind is Kind.IMAGE_GENERATION
    assert (got.image_uri, got.model) == ("https://example.com/fox.png", "models/gemini-2.5-flash")
    assert (got.priority, got.deadline_ms) == (-3, 60_000)


async def test_null_counts_as_absent(config: Config, blobs: Blobs) -> None:
    got = await read_json(
        {"data": "x", "text": None, "type": None, "priority": None}, config, blobs
    )
    assert (got.prompt, got.kind, got.priority) == ("x", None, 0)


async def test_a_urlencoded_form_is_taken(config: Config, blobs: Blobs) -> None:
    body = b"text=caf%C3%A9+and+tea&priority=7&type=&deadline_ms=5"
    got = await read_submission(request(body, FORM), config, blobs)
    assert (got.prompt, got.priority, got.kind, got.deadline_ms) == ("café and tea", 7, None, 5)


@pytest.mark.parametrize(
    ("said", "beside_live"),
    [
        (["live"], ()),
        (["batch", "flex"], (Tier.FLEX, Tier.BATCH)),
        (["live", "flex", "flex"], (Tier.FLEX,)),
    ],
)
async def test_a_job_names_its_tiers_in_json_or_a_form(
    said: list[str], beside_live: tuple[Tier, ...], config: Config, blobs: Blobs
) -> None:
    body = json.dumps({"data": "x", "tiers": said}).encode()
    assert (await read_submission(request(body), config, blobs, as_job=True)).tiers == beside_live
    form = f"data=x&tiers={', '.join(said)}".encode()
    got = await read_submission(request(form, FORM), config, blobs, as_job=True)
    assert got.tiers == beside_live


async def test_an_unknown_field_of_a_form_is_refused_though_it_is_empty(
    config: Config, blobs: Blobs
) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        await read_submission(request(b"data=x&webhook=", FORM), config, blobs)
    assert refusal.value.field == "webhook"


async def test_only_a_job_has_tiers(config: Config, blobs: Blobs) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        await read_json({"data": "x", "tiers": ["flex"]}, config, blobs)
    assert (refusal.value.field, refusal.value.allowed) == ("tiers", "POST /submit")


async def test_a_tier_within_a_wrapped_body_goes_before_the_tenants(
    config: Config, blobs: Blobs
) -> None:
    async def wrapped(tiers: list[str] | None, **body: Any) -> tuple[Tier, ...] | None:
        chat = {"model": "gpt-5", "messages": [{"role": "user", "content": "x"}], **body}
        value = {"endpoint": "/v1/chat/completions", "body": chat, "tiers": tiers}
        raw = json.dumps(value).encode()
        return (await read_submission(request(raw), config, blobs, as_job=True)).tiers

    assert await wrapped(None) is None
    assert await wrapped(["flex"]) == (Tier.FLEX,)
    assert await wrapped(["flex"], service_tier="auto") == (Tier.FLEX,)
    assert await wrapped(None, service_tier="priority") == ()
    assert await wrapped(["live"], service_tier="priority") == ()
    with pytest.raises(InvalidRequest) as refusal:
        await wrapped(["flex"], service_tier="priority")
    assert refusal.value.field == "tiers"


async def test_json_in_a_form_says_which_header_is_missing(config: Config, blobs: Blobs) -> None:
    with pytest.raises(UnsupportedMedia) as refusal:
        await read_submission(request(b'{"data": "x"}', FORM), config, blobs)
    assert "application/json" in str(refusal.value.allowed)


@pytest.mark.parametrize("content_type", ["application/json", FORM])
@pytest.mark.parametrize("body", [b"", b"  \r\n "])
async def test_an_empty_body_is_refused(
    content_type: str, body: bytes, config: Config, blobs: Blobs
) -> None:
    with pytest.raises(InvalidRequest, match="empty"):
        await read_submission(request(body, content_type), config, blobs)


@pytest.mark.parametrize("value", [{}, {"data": ""}, {"data": " \n"}, {"type": "text_only"}])
async def test_no_prompt_and_no_file_is_refused(
    value: dict[str, Any], config: Config, blobs: Blobs
) -> None:
    with pytest.raises(InvalidRequest, match="neither a prompt nor a file"):
        await read_json(value, config, blobs)


@pytest.mark.parametrize(
    "content_type",
    [
        None,
        "",
        "text/plain",
        "application/xml",
        "image/png",
        "application/jsonx",
        "multipart/mixed",
    ],
)
async def test_a_wrong_content_type_is_refused_before_the_body_is_read(
    content_type: str | None, config: Config, blobs: Blobs
) -> None:
    sender = Sender([b'{"data": "x"}'])
    with pytest.raises(UnsupportedMedia) as refusal:
        await read_submission(request(sender, content_type), config, blobs)
    assert refusal.value.field == "Content-Type"
    assert sender.taken == 0


async def test_a_compressed_body_is_refused(config: Config, blobs: Blobs) -> None:
    with pytest.raises(UnsupportedMedia) as refusal:
        await read_submission(
            request(b"\x1f\x8b", headers=[("content-encoding", "gzip")]), config, blobs
        )
    assert refusal.value.field == "Content-Encoding"


async def test_another_charset_is_refused(config: Config, blobs: Blobs) -> None:
    with pytest.raises(UnsupportedMedia, match="UTF-8"):
        await read_submission(request(b"{}", "application/json; charset=latin-1"), config, blobs)


async def test_two_content_types_are_refused(config: Config, blobs: Blobs) -> None:
    twice = request(b"{}", headers=[("content-type", "multipart/form-data; boundary=x")])
    with pytest.raises(UnsupportedMedia, match="more than one"):
        await read_submission(twice, config, blobs)


async def test_invalid_json_is_refused_with_its_place(config: Config, blobs: Blobs) -> None:
    with pytest.raises(InvalidRequest, match="line 2, column 9"):
        await read_submission(request(b'{\n"data": oops}'), config, blobs)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b'["data"]', "object"),
        (b'"data"', "object"),
        (b"null", "object"),
        (b'{"data": "x", "priority": NaN}', "NaN"),
        (b'{"data": "x", "priority": ' + b"9" * 5000 + b"}", "too long"),
        (b'{"data": "x", "data": "y"}', "more than once"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"data":' * 50_000, "nested too deeply"),
        (b'{"data": "\xff"}', "not UTF-8"),
    ],
)
async def test_json_that_is_no_sound_object_is_refused(
    body: bytes, said: str, config: Config, blobs: Blobs
) -> None:
    with pytest.raises(InvalidRequest, match=said):
        await read_submission(request(body), config, blobs)


@pytest.mark.parametrize(
    ("value", "field"),
    [
        ({"data": 5}, "data"),
        ({"data": ["x"]}, "data"),
        ({"data": {"text": "x"}}, "data"),
        ({"data": "a\0b"}, "data"),
        ({"text": "\ud800"}, "text"),
        ({"data": "x", "text": "y"}, "text"),
        ({"data": "x", "colour": "red"}, "colour"),
        ({"data": "x", "file": "a.pdf"}, "file"),
        ({"data": "x", "type": "poem"}, "type"),
        ({"data": "x", "type": 3}, "type"),
        ({"data": "x", "priority": "5"}, "priority"),
        ({"data": "x", "priority": 1.5}, "priority"),
        ({"data": "x", "priority": True}, "priority"),
        ({"data": "x", "priority": 101}, "priority"),
        ({"data": "x", "priority": -101}, "priority"),
        ({"data": "x", "deadline_ms": 0}, "deadline_ms"),
        ({"data": "x", "deadline_ms": 604_800_001}, "deadline_ms"),
        ({"data": "x", "model": "../secrets"}, "model"),
        ({"data": "x", "model": "models/../secrets"}, "model"),
        ({"data": "x", "model": "m?key=1"}, "model"),
        ({"data": "x", "model": "a:generateContent"}, "model"),
        ({"data": "x", "model": "m\n"}, "model"),
        ({"data": "x", "model": ""}, "model"),
        ({"data": "x", "model": "m" * 129}, "model"),
        ({"data": "x", "image_uri": 5}, "image_uri"),
        ({"data": "x", "tiers": "flex"}, "tiers"),
        ({"data": "x", "tiers": []}, "tiers"),
        ({"data": "x", "tiers": ["fast"]}, "tiers"),
        ({"data": "x", "tiers": [["flex"]]}, "tiers"),
        ({"data": "x", "tiers": {"flex": True}}, "tiers"),
    ],
)
async def test_a_wrong_value_is_refused_by_the_name_of_its_field(
    value: dict[str, Any], field: str, config: Config, blobs: Blobs
) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        await read_json(value, config, blobs)
    assert refusal.value.field == field


async def test_an_unknown_type_is_refused_with_the_known_ones(config: Config, blobs: Blobs) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        await read_json({"data": "x", "type": "poem"}, config, blobs)
    assert refusal.value.allowed == "text_only, multi_modal, image_generation"


@pytest.mark.parametrize(
    "uri",
    [
        "http://127.0.0.1/x.png",
        "http://169.254.169.254/latest/meta-data",
        "http://[::ffff:127.0.0.1]/x.png",
        "file:///etc/passwd",
        "http://localhost/x.png",
        "not a uri",
        "https://example.com/" + "x" * 2048,
    ],
)
async def test_an_image_uri_that_cannot_be_public_is_refused(
    uri: str, config: Config, blobs: Blobs
) -> None:
    with pytest.raises(FetchRefused) as refusal:
        await read_json({"data": "x", "image_uri": uri}, config, blobs)
    assert refusal.value.field == "image_uri"


async def test_a_prompt_at_its_limit_is_taken_and_over_it_refused(blobs: Blobs) -> None:
    tight = Config(max_prompt_chars=10)
    assert (await read_json({"data": "🦊" * 10}, tight, blobs)).prompt == "🦊" * 10
    with pytest.raises(PayloadTooLarge) as refusal:
        await read_json({"data": "x" * 11}, tight, blobs)
    assert refusal.value.field == "data"


@pytest.mark.parametrize("content_type", ["application/json", FORM])
async def test_a_long_text_body_is_refused_while_it_arrives(
    content_type: str, blobs: Blobs
) -> None:
    sender = Sender(b"x" * 10_000 for _ in range(1000))
    with pytest.raises(PayloadTooLarge):
        await read_submission(request(sender, content_type), Config(max_prompt_chars=10), blobs)
    assert sender.taken <= 8


async def test_a_form_with_too_many_fields_is_refused(config: Config, blobs: Blobs) -> None:
    with pytest.raises(InvalidRequest, match="too many fields"):
        await read_submission(request(b"a=1&" * 10_000, FORM), config, blobs)
