"""Command `tidegate up`: everything on one machine, with a start-up page.

The page is written to standard output, logs to standard error. It shows the limits in force.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from tempfile import TemporaryDirectory
from types import FrameType
from typing import Any, NoReturn

from rich.console import Console
from rich.text import Text

from tidegate import __version__
from tidegate.call import DEFAULT_POOL, DEFAULT_TENANT, Kind
from tidegate.errors import ConfigError, InvalidRequest, LimiterUnavailable
from tidegate.http.browsers import CODE_S, make_code
from tidegate.limiter import PoolPolicy, Snapshot, look_until
from tidegate.operator_key import key_file, operator_key, write_private
from tidegate.policy.deployment import deployed, deployed_upstreams, emulates
from tidegate.settings import Config, load
from tidegate.spine.routing import Targets
from tidegate.store.database import Connections
from tidegate.store.tenants import Tenants
from tidegate.supervisor.services import (
    Ground,
    environment_of,
    make_folders,
    migrate,
    prepared,
    with_record,
)
from tidegate.supervisor.supervisor import (
    RENEW_SIGNAL,
    Child,
    Supervision,
    listen,
    url_of,
)
from tidegate.telemetry import logging as telemetry
from tidegate.telemetry.logging import SHARED

_LABEL = "bold cyan"
_QUIET = "bright_black"
_INDENT = "  "
_LABEL_WIDTH = 12
_MODELS_SHOWN = 3


class Page:
    """The output on a terminal."""

    def __init__(self, config: Config, apis: int, workers: int) -> None:
        self._config = config
        self._apis = apis
        self._workers = workers
        self._console = Console(highlight=False, soft_wrap=True)
        self._began = time.monotonic()
        self.demo_key: str | None = None  # created at this start

    @contextmanager
    def busy(self, what: str) -> Iterator[None]:
        """Show that a step takes a moment; without a terminal show nothing."""
        if not self._console.is_terminal:
            yield
            return
        with self._console.status(f"[{_QUIET}]{what}[/]", spinner_style="cyan"):
            yield

    def done(self, what: str) -> None:
        """Show a completed step of the start, with the time."""
        took_s = time.monotonic() - self._began
        self._line((f"{_INDENT}✓ ", "green"), f"{what:<44}", (f"{took_s:5.1f} s", _QUIET))

    def note(self, text: str) -> None:
        """Show why the start takes longer."""
        self._line((f"{_INDENT}{text}", "yellow"))

    def stopping(self) -> str:
        """Return the lines that report the beginning of the stop."""
        grace_s = self._config.shutdown_grace_ms / 1000
        with self._console.capture() as lines:
            self._line()
            self._line(
                (f"{_INDENT}Stopping. ", "bold"),
                (f"Running calls may finish within {grace_s:g} s; Ctrl-C again ends them.", _QUIET),
            )
        return lines.get()

    def stopped(self) -> str:
        with self._console.capture() as lines:
            self._line((f"{_INDENT}Stopped. Nothing is left running.", _QUIET))
        return lines.get()

    def ready(
        self, ground: Ground, url: str, policy: PoolPolicy, in_force: Mapping[Kind, int] | None
    ) -> None:
        """Show the start-up page. `policy`: the deployed one. in_force: how many calls of each kind
        may run concurrently now, None if unknown."""
        self._line()
        self._line((f"{_INDENT}≋ Tidegate", "bold"), (f" {__version__}", _QUIET), f"   {url}")
        self._line()
        self._try(url.removeprefix("http://"), ground)
        self._dashboard(url)
        self._row("API", _count(self._apis, "process"), f"its documentation is at {url}/docs")
        self._row("Worker", _count(self._workers, "process"), "takes the jobs of POST /submit")
        self._where(ground)
        if ground.config.gemini_api_key is not None:  # otherwise it limits no call
            self._at_once(policy, in_force)
        if self.demo_key is not None:
            self._demonstration_key(self.demo_key)
        elif self._config.requires_keys:
            self._row("Callers", "show a key", "tidegate keys create makes one; see AUTH")
        if ground.emulated:
            is_alone = len(deployed_upstreams(ground.config).upstreams) == 1
            whose = "answers" if is_alone else "answers of gemini"
            missing = f"No {'provider key, such as ' if is_alone else ''}GEMINI_API_KEY"
            self._line()
            self._line(
                (f"{_INDENT}Demo mode. ", "bold yellow"),
                (f"{missing}: {whose} come from the built-in emulator.", "yellow"),
            )
        self._line()
        self._line((f"{_INDENT}Ctrl-C stops everything.", _QUIET))
        self._line()

    def _dashboard(self, url: str) -> None:
        """Show an address that signs in. Without a terminal the output is a log, which others may
        read: the address is then in a file for this user alone."""
        page, minutes = f"{url}/dashboard", CODE_S // 60
        key = operator_key(self._config).get_secret_value()
        address, file = f"{page}/?code={make_code(key)}", self._config.data_dir / "sign-in.url"
        if sys.stdout.isatty():
            self._row("Dashboard", "live", address)
            self._more(f"this address works once, within {minutes} minutes; later {page}")
        else:
            self._row("Dashboard", "live", page)
            with suppress(OSError):  # the key opens it too
                write_private(file, f"{address}\n")
                once = f"the address in {file} works once, within {minutes} minutes; later {page}"
                self._more(once)
        self._more(f"asks for the operator's key: {self._key_place()}")

    def _demonstration_key(self, key: str) -> None:
        """Show the key of a demonstration; without a terminal the file that contains it."""
        if sys.stdout.isatty():
            self._row("Callers", "show a key", f"{key} was made for this demonstration")
            self._more("and is shown this once; tidegate keys create makes others")
            return
        file = self._config.data_dir / "demonstration.key"
        try:
            write_private(file, f"{key}\n")
        except OSError:
            self._row("Callers", "show a key", "tidegate keys create makes one")
            return
        self._row("Callers", "show a key", f"the one in {file} was made for this demonstration")
        self._more("tidegate keys create makes others")

    def _key_place(self) -> str:
        if self._config.admin_token is not None:
            return "ADMIN_TOKEN"
        return str(key_file(self._config))

    def _at_once(self, policy: PoolPolicy, in_force: Mapping[Kind, int] | None) -> None:
        configured = {kind: policy.bound(kind.limit) for kind in Kind}
        now = configured if in_force is None else in_force
        limits = [
            f"{kind.value} {now[kind]}"
            + (f" (configured: {configured[kind]})" if now[kind] != configured[kind] else "")
            for kind in Kind
        ]
        self._row("Limits", ", ".join(limits), "concurrent calls, over all processes")
        if in_force is None:
            self._more("as configured: Valkey does not answer yet")
        elif now != configured:
            self._more("tidegate limits history says who set them, and why")

    def _where(self, ground: Ground) -> None:
        folder = str(self._config.data_dir / "embedded")
        if ground.embedded:
            self._row("PostgreSQL", "bundled", f"keeps every request and answer, in {folder}")
            self._row("Valkey", "bundled", "holds the limits")
        else:
            self._row("PostgreSQL", "yours", "DATABASE_URL")
            self._row("Valkey", "yours", "REDIS_URL")
        self._upstreams(ground)
        if ground.lease is not None:
            self._row("Logs", "here", f"and of the bundled servers in {folder}/*/*.log")

    def _upstreams(self, ground: Ground) -> None:
        upstreams = deployed_upstreams(ground.config).upstreams
        label = "Upstream" if len(upstreams) == 1 else "Upstreams"
        for one in upstreams:
            if ground.emulated and one.name == DEFAULT_POOL:
                alone = "nothing leaves this machine" if len(upstreams) == 1 else "as gemini"
                self._row(label, "emulated", alone)
            else:
                listed = [*one.models[:_MODELS_SHOWN], *["..."] * (len(one.models) > _MODELS_SHOWN)]
                models = "" if "*" in one.models else f" for {', '.join(listed)}"
                self._row(label, one.name, next(iter(one.base_urls.values())) + models)
            label = ""

    def _try(self, place: str, ground: Ground) -> None:
        """Show a call by an SDK, then one of Tidegate's own API."""
        json = '-H "Content-Type: application/json"'
        key_text = (self.demo_key if sys.stdout.isatty() else None) or "<key>"
        key = f' -H "x-api-key: {key_text}"' if self._config.requires_keys else ""
        dialects = _dialects_of_prompts(ground.config)
        self._line((f"{_INDENT}Try", _LABEL))
        if dialects is None:
            self._line(f"{_INDENT}{_INDENT}curl{key} {place}/v1/models")
            self._line()
            return
        model, messages = self._config.text_model, '[{"role": "user", "content": "Say hello"}]'
        native = {
            "openai": ("/v1/chat/completions", ""),
            "anthropic": ("/v1/messages", ', "max_tokens": 100'),
        }
        for dialect, (path, more) in native.items():
            if dialect in dialects:
                body = f'{{"model": "{model}", "messages": {messages}{more}}}'
                self._line(f"{_INDENT}{_INDENT}curl {place}{path}{key} {json} -d '{body}'")
                break
        for command in (
            f"""curl {place}/submit{key} {json} -d '{{"data": "Why is the sea salty?"}}'""",
            f'curl{key} "{place}/status/<request_id>?wait=20"',
            f"""curl -N {place}/stream{key} -F 'text=What is modern family?'""",
        ):
            self._line(f"{_INDENT}{_INDENT}{command}")
        self._line()
        self._row("SDKs", "base_url", f"http://{place}/v1 for OpenAI's, http://{place} for others")

    def _row(self, label: str, value: str, remark: str) -> None:
        self._line(
            (f"{_INDENT}{label:<{_LABEL_WIDTH}}", _LABEL), f"{value:<12}", (f" {remark}", _QUIET)
        )

    def _more(self, remark: str) -> None:
        """Show another line of the previous row."""
        self._line((f"{_INDENT}{'':<{_LABEL_WIDTH}}{remark}", _QUIET))

    def _line(self, *parts: str | tuple[str, str]) -> None:
        self._console.print(Text.assemble(*parts))


