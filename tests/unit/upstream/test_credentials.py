"""Credentials that are renewed: ahead of their end, kept through failures, never used after it."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from tidegate.errors import UpstreamUnauthorized
from tidegate.upstream.credentials import (
    BearerToken,
    CredentialsUnavailable,
    RenewedCredentials,
)
from tidegate.upstream.transport import RelayWire

PLACE = RelayWire.place("https://host/v1/x")


@dataclass
class Surroundings:
    """A source and the clock. fails: the source has nothing."""

    now: float = 1_000.0
    lifetime_s: float = 3_600.0
    fails: bool = False
    reads: list[float] = field(default_factory=list)

    def read(self) -> BearerToken:
        self.reads.append(self.now)
        if self.fails:
            raise CredentialsUnavailable("the token's server is away")
        return BearerToken(b"Bearer %d" % len(self.reads), self.now + self.lifetime_s)

    def clock(self) -> float:
        return self.now


def signed(credentials: RenewedCredentials) -> bytes:
    given = [(b"authorization", b"of-a-client"), (b"a", b"b")]
    rest, (name, value) = credentials.sign("POST", PLACE, given, b"{}")
    assert (rest, name) == ((b"a", b"b"), b"authorization")
    return value


async def test_a_token_is_renewed_ahead_and_survives_failures_until_its_end() -> None:
    around = Surroundings()
    credentials = RenewedCredentials(around, "google", around.clock)
    with pytest.raises(UpstreamUnauthorized) as none_yet:
        signed(credentials)
    assert none_yet.value.of_key, "as under a refused key"
    await credentials.renew()
    assert (signed(credentials), credentials.wait_s()) == (b"Bearer 1", 3_300.0)
    around.now, around.fails = 4_400.0, True
    waits = []
    for _ in range(8):
        await credentials.renew()
        waits.append(credentials.wait_s())
    assert waits == [1, 2, 4, 8, 16, 32, 60, 60]
    assert signed(credentials) == b"Bearer 1"
    around.now = 4_600.0
    with pytest.raises(UpstreamUnauthorized) as ended:
        signed(credentials)
    assert "away" not in ended.value.message, "the reason is for the log"
    around.fails = False
    await credentials.renew()
    assert signed(credentials) == b"Bearer 10"


async def test_a_short_token_is_renewed_at_half_of_its_life() -> None:
    around = Surroundings(lifetime_s=60.0)
    credentials = RenewedCredentials(around, "google", around.clock)
    await credentials.renew()
    assert credentials.wait_s() == 30.0
    assert "Bearer 2" not in repr(around.read())
