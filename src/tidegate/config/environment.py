"""From variables to a `Config`: the environment over `.env` over the defaults, and secret files.

Invariant: whatever is wrong leaves as one `ConfigError` of one line without a secret.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from difflib import SequenceMatcher, get_close_matches
from enum import StrEnum
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar, get_args, get_origin

from dotenv import dotenv_values
from pydantic import BaseModel, ValidationError

from tidegate.config.client import Client
from tidegate.config.settings import ALLOWED, SECRETS, Config
from tidegate.errors import ConfigError

Settings = TypeVar("Settings", bound=BaseModel)
_LONGEST_SHOWN = 200
_NEAR = 0.82  # a letter too few or two that changed places, not another account's key
_SAME_WORD = 0.5
_COLLECTOR = (
    "OTEL_EXPORTER_OTLP_ENDPOINT",
    "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT",
    "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT",
)
_OTEL = "OTEL_"
_UNITS = {"ms": " of milliseconds", "bytes": " of bytes", "days": " of days"}


def load(environ: Mapping[str, str] | None = None, dotenv: Path | None = Path(".env")) -> Config:
    """Read the environment over `.env` over the defaults; an empty value is one not given.

    Raises ConfigError, whose message is the one line to show.
    """
    return _loaded(Config, environ, dotenv)


def load_client(
    environ: Mapping[str, str] | None = None, dotenv: Path | None = Path(".env")
) -> Client:
    """Whom the commands call, read as `load` reads. Raises ConfigError."""
    return _loaded(Client, environ, dotenv)


def origins(
    environ: Mapping[str, str] | None = None, dotenv: Path | None = Path(".env")
) -> dict[str, str]:
    """Where the value of each setting that is given comes from, in words, by its name."""
    written = _from_dotenv(dotenv) if dotenv is not None and dotenv.is_file() else {}
    given = os.environ if environ is None else environ
    found: dict[str, str] = {}
    for field in Config.model_fields:
        name = field.upper()
        for key in (name, f"{name}_FILE") if name in SECRETS else (name,):
            # As `load` sees it: an empty variable of the environment hides a line of the file.
            value = given[key] if key in given else written.get(key, "")
            if value.strip():
                place = "the environment" if key in given else str(dotenv)
                found[name] = place if key == name else f"the file of {key}, from {place}"
    return found


class Doubt(NamedTuple):
    """A name that is no setting of ours and nearly one: where it stands, and the setting."""

    name: str
    place: str
    near: str

    def __str__(self) -> str:
        return f"{self.place}: {self.name} is not a setting; is {self.near} meant?"


def misspelt(
    environ: Mapping[str, str] | None = None, dotenv: Path = Path(".env")
) -> tuple[Doubt, ...]:
    """Names in the environment and in `.env` that are nearly a setting's."""
    written = _from_dotenv(dotenv) if dotenv.is_file() else {}
    given = os.environ if environ is None else environ
    names = [name.upper() for model in (Config, Client) for name in model.model_fields]
    known = dict.fromkeys([*names, *(f"{name}_FILE" for name in names if name in SECRETS)])
    found = (
        Doubt(name, "the environment" if name in given else str(dotenv), near)
        for name in sorted((written.keys() | given.keys()) - known.keys())
        if (near := _nearly(name.upper(), known)) is not None
    )
    return tuple(found)


def _nearly(name: str, known: Iterable[str]) -> str | None:
    """A setting that `name` may mean, by its letters: not where a word of it is another one
    (OPENAI_API_BASE), nor where there is a word before it (AZURE_OPENAI_API_KEY)."""
    for near in get_close_matches(name, known, n=3, cutoff=_NEAR):
        pairs = [*zip(name.split("_"), near.split("_"), strict=False)]
        is_as_long = name.count("_") == near.count("_")
        is_another = is_as_long and any(
            SequenceMatcher(None, one, other).ratio() < _SAME_WORD for one, other in pairs
        )
        if not is_another and not name.endswith(f"_{near}"):
            return near
    return None


def _loaded(
    model: type[Settings], environ: Mapping[str, str] | None, dotenv: Path | None
) -> Settings:
    found = _from_dotenv(dotenv) if dotenv is not None and dotenv.is_file() else {}
    found |= os.environ if environ is None else environ
    values: dict[str, str] = {}
    for field in model.model_fields:
        name = field.upper()
        raw = _secret(name, found) if name in SECRETS else found.get(name, "")
        if raw.strip():
            values[field] = raw.strip()
    try:
        return model.model_validate(values)
    except ValidationError as invalid:
        raise _first(invalid, values) from None


