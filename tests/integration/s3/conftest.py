"""A real server that speaks S3, and gateways that keep their files there."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest

from tests.gateway import open_gateway
from tests.integration.http_input.server import wait_for
from tidegate.embedded.servers import free_port

__all__ = ["open_gateway"]

BUCKET = "tidegate-test"
_KEY, _SECRET = "an-access-key", "a-secret"
_REGION = "eu-central-1"


class S3Server:
    """One moto server. It forgets everything when it stops, as no bucket does: see `restart`."""

    def __init__(self, folder: Path, **settings: str) -> None:
        self.port = free_port()
        self._log = folder / f"moto-{self.port}.log"
        self._settings = settings
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        command = [str(Path(sys.executable).with_name("moto_server")), "-H", "127.0.0.1"]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [*command, "-p", str(self.port)],
                env={**os.environ, **self._settings},
                stdout=log,
                stderr=log,
            )
        wait_for(self._answers, "S3", 30)

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait(10)
            self._process = None

    def _answers(self) -> bool:
        try:
            with urlopen(f"{self.url}/moto-api/", timeout=1):
                return True
        except OSError:
            return False

    def empty(self) -> None:
        """Nothing but the bucket."""
        with urlopen(Request(f"{self.url}/moto-api/reset", method="POST"), timeout=5):
            pass
        self.make_bucket()

    def make_bucket(self) -> None:
        where = {"LocationConstraint": _REGION}
        self._client().create_bucket(Bucket=BUCKET, CreateBucketConfiguration=where)

    def sizes(self) -> dict[str, int]:
        """What is in the bucket, with its size in bytes."""
        listed = self._client().list_objects_v2(Bucket=BUCKET)
        return {entry["Key"]: entry["Size"] for entry in listed.get("Contents", [])}

    def parts(self, key: str) -> int:
        """Of how many parts an object was sent."""
        tag = str(self._client().head_object(Bucket=BUCKET, Key=key)["ETag"]).strip('"')
        return int(tag.partition("-")[2] or 1)

    def _client(self) -> Any:
        import boto3  # 150 modules

        return boto3.client(
            "s3",
            endpoint_url=self.url,
            region_name=_REGION,
            aws_access_key_id=_KEY,
            aws_secret_access_key=_SECRET,
        )


@pytest.fixture(scope="session")
def shared_s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    server = S3Server(tmp_path_factory.mktemp("s3"))
    server.start()
    yield server
    server.stop()


@pytest.fixture
def s3(shared_s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """With an empty bucket, and the variables in place by which our process finds it."""
    shared_s3.empty()
    point_to(shared_s3, monkeypatch)
    return shared_s3


def point_to(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", _KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", _SECRET)
    monkeypatch.setenv("AWS_REGION", _REGION)
