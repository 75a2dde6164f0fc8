"""What `tidegate up` shows: a page that tells what runs where, what to try and how to stop.

Written to standard output; logs go to standard error. Without a terminal it is plain text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.text import Text

from tidegate import __version__
from tidegate.call import DEFAULT_POOL, Kind
from tidegate.config import Config, key_file, operator_key
from tidegate.http.signin import CODE_S, make_code
from tidegate.limiter import PoolPolicy
from tidegate.policy import deployed_upstreams
from tidegate.supervisor.ground import Ground

_LABEL = "bold cyan"
_QUIET = "bright_black"
_INDENT = "  "
_LABEL_WIDTH = 12
_MODELS_SHOWN = 3


class Page:
    """One terminal, and the words for it."""

    def __init__(self, config: Config, apis: int, workers: int) -> None:
        self._config = config
        self._apis = apis
        self._workers = workers
        self._console = Console(highlight=False, soft_wrap=True)

    @contextmanager
    def busy(self, what: str) -> Iterator[None]:
        """Show that something takes a moment; nothing without a terminal."""
        if not self._console.is_terminal:
            yield
            return
        with self._console.status(f"[{_QUIET}]{what}[/]", spinner_style="cyan"):
            yield

    def note(self, text: str) -> None:
        """One line on why the start takes longer."""
        self._line((f"{_INDENT}{text}", "yellow"))

    def stopping(self) -> None:
        grace_s = self._config.shutdown_grace_ms / 1000
        self._line()
        self._line(
            (f"{_INDENT}Stopping. ", "bold"),
            (f"Running calls may finish within {grace_s:g} s; Ctrl-C again ends them.", _QUIET),
        )

    def stopped(self) -> None:
        self._line((f"{_INDENT}Stopped. Nothing is left running.", _QUIET))

    def ready(
        self, ground: Ground, url: str, policy: PoolPolicy, in_force: Mapping[Kind, int] | None
    ) -> None:
        """The start-up page. `policy` is what this deployment asks for; in_force: how many calls of
        each kind may run at once now, None where that is not known."""
        self._line()
        self._line((f"{_INDENT}≋ Tidegate", "bold"), (f" {__version__}", _QUIET), f"   {url}")
        self._line()
        key = operator_key(self._config).get_secret_value()
        self._row("Dashboard", "live", f"{url}/dashboard/?code={make_code(key)}")
        self._more(f"this address works once, within {CODE_S // 60} minutes; later {url}/dashboard")
        self._more(f"asks for the operator's key: {self._key_place()}")
        self._row("API", _count(self._apis, "process"), f"its documentation is at {url}/docs")
        self._row("Worker", _count(self._workers, "process"), "takes the jobs of POST /submit")
        self._where(ground)
        if ground.config.gemini_api_key is not None:  # or it binds nobody
            self._at_once(policy, in_force)
        if self._config.asks_for_keys:
            self._row("Callers", "show a key", "tidegate keys create makes one; see AUTH")
        if ground.emulated:
            is_alone = len(deployed_upstreams(ground.config).upstreams) == 1
            whose = "answers" if is_alone else "answers of gemini"
            self._line()
            self._line(
                (f"{_INDENT}Demo mode. ", "bold yellow"),
                (f"No GEMINI_API_KEY: {whose} come from the built-in emulator.", "yellow"),
            )
        self._try(url.removeprefix("http://"), ground)
        self._line((f"{_INDENT}Ctrl-C stops everything.", _QUIET))
        self._line()

    def _key_place(self) -> str:
        if self._config.admin_token is not None:
            return "ADMIN_TOKEN"
        return str(key_file(self._config))

    def _at_once(self, policy: PoolPolicy, in_force: Mapping[Kind, int] | None) -> None:
        wanted = {kind: policy.bound(kind.limit) for kind in Kind}
        now = wanted if in_force is None else in_force
        limits = [
            f"{kind.value} {now[kind]}"
            + (f" (configured: {wanted[kind]})" if now[kind] != wanted[kind] else "")
            for kind in Kind
        ]
        self._row("At once", ", ".join(limits), "calls, over all processes")
        if in_force is None:
            self._more("as configured: Valkey does not answer yet")
        elif now != wanted:
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
        label = "Provider" if len(upstreams) == 1 else "Providers"
        for one in upstreams:
            if ground.emulated and one.name == DEFAULT_POOL:
                alone = "nothing leaves this machine" if len(upstreams) == 1 else "as gemini"
                self._row(label, "emulated", alone)
            else:
                shown = [*one.models[:_MODELS_SHOWN], *["..."] * (len(one.models) > _MODELS_SHOWN)]
                models = "" if "*" in one.models else f" for {', '.join(shown)}"
                self._row(label, one.name, next(iter(one.base_urls.values())) + models)
            label = ""

    def _try(self, place: str, ground: Ground) -> None:
        self._line()
        self._line((f"{_INDENT}Try", _LABEL))
        json = '-H "Content-Type: application/json"'
        key = ' -H "x-api-key: <key>"' if self._config.asks_for_keys else ""
        if ground.config.gemini_api_key is None:  # no upstream for prompts
            self._line(f"{_INDENT}{_INDENT}curl{key} {place}/v1/models")
            self._line()
            return
        for command in (
            f"""curl {place}/submit{key} {json} -d '{{"data": "Why is the sea salty?"}}'""",
            f'curl{key} "{place}/status/<request_id>?wait=20"',
            f"""curl -N {place}/stream{key} -F 'text=What is modern family?'""",
        ):
            self._line(f"{_INDENT}{_INDENT}{command}")
        self._line()

    def _row(self, label: str, value: str, remark: str) -> None:
        self._line(
            (f"{_INDENT}{label:<{_LABEL_WIDTH}}", _LABEL), f"{value:<12}", (f" {remark}", _QUIET)
        )

    def _more(self, remark: str) -> None:
        """Another line of the row before."""
        self._line((f"{_INDENT}{'':<{_LABEL_WIDTH}}{remark}", _QUIET))

    def _line(self, *parts: str | tuple[str, str]) -> None:
        self._console.print(Text.assemble(*parts))


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}es"
