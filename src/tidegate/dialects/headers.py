"""Headers: which are forwarded each way, limits and waits in them, and redirects.

Rate limits are read from the headers of OpenAI, compatible providers (Azure, Groq, Mistral,
Cerebras, Together, OpenRouter) and Anthropic; Google sends none. A value that is not a number is
skipped, never an error. Times are compared with the clock of the server that sent them.

Invariants: hop-by-hop headers, and those of the client's browser, address and key, are never
forwarded; unknown headers are. A wait is within 0 to `MAX_RETRY_AFTER_MS`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from operator import itemgetter
from typing import Literal

from tidegate.dialects.spec import ErrorAnswer, Headers
from tidegate.prices.rates import STANDARD_TIERS

_LONGEST_TIER = 40

# RFC 9110, section 7.6.1; the headers that Connection names are added to these.
_HOP_BY_HOP = frozenset(
    (
        *(b"connection", b"keep-alive", b"proxy-connection", b"proxy-authenticate"),
        *(b"proxy-authorization", b"te", b"trailer", b"transfer-encoding", b"upgrade"),
    )
)
_OURS = b"x-tidegate-"
_NOT_SENT = _HOP_BY_HOP | frozenset(
    (
        *(b"host", b"content-length", b"expect", b"accept-encoding", b"cookie", b"idempotency-key"),
        *(b"authorization", b"x-api-key", b"x-goog-api-key", b"api-key"),
        *(b"openai-organization", b"openai-project", b"x-goog-user-project"),
        b"anthropic-workspace-id",
        # Of a request that its client has signed for AWS.
        *(b"x-amz-date", b"x-amz-security-token", b"x-amz-content-sha256", b"x-amz-user-agent"),
        *(b"amz-sdk-invocation-id", b"amz-sdk-request"),
        *(b"forwarded", b"via", b"x-real-ip", b"origin", b"referer"),
        # By which a proxy in front of us passes on a client's address.
        *(b"cf-connecting-ip", b"cf-connecting-ipv6", b"cf-pseudo-ipv4", b"cf-ipcountry"),
        *(b"cf-ray", b"cf-visitor", b"cf-worker", b"cf-ew-via", b"cdn-loop", b"x-amz-cf-id"),
        *(b"true-client-ip", b"client-ip", b"x-client-ip", b"x-cluster-client-ip"),
        *(b"fastly-client-ip", b"fly-client-ip", b"x-azure-clientip", b"x-azure-socketip"),
        *(b"x-appengine-user-ip", b"x-original-forwarded-for", b"x-remote-ip", b"x-remote-addr"),
        # Or a certificate, or the people and tokens of a sign-in there.
        *(b"client-cert", b"client-cert-chain", b"x-client-cert", b"x-arr-clientcert"),
        # Some servers read the real method or path from these.
        *(b"x-http-method-override", b"x-http-method", b"x-method-override"),
        *(b"x-original-url", b"x-rewrite-url"),
        # Some servers start work for these that continues after their answer, without a permit.
        *(b"prefer", b"x-dashscope-async"),
        # These have Google leave out fields, such as the usage, or encode the answer.
        *(b"x-goog-fieldmask", b"x-goog-encode-response-if-executable"),
    )
)
_NOT_SENT_PREFIXES = (
    *(_OURS, b"x-forwarded-", b"sec-", b"proxy-", b"remote-", b"ssl-client-", b"x-ssl-client-"),
    *(b"cf-access-", b"x-goog-iap-", b"x-goog-authenticated-user-", b"x-pomerium-"),
    *(b"x-amzn-oidc-", b"x-amzn-mtls-", b"x-ms-client-principal", b"x-ms-token-"),
    *(b"x-auth-request-", b"x-authentik-", b"x-envoy-"),
)
# Headers that control the client's browser, our origin or our connections, and those that our own
# server sets. Location: a client that followed it to an upstream's address would send its key
# there.
_NOT_RETURNED = _HOP_BY_HOP | frozenset(
    (
        *(b"date", b"server", b"via", b"x-powered-by", b"alt-used", b"priority"),
        *(b"location", b"content-location", b"refresh", b"link"),
        *(b"set-cookie", b"set-cookie2", b"clear-site-data", b"set-login", b"p3p"),
        *(b"www-authenticate", b"authentication-info", b"activate-storage-access"),
        *(b"alt-svc", b"strict-transport-security", b"public-key-pins", b"expect-ct"),
        *(b"public-key-pins-report-only", b"early-data", b"http2-settings"),
        *(b"content-security-policy", b"content-security-policy-report-only"),
        *(b"permissions-policy", b"feature-policy", b"document-policy", b"referrer-policy"),
        *(b"x-frame-options", b"x-xss-protection", b"x-permitted-cross-domain-policies"),
        *(b"x-dns-prefetch-control", b"x-download-options", b"x-ua-compatible"),
        *(
            b"origin-agent-cluster",
            b"origin-trial",
            b"service-worker-allowed",
            b"speculation-rules",
        ),
        *(b"supports-loading-mode", b"no-vary-search", b"sourcemap", b"x-sourcemap"),
        *(b"nel", b"report-to", b"reporting-endpoints", b"timing-allow-origin", b"tk"),
        *(b"accept-ch", b"accept-ch-lifetime", b"critical-ch", b"use-as-dictionary"),
        # Instructions to a proxy in front of us: to send a file or an internal address of its own,
        # to change the speed or the charset, or to cache the answer for others. The instruction not
        # to buffer a stream (x-accel-buffering) is forwarded.
        *(b"x-accel-redirect", b"x-accel-expires", b"x-accel-limit-rate", b"x-accel-charset"),
        *(b"x-sendfile", b"x-sendfile-temporary", b"x-lighttpd-send-file", b"x-sendfile2"),
        *(b"x-lighttpd-send-tempfile", b"x-reproxy-url", b"x-reproxy-file", b"edge-control"),
        *(b"surrogate-control", b"cdn-cache-control", b"cloudflare-cdn-cache-control"),
    )
)
# Cache-Control for an answer to one caller: no shared cache in front of us may keep it.
_PRIVATE = (b"private", b"no-store")
_PRIVATE_ONLY = (b"cache-control", b"private, no-cache")
_NOT_RETURNED_PREFIXES = (_OURS, b"access-control-", b"cross-origin-", b"sec-", b"proxy-")
_SHORTEST_SECRET_BYTES = 8  # a shorter one, such as `none`, is not a secret
_NO_VALUE = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")


def to_send(headers: Iterable[tuple[bytes, bytes]]) -> Headers:
    """Return a client's headers that are forwarded to the upstream. Names are in lower case, as in
    ASGI."""
    found, named = [], b""
    for pair in headers:
        name = pair[0]
        if name in _NOT_SENT:
            if name == b"connection":  # there may be several
                named = b"%b,%b" % (named, pair[1].lower()) if named else pair[1].lower()
        elif not name.startswith(_NOT_SENT_PREFIXES):
            found.append(pair)
    if named and named not in (b"keep-alive", b"close"):
        found = _without_named(found, named)
    # The usage of a compressed answer could not be read.
    found.append((b"accept-encoding", b"identity"))
    return found


def _without_named(headers: Headers, connection: bytes) -> Headers:
    """Return `headers` without those that the value of Connection names."""
    dropped = {name.strip() for name in connection.split(b",")}
    return [pair for pair in headers if pair[0] not in dropped]


def to_return(
    headers: Iterable[tuple[bytes, bytes]], key: str = "", *, same_length: bool = True
) -> Headers:
    """Return the headers of an upstream's answer that are forwarded to the client. The upstream's
    `key` is masked in their values."""
    found, named = [], b""
    for raw_name, value in headers:
        name = raw_name.lower()
        if name == b"connection":
            named = b"%b,%b" % (named, value.lower()) if named else value.lower()
        if name in _NOT_RETURNED or (name == b"content-length" and not same_length):
            continue
        if not name.startswith(_NOT_RETURNED_PREFIXES) or name == b"x-tidegate-emulator":
            found.append((name, value))
    values = b"".join([value for _, value in found])
    if values.find(secret := key.encode()) >= 0 and len(secret) >= _SHORTEST_SECRET_BYTES:
        found = [(name, value.replace(secret, b"***")) for name, value in found]
    if _NO_VALUE.search(values):  # our server would not send it
        found = [pair for pair in found if not _NO_VALUE.search(pair[1])]
    if named and named not in (b"keep-alive", b"close"):
        found = _without_named(found, named)
    return found


def as_private(headers: Headers) -> Headers:
    """Return the headers of an answer to GET, changed so that no cache serves it to another caller:
    a cache in front of us does not vary by `x-api-key` or `?key=`, and may keep an answer that
    states no expiry."""
    stated = b",".join([value.lower() for name, value in headers if name == b"cache-control"])
    if any(one in stated for one in _PRIVATE):
        return headers
    left = [pair for pair in headers if pair[0] not in (b"cache-control", b"expires")]
    return [*left, _PRIVATE_ONLY]


# A browser shows these as text. All other types, or none, it may run as a page of our origin, where
# the dashboard is: a file of a tenant's may be HTML, and a key may be in a link.
_SHOWN_AS_TEXT = (b"application/json", b"text/event-stream")
_AS_DATA = [
    (b"content-security-policy", b"default-src 'none'; sandbox"),
    (b"x-content-type-options", b"nosniff"),
]


_NAME = itemgetter(0)


def as_data(headers: Headers) -> Headers:
    """Return the headers of an answer, changed so that no browser runs its content."""
    names = [*map(_NAME, headers)]
    is_typed = names.count(b"content-type") == 1
    if is_typed and headers[names.index(b"content-type")][1].startswith(_SHOWN_AS_TEXT):
        return headers
    return [pair for pair in headers if pair[0] != b"x-content-type-options"] + _AS_DATA


def content_type_in(headers: Headers) -> str | None:
    """Return the value of Content-Type; None without one."""
    for name, value in headers:
        if name == b"content-type":
            return value.decode("latin-1")
    return None


_CONDITIONS = (b"if-none-match", b"if-modified-since")


def is_unchanged(status: int, sent: Headers) -> bool:
    """Return whether an answer without a body is complete, because the client has the content
    already."""
    return status == 304 and any(name in _CONDITIONS for name, _ in sent)


# Of Gemini; of Bedrock's InvokeModel, both ways; of Vertex, in requests.
_LATENCY = b"x-amzn-bedrock-performanceconfig-latency"
_SERVED_TIERS = (b"x-gemini-service-tier", b"x-amzn-bedrock-service-tier", _LATENCY)
_REQUESTED_TIERS = (
    *(b"x-amzn-bedrock-service-tier", _LATENCY),
    b"x-vertex-ai-llm-shared-request-type",
)
OPTIMIZED = "optimized"  # a latency at Bedrock
_PAID_BEFORE = "reserved"
# Tiers of a body to which one that a header names is preferred.
_CHEAPEST_TIERS = frozenset((*STANDARD_TIERS, "flex", "batch"))


def tier_in(headers: Headers, names: tuple[bytes, ...] = _SERVED_TIERS) -> str | None:
    """Return the processing tier that served a call at Gemini or Bedrock; None for the usual
    one."""
    found = None
    for name, value in headers:
        if name.lower() in names:
            tier = value.decode("latin-1").strip().lower()
            is_usual = tier in STANDARD_TIERS or tier == _PAID_BEFORE
            if not is_usual and len(tier) <= _LONGEST_TIER and found != OPTIMIZED:
                found = tier
    return found


def requested_tier_in(headers: Headers, named: str) -> str:
    """Return the processing tier that a request's headers name, else `named`, that of its body. The
    dearest counts wherever it is named, since not every path reads both."""
    if named not in _CHEAPEST_TIERS:
        return named
    return tier_in(headers, _REQUESTED_TIERS) or named


def of_answer(upstream: str, queue_ms: float) -> Headers:
    """Return the headers of every answer of an upstream, refusals included: the upstream's name,
    and the time that the call waited for admission."""
    return [
        (b"x-tidegate-queue-ms", b"%.1f" % queue_ms),
        (b"x-tidegate-upstream", upstream.encode()),
    ]


MAX_RETRY_AFTER_MS = 86_400_000
# Tolerance between two clocks; Date is in whole seconds.
_APART_S = 2.0
_NUMBER = r"\d{1,9}(?:\.\d{1,9})?"
_DURATION = re.compile(r"^\s*(\d{1,9}(?:\.\d{1,9})?)\s*s?\s*$")
# A duration in Go's format, which OpenAI uses too: 17ms, 1.5s, 6m0s, 1h2m3s.
_SPAN = re.compile(
    rf"(?=\d)(?:({_NUMBER})d)?(?:({_NUMBER})h)?(?:({_NUMBER})m(?!s))?(?:({_NUMBER})s)?(?:({_NUMBER})ms)?"
)
_SPANS_MS = (86_400_000, 3_600_000, 60_000, 1_000, 1)
_IN_MESSAGE = re.compile(
    r"\b(?:retry|try again) (?:in|after)\s+([\d.]{1,20}\s?[dhms][\d.dhms]{0,60})", re.IGNORECASE
)
# Azure's wording, GitHub's, and Anthropic's for a monthly limit.
_SECONDS = re.compile(r"\b(?:retry after|please wait)\s+(\d{1,6}) seconds?\b", re.IGNORECASE)
# Z.ai's wording of a plan's limit, in Beijing's time: https://docs.z.ai/api-reference/api-code
_RESETS_AT = re.compile(
    r"\blimit will reset at\s+(\d{4}-\d\d-\d\d)\s(\d\d:\d\d:\d\d)", re.IGNORECASE
)
_DAY = re.compile(r"\bregain access on\s+(\d{4}-\d\d-\d\d)(?:\s+at\s+(\d\d:\d\d))?", re.IGNORECASE)


def retry_after_ms(answer: ErrorAnswer) -> int | None:
    """Return the wait that a refusal requests; None if it states none."""
    for detail in answer.details:
        if str(detail.get("@type", "")).endswith("RetryInfo"):
            found = _DURATION.match(str(detail.get("retryDelay", "")))
            if found:
                return bounded_ms(float(found[1]) * 1000)
    if seconds := _SECONDS.search(answer.message):
        return bounded_ms(float(seconds[1]) * 1000)
    resets = _RESETS_AT.search(answer.message)
    if resets and (left_ms := until_ms(f"{resets[1]}T{resets[2]}+08:00", answer.now)) is not None:
        return left_ms
    span = _IN_MESSAGE.search(answer.message)
    if span and (ms := span_ms(span[1])) is not None:
        return bounded_ms(ms)
    exact = answer.headers.get("retry-after-ms", "").strip()
    header = answer.headers.get("retry-after", "")
    # Azure sends 0 milliseconds beside a Retry-After of whole seconds.
    if re.fullmatch(_NUMBER, exact) and (float(exact) or not header):
        return bounded_ms(float(exact))
    if found := _DURATION.match(header):
        return bounded_ms(float(found[1]) * 1000)
    try:
        at = parsedate_to_datetime(header)
        left = at.replace(tzinfo=at.tzinfo or UTC) - answer.now
    except (ValueError, TypeError, OverflowError):
        return None
    return bounded_ms(left.total_seconds() * 1000)


def answered_at(date: str, now: datetime) -> datetime:
    """Return when an answer was made by its server's clock, to which the times in it refer: the
    header Date if it differs from `now` by more than `_APART_S`, otherwise `now`."""
    try:
        at = parsedate_to_datetime(date)
        at = at.replace(tzinfo=at.tzinfo or UTC)
        differs = abs((at - now).total_seconds()) > _APART_S
    except (ValueError, TypeError, OverflowError):
        return now
    return at if differs else now


def until_date_ms(message: str, now: datetime) -> int | None:
    """Return the time until the day in a message on which the account may spend again."""
    found = _DAY.search(message[:4_000])
    if found is None:
        return None
    return until_ms(f"{found[1]}T{found[2] or '00:00'}:00+00:00", now)


def until_ms(moment: str, now: datetime) -> int | None:
    """Return the time until a moment in RFC 3339 format."""
    try:
        at = datetime.fromisoformat(moment.strip())
    except ValueError:
        return None
    at = at.replace(tzinfo=at.tzinfo or UTC)
    return bounded_ms((at - now).total_seconds() * 1000)


def span_ms(text: str) -> float | None:
    """Return a duration in ms; None for anything else. A plain number is in seconds."""
    text = text.replace(" ", "").lower().rstrip(".")
    if re.fullmatch(_NUMBER, text):
        return float(text) * 1000
    found = _SPAN.fullmatch(text)
    if found is None:
        return None
    parts = zip(found.groups(), _SPANS_MS, strict=True)
    return sum(float(part) * unit_ms for part, unit_ms in parts if part is not None)


def bounded_ms(value: float) -> int:
    """Return a whole number of ms, at least 0 and at most a day."""
    return min(max(0, round(value)), MAX_RETRY_AFTER_MS)


Unit = Literal["input_tokens", "output_tokens", "tokens", "images", "requests"]

_BY_SIZE = re.compile(
    r"(?:x-)?ratelimitbysize-(?P<what>limit|remaining|reset)(?:-(?P<window>minute|month))?"
)
_NAMES = (
    re.compile(
        r"x-ratelimit-(?P<what>limit|remaining|reset)(?:-(?P<of>[a-z_-]{1,40}?))??"
        r"(?:-(?P<window>second|minute|hour|day|month))?"
    ),
    re.compile(r"anthropic-ratelimit-(?P<of>[a-z-]{1,40})-(?P<what>limit|remaining|reset)"),
    _BY_SIZE,
)
# The IETF's draft, version 07, and the names of its earlier versions:
# https://datatracker.ietf.org/doc/draft-ietf-httpapi-ratelimit-headers/
_OF_DRAFT = re.compile(r"ratelimit(?:-(?P<what>limit|remaining|reset))?")
_EARLY_PART = re.compile(r"(limit|remaining|reset)=(\d{1,15})")
_LATER_ITEM = re.compile(
    r'\s*"([^"\\]{1,100})"((?:\s*;\s*[a-z]{1,10}=[^,;]{1,200}+){0,8}+)\s*(?:,|$)'
)
_PARAMETER = re.compile(r';\s*([a-z]{1,10})="?([^,;"\s]{1,40})')
_LONGEST_DRAFT_CHARS = 4_000
_WINDOWS_BY_S = {1: "second", 60: "minute", 3_600: "hour", 86_400: "day"}
_UNITS: dict[str, Unit] = {
    "requests": "requests",
    "req": "requests",
    "project-requests": "requests",
    "tokens": "tokens",
    "project-tokens": "tokens",
    "tokens_usage_based": "tokens",
    "input-tokens": "input_tokens",
    "output-tokens": "output_tokens",
    "images": "images",
    "input-images": "images",
    # Fireworks': https://docs.fireworks.ai/serverless/rate-limits
    "tokens-prompt": "input_tokens",
    "tokens-generated": "output_tokens",
}
# Windows of limits whose names imply them.
_WINDOWS_IMPLIED = {"tokens-prompt": "minute", "tokens-generated": "minute"}
# Fireworks' documents call the bounds in its headers tokens a second, of limits that apply to a
# minute; beside a remainder they were seen to be of a minute. A bound alone may be either.
_BOUND_BESIDE_REMAINDER = frozenset(_WINDOWS_IMPLIED)
_NARROWEST_FIRST: tuple[Unit, ...] = (
    "input_tokens",
    "output_tokens",
    "tokens",
    "images",
    "requests",
)
_EPOCH_S, _EPOCH_MS = 1e9, 1e12


@dataclass(frozen=True, slots=True)
class RateStatus:
    """A rate limit. window: `second`, `minute`, `hour`, `day` or `month`; None if its headers do
    not name it, which is usually a minute."""

    unit: Unit
    window: str | None = None
    limit: int | None = None
    remaining: int | None = None
    reset_ms: int | None = None


def rate_statuses(headers: Mapping[str, str], now: datetime) -> list[RateStatus]:
    """Return the rate limits that headers report. Names are in lower case."""
    found: dict[tuple[int, str, str | None], dict[str, int]] = {}
    for name, value in headers.items():
        if "ratelimit" not in name:
            continue
        for sort, pattern in enumerate(_NAMES):
            if (match := pattern.fullmatch(name)) is None:
                continue
            parts = match.groupdict()
            of = parts.get("of") or ("tokens" if pattern is _BY_SIZE else "requests")
            number = _reset_ms(value, now) if parts["what"] == "reset" else _whole(value)
            if of in _UNITS and number is not None:
                window = parts.get("window") or _WINDOWS_IMPLIED.get(of)
                found.setdefault((sort, of, window), {})[parts["what"]] = number
            break
    if not found:  # a server may send both forms of one limit
        return _statuses_of_draft(headers)
    return [
        RateStatus(
            _UNITS[of], window, values.get("limit"), values.get("remaining"), values.get("reset")
        )
        for (_, of, window), values in found.items()
        if of not in _BOUND_BESIDE_REMAINDER or "remaining" in values
    ]


def _statuses_of_draft(headers: Mapping[str, str]) -> list[RateStatus]:
    """Return the limits that headers report as the IETF's draft spells them."""
    named = {
        name: value[:_LONGEST_DRAFT_CHARS]
        for name, value in headers.items()
        if _OF_DRAFT.fullmatch(name) or name == "ratelimit-policy"
    }
    policies, left = (_draft_items(named.get(one, "")) for one in ("ratelimit-policy", "ratelimit"))
    if policies or left:
        statuses = (_status_of_draft(policies.get(one, {}), of) for one, of in left.items())
        return [one for one in statuses if one is not None]
    values: dict[str, int] = {}
    for name, value in named.items():
        if (
            name.startswith("ratelimit-")
            and (number := _whole(value.partition(",")[0])) is not None
        ):
            values[name.removeprefix("ratelimit-")] = number
    for part in _EARLY_PART.finditer(named.get("ratelimit", "")):
        values[part[1]] = int(part[2])
    if not values:
        return []
    reset_ms = bounded_ms(values["reset"] * 1000.0) if "reset" in values else None
    return [RateStatus("requests", None, values.get("limit"), values.get("remaining"), reset_ms)]


