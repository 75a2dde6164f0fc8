"""Footprint of a deployment: what many processes cost Valkey, and what idle ones cost the machine.

`python -m bench.footprint` speaks the limiter's own wire to a Valkey of its own, in place of a
thousand processes: how long the scripts work that each process calls again and again whether it
has anything to say or not, how much memory a waiter, a process and a tenant's limits take, and how
many bytes a grant by push has.

`python -m bench.footprint --idle 60` starts `tidegate up` with one API and one worker, and leaves
it alone for a minute: memory (PSS), CPU and wake-ups of each process, statements and commands that
the servers got, then the time of `tidegate serve` from exec to ready beside it.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import asyncpg
import redis

from bench.limiter.tenants import policy as tenants_policy
from bench.machine import cpu_ns
from tidegate.embedded.lease import Folder
from tidegate.embedded.servers import ValkeyServer, command_of, for_cluster, free_port
from tidegate.limiter import PoolPolicy
from tidegate.limiter.simulation import (
    Join,
    Keyspace,
    Push,
    Renewal,
    ScriptName,
    SyncReply,
    SyncRequest,
    flow_of,
    load,
    pack_request,
    unpack_reply,
)

LIMIT = "kind:text_only"
ROOMY = "kind:classifier"
# Longer than the default, so that a thousand sessions outlive each other's turns here.
LEASE_MS = 10_000
UPTIME_MS = 1_000_000
HARD_MS = 600_000
EXPECTED_MS = 200
# Of fewer processes the memory is lost in that of Valkey's own buffers.
_ENOUGH = 500
# Of so many flows a process speaks in one call.
_FLOWS = 15


class Peer:
    """One session, as its process would speak for it."""

    def __init__(self, pool: Pool, number: int) -> None:
        self.sid = f"{number:016x}"
        self._pool = pool
        self._gen = self._epoch = self._batch = 0
        self._roster = self._open = 0

    def join(self) -> None:
        join = Join(self._pool.policy, "bench", f"process-{self.sid}", [], [])
        reply = self.say("tend", join=join, full=True)
        self._gen, self._epoch = reply.gen, reply.epoch

    def compare(self) -> None:
        """What a process does at every third of its lease."""
        reply = self.say("tend", full=True)
        if reply.whole is not None:
            self._roster = reply.whole.roster[0]

    def renew(self) -> None:
        self._pool.run("renew", Renewal(self.sid, self._gen, self._epoch, self._pool.run_id).pack())

    def turn(self) -> None:
        """One call ends and the next begins, with nothing else to say in the same breath."""
        flow = flow_of(2, f"tenant{self.sid}", (ROOMY,))
        ticket, self._open = self._open, self._open + 1
        releases = [(ticket, 1, 0, EXPECTED_MS, "")] if ticket else []
        member = f"{self._open}|{HARD_MS}|{EXPECTED_MS}|"
        reply = self.say("sync", flows=[flow], releases=releases, enqueues=[(1, member)])
        if len(reply.grants) != 1:
            raise RuntimeError("not let in")

    def say(self, script: ScriptName, **fields: Any) -> SyncReply:
        self._batch += 1
        request = SyncRequest(
            sid=self.sid,
            gen=self._gen,
            epoch=self._epoch,
            run=self._pool.run_id,
            uptime_ms=UPTIME_MS,
            lease_ms=LEASE_MS,
            revision=1,
            batch=self._batch,
            roster=self._roster,
            **fields,
        )
        reply = unpack_reply(self._pool.run(script, pack_request(request)))
        if reply.status == "tend":
            return self.say("tend", **{**fields, "full": True})
        if reply.status != "ok":
            raise RuntimeError(f"{script}: {reply.status}")
        return reply


class Pool:
    """A pool on a server, with what its scripts cost."""

    def __init__(self, client: redis.Redis, name: str) -> None:
        self.client = client
        self.keys = Keyspace(name)
        self.policy = PoolPolicy({LIMIT: 1, ROOMY: 100_000}, lease_ms=LEASE_MS)
        self.run_id = client.info("server")["run_id"]
        self._tickets = count(1)

    def run(self, name: ScriptName, packed: bytes) -> bytes:
        script = load(name)
        arguments = (2, self.keys.meta, self.keys.layout, packed)
        try:
            answer: Any = self.client.evalsha(script.sha, *arguments)
        except redis.exceptions.NoScriptError:
            answer = self.client.eval(script.source.decode(), *arguments)
        return bytes(answer)

    def enter(self, sessions: int) -> list[Peer]:
        peers = [Peer(self, number) for number in range(sessions)]
        for peer in peers:
            peer.join()
        return peers

    def settle(self, peers: list[Peer]) -> None:
        """Until all are known to each other, and none is on probation any more."""
        until_s = time.monotonic() + LEASE_MS / 2000
        while time.monotonic() < until_s:
            for peer in peers:
                peer.renew()
        for peer in peers:
            peer.compare()

    def enqueue(self, peer: Peer, tenants: Iterable[str]) -> None:
        """One ticket for each; what finds room goes in."""
        asked = list(tenants)
        flows = [flow_of(2, tenant, (LIMIT,)) for tenant in dict.fromkeys(asked)]
        numbers = {flow: number for number, flow in enumerate(flows, 1)}
        entries = [
            (
                numbers[flow_of(2, tenant, (LIMIT,))],
                f"{next(self._tickets)}|{HARD_MS}|{EXPECTED_MS}|",
            )
            for tenant in asked
        ]
        peer.say("sync", flows=flows, enqueues=entries)


def script_us(client: redis.Redis) -> float:
    """Time that scripts have taken up to now."""
    stats = client.info("commandstats")
    return float(stats["cmdstat_evalsha"]["usec"]) if "cmdstat_evalsha" in stats else 0.0


def server_us(client: redis.Redis) -> float:
    cpu = client.info("cpu")
    return (float(cpu["used_cpu_user"]) + float(cpu["used_cpu_sys"])) * 1_000_000


def used_bytes(client: redis.Redis) -> int:
    return int(client.info("memory")["used_memory"])


def longest_ms(client: redis.Redis) -> float:
    """The longest that a script has held the server, those left out that were compiled first;
    1 ms if none took longer."""
    slow = [one["duration"] for one in client.slowlog_get(1000) if b"EVALSHA" in one["command"]]
    return max(slow, default=1000) / 1000


def cost_of(client: redis.Redis, peers: list[Peer], verb: str, rounds: int) -> str:
    """Of one call of each peer, some rounds long, while nothing else happens."""
    before = script_us(client), server_us(client)
    for _ in range(rounds):
        for peer in peers:
            getattr(peer, verb)()
    calls = rounds * len(peers)
    script, server = script_us(client) - before[0], server_us(client) - before[1]
    return f"{script / calls:.0f} us in the script, {server / calls:.0f} us of Valkey's CPU"


def load_scripts(client: redis.Redis) -> None:
    """So that what they take is no part of what is measured after them."""
    [peer] = Pool(client, "scripts").enter(1)
    peer.compare()
    peer.renew()
    peer.turn()
    client.flushall()


def heartbeats(client: redis.Redis, sessions: int) -> None:
    pool = Pool(client, f"beats{sessions}")
    peers = [Peer(pool, number) for number in range(sessions)]
    print(f"{sessions} processes")
    before = used_bytes(client)
    print(f"  join: {cost_of(client, peers, 'join', 1)}")
    print(f"  first tend: {cost_of(client, peers, 'compare', 1)}")
    pool.settle(peers)
    if sessions >= _ENOUGH:
        print(f"  memory: {(used_bytes(client) - before) / sessions:.0f} bytes each")
    print(f"  longest of all so far: {longest_ms(client):.1f} ms")
    print(f"  tend: {cost_of(client, peers, 'compare', 2)}")
    print(f"  renew: {cost_of(client, peers, 'renew', 2)}")
    print(f"  sync of one release and one admission: {cost_of(client, peers, 'turn', 3)}")


def memory(client: redis.Redis, sessions: int, tenants: int, waiters: int) -> None:
    pool = Pool(client, f"memory{sessions}-{tenants}")
    peers = pool.enter(sessions)
    pool.settle(peers)
    flows = max(1, tenants * 10 // sessions) if sessions > 1 else tenants
    before = used_bytes(client)
    each = waiters // sessions
    for number, peer in enumerate(peers):
        own = [f"tenant{(number + k) % tenants}" for k in range(flows)]
        for first in range(0, each, 1000):
            some = range(first, min(first + 1000, each))
            pool.enqueue(peer, [own[k % len(own)] for k in some])
    used = used_bytes(client) - before
    queues = list(client.scan_iter(match=f"{pool.keys.prefix}queue:*", count=10_000))
    waiting = sum(int(client.zcard(queue)) for queue in queues)
    print(
        f"{waiting} waiters of {tenants} tenants in {sessions} processes, {len(queues)} queues: "
        f"{used / 1_000_000:.1f} MB, {used / waiting:.0f} bytes each"
    )


def limits(client: redis.Redis, tenants: int) -> None:
    """Each tenant has a concurrency and a rate of its own; then a call of each is in flight."""
    pool = Pool(client, f"limits{tenants}")
    pool.policy = tenants_policy(tenants)
    empty = used_bytes(client)
    [peer] = pool.enter(1)
    known = used_bytes(client)
    lanes = [(f"tenant:{number}", f"rpm:{number}") for number in range(tenants)]
    flows = [flow_of(2, f"tenant{number}", lane) for number, lane in enumerate(lanes)]
    for first in range(0, tenants, _FLOWS):
        some = flows[first : first + _FLOWS]
        members = [f"{first + at}|{HARD_MS}|{EXPECTED_MS}|" for at in range(1, len(some) + 1)]
        peer.say("sync", flows=some, enqueues=[*enumerate(members, 1)])
        peer.renew()
    used = used_bytes(client) - known
    print(
        f"{tenants} tenants with two limits each: {(known - empty) / tenants:.0f} bytes a tenant, "
        f"{used / tenants:.0f} more with a call of each in flight"
    )


def pushes(client: redis.Redis) -> None:
    """One process frees what another waits for."""
    pool = Pool(client, "pushes")
    peers = pool.enter(2)
    pool.settle(peers)
    holder, waiter = peers
    listening = client.pubsub()  # type: ignore[no-untyped-call]
    listening.ssubscribe(pool.keys.channel(waiter.sid))
    flow = flow_of(2, "tenant1", (LIMIT,))
    holder.say("sync", flows=[flow], enqueues=[(1, f"1|{HARD_MS}|{EXPECTED_MS}|")])
    waiter.say("sync", flows=[flow], enqueues=[(1, f"2|{HARD_MS}|{EXPECTED_MS}|")])
    holder.say("sync", flows=[flow], releases=[(1, 1, 0, EXPECTED_MS, "")])
    until_s = time.monotonic() + 5
    while time.monotonic() < until_s:
        message = listening.get_sharded_message(timeout=1.0)
        if message and message["type"] == "smessage":
            data, channel = message["data"], message["channel"]
            frame = b"*3\r\n$8\r\nsmessage\r\n$%d\r\n%b\r\n$%d\r\n%b\r\n"
            size = len(frame % (len(channel), channel, len(data), data))
            grants = len(Push.unpack(data).grants)
            print(f"a push of {grants} grant: {len(data)} bytes, {size} on the wire")
            return
    raise RuntimeError("no push came")


# A program and its arguments, as a process shows them, and what it is called here.
_ROLES = (
    (" up ", "supervisor"),
    (" serve ", "api"),
    (" worker ", "worker"),
    ("forkserver", "parent of api and worker"),
    ("embedded.keeper", "keeper"),
    ("valkey-server", "valkey"),
    ("postgres", "postgres"),
)
_SETTLE_S = 15.0
_STARTS = 7
_LOGGED = re.compile(r"(?:statement|execute [^:]*): (.*)")


class NotReady(Exception):
    """A command did not become ready; the message is what it printed last."""


@contextmanager
def running(environment: Mapping[str, str], *arguments: str) -> Iterator[tuple[int, float]]:
    """A command of `tidegate` that serves, once it is ready: its process, and how long it took."""
    url = f"http://127.0.0.1:{environment['PORT']}/health/ready"
    began = time.monotonic()
    command = [sys.executable, "-m", "tidegate", *arguments]
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(command, env=environment, stdout=said, stderr=said)
        try:
            while not is_ready(url):
                if process.poll() is not None or time.monotonic() > began + 60:
                    said.seek(0)
                    raise NotReady(said.read().decode(errors="replace")[-2000:])
                time.sleep(0.005)
            yield process.pid, time.monotonic() - began
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait()


def is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except OSError:
        return False


def processes_of(data_dir: Path, first: int) -> dict[int, str]:
    """All processes of a deployment, with their roles."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text(errors="replace").rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        parents[int(entry.parent.name)] = int(fields[1])
    roots = {first, *(one.identity.pid for one in Folder(data_dir).read().services.values())}
    if (keeper := Folder(data_dir).read().keeper) is not None:
        roots.add(keeper.pid)
    found: dict[int, str] = {}
    for pid in parents:
        line, above = command_of(pid), pid
        while above and above not in roots:
            above = parents.get(above, 0)
        if above:
            shown = f" {line} "
            found[pid] = next((role for mark, role in _ROLES if mark in shown), line[:40])
    return found


