"""The keeper of the bundled servers: one per folder, there as long as anybody needs it."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import stat
import threading
import time
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

import asyncpg
import pytest
import redis

from tests.integration.embedded.traces import Traces
from tests.integration.embedded.user import User
from tests.waiting import promised_s, wait_until
from tidegate.embedded import servers as process
from tidegate.embedded.keeper import Keeper
from tidegate.embedded.lease import Folder, ServersLease, ensure
from tidegate.embedded.servers import ProcessIdentity, ServerFailed
from tidegate.errors import ConfigError


def _ensure(data_dir: Path, *services: str) -> ServersLease:
    return ensure(data_dir, services, idle_s=0.3)  # type: ignore[arg-type]


def _service(data_dir: Path, name: str) -> ProcessIdentity:
    return Folder(data_dir).read().services[name].identity


def _keeper(data_dir: Path) -> ProcessIdentity:
    keeper = Folder(data_dir).read().keeper
    assert keeper is not None
    return keeper


async def _remember(url: str | None, word: str) -> None:
    connection = await asyncpg.connect(url)
    await connection.execute("CREATE TABLE IF NOT EXISTS words (word text)")
    await connection.execute("INSERT INTO words VALUES ($1)", word)
    await connection.close()


async def _recall(url: str | None) -> list[str] | None:
    """The words that were remembered, or None while the server is away."""
    try:
        connection = await asyncpg.connect(url)
        rows = await connection.fetch("SELECT word FROM words")
    except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError):
        return None  # it may end between the two as well
    await connection.close()
    return [row["word"] for row in rows]


def _pings(url: str | None) -> bool:
    assert url is not None
    client = redis.Redis.from_url(url, socket_timeout=1)
    try:
        return bool(client.ping())
    except redis.ConnectionError:
        return False
    finally:
        client.close()


async def test_users_that_start_at_once_share_one_keeper(data_dir: Path, traces: Traces) -> None:
    users = [User(data_dir, "valkey", "postgres") for _ in range(5)]
    urls = [user.urls for user in users]
    assert urls == [urls[0]] * 5
    assert len(traces.pids("tidegate.embedded.keeper")) == 1
    assert len(traces.pids("valkey-server")) == 1
    assert len(traces.postgres()) == 1
    for user in users:
        assert user.leave() == 0
    await traces.none_left(timeout_s=20)


async def test_killing_one_user_harms_neither_the_other_nor_the_data(
    data_dir: Path, traces: Traces
) -> None:
    other = User(data_dir, "valkey", "postgres")
    await _remember(other.urls["postgres"], "kept")
    with _ensure(data_dir, "valkey", "postgres") as lease:
        before = _service(data_dir, "postgres")
        other.kill()
        keeper = _keeper(data_dir)
        await wait_until(lambda: not traces.pids(" -c "), what="the user's end")
        assert await _recall(lease.database_url) == ["kept"]
        assert _service(data_dir, "postgres") == before
        assert _keeper(data_dir) == keeper
    await traces.none_left()


async def test_servers_end_some_time_after_the_last_user_was_killed(
    data_dir: Path, traces: Traces
) -> None:
    user = User(data_dir, "valkey", "postgres")
    assert user.urls
    user.kill()
    assert traces.pids("keeper")
    await traces.none_left(timeout_s=20)


async def test_the_last_user_that_leaves_in_order_waits_for_the_servers_end(
    data_dir: Path, traces: Traces
) -> None:
    lease = ensure(data_dir, {"valkey", "postgres"}, idle_s=600)
    lease.close()
    assert not traces.pids("valkey-server")
    assert not traces.postgres()
    await traces.none_left()


async def test_a_user_that_leaves_in_order_does_not_stop_what_others_use(
    data_dir: Path, traces: Traces
) -> None:
    with ensure(data_dir, {"valkey"}, idle_s=0.3) as lease:
        assert User(data_dir, "valkey").leave() == 0
        before = _service(data_dir, "valkey")
        await wait_until(lambda: not Folder(data_dir).hurry.exists(), what="the keeper's answer")
        assert _pings(lease.redis_url)
        assert _service(data_dir, "valkey") == before


async def test_a_killed_keeper_is_replaced_by_one_that_adopts_the_servers(
    data_dir: Path, traces: Traces
) -> None:
    with _ensure(data_dir, "valkey", "postgres") as lease:
        await _remember(lease.database_url, "kept")
        before = _keeper(data_dir)
        servers = [_service(data_dir, name) for name in ("valkey", "postgres")]
        os.kill(before.pid, signal.SIGKILL)

        def replaced() -> bool:
            keeper = Folder(data_dir).read().keeper
            return keeper is not None and keeper != before and keeper.alive

        await wait_until(replaced, what="another keeper")
        await wait_until(lambda: _recall(lease.database_url))
        assert servers == [_service(data_dir, name) for name in ("valkey", "postgres")]
        assert len(traces.postgres()) == 1
    assert not traces.postgres(), "adopted servers end with the last user as well"


async def test_who_comes_while_a_keeper_ends_the_servers_gets_those_of_the_next(
    data_dir: Path, traces: Traces
) -> None:
    with _ensure(data_dir, "postgres") as lease:
        await _remember(lease.database_url, "kept")
        os.kill(_keeper(data_dir).pid, signal.SIGTERM)  # as systemd does to all of a service

        async def refuses() -> bool:
            return await _recall(lease.database_url) is None

        await wait_until(refuses, 20, "the server's end")
        newcomer = await asyncio.to_thread(_ensure, data_dir, "postgres")
        with newcomer:
            assert await _recall(newcomer.database_url) == ["kept"]


async def test_servers_end_with_the_last_user_even_if_their_keeper_was_killed(
    data_dir: Path, traces: Traces
) -> None:
    lease = _ensure(data_dir, "valkey", "postgres")
    os.kill(_keeper(data_dir).pid, signal.SIGKILL)
    lease.close()
    assert not traces.pids("valkey-server")
    assert not traces.postgres()


async def test_servers_that_lost_keeper_and_users_are_adopted_by_the_next_user(
    data_dir: Path, traces: Traces
) -> None:
    user = User(data_dir, "valkey", "postgres")
    urls = user.urls
    os.kill(_keeper(data_dir).pid, signal.SIGKILL)
    servers = [_service(data_dir, name) for name in ("valkey", "postgres")]
    user.kill()
    with _ensure(data_dir, "valkey", "postgres") as lease:
        assert (lease.redis_url, lease.database_url) == (urls["valkey"], urls["postgres"])
        assert servers == [_service(data_dir, name) for name in ("valkey", "postgres")]


async def test_servers_that_died_with_their_keeper_start_anew_with_their_data(
    data_dir: Path, traces: Traces
) -> None:
    user = User(data_dir, "valkey", "postgres")
    urls = user.urls
    await _remember(urls["postgres"], "kept")
    for identity in (
        _keeper(data_dir),
        _service(data_dir, "postgres"),
        _service(data_dir, "valkey"),
    ):
        os.kill(identity.pid, signal.SIGKILL)
    user.kill()
    with _ensure(data_dir, "valkey", "postgres") as lease:
        assert (lease.redis_url, lease.database_url) == (urls["valkey"], urls["postgres"])
        assert await _recall(lease.database_url) == ["kept"]


async def test_a_killed_valkey_comes_back_under_the_same_url(
    data_dir: Path, traces: Traces
) -> None:
    with _ensure(data_dir, "valkey") as lease:
        before = _service(data_dir, "valkey")
        os.kill(before.pid, signal.SIGKILL)
        await wait_until(lambda: not before.alive)
        await wait_until(lambda: _pings(lease.redis_url), what="Valkey's return")


async def test_a_killed_postgres_comes_back_under_the_same_url_with_its_data(
    data_dir: Path, traces: Traces
) -> None:
    with _ensure(data_dir, "postgres") as lease:
        await _remember(lease.database_url, "kept")
        before = _service(data_dir, "postgres")
        os.kill(before.pid, signal.SIGKILL)
        await wait_until(lambda: not before.alive)
        words = await wait_until(lambda: _recall(lease.database_url), what="PostgreSQL's return")
        assert words == ["kept"]
        assert len(traces.postgres()) == 1


async def test_a_second_start_is_quick_and_finds_data_and_ports(
    data_dir: Path, traces: Traces
) -> None:
    with _ensure(data_dir, "valkey", "postgres") as lease:
        urls = (lease.redis_url, lease.database_url)
        await _remember(lease.database_url, "kept")
    began = time.monotonic()
    with _ensure(data_dir, "valkey", "postgres") as lease:
        assert time.monotonic() - began < promised_s(8.0)
        assert (lease.redis_url, lease.database_url) == urls
        assert await _recall(lease.database_url) == ["kept"]


async def test_a_folder_of_version_0_1_0_starts_with_its_data_and_ports(
    data_dir: Path, traces: Traces
) -> None:
    """That version listened on no socket, and its state names none."""
    with _ensure(data_dir, "postgres") as lease:
        url = lease.database_url
        await _remember(url, "kept")
    path = data_dir / "embedded" / "state.json"
    state = json.loads(path.read_text(encoding="utf-8"))
    assert state.pop("sockets") == {}
    path.write_text(json.dumps(state), encoding="utf-8")
    with _ensure(data_dir, "valkey", "postgres") as lease:
        assert lease.database_url == url
        assert await _recall(url) == ["kept"]
        assert _pings(lease.redis_url)


async def test_a_server_that_is_asked_for_later_joins_those_that_run(
    data_dir: Path, traces: Traces
) -> None:
    with _ensure(data_dir, "valkey"):
        keeper = _keeper(data_dir)
        with _ensure(data_dir, "emulator") as second:
            assert second.emulator_url is not None
            assert second.redis_url is None
            assert _keeper(data_dir) == keeper


async def test_a_server_that_cannot_start_is_told_at_once(data_dir: Path, traces: Traces) -> None:
    folder = Folder(data_dir)
    folder.create()
    (folder.path / "valkey").write_text("in the way")
    began = time.monotonic()
    with pytest.raises(ServerFailed, match="File exists"):
        _ensure(data_dir, "valkey")
    assert time.monotonic() - began < promised_s(8.0)
    (folder.path / "valkey").unlink()
    with _ensure(data_dir, "valkey") as lease:
        assert _pings(lease.redis_url), "an old failure is not held against a new user"


async def test_a_port_that_somebody_else_takes_first_is_given_up(
    data_dir: Path, traces: Traces, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Folder(data_dir)
    folder.create()
    choose = process.free_port
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = other.getsockname()[1]
        ports = iter([taken])
        monkeypatch.setattr(process, "free_port", lambda: next(ports, None) or choose())
        keeping = threading.Thread(target=Keeper(folder, 0.3).run, args=(None,))
        keeping.start()
        await wait_until(lambda: folder.read().keeper)
        with _ensure(data_dir, "emulator") as lease:
            assert lease.emulator_url is not None
            assert folder.read().ports["emulator"] != taken
    await asyncio.to_thread(keeping.join, 20)
    assert not keeping.is_alive()


def test_a_folder_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(ConfigError, match=f"DATA_DIR={tmp_path / 'file'}: cannot be used: "):
        _ensure(tmp_path / "file", "valkey")


async def test_removing_the_folder_ends_its_servers(data_dir: Path, traces: Traces) -> None:
    user = User(data_dir, "valkey", idle_s=600)
    assert user.urls
    shutil.rmtree(data_dir)
    await wait_until(lambda: not traces.pids("valkey-server"))
    await wait_until(lambda: not traces.pids("tidegate.embedded.keeper"))
    user.kill()


def _password_in(url: str) -> str:
    return urlsplit(url).password or ""


async def test_only_those_who_may_read_the_folder_can_connect(
    data_dir: Path, traces: Traces
) -> None:
    with _ensure(data_dir, "valkey", "postgres") as lease:
        assert lease.redis_url is not None
        assert lease.database_url is not None
        passwords = [_password_in(url) for url in (lease.redis_url, lease.database_url)]
        names = ("state.json", "keeper.log", "users.lock")
        for name in (*names, "password", "password.application", "password.valkey"):
            mode = (data_dir / "embedded" / name).stat().st_mode
            assert stat.S_IMODE(mode) == 0o600, name
        for password in passwords:
            assert not [command for command in traces.commands() if password in command]
        stranger = redis.Redis.from_url(lease.redis_url.replace(f":{passwords[0]}@", ""))
        with pytest.raises(redis.AuthenticationError):
            stranger.ping()
        stranger.close()
        with pytest.raises(asyncpg.InvalidPasswordError):
            await asyncpg.connect(lease.database_url.replace(passwords[1], "wrong"))


async def test_no_key_in_the_environment_reaches_keeper_or_servers(
    data_dir: Path, traces: Traces, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("GEMINI_API_KEY", "KEY_NAMED_IN_A_POLICY_FILE", "AWS_SECRET_ACCESS_KEY")
    for name in names:
        monkeypatch.setenv(name, "a-secret-of-the-user")
    with _ensure(data_dir, "valkey", "postgres", "emulator"):
        assert traces.pids("tidegate.embedded.keeper")
        assert traces.postgres()
        for name in names:
            assert not traces.with_variable(name), name


def _listeners(pid: int) -> list[str]:
    """The TCP sockets on which a process listens, as lines of /proc/net/tcp."""
    inodes = set()
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):
            inodes.add(os.readlink(descriptor).removeprefix("socket:[").removesuffix("]"))
    lines = Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]
    return [line for line in lines if line.split()[3] == "0A" and line.split()[9] in inodes]


async def test_nobody_else_can_take_the_place_of_valkey(data_dir: Path, traces: Traces) -> None:
    """On a port, another user could listen while the server restarts, and be sent the password."""
    with _ensure(data_dir, "valkey", "postgres") as lease:
        assert lease.redis_url is not None
        assert lease.database_url is not None
        parts = urlsplit(lease.redis_url)
        assert parts.scheme == "unix"
        folder = Path(parts.path).parent.stat()
        assert stat.S_IMODE(folder.st_mode) == 0o700
        assert folder.st_uid == os.geteuid()
        assert not _listeners(_service(data_dir, "valkey").pid)
        assert _password_in(lease.redis_url) != _password_in(lease.database_url)
        before = _service(data_dir, "valkey")
        os.kill(before.pid, signal.SIGKILL)
        await wait_until(lambda: _pings(lease.redis_url), what="Valkey at the same address")


async def test_a_path_too_long_for_a_socket_gets_a_private_folder_elsewhere(
    tmp_path: Path, traces: Traces
) -> None:
    data_dir = tmp_path / ("a-long-name" * 8) / "data"
    with _ensure(data_dir, "valkey") as lease:
        assert lease.redis_url is not None
        folder = Path(urlsplit(lease.redis_url).path).parent
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert _pings(lease.redis_url)
        keeper = _keeper(data_dir)
        os.kill(keeper.pid, signal.SIGKILL)
        before = _service(data_dir, "valkey")
        await wait_until(lambda: _keeper(data_dir) != keeper, what="another keeper")
        assert _pings(lease.redis_url)
        assert _service(data_dir, "valkey") == before
    await traces.none_left()
    assert not folder.exists()


async def test_the_application_is_no_superuser(data_dir: Path, traces: Traces) -> None:
    with _ensure(data_dir, "postgres") as lease:
        connection = await asyncpg.connect(lease.database_url)
        for statement in ("COPY (SELECT 1) TO PROGRAM 'true'", "SELECT pg_read_file('PG_VERSION')"):
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await connection.execute(statement)
        await connection.execute("CREATE TABLE of_the_application (word text)")
        await connection.close()


async def test_no_parent_folder_is_opened_to_others(tmp_path: Path, traces: Traces) -> None:
    closed = tmp_path / "closed"
    closed.mkdir()
    for folder in (closed, tmp_path):
        folder.chmod(0o700)
    with _ensure(closed / "data", "valkey", "postgres") as lease:
        assert await wait_until(lambda: _pings(lease.redis_url))
        for folder in (closed, tmp_path):
            assert stat.S_IMODE(folder.stat().st_mode) == 0o700
