"""What one connection may cost: heads, trailers, pipelines, slow and stalled clients."""

from __future__ import annotations

import json
import re
from itertools import product
from pathlib import Path

import pytest

from tests.integration.http_input.server import BIG_BYTES, Client, Running, serving, wait_for

GET = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
LOOPS = pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
UNREAD_BYTES = 16_000_000


def problem_of(client: Client) -> tuple[int, str]:
    client.read_to_the_end()
    problem = json.loads(client.received.partition(b"\r\n\r\n")[2])
    assert problem["status"] == client.status
    return client.status, problem["code"]


@LOOPS
def test_ten_thousand_headers_are_refused(loop: str, tmp_path: Path) -> None:
    with serving(tmp_path, loop=loop) as running, running.connect() as client:
        lines = b"".join(b"X-%d: y\r\n" % n for n in range(10_000))
        client.send(b"GET / HTTP/1.1\r\nHost: a\r\n" + lines + b"\r\n")
        assert problem_of(client) == (431, "too_many_headers")
        assert running.seen == []
        wait_for(lambda: running.connections == 0, "the connection is gone")


@pytest.mark.parametrize(("count", "status"), [(100, 200), (101, 431)])
def test_a_hundred_headers_are_the_limit(count: int, status: int, tmp_path: Path) -> None:
    with serving(tmp_path) as running, running.connect() as client:
        lines = b"".join(b"X-%d: y\r\n" % n for n in range(count - 2))
        client.send(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n" + lines + b"\r\n")
        client.read_to_the_end()
        assert client.status == status


@pytest.mark.parametrize("start", [b"GET / HTTP/1.1\r\nX: ", b"GET /", b"GET / HTTP/1.1\r\nX"])
def test_a_head_without_end_is_refused(start: bytes, tmp_path: Path) -> None:
    with serving(tmp_path, LINGER_S=0.1) as running, running.connect() as client:
        client.send(start)
        client.send_as_long_as_taken(b"x" * 50_000, times=2_000)
        assert client.sent < UNREAD_BYTES
        assert problem_of(client) == (431, "headers_too_large")


@pytest.mark.parametrize(("size", "status"), [(60_000, 200), (70_000, 431)])
def test_64_kilobytes_of_head_are_the_limit(size: int, status: int, tmp_path: Path) -> None:
    with serving(tmp_path) as running, running.connect() as client:
        head = b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\nX: "
        client.send(head + b"x" * size + b"\r\n\r\n")
        client.read_to_the_end()
        assert client.status == status


@LOOPS
def test_a_head_that_never_ends_times_out_however_steadily_it_drips(
    loop: str, tmp_path: Path
) -> None:
    with serving(tmp_path, loop=loop, HEAD_TIMEOUT_S=0.2) as running:
        with running.connect() as client:
            client.socket.settimeout(0.02)
            client.send(b"GET / HTTP/1.1\r\n")
            for _ in range(500):
                client.send(b"X: y\r\n")
                try:
                    if client.socket.recv(1, 2):  # MSG_PEEK
                        break
                except TimeoutError:
                    continue
            client.socket.settimeout(10)
            assert problem_of(client) == (408, "request_timeout")
        wait_for(lambda: running.connections == 0, "the connection is gone")


def test_a_connection_that_says_nothing_is_closed_without_a_word(tmp_path: Path) -> None:
    with serving(tmp_path, HEAD_TIMEOUT_S=0.1) as running, running.connect() as client:
        assert client.read_to_the_end() == b""


def test_the_second_request_of_a_connection_is_held_to_the_same_time(tmp_path: Path) -> None:
    with serving(tmp_path, HEAD_TIMEOUT_S=0.1) as running, running.connect() as client:
        client.send(GET)
        client.read_until(b"hello")
        client.received = b""
        client.send(b"\r\nGET /")
        assert problem_of(client) == (408, "request_timeout")


def test_half_a_request_does_not_cut_the_answer_before_it(tmp_path: Path) -> None:
    with serving(tmp_path, HEAD_TIMEOUT_S=0.1) as running, running.connect() as client:
        client.send(b"GET /stream HTTP/1.1\r\nHost: a\r\n\r\nGET / HT")
        client.read_until(b"begun")
        client.socket.settimeout(0.4)
        with pytest.raises(TimeoutError):
            client.socket.recv(1)
        client.socket.settimeout(10)
        running.go.set()
        client.read_until(b"0\r\n\r\n")
        client.send(b"TP/1.1\r\nHost: a\r\n\r\n")
        client.read_until(b"hello")


@LOOPS
def test_requests_in_turn_and_in_a_pipeline_are_answered_in_order(
    loop: str, tmp_path: Path
) -> None:
    with serving(tmp_path, loop=loop) as running, running.connect() as client:
        for _ in range(3):
            client.send(GET)
            client.read_until(b"hello")
            client.received = b""
        posts = [
            b"POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\n<%d" % n for n in range(9)
        ]
        client.send(b"".join(posts))
        client.read_until(b"<8")
        assert [client.received.index(b"<%d" % n) for n in range(9)] == sorted(
            client.received.index(b"<%d" % n) for n in range(9)
        )


def test_a_flood_of_pipelined_requests_is_cut(tmp_path: Path) -> None:
    with serving(tmp_path) as running, running.connect() as client:
        client.send(b"GET /stream HTTP/1.1\r\nHost: a\r\n\r\n" + GET * 5_000)
        client.read_to_the_end()
        assert running.seen == []
        wait_for(lambda: running.connections == 0, "the connection is gone")


@LOOPS
@pytest.mark.parametrize("path", ["deaf", "listening"])
def test_a_client_that_leaves_with_more_requests_in_the_pipeline_is_seen_to_leave(
    loop: str, path: str, tmp_path: Path
) -> None:
    with serving(tmp_path, loop=loop) as running:
        with running.connect() as client:
            client.send(b"GET /%b HTTP/1.1\r\nHost: a\r\n\r\n" % path.encode() + GET)
            wait_for(lambda: running.requests == 1, "the first one has begun")
        wait_for(lambda: running.left == [path], "it is told")
        wait_for(lambda: running.requests == 0, "nobody works for it any more")
        assert (running.seen, running.faults) == ([], [])


def test_a_flood_behind_a_request_that_has_not_begun_is_cut_without_a_fault_of_ours(
    tmp_path: Path,
) -> None:
    with serving(tmp_path) as running, running.connect() as client:
        client.send(b"GET /deaf HTTP/1.1\r\nHost: a\r\n\r\n" + GET * 40)
        client.read_to_the_end()
        wait_for(lambda: running.requests == 0, "nobody works for it any more")
        assert running.faults == []


SMUGGLING = {
    "both lengths": b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "both, the other way": b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n",
    "two lengths": b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello!",
    "the same length twice": b"Content-Length: 5\r\nContent-Length: 5\r\n\r\nhello",
    "a list of lengths": b"Content-Length: 5, 5\r\n\r\nhello",
    "a signed length": b"Content-Length: +5\r\n\r\nhello",
    "a negative length": b"Content-Length: -5\r\n\r\nhello",
    "a hexadecimal length": b"Content-Length: 0x5\r\n\r\nhello",
    "an endless length": b"Content-Length: 99999999999999999999\r\n\r\nhello",
    "an unknown coding": b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    "chunked but not last": b"Transfer-Encoding: chunked, gzip\r\n\r\n0\r\n\r\n",
    "a vertical tab": b"Transfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n",
    "a space before the colon": b"Content-Length : 5\r\n\r\nhello",
    "a folded header": b"X: a\r\n b\r\nContent-Length: 5\r\n\r\nhello",
    "lines ended by LF alone": b"X: a\nContent-Length: 5\r\n\r\nhello",
    "lines ended by CR alone": b"X: a\rContent-Length: 5\r\n\r\nhello",
    "a NUL in a header": b"X: a\0b\r\nContent-Length: 5\r\n\r\nhello",
    "a header without a name": b": a\r\nContent-Length: 5\r\n\r\nhello",
    "a size that is no number": b"Transfer-Encoding: chunked\r\n\r\n0x5\r\nhello\r\n0\r\n\r\n",
    "a chunk that is longer": b"Transfer-Encoding: chunked\r\n\r\n3\r\nhello\r\n0\r\n\r\n",
    "a chunk ended by LF": b"Transfer-Encoding: chunked\r\n\r\n5\nhello\r\n0\r\n\r\n",
}


@pytest.mark.parametrize("name", SMUGGLING)
def test_a_request_whose_length_can_be_read_in_two_ways_is_refused(
    name: str, plain: Running
) -> None:
    plain.seen.clear()
    with plain.connect() as client:
        smuggled = b"GET / HTTP/1.1\r\nHost: smuggled\r\n\r\n"
        client.send(b"POST /echo HTTP/1.1\r\nHost: a\r\n" + SMUGGLING[name] + smuggled)
        assert problem_of(client) == (400, "bad_request")
        assert not [seen for seen in plain.seen if seen["host"] == "smuggled"]


@pytest.mark.parametrize(
    "start", [b"\x16\x03\x01\x02\0\1\0", b"PRI * HTTP/2.0\r\n\r\n", b"GET\r\n"]
)
def test_what_is_not_http_is_refused(start: bytes, plain: Running) -> None:
    with plain.connect() as client:
        client.send(start + b"\r\n\r\n")
        assert problem_of(client) == (400, "bad_request")


@pytest.mark.parametrize(
    ("path", "place", "kind"),
    [
        ("/v1/chat/completions", ("error", "code"), "bad_request"),
        ("/v1/messages", ("error", "type"), "invalid_request_error"),
        ("/v1beta/models/m:generateContent?key=k", ("error", "status"), "INVALID_ARGUMENT"),
        (
            "/v1/projects/p/locations/l/publishers/google/models/m:generateContent",
            ("error", "status"),
            "INVALID_ARGUMENT",
        ),
        ("/model/m/converse", ("__type",), "ValidationException"),
        ("/submit", ("code",), "bad_request"),
    ],
)
def test_a_request_that_is_not_http_is_refused_in_the_dialect_of_its_path(
    path: str, place: tuple[str, ...], kind: str, plain: Running
) -> None:
    rests = (b"Content-Length: -5\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\nzz\r\n")
    for rest, origin in product(rests, (b"", b"http://a.example:80", b"HTTPS://[::1]")):
        with plain.connect() as client:
            client.send(b"POST %b%b HTTP/1.1\r\nHost: a\r\n%b" % (origin, path.encode(), rest))
            client.read_to_the_end()
            head, _, body = client.received.partition(b"\r\n\r\n")
            assert client.status == 400
            found = json.loads(body)
            for name in place:
                found = found[name]
            assert found == kind
            assert (b"problem+json" in head) == (path == "/submit")
            assert b"not valid HTTP/1.1" in body


CHUNKED = b"POST /echo HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"


NOT_PLAIN = {
    "two blanks before the target": (b"GET  / HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    "two blanks before the version": (b"GET /  HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    "no version": (b"GET /\r\n\r\n", 400),
    "another version": (b"GET / HTTP/2.0\r\nHost: a\r\n\r\n", 505),
    "no host": (b"GET / HTTP/1.1\r\n\r\n", 400),
    "two hosts": (b"GET / HTTP/1.1\r\nHost: a\r\nhost: a\r\n\r\n", 400),
    "two hosts of HTTP/1.0": (b"GET / HTTP/1.0\r\nHost: a\r\nHost: b\r\n\r\n", 400),
    "two words as a host": (b"GET / HTTP/1.1\r\nHost: a b\r\n\r\n", 400),
    "a list as a host": (b"GET / HTTP/1.1\r\nHost: a/b\r\n\r\n", 400),
    "a user in the host": (b"GET / HTTP/1.1\r\nHost: me@a\r\n\r\n", 400),
    "a port that is none": (b"GET / HTTP/1.1\r\nHost: a:80a\r\n\r\n", 400),
    "a control character": (b"GET / HTTP/1.1\r\nHost: a\x9b\r\n\r\n", 400),
    "a coding before chunked": (CHUNKED.replace(b"chunked", b"gzip, chunked") + b"0\r\n\r\n", 501),
    "identity before chunked": (
        CHUNKED.replace(b"chunked", b"identity, chunked") + b"0\r\n\r\n",
        501,
    ),
    "codings in two headers": (
        CHUNKED.replace(b"chunked", b"gzip\r\nTransfer-Encoding: chunked") + b"0\r\n\r\n",
        400,
    ),
    "a coding of HTTP/1.0": (CHUNKED.replace(b"1.1", b"1.0") + b"0\r\n\r\n", 400),
}


@pytest.mark.parametrize("name", NOT_PLAIN)
def test_a_head_that_http_does_not_allow_is_refused(name: str, plain: Running) -> None:
    head, status = NOT_PLAIN[name]
    wait_for(lambda: plain.connections == 0, "the connections of the test before are gone")
    plain.seen.clear()
    for at_a_time in (len(head), 1):
        with plain.connect() as client:
            for start in range(0, len(head), at_a_time):
                client.send(head[start : start + at_a_time])
            assert problem_of(client)[0] == status
    assert plain.seen == []


def test_the_same_behind_another_request_is_refused(plain: Running) -> None:
    for head in (NOT_PLAIN["two blanks before the target"][0], NOT_PLAIN["no host"][0]):
        with plain.connect() as client:
            client.send(GET + head)
            client.read_to_the_end()
            statuses = re.findall(rb"HTTP/1\.1 (\d+)", client.received)
            assert statuses == [b"200", b"400"]


@pytest.mark.parametrize(
    "host", [b"a", b"a.example:8000", b"127.0.0.1", b"[::1]:80", b"", b"my_host", b"a.", b"a:"]
)
def test_a_host_that_may_be_is_taken(host: bytes, plain: Running) -> None:
    with plain.connect() as client:
        client.send(b"\r\nGET / HTTP/1.1\r\nConnection: close\r\nHost: %b\r\n\r\n" % host)
        client.read_to_the_end()
        assert client.status == 200
    with plain.connect() as client:
        client.send(b"GET / HTTP/1.0\r\n\r\n")
        client.read_to_the_end()
        assert client.status == 200


def test_heads_in_pieces_behind_one_another_are_taken(plain: Running) -> None:
    last = GET.replace(b"Host", b"Connection: close\r\nHost")
    with plain.connect() as client:
        for piece in (GET + GET[:1], GET[1:9], GET[9:] + GET + last[:20], last[20:]):
            client.send(piece)
        client.read_to_the_end()
        assert client.received.count(b"HTTP/1.1 200") == 4


def test_an_offer_of_another_protocol_writes_no_line(
    plain: Running, caplog: pytest.LogCaptureFixture
) -> None:
    offer = b"Connection: Upgrade, close\r\nUpgrade: websocket\r\n"
    with plain.connect() as client:
        client.send(GET.replace(b"Host", offer + b"Host"))
        client.read_to_the_end()
        assert client.status == 200
    assert [line for line in caplog.messages if "pgrade" in line or "WebSocket" in line] == []


@pytest.mark.parametrize("before", [b"", GET], ids=["alone", "behind another"])
def test_a_body_behind_an_offer_is_never_another_request(before: bytes, plain: Running) -> None:
    """The parser takes no body behind an offer: one that is not taken out must be refused."""
    named = b"Connection: %bupgrade\r\nUpgrade: h2c\r\n" % (b"" if before else b"a" * 230 + b", ")
    inner = GET.replace(b"GET / ", b"GET /inner ")
    head = b"POST / HTTP/1.1\r\nHost: a\r\n%bContent-Length: %d\r\n\r\n" % (named, len(inner))
    with plain.connect() as client:
        client.send(before + head)
        client.send(inner)
        client.read_to_the_end()
        assert b"/inner" not in client.received
        statuses = re.findall(rb"HTTP/1\.1 (\d+)", client.received)
        assert statuses == [b"200", b"400"][not before :]


def test_trailers_do_not_pass_for_headers(tmp_path: Path) -> None:
    with serving(tmp_path) as running, running.connect() as client:
        client.send(CHUNKED + b"2\r\nhi\r\n0\r\nAuthorization: me\r\n\r\n")
        client.read_until(b"hi")
        assert "authorization" not in running.seen[0]


@pytest.mark.parametrize("endless", [b"X: y\r\n" * 1000, b"X: " + b"y" * 50_000, b"y" * 50_000])
def test_trailers_without_end_are_refused(endless: bytes, tmp_path: Path) -> None:
    with serving(tmp_path, LINGER_S=0.1) as running, running.connect() as client:
        client.send(CHUNKED + b"2\r\nhi\r\n0\r\n")
        client.send_as_long_as_taken(endless, times=5_000)
        assert client.sent < UNREAD_BYTES
        assert problem_of(client) == (400, "bad_request")


def test_chunk_extensions_without_end_are_refused(tmp_path: Path) -> None:
    with serving(tmp_path, LINGER_S=0.1) as running, running.connect() as client:
        client.send(CHUNKED + b"2;")
        client.send_as_long_as_taken(b"x" * 50_000, times=1_000)
        assert problem_of(client) == (400, "bad_request")


def test_a_body_in_chunks_of_one_byte_is_taken(tmp_path: Path) -> None:
    with serving(tmp_path) as running, running.connect() as client:
        client.send(CHUNKED + b"1\r\nx\r\n" * 100_000 + b"0\r\n\r\n")
        client.read_until(b"x" * 100_000)


def test_rubbish_behind_a_request_is_never_answered_inside_its_answer(tmp_path: Path) -> None:
    with serving(tmp_path) as running, running.connect() as client:
        client.send(b"GET /stream HTTP/1.1\r\nHost: a\r\n\r\n")
        client.read_until(b"begun")
        client.send(b"\x01\x02rubbish\r\n\r\n")
        client.send(b"GET /listening HTTP/1.1\r\nHost: a\r\n\r\n")  # not parsed any more
        running.go.set()
        client.read_to_the_end()
        answer, error = client.received.split(b"\r\n0\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 200")
        assert b"gone on" in answer
        assert b"bad_request" not in answer
        assert error.startswith(b"HTTP/1.1 400")
        assert error.count(b"HTTP/1.1 ") == 1
        assert (running.left, running.faults) == ([], [])


@LOOPS
@pytest.mark.parametrize("rubbish", [b"\x01\x02rubbish\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n"])
def test_requests_before_rubbish_are_answered_before_its_error(
    loop: str, rubbish: bytes, tmp_path: Path
) -> None:
    post = b"POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\n"
    with serving(tmp_path, loop=loop) as running, running.connect() as client:
        client.send(post + b"<1" + post + b"<2" + rubbish)
        client.read_to_the_end()
        assert client.received.count(b"HTTP/1.1 200") == 2
        answers, _, error = client.received.partition(b"HTTP/1.1 400")
        assert answers.index(b"<1") < answers.index(b"<2")
        assert b"bad_request" in error
        assert running.faults == []
        wait_for(lambda: running.connections == 0, "the connection is gone")


def test_rubbish_without_end_behind_a_request_is_cut(tmp_path: Path) -> None:
    with serving(tmp_path, LINGER_BYTES=100_000) as running, running.connect() as client:
        client.send(b"GET /listening HTTP/1.1\r\nHost: a\r\n\r\n\x01\x02rubbish")
        client.send_as_long_as_taken(bytes(50_000), times=200)
        wait_for(lambda: running.left == ["listening"], "its call ends")
        wait_for(lambda: running.connections == 0, "the connection is gone")


def test_a_client_that_leaves_after_rubbish_is_seen_to_leave(tmp_path: Path) -> None:
    with serving(tmp_path) as running:
        with running.connect() as client:
            client.send(b"GET /listening HTTP/1.1\r\nHost: a\r\n\r\n\x01\x02rubbish\r\n\r\n")
            wait_for(lambda: running.requests == 1, "the first one has begun")
            assert running.left == []
        wait_for(lambda: running.left == ["listening"], "it is told")


@LOOPS
def test_a_client_that_reads_nothing_of_the_last_answer_is_cut(loop: str, tmp_path: Path) -> None:
    with serving(tmp_path, loop=loop, CLOSING_S=0.1) as running, running.connect() as client:
        client.send(b"GET /big HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        client.read_until(b"\r\n\r\n")
        wait_for(lambda: running.connections == 0, "the connection is gone")
        assert len(client.read_to_the_end()) < BIG_BYTES


@LOOPS
def test_a_client_that_reads_nothing_of_a_stream_is_cut_and_the_stream_ends(
    loop: str, tmp_path: Path
) -> None:
    changes = {"STALLED_READER_S": 0.1, "stream_wait_ms": 1}
    with serving(tmp_path, loop=loop, **changes) as running, running.connect() as client:
        client.send(b"GET /stream HTTP/1.1\r\nHost: a\r\n\r\n")
        client.read_until(b"begun")
        running.go.set()
        wait_for(lambda: running.connections == 0, "the connection is gone")
        wait_for(lambda: running.requests == 0, "nobody works for it any more")


@LOOPS
def test_a_slow_reader_that_goes_on_reading_is_not_cut(loop: str, tmp_path: Path) -> None:
    changes = {"STALLED_READER_S": 0.2, "CLOSING_S": 0.2}
    with serving(tmp_path, loop=loop, **changes) as running, running.connect() as client:
        client.send(b"GET /big HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        body = 0
        pause = 0.04
        while data := client.socket.recv(1_000_000):
            body += len(data)
            client.socket.settimeout(10)
            if body < BIG_BYTES // 2:
                with pytest.raises(AssertionError):
                    wait_for(lambda: False, "a slow reader's pause", pause)
        assert body > BIG_BYTES


def test_an_idle_connection_is_closed_by_keep_alive_as_ever(tmp_path: Path) -> None:
    with serving(tmp_path, HEAD_TIMEOUT_S=0.1) as running, running.connect() as client:
        client.send(GET)
        client.read_until(b"hello")
        client.socket.settimeout(0.5)
        with pytest.raises(TimeoutError):  # not by the head's timer
            client.socket.recv(1)
        client.send(GET)
        client.read_until(b"hello")
