"""Topology: connections from a URL, for single servers, Sentinel, Cluster and TLS.

    redis://  rediss://  unix://           the server that the URL names
    redis+sentinel://a:26379,b/service/0   the master that the sentinels name, if it confirms that
    redis+cluster://a:6379,b               the node that owns the pool's slot, if it confirms that
    memory://                              this process, for unit tests: `simulation.py`

`rediss+...` is the same over TLS.

Invariants: every connect searches again and begins with the next of the seeds, so that one that is
wrong or hangs is not asked for ever; redis-py's retries are off, since they would hide an outage. A
generator without I/O decides which server is asked what, and gets each answer or error sent in; the
connection that answered last is the one sought.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Generator
from importlib import import_module
from typing import Any, NamedTuple, cast
from urllib.parse import parse_qsl, urlencode, urlsplit

import redis.asyncio.connection
import redis.asyncio.retry
import redis.connection
import redis.retry
from redis.asyncio.connection import AbstractConnection
from redis.backoff import NoBackoff
from redis.connection import ConnectionInterface
from redis.crc import key_slot
from redis.exceptions import RedisError

from tidegate.errors import ConfigError
from tidegate.limiter._compat import close_now

# Connecting takes several round trips; a short lease must not make it impossible.
MIN_CONNECT_S = 0.25
# How many redirections of a cluster are followed.
MAX_HOPS = 4
MAX_KNOWN_NODES = 64

_BASES = ("redis", "rediss", "unix")
_SCHEMES = "is not redis://, rediss://, unix://, redis+sentinel:// or redis+cluster://"
_UNREADABLE = (
    "cannot be read as a URL: in a password, # is %23, / is %2F, ? is %3F, [ is %5B and % is %25"
)
_MEMORY = "memory://"
_SLOTS = ("CLUSTER", "SLOTS")
_PORTS = {"": 0, "sentinel": 26379, "cluster": 6379}
# Connection options that the limiter sets, whatever the URL says.
_OWN_OPTIONS = {
    *("protocol", "decode_responses", "retry", "retry_on_timeout", "retry_on_error"),
    *("socket_timeout", "socket_connect_timeout", "health_check_interval", "max_connections"),
}


class Address(NamedTuple):
    """Where a server listens."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


class ServerQuestion(NamedTuple):
    """A command for the server at `address`; None is the one that the URL names.

    `seed`: the server is only asked where to connect, so its connection is not the one sought.
    """

    address: Address | None
    command: tuple[str, ...] = ()
    seed: bool = False


Search = Generator[ServerQuestion, Any, None]


class ServerUrl(NamedTuple):
    """A parsed URL. `finder`: the kind of its seeds: "", "sentinel" or "cluster"."""

    finder: str
    seeds: tuple[Address, ...]
    service: str
    server_url: str
    seed_url: str


def read_url(url: str) -> ServerUrl:
    """Return a parsed URL. Raises ConfigError, which never shows the password in the URL."""
    scheme, rest = _scheme_of(url), url.partition("://")[2]
    base, _, finder = scheme.partition("+")
    if finder not in _PORTS or base not in (_BASES[:2] if finder else _BASES):
        raise _invalid_url(scheme, _SCHEMES)
    try:
        parts = urlsplit(f"//{rest}")
    except ValueError:  # its text may repeat the password, as may those below
        raise _invalid_url(scheme, _UNREADABLE) from None
    if not finder:
        _check_database(scheme, parts.path.strip("/") if base != "unix" else "")
        return ServerUrl("", (), "", f"{scheme}://{rest}", "")
    access, at, hosts = parts.netloc.rpartition("@")
    try:
        seeds = tuple(_address(host, _PORTS[finder]) for host in hosts.split(","))
    except ValueError:
        raise _invalid_url(scheme, "needs host:port, with commas between several") from None
    service, _, database = parts.path.strip("/").partition("/")
    if finder == "sentinel" and not service:
        raise _invalid_url(scheme, "needs the name of the service: .../host:26379/service")
    if finder == "cluster" and (service not in ("", "0") or database):
        raise _invalid_url(scheme, "a cluster has database 0 only")
    _check_database(scheme, database)
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    watcher = {name: options.pop(f"sentinel_{name}", "") for name in ("username", "password")}
    server_url = f"{base}://{access}{at}host/{database}?{urlencode(options)}"
    if finder == "cluster":
        return ServerUrl(finder, seeds, "", server_url, server_url)
    options |= {name: value for name, value in watcher.items() if value}
    return ServerUrl(finder, seeds, service, server_url, f"{base}://host?{urlencode(options)}")


def _check_database(scheme: str, text: str) -> None:
    """Raise ConfigError unless the database is a number: redis-py would use database 0."""
    if text and "@" not in text and not (text.isascii() and text.isdigit()):
        raise _invalid_url(scheme, "its database, behind the /, must be a whole number")


