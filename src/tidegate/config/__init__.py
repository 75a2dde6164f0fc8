"""All settings: typed, validated, from the environment or `.env`.

Invariant: a process that starts has a whole and sound `Config`; a wrong value stops the start
with a `ConfigError`, one line that names the variable, its value (never a secret) and what is
allowed. Each secret may also be given as `NAME_FILE`, the path of a file that holds it.
"""

from tidegate.config.client import Client
from tidegate.config.environment import (
    export_otel,
    load,
    load_client,
    names_a_collector,
    secret,
)
from tidegate.config.operator_key import existing_operator_key, key_file, operator_key
from tidegate.config.places import EMULATORS_KEY, GOOGLE_URL
from tidegate.config.settings import KINDS, SECRETS, ClassifierMode, Config

__all__ = [
    "EMULATORS_KEY",
    "GOOGLE_URL",
    "KINDS",
    "SECRETS",
    "ClassifierMode",
    "Client",
    "Config",
    "existing_operator_key",
    "export_otel",
    "key_file",
    "load",
    "load_client",
    "names_a_collector",
    "operator_key",
    "secret",
]
