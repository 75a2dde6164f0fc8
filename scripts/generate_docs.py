"""Write `.env.example` and the documents on settings, errors, metrics and commands from the code.

    python scripts/generate_docs.py           write them
    python scripts/generate_docs.py --check   exit with 1 and name what is out of date

Invariant: what these files say of a setting stands in `tidegate.settings`, what they say of
an error in `tidegate.errors` and in the table of `tidegate.http.problems`, of a command in
`tidegate.cli`, and only there.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import textwrap
from functools import cache
from pathlib import Path

from pydantic import SecretStr

from tidegate import errors
from tidegate.http.problems import native_status_of, status_of
from tidegate.metrics.instruments import ALL
from tidegate.settings import SECRETS, SECTIONS, Config, allowed

sys.path.insert(0, str(Path(__file__).parent))
from cli_document import cli_document
from code_document import code_document

ROOT = Path(__file__).resolve().parent.parent
WIDTH = 96

ENV_HEAD = """\
Copy this file to .env and take away the # before what you want to change: everything has a
default. The environment wins over .env. A secret may also be given as the path of a file that
holds it, under its name with _FILE: GEMINI_API_KEY_FILE=/run/secrets/gemini. OpenTelemetry's own
variables (OTEL_...) may stand here too: see docs/observability.md. (Written by
scripts/generate_docs.py.)"""

DOC_HEAD = """\
# Configuration

Every setting is an environment variable, or a line of the file `.env` in the working directory
([.env.example](../.env.example) has them all). The environment takes precedence over `.env`; an
empty value counts as not set. A wrong value stops the start with one line that names the variable,
its value and the allowed values. Secrets are never shown.

The secrets are SECRETS. Each may also be given
as the path of a file that holds it, under its name with `_FILE`, such as
`GEMINI_API_KEY_FILE=/run/secrets/gemini`.

**Bundled servers and emulator.** Without `DATABASE_URL` and `REDIS_URL` the bundled servers start,
and without `GEMINI_API_KEY` the built-in emulator answers as Gemini. Both happen only if `HOST` is
a loopback address. On any other address both URLs and at least one upstream are required, unless
`TIDEGATE_DEMO=1` is set for a demonstration. One of the two URLs without the other always stops the
start.

<!-- Written by scripts/generate_docs.py: change tidegate/settings.py instead. -->
"""

ERRORS_HEAD = """\
# Errors

