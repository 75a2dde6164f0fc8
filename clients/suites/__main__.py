"""`make suites`, or `python -m clients.suites anthropic`: an SDK's own tests through the gateway.

Runs them on a mock of the API directly, then through a gateway in front of the mock. Prints how
many pass by resource, and each that passes directly alone. Ends with 1 if too few pass, or one
fails for a reason that is not known.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from bench.environments import EnvironmentMissing
from clients.gateway import NotReady, keyless_gateway
from clients.suites import anthropic, openai
from clients.suites.runs import SuiteFailed, compare, write_json

SUITES = {"openai": openai.suite_of, "anthropic": anthropic.suite_of}


@contextmanager
def _gateway(folder: Path, policy: str) -> Iterator[str]:
    """A gateway under a policy, and its URL."""
    path = folder / "policy.toml"
    path.write_text(policy, encoding="utf-8")
    settings = {"TIDEGATE_POLICY": str(path), "MOCK_KEY": "key-of-the-mock"}
    with keyless_gateway(folder, settings) as url:
        yield url


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m clients.suites", description=__doc__)
    parser.add_argument("suite", choices=SUITES)
    parser.add_argument("--sdk", type=Path, metavar="FOLDER", help="a checkout of the SDK")
    parser.add_argument("--spec", type=Path, metavar="FILE", help="the API's specification")
    parser.add_argument("--only", action="append", default=[], metavar="PATH", help="some tests")
    parser.add_argument("--processes", type=int, default=2, help="in which the tests run")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the result is written")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="suites-") as home:
        folder = Path(home)
        folder.chmod(0o711)  # the user that PostgreSQL gets in place of root comes through it
        try:
            suite = SUITES[given.suite](given.sdk, given.spec, folder)
            found = compare(
                suite,
                lambda policy: _gateway(folder, policy),
                folder,
                only=given.only,
                processes=given.processes,
            )
        except (EnvironmentMissing, NotReady, SuiteFailed) as why:
            print(f"not run: {why}", file=sys.stderr)
            return 2
    for line in found.lines():
        print(line)
    if given.json is not None:
        write_json(found, given.json)
    return 0 if found.is_good else 1


if __name__ == "__main__":
    raise SystemExit(main())
