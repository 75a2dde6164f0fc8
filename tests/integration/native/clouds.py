"""Azure, Vertex and Bedrock in front of the emulator: their paths, tokens and signatures, checked.

What is right goes on to the emulator as its own API has it; what is not is a 401 or a 400.
"""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import count
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web

AZURE_KEY = "key-of-the-azure-resource"
IDENTITY_SECRET = "secret-of-the-identity"
AWS_ID, AWS_SECRET, AWS_TOKEN = "AKIAEMULATED", "secret-of-aws", "session-of-aws"
PROJECT = "proj-1"
_GOOGLE = re.compile(
    rf"/(v1(?:beta1)?)/projects/{PROJECT}/locations/global/publishers/google/models/(.+)"
)
_CLAUDE = re.compile(
    rf"/v1/projects/{PROJECT}/locations/global/publishers/anthropic/models/([^:]+):(\w+)"
)
_DEPLOYMENT = re.compile(r"/openai/deployments/([^/]+)(/.+)")
_AUDIENCE = "https://oauth2.googleapis.com/token"
_SIGNED = re.compile(
    r"AWS4-HMAC-SHA256 Credential=(?P<id>\w+)/\d{8}/(?P<region>[\w-]+)/(?P<service>[\w-]+)"
    r"/aws4_request, SignedHeaders=(?P<names>[\w;-]+), Signature=(?P<signature>\w+)"
)


class Refuses(Exception):
    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


