"""Webhooks: signed notifications of finished requests, and alerts for operators.

Invariant: a receiver costs a bounded time, whatever it does; a webhook leaves the outbox only once
it was answered with 2xx, refused with 410, or tried for the last time.

Follows Standard Webhooks: https://github.com/standard-webhooks/standard-webhooks
"""

from __future__ import annotations

import asyncio
import hmac
import random
import time
from base64 import b64encode
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from hashlib import sha256
from typing import Any, Literal

import orjson

from tidegate.errors import ConfigError, NotFound, StoreUnavailable
from tidegate.metrics.verdict import Cause, CauseKind, DeploymentReading, Standing, causes_of
from tidegate.policy.tenants import webhook_keys
from tidegate.prices.budgets import budget_alert
from tidegate.record import answer_within
from tidegate.settings import Config
from tidegate.store.outbox import AlertDelivery, AlertOutbox, Delivery
from tidegate.store.records import RequestRecord, usage_columns
from tidegate.store.store import Store
from tidegate.telemetry.logging import Log, get_logger
from tidegate.upstream.fetch import GuardedPoster, Posted, is_public

MOST_AT_ONCE = 64
MOST_TEXT_CHARS = 100_000
_POLL_EVERY_S = 0.5
_LAST_ANSWERS_S = 1.0
_LEASE_FACTOR = 2
_GONE = 410
# Waits after each attempt but the last.
_WAITS_MS = (5_000, 30_000, 120_000, 600_000, 3_600_000, 21_600_000)
_JITTER = 0.2

log = get_logger()


