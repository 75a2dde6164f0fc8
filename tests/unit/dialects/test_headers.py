"""Which headers pass."""

from __future__ import annotations

import pytest

from tidegate.dialects.headers import as_private, requested_tier_in, to_return, to_send
from tidegate.dialects.spec import Dialect
from tidegate.policy.access import AccessOptions


def test_keys_hops_and_traces_of_the_client_stay_here() -> None:
    given = [
        (b"host", b"here"),
        (b"authorization", b"Bearer theirs"),
        (b"x-api-key", b"theirs"),
        (b"x-goog-api-key", b"theirs"),
        (b"cookie", b"a=b"),
        (b"connection", b"close, X-Hop"),
        (b"connection", b"keep-alive"),
        (b"x-hop", b"1"),
        (b"x-http-method-override", b"DELETE"),
        (b"transfer-encoding", b"chunked"),
        (b"content-length", b"5"),
        (b"x-forwarded-for", b"10.0.0.1"),
        (b"x-tidegate-priority", b"5"),
        (b"idempotency-key", b"k"),
        (b"accept-encoding", b"gzip"),
        (b"x-goog-fieldmask", b"candidates"),
        (b"x-goog-encode-response-if-executable", b"base64"),
        (b"content-type", b"application/json"),
        (b"x-stainless-lang", b"python"),
        (b"anthropic-beta", b"new"),
    ]
    sent = AccessOptions().access(Dialect.ANTHROPIC, "http://u", "ours").dressed(to_send(given))
    assert sent == [
        (b"content-type", b"application/json"),
        (b"x-stainless-lang", b"python"),
        (b"anthropic-beta", b"new"),
        (b"accept-encoding", b"identity"),
        (b"x-api-key", b"ours"),
    ]


def test_the_key_is_shown_as_the_dialect_has_it() -> None:
    def own(dialect: Dialect) -> list[tuple[bytes, bytes]]:
        return AccessOptions().access(dialect, "http://u", "k").dressed([])

    assert own(Dialect.OPENAI) == [(b"authorization", b"Bearer k")]
    assert own(Dialect.GEMINI) == [(b"x-goog-api-key", b"k")]


def test_what_comes_back() -> None:
    given = [
        (b"Content-Type", b"application/json"),
        (b"Content-Length", b"10"),
        (b"Connection", b"X-Odd"),
        (b"Connection", b"close"),
        (b"X-Odd", b"1"),
        (b"X-Bell", b"a\x07b"),
        (b"Date", b"Tue, 15 Nov 1994 08:12:31 GMT"),  # our server tells its own
        (b"Clear-Site-Data", b"*"),
        (b"Set-Cookie", b"tracked=1"),
        (b"Transfer-Encoding", b"chunked"),
        (b"X-Tidegate-Request-Id", b"forged"),
        (b"x-ratelimit-remaining-requests", b"9"),
    ]
    assert to_return(given) == [
        (b"content-type", b"application/json"),
        (b"content-length", b"10"),
        (b"x-ratelimit-remaining-requests", b"9"),
    ]
    assert (b"content-length", b"10") not in to_return(given, same_length=False)


@pytest.mark.parametrize(
    "name",
    [
        *("cf-connecting-ip", "cf-connecting-ipv6", "cf-ipcountry", "cf-ray", "cf-visitor"),
        *("cdn-loop", "true-client-ip", "x-client-ip", "x-cluster-client-ip", "fastly-client-ip"),
        *("fly-client-ip", "x-azure-clientip", "x-azure-socketip", "x-appengine-user-ip"),
        *("x-envoy-external-address", "x-original-forwarded-for", "client-ip", "x-amz-cf-id"),
        *("cf-access-jwt-assertion", "cf-access-authenticated-user-email", "cf-access-token"),
        *("x-goog-iap-jwt-assertion", "x-goog-authenticated-user-email", "x-pomerium-claim-email"),
        *("x-amzn-oidc-accesstoken", "x-amzn-oidc-data", "x-amzn-oidc-identity"),
        *("x-ms-token-aad-access-token", "x-ms-client-principal", "x-ms-client-principal-name"),
        *("x-auth-request-access-token", "x-auth-request-email", "x-authentik-jwt", "remote-user"),
        *("client-cert", "client-cert-chain", "x-client-cert", "x-ssl-client-cert"),
        *("ssl-client-subject-dn", "x-amzn-mtls-clientcert", "x-arr-clientcert"),
    ],
)
def test_what_a_proxy_before_the_gateway_knows_of_a_client_stays_here(name: str) -> None:
    """Its address, its certificate, and the tokens of whom it has signed in. A provider behind
    Cloudflare rejects any call that has an address from Cloudflare."""
    assert to_send([(name.encode(), b"x")]) == [(b"accept-encoding", b"identity")]