Errors are problem JSON ([RFC 9457](https://www.rfc-editor.org/rfc/rfc9457)),
with `Content-Type: application/problem+json`. `code` is the stable name to test for; the same codes
are in `error` of a request's status. [http-api.md](http-api.md#when-it-goes-wrong) has examples.

*Native* is the status on the paths of the providers' SDKs, where the body has the format of their
dialect ([gateway.md](gateway.md#errors)). Errors of the provider itself are forwarded there
unchanged.

*Retry* states whether the same request may succeed later. `Retry-After` (and `retry_after_ms`) has
the time: in every 503 and 504, and in other errors if the time is known.

<!-- Written by scripts/generate_docs.py from tidegate/errors.py and tidegate/http/problems.py. -->

| code | status | native | meaning | retry |
|---|---|---|---|---|
"""
METRICS_HEAD = """\
# Metrics

The metrics of `GET /metrics`; [observability.md](observability.md#metrics) describes how to scrape
them. The series of a histogram end in `_bucket`, `_sum` and `_count`.

<!-- Written by scripts/generate_docs.py from tidegate/metrics/instruments.py. -->
"""
OF_PROCESSES = """
## Metrics of processes

They cover the process that answers, and under `tidegate up` all of its sibling processes. Sum them
over all scraped instances.

| metric | type | labels | meaning |
|---|---|---|---|
"""
OF_ALL = """
## Metrics of the whole deployment

They are read from Valkey and PostgreSQL at each scrape, so every process reports the same values:
take the maximum over `instance`, not the sum. Metrics of an unavailable store are missing.

| metric | type | labels | meaning |
|---|---|---|---|
"""
# They never reach a client: they stop a start, are settled between processes, or are its own.
INSIDE = {errors.ConfigError, errors.PolicyConflict, errors.ClaimLost}
INSIDE |= {errors.GatewayRefused, errors.GatewayUnreachable}
# Nobody raises them: only what is below them in the tree.
ROOTS = {errors.AdmissionError, errors.UpstreamError}
# What waited in vain may find room later; no job is tried again for it.
LATER = {errors.DeadlineExceeded, errors.LimitPaused, errors.LimitUsedUp, errors.QueueFull}
LATER |= {errors.RequestTimeout, errors.NotEnded}
_LEAF = re.compile(r"^[│ ]*[├└]── (\w+) +(.+)$", re.MULTILINE)


def shown_default(field: str) -> str:
    """The default as one would write it in `.env`; empty where there is none."""
    value = Config.model_fields[field].get_default(call_default_factory=True)
    if value is None or isinstance(value, SecretStr):
        return ""
    if isinstance(value, dict):
        return json.dumps(value)
    if isinstance(value, tuple):
        return ",".join(value)
    return str(int(value)) if isinstance(value, bool) else str(value)


def env_example() -> str:
    lines = [_comment(ENV_HEAD)]
    for field in Config.model_fields:
        if field in SECTIONS:
            lines += ["", "", f"# {SECTIONS[field]}"]
        may_be = allowed(field)
        told = _description(field) + ("" if may_be == "text" else f" Allowed: {may_be}.")
        default = shown_default(field)
        quoted = f"'{default}'" if default.startswith("{") else default
        lines += ["", _comment(told), f"#{field.upper()}={quoted}"]
    return "\n".join(lines) + "\n"


def configuration() -> str:
    named = [f"`{name}`" for name in SECRETS]
    secrets = f"{', '.join(named[:-1])} and {named[-1]}"
    lines = [DOC_HEAD.replace("SECRETS", secrets)]
    for field in Config.model_fields:
        if field in SECTIONS:
            lines += [
                f"\n## {SECTIONS[field]}\n",
                "| variable | default | allowed | what it does |",
                "|---|---|---|---|",
            ]
        default = shown_default(field)
        cells = (
            f"`{field.upper()}`",
            f"`{default}`" if default else "not set",
            allowed(field),
            _description(field),
        )
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def errors_reference() -> str:
    """A row for each error of the tree in `tidegate.errors` that a client may get."""
    meanings = dict(_LEAF.findall(errors.__doc__ or ""))
    rows = []
    meanings["TidegateError"] = "a bug in Tidegate; the log has the details"
    for name, means in meanings.items():
        kind: type[errors.TidegateError] = getattr(errors, name)
        if kind in INSIDE | ROOTS:
            continue
        if issubclass(kind, errors.UpstreamError):
            means = "the provider: " + means.replace("the provider's", "its")
        blank = kind.__new__(kind)
        again = "yes" if kind.retryable or kind in LATER else "no"
        cells = (
            f"`{kind.code}`",
            str(status_of(blank)),
            str(native_status_of(blank)),
            means,
            again,
        )
        rows.append("| " + " | ".join(cells) + " |")
    return ERRORS_HEAD + "\n".join(rows) + "\n"


def metrics_reference() -> str:
    """A row for each metric."""
    tables = {False: "", True: ""}
    for one in ALL:
        labels = ", ".join(f"`{label}`" for label in one.labels)
        said = one.help_text.replace("|", "\\|")
        tables[one.everywhere] += f"| `{one.name}` | {one.sort} | {labels} | {said} |\n"
    return METRICS_HEAD + OF_PROCESSES + tables[False] + OF_ALL + tables[True]


@cache
def documents() -> dict[str, str]:
    """Each generated file, by its place in the repository, and what belongs into it."""
    return {
        ".env.example": env_example(),
        "docs/configuration.md": configuration(),
        "docs/errors.md": errors_reference(),
        "docs/cli.md": cli_document(),
        "docs/code.md": code_document(),
        "docs/metrics.md": metrics_reference(),
    }


def out_of_date() -> list[str]:
    def is_so(path: Path, text: str) -> bool:
        return path.exists() and path.read_text(encoding="utf-8") == text

    return [name for name, text in documents().items() if not is_so(ROOT / name, text)]


def _description(field: str) -> str:
    text = Config.model_fields[field].description
    if not text:
        raise SystemExit(f"{field} has no description in tidegate/settings.py")
    return text


def _comment(text: str) -> str:
    return "\n".join(f"# {line}" for line in textwrap.wrap(text, WIDTH, break_on_hyphens=False))


def main() -> int:
    parser = argparse.ArgumentParser(description="Write the generated documents.")
    parser.add_argument("--check", action="store_true", help="only say what is out of date")
    if parser.parse_args().check:
        stale = out_of_date()
        for name in stale:
            print(f"{name} is out of date: run scripts/generate_docs.py")
        return 1 if stale else 0
    for name, text in documents().items():
        path = ROOT / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
