"""Commands on requests: what they refuse before they reach a deployment."""

from __future__ import annotations

from typing import cast

import pytest

from tests.unit.invoked import invoke
from tidegate.cli.client import GatewayClient
from tidegate.cli.submit import _whole_id, time_of
from tidegate.errors import ConfigError


@pytest.fixture(autouse=True)
def no_deployment(monkeypatch: pytest.MonkeyPatch) -> None:
    def reach(*_: object, **__: object) -> object:
        raise AssertionError("it reached for a deployment")

    monkeypatch.setattr("tidegate.cli.submit.with_gateway", reach)
    monkeypatch.setattr("tidegate.supervisor.maintenance.requeue", reach)


@pytest.mark.parametrize("text", ["0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-14:00"])
def test_a_time_that_is_in_no_year_of_utc_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--since=.*: must be in the years 1 to 9999 of UTC"):
        time_of("--since", text)
    assert time_of("--since", "2026-01-31T12:00+02:00").isoformat() == "2026-01-31T10:00:00+00:00"


@pytest.mark.parametrize("command", [("requeue", "--yes"), ("requests",)])
@pytest.mark.parametrize(
    ("since", "until"), [("1h", "2h"), ("2026-01-02", "2026-01-01"), ("2026-01-02", "2026-01-02")]
)
def test_times_that_leave_nothing_between_them_are_refused(
    command: tuple[str, ...], since: str, until: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        invoke(*command, "--since", since, "--until", until)
    assert (refused.value.variable, refused.value.value) == ("--until", until)
    assert refused.value.allowed == f"must be later than --since {since}"


def test_jobs_that_will_have_ended_can_not_be_queued_again() -> None:
    with pytest.raises(ConfigError, match="--since=9999-01-01: must be in the past"):
        invoke("requeue", "--since", "9999-01-01", "--yes")


@pytest.mark.parametrize("option", [("--output", "x"), ("--follow",)])
def test_an_option_that_needs_a_request_is_not_passed_over(option: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match=f"{option[0]} needs the id of a request"):
        invoke("status", *option)


@pytest.mark.parametrize("text", ["", "ab", "xyzw"])
async def test_a_text_that_is_no_part_of_an_id_is_refused_with_what_is(text: str) -> None:
    with pytest.raises(ConfigError, match="its beginning or end of 4 characters or more"):
        await _whole_id(cast("GatewayClient", None), text)