def test_what_clients_say_to_an_upstream_passes() -> None:
    for name in (
        *("cf-aig-metadata", "x-ms-client-request-id", "x-goog-api-client", "x-stainless-os"),
        *("openai-beta", "anthropic-beta", "http-referer", "x-title", "x-client-name", "baggage"),
        *("x-amzn-bedrock-trace", "x-vertex-ai-llm-request-type", "helicone-user-id"),
    ):
        assert to_send([(name.encode(), b"x")])[0] == (name.encode(), b"x"), name


def test_what_concerns_a_browser_or_a_connection_stays_here() -> None:
    for name in (
        *("Access-Control-Allow-Origin", "access-control-allow-credentials", "WWW-Authenticate"),
        *("Service-Worker-Allowed", "Link", "Location", "Content-Location", "Server", "Via"),
        *("Alt-Svc", "Strict-Transport-Security", "Set-Cookie", "Content-Security-Policy"),
        *("Clear-Site-Data", "Cross-Origin-Opener-Policy", "X-Frame-Options", "Refresh", "NEL"),
        *("Permissions-Policy", "Timing-Allow-Origin", "SourceMap", "Sec-WebSocket-Accept"),
        *("Proxy-Authenticate", "Upgrade", "Keep-Alive", "Report-To", "Accept-CH"),
    ):
        assert to_return([(name.encode(), b"x")]) == [], name


def test_what_a_proxy_before_the_gateway_would_obey_stays_here() -> None:
    """nginx answers `X-Accel-Redirect: /inner/file` with that, whoever the header is from."""
    for name in (
        *("X-Accel-Redirect", "X-Accel-Expires", "X-Accel-Limit-Rate", "X-Accel-Charset"),
        *("X-Sendfile", "X-LIGHTTPD-send-file", "X-Reproxy-URL", "Surrogate-Control"),
        *("CDN-Cache-Control", "Cloudflare-CDN-Cache-Control", "Edge-Control"),
    ):
        assert to_return([(name.encode(), b"x")]) == [], name
    assert to_return([(b"x-accel-buffering", b"no")]) == [(b"x-accel-buffering", b"no")]


@pytest.mark.parametrize(
    ("stated", "kept"),
    [
        ([], [b"private, no-cache"]),
        ([(b"cache-control", b"public, max-age=3600"), (b"expires", b"x")], [b"private, no-cache"]),
        ([(b"cache-control", b"Private, max-age=60")], [b"Private, max-age=60"]),
        ([(b"cache-control", b"no-store"), (b"cache-control", b"x")], [b"no-store", b"x"]),
    ],
)
def test_an_answer_to_get_is_kept_for_no_other_caller(
    stated: list[tuple[bytes, bytes]], kept: list[bytes]
) -> None:
    found = as_private([(b"etag", b"1"), *stated])
    assert found == [(b"etag", b"1"), *((b"cache-control", one) for one in kept)]


def test_what_sdks_and_operators_read_passes() -> None:
    for name in (
        *("content-type", "content-disposition", "cache-control", "etag", "retry-after"),
        *("retry-after-ms", "x-should-retry", "x-request-id", "request-id", "cf-ray"),
        *("openai-organization", "openai-processing-ms", "openai-version", "openai-model"),
        *("anthropic-organization-id", "anthropic-ratelimit-tokens-remaining"),
        *("x-ratelimit-limit-requests", "x-ratelimit-reset-tokens", "ratelimit", "x-goog-hash"),
        *("x-goog-upload-url", "x-goog-upload-status", "x-goog-upload-chunk-granularity"),
        *("x-goog-upload-size-received", "x-gemini-service-tier", "deprecation", "sunset", "vary"),
        *("x-content-type-options", "x-vertex-ai-llm-request-type", "azureml-model-session"),
    ):
        assert to_return([(name.encode(), b"x")]) == [(name.encode(), b"x")], name


def test_a_header_that_repeats_the_upstreams_key_does_not_show_it() -> None:
    seen = [(b"x-seen", b"Bearer sk-secret-key"), (b"x-cache", b"none")]
    assert to_return(seen, "sk-secret-key") == [(b"x-seen", b"Bearer ***"), (b"x-cache", b"none")]
    assert to_return(seen, "none") == seen
    assert to_return(seen, "") == seen


@pytest.mark.parametrize(
    ("in_body", "in_header", "tier"),
    [
        ("fast", b"flex", "fast"),
        ("ultrafast", b"flex", "ultrafast"),
        ("priority", b"flex", "priority"),
        ("flex", b"priority", "priority"),
        ("default", b"flex", "flex"),
        ("", b"priority", "priority"),
        ("flex", b"default", "flex"),
    ],
)
def test_no_header_names_a_cheaper_tier_than_the_body(
    in_body: str, in_header: bytes, tier: str
) -> None:
    headers = [(b"x-vertex-ai-llm-shared-request-type", in_header)]
    assert requested_tier_in(headers, in_body) == tier