@dataclass
class Clouds:
    """`seen` are the requests that were right: path with query, and body. `token_error`: what the
    token endpoints answer instead of a token."""

    emulator: str
    public_key: str = ""
    url: str = ""
    seen: list[tuple[str, Any]] = field(default_factory=list)
    issued: set[str] = field(default_factory=set)
    token_error: int = 0
    lifetime_s: int = 3_600
    _numbers: Any = field(default_factory=count)

    def service_account(self, folder: Path) -> Path:
        """The file of an account that gets its tokens here."""
        from cryptography.hazmat.primitives.asymmetric import rsa
        from cryptography.hazmat.primitives.serialization import (
            Encoding,
            NoEncryption,
            PrivateFormat,
            PublicFormat,
        )

        key = rsa.generate_private_key(65537, 2048)
        private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        self.public_key = public.decode()
        path = folder / "account.json"
        account = {
            "type": "service_account",
            "project_id": PROJECT,
            "private_key_id": "1",
            "private_key": private.decode(),
            "client_email": "gateway@proj-1.iam.gserviceaccount.com",
            "token_uri": f"{self.url}/token",
        }
        path.write_text(json.dumps(account))
        return path

    async def serve(self, request: web.BaseRequest) -> web.StreamResponse:
        try:
            if request.path == "/token":
                return await self._google_token(request)
            if request.path == "/msi":
                return self._identity_token(request)
            if request.path == "/sts":
                return self._role_session()
            body = await request.read()
            target, headers, passed = self._understood(request, body)
        except Refuses as refused:
            error = {"error": {"code": refused.status, "message": str(refused)}}
            return web.json_response(error, status=refused.status)
        self.seen.append((request.raw_path, json.loads(body) if body else None))
        return await self._pass_on(request, target, headers, passed)

    def _new_token(self) -> str:
        if self.token_error:
            raise Refuses(self.token_error, "no token today")
        token = f"ya29.{next(self._numbers)}-of-the-cloud"
        self.issued.add(token)
        return token

    async def _google_token(self, request: web.BaseRequest) -> web.Response:
        from google.auth import jwt

        form = await request.post()
        assertion = str(form["assertion"])
        read = jwt.decode
        read(assertion, certs=self.public_key, audience=_AUDIENCE)  # type: ignore[no-untyped-call]
        token = self._new_token()
        return web.json_response({"access_token": token, "expires_in": self.lifetime_s})

    def _identity_token(self, request: web.BaseRequest) -> web.Response:
        if request.headers.get("X-IDENTITY-HEADER") != IDENTITY_SECRET:
            raise Refuses(401, "not this identity")
        ends = datetime.now(UTC) + timedelta(seconds=self.lifetime_s)
        answer = {
            "access_token": self._new_token(),
            "expires_on": str(int(ends.timestamp())),
            "resource": request.query["resource"],
            "token_type": "Bearer",
        }
        return web.json_response(answer)

    def _role_session(self) -> web.Response:
        if self.token_error:
            refused = "<Error><Code>AccessDenied</Code><Message>not your role</Message></Error>"
            body = f"<ErrorResponse>{refused}</ErrorResponse>"
            return web.Response(text=body, status=self.token_error, content_type="text/xml")
        ends = datetime.now(UTC) + timedelta(seconds=self.lifetime_s)
        body = (
            "<R><AssumeRoleWithWebIdentityResult><Credentials>"
            f"<AccessKeyId>{AWS_ID}</AccessKeyId><SecretAccessKey>{AWS_SECRET}</SecretAccessKey>"
            f"<SessionToken>{AWS_TOKEN}</SessionToken>"
            f"<Expiration>{ends:%Y-%m-%dT%H:%M:%SZ}</Expiration>"
            "</Credentials></AssumeRoleWithWebIdentityResult></R>"
        )
        return web.Response(text=body, content_type="text/xml")

    def _understood(
        self, request: web.BaseRequest, body: bytes
    ) -> tuple[str, dict[str, str], bytes]:
        path = request.path
        if (named := _DEPLOYMENT.fullmatch(path)) is not None:
            if request.headers.get("api-key") != AZURE_KEY or "Authorization" in request.headers:
                raise Refuses(401, "Access denied due to invalid subscription key")
            if "api-version" not in request.query:
                raise Refuses(404, "Resource not found")
            return f"/v1{named[2]}", {"Authorization": "Bearer k"}, body
        if path.startswith("/model/"):
            self._check_signature(request, body)
            return request.raw_path, {"Authorization": "Bearer k"}, body
        if path.startswith("/openai/v1/"):
            if request.headers.get("Authorization", "").startswith("AWS4"):
                self._check_signature(request, body)
            else:
                self._check_token(request)
            return path.removeprefix("/openai"), {"Authorization": "Bearer k"}, body
        self._check_token(request)
        if (model := _GOOGLE.fullmatch(path)) is not None:
            return f"/v1beta/models/{model[2]}", {"x-goog-api-key": "k"}, body
        if (model := _CLAUDE.fullmatch(path)) is not None:
            asked = json.loads(body)
            if not asked.pop("anthropic_version", "") or "model" in asked:
                raise Refuses(400, "anthropic_version: Field required; model: not permitted")
            if bool(asked.get("stream")) != (model[2] == "streamRawPredict"):
                raise Refuses(400, "stream does not fit the path")
            headers = {"x-api-key": "k", "anthropic-version": "2023-06-01"}
            return "/v1/messages", headers, json.dumps({"model": model[1], **asked}).encode()
        raise Refuses(404, f"no such path: {path}")

    def _check_token(self, request: web.BaseRequest) -> None:
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        if scheme != "Bearer" or token not in self.issued:
            raise Refuses(401, "Request had invalid authentication credentials")

    def _check_signature(self, request: web.BaseRequest, body: bytes) -> None:
        from botocore.auth import SigV4Auth
        from botocore.awsrequest import AWSRequest
        from botocore.credentials import Credentials

        if (said := _SIGNED.fullmatch(request.headers["Authorization"])) is None:
            raise Refuses(401, "no signature")
        known = SigV4Auth(
            Credentials(AWS_ID, AWS_SECRET, AWS_TOKEN), said["service"], said["region"]
        )
        headers = {name: request.headers[name] for name in said["names"].split(";")}
        signed = AWSRequest(request.method, str(request.url), headers, body)
        signed.context["timestamp"] = request.headers["X-Amz-Date"]
        text = known.string_to_sign(signed, known.canonical_request(signed))
        is_right = known.signature(text, signed) == said["signature"] and said["id"] == AWS_ID
        is_whole = {"host", "x-amz-date", "x-amz-security-token"} <= headers.keys()
        if not (is_right and is_whole and said["service"] == "bedrock"):
            raise Refuses(403, "The request signature we calculated does not match")

    async def _pass_on(
        self, request: web.BaseRequest, target: str, headers: dict[str, str], body: bytes
    ) -> web.StreamResponse:
        query = {name: value for name, value in request.query.items() if name != "api-version"}
        headers["Content-Type"] = "application/json"
        async with (
            aiohttp.ClientSession(self.emulator) as session,
            session.request(
                request.method, target, params=query, headers=headers, data=body
            ) as answer,
        ):
            out = web.StreamResponse(status=answer.status)
            out.content_type = answer.content_type
            await out.prepare(request)
            async for piece in answer.content.iter_any():
                await out.write(piece)
            await out.write_eof()
            return out


@asynccontextmanager
async def run_clouds(emulator: str) -> AsyncIterator[Clouds]:
    clouds = Clouds(emulator)
    handler: Callable[..., Any] = clouds.serve
    runner = web.ServerRunner(web.Server(handler))
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    clouds.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield clouds
    finally:
        await runner.cleanup()
