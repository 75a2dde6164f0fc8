"""The bundled PostgreSQL: never two servers on one cluster, and no start that stays blocked."""

from __future__ import annotations

import asyncio
import os
import signal
import struct
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import asyncpg
import pytest

from tests.clusters import FAST, copied
from tests.integration.embedded.traces import Traces
from tests.waiting import wait_until
from tidegate.embedded import servers
from tidegate.embedded.lease import ServiceName, ensure
from tidegate.embedded.servers import (
    PostgresServer,
    Postmaster,
    ServerFailed,
    ServerProcess,
    StillRecovering,
    recovers,
)
from tidegate.store.database import migrate


def test_a_program_that_fails_is_told_in_one_line(tmp_path: Path) -> None:
    words = "echo 'FATAL: could not write' >&2; echo 'No space left on device' >&2; exit 1"
    with pytest.raises(ServerFailed) as failed:
        ServerProcess("PostgreSQL", tmp_path / "log", bool).run(["sh", "-c", words])
    assert str(failed.value) == "sh failed: FATAL: could not write No space left on device"


async def test_a_second_start_on_a_cluster_stops_the_server_that_runs_there(
    tmp_path: Path, traces: Traces
) -> None:
    first = PostgresServer(tmp_path / "postgres")
    first.start()
    second = PostgresServer(tmp_path / "postgres")
    second.start()
    assert first.process.running is not None
    assert not first.process.running.alive
    assert traces.postgres() == [second.pid]
    second.stop()


def _hold_in_recovery(server: PostgresServer) -> None:
    """Have the next start of a stopped server replay its log until `_promote`, as after a crash
    with much of it."""
    cluster = server.folder / "cluster"
    (cluster / "standby.signal").touch()
    with (cluster / "postgresql.auto.conf").open("a") as settings:
        settings.write("hot_standby = off\n")


def _promote(cluster: Path, pid: int) -> None:
    (cluster / "promote").touch()
    os.kill(pid, signal.SIGUSR1)


async def test_a_server_that_replays_its_log_is_not_killed(tmp_path: Path, traces: Traces) -> None:
    server = copied(tmp_path / "postgres", FAST)
    _hold_in_recovery(server)
    server.launch()
    await wait_until(lambda: recovers(server.port), 20, "its recovery")
    with pytest.raises(StillRecovering):
        server.await_ready(0)
    assert traces.postgres() == [server.pid]
    _promote(server.folder / "cluster", server.pid)
    server.await_ready()
    server.stop()


async def test_a_user_waits_as_long_as_the_server_replays_its_log(
    tmp_path: Path, traces: Traces
) -> None:
    ensure(tmp_path, ["postgres"], idle_s=0.3).close()
    server = PostgresServer(tmp_path / "embedded" / "postgres")
    _hold_in_recovery(server)
    postgres: list[ServiceName] = ["postgres"]
    first = asyncio.create_task(asyncio.to_thread(ensure, tmp_path, postgres, idle_s=0.3))

    def recovering() -> Postmaster | None:
        found = server.postmaster()
        return found if found is not None and recovers(found.port) else None

    await wait_until(lambda: recovering() is not None, 20, "its recovery")
    late = asyncio.create_task(asyncio.to_thread(ensure, tmp_path, postgres, timeout_s=0))
    found = recovering()
    assert found is not None
    assert not late.done()
    _promote(server.folder / "cluster", found.identity.pid)
    for lease in await asyncio.gather(first, late):
        lease.close()


async def test_a_stale_pid_file_that_names_another_program_does_not_block_a_start(
    tmp_path: Path, traces: Traces
) -> None:
    server = PostgresServer(tmp_path / "postgres")
    server.start()
    pid_file = server.folder / "cluster" / "postmaster.pid"
    lines = pid_file.read_text().splitlines()
    server.kill()
    pid_file.write_text("\n".join([str(os.getppid()), *lines[1:]]) + "\n")
    server.start()
    assert int(pid_file.read_text().splitlines()[0]) == server.pid
    server.stop()


async def test_a_connection_offers_no_tls_first(tmp_path: Path) -> None:
    """The server has none: to ask it costs a round trip, and to get ready for it as much again."""
    first: asyncio.Queue[bytes] = asyncio.Queue()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        first.put_nowait(await reader.readexactly(8))
        writer.close()

    listening = await asyncio.start_server(serve, "127.0.0.1", 0)
    server = PostgresServer(tmp_path / "postgres")
    server.port = listening.sockets[0].getsockname()[1]
    async with listening:
        with suppress(asyncpg.PostgresError, OSError):
            await asyncpg.connect(server.url(), timeout=5)
        _, protocol = struct.unpack("!II", await first.get())
    assert protocol == 3 << 16  # and not the number of a request for TLS, 80877103


