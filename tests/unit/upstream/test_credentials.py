"""Credentials that are renewed: ahead of their end, kept through failures, never used after it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from tidegate.errors import UpstreamUnauthorized
from tidegate.policy.access import Authentication
from tidegate.upstream.credentials import (
    AwsSource,
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


AWS = Authentication(
    "aws",
    options=(("region", "eu-west-1"), ("aws_profile", "team"), ("aws_service", "bedrock")),
)


def _clear_aws(monkeypatch: pytest.MonkeyPatch, files: Mapping[str, Path]) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    for name, file in files.items():
        monkeypatch.setenv(name, str(file))


def test_keys_that_replace_others_in_awss_file_are_used_without_a_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "credentials"
    _clear_aws(
        monkeypatch,
        {"AWS_SHARED_CREDENTIALS_FILE": file, "AWS_CONFIG_FILE": tmp_path / "config"},
    )
    source, used = AwsSource(AWS), []
    for key in ("AKIAFIRST", "AKIASECOND"):
        file.write_text(f"[team]\naws_access_key_id = {key}\naws_secret_access_key = s\n")
        used.append(source.read().credentials.access_key)
    assert used == ["AKIAFIRST", "AKIASECOND"]
    file.unlink()
    with pytest.raises(CredentialsUnavailable):
        source.read()
    file.write_text("[team]\naws_access_key_id = AKIATHIRD\naws_secret_access_key = s\n")
    assert source.read().credentials.access_key == "AKIATHIRD"


def test_credentials_that_aws_limits_in_time_are_not_requested_at_every_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends = (datetime.now(UTC) + timedelta(hours=1)).isoformat()
    made = {"Version": 1, "AccessKeyId": "AKIA", "SecretAccessKey": "s", "Expiration": ends}
    answer, asked, config = tmp_path / "answer", tmp_path / "asked", tmp_path / "config"
    answer.write_text(json.dumps(made | {"SessionToken": "t"}))
    command = tmp_path / "command"
    command.write_text(f"#!/bin/sh\necho asked >> {asked}\ncat {answer}\n")
    command.chmod(0o700)
    config.write_text(f"[profile team]\ncredential_process = {command}\n")
    _clear_aws(
        monkeypatch,
        {"AWS_SHARED_CREDENTIALS_FILE": tmp_path / "none", "AWS_CONFIG_FILE": config},
    )
    source = AwsSource(AWS)
    assert {source.read().credentials.token for _ in range(3)} == {"t"}
    assert asked.read_text() == "asked\n"
