"""The issue's list of bad input, over real connections: refused clearly, and early."""

from __future__ import annotations

import json
import subprocess
import threading
from pathlib import Path

import pytest

from tests.integration.http_input.server import Client, Running, serving, wait_for

# What fits into the buffers of both kernels on loopback, and our own lingering.
UNREAD_BYTES = 16_000_000
PIECE = b"x" * 65_536


def head(content_type: str, *more: str, path: str = "/submit") -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", f"Content-Type: {content_type}", *more]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


def problem_of(client: Client) -> dict[str, object]:
    client.read_to_the_end()
    headers, _, body = client.received.partition(b"\r\n\r\n")
    assert b"application/problem+json" in headers
    assert b"connection: close" in headers.lower()
    problem: dict[str, object] = json.loads(body)
    assert problem["status"] == client.status
    return problem


def nothing_left(running: Running) -> bool:
    return not [path for path in running.config.data_dir.rglob("*") if path.is_file()]


FILE_PART = (
    b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.txt"\r\n'
    b"Content-Type: text/plain\r\n\r\n"
)
MULTIPART = "multipart/form-data; boundary=b"


@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
def test_a_body_of_a_gigabyte_is_refused_by_its_announced_length(loop: str, tmp_path: Path) -> None:
    with serving(tmp_path, loop=loop) as running, running.connect() as client:
        client.send(head(MULTIPART, "Content-Length: 1000000000") + FILE_PART)
        client.send_as_long_as_taken(PIECE, times=15_000)
        assert client.sent < UNREAD_BYTES
        assert problem_of(client)["code"] == "too_large"
        assert client.status == 413
        wait_for(lambda: running.connections == 0, "the connection is gone")


@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
def test_a_file_over_the_limit_is_refused_while_it_arrives(loop: str, tmp_path: Path) -> None:
    with serving(tmp_path, loop=loop, max_file_bytes=1_000_000) as running:
        with running.connect() as client:
            client.send(head(MULTIPART, "Transfer-Encoding: chunked") + chunk(FILE_PART))
            client.send_as_long_as_taken(chunk(PIECE), times=15_000)
            assert client.sent < UNREAD_BYTES
            problem = problem_of(client)
        assert (problem["code"], problem["field"]) == ("too_large", "file")
        assert "'a.txt'" in str(problem["detail"])
        assert nothing_left(running)


def test_a_client_that_stops_sending_when_it_is_answered_sees_no_reset(tmp_path: Path) -> None:
    with serving(tmp_path, max_file_bytes=100_000) as running, running.connect() as client:
        client.send(head(MULTIPART, "Content-Length: 50000000") + FILE_PART + PIECE * 2)
        client.read_until(b"\r\n\r\n")
        client.send(PIECE)  # was on its way
        assert problem_of(client)["status"] == 413


def test_a_body_that_stops_arriving_times_out(tmp_path: Path) -> None:
    with serving(tmp_path, receive_timeout_ms=100) as running, running.connect() as client:
        client.send(head(MULTIPART, "Content-Length: 5000") + FILE_PART + b"x")
        assert problem_of(client)["code"] == "request_timeout"
        assert client.status == 408
        assert nothing_left(running)


def test_a_client_that_leaves_in_the_middle_of_a_file_leaves_nothing_behind(tmp_path: Path) -> None:
    with serving(tmp_path) as running:
        with running.connect() as client:
            client.send(head(MULTIPART, "Content-Length: 5000000") + FILE_PART + PIECE * 20)
            wait_for(lambda: not nothing_left(running), "the file is being spooled")
        wait_for(lambda: nothing_left(running), "the spooled file is gone")


def test_a_client_that_waits_to_be_told_never_sends_a_body_that_is_refused(tmp_path: Path) -> None:
    with serving(tmp_path) as running, running.connect() as client:
        client.send(head("text/plain", "Content-Length: 5000", "Expect: 100-continue"))
        assert problem_of(client)["code"] == "unsupported_media"
        assert b"100 Continue" not in client.received


@pytest.mark.parametrize(
    ("content_type", "body", "status", "code"),
    [
        ("application/json", b"", 400, "invalid_request"),
        ("application/json", b"{}", 400, "invalid_request"),
        ("application/json", b"{", 400, "invalid_request"),
        ("application/json", b'{"data": "x", "type": "poem"}', 400, "invalid_request"),
        ("application/json", b'{"data": "' + b"x" * 101 + b'"}', 413, "too_large"),
        ("application/json", b'{"data":"x","image_uri":"http://127.0.0.1/"}', 422, "fetch_refused"),
        ("application/json", b'{"data":"x","image_uri":"file:///a"}', 422, "fetch_refused"),
        ("text/plain", b"hello", 415, "unsupported_media"),
        ("multipart/form-data", b"hello", 400, "invalid_request"),
        (MULTIPART, FILE_PART + b"\x00\x01\r\n--b--\r\n", 415, "unsupported_media"),
        (MULTIPART, (FILE_PART + b"x\r\n") * 3 + b"--b--\r\n", 413, "too_large"),
    ],
)
def test_a_refusal_names_its_status_and_code(
    content_type: str, body: bytes, status: int, code: str, plain: Running
) -> None:
    with plain.connect() as client:
        client.send(head(content_type, f"Content-Length: {len(body)}", "Connection: close"))
        client.send(body)
        problem = problem_of(client)
    assert (problem["status"], problem["code"]) == (status, code)
    assert problem["detail"]
    assert nothing_left(plain)


def test_curls_quotes_around_a_text_do_not_reach_the_prompt(tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("# Notes\n")
    with serving(tmp_path / "data") as running:
        url = f"http://127.0.0.1:{running.port}/submit"
        said = subprocess.run(
            [
                *("curl", "-sS", "-N", url, "-H", "Content-Type: multipart/form-data"),
                *("-F", 'text="What is modern family?"', "-F", f"file=@{tmp_path}/notes.md"),
            ],
            capture_output=True,
            timeout=20,
            check=True,
        )
    assert json.loads(said.stdout) == {
        "prompt": "What is modern family?",
        "files": [["notes.md", "text/markdown", 8]],
    }


def test_curl_shows_the_refusal_of_a_file_that_is_too_large(tmp_path: Path) -> None:
    (tmp_path / "big.txt").write_bytes(b"x" * 20_000_000)
    with serving(tmp_path / "data", max_file_bytes=1_000_000) as running:
        url = f"http://127.0.0.1:{running.port}/submit"
        for expect in ("Expect:", "Expect: 100-continue"):
            said = subprocess.run(
                ["curl", "-sS", url, "-H", expect, "-F", f"file=@{tmp_path}/big.txt"],
                capture_output=True,
                timeout=20,
                check=False,
            )
            assert json.loads(said.stdout)["code"] == "too_large", said.stderr


def test_the_server_answers_others_while_a_large_file_is_being_kept(tmp_path: Path) -> None:
    with serving(tmp_path) as running, running.connect() as client:
        body = FILE_PART + b"x" * 40_000_000 + b"\r\n--b--\r\n"
        client.send(head(MULTIPART, f"Content-Length: {len(body)}"))
        sending = threading.Thread(target=client.send, args=(body,))
        sending.start()
        answered = 0
        while sending.is_alive() and answered < 1000:
            with running.connect() as other:
                other.socket.settimeout(2)
                other.send(b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
                assert b"hello" in other.read_to_the_end()
                answered += 1
        sending.join()
        client.read_until(b'"a.txt"')
        assert client.status == 202
        assert answered > 0
