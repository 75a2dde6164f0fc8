"""Write `.env.example` and `docs/configuration.md` from the settings themselves.

    python scripts/generate_docs.py           write both
    python scripts/generate_docs.py --check   exit with 1 and name what is out of date

Invariant: what these files say of a setting stands in `tidegate.config.settings` and only there.
"""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from pathlib import Path

from pydantic import SecretStr

from tidegate.config import SECRETS, Config
from tidegate.config.environment import allowed
from tidegate.config.settings import SECTIONS

ROOT = Path(__file__).resolve().parent.parent
WIDTH = 96

ENV_HEAD = """\
Copy this file to .env and take away the # before what you want to change: everything has a
default. The environment wins over .env. A secret may also be given as the path of a file that
holds it, under its name with _FILE: GEMINI_API_KEY_FILE=/run/secrets/gemini.
(Written by scripts/generate_docs.py.)"""

DOC_HEAD = """\
# Configuration

Every setting is an environment variable, or a line of a file `.env` in the folder that the
product is started from ([.env.example](../.env.example) has them all). The environment wins over
`.env`; an empty value is the same as none. A wrong value stops the start with one line that names
the variable, its value and what is allowed. Secrets are never shown.

The secrets are SECRETS. Each may also be given
as the path of a file that holds it, under its name with `_FILE`, such as
`GEMINI_API_KEY_FILE=/run/secrets/gemini`.

**Never by mistake.** Without `DATABASE_URL` and `REDIS_URL` the bundled servers start, and without
`GEMINI_API_KEY` the built-in emulator makes up the answers. Both happen only while `HOST` is a
loopback address. On any other address a missing one of the three stops the start, unless
`TIDEGATE_DEMO=1` says that this is a demonstration. One of the two URLs without the other always
stops it.

<!-- Written by scripts/generate_docs.py: change tidegate/config/settings.py instead. -->
"""


def shown_default(field: str) -> str:
    """The default as one would write it in `.env`; empty where there is none."""
    value = Config.model_fields[field].get_default(call_default_factory=True)
    if value is None or isinstance(value, SecretStr):
        return ""
    if isinstance(value, dict):
        return json.dumps(value)
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


def documents() -> dict[Path, str]:
    """Each generated file and what belongs into it."""
    return {
        ROOT / ".env.example": env_example(),
        ROOT / "docs" / "configuration.md": configuration(),
    }


def out_of_date() -> list[Path]:
    return [
        path
        for path, text in documents().items()
        if not path.exists() or path.read_text(encoding="utf-8") != text
    ]


def _description(field: str) -> str:
    text = Config.model_fields[field].description
    if not text:
        raise SystemExit(f"{field} has no description in tidegate/config/settings.py")
    return text


def _comment(text: str) -> str:
    return "\n".join(f"# {line}" for line in textwrap.wrap(text, WIDTH, break_on_hyphens=False))


def main() -> int:
    parser = argparse.ArgumentParser(description="Write the generated documents.")
    parser.add_argument("--check", action="store_true", help="only say what is out of date")
    if parser.parse_args().check:
        stale = out_of_date()
        for path in stale:
            print(f"{path.relative_to(ROOT)} is out of date: run scripts/generate_docs.py")
        return 1 if stale else 0
    for path, text in documents().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
