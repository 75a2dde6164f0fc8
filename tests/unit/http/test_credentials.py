"""What a request shows: a key from wherever SDKs put it, and never one too many."""

from __future__ import annotations

from dataclasses import replace

import pytest
from pydantic import SecretStr

from tidegate.dialects import endpoint_of
from tidegate.dialects.spec import Dialect
from tidegate.http.auth import Credentials, credentials_in
from tidegate.http.guards import own_urls, upload_secret, upload_upstream
from tidegate.http.native import _query
from tidegate.policy.deployment import Upstream

KEY = b"tg_abcdefghij_" + b"a" * 43
OTHER = b"tg_abcdefghij_" + b"b" * 43


@pytest.mark.parametrize(
    ("headers", "query"),
    [
        ([(b"authorization", b"Bearer " + KEY)], b""),
        ([(b"authorization", b"bearer  " + KEY + b" ")], b""),
        ([(b"x-api-key", KEY)], b""),
        ([(b"api-key", KEY)], b""),
        ([(b"x-goog-api-key", b" " + KEY)], b""),
        ([], b"key=" + KEY),
        ([], b"alt=sse&key=" + KEY + b"&wait=1"),
        ([], b"key=" + KEY.replace(b"_", b"%5F")),
        ([(b"x-goog-api-key", KEY), (b"authorization", b"Bearer " + KEY)], b"key=" + KEY),
        # Credentials of others' do no harm, in whatever order.
        ([(b"authorization", b"Basic dXNlcjpwYXNz"), (b"x-api-key", KEY)], b""),
        ([(b"authorization", b"Bearer eyJhbGciOi"), (b"x-api-key", KEY)], b""),
        ([(b"x-api-key", KEY), (b"authorization", b"Bearer eyJhbGciOi")], b""),
    ],
)
def test_a_key_is_found_wherever_it_may_be(
    headers: list[tuple[bytes, bytes]], query: bytes
) -> None:
    assert credentials_in([(b"host", b"h"), *headers], query) == Credentials(KEY, None, False)


@pytest.mark.parametrize(
    ("headers", "query"),
    [
        ([], b""),
        ([(b"authorization", b"Bearer")], b""),
        ([(b"authorization", KEY)], b""),
        ([(b"authorization", b"Basic " + KEY)], b""),
        ([(b"x-api-key", b" ")], b"key="),
        ([(b"cookie", b"key=" + KEY)], b"monkey=" + KEY),
    ],
)
def test_nothing_shown_is_nothing_found(headers: list[tuple[bytes, bytes]], query: bytes) -> None:
    assert credentials_in(headers, query) == Credentials(None, None, False)


def test_two_keys_that_differ_are_one_too_many() -> None:
    assert credentials_in([(b"x-api-key", KEY), (b"x-goog-api-key", OTHER)], b"").several
    assert credentials_in([(b"x-api-key", KEY), (b"x-api-key", OTHER)], b"").several
    assert credentials_in([(b"authorization", b"Bearer " + KEY)], b"key=" + OTHER).several


@pytest.mark.parametrize(
    ("query", "goes_on"),
    [
        (b"a=1;2&key=k&b=%ff+%20&&c", b"a=1;2&b=%ff+%20&&c"),
        (b"%6Bey=k", b""),
        (b"a=x%26key=k&KEY=k&$key=k", b"a=x%26key=k"),
        (b"monkey=%2f&a=key", b"monkey=%2f&a=key"),
        (b"$httpHeaders=X-Goog-FieldMask:a&$HTTPMethod=GET&a=$http", b"a=$http"),
    ],
)
@pytest.mark.parametrize("came_at", [b"/v1/", b"/openai/deployments/x/"])
def test_a_key_is_cut_out_of_a_query_whose_rest_goes_on_as_it_came(
    query: bytes, goes_on: bytes, came_at: bytes
) -> None:
    endpoint = endpoint_of("GET", "/v1/files", Dialect.OPENAI)
    assert endpoint is not None
    version = b"&api-version=1&api%2Dversion" if b"openai" in came_at else b""
    assert _query(endpoint, query + version, came_at) == goes_on.decode()


def test_a_tenant_is_named_once() -> None:
    named = (b"x-tidegate-tenant", b"acme")
    assert credentials_in([named, named], b"").tenant == b"acme"
    assert credentials_in([named, (b"x-tidegate-tenant", b"other")], b"").tenant == b""


def test_an_upload_goes_on_where_its_url_says_that_it_has_begun() -> None:
    scope = {"headers": [(b"host", b"gw")], "query_string": b"", "scheme": "http"}
    url = own_urls(scope, "/upload", "secret")("upload_id=a%2Fb&tidegate_upstream=other")
    query = url.partition("?")[2].encode()
    for whole in (query, query + b"&key=tg_x", query.replace(b"%2F", b"/")):
        assert upload_upstream(whole, "secret") == "other"
    for changed in (
        query.replace(b"=other", b"=gemini"),
        query.replace(b"=a", b"=c"),
        query + b"&tidegate_upstream=gemini",
        query.partition(b"&tidegate_upload=")[0],
        b"tidegate_upstream=other",
    ):
        assert upload_upstream(changed, "secret") == ""
    assert upload_upstream(query, "another") == ""


def test_no_upload_is_signed_by_nothing() -> None:
    own = Upstream("own", {"gemini": "http://own"}, "", ())
    operators = SecretStr("tgop_1")
    assert upload_secret([own, replace(own, name="paid", key="k")], operators) == "k"
    secret = upload_secret([own], operators)
    assert len(secret) == 64, "never an empty one, which a client knows too"
    assert secret == upload_secret([], operators)
    assert secret != upload_secret([own], SecretStr("tgop_2"))
