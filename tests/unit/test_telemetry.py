"""What a log line may hold, and how it looks."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, Literal

import pytest
import structlog

from tidegate.telemetry.logging import (
    FrequentLog,
    Log,
    configure_logging,
    get_logger,
    lines_with,
    recent_problems,
    redact,
)

GOOGLE_KEY = "AIzaSyD-0123456789abcdefghijklmnopqrstuv"


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers, root.level
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logger = logging.getLogger(name)  # a server in this process has silenced them
        logger.setLevel(logging.NOTSET)
        logger.handlers, logger.propagate, logger.disabled = [], True, False
    yield
    root.handlers, root.level = handlers, level
    structlog.reset_defaults()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("postgresql://me:pass@db/x", "postgresql://me:***@db/x"),
        ("postgresql://me:p/a@s?s@db:5432/x", "postgresql://me:***@db:5432/x"),
        ("redis://:pass@valkey:6379/0", "redis://:***@valkey:6379/0"),
        ("GET /v1beta/models?key=abc&alt=sse", "GET /v1beta/models?key=***&alt=sse"),
        ("GET /x?alt=sse&api_key=abc", "GET /x?alt=sse&api_key=***"),
        ("https://h/upload?upload_id=abc", "https://h/upload?upload_id=***"),
        ("postgresql://db/x?user=u&password=abc", "postgresql://db/x?user=u&password=***"),
        ("x-goog-api-key: abc", "x-goog-api-key: ***"),
        ("{'X-Goog-Api-Key': 'abc', 'a': 'b'}", "{'X-Goog-Api-Key': '***', 'a': 'b'}"),
        ("[(b'x-goog-api-key', b'abc')]", "[(b'x-goog-api-key', b'***')]"),
        ("authorization: Bearer abc", "authorization: Bearer ***"),
        (f"the key {GOOGLE_KEY} is dead", "the key *** is dead"),
        ("Incorrect API key: sk-proj-aB3dE5gH7jK9mN1pQ_r-S3.", "Incorrect API key: ***."),
        ("'sk-ant-api03-aB3dE5gH7jK9mN1pQ3sT5'", "'***'"),
        ("gsk_aB3dE5gH7jK9mN1pQ3sT5v or xai-aB3dE5gH7jK9mN1pQ3sT5v", "*** or ***"),
    ],
)
def test_a_secret_inside_a_text_is_replaced(text: str, expected: str) -> None:
    assert redact(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "http://localhost:8000",
        "http://127.0.0.1:8000/status?wait=20",
        "listening on http://localhost:8000, ask me@example.org",
        "http://host:80/?from=me@example.org",
        "the keyword monkey=banana",
        "the task-2026-11-29-of-the-night-shift and sk-a-name-without-any-digit-in-it; sk-short1",
        "send it as Authorization: Bearer tg_..., x-api-key: tg_... or ?key=tg_...; create one",
    ],
)
def test_a_text_without_a_secret_stays_as_it_is(text: str) -> None:
    assert redact(text) == text


@pytest.mark.parametrize("begins", ["", "@"])
@pytest.mark.parametrize("part", ["://a:b", "://:1", ":///", "authorization: ", "sk-a_", "?key="])
def test_no_path_of_a_stranger_takes_long_to_be_searched(begins: str, part: str) -> None:
    """It is searched on the event loop: a path of 60 KB held up all calls for six seconds."""
    path = begins + part * (60_000 // len(part))
    began = time.thread_time()
    redact(path)
    assert time.thread_time() - began < 1


def test_a_json_line_is_one_event_with_its_fields(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("json", "info", process="api-1")
    get_logger().info(Log.JOB_DONE, request_id="abc", input_tokens=5, cached_tokens=None)
    (line,) = _json_lines(capsys)
    assert line["event"] == "job_done"
    assert line["process"] == "api-1"
    assert line["level"] == "info"
    assert line["timestamp"].endswith("Z")
    assert (line["request_id"], line["input_tokens"], line["cached_tokens"]) == ("abc", 5, None)


def test_the_console_line_is_text_and_without_colour_when_it_is_no_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    configure_logging("console", "info", process="worker-1")
    get_logger().warning(Log.STORE_AWAY, after_ms=20)
    shown = capsys.readouterr().err
    assert "store_away" in shown
    assert "after_ms=20" in shown
    assert "worker-1" in shown
    assert "\x1b" not in shown
    with pytest.raises(json.JSONDecodeError):
        json.loads(shown)


@pytest.mark.parametrize(("terminal", "is_json"), [(True, False), (False, True)])
def test_auto_is_console_on_a_terminal_and_json_elsewhere(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    terminal: bool,
    is_json: bool,
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    configure_logging("auto", "info", process="api-1")
    get_logger().info(Log.STARTED)
    assert capsys.readouterr().err.startswith("{") is is_json


def test_a_terminal_gets_a_short_line_for_each_request_and_job(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    configure_logging("auto", "info", process="api-1")
    log_request, log_job = FrequentLog(Log.REQUEST_DONE), FrequentLog(Log.JOB_DONE)
    assert log_request.is_text
    call = {"method": "POST", "path": "/v1/messages\x1b[2J", "status": 200, "took_ms": 1688.4}
    log_request({**call, "tenant": "acme", "model": "gpt-5", "queue_ms": 3.2, "request_id": "01a"})
    log_request({"method": "GET", "path": "/status/1", "status": 0, "took_ms": 0.4})
    log_job({"type": "text_only", "queue_ms": 0.1, "upstream_ms": 52.0, "code": "timeout"})
    shown = capsys.readouterr().err
    assert "\x1b[2J" not in shown, "what a client sent is shown, and not obeyed"
    lines = re.sub(r"\x1b\[\d+m", "", shown).splitlines()
    assert all(re.match(r"\d\d:\d\d:\d\d ", line) for line in lines)
    assert [line[9:] for line in lines] == [
        r"200 POST /v1/messages\u001b[2J acme gpt-5 1,688 ms (queued 3 ms)  01a",
        "left GET /status/1 0 ms",
        "job timeout text_only 52 ms",
    ]


@pytest.mark.parametrize("has_page", [True, False])
def test_the_page_says_what_a_terminal_is_spared(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, has_page: bool
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    configure_logging("auto", "info", process="api-1", has_page=has_page)
    get_logger().info(Log.STARTED)
    states = ("a", "up"), ("b", "recovering"), ("b", "up"), ("a", "away"), ("a", "up")
    for pool, state in states:
        with lines_with(pool=pool):  # the arguments apart, as the limiter's sessions write it
            logging.getLogger("tidegate.limiter").info("limiter: %s%s%s", state, "", "")
    get_logger().warning(Log.STORE_AWAY)
    shown = capsys.readouterr().err
    shown = re.sub(r"\x1b\[\d+m", "", shown)
    said = re.findall(r"started|state=[a-z]+|store_away", shown)
    usual = ["started", "state=up", "state=recovering", "state=up"]
    assert said == [*([] if has_page else usual), "state=away", "state=up", "store_away"]


def test_a_line_of_the_limiter_is_an_event_with_fields(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("json", "info", process="api-1")
    logger = logging.getLogger("tidegate.limiter")
    logger.info("limiter: %s%s%s", "up", "", "")
    logger.warning("limiter: %s%s%s", "away", ", was up", " (timed out (0.5 s))")
    logger.warning("limiter: %s; %d running calls cancelled", "the session was gone", 2)
    logging.getLogger("other").info("limiter: not ours")
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    fields = ("event", "state", "was", "reason", "detail")
    assert [{name: line[name] for name in fields if name in line} for line in lines] == [
        {"event": "limiter_state", "state": "up"},
        {"event": "limiter_state", "state": "away", "was": "up", "reason": "timed out (0.5 s)"},
        {"event": "limiter", "detail": "the session was gone; 2 running calls cancelled"},
        {"event": "limiter: not ours"},
    ]
    assert recent_problems()[-1]["event"] == "limiter"


@pytest.mark.parametrize("style", ["json", "console"])
def test_no_secret_reaches_a_line_at_any_depth(
    style: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    configure_logging(style, "info", process="api-1")
    log = get_logger()
    log.info(
        Log.INTERNAL_ERROR,
        gemini_api_key="hidden-1",
        headers={"Authorization": "hidden-2", "Cookie": "hidden-3", "accept": "kept"},
        tries=[{"access_token": "hidden-4"}, ("redis://:hidden-5@valkey",)],
        error=ConnectionError("postgresql://me:hidden-6@db refused"),
    )
    try:
        raise RuntimeError("https://upstream/v1?key=hidden-7")
    except RuntimeError:
        log.exception(Log.INTERNAL_ERROR)
    logging.getLogger("uvicorn.access").info('"GET /v1beta/models?key=%s"', "hidden-8")
    shown = capsys.readouterr().err
    assert "hidden-" not in shown
    assert "kept" in shown
    assert "RuntimeError" in shown
    assert "/v1beta/models?key=***" in shown


def test_token_counts_are_no_secrets(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("json", "info", process="api-1")
    get_logger().info(Log.REQUEST_DONE, input_tokens=1, total_tokens=2, tokens=3)
    (line,) = _json_lines(capsys)
    assert (line["input_tokens"], line["total_tokens"], line["tokens"]) == (1, 2, 3)


def test_lines_below_the_level_are_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("json", "warning", process="api-1")
    get_logger().info(Log.STARTED)
    get_logger().warning(Log.STOPPING)
    logging.getLogger("another.library").info("chatter")
    assert [line["event"] for line in _json_lines(capsys)] == ["stopping"]


def test_other_libraries_do_not_report_each_request_even_at_debug(
    capsys: pytest.CaptureFixture[str],
) -> None:
    configure_logging("json", "debug", process="api-1")
    logging.getLogger("httpx").info("HTTP Request: POST")
    logging.getLogger("python_multipart.multipart").debug("Calling on_part_data with the content")
    logging.getLogger("another.library").debug("heard")
    assert [line["event"] for line in _json_lines(capsys)] == ["heard"]


def test_the_text_of_uvicorn_is_there_once_and_without_terminal_codes(
    capsys: pytest.CaptureFixture[str],
) -> None:
    configure_logging("json", "info", process="api-1")
    coloured = {"color_message": "Started [\x1b[36m%d\x1b[0m]"}
    logging.getLogger("uvicorn.error").info("Started [%d]", 7, extra=coloured)
    (line,) = _json_lines(capsys)
    assert line["event"] == "Started [7]"
    assert "color_message" not in line


def test_a_line_from_a_thread_names_its_process_too(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("json", "info", process="worker-2")
    thread = threading.Thread(target=lambda: get_logger().info(Log.STARTED))
    thread.start()
    thread.join()
    (line,) = _json_lines(capsys)
    assert line["process"] == "worker-2"


OBEYED = (
    *("\x1b[31m", "\x07", "\r", "\x7f", "\x85", "\x9b2J", "\x9d", "\u202e", "\u202a", "\u2066"),
    *("\u2069", "\u200f", "\u061c", "\u2028", "\u2029"),
)


@pytest.mark.parametrize("style", ["console", "json"])
async def test_what_a_terminal_would_obey_is_shown_as_an_escape(
    style: Literal["console", "json"], capsys: pytest.CaptureFixture[str]
) -> None:
    configure_logging(style, "info", process="test")
    frequent = FrequentLog(Log.REQUEST_DONE)
    for text in OBEYED:
        get_logger().info(Log.REQUEST_DONE, path=f"/a{text}b", inner={"x": [text]})
        logging.getLogger("uvicorn.error").warning("said %s", f"a{text}b")
        frequent({"path": f"/a{text}b"})
        try:
            raise ValueError(f"a{text}b")
        except ValueError:
            get_logger().exception(Log.INTERNAL_ERROR)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    out = capsys.readouterr()
    written = out.err + out.out
    assert [text for text in OBEYED if text[0] in written] == []
    if style == "json":
        lines = [json.loads(line) for line in written.splitlines()]
        paths = [line["path"] for line in lines if "path" in line]
        assert sorted(paths) == sorted(f"/a{text}b" for text in OBEYED for _ in range(2))
    else:
        for text in OBEYED:
            assert written.count(f"a\\u{ord(text[0]):04x}{text[1:]}b") == 4


def test_no_line_of_another_librarys_message_passes_for_one_of_the_log(
    capsys: pytest.CaptureFixture[str],
) -> None:
    configure_logging("console", "info", process="test")
    forged = "2026-01-01T00:00:00Z [info     ] request_done"
    logging.getLogger("other").warning("failed:\n%s", forged)
    get_logger().warning(Log.REQUEST_DONE, detail=f"a\n{forged}")
    out = capsys.readouterr()
    assert [line for line in (out.err + out.out).splitlines() if line.startswith(forged)] == []


def test_event_names_are_distinct_words() -> None:
    assert len({event.value for event in Log}) == len(Log)
    assert all(event.value == event.name.lower() for event in Log)


def _json_lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().err.splitlines()]
