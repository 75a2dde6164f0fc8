"""What an upstream is sent: the client's bytes, but for the model's name."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidegate.dialects import dialect_of, endpoint_of
from tidegate.dialects.parsing import LARGE_BYTES, skimmed
from tidegate.policy.access import AccessOptions, Paths
from tidegate.policy.deployment import Upstream
from tidegate.spine.bodies import body_for
from tidegate.spine.routing import Target

UPSTREAM = Upstream("u", {"openai": "http://u", "gemini": "http://u"}, "key")
JSON = st.recursive(
    st.none() | st.integers(-(10**9), 10**9) | st.text(max_size=6) | st.just('"model":"a"'),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["model", "a", 'm"odel', "b"]), inner, max_size=3)
    ),
    max_leaves=10,
)


def sent(raw: bytes, model: str, path: str = "/v1/chat/completions") -> bytes:
    endpoint = endpoint_of("POST", path, dialect_of(path, frozenset(), b""))
    assert endpoint is not None
    found = body_for(raw, endpoint, skimmed(raw).body, Target(UPSTREAM, model), request_usage=False)
    assert found is not None
    return found


@pytest.mark.parametrize(
    "body",
    [
        '{"model":NAME,"seed":123456789012345678901234567890,"t":1.10,"e":1E2}',
        ' {\n "a": 1, "a": 2, "model" :\t NAME }',
        '{"tools":[{"model":{"type":"string"}},{"model":"old"}],"model":NAME,"x":{"model":"old"}}',
        '{"mod\\u0065l":NAME,"input":"\\ud83d\\ude00 \\u00e9 é"}',
        '{"messages":["\\"model\\":\\"old\\""],"model":NAME}',
    ],
)
def test_only_the_models_name_is_another(body: str) -> None:
    raw = body.replace("NAME", '"old"').encode()
    assert sent(raw, "a/new-\u00e9") == body.replace("NAME", '"a/new-\u00e9"').encode()
    assert sent(raw, "old") == raw


@given(st.dictionaries(st.sampled_from(["a", "b", "c"]), JSON, max_size=3), st.text('old"\\é'))
def test_any_body_means_the_same_but_for_the_model(rest: dict[str, Any], model: str) -> None:
    body = {"a": 1, "model": model, **rest}
    assert orjson.loads(sent(orjson.dumps(body), "new")) == body | {"model": "new"}


def test_very_many_models_below_are_written_anew() -> None:
    body = {"below": [{"model": "old"}] * 100, "model": "old"}
    assert orjson.loads(sent(orjson.dumps(body), "new")) == body | {"model": "new"}


def test_what_is_written_anew_holds_the_files_that_were_not_parsed() -> None:
    file = {"url": f"data:image/png;base64,{'A' * LARGE_BYTES}"}
    body = {"below": [{"model": "old"}] * 100, "file": file, "model": "old"}
    assert orjson.loads(sent(orjson.dumps(body), "new")) == body | {"model": "new"}


@pytest.mark.parametrize(
    ("do", "body"),
    [
        ("batchEmbedContents", '{"requests":[{"model":"models/NAME"},{ "model" : "NAME" }]}'),
        ("embedContent", '{"model":"models/NAME","content":{"parts":[{"text":"models/old"}]}}'),
        ("countTokens", '{"generateContentRequest":{"model":"models/NAME","big":1.10}}'),
    ],
)
def test_what_names_the_paths_model_again_names_it_anew(do: str, body: str) -> None:
    raw = body.replace("NAME", "old").encode()
    assert sent(raw, "new", f"/v1beta/models/old:{do}") == body.replace("NAME", "new").encode()
    assert sent(raw, "old", f"/v1beta/models/old:{do}") == raw


def test_a_body_that_asks_for_text_is_never_searched_for_names() -> None:
    raw = b'{"contents":[{"parts":[{"functionCall":{"args":{"model":"old"}}}]}]}'
    assert sent(raw, "new", "/v1beta/models/old:generateContent") == raw


def test_a_body_without_a_model_gets_one_only_where_a_route_names_it() -> None:
    raw = b' {"prompt": {"id": "p"}, "n": 1.10}'
    assert sent(raw, "", "/v1/responses") == raw
    assert sent(raw, "m", "/v1/responses") == b' {"model":"m","prompt": {"id": "p"}, "n": 1.10}'


VERTEX = Upstream(
    "v",
    {"anthropic": "http://v"},
    "",
    access_options=AccessOptions(paths={"anthropic": Paths.VERTEX}, prefix="/projects/p"),
)
OWN = Upstream("a", {"anthropic": "http://a"}, "k")
BELOW = "/v1/projects/p/locations/l/publishers/anthropic/models/"
OURS = '"anthropic_version":"vertex-2023-10-16"'


@pytest.mark.parametrize(
    ("path", "upstream", "raw", "expected"),
    [
        (
            "/v1/messages",
            VERTEX,
            '{"a": 1.10, "model" : "m", "b":2}',
            f'{{"a": 1.10, {OURS}, "b":2}}',
        ),
        (
            "/v1/messages",
            VERTEX,
            '{"model":"m","t":[{"model":"x"}]}',
            f'{{{OURS},"t":[{{"model":"x"}}]}}',
        ),
        ("/v1/messages/count_tokens", VERTEX, '{"model":"m"}', f'{{{OURS},"model":"new"}}'),
        (f"{BELOW}m:rawPredict", VERTEX, f'{{{OURS}, "a":1}}', f'{{{OURS}, "a":1}}'),
        (f"{BELOW}m:rawPredict", VERTEX, '{"a":1}', f'{{{OURS},"a":1}}'),
        (f"{BELOW}m:rawPredict", OWN, f'{{"b" :1,{OURS}}}', '{"b" :1,"model":"new"}'),
        (f"{BELOW}m:rawPredict", OWN, '{"b" :1}', '{"model":"new","b" :1}'),
        ("/v1/messages/count_tokens", OWN, f'{{{OURS},"model":"m"}}', '{"model":"new"}'),
        (
            "/openai/deployments/d/embeddings",
            UPSTREAM,
            '{"input":"a"}',
            '{"model":"new","input":"a"}',
        ),
        ("/openai/deployments/d/embeddings", UPSTREAM, '{"model":"x"}', '{"model":"new"}'),
    ],
)
def test_clouds_have_the_model_where_they_want_it(
    path: str, upstream: Upstream, raw: str, expected: str
) -> None:
    endpoint = endpoint_of("POST", path, dialect_of(path, frozenset(), b""))
    assert endpoint is not None
    read = orjson.loads(raw)
    target = Target(upstream, "new")
    found = body_for(raw.encode(), endpoint, read, target, request_usage=False)
    assert found == expected.encode()
