"""Which requests may come from a web page of somebody else."""

from __future__ import annotations

import pytest

from tidegate.http.browsers import Origins
from tidegate.settings import Config

LOCAL = Origins(Config())
NAMED = Origins(Config(allowed_hosts=("gate.example", "other.example")))
OPEN = Origins(
    Config(host="0.0.0.0", auth="off", tidegate_demo=True, allowed_hosts=("gate.example",))
)
OWN = "localhost:8000"
LINK = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate", "sec-fetch-dest": "document"}


def refused(origins: Origins, method: str = "POST", **headers: str) -> str | None:
    """The field that is refused."""
    raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    error = origins.refusal(raw, method)
    return None if error is None else error.field


@pytest.mark.parametrize(
    "host",
    ["localhost", "LOCALHOST:8000", "127.0.0.1:8000", "127.9.9.9", "[::1]:8000", "a.localhost"],
)
def test_programs_of_this_machine_are_answered(host: str) -> None:
    assert refused(LOCAL, host=host) is None
    assert refused(LOCAL, host=host) is None  # and again, from what was remembered


@pytest.mark.parametrize(
    "host",
    [
        *("evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost.evil.example"),
        *("", "a b", "localhost@evil.example", "localhost/evil", "10.0.0.1", "gateway", "[::1"),
        *("evil.example#localhost", "localhost:port", "\xff", "x" * 5_000),
    ],
)
def test_a_name_that_was_made_to_lead_here_is_refused(host: str) -> None:
    assert refused(LOCAL, host=host) == "Host"
    raw = [(b"host", b"localhost"), (b"host", host.encode())]
    assert LOCAL.refusal(raw, "GET") is not None


def test_further_names_are_those_of_the_setting() -> None:
    for host in ("gate.example", "GATE.example:443", "gate.example.", "other.example"):
        assert refused(NAMED, host=host) is None, host
    assert refused(NAMED, host="a.gate.example") == "Host"


def test_on_an_address_of_the_network_no_public_name_leads_here() -> None:
    for host in (
        "10.0.0.1:8000",
        "[fd00::1]",
        "gateway",
        "tidegate:8000",
        "gate.example",
        "0.0.0.0",
    ):
        assert refused(OPEN, host=host) is None, host
    for host in ("evil.example", "gateway.evil.example", ""):
        assert refused(OPEN, host=host) == "Host", host


@pytest.mark.parametrize("site", ["cross-site", "same-site", "", "anything"])
def test_what_a_browser_sends_for_another_site_is_refused(site: str) -> None:
    assert refused(LOCAL, host=OWN, sec_fetch_site=site) == "Sec-Fetch-Site"
    for one in ("same-origin", "none"):
        assert refused(LOCAL, host=OWN, sec_fetch_site=one) is None


@pytest.mark.parametrize(
    "origin",
    [
        *("null", "http://evil.example", "http://localhost", "http://localhost:9999", ""),
        *("http://localhost:8000.evil.example", "http://[::1", "localhost:8000", "\xff"),
    ],
)
def test_pages_of_other_origins_are_refused_whatever_they_are_called(origin: str) -> None:
    assert refused(LOCAL, host=OWN, origin=origin) == "Origin"
    assert refused(LOCAL, host=OWN, origin=origin, sec_fetch_site="same-origin") == "Origin"


def test_our_own_pages_are_answered_behind_a_proxy_that_changes_host_too() -> None:
    assert refused(LOCAL, host=OWN, origin="http://localhost:8000") is None
    assert refused(NAMED, host=OWN, origin="https://gate.example") is None
    assert refused(NAMED, host=OWN, origin="https://gate.example:8443") == "Origin"
    assert refused(LOCAL, host=OWN, origin="https://gate.example") == "Origin"


def test_a_link_may_be_followed_and_nothing_may_be_framed_or_posted() -> None:
    def sent(method: str, **changed: str) -> str | None:
        raw = [(name.encode(), value.encode()) for name, value in (LINK | changed).items()]
        error = LOCAL.refusal([*raw, (b"host", OWN.encode())], method)
        return None if error is None else error.field

    assert sent("GET") is None
    assert sent("POST") == "Sec-Fetch-Site"
    assert sent("GET", **{"sec-fetch-dest": "iframe"}) == "Sec-Fetch-Site"
    assert sent("GET", **{"sec-fetch-mode": "no-cors"}) == "Sec-Fetch-Site"


def test_what_is_remembered_of_hosts_is_bounded() -> None:
    origins = Origins(Config())
    for number in range(1_000):
        assert refused(origins, host=f"h{number}.localhost") is None
    assert len(origins._known) <= 200