def pss_mb(pid: int) -> float:
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return int(re.findall(r"^Pss:\s+(\d+) kB", rollup, re.M)[0]) / 1024


def wakes(pid: int) -> int:
    """How often a thread of it was put to sleep, which is how often one was woken."""
    status = "".join(one.read_text() for one in Path(f"/proc/{pid}/task").glob("*/status"))
    return sum(map(int, re.findall(r"^voluntary_ctxt_switches:\s+(\d+)", status, re.M)))


async def log_statements(url: str, how: str) -> None:
    """Have PostgreSQL log `all` or `none` of what it is told, as its superuser."""
    connection = await asyncpg.connect(url)
    try:
        await connection.execute(f"ALTER SYSTEM SET log_statement = '{how}'")
        await connection.execute("SELECT pg_reload_conf()")
    finally:
        await connection.close()


async def connections(url: str) -> int:
    """Of clients to PostgreSQL, without the one that asks."""
    connection = await asyncpg.connect(url)
    try:
        count = "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend'"
        return int(await connection.fetchval(count)) - 1
    finally:
        await connection.close()


def valkeys(client: redis.Redis) -> int:
    """Connections to Valkey, without the one that asks."""
    return len(client.client_list()) - 1


def commands_of(client: redis.Redis) -> Counter[str]:
    stats = client.info("commandstats")
    return Counter(
        {name.removeprefix("cmdstat_"): int(one["calls"]) for name, one in stats.items()}
    )


