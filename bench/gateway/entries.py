"""The gateways that are measured, in which versions, and how each is started.

Each runs in its own processes with its own configuration, as its documents tell, in front of the
same upstream. An entry of ours more, or of another's, is one more line in `ENTRIES`.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import chain
from pathlib import Path

from bench.environments import ROOT, EnvironmentMissing, node_modules_with, program, python_with
from bench.gateway.processes import Program, cpu_ns, resident_bytes
from bench.gateway.product import Product
from bench.gateway.programs import HERE, Upstream
from tidegate.embedded.servers import ValkeyServer, free_port

PORTKEY = "1.15.2"
# With newer ones its streams fail: github.com/Portkey-AI/gateway/issues/1389.
HONO_SERVER = "1.13.7"
LITELLM = "1.108.7"
# Without the SDK installed the proxy tries to import it anew for every request.
OPENTELEMETRY = "1.45.2"
_MASTER_KEY = "sk-bench-5c0e0f6a8d2b4b7f"


@dataclass(frozen=True, slots=True)
class Gateway:
    """One that runs. `pids` are its own processes, `servers` those that it keeps its state in."""

    port: int
    program: Program
    pids: Callable[[], list[int]]
    servers: Callable[[], dict[str, list[int]]] = dict
    path: str = "/v1/chat/completions"
    headers: tuple[str, ...] = ()

    def cpu_ns(self) -> dict[str, int]:
        """Up to now, of the gateway and of each of its servers; `all` with what else is its."""
        found = {"gateway": cpu_ns(self.pids())}
        found |= {name: cpu_ns(pids) for name, pids in self.servers().items()}
        everyone = {*self.program.pids(), *chain.from_iterable(self.servers().values())}
        return {**found, "all": cpu_ns(sorted(everyone))}

    def resident_bytes(self) -> int:
        return resident_bytes(self.pids())


Command = Sequence[str | Path]
Start = Callable[[Upstream, Path], AbstractContextManager[Gateway]]


@dataclass(frozen=True, slots=True)
class Entry:
    """`processes`: of those that serve, as many."""

    name: str
    start: Start = field(repr=False)
    about: Callable[[], str]
    floor: bool = False
    processes: int = 1

    @property
    def ours(self) -> bool:
        return self.name.startswith("tidegate")


@contextmanager
def _nginx(upstream: Upstream, folder: Path) -> Iterator[Gateway]:
    port = free_port()
    config = folder / "nginx.conf"
    user = "user root;" if os.geteuid() == 0 else ""
    config.write_text(f"""{user}
