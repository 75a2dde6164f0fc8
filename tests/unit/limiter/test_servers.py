"""URLs of servers taken apart, and whom they make us ask what, without any server."""

from __future__ import annotations

from traceback import format_exception
from typing import Any

import pytest

from tidegate.errors import ConfigError
from tidegate.limiter.topology import Address, Server, ServerQuestion, owner_of, read_url

KEY = "tg:1:{gemini}:meta"
SLOTS = ("CLUSTER", "SLOTS")
WHOLE = 16383


Answers = dict[tuple[str, int], list[Any]]


def ask(server: Server, answers: Answers) -> list[str]:
    """Whom a search asks, when the servers give these answers one after the other; the last is
    where it ended."""
    search, answer, asked = server._search(), None, []
    try:
        while True:
            question: ServerQuestion = search.send(answer)
            assert question.address is not None
            asked.append(str(question.address))
            given = answers.get(question.address, [])
            answer = given.pop(0) if given else ConnectionError("refused")
    except StopIteration:
        return asked


def slots(host: str, port: int, *replicas: tuple[str, int]) -> list[Any]:
    """An answer to CLUSTER SLOTS: one node has them all."""
    return [[0, WHOLE, [host.encode(), port, b"id"], *([h.encode(), p, b"i"] for h, p in replicas)]]


def named(host: str, port: int) -> list[bytes]:
    return [host.encode(), str(port).encode()]


@pytest.mark.parametrize(
    ("url", "finder", "seeds", "service", "server_url", "seed_url"),
    [
        ("redis://u:p@h:1/2?a=b", "", [], "", "redis://u:p@h:1/2?a=b", ""),
        ("valkeys://h", "", [], "", "rediss://h", ""),
        ("unix:///run/s", "", [], "", "unix:///run/s", ""),
        (
            "redis+sentinel://u:p%40@a:1,b/front/3?sentinel_password=w&ssl_min_version=3",
            *("sentinel", [("a", 1), ("b", 26379)], "front"),
            "redis://u:p%40@host/3?ssl_min_version=3",
            "redis://host?ssl_min_version=3&password=w",
        ),
        (
            "rediss+cluster://[::1]:7,b",
            *("cluster", [("::1", 7), ("b", 6379)], ""),
            *["rediss://host/?"] * 2,
        ),
        (
            "valkey+cluster://:p@a/0",
            *("cluster", [("a", 6379)], ""),
            *["redis://:p@host/?"] * 2,
        ),
    ],
)
def test_a_url_is_taken_apart(
    url: str,
    finder: str,
    seeds: list[tuple[str, int]],
    service: str,
    server_url: str,
    seed_url: str,
) -> None:
    assert read_url(url) == (finder, tuple(seeds), service, server_url, seed_url)


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("http://:sesame@h", "is not redis"),
        ("user:sesame@host", "is not redis"),
        ("redis+proxy://:sesame@h", "is not redis"),
        ("unix+cluster://:sesame@h", "is not redis"),
        ("redis+sentinel://:sesame@h:1", "name of the service"),
        ("redis+sentinel://:sesame@h:one/front", "needs host:port"),
        ("redis+sentinel://:sesame@,h/front", "needs host:port"),
        ("redis+cluster://:sesame@h/1", "database 0"),
        ("redis://:sesame/@h", "cannot be read"),
        ("redis://:sesame/@h", "/ is %2F"),
        ("redis://:sesame@h?colour=red", "has the unknown option colour$"),
        ("redis://:sesame@h/1x", "database, behind the /, must be a whole number"),
        ("redis+sentinel://:sesame@h/front/one", "database, behind the /, must be a whole number"),
        ("rediss://:sesame@h?ssl_cert_reqs=perhaps", "perhaps"),
        ("redis+cluster://:sesame@h?db=x", "cannot be read"),
        ("redis://:[sesame@h", r"\[ is %5B"),
        ("redis+sentinel://:[sesame@h/front", r"\[ is %5B"),
        ("redis://:sesame\N{ACCOUNT OF}@h", "cannot be read"),
        ("redis://:%sesame#@h", "cannot be read"),
    ],
)
def test_a_wrong_url_is_told_in_a_line_without_its_password(url: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why) as raised:
        Server(url, KEY)
    assert "sesame" not in "".join(format_exception(raised.value))