def idle(seconds: float) -> dict[str, float]:
    """What a deployment costs that nobody uses: print it, and return what has a bar."""
    with tempfile.TemporaryDirectory() as folder:
        data_dir = Path(folder)
        environment = {
            **os.environ,
            "DATA_DIR": folder,
            "PORT": str(free_port()),
            "GEMINI_API_KEY": "bench-key-that-is-never-used",
            "GEMINI_BASE_URL": "http://127.0.0.1:9",
        }
        with running(environment, "up", "--api", "1", "--workers", "1") as (pid, took_s):
            print(f"tidegate up on a new folder: ready after {took_s:.2f} s")
            time.sleep(_SETTLE_S)
            figures = cost_of_idling(data_dir, pid, seconds)
            services = Folder(data_dir).read().services
            urls = {"DATABASE_URL": services["postgres"].url, "REDIS_URL": services["valkey"].url}
            starts = []
            for _ in range(_STARTS):
                place = {"PORT": str(free_port())}
                with running(environment | urls | place, "serve") as (served, took_s):
                    starts.append(took_s)
                    alone_mb = pss_mb(served)
        print(
            f"tidegate serve, stores up: ready after {statistics.median(starts):.2f} s (median of "
            f"{_STARTS}; {min(starts):.2f} to {max(starts):.2f}); {alone_mb:.1f} MB beside up"
        )
    return {**figures, "start_s": statistics.median(starts), "alone_bytes": alone_mb * 1024**2}