class WebhookSender:
    """Delivers due webhooks, from one worker; any number of workers share the outbox."""

    def __init__(self, config: Config, store: Store) -> None:
        assert config.webhook_secret is not None
        self._secret = config.webhook_secret.get_secret_value()
        self._store = store
        self._lease_ms = _LEASE_FACTOR * config.webhook_timeout_ms
        private = config.webhook_allow_private
        self._poster = GuardedPoster(
            timeout_ms=config.webhook_timeout_ms,
            is_allowed=lambda address: private or is_public(address),
        )
        self._tasks: dict[asyncio.Task[None], str] = {}  # the tenant of each delivery

    async def run(self) -> None:
        """Deliver until cancelled; deliveries in progress then have a second to be answered."""
        try:
            while True:
                try:
                    await self._start_due()
                except StoreUnavailable:
                    pass  # the store logs its change of state
                except Exception:  # the top of a task: logged, and the loop continues
                    log.exception(Log.WORKER_LOOP_FAILED)
                await asyncio.sleep(_POLL_EVERY_S)
        finally:
            if self._tasks:
                await asyncio.wait(set(self._tasks), timeout=_LAST_ANSWERS_S)
            for task in self._tasks:
                task.cancel()

    async def _start_due(self) -> None:
        """Claim and start due deliveries while there are more and slots are free. A tenant gets at
        most half of the slots that others leave, so that an unresponsive receiver delays no other
        tenant."""
        while (free := MOST_AT_ONCE - len(self._tasks)) > 0:
            own = Counter(self._tasks.values())
            left = {tenant: (free + count + 1) // 2 - count for tenant, count in own.items()}
            full = [tenant for tenant, room in left.items() if room <= 0]
            # The smallest share, since one claim may consist of one tenant's deliveries.
            most = min([(free + 1) // 2, *(room for room in left.values() if room > 0)])
            due = await self._store.outbox.claim(most, self._lease_ms, but_of=full)
            for delivery in due:
                task = asyncio.create_task(self._deliver(delivery))
                self._tasks[task] = delivery.tenant_id
                task.add_done_callback(self._tasks.pop)
            if len(due) < most:
                return

    async def _deliver(self, delivery: Delivery) -> None:
        # After any failure here, the webhook is due again when its claim expires.
        try:
            record = await self._store.requests.get(delivery.request_id, delivery.tenant_id)
            last = None if record.webhook is None else record.webhook.webhook_id
            if record.status != delivery.status or last != delivery.webhook_id:
                record = await self._store.outbox.end_of(delivery, record)
            body = payload(delivery, record)
            headers, whose = self._headers(delivery, body), delivery.tenant_id
            answer = await self._poster.post(delivery.url, body, headers, whose)
            await self._settle(delivery, answer)
        except (NotFound, StoreUnavailable):
            return
        except Exception:  # the top of a task: logged, and due again when its claim is over
            log.exception(Log.INTERNAL_ERROR, request_id=str(delivery.request_id))

    def _headers(self, delivery: Delivery, body: bytes) -> dict[str, str]:
        webhook_id, sent_at = str(delivery.webhook_id), int(time.time())
        keys = webhook_keys(self._secret, delivery.tenant_id)
        return {
            "Content-Type": "application/json",
            "webhook-id": webhook_id,
            "webhook-timestamp": str(sent_at),
            "webhook-signature": signature(keys, webhook_id, sent_at, body),
        }

    async def _settle(self, delivery: Delivery, answer: Posted) -> None:
        outbox, status = self._store.outbox, answer.status
        if status is not None and 200 <= status < 300:
            await outbox.settle(delivery, "delivered", answer_status=status)
            return
        problem = answer.problem or f"webhook_url answered with status {status}"
        wait_ms = _wait_ms(delivery.tries, answer)
        if wait_ms is None:
            log.warning(
                Log.WEBHOOK_GIVEN_UP,
                webhook_id=str(delivery.webhook_id),
                request_id=str(delivery.request_id),
                tries=delivery.tries,
                reason=problem,
            )
        await outbox.settle(
            delivery,
            "given_up" if wait_ms is None else "pending",
            answer_status=status,
            problem=problem,
            due_in_ms=wait_ms or 0,
        )


def signature(keys: Sequence[bytes], webhook_id: str, sent_at: int, body: bytes) -> str:
    """Return the value of `webhook-signature`: HMAC-SHA256 of `id.timestamp.body`, by each of the
    keys."""
    signed = b"%b.%d.%b" % (webhook_id.encode(), sent_at, body)
    digests = (b64encode(hmac.digest(key, signed, sha256)).decode() for key in keys)
    return " ".join(f"v1,{one}" for one in digests)


def payload(delivery: Delivery, record: RequestRecord) -> bytes:
    """Return the body: the event, and the request as it ended, without images and long texts."""
    failure = record.failure
    data: dict[str, Any] = {
        "request_id": record.request_id,
        "status": record.status,
        "type": record.classification.kind,
        "model": record.model,
        "attempts": record.attempts,
        "submitted_at": record.created_at,
        "finished_at": record.finished_at,
        **_answer_of(record),
        "finish_reason": record.finish_reason,
        "usage": usage_columns(record.usage),
        "error": None
        if failure is None
        else {"code": failure.code, "message": failure.message, "retryable": failure.retryable},
        "status_url": f"/status/{record.request_id}",
    }
    event = {
        "type": delivery.event,
        "timestamp": record.finished_at,
        "data": {name: value for name, value in data.items() if value is not None},
    }
    return orjson.dumps(event, option=orjson.OPT_UTC_Z)


def webhook_wait_ms(tries: int, rng: random.Random | None = None) -> int | None:
    """Return the milliseconds until the next attempt, None for no further one.

    `tries` counts the attempts made. Jitter spreads the webhooks that accumulated in an outage.
    """
    if tries > len(_WAITS_MS):
        return None
    spread = (rng or random).uniform(1 - _JITTER, 1 + _JITTER)
    return round(_WAITS_MS[tries - 1] * spread)


def _wait_ms(tries: int, answer: Posted) -> int | None:
    """Return the wait after an answer: at least the receiver's `Retry-After`, up to the longest of
    the configured waits."""
    wait_ms = None if answer.status == _GONE else webhook_wait_ms(tries)
    return None if wait_ms is None else max(wait_ms, min(answer.retry_after_ms, _WAITS_MS[-1]))


def _answer_of(record: RequestRecord) -> dict[str, Any]:
    """Return the answer as the status shows it; nothing for a long one, which the status has."""
    text = record.text
    if text is None or len(text) > MOST_TEXT_CHARS:
        return {}
    if record.endpoint is None:
        return {"text": text}
    return {"answer": answer_within(text)}


_ALERTS_AT_ONCE = 8
_ALERTS_EVERY_S = 1.0


class AlertSender:
    """Posts alerts to the operators' webhook, from one worker; any number of workers share the
    outbox.

    An alert is signed as a webhook, with the deployment's own secret, and retried as webhooks are
    until it is answered with 2xx.
    """

    def __init__(self, config: Config, store: Store) -> None:
        """Raises ConfigError."""
        assert config.alert_webhook_url is not None
        if config.webhook_secret is None and config.alert_format == "standard":
            raise ConfigError("WEBHOOK_SECRET", "(not set)", "must be set: it signs alerts")
        self._url = config.alert_webhook_url.get_secret_value()
        self._format = config.alert_format
        secret = config.webhook_secret
        self._keys = None if secret is None else webhook_keys(secret.get_secret_value())
        self._outbox = store.alerts
        self._lease_ms = _LEASE_FACTOR * config.webhook_timeout_ms
        # The operator names the address, which may be private.
        self._poster = GuardedPoster(
            config.webhook_timeout_ms, is_allowed=lambda _address: True, operators=True
        )

    async def run(self) -> None:
        """Post until cancelled."""
        while True:
            try:
                due = await self._outbox.claim(_ALERTS_AT_ONCE, self._lease_ms)
                await asyncio.gather(*(self._deliver(one) for one in due))
            except StoreUnavailable:
                due = []  # the store logs its change of state
            except Exception:  # the top of a task: logged, and the loop continues
                log.exception(Log.WORKER_LOOP_FAILED)
                due = []
            if not due:
                await asyncio.sleep(_ALERTS_EVERY_S)

    async def _deliver(self, delivery: AlertDelivery) -> None:
        body = alert_payload(delivery, self._format)
        answer = await self._poster.post(self._url, body, self._headers(delivery, body))
        status = answer.status
        if status is not None and 200 <= status < 300:
            await self._outbox.settle(delivery, "delivered")
            return
        problem = answer.problem or f"answered with status {status}"
        problem = problem.replace("webhook_url", "ALERT_WEBHOOK_URL")
        wait_ms = _wait_ms(delivery.tries, answer)
        if wait_ms is None:
            log.warning(
                Log.WEBHOOK_GIVEN_UP,
                webhook_id=str(delivery.alert_id),
                tries=delivery.tries,
                reason=problem,
            )
        await self._outbox.settle(
            delivery,
            "given_up" if wait_ms is None else "pending",
            problem=problem,
            due_in_ms=wait_ms or 0,
        )

    def _headers(self, delivery: AlertDelivery, body: bytes) -> dict[str, str]:
        headers = {"Content-Type": "application/json"}
        if self._keys is not None:
            alert_id, sent_at = str(delivery.alert_id), int(time.time())
            headers |= {
                "webhook-id": alert_id,
                "webhook-timestamp": str(sent_at),
                "webhook-signature": signature(self._keys, alert_id, sent_at, body),
            }
        return headers


# Causes of the verdict that raise an alert; budget alerts are raised with the charges.
_ALERTED: frozenset[CauseKind] = frozenset(
    ("upstreams_out", "upstream_out", "key_refused", "limit_paused", "drift")
)
_CAUSES_EVERY_S = 5.0
_HELD_S = 10.0  # a problem that ends within this time is no alert
_FORGOTTEN_S = 60.0
_ALERT_AGAIN_AFTER_S = 600.0


class CauseAlerts:
    """Raises alerts of upstreams that are out or refuse their key, of paused limits and of drift:
    each after it has lasted some seconds, and again only after it was gone for ten minutes. Any
    number of workers may run."""

    def __init__(
        self,
        standing: Standing,
        outbox: AlertOutbox,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._standing = standing
        self._outbox = outbox
        self._clock = clock
        self._lasting: dict[tuple[str, str | None, str | None], tuple[float, float]] = {}

    async def run(self) -> None:
        """Check the causes until cancelled."""
        while True:
            try:
                lasting = self.lasting(alerted(await self._standing.look()))
                if lasting:
                    data = [(one.kind, _cause_data(one)) for one in lasting]
                    await self._outbox.hold(data, _ALERT_AGAIN_AFTER_S)
            except StoreUnavailable:
                pass  # the store logs its change of state
            except Exception:  # the top of a task: logged, and the loop continues
                log.exception(Log.WORKER_LOOP_FAILED)
            await asyncio.sleep(_CAUSES_EVERY_S)

    def lasting(self, causes: Iterable[Cause]) -> list[Cause]:
        """Return the causes that were first seen some seconds ago. A cause that comes and goes,
        such as of an upstream that is probed, counts as one."""
        now, found = self._clock(), []
        for one in causes:
            key = one.kind, one.pool, one.subject
            since, _ = self._lasting.get(key, (now, now))
            self._lasting[key] = since, now
            if now - since >= _HELD_S:
                found.append(one)
        self._lasting = {
            key: (since, last)
            for key, (since, last) in self._lasting.items()
            if now - last < _FORGOTTEN_S
        }
        return found


def alerted(deployment: DeploymentReading) -> Iterator[Cause]:
    """Yield the causes that raise an alert: no drain by a person, and no learned limit that had no
    bound before."""
    new = {
        (pool.pool, one.limit)
        for pool in deployment.pools
        for one in pool.learned
        if one.drift == "new"
    }
    for one in causes_of(deployment):
        is_problem = (
            (one.pool, one.subject) not in new if one.kind == "drift" else one.level != "healthy"
        )
        if one.kind in _ALERTED and is_problem:
            yield one


def _cause_data(cause: Cause) -> dict[str, Any]:
    """Return the alert without its detail, which quotes the provider and names callers."""
    text = f"{cause.words} Next: {cause.command}" if cause.command else cause.words
    return {"text": text, "pool": cause.pool, "subject": cause.subject, "command": cause.command}


def alert_payload(delivery: AlertDelivery, form: Literal["standard", "slack"]) -> bytes:
    """Return the body of an alert."""
    data = orjson.loads(delivery.data)
    if "budget" in data:
        data = budget_alert(delivery.kind, data, delivery.unit or "usd", delivery.fallback)
    data.pop("held_at", None)  # only for the next `AlertOutbox.hold`
    if form == "slack":
        return orjson.dumps({"text": _slack_text(data["text"])})
    event = {"type": delivery.kind, "timestamp": delivery.created_at, "data": data}
    return orjson.dumps(event, option=orjson.OPT_UTC_Z)


def _slack_text(text: str) -> str:
    """Escape text for Slack: it contains names that callers chose, such as a subject, which within
    `<...>` would be links and mentions (docs.slack.dev, "Formatting message text")."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
