"""The body of a new message batch: parted into its requests, and checked."""

from __future__ import annotations

import json
from io import BytesIO
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidegate.errors import InvalidRequest
from tidegate.http.anthropic import message_batches
from tidegate.http.anthropic.message_batches import RequestLines, result_line

ODD = ['"requests": [{"a": 1}, 2]', "\\", '\\"', "]},{[", "é\x00\n", "", "requests"]


def asking(custom_id: str, text: str, **changes: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": text}]
    params = {"model": "claude-x", "max_tokens": 50, "messages": messages} | changes
    return {"custom_id": custom_id, "params": params}


def lines_of(body: bytes | Path) -> list[Any]:
    lines, sink = RequestLines(), BytesIO()
    lines.fill(body, sink)
    told = [orjson.loads(line) for line in sink.getvalue().splitlines()]
    assert (lines.count, lines.size_bytes) == (len(told), len(sink.getvalue()))
    return told


@given(
    st.lists(st.one_of(st.sampled_from(ODD), st.text(max_size=9)), min_size=1, max_size=4),
    st.sampled_from([None, 0, 3]),
    st.booleans(),
)
def test_each_request_is_a_line_however_the_body_is_written(
    texts: list[str], indent: int | None, ascii_only: bool
) -> None:
    requests = [asking(f"id-{n}", text, system=[text]) for n, text in enumerate(texts)]
    written = json.dumps({"requests": requests}, indent=indent, ensure_ascii=ascii_only)
    try:
        body = written.encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        return
    told = lines_of(body)
    assert [(one["custom_id"], one["body"]) for one in told] == [
        (one["custom_id"], one["params"]) for one in requests
    ]
    assert {(one["method"], one["url"]) for one in told} == {("POST", "/v1/messages")}


def test_a_body_on_disk_is_parted_in_the_same_way(tmp_path: Path) -> None:
    body = orjson.dumps({"requests": [asking(f"id-{n}", "x") for n in range(3)]})
    (tmp_path / "body").write_bytes(body)
    assert lines_of(tmp_path / "body") == lines_of(body)


def test_a_request_that_is_nested_too_deeply_is_refused_by_name() -> None:
    body = orjson.dumps({"requests": [asking("a", "x", metadata="deep")]})
    deep = b'{"a":' * 300 + b"1" + b"}" * 300
    with pytest.raises(InvalidRequest) as refused:
        lines_of(body.replace(b'"deep"', deep))
    assert refused.value.field == "requests.0.params"


GOOD = orjson.dumps(asking("a", "x")).decode()


@pytest.mark.parametrize(
    "body",
    [
        *("", "[]", "1", "{", "{}", "nothing", "[[1]]"),
        *(f'{{"requests": [{GOOD}', f'{{"requests": [{GOOD}]', f'{{"requests": {GOOD}}}'),
        *(f'{{"requests": [{GOOD},]}}', f'{{"requests": [,{GOOD}]}}'),
        *(f'{{"requests": [{GOOD}}}', f'{{"requests": [{GOOD}]]', f'{{"requests": [{GOOD}]}}}}'),
        *(f'{{"requests": [{GOOD} {GOOD}]}}', f'{{"requests": [{GOOD}], "requests": []}}'),
        *(f'{{"a": {{"requests": [{GOOD}]}}}}', f'["requests", [{GOOD}]]', f"[{GOOD}]"),
        *(f'{{"requests": [{GOOD}]}} x', f'{{"requests": "requests", [{GOOD}]}}'),
    ],
)
def test_what_is_no_such_body_is_refused(body: str) -> None:
    with pytest.raises(InvalidRequest):
        lines_of(body.encode())


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "requests"),
        ({"requests": []}, "requests"),
        ({"requests": [1]}, "requests.0"),
        ({"requests": [asking("a", "x"), {"custom_id": "b"}]}, "requests.1.params"),
        ({"requests": [asking("a b", "x")]}, "requests.0.custom_id"),
        ({"requests": [asking("a", "x"), asking("a", "x")]}, "requests.1.custom_id"),
        ({"requests": [asking("a", "x", stream=True)]}, "requests.0.params.stream"),
        ({"requests": [asking("a", "x", model=None)]}, "requests.0.params.model"),
        ({"requests": [asking("a", "x") | {"more": 1}]}, "requests.0.more"),
        ({"requests": [asking("a", "x")], "more": 1}, "more"),
    ],
)
def test_what_is_wrong_is_named_by_its_request_and_field(body: Any, field: str) -> None:
    with pytest.raises(InvalidRequest) as told:
        lines_of(orjson.dumps(body))
    assert told.value.field == field


def test_more_requests_than_a_batch_takes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(message_batches, "MOST_LINES", 2)
    requests = [asking(f"id-{n}", "x") for n in range(3)]
    assert len(lines_of(orjson.dumps({"requests": requests[:2]}))) == 2
    with pytest.raises(InvalidRequest, match="at most 2 requests"):
        lines_of(orjson.dumps({"requests": requests}))


OVERLOADED = {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}
OF_ANOTHER = {"error": {"code": "x", "message": "m"}}


@pytest.mark.parametrize(
    ("response", "error", "result"),
    [
        ((200, {"id": "msg"}), None, {"type": "succeeded", "message": {"id": "msg"}}),
        ((529, OVERLOADED), None, {"type": "errored", "error": OVERLOADED}),
        ((404, OF_ANOTHER), None, ("not_found_error", "m")),
        ((502, "<html>"), None, ("api_error", "<html>")),
        (None, ("batch_cancelled", "m"), {"type": "canceled"}),
        (None, ("batch_expired", "m"), {"type": "expired"}),
        (None, ("budget_unbounded", "m"), ("permission_error", "m")),
        (None, ("impossible", "m"), ("invalid_request_error", "m")),
        (None, ("worker_lost", "m"), ("api_error", "m")),
    ],
)
def test_a_line_is_shown_as_a_result(response: Any, error: Any, result: Any) -> None:
    line = {
        "id": "batch_req_1",
        "custom_id": "a",
        "response": response and {"status_code": response[0], "body": response[1]},
        "error": error and {"code": error[0], "message": error[1]},
    }
    if isinstance(result, tuple):
        kind, message = result
        inner = {"type": kind, "message": message}
        result = {"type": "errored", "error": {"type": "error", "error": inner}}
    assert orjson.loads(result_line(orjson.dumps(line))) == {"custom_id": "a", "result": result}


@pytest.mark.parametrize("depth", [252, 1_020])
def test_an_answer_that_nests_deep_is_a_result(depth: int) -> None:
    body = b'{"a":' * depth + b"1" + b"}" * depth
    line = b'{"custom_id":"a","response":{"status_code":200,"body":%b},"error":null}' % body
    told = b'{"custom_id":"a","result":{"type":"succeeded","message":%b}}\n'
    assert result_line(line) == told % body