def test_what_is_the_limiters_own_cannot_be_chosen_by_the_url() -> None:
    options = (
        "protocol=3&decode_responses=yes&retry_on_timeout=yes&socket_timeout=1&max_connections=1"
    )
    server = Server(f"redis://h?{options}", KEY)
    connection = server._make(ServerQuestion(None))
    assert (connection.protocol, connection.encoder.decode_responses) == (2, False)
    assert (connection.socket_timeout, connection.retry.get_retries()) == (None, 0)
    blocking: Any = server._make_blocking(ServerQuestion(None), 0.5)
    assert (blocking.protocol, blocking.encoder.decode_responses) == (2, False)
    assert (blocking.socket_timeout, blocking.retry.get_retries()) == (0.5, 0)


def test_every_search_begins_with_another_sentinel() -> None:
    server = Server("redis+sentinel://a:1,b:2,c:3/front", KEY)
    firsts = []
    for _ in range(4):
        with pytest.raises(ConnectionError, match=r"no master of front: .*refused"):
            ask(server, {})
        search = server._search()
        firsts.append(str(next(search).address))
    assert firsts == ["b:2", "a:1", "c:3", "b:2"]


def test_a_master_must_say_so_itself() -> None:
    server = Server("redis+sentinel://a:1,b:2,c:3/front", KEY)
    answers: Answers = {
        ("a", 1): [named("old", 9)],
        ("old", 9): [[b"slave", b"new", 9, b"connected", 0]],
        ("b", 2): [named("old", 9)],
        ("c", 3): [named("new", 9)],
        ("new", 9): [[b"master", 0, []]],
    }
    assert ask(server, answers) == ["a:1", "old:9", "b:2", "c:3", "new:9"]


def test_a_sentinel_that_does_not_know_the_service_is_passed_over() -> None:
    server = Server("redis+sentinel://a:1,b:2/front", KEY)
    answers: Answers = {("a", 1): [None], ("b", 2): [named("m", 9)], ("m", 9): [[b"master", 0, []]]}
    assert ask(server, answers) == ["a:1", "b:2", "m:9"]


def test_a_node_is_asked_whether_it_has_the_slot_itself() -> None:
    server = Server("redis+cluster://a:1,b:2", KEY)
    answers: Answers = {
        ("a", 1): [slots("b", 2)],
        ("b", 2): [slots("c", 3)],
        ("c", 3): [slots("", 3)],
    }
    assert ask(server, answers) == ["a:1", "b:2", "c:3"]


def test_nodes_that_send_us_in_circles_are_left_for_another() -> None:
    server = Server("redis+cluster://a:1,c:3", KEY)
    answers: Answers = {
        ("a", 1): [slots("b", 2)] * 9,
        ("b", 2): [slots("a", 1)] * 9,
        ("c", 3): [slots("c", 3)] * 2,
    }
    asked = ask(server, answers)
    assert asked[-2:] == ["c:3", "c:3"]
    assert len(asked) < 10


def test_a_node_that_is_down_is_not_tried_again_on_the_word_of_another() -> None:
    server = Server("redis+cluster://a:1,b:2,c:3", KEY)
    answers: Answers = {
        ("a", 1): [slots("d", 4)],
        ("b", 2): [slots("d", 4)],
        ("c", 3): [slots("e", 5)],
        ("e", 5): [slots("e", 5)],
    }
    assert ask(server, answers) == ["a:1", "d:4", "b:2", "c:3", "e:5"]


def test_nodes_that_were_seen_are_asked_when_those_of_the_url_are_gone() -> None:
    server = Server("redis+cluster://a:1", KEY)
    ask(server, {("a", 1): [slots("b", 2, ("c", 3))], ("b", 2): [slots("b", 2, ("c", 3))]})
    answers: Answers = {("c", 3): [slots("c", 3)] * 2}
    assert ask(server, answers)[-2:] == ["c:3", "c:3"]


def test_a_slot_that_nobody_serves_is_told() -> None:
    server = Server("redis+cluster://a:1", KEY)
    with pytest.raises(ConnectionError, match=r"a:1: no node serves slot \d+"):
        ask(server, {("a", 1): [[[0, 0, [b"a", 1, b"id"]]]]})


@pytest.mark.parametrize("unknown", [None, b"", b"?"])
def test_a_node_without_a_name_is_the_one_that_was_asked(unknown: bytes | None) -> None:
    answer = [[0, WHOLE, [unknown, 7, b"id"]]]
    assert owner_of(1, answer, Address("asked", 1)) == ("asked", 7)
