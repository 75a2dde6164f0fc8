"""`make clients`, or `python -m clients --only openai --only vercel`.

Starts a gateway by `tidegate up` without a key, runs each client's program against it, and prints a
line for each case. Ends with 1 if any failed; what cannot be installed here is named at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.environments import EnvironmentMissing
from clients.catalogue import CLIENTS, Client
from clients.gateway import NotReady, keyless_gateway

LONGEST_S = 300
# No client asks the internet for prices, versions or a place for its statistics.
OFFLINE = {
    "NO_PROXY": "127.0.0.1,localhost",
    "DO_NOT_TRACK": "1",
    "OTEL_SDK_DISABLED": "true",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "CREWAI_DISABLE_TELEMETRY": "true",
    "HAYSTACK_TELEMETRY_ENABLED": "False",
    "MEM0_TELEMETRY": "False",
    "DISABLE_AUTOUPDATER": "1",
    "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
}


@dataclass(frozen=True, slots=True)
class Case:
    """One thing that a client did. `failed` says what went wrong; empty where nothing did."""

    client: Client
    name: str
    failed: str

    def __str__(self) -> str:
        said = f"FAILED  {self.failed}" if self.failed else "ok"
        return f"{self.client.name:<14} {self.client.version:<9} {self.name:<28} {said}"


def cases_of(
    client: Client, command: Sequence[str | Path], url: str, folder: Path
) -> Iterator[Case]:
    """What the program says of each case; it is one more, and failed, where it ends badly."""
    folder.mkdir()
    environment = {name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ}
    environment |= OFFLINE | {"TIDEGATE_URL": url, "HOME": str(folder)}
    try:
        done = subprocess.run(
            command,
            env=environment,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=LONGEST_S,
            check=False,
        )
        said, status, complaint = done.stdout, done.returncode, done.stderr
    except subprocess.TimeoutExpired as late:
        said = late.stdout.decode() if isinstance(late.stdout, bytes) else ""
        status, complaint = 1, f"took longer than {LONGEST_S} s"
    count = 0
    for line in said.splitlines():
        if line.startswith('{"case"'):
            told = json.loads(line)
            count += 1
            yield Case(client, told["case"], told["failed"] or "")
    if status or not count:
        last = (complaint.strip().splitlines() or ["it told of no case"])[-1]
        yield Case(client, "(the whole program)", f"ended with {status}: {last[:300]}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m clients", description=__doc__)
    parser.add_argument("--only", action="append", default=[], metavar="CLIENT")
    wanted = parser.parse_args(arguments).only
    if unknown := set(wanted) - {client.name for client in CLIENTS}:
        known = ", ".join(client.name for client in CLIENTS)
        parser.error(f"{min(unknown)} is no client; known: {known}")
    chosen = [client for client in CLIENTS if not wanted or client.name in wanted]
    failed, counted, missing = 0, 0, []
    with tempfile.TemporaryDirectory(prefix="clients-") as folder:
        home = Path(folder)
        home.chmod(0o711)  # the user that PostgreSQL gets in place of root comes through it
        try:
            with keyless_gateway(home) as url:
                for client in chosen:
                    try:
                        command = client.command()
                        for case in cases_of(client, command, url, home / client.name):
                            print(case, flush=True)
                            counted += 1
                            failed += bool(case.failed)
                    except EnvironmentMissing as why:
                        missing.append(f"{client.name} {client.version}: {why}")
                        print(f"{client.name:<14} {client.version:<9} NOT INSTALLED", flush=True)
        except NotReady as why:
            print(f"the gateway did not start: {why}", file=sys.stderr)
            return 2
    print(f"\n{counted - failed} of {counted} cases ok")
    for line in missing:
        print(f"not installed, so not tried: {line}")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
