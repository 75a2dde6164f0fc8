"""The Valkey of the walk: one connection, on which a round trip brings a script's reply, what the
script pushed and all that it left behind.

Invariant: when `run` returns every push of the script is heard, for the dump is answered after it.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import hiredis

from tests.property.dump import DUMP

# Of the walk alone: other tests keep their pools in the first one.
DATABASE = 15
WAIT_S = 30

Word = bytes | str | int
Words = tuple[Word, ...]


class Server:
    """Commands go out in one write and are answered in order; pushes come between the answers."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._reader = hiredis.Reader()
        self._unsent: list[bytes] = []
        self._loaded: dict[bytes, bytes] = {}
        self._heard: list[tuple[str, bytes]] = []
        self._ask("HELLO", 3)
        self._ask("SELECT", DATABASE)
        self._ask("FUNCTION", "LOAD", "REPLACE", DUMP)

    def load(self, source: bytes) -> bytes:
        """The name of a script, which the server knows from now on."""
        if source not in self._loaded:
            self._loaded[source] = self._ask("SCRIPT", "LOAD", source)
        return self._loaded[source]

    def run(self, script: bytes, *arguments: Word) -> tuple[bytes, bytes]:
        """Run a script on two keys: its reply, and a dump of what is there after it."""
        self._send("EVALSHA", script, 2, *arguments)
        self._send("FCALL", "dump", 0)
        reply, dump = self._answers(2)
        return reply, dump

    def run_all(self, script: bytes, calls: Sequence[Words]) -> list[bytes]:
        """The replies to several runs, without a dump."""
        for arguments in calls:
            self._send("EVALSHA", script, 2, *arguments)
        return self._answers(len(calls))

    def names(self) -> list[str]:
        """All keys."""
        return [name.decode() for name in self._ask("KEYS", "*")]

    def wipe(self) -> None:
        self._ask("FLUSHDB")
        self._ask("FCALL", "dump", 0)

    def subscribe(self, channel: str) -> None:
        """Before the next command."""
        self._send("SSUBSCRIBE", channel)

    def unsubscribe(self, channel: str) -> None:
        self._send("SUNSUBSCRIBE", channel)

    def take_heard(self) -> list[tuple[str, bytes]]:
        """The channel and the text of each push since the last time."""
        heard, self._heard = self._heard, []
        return heard

    def _send(self, *words: Word) -> None:
        self._unsent.append(hiredis.pack_command(words))  # type: ignore[arg-type]

    def _ask(self, *words: Word) -> Any:
        self._send(*words)
        [answer] = self._answers(1)
        return answer

    def _answers(self, number: int) -> list[Any]:
        self._socket.sendall(b"".join(self._unsent))
        self._unsent.clear()
        answers: list[Any] = []
        while len(answers) < number:
            item = self._reader.gets()
            if item is False:
                data = self._socket.recv(1 << 18)
                assert data, "the server closed the connection"
                self._reader.feed(data)
            elif isinstance(item, hiredis.PushNotification):
                if item[0] == b"smessage":
                    self._heard.append((item[1].decode(), item[2]))
            else:
                answers.append(item)
        for answer in answers:
            if isinstance(answer, Exception):
                raise answer
        return answers


@contextmanager
def connected(url: str) -> Iterator[Server]:
    """A server of which the walk's own database is empty, before and after."""
    place = urlsplit(url)
    with socket.create_connection((place.hostname, place.port), timeout=WAIT_S) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        server = Server(connection)
        server.wipe()
        yield server
        server.wipe()