def secret(name: str, dotenv: Path | None = Path(".env")) -> str:
    """A secret whose variable the policy's file names: from the environment over `.env`, or from
    the file that `<name>_FILE` names; empty where there is none. Raises ConfigError."""
    found = _from_dotenv(dotenv) if dotenv is not None and dotenv.is_file() else {}
    return _secret(name, found | os.environ).strip()


def export_otel(dotenv: Path = Path(".env")) -> None:
    """Put OpenTelemetry's variables of `.env` into the environment, where its SDK reads them; what
    is in the environment stays. Raises ConfigError."""
    written = _from_dotenv(dotenv) if dotenv.is_file() else {}
    for name, value in written.items():
        if name.startswith(_OTEL):
            os.environ.setdefault(name, value)


def names_a_collector(environ: Mapping[str, str] | None = None) -> bool:
    """Whether OpenTelemetry's own variables say where spans and metrics are to go."""
    found = os.environ if environ is None else environ
    if found.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return False
    return any(found.get(name, "").strip() for name in _COLLECTOR)


def allowed(field: str) -> str:
    """What a setting may be, in a user's words; reads well after "must be"."""
    if field in ALLOWED:
        return ALLOWED[field]
    info = Config.model_fields[field]
    types = [one for one in get_args(info.annotation) if one is not type(None)]
    if get_origin(info.annotation) is Literal:
        return f"one of {', '.join(map(str, types))}"
    kind = info.annotation if isinstance(info.annotation, type) else types[0]
    if issubclass(kind, StrEnum):
        return f"one of {', '.join(member.value for member in kind)}"
    if issubclass(kind, bool):
        return "1 or 0 (or true and false, yes and no)"
    if issubclass(kind, int | float):
        what = "a whole number" if issubclass(kind, int) else "a number"
        return _number(what + _UNITS.get(field.rpartition("_")[2], ""), info.metadata)
    return "text"


def _number(what: str, metadata: list[object]) -> str:
    bounds = {
        side: getattr(one, side) for one in metadata for side in ("ge", "le") if hasattr(one, side)
    }
    return f"{what} from {bounds['ge']}" + (f" to {bounds['le']}" if "le" in bounds else " up")


def _from_dotenv(path: Path) -> dict[str, str]:
    try:
        return {name: value for name, value in dotenv_values(path).items() if value is not None}
    except (OSError, UnicodeDecodeError) as unreadable:
        raise ConfigError(str(path), "(file)", _unreadable(unreadable)) from None


def _secret(name: str, found: Mapping[str, str]) -> str:
    path = found.get(f"{name}_FILE", "").strip()
    if not path:
        return found.get(name, "")
    if found.get(name, "").strip():
        raise ConfigError(
            f"{name}_FILE", _one_line(path), f"set either {name} or {name}_FILE, not both"
        )
    try:
        text = Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as unreadable:
        raise ConfigError(f"{name}_FILE", _one_line(path), _unreadable(unreadable)) from None
    if not text:  # taken as "not set" it would start a gateway of made-up answers by mistake
        raise ConfigError(f"{name}_FILE", _one_line(path), "must be a file that is not empty")
    return text


def _unreadable(error: OSError | UnicodeDecodeError) -> str:
    return f"must be a readable file: {getattr(error, 'strerror', None) or 'not UTF-8 text'}"


def _first(invalid: ValidationError, values: Mapping[str, str]) -> ConfigError:
    problem = invalid.errors(include_url=False, include_input=False)[0]
    field = str(problem["loc"][0])
    name = field.upper()
    value = "(hidden)" if name in SECRETS else _one_line(values[field])
    own_words = problem["type"] == "value_error"
    said = str(problem["msg"]).removeprefix("Value error, ")
    return ConfigError(name, value, said if own_words else f"must be {allowed(field)}")


def shown(name: str, value: object) -> str:
    """A setting's value on one line, for people: never a secret, nor what a URL hides."""
    return "(hidden)" if name in SECRETS else _one_line(str(value))


def _one_line(value: str) -> str:
    """`value` without line breaks and, where it is a URL, without a user, password or query."""
    scheme, is_url, rest = value.partition("://")
    if is_url:
        before, asks, _ = rest.partition("?")
        _, at, place = before.rpartition("@")
        value = f"{scheme}://{'***@' if at else ''}{place}{'?***' if asks else ''}"
    printable = "".join(letter if letter.isprintable() else " " for letter in value)
    return printable if len(printable) <= _LONGEST_SHOWN else f"{printable[:_LONGEST_SHOWN]}..."