def _dialects_of_prompts(config: Config) -> Collection[str] | None:
    """Return the dialects of the upstream that serves the model of prompts; None if none does."""
    try:
        chain = Targets(deployed_upstreams(config)).of_prompt(config.text_model)
    except InvalidRequest:
        return None
    return chain[0].upstream.base_urls.keys()


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}es"


_WITHIN_S = 1.0


async def bounds_in_force(
    url: str, configured: PoolPolicy, *, within_s: float = _WITHIN_S
) -> Mapping[Kind, int] | None:
    """Return the bounds in force by kind; None if Valkey does not answer in time.

    A new policy of a deployment comes into force a moment after its start: until then the bounds
    are read again.
    """

    def is_applied(pool: Snapshot) -> bool:
        return _bounds(pool) == {kind: configured.bound(kind.limit) for kind in Kind}

    try:
        return _bounds(await look_until(url, DEFAULT_POOL, is_applied, within_s)) or None
    except (LimiterUnavailable, ConfigError):  # the page reports it
        return None


def _bounds(pool: Snapshot) -> dict[Kind, int]:
    """Return the bounds of a pool; empty if no process has joined it yet."""
    if any(kind.limit not in pool.limits for kind in Kind):
        return {}
    return {kind: pool.limits[kind.limit].bound for kind in Kind}