def _draft_items(text: str) -> dict[str, dict[str, str]]:
    """Return the parameters of each named item of a list."""
    found: dict[str, dict[str, str]] = {}
    place = 0
    while (item := _LATER_ITEM.match(text, place)) is not None:
        found[item[1]] = dict(_PARAMETER.findall(item[2]))
        place = item.end()
    return found


def _status_of_draft(policy: Mapping[str, str], left: Mapping[str, str]) -> RateStatus | None:
    """Return a limit of the draft; None if it is not of requests or tokens. Without its bound if
    its window is none of ours."""
    unit = _UNITS.get(policy.get("qu", "requests"))
    if unit is None:
        return None
    window = _WINDOWS_BY_S.get(_whole(policy.get("w", "")) or 0)
    limit = _whole(policy.get("q", "")) if window is not None else None
    reset_s = _whole(left.get("t", ""))
    reset_ms = None if reset_s is None else bounded_ms(reset_s * 1000.0)
    return RateStatus(unit, window, limit, _whole(left.get("r", "")), reset_ms)


def used_up(headers: Mapping[str, str], now: datetime) -> RateStatus | None:
    """Return the narrowest exhausted limit, with the time until all exhausted ones reset; None if
    every limit has capacity left."""
    empty = [one for one in rate_statuses(headers, now) if one.remaining == 0]
    if not empty:
        return None
    first = min(empty, key=lambda one: _NARROWEST_FIRST.index(one.unit))
    resets_ms = [one.reset_ms for one in empty if one.reset_ms is not None]
    return RateStatus(first.unit, first.window, first.limit, 0, max(resets_ms, default=None))


