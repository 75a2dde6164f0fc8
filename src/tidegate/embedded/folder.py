"""What keeper and users of bundled servers tell each other: a few small files in `DATA_DIR`.

`users.lock`   held shared by every user for as long as it lives; exclusively by a keeper that
               stops, so that a newcomer waits until the old servers are gone
`keeper.lock`  held exclusively by the one keeper
`start.lock`   held while a user starts a keeper
`wanted/NAME`  a user asks for this server
`hurry`        a user that leaves asks for an end at once, if it was the last
`state.json`   who the keeper is, which servers run where, their ports and sockets; has passwords
`password`     PostgreSQL's superuser's, which only the keeper uses
`password.application`, `password.valkey`   what Tidegate's processes log in with

Invariant: every file is readable by its owner only, and `state.json` is replaced as a whole.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tidegate.embedded import place
from tidegate.embedded.process import Identity

ServiceName = Literal["valkey", "postgres", "emulator"]
PasswordName = Literal["password", "password.application", "password.valkey"]
SERVICES: tuple[ServiceName, ...] = ("valkey", "postgres", "emulator")
_POLL_S = 0.01


@dataclass(frozen=True, slots=True)
class ServiceState:
    """One server as the keeper last saw it."""

    identity: Identity
    url: str
    ready: bool


@dataclass(slots=True)
class State:
    """What the keeper tells its users. `failures` counts failed starts, with the last reason."""

    keeper: Identity | None = None
    services: dict[str, ServiceState] = field(default_factory=dict)
    ports: dict[str, int] = field(default_factory=dict)
    sockets: dict[str, str] = field(default_factory=dict)
    failures: dict[str, tuple[int, str]] = field(default_factory=dict)


class Folder:
    """The folder `embedded` in a `DATA_DIR`."""

    def __init__(self, data_dir: Path) -> None:
        self.data_dir = data_dir.resolve()
        self.path = self.data_dir / "embedded"

    def create(self) -> None:
        """Make the folder where it is missing. Raises OSError."""
        self.data_dir.mkdir(parents=True, exist_ok=True)
        # Root's PostgreSQL is another user, who must pass through; the files stay private.
        self.path.mkdir(mode=0o711 if os.geteuid() == 0 else 0o700, exist_ok=True)
        (self.path / "wanted").mkdir(mode=0o700, exist_ok=True)

    @property
    def exists(self) -> bool:
        return (self.path / "wanted").is_dir()

    @property
    def keeper_log(self) -> Path:
        return self.path / "keeper.log"

    def open_lock(self, name: Literal["users", "keeper", "start"]) -> int:
        """A descriptor of the lock file, not inherited by children unless passed to them."""
        return os.open(self.path / f"{name}.lock", os.O_CREAT | os.O_RDWR, 0o600)

    def owns_lock(self, descriptor: int, name: Literal["users", "keeper", "start"]) -> bool:
        """Whether the lock file is still the one that was opened, not a new one of its name."""
        try:
            return os.path.samestat(os.stat(self.path / f"{name}.lock"), os.fstat(descriptor))
        except FileNotFoundError:
            return False

    def want(self, service: ServiceName) -> None:
        (self.path / "wanted" / service).touch(mode=0o600)

    def wanted(self) -> list[ServiceName]:
        return [name for name in SERVICES if (self.path / "wanted" / name).exists()]

    def want_nothing(self) -> None:
        for name in SERVICES:
            (self.path / "wanted" / name).unlink(missing_ok=True)

    @property
    def hurry(self) -> Path:
        return self.path / "hurry"

    def password(self, name: PasswordName) -> str:
        """A password, made on first use. Only for a keeper, before its threads."""
        path = self.path / name
        if not path.exists():
            place.write_private(path, secrets.token_hex(16))
        return path.read_text(encoding="ascii").strip()

    def read(self) -> State:
        """What the keeper last said; an empty state where it said nothing."""
        try:
            raw = json.loads((self.path / "state.json").read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return State()
        return State(
            keeper=_identity(raw["keeper"]) if raw.get("keeper") else None,
            services={
                name: ServiceState(_identity(found), found["url"], found["ready"])
                for name, found in raw.get("services", {}).items()
            },
            ports=raw.get("ports", {}),
            sockets=raw.get("sockets", {}),
            failures={name: (n, why) for name, (n, why) in raw.get("failures", {}).items()},
        )

    def write(self, state: State) -> None:
        """Replace what is said. Raises FileNotFoundError where the folder is gone."""
        raw = {
            "keeper": _plain(state.keeper) if state.keeper else None,
            "services": {
                name: _plain(found.identity) | {"url": found.url, "ready": found.ready}
                for name, found in state.services.items()
            },
            "ports": state.ports,
            "sockets": state.sockets,
            "failures": state.failures,
        }
        fresh = self.path / "state.json.new"
        place.write_private(fresh, json.dumps(raw, indent=1))
        fresh.rename(self.path / "state.json")


def _identity(raw: dict[str, Any]) -> Identity:
    return Identity(int(raw["pid"]), str(raw["started"]))


def _plain(identity: Identity) -> dict[str, Any]:
    return {"pid": identity.pid, "started": identity.started}


def try_lock(descriptor: int, how: int) -> bool:
    """Take a lock (`fcntl.LOCK_SH` or `LOCK_EX`) if that is possible now."""
    try:
        fcntl.flock(descriptor, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def lock_until(descriptor: int, how: int, deadline: float) -> bool:
    """Take a lock before the deadline (`time.monotonic()`), or return False."""
    while not try_lock(descriptor, how):
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_S)
    return True


@contextmanager
def opened(descriptor: int) -> Iterator[int]:
    """Close the descriptor, and so give up its lock, at the end."""
    try:
        yield descriptor
    finally:
        os.close(descriptor)