async def test_a_start_cut_short_while_the_cluster_was_made_is_made_good(
    tmp_path: Path, traces: Traces
) -> None:
    server = PostgresServer(tmp_path / "postgres")
    half = server.folder / "cluster.new"
    half.mkdir(parents=True)
    (half / "PG_VERSION").write_text("18\n")
    server.start()
    server.stop()
    assert not half.exists()


async def test_a_cluster_of_another_version_is_refused_untouched(
    tmp_path: Path, data_dir: Path, traces: Traces
) -> None:
    """Told to whoever starts the product, without starting the server."""
    server = copied(data_dir / "embedded" / "postgres")
    version = server.folder / "cluster" / "PG_VERSION"
    ours = int(version.read_text())
    version.write_text(f"{ours - 1}\n")
    before = sorted(path.name for path in version.parent.iterdir())
    with pytest.raises(ServerFailed) as refused:
        ensure(data_dir, ["postgres"], idle_s=0.3)
    said = str(refused.value)
    assert f"was made by PostgreSQL {ours - 1}, and the bundled one is {ours}" in said
    assert "docs/operating.md" in said
    assert sorted(path.name for path in version.parent.iterdir()) == before
    version.write_text(f"{ours}\n")
    server.start()
    server.stop()


async def test_the_record_of_an_earlier_version_becomes_the_applications(
    tmp_path: Path, traces: Traces
) -> None:
    """There the application was the superuser. The server is killed in between, so that its log
    has to be replayed first."""
    earlier = PostgresServer(tmp_path / "postgres", password="of-the-superuser")
    earlier.start()
    await migrate(earlier.url())
    connection = await asyncpg.connect(earlier.url())
    await connection.execute("CREATE SEQUENCE apart; CREATE TABLE kept AS SELECT 7 AS number")
    await connection.close()
    earlier.kill()
    later = PostgresServer(
        tmp_path / "postgres", password="of-the-superuser", application_password="of-the-app"
    )
    for _ in range(2):  # the second start finds the role
        later.start()
        connection = await asyncpg.connect(later.url())
        assert await connection.fetchval("SELECT current_setting('is_superuser')") == "off"
        assert await connection.fetchval("SELECT number FROM kept") == 7
        others = await connection.fetch(
            """
            SELECT relname FROM pg_class
            WHERE relnamespace = 'public'::regnamespace AND relowner <> current_user::regrole
            UNION ALL
            SELECT proname FROM pg_proc
            WHERE pronamespace = 'public'::regnamespace AND proowner <> current_user::regrole
            """
        )
        assert not others
        await connection.execute("ALTER TABLE requests ADD COLUMN added int")
        await connection.execute("ALTER TABLE requests DROP COLUMN added")
        await connection.close()
        assert await migrate(later.url()) is None
        later.stop()


def test_a_port_is_given_to_one_process_while_its_server_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    program = (
        "from tidegate.embedded.servers import free_port; print(free_port(), flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        taken = int(other.stdout.readline())
        monkeypatch.setattr(servers, "_PORTS", [taken])
        assert servers.is_free(taken), "nothing listens yet"
        assert servers.free_port() != taken
        other.communicate("")
    assert servers.free_port() == taken, "its process has ended"


def test_a_start_removes_a_few_clusters_whose_folders_are_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It removed all, however many: 80 took longer than PostgreSQL may take to start."""
    monkeypatch.setattr(servers, "_ROOTS_PLACE", tmp_path / "place")
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path / "temporary"))
    kept = tmp_path / "temporary" / "kept"
    kept.mkdir(parents=True)
    gone = [tmp_path / "temporary" / f"gone-{n}" for n in range(5)]
    owners = [*gone, Path("/var/tmp/gone-of-tidegate"), kept, tmp_path / "else"]
    for number, owner in enumerate(owners):
        cluster = tmp_path / "place" / f"data-{number}" / "cluster"
        cluster.mkdir(parents=True)
        (cluster.parent / "belongs-to").write_text(str(owner), encoding="utf-8")
    left = []
    for _ in range(3):
        servers._sweep()
        left.append(len(list((tmp_path / "place").iterdir())))
    assert left == [4, 2, 2]
    assert [(tmp_path / "place" / f"data-{number}").exists() for number in (6, 7)] == [True, True]
