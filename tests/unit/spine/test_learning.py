"""Readings of limits from headers in each provider's spelling, as the emulator sends them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from random import Random
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tidegate.emulator.account import AccountLimit, LimitReading
from tidegate.emulator.counting import counter_of
from tidegate.emulator.rate_limits import rate_limit_headers
from tidegate.policy.account import AccountUse
from tidegate.policy.format import of_plain
from tidegate.policy.imported import acceptance
from tidegate.policy.learned import HeaderReading, LearnedNote, LimitMatch, learned_limits
from tidegate.spine.learning import Announced, HeaderReader

NOW_S = 1_800_000_000


def read(family: Any, provider: str, *limits: tuple[str, int, float]) -> dict[str, tuple[int, int]]:
    """By scope the bound and what remains, of limits `(unit, bound, window_s)` of which a tenth is
    used."""
    views = [
        LimitReading(
            AccountLimit(unit, bound, window_s=window_s),  # type: ignore[arg-type]
            bound,
            bound - bound // 10,
            round(window_s * 1e8),
            0,
        )
        for unit, bound, window_s in limits
    ]
    headers = rate_limit_headers(family, views, NOW_S * 10**9)
    announced = Announced(clock=lambda: float(NOW_S))
    announced.note("m", [(name.encode(), value.encode()) for name, value in headers.items()])
    return {
        one.scope: (one.bound, one.remaining or 0)
        for one in HeaderReader(provider).read(announced.all())
    }


@pytest.mark.parametrize(
    ("family", "provider", "limits", "found"),
    [
        (
            "openai",
            "openai",
            [("requests", 500, 60.0), ("tokens", 30_000, 60.0)],
            {"rpm": (500, 450), "tpm": (30_000, 27_000)},
        ),
        # Its `tokens` are those of input and output together.
        (
            "anthropic",
            "anthropic",
            [
                ("requests", 50, 60.0),
                ("uncached_input_tokens", 40_000, 60.0),
                ("output_tokens", 10_000, 60.0),
            ],
            {"rpm": (50, 45), "itpm": (40_000, 36_000), "otpm": (10_000, 9_000)},
        ),
        # The header counts ten seconds' worth.
        ("azure", "azure", [("requests", 120, 10.0)], {"rpm": (120, 108)}),
        # Its requests are a day's, also where only the time until they are unused says so.
        ("groq", "groq", [("requests", 14_400, 86_400.0)], {"rpd": (14_400, 12_960)}),
        ("groq", "", [("requests", 14_400, 86_400.0)], {"rpd": (14_400, 12_960)}),
        ("groq", "groq", [("tokens", 12_000, 60.0)], {"tpm": (12_000, 10_800)}),
        (
            "mistral",
            "",
            [("requests", 60, 60.0), ("tokens", 500_000, 60.0)],
            {"rpm": (60, 54), "tpm": (500_000, 450_000)},
        ),
        (
            "cerebras",
            "",
            [("requests", 14_400, 86_400.0), ("tokens", 60_000, 60.0)],
            {"rpd": (14_400, 12_960), "tpm": (60_000, 54_000)},
        ),
        ("openrouter", "", [("requests", 20, 60.0)], {"rpm": (20, 18)}),
        ("together", "together", [("requests", 20, 1.0)], {"rps": (20, 18)}),
        ("none", "gemini", [("requests", 20, 60.0)], {}),
    ],
)
def test_headers_are_read_as_limits_of_a_policy(
    family: str, provider: str, limits: list[Any], found: dict[str, Any]
) -> None:
    assert read(family, provider, *limits) == found


SCOPES = {60: "rpm", 3_600: "rph", 86_400: "rpd"}
WINDOWS = [*SCOPES]
UNNAMED = ["openai", "azure", "openrouter", "together"]
MODES = ["fixed_window", "sliding_window", "token_bucket"]


class Server:
    """A provider with one limit of requests, counted from a moment of its own, and one client."""

    def __init__(
        self,
        family: Any,
        mode: Any,
        window_s: int,
        bound: int,
        phase_s: float,
        provider: str = "",
        unit: Any = "requests",
    ) -> None:
        self.family, self.bound, self.phase_s = family, bound, phase_s
        self.limit = AccountLimit(unit, bound, window_s=float(window_s), mode=mode)
        self.counter = counter_of(mode, bound, window_s * 10**9)
        self.now_s = float(NOW_S)
        self.announced = Announced(clock=lambda: self.now_s)
        self.reader = HeaderReader(provider)

    def answer(self, after_s: float, calls: int, late_s: float = 0.0) -> str | None:
        """The scope that is read, see `read`."""
        found = self.read(after_s, calls, late_s)
        return found.scope if found else None

    def read(self, after_s: float, calls: int, late_s: float = 0.0) -> HeaderReading | None:
        """What is read after some more calls, of the last of which the client sees the answer;
        `late_s` on its way."""
        self.now_s += after_s
        now_ns = round((self.now_s + self.phase_s) * 1e9)
        self.counter.take(min(calls, self.counter.remaining(now_ns)), now_ns)
        self.resets_s = self.counter.full_ns(now_ns) / 1e9
        remaining = self.counter.remaining(now_ns)
        view = LimitReading(self.limit, self.bound, remaining, self.counter.full_ns(now_ns), 1)
        headers = rate_limit_headers(self.family, [view], round(self.now_s * 1e9))
        self.now_s += late_s
        self.announced.note("m", [(name.encode(), each.encode()) for name, each in headers.items()])
        found = self.reader.read(self.announced.all())
        return found[0] if found else None


@settings(derandomize=True)
@given(
    family=st.sampled_from(UNNAMED),
    mode=st.sampled_from(MODES),
    window_s=st.sampled_from(WINDOWS),
    bound=st.one_of(st.integers(20, 5_000), st.integers(5_000, 10_000_000)),
    phase_s=st.floats(0, 86_400),
    traffic=st.lists(
        st.tuples(
            st.floats(0.1, 40.0), st.floats(0, 1).map(lambda share: share**6), st.floats(0, 0.4)
        ),
        min_size=1,
        max_size=40,
    ),
)
def test_no_limit_is_read_as_one_of_another_window(
    family: str, mode: str, window_s: int, bound: int, phase_s: float, traffic: list[Any]
) -> None:
    server = Server(family, mode, window_s, bound, phase_s)
    read = []
    for after_s, share, late_s in traffic:
        read.append(server.answer(after_s, max(1, round(share * bound / 4)), late_s))
        # At first, a longer window that ends within a minute is like one of a minute. A reset that
        # is rounded off says nothing, nor does a moment that is over on the way.
        if window_s > 60 and mode == "fixed_window" and len(read) == 1:
            assume(server.resets_s > 63)
        if window_s > 60 and mode == "token_bucket":
            assume(server.resets_s > (0.005 if family == "openai" else 2))
    assert {*read} <= {None, SCOPES[window_s]}, read


@pytest.mark.parametrize("family", UNNAMED)
@pytest.mark.parametrize("window_s", [60, 86_400])
@pytest.mark.parametrize("mode", MODES)
def test_a_window_is_known_after_a_while_whatever_it_is(
    family: str, mode: str, window_s: int
) -> None:
    for phase_s in range(0, 86_400, 17_711):
        server = Server(family, mode, window_s, 14_400, phase_s)
        read = [server.answer(after_s, 1) for after_s in (*[2.0] * 50, *[40.0] * 90)]
        assert read[-1] == SCOPES[window_s], (phase_s, read)


@pytest.mark.parametrize("provider", ["azure", ""])
@pytest.mark.parametrize("window_s", [10, 60])
def test_the_bound_of_a_window_that_begins_again_is_its_own(provider: str, window_s: int) -> None:
    limits = {"rpm:m": {"bound": 50_000, "window_ms": window_s * 1_000}}
    match = LimitMatch(of_plain({"limits": limits}), provider)
    server = Server("azure", "fixed_window", window_s, 100_000, 3.0, provider)
    bounds = []
    for second in range(300):
        reading = server.read(1.0, 20_000 if second % window_s == 0 else 100)
        if reading is not None and second >= 3 * window_s:
            bounds.append(match.bound_for(reading, "rpm:m"))
    assert {*bounds} == {100_000}


@pytest.mark.parametrize("bound", [8_000, 30_000, 400_000])
@pytest.mark.parametrize("overdrawn", [False, True])
def test_a_bucket_that_is_told_in_thousands_is_taken_for_no_window(
    bound: int, overdrawn: bool
) -> None:
    """Anthropic rounds what remains of tokens to thousands, and its resets to seconds."""
    random = Random(bound)
    server = Server("anthropic", "token_bucket", 60, bound, 0.0, "anthropic", "output_tokens")
    for _ in range(400):
        after_s = random.uniform(1.0, 2.0)
        took = bound / 60 * after_s * random.uniform(0.5, 1.6 if overdrawn else 1.4)
        if overdrawn:  # output is known at its end, when it may be more than what remains
            server.counter.take(round(took), round(server.now_s * 1e9))
        reading = server.read(after_s, 0 if overdrawn else round(took))
        assert reading is None or reading.reset_ms is None


@pytest.mark.parametrize("ahead_s", [-3_600, -5, 0, 5, 120, 4_000])
def test_moments_are_read_by_the_providers_clock(ahead_s: int) -> None:
    now_s = float(NOW_S)
    announced, reader = Announced(clock=lambda: now_s), HeaderReader("anthropic")
    for remaining in (20, 49, 1, 30):
        now_s += 7.0
        there = datetime.fromtimestamp(now_s + ahead_s, UTC)
        resets = there + timedelta(seconds=(50 - remaining) * 60 / 50)
        headers = {
            "Date": format_datetime(there, usegmt=True),
            "anthropic-ratelimit-requests-limit": "50",
            "anthropic-ratelimit-requests-remaining": str(remaining),
            "anthropic-ratelimit-requests-reset": resets.isoformat(),
        }
        announced.note("m", [(name.encode(), each.encode()) for name, each in headers.items()])
        (reading,) = reader.read(announced.all())
        assert reading.scope == "rpm"
        assert reading.window_ms == pytest.approx(60_000)


@pytest.mark.parametrize("model", ["*", "a,b", "total", "tenant/acme", "kind/text_only"])
def test_a_model_that_is_called_as_others_are_teaches_no_limit_of_them(model: str) -> None:
    announced = Announced(clock=lambda: float(NOW_S))
    announced.note(model, [(b"x-ratelimit-limit-requests", b"5")])
    announced.note("models/m", [(b"x-ratelimit-limit-requests", b"6")])
    (reading,) = HeaderReader("openai").read(announced.all())
    assert (reading.model, reading.bound) == ("m", 6)


@pytest.mark.parametrize("model", ["gpt 5", "gpt-5|x", "gpt-5{x}", "gpt-5\t", "x" * 201])
def test_a_model_that_no_id_can_name_keeps_no_other_from_being_learned(model: str) -> None:
    announced = Announced(clock=lambda: float(NOW_S))
    for name in (model, "m"):
        announced.note(name, [(b"x-ratelimit-limit-requests", b"5")])
    note = LearnedNote(tuple(HeaderReader("openai").read(announced.all())))
    nothing = of_plain({"limits": {}})
    change = acceptance(learned_limits([note], LimitMatch(nothing, "openai")), [], "openai")
    assert list(of_plain(change({"limits": {}})).limits) == ["rpm:m"]


def test_a_bound_that_no_limit_can_have_hides_no_other_of_the_same_answer() -> None:
    announced = Announced(clock=lambda: float(NOW_S))
    headers = {"x-ratelimit-limit-requests": "500", "x-ratelimit-limit-tokens": "999999999999999"}
    announced.note("m", [(name.encode(), value.encode()) for name, value in headers.items()])
    readings = HeaderReader("openai").read(announced.all())
    note, nothing = LearnedNote(tuple(readings)), of_plain({"limits": {}})
    change = acceptance(learned_limits([note], LimitMatch(nothing, "openai")), [], "openai")
    assert list(of_plain(change({"limits": {}})).limits) == ["rpm:m"]


@pytest.mark.parametrize("provider", ["openai", "azure"])
def test_more_than_all_that_remains_is_no_use_of_others(provider: str) -> None:
    """Of a header that tells a wrong number once, and of the next one."""
    now_s = float(NOW_S)
    announced, reader = Announced(clock=lambda: now_s), HeaderReader(provider)
    use = AccountUse(60.0, 60.5, refills=provider != "azure")
    charged = []
    for remaining in (b"999999999999999", *[b"60000"] * 30):
        now_s += 2.0
        told = {b"limit": b"60000", b"remaining": remaining, b"reset": b"30s"}
        announced.note("m", [(b"x-ratelimit-%s-tokens" % key, told[key]) for key in told])
        for reading in reader.read(announced.all()):
            use.read(reading)
        if provider == "azure":
            charged.append(use.due(now_s, 0, 60_000, 60_000, recent=0))
        else:
            charged.append(use.level_due(now_s, 0, 0, 60_000, 60_000))
    assert not any(charged)