_PROBE = b"GET /health/ready HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
_PROBE_S = 2.0
_POLL_S = 0.05
_PATIENCE_S = 5.0


def up(config: Config, apis: int, workers: int) -> NoReturn:
    """Start everything, then become its supervisor (`supervise`), which a signal ends.

    Raises ConfigError, `embedded.ServerFailed`, StoreUnavailable, and OSError if the exec fails;
    nothing is left running then.
    """
    telemetry.configure_logging(
        config.log_format, config.log_level, process="supervisor", has_page=True
    )
    # Until the children run, these signals interrupt as Ctrl-C does, with all clean-up.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    signal.signal(RENEW_SIGNAL, signal.SIG_IGN)  # there are no processes to replace yet
    page = Page(config, apis, workers)
    with listen(config) as listener:
        make_folders(config)
        operator_key(config)  # before the children start, so that a failure is reported once
        with (
            prepared(config, busy=page.busy) as ground,
            TemporaryDirectory(prefix="tidegate-counts-") as counts,
        ):
            page.done("Bundled PostgreSQL and Valkey" if ground.embedded else "Settings")
            schema = migrate(ground.config, page.note)
            page.done(f"Database schema {schema}" if schema else "Database schema is current")
            page.demo_key = make_demo_key(ground.config)
            if ground.lease is not None:
                ground.lease.leave_watch()
            announcer = _announcer(listener, page, ground)
            try:
                _supervision(ground, page, listener, counts, announcer, apis, workers).begin()
            finally:  # reached only on failure
                os.kill(announcer[0], signal.SIGKILL)


def _supervision(
    ground: Ground,
    page: Page,
    listener: socket.socket,
    counts: str,
    announcer: tuple[int, int],
    apis: int,
    workers: int,
) -> Supervision:
    config, lease = ground.config, ground.lease
    filled_in = [
        *(("database_url", "redis_url") if ground.embedded else ()),
        *(("gemini_base_url", "gemini_api_key") if ground.emulated else ()),
    ]
    variables = environment_of(ground)
    return Supervision(
        children=[(one.name, list(one.argv)) for one in _children(listener, apis, workers)],
        environment={**os.environ, **variables, SHARED: counts},
        listener=listener.fileno(),
        data_dir=str(config.data_dir),
        lease=None if lease is None else (lease.descriptor, lease.idle_s),
        counts=counts,
        announcer=announcer,
        base={
            "same": {name: variables[name.upper()] for name in _SAME},
            "embedded": ground.embedded,
            "emulated": ground.emulated,
            "kept": {name: variables[name.upper()] for name in filled_in},
        },
        log_format=config.log_format,
        log_level=config.log_level,
        stopping=page.stopping(),
        stopped=page.stopped(),
    )


