"""Settings of the emulator: latencies, limits, answers; all can be changed while it runs.

Invariant: a `Behaviour` is valid and never changes; a change makes a new one, or is rejected as a
whole.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from random import Random
from typing import Any, Literal, Self

from tidegate.emulator.account import DAY_S, AccountSpec
from tidegate.emulator.gpu import GpuSpec, known_fields, number, whole
from tidegate.errors import InvalidRequest

KINDS = ("text_only", "multi_modal", "image_generation", "classifier", "other", "realtime")
EVERY = "*"  # in a table by kind: the value for all other kinds
TOTAL = "total"  # a limit over all kinds together except `other`

Mode = Literal["fixed_window", "sliding_window", "token_bucket"]
Measure = Literal["requests", "input_tokens"]
MODES = ("fixed_window", "sliding_window", "token_bucket")
MEASURES = ("requests", "input_tokens")


@dataclass(frozen=True, slots=True)
class Distribution:
    """Delays in ms. As JSON: `50`, `{"uniform": [20, 80]}` or `{"lognormal": [median, sigma]}`."""

    shape: Literal["fixed", "uniform", "lognormal"] = "fixed"
    first: float = 0.0
    second: float = 0.0

    @classmethod
    def parse(cls, name: str, value: Any) -> Self:
        if isinstance(value, cls):
            return value
        if isinstance(value, Mapping) and len(value) == 1:
            (shape, pair), *_ = value.items()
            if shape in ("uniform", "lognormal") and isinstance(pair, list | tuple):
                if len(pair) != 2:
                    raise InvalidRequest(name, f"{name}: {shape} takes two numbers")
                top = 3_600_000 if shape == "uniform" else 10
                first = number(name, pair[0], 0, 3_600_000)
                return cls(shape, first, number(name, pair[1], 0, top))
        return cls("fixed", number(name, value, 0, 3_600_000))

    def draw_ms(self, random: Random) -> float:
        if self.shape == "fixed":
            return self.first
        if self.shape == "uniform":
            return random.uniform(self.first, self.second)
        return self.first * math.exp(random.gauss(0.0, self.second))

    def to_json(self) -> Any:
        return self.first if self.shape == "fixed" else {self.shape: [self.first, self.second]}


@dataclass(frozen=True, slots=True)
class RateLimit:
    """At most `limit` requests or input tokens of `scope` in `window_s` seconds, counted by `mode`.

    `scope` is a kind or `total`. A window of a day or more is reported as a quota per day.
    """

    scope: str
    limit: int
    window_s: float = 60.0
    mode: Mode = "sliding_window"
    measure: Measure = "requests"

    @property
    def name(self) -> str:
        return f"{self.measure}:{self.scope}:{self.window_s:g}s"

    @property
    def per_day(self) -> bool:
        return self.window_s >= DAY_S

    @classmethod
    def parse(cls, value: Any) -> Self:
        if isinstance(value, cls):
            return value
        if not isinstance(value, Mapping) or not {"scope", "limit"} <= value.keys():
            raise InvalidRequest("rates", "a rate needs at least a scope and a limit")
        if unknown := value.keys() - {item.name for item in fields(cls)}:
            raise InvalidRequest("rates", f"a rate has no field {min(unknown)!r}")
        for name, allowed in (("scope", (*KINDS, TOTAL)), ("mode", MODES), ("measure", MEASURES)):
            if name in value and value[name] not in allowed:
                raise InvalidRequest(f"rates.{name}", f"{value[name]!r} is none of {allowed}")
        whole("rates.limit", value["limit"], 0, 10**12)
        number("rates.window_s", value.get("window_s", 60), 0.001, 10 * DAY_S)
        return cls(**value)


@dataclass(frozen=True, slots=True)
class BatchPace:
    """The pace at which the providers' batch APIs process a batch, on the emulator's clock.

    A batch takes `validating_ms`, then `delay_ms`, then `line_ms` for each line in turn, then
    `finalizing_ms`. `failed_share` of the lines end with an error. `expired_share` of the batches
    process only `partial_share` of their lines, and expire after `window_s` (by default a day,
    Gemini's two). A cancelled batch continues for `cancelling_ms`. `enqueued_tokens` bounds the
    input tokens of a model in open batches, `enqueued_requests` the lines in open batches,
    `open_batches` their number.
    """

    validating_ms: float = 0.0
    delay_ms: Distribution = field(default_factory=Distribution)
    line_ms: float = 0.0
    finalizing_ms: float = 0.0
    cancelling_ms: float = 0.0
    failed_share: float = 0.0
    expired_share: float = 0.0
    partial_share: float = 0.5
    window_s: float | None = None
    enqueued_tokens: int | None = None
    enqueued_requests: int | None = None
    open_batches: int | None = None

    @classmethod
    def parse(cls, value: Any) -> Self:
        """Parse JSON. Raises InvalidRequest naming the field."""
        if isinstance(value, cls):
            return value
        known_fields("batches", value, tuple(item.name for item in fields(cls)))
        return cls(**{name: _of_pace(f"batches.{name}", item) for name, item in value.items()})

    def to_json(self) -> dict[str, Any]:
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        return values | {"delay_ms": self.delay_ms.to_json()}


@dataclass(frozen=True, slots=True)
class FlexPace:
    """The flex tier: each call is answered `delay_ms` later than in the usual tier, and a
    `busy_share` of the calls is refused for lack of capacity."""

    delay_ms: Distribution = field(default_factory=Distribution)
    busy_share: float = 0.0

    @classmethod
    def parse(cls, value: Any) -> Self:
        """Parse JSON. Raises InvalidRequest naming the field."""
        if isinstance(value, cls):
            return value
        known_fields("flex", value, tuple(item.name for item in fields(cls)))
        return cls(**{name: _of_pace(f"flex.{name}", item) for name, item in value.items()})

    def to_json(self) -> dict[str, Any]:
        return {"delay_ms": self.delay_ms.to_json(), "busy_share": self.busy_share}


def _of_pace(name: str, value: Any) -> Any:
    """Return the checked value of a field of `BatchPace` or `FlexPace`."""
    if name.endswith(".delay_ms"):
        return Distribution.parse(name, value)
    if name.endswith("_share"):
        return number(name, value, 0, 1)
    if name.endswith("_ms"):
        return number(name, value, 0, 10**9)
    if value is None:
        return None
    if name.endswith("_s"):
        return number(name, value, 0.001, 10 * DAY_S)
    return whole(name, value, 0, 10**12)


@dataclass(frozen=True, slots=True)
class Behaviour:
    """Behaviour of the emulator on valid requests.

    Delays are by kind (or `*`). An answer that is not streamed takes as long as if it were
    streamed. `concurrency` is by kind or `total`; a kind that is not listed has no bound. `answer`
    replaces the text of every text answer. `classifier_answer` is the value to choose from an enum
    (a string) or the whole JSON answer (an object). `account` counts as a provider does, besides
    `concurrency` and `rates`. `batches` is the pace of the providers' batch APIs, `flex` that of
    their flex tier. `works_on`: a call whose client has disconnected continues, and counts, as at
    hosted providers; otherwise it is aborted. `gpu`: the emulator is a self-hosted GPU server
    instead of the providers, with its own pace and limits.
    """

    first_byte_ms: Mapping[str, Distribution] = field(default_factory=dict)
    between_ms: Mapping[str, Distribution] = field(default_factory=dict)
    chunks: int = 4
    concurrency: Mapping[str, int] = field(default_factory=dict)
    rates: tuple[RateLimit, ...] = ()
    answer: str | None = None
    classifier_answer: str | Mapping[str, Any] | None = None
    image_size: int = 512
    file_processing_ms: int = 50
    strict_models: bool = False
    works_on: bool = False
    account: AccountSpec | None = None
    batches: BatchPace = field(default_factory=BatchPace)
    flex: FlexPace = field(default_factory=FlexPace)
    gpu: GpuSpec | None = None

    def first_byte(self, kind: str) -> Distribution:
        return _of_kind(self.first_byte_ms, kind)

    def between(self, kind: str) -> Distribution:
        return _of_kind(self.between_ms, kind)

    def changed(self, changes: Mapping[str, Any]) -> Self:
        """Return a new behaviour with the given fields replaced. Raises InvalidRequest, changing
        none."""
        return replace(self, **{name: _sound(name, value) for name, value in changes.items()})

    def to_json(self) -> dict[str, Any]:
        values: dict[str, Any] = {item.name: getattr(self, item.name) for item in fields(self)}
        for name in ("first_byte_ms", "between_ms"):
            values[name] = {kind: value.to_json() for kind, value in values[name].items()}
        values["account"] = None if self.account is None else self.account.to_json()
        values["batches"] = self.batches.to_json()
        values["flex"] = self.flex.to_json()
        values["gpu"] = None if self.gpu is None else asdict(self.gpu)
        return values


def _of_kind(table: Mapping[str, Distribution], kind: str) -> Distribution:
    found = table.get(kind) or (table.get(EVERY) if kind != "other" else None)
    return found or Distribution()


def _sound(name: str, value: Any) -> Any:
    """Return the checked value of a field of `Behaviour`, from JSON or Python."""
    match name:
        case "first_byte_ms" | "between_ms":
            named = isinstance(value, Mapping) and not value.keys() & {"uniform", "lognormal"}
            table = value if named else {EVERY: value}
            known_fields(name, table, (*KINDS, EVERY))
            return {kind: Distribution.parse(name, item) for kind, item in table.items()}
        case "concurrency":
            if not isinstance(value, Mapping):
                raise InvalidRequest(name, "concurrency must be an object of kind: number")
            known_fields(name, value, (*KINDS, TOTAL))
            return {kind: whole(name, item, 0, 10**6) for kind, item in value.items()}
        case "rates" if isinstance(value, list | tuple):
            return tuple(RateLimit.parse(item) for item in value)
        case "chunks":
            return whole(name, value, 1, 1000)
        case "image_size":
            return whole(name, value, 1, 2048)
        case "file_processing_ms":
            return whole(name, value, 0, 600_000)
        case "answer" if value is None or isinstance(value, str):
            return value
        case "classifier_answer" if value is None or isinstance(value, str | Mapping):
            return value
        case "strict_models" | "works_on" if isinstance(value, bool):
            return value
        case "account":
            return AccountSpec.parse(value)
        case "batches":
            return BatchPace.parse(value)
        case "flex":
            return FlexPace.parse(value)
        case "gpu":
            return GpuSpec.parse(value)
    raise InvalidRequest(name, f"{value!r} is not a value of a behaviour {name!r}")


@dataclass(frozen=True, slots=True)
class EmulatorSettings:
    """The address and the initial state of an emulator. `faults` are as in `dialect.Fault.parse`.

    `log_size` bounds the call log: the oldest calls are dropped.
    """

    host: str = "127.0.0.1"
    port: int = 0
    behaviour: Behaviour = field(default_factory=Behaviour)
    faults: tuple[Mapping[str, Any], ...] = ()
    seed: int = 1
    log_size: int = 50_000
    max_body_bytes: int = 150_000_000