worker_processes 1; daemon off; pid {folder}/nginx.pid; error_log stderr error;
worker_rlimit_nofile 16384;
events {{ worker_connections 8192; }}
http {{
    access_log off; keepalive_requests 1000000000; client_body_buffer_size 64k;
    client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi; uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    upstream provider {{
        server 127.0.0.1:{upstream.port}; keepalive 4096; keepalive_requests 1000000000;
    }}
    server {{
        listen 127.0.0.1:{port} backlog=4096;
        location / {{
            proxy_pass http://provider; proxy_http_version 1.1; proxy_buffering off;
            proxy_set_header Connection "";
        }}
    }}
}}
""")
    command: Command = [program("nginx", "nginx"), "-p", folder, "-e", "stderr", "-c", config]
    with _running(command, folder) as started:
        yield Gateway(port, started, started.pids)


def _bare(client: str) -> Start:
    @contextmanager
    def start(upstream: Upstream, folder: Path) -> Iterator[Gateway]:
        port = free_port()
        command = [sys.executable, "-m", "bench.gateway.bare", str(port), upstream.url, client]
        paths = os.pathsep.join([str(ROOT), str(ROOT / "src")])
        with _running(command, folder, PYTHONPATH=paths) as started:
            yield Gateway(port, started, started.pids)

    return start


@contextmanager
def _portkey(upstream: Upstream, folder: Path) -> Iterator[Gateway]:
    port = free_port()
    modules = node_modules_with(
        f"portkey-{PORTKEY}", {"@portkey-ai/gateway": PORTKEY}, {"@hono/node-server": HONO_SERVER}
    )
    server = modules / "@portkey-ai" / "gateway" / "build" / "start-server.js"
    command: Command = [program("node", "nodejs"), server, f"--port={port}", "--headless"]
    headers = (
        "x-portkey-provider: openai",
        f"x-portkey-custom-host: {upstream.url}/v1",
        "Authorization: Bearer bench",
    )
    with _running(command, folder, NODE_ENV="production") as started:
        yield Gateway(port, started, started.pids, headers=headers)


@contextmanager
def _litellm(upstream: Upstream, folder: Path) -> Iterator[Gateway]:
    with _litellm_with({"master_key": _MASTER_KEY}, upstream, folder) as (port, started):
        headers = (f"Authorization: Bearer {_MASTER_KEY}",)
        yield Gateway(port, started, started.pids, headers=headers)


@contextmanager
def _litellm_limited(upstream: Upstream, folder: Path) -> Iterator[Gateway]:
    """Its limits on a key, kept in Redis."""
    valkey = ValkeyServer(folder / "valkey")
    valkey.start()
    shutil.copy(HERE / "litellm_key.py", folder)
    settings: dict[str, object] = {
        "master_key": _MASTER_KEY,
        "custom_auth": "litellm_key.limited",
        "coordination_redis": {"host": "127.0.0.1", "port": valkey.port},
    }
    try:
        with _litellm_with(settings, upstream, folder) as (port, started):
            yield Gateway(
                port,
                started,
                started.pids,
                servers=lambda: {"valkey": [valkey.pid]},
                headers=(f"Authorization: Bearer {_MASTER_KEY}",),
            )
    finally:
        valkey.stop()


@contextmanager
def _litellm_with(
    settings: dict[str, object], upstream: Upstream, folder: Path
) -> Iterator[tuple[int, Program]]:
    port = free_port()
    wanted = (f"litellm[proxy]=={LITELLM}", f"opentelemetry-sdk=={OPENTELEMETRY}")
    python = python_with(f"litellm-{LITELLM}", wanted)
    model = {"model": "openai/bench", "api_base": f"{upstream.url}/v1", "api_key": "bench"}
    config = folder / "config.yaml"  # JSON is YAML
    config.write_text(
        json.dumps(
            {
                "model_list": [{"model_name": "bench", "litellm_params": model}],
                "general_settings": settings,
            }
        )
    )
    command: Command = [python.with_name("litellm"), "--config", config, "--host", "127.0.0.1"]
    # What it would fetch from the network comes from the package; as for production, few logs.
    alone = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_LOG": "ERROR"}
    with _running([*command, "--port", str(port)], folder, **alone) as started:
        yield port, started


def _tidegate(apis: int) -> Start:
    @contextmanager
    def start(upstream: Upstream, _folder: Path) -> Iterator[Gateway]:
        with Product(upstream.url, apis=apis) as product:
            yield Gateway(
                product.port,
                product.program,
                lambda: product.pids("serve"),
                servers=lambda: {
                    "valkey": product.pids("valkey"),
                    "postgres": product.pids("postgres"),
                },
            )

    return start


@contextmanager
def _running(command: Command, folder: Path, **more: str) -> Iterator[Program]:
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
    started = Program(command, cwd=folder, env={**kept, **more}, log=folder / "gateway.log")
    try:
        yield started
    finally:
        started.stop()


def _said_by(*command: str) -> str:
    """The version that a program of the system says it has."""
    try:
        path = program(command[0], command[0])
    except EnvironmentMissing:
        return ""
    done = subprocess.run([path, *command[1:]], capture_output=True, text=True, check=False)
    return (done.stdout + done.stderr).strip().rpartition("/")[2].removeprefix("v")


def _ours(processes: str) -> Callable[[], str]:
    return lambda: f"{version('tidegate')}, {processes}, limits and record on"


NGINX = Entry("nginx", _nginx, lambda: f"{_said_by('nginx', '-v')}, 1 worker", floor=True)
BARE = Entry(
    "bare relay",
    _bare("own"),
    lambda: f"uvicorn {version('uvicorn')}, our protocol, our connections",
    floor=True,
)
BARE_AIOHTTP = Entry(
    "bare relay, aiohttp",
    _bare("aiohttp"),
    lambda: f"uvicorn {version('uvicorn')}, our protocol, aiohttp {version('aiohttp')}",
    floor=True,
)
OURS = Entry("tidegate", _tidegate(1), _ours("1 API process"))
OURS_TWO = Entry("tidegate x 2", _tidegate(2), _ours("2 API processes"), processes=2)
PORTKEY_GATEWAY = Entry("Portkey", _portkey, lambda: f"{PORTKEY}, Node {_said_by('node', '-v')}")
LITELLM_PROXY = Entry("LiteLLM", _litellm, lambda: f"{LITELLM}, no database")
LITELLM_LIMITED = Entry(
    "LiteLLM, limited", _litellm_limited, lambda: f"{LITELLM}, limits on a key in Redis"
)
ENTRIES = (
    *(NGINX, BARE, BARE_AIOHTTP, OURS, OURS_TWO),
    *(PORTKEY_GATEWAY, LITELLM_PROXY, LITELLM_LIMITED),
)