def _scheme_of(url: str) -> str:
    """Return the URL's scheme; "" without one, since any other text may contain a password."""
    scheme, found, _ = url.partition("://")
    # redis-py works with Valkey, but does not know the schemes named after it.
    return scheme.replace("valkey", "redis", 1) if found else ""


def owner_of(slot: int, slots: Any, source: Address) -> Address | None:
    """Return the master of a slot, from the reply to CLUSTER SLOTS of the node `source`."""
    for first, last, master, *_ in slots:
        if first <= slot <= last:
            return _node(master, source)
    return None


def _node(entry: Any, source: Address) -> Address:
    host = entry[0]
    # A node that does not know its own name means the address at which it was asked.
    unknown = host is None or host in (b"", b"?")
    return Address(source.host if unknown else host.decode(), int(entry[1]))


def _address(text: str, port: int) -> Address:
    parts = urlsplit(f"//{text}")
    if not parts.hostname:
        raise ValueError("no host")
    return Address(parts.hostname, parts.port or port)


def _invalid_url(scheme: str, why: str) -> ConfigError:
    return ConfigError("url", f"{scheme}://(hidden)", why)


def _simulation() -> Any:
    """Return the module, imported late: it imports this one, and no deployment needs it."""
    return import_module("tidegate.limiter.simulation")


class Server:
    """The server of one pool, searched again at every connect. `key`: any key of the pool.

    Raises ConfigError for an invalid URL. Not thread-safe.
    """

    def __init__(self, url: str, key: str) -> None:
        if not isinstance(cast(object, url), str):
            allowed = "a URL such as redis://localhost:6379"
            raise ConfigError("url", type(url).__name__, allowed)  # it may contain a password
        self._in_memory = (url, key) if url.startswith(_MEMORY) else None
        self._target = read_url("redis://" if self._in_memory else url)
        self._slot = key_slot(key.encode())
        self._seeds = self._target.seeds
        self._turn = 0
        scheme = _scheme_of(url)
        try:
            self._make(ServerQuestion(None))
        except ValueError:
            raise _invalid_url(scheme, _UNREADABLE) from None
        except TypeError as error:  # an option of the URL that no connection has
            option = re.search(r"argument '(.*)'", str(error))
            why = f"has the unknown option {option[1]}" if option else str(error)
            raise _invalid_url(scheme, why) from None
        except RedisError as error:
            raise _invalid_url(scheme, str(error)) from None

    async def connect(self, deadline_s: float) -> AbstractConnection:
        """Return a new connection, within `deadline_s` or MIN_CONNECT_S.

        Raises OSError, TimeoutError or RedisError. Cancellation closes what was opened.
        """
        if self._in_memory is not None:
            return cast(AbstractConnection, _simulation().MemoryConnection(*self._in_memory))
        search, answer = self._search(), None
        connection: AbstractConnection | None = None
        try:
            async with asyncio.timeout(max(deadline_s, MIN_CONNECT_S)) as limit:
                while (question := _next(search, answer)) is not None:
                    if connection is not None:
                        close_now(connection)
                    connection = self._make(question)
                    left_s = (limit.when() or 0.0) - asyncio.get_running_loop().time()
                    answer = await _query(connection, question, left_s)
        except BaseException:  # on cancellation too, close the connection
            if connection is not None:
                close_now(connection)
            raise
        assert connection is not None
        return connection

    def connect_blocking(self, timeout_s: float) -> ConnectionInterface:
        """Return a new connection, for a thread.

        No question begins after `timeout_s` or MIN_CONNECT_S; the last question, and each later
        call on the connection, may take as long again.
        """
        if self._in_memory is not None:
            return cast(ConnectionInterface, _simulation().MemoryThreadConnection(*self._in_memory))
        timeout_s = max(timeout_s, MIN_CONNECT_S)
        end_s = time.monotonic() + timeout_s
        search, answer = self._search(), None
        connection: ConnectionInterface | None = None
        try:
            while (question := _next(search, answer)) is not None:
                if connection is not None:
                    connection.disconnect()  # type: ignore[no-untyped-call]
                left_s = end_s - time.monotonic()
                if left_s <= 0:
                    raise TimeoutError("no server of the pool was found in time")
                connection = self._make_blocking(
                    question, left_s / 2 if question.seed else timeout_s
                )
                answer = _query_blocking(connection, question)
        except BaseException:  # on an interrupt too, close the connection
            if connection is not None:
                connection.disconnect()  # type: ignore[no-untyped-call]
            raise
        assert connection is not None
        return connection

    def _make(self, question: ServerQuestion) -> AbstractConnection:
        options: dict[str, Any] = dict(redis.asyncio.connection.parse_url(self._url(question)))
        kind = options.pop("connection_class", redis.asyncio.connection.Connection)
        # The limiter has its own deadlines; redis-py's would cut off a silent subscription.
        free = {"socket_timeout": None, "socket_connect_timeout": None}
        retry = redis.asyncio.retry.Retry(NoBackoff(), 0)
        connection: AbstractConnection = kind(
            **_connection_options(options, question), **free, retry=retry
        )
        return connection

    def _make_blocking(self, question: ServerQuestion, timeout_s: float) -> ConnectionInterface:
        options = dict(redis.connection.parse_url(self._url(question)))  # type: ignore[no-untyped-call]
        kind = options.pop("connection_class", redis.connection.Connection)
        bounds = {"socket_timeout": timeout_s, "socket_connect_timeout": timeout_s}
        retry = redis.retry.Retry(NoBackoff(), 0)
        connection: ConnectionInterface = kind(
            **_connection_options(options, question), **bounds, retry=retry
        )
        return connection

    def _url(self, question: ServerQuestion) -> str:
        return self._target.seed_url if question.seed else self._target.server_url

    def _search(self) -> Search:
        turn, self._turn = self._turn, self._turn + 1
        if not self._seeds:
            return _direct()
        first = turn % len(self._seeds)
        seeds = self._seeds[first:] + self._seeds[:first]
        if self._target.finder == "sentinel":
            return _query_sentinels(seeds, self._target.service)
        return self._query_nodes(seeds)

    def _query_nodes(self, seeds: tuple[Address, ...]) -> Search:
        """Search the node that itself claims our slot; other nodes only say which to ask next."""
        problems: dict[Address, object] = {}
        for seed in seeds:
            node, answer = seed, (yield ServerQuestion(seed, _SLOTS, seed=True))
            for _ in range(MAX_HOPS):
                owner = self._owner(answer, node, problems)
                if owner is None or owner in problems:
                    break
                node, answer = owner, (yield ServerQuestion(owner, _SLOTS))
                if self._owner(answer, node, problems) == node:
                    self._learn(answer, node)
                    return
        raise ConnectionError(
            f"no node of the cluster has the slot of the pool: {_listed(problems)}"
        )

    def _owner(
        self, answer: Any, source: Address, problems: dict[Address, object]
    ) -> Address | None:
        if isinstance(answer, Exception):
            problems[source] = answer
            return None
        owner = owner_of(self._slot, answer, source)
        if owner is None:
            problems[source] = f"no node serves slot {self._slot}"
        return owner

    def _learn(self, slots: Any, source: Address) -> None:
        """Remember the nodes seen, since all nodes in the URL may disappear."""
        found = [_node(entry, source) for _, _, *nodes in slots for entry in nodes]
        known = dict.fromkeys((*self._target.seeds, *found))
        self._seeds = tuple(known)[:MAX_KNOWN_NODES]