# Of the windows of a subscription, such as `5h`, `7d` and, for a class of models, `7d_opus`.
_UNIFIED = "anthropic-ratelimit-unified-"
_OF_WINDOW = re.compile(rf"{_UNIFIED}(?P<window>\d{{1,3}}[hd](?P<of>_[a-z0-9_]{{1,40}})?)-status")
_WINDOW_SPENT = ("rejected", "rate_limited")


@dataclass(frozen=True, slots=True)
class SpentWindows:
    """The exhausted windows of a subscription. reset_ms: until all of them reset, None if unknown.
    of_account: one of them is not only of a class of models."""

    reset_ms: int | None
    of_account: bool


def spent_windows(headers: Mapping[str, str], now: datetime) -> SpentWindows | None:
    """Return the exhausted windows that Anthropic's headers report; None if there are none."""
    if headers.get(f"{_UNIFIED}status", "").strip().lower() not in _WINDOW_SPENT:
        return None
    spent = [
        found
        for name, value in headers.items()
        if value.strip().lower() in _WINDOW_SPENT and (found := _OF_WINDOW.fullmatch(name))
    ]
    names = [f"{one['window']}-reset" for one in spent] or ["reset"]
    resets = (_reset_ms(headers.get(_UNIFIED + name, ""), now) for name in names)
    reset_ms = max((each for each in resets if each is not None), default=None)
    return SpentWindows(reset_ms, not spent or any(one["of"] is None for one in spent))


