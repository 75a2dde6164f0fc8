"""A network cable per worker that can be pulled: namespaces and virtual Ethernet, Linux and root.

Invariant: everything that was made here is gone after `remove`; names and addresses are random, so
that several runs don't meet.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from collections.abc import Sequence
from secrets import token_hex


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


class Cable:
    """A namespace that reaches this one at `address`, and nothing else, until the cable is pulled.

    Pulled, packets vanish on both sides and connections stay open, as in a real partition; put
    back, what TCP still wants to send arrives.
    """

    def __init__(self) -> None:
        self.name = f"tg{token_hex(3)}"
        net = f"10.{random.randrange(200, 250)}.{random.randrange(256)}"
        self.address, self._there = f"{net}.1", f"{net}.2"

    @property
    def enter(self) -> list[str]:
        """The command that runs another one inside."""
        return ["ip", "netns", "exec", self.name]

    def lay(self) -> None:
        ours, theirs = f"{self.name}a", f"{self.name}b"
        _ip("netns", "add", self.name)
        _ip("link", "add", ours, "type", "veth", "peer", "name", theirs, "netns", self.name)
        _ip("addr", "add", f"{self.address}/30", "dev", ours)
        _ip("-n", self.name, "addr", "add", f"{self._there}/30", "dev", theirs)
        _ip("-n", self.name, "link", "set", "lo", "up")
        _ip("-n", self.name, "link", "set", theirs, "up")
        _ip("link", "set", ours, "up")

    def pull(self) -> None:
        _ip("link", "set", f"{self.name}a", "down")

    def put_back(self) -> None:
        _ip("link", "set", f"{self.name}a", "up")

    def remove(self) -> None:
        # The cable goes with its namespace; what was never laid is not there.
        subprocess.run(["ip", "netns", "del", self.name], check=False, capture_output=True)
        subprocess.run(["ip", "link", "del", f"{self.name}a"], check=False, capture_output=True)


def apart(command: Sequence[str]) -> list[str]:
    """The command with a network of its own. A browser drops all its connections when a cable is
    laid in the network that it is in."""
    return ["unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh", *command]


def missing_apart() -> str:
    """Why this machine can't run a command `apart`; empty where it can."""
    if lacks := _missing("ip", "unshare"):
        return lacks
    tried = subprocess.run(apart(["true"]), check=False, capture_output=True, text=True)
    return tried.stderr.strip() if tried.returncode else ""


def _missing(*programs: str) -> str:
    for program in programs:
        if shutil.which(program) is None:
            return f"there is no `{program}`"
    return "" if os.geteuid() == 0 else "network namespaces need root"


def missing() -> str:
    """Why this machine can't do it; empty where it can."""
    if lacks := _missing("ip"):
        return lacks
    cable = Cable()
    try:
        cable.lay()
        cable.pull()
    except subprocess.CalledProcessError as error:
        return f"no network namespaces here: {error.stderr.strip()}"
    finally:
        cable.remove()
    return ""