def _direct() -> Search:
    answer = yield ServerQuestion(None)
    if isinstance(answer, Exception):
        raise answer


def _query_sentinels(sentinels: tuple[Address, ...], service: str) -> Search:
    """Search the master that a sentinel names and that confirms it.

    A sentinel that was disconnected may name a server that has been replaced.
    """
    problems: dict[Address, object] = {}
    for sentinel in sentinels:
        question = ("SENTINEL", "GET-MASTER-ADDR-BY-NAME", service)
        answer = yield ServerQuestion(sentinel, question, seed=True)
        if isinstance(answer, Exception) or not answer:
            problems[sentinel] = answer or f"knows no {service}"
            continue
        master = Address(answer[0].decode(), int(answer[1]))
        if master in problems:
            continue
        role = yield ServerQuestion(master, ("ROLE",))
        if isinstance(role, list) and role[0] == b"master":
            return
        problems[master] = role if isinstance(role, Exception) else "is no master"
    raise ConnectionError(f"no master of {service}: {_listed(problems)}")


def _listed(problems: dict[Address, object]) -> str:
    return "; ".join(f"{address}: {problem}" for address, problem in problems.items())


def _next(search: Search, answer: Any) -> ServerQuestion | None:
    try:
        return search.send(answer)
    except StopIteration:
        return None


def _connection_options(options: dict[str, Any], question: ServerQuestion) -> dict[str, Any]:
    """Return the URL's options for a connection, without those that the limiter sets."""
    allowed = {name: value for name, value in options.items() if name not in _OWN_OPTIONS}
    if question.address is not None:
        allowed |= {"host": question.address.host, "port": question.address.port}
    return allowed | {"protocol": 2}


async def _query(connection: AbstractConnection, question: ServerQuestion, left_s: float) -> Any:
    """Return the answer or the error; a server asked for others takes at most half the time."""
    try:
        async with asyncio.timeout(left_s / 2 if question.command else left_s):
            await connection.connect()  # type: ignore[no-untyped-call]
            if not question.command:
                return None
            await connection.send_command(*question.command, check_health=False)
            return await connection.read_response()
    except (OSError, TimeoutError, RedisError) as error:
        return error


def _query_blocking(connection: ConnectionInterface, question: ServerQuestion) -> Any:
    try:
        connection.connect()  # type: ignore[no-untyped-call]
        if not question.command:
            return None
        connection.send_command(*question.command, check_health=False)  # type: ignore[no-untyped-call]
        return connection.read_response()
    except (OSError, RedisError) as error:
        return error
