"""The policy that a deployment states: `tidegate.toml` over the environment over the defaults.

Invariant: whatever is wrong leaves as one ConfigError that names the file and the key.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from tidegate.call import CLASSIFIER_LIMIT, DEFAULT_POOL, Kind
from tidegate.config import Config, secret
from tidegate.config.environment import Doubt, misspelt
from tidegate.errors import ConfigError
from tidegate.limiter.limits import PoolPolicy
from tidegate.policy.plain import SECTIONS, check_keys, of_plain
from tidegate.policy.upstreams import Deployment, deployment_of

USUAL_FILE = Path("tidegate.toml")
_NOT_OF_THE_POOL = ("upstreams", "routes")
_LONGEST_BYTES = 1_000_000
_ANY_ONE = (
    "must be set when HOST is not loopback (HOST={host}), or OPENAI_API_KEY, or ANTHROPIC_API_KEY, "
    "or an upstream in tidegate.toml; TIDEGATE_DEMO=1 allows the emulated provider"
)


def deployed(config: Config) -> PoolPolicy:
    """What this deployment asks for in the pool `gemini`, as revision 1. Raises ConfigError."""
    path = policy_file(config)
    return of_plain(_filled({}, config)) if path is None else from_file(path, config)


def from_file(path: Path, config: Config) -> PoolPolicy:
    """The policy of a file; `config` fills in what it does not say. Raises ConfigError."""
    read = _read(path)
    stated = {key: value for key, value in read.items() if key not in _NOT_OF_THE_POOL}
    try:
        check_keys("", read, (*SECTIONS, *_NOT_OF_THE_POOL))
        of_plain(stated)  # on its own first: what is wrong is then the file's
        return of_plain(_filled(stated, config))
    except ConfigError as wrong:
        raise ConfigError(f"{path}: {wrong.variable}", wrong.value, wrong.allowed) from None


def deployed_upstreams(config: Config) -> Deployment:
    """The upstreams of this deployment, with their policies. Raises ConfigError."""
    path = policy_file(config)
    if path is None:
        found = deployment_of({}, config, secret)
    else:
        try:
            found = deployment_of(_read(path), config, secret)
        except ConfigError as wrong:
            raise ConfigError(f"{path}: {wrong.variable}", wrong.value, wrong.allowed) from None
    if not found.upstreams:
        raise ConfigError("GEMINI_API_KEY", "(not set)", _ANY_ONE.format(host=config.host))
    return found


def emulates(config: Config) -> bool:
    """Whether the built-in emulator is to answer as Gemini: without its key, on loopback or in a
    demonstration; beside other upstreams only where the bundled servers are in use too. Raises
    ConfigError."""
    names = {one.name for one in deployed_upstreams(config).upstreams} if config.emulated else ()
    return DEFAULT_POOL in names


def default_pool(config: Config) -> str:
    """The pool that a command is about which names none: Gemini's, or the first upstream's where
    there is no account of Gemini."""
    try:
        names = [one.name for one in deployed_upstreams(config).upstreams]
    except ConfigError:  # such as a key that only the processes have
        return DEFAULT_POOL
    return DEFAULT_POOL if DEFAULT_POOL in names else names[0]


def doubtful(config: Config) -> list[Doubt]:
    """Names of variables that are nearly a setting's, unless the policy's file speaks of them: the
    key of another account is no mistake. Raises ConfigError."""
    path = policy_file(config)
    spoken_of = "" if path is None else path.read_text(errors="replace")
    return [one for one in misspelt() if one.name not in spoken_of]


def policy_file(config: Config) -> Path | None:
    """The file that states the policy, or None."""
    if config.tidegate_policy is not None:
        return config.tidegate_policy
    return USUAL_FILE if USUAL_FILE.is_file() else None


def _read(path: Path) -> dict[str, Any]:
    try:
        data = path.read_bytes()
        if len(data) > _LONGEST_BYTES:
            allowed = f"must be a file of at most {_LONGEST_BYTES} bytes"
            raise ConfigError(str(path), f"({len(data)} bytes)", allowed)
        return tomllib.loads(data.decode())
    except OSError as unreadable:
        allowed = f"must be a readable file: {unreadable.strerror}"
        raise ConfigError(str(path), "(file)", allowed) from None
    except UnicodeDecodeError:
        raise ConfigError(str(path), "(file)", "must be UTF-8 text") from None
    except tomllib.TOMLDecodeError as broken:
        raise ConfigError(str(path), "(file)", f"must be TOML: {broken}") from None


def _filled(stated: dict[str, Any], config: Config) -> dict[str, Any]:
    """`stated` with what the environment says of the rest."""
    kinds = {Kind(kind).limit: limit for kind, limit in config.rate_limits.items()}
    pool = {
        "lease_ms": config.lease_ms,
        "when_away": config.when_valkey_away,
        "on_lost": config.on_lost,
        "on_expiry": config.on_expiry,
    }
    limits = {**kinds, CLASSIFIER_LIMIT: config.classifier_limit}
    return {
        **stated,
        "limits": limits | stated.get("limits", {}),
        "pool": pool | stated.get("pool", {}),
    }
