"""The bundled PostgreSQL: never two servers on one cluster, and no start that stays blocked."""

from __future__ import annotations

import os
from pathlib import Path

from tests.integration.embedded.traces import Traces
from tidegate.embedded.postgres import PostgresServer


async def test_a_second_start_on_a_cluster_stops_the_server_that_runs_there(
    tmp_path: Path, traces: Traces
) -> None:
    first = PostgresServer(tmp_path / "postgres")
    first.start()
    second = PostgresServer(tmp_path / "postgres")
    second.start()
    assert first.running is not None
    assert not first.running.alive
    assert traces.pids("postgres -D") == [second.pid]
    second.stop()


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