def _whole(value: str) -> int | None:
    value = value.strip()
    return int(value) if re.fullmatch(r"\d{1,15}", value) else None


def _reset_ms(value: str, now: datetime) -> int | None:
    """Parse a duration, a moment in RFC 3339 format, or Unix time in seconds or ms."""
    if re.fullmatch(r"\d{1,15}(?:\.\d{1,9})?", value := value.strip()):
        number = float(value)
        if number >= _EPOCH_S:
            at_s = number / 1000 if number >= _EPOCH_MS else number
            return bounded_ms((at_s - now.timestamp()) * 1000)
        return bounded_ms(number * 1000)
    span = span_ms(value)
    return until_ms(value, now) if span is None else bounded_ms(span)


_REDIRECT_LONGEST_BYTES = 8_000
# Characters that could be read as a step upwards, or that servers may read differently.
_UNSOUND = re.compile(rb"[\\\x00-\x20\x7f-\xff]|/\.|%2e|%5c|%00", re.IGNORECASE)


def followed(headers: Iterable[tuple[bytes, bytes]], base: str) -> str | None:
    """Return the URL of a redirect if it may be followed, otherwise None. `base`: that of the
    upstream, without a trailing slash."""
    named = [value for name, value in headers if name.lower() == b"location"]
    if len(named) != 1 or len(named[0]) > _REDIRECT_LONGEST_BYTES or _UNSOUND.search(named[0]):
        return None
    location = named[0].decode("ascii").partition("#")[0]
    scheme, _, rest = base.partition("://")
    origin = f"{scheme}://{rest.partition('/')[0]}"
    if location[: len(origin)].lower() == origin.lower():
        location = location[len(origin) :]
    if not location.startswith("/") or location.startswith("//"):
        return None
    url = origin + location
    return url if url.startswith(f"{base}/") else None
