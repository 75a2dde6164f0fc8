"""Bounds of calls that are not made yet: whether the budgets that bind one could ever admit it."""

from __future__ import annotations

from tidegate.dialects import DIALECTS
from tidegate.dialects.requests import skimmed
from tidegate.record import CallRecord
from tidegate.spine.native import NativeCall, NativeExchange, Relay
from tidegate.spine.out import NothingOut


def check_bounded(relay: Relay, call: NativeCall) -> None:
    """Raises BudgetUnbounded where making the call could raise nothing else; NotFound where no
    upstream serves it, InvalidRequest for a body that is none of its dialect."""
    spine, endpoint = relay.spine, call.endpoint
    read = skimmed(call.body)
    asked = DIALECTS[endpoint.dialect].request_facts(endpoint, read.body, read.whole)
    record = CallRecord("job", call.terms.caller.tenant_id, call.received_at)
    exchange = NativeExchange(
        relay.wire, spine.timeouts, call, read.body, asked, NothingOut(), record
    )
    targets = spine.targets.of(endpoint.dialect, asked.model)
    spine.check_bounded(exchange, targets, call.subject)