def make_demo_key(config: Config) -> str | None:
    """Return a new API key for a demonstration whose callers need one, if there is no key yet; so
    that a container can be tried without a second command. Raises StoreUnavailable."""
    if not (config.tidegate_demo and config.requires_keys):
        return None

    async def made(record: Connections) -> str | None:
        tenants = Tenants(record)
        if await tenants.any_key():
            return None
        _, key = await tenants.create_key(
            DEFAULT_TENANT, name="demonstration", made_by="tidegate up"
        )
        return key.text

    return with_record(config, made)


# Settings that the supervisor itself uses.
_SAME = ("host", "port", "data_dir")


def read_again() -> None:
    """Write the environment of new children to standard output: the current settings, with the
    `Supervision.base` of standard input; or their error, also if they change a setting that the
    supervisor itself uses."""
    base = json.load(sys.stdin)
    try:
        answer: dict[str, object] = {"environment": _reread(base)}
    except ConfigError as invalid:
        answer = {"wrong": (invalid.variable, invalid.value, invalid.allowed)}
    sys.stdout.write(json.dumps(answer))


def _reread(base: Mapping[str, Any]) -> dict[str, str]:
    config = load()
    deployed(config)
    deployed_upstreams(config)
    is_emulated = emulates(config)
    variables = environment_of(Ground(config, None, config.embedded, is_emulated))
    changed = [name for name in _SAME if variables[name.upper()] != base["same"][name]]
    if config.embedded != base["embedded"]:
        changed.append("database_url")
    if is_emulated != base["emulated"]:
        changed.append("gemini_api_key")
    if changed:
        why = "was changed, for which `tidegate up` must be stopped and started again"
        raise ConfigError(changed[0].upper(), "(another)", why)
    return {
        **os.environ,
        **variables,
        **{name.upper(): value for name, value in base["kept"].items()},
    }


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _children(listener: socket.socket, apis: int, workers: int) -> list[Child]:
    program = (sys.executable, "-P", "-m", "tidegate")
    serve = (*program, "serve", "--fd", str(listener.fileno()))
    return [
        *(Child(f"api-{number}", serve) for number in range(1, apis + 1)),
        *(Child(f"worker-{number}", (*program, "worker")) for number in range(1, workers + 1)),
    ]


def _announcer(listener: socket.socket, page: Page, ground: Ground) -> tuple[int, int]:
    """Fork a process that shows the page once all is ready, and return it with the pipe by which it
    reports that. The imports of this process stay in it, and end with it."""
    read_end, write_end = os.pipe()
    sys.stdout.flush()
    supervisor = os.getpid()
    if pid := os.fork():
        os.close(write_end)
        return pid, read_end
    try:
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        os.close(read_end)
        with suppress(KeyboardInterrupt):  # the supervisor stops
            asyncio.run(_announce(supervisor, write_end, listener, page, ground))
        sys.stdout.flush()
    except Exception:  # noqa: BLE001 -- the top of a process: logged
        telemetry.get_logger().exception(telemetry.Log.INTERNAL_ERROR, component="page")
    finally:
        os._exit(0)


async def _announce(
    supervisor: int, write_end: int, listener: socket.socket, page: Page, ground: Ground
) -> None:
    """Show the page once the API is ready; after a while, show why it is not."""
    patient_until = time.monotonic() + _PATIENCE_S
    reported = ""
    with page.busy("starting the API and the workers"):
        while (reason := await _not_ready(listener)) is not None:
            if os.getppid() != supervisor:
                return
            if time.monotonic() > patient_until and reason != reported:
                page.note(f"still waiting for the API: {reason}")
                reported = reason
            await asyncio.sleep(_POLL_S)
    os.write(write_end, b"1")
    page.done("API and workers")
    policy, redis_url = deployed(ground.config), ground.config.redis_url
    assert redis_url is not None
    in_force = await bounds_in_force(redis_url.get_secret_value(), policy)
    page.ready(ground, url_of(listener), policy, in_force)


async def _not_ready(listener: socket.socket) -> str | None:
    """Return why `/health/ready` does not answer 200; None if it does."""
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    try:
        async with asyncio.timeout(_PROBE_S):
            reader, writer = await asyncio.open_connection(host, port)
            try:
                writer.write(_PROBE)
                head, _, body = (await reader.read()).partition(b"\r\n\r\n")
            finally:
                writer.close()
    except TimeoutError:
        return "it does not answer yet"
    except OSError as refused:
        return refused.strerror or str(refused)
    return None if b" 200 " in head.partition(b"\r\n")[0] else body.decode(errors="replace").strip()