def cost_of_idling(data_dir: Path, pid: int, seconds: float) -> dict[str, float]:
    folder = Folder(data_dir)
    services = folder.read().services
    superuser = folder.password("password")
    place = services["postgres"].url.rpartition("@")[2]
    url = f"postgresql://tidegate:{superuser}@{place}"
    log = for_cluster(folder.path / "postgres")[0] / "postgres.log"
    client = redis.Redis.from_url(services["valkey"].url)
    roles = processes_of(data_dir, pid)
    asyncio.run(log_statements(url, "all"))
    time.sleep(1.0)
    began, size = commands_of(client), log.stat().st_size
    print(
        f"  connections: {asyncio.run(connections(url))} of PostgreSQL, {valkeys(client)} of Valkey"
    )
    cpu_before, wakes_before = {p: cpu_ns(p) for p in roles}, {p: wakes(p) for p in roles}
    time.sleep(seconds)
    per_minute = 60 / seconds
    total_mb, shown = 0.0, sorted(roles.items(), key=lambda one: one[1])
    used: dict[str, float] = defaultdict(float)
    memory_mb: dict[str, float] = defaultdict(float)
    woken: Counter[str] = Counter()
    processes: Counter[str] = Counter()
    for one, role in shown:
        if not Path(f"/proc/{one}").exists():
            continue
        processes[role] += 1
        memory_mb[role] += pss_mb(one)
        used[role] += (cpu_ns(one) - cpu_before[one]) / 1e9 / seconds
        woken[role] += wakes(one) - wakes_before[one]
    for role in processes:
        print(
            f"  {role} ({processes[role]}): {memory_mb[role]:.1f} MB PSS, {used[role]:.2%} of a "
            f"core, {woken[role] * per_minute:.0f} wake-ups a minute"
        )
        total_mb += memory_mb[role]
    print(f"  all: {total_mb:.1f} MB PSS")
    with log.open("rb") as written:
        written.seek(size)
        told = written.read().decode(errors="replace")
    commands = commands_of(client)
    commands.subtract(began)
    client.close()
    asyncio.run(log_statements(url, "none"))
    statements = Counter(re.sub(r"\s+", " ", text)[:90] for text in _LOGGED.findall(told))
    print(f"  statements a minute: {statements.total() * per_minute:.0f}")
    for text, times in statements.most_common(25):
        print(f"    {times * per_minute:6.1f} {text}")
    print(f"  commands of Valkey a minute: {commands.total() * per_minute:.0f}")
    for text, times in commands.most_common(12):
        print(f"    {times * per_minute:6.1f} {text}")
    return {
        "share": used["api"] + used["worker"],
        "api_bytes": memory_mb["api"] * 1024**2,
        "worker_bytes": memory_mb["worker"] * 1024**2,
        "all_bytes": total_mb * 1024**2,
        "wakes_a_minute": (woken["api"] + woken["worker"]) * per_minute,
        "statements_a_minute": statements.total() * per_minute,
        "commands_a_minute": commands.total() * per_minute,
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.footprint", description=__doc__)
    parser.add_argument("--processes", type=int, default=1000)
    parser.add_argument("--tenants", type=int, default=1000)
    parser.add_argument("--waiters", type=int, default=100_000)
    parser.add_argument("--limits", type=int, default=10_000, help="tenants with limits")
    parser.add_argument("--idle", type=float, metavar="SECONDS", help="cost of an idle deployment")
    size = parser.parse_args()
    if size.idle is not None:
        idle(size.idle)
        return
    with tempfile.TemporaryDirectory() as folder:
        server = ValkeyServer(Path(folder))
        server.start()
        client = redis.Redis.from_url(server.url)
        client.config_set("slowlog-log-slower-than", 1000)
        client.config_set("slowlog-max-len", 1000)
        try:
            load_scripts(client)
            for sessions in (min(100, size.processes), size.processes):
                heartbeats(client, sessions)
                client.flushall()
            memory(client, 1, 1, size.waiters)
            client.flushall()
            memory(client, size.processes, size.tenants, size.waiters)
            client.flushall()
            limits(client, size.limits)
            client.flushall()
            pushes(client)
        finally:
            client.close()
            server.stop()


if __name__ == "__main__":
    main()
