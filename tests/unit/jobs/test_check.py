"""Lines of a batch's file that are refused for what they would cost."""

from __future__ import annotations

from tidegate.jobs.batches import Check


def test_a_line_of_countless_values_is_not_even_parsed() -> None:
    check = Check("/v1/chat/completions")
    assert check.take(1, b'{"custom_id":"a","body":[' + b"[]," * 1_500_000 + b"1]}") is None
    (wrong,) = check.errors
    assert (wrong["line"], wrong["code"]) == (1, "invalid_json_line")
    assert "too many values" in wrong["message"]


def test_a_line_that_asks_for_work_that_goes_on_is_refused() -> None:
    check = Check("/v1/responses")
    line = b'{"custom_id":"a","method":"POST","url":"/v1/responses","body":%b}'
    body = b'{"model":"m","input":"x","background":true}'
    assert check.take(1, line % body) is None
    (wrong,) = check.errors
    assert (wrong["code"], wrong["param"]) == ("invalid_body", "body.background")
