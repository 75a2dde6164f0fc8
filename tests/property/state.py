"""What a pool is in the model, in the words in which `dump.py` reads it from Valkey.

Everything that Lua counts has a place here, beside what the model derives.
"""

from __future__ import annotations

from dataclasses import astuple
from typing import Any

from tidegate.limiter.simulation import (
    BEHIND,
    BLOCKED,
    BandState,
    DueOrder,
    LimitState,
    Pacing,
    PauseGate,
    PoolModel,
    SessionQueue,
    write_charges,
)

State = dict[str, Any]


def _figures(band: BandState) -> tuple[int, ...]:
    order = (band.waits, band.virtual, band.credit)
    rate = (band.from_us, band.passed_us, band.held_at, band.used_at)
    return *order, *rate, band.taken, band.taken_before


def of_model(model: PoolModel) -> State:
    limits = model.pool.limits.values()
    bands = {
        f"{limit.name}|{number}": band for limit in limits for number, band in limit.bands.items()
    }
    sessions = model.pool.sessions
    queues = [queue for session in sessions.values() for queue in session.queues.values()]
    tenants = {tenant: model.pool.waiting(tenant) for tenant in list(model.pool.queues_of)}
    return {
        "run": model.run,
        "numbers": {
            "epoch": model.pool.epoch,
            "began": model.roster.began,
            "recover_until": model.pool.recover_until,
            "clock": model.clock,
            "seq": model.pool.seq,
            "parked": model.pool.parked,
            "starving": len(model.queues.starving()),
            "roster": model.roster.version,
            "empty": int(model.roster.empty),
            "vouched": int(model.roster.vouched),
            "fresh": len(model.pump.fresh),
            "changes": model.joining.changes,
        },
        "noted": (
            model.pool.noted_sessions,
            model.reap_at,
            min(model.pump.timed.values(), default=0),
        ),
        "used": {limit.name: limit.used for limit in limits if limit.used},
        "bands": {
            where: figures for where, band in bands.items() if any(figures := _figures(band))
        },
        "pauses": {limit.name: _pause(limit) for limit in limits if limit.pause},
        "gates": {x.name: _gate(x.pause.gate) for x in limits if x.pause and x.pause.gate},
        "cost_ms": {limit.name: limit.cost_ms for limit in limits if limit.cost_ms},
        "adapted": {x.name: _adapted(x) for x in limits if x.current is not None},
        "shadowed": {limit.name: limit.shadowed for limit in limits if limit.shadowed},
        "pacing": {x.name: found for x in limits if any(found := _pacing(x.spending.pacing))},
        "buckets": {x.name: astuple(x.spending.bucket) for x in limits if x.spending.bucket},
        "asserted": {limit.name: limit.asserted for limit in limits if limit.asserted},
        "restored": {x.name: x.restored.write() for x in limits if x.restored},
        "local": {
            sid: " ".join(f"{name} {total}" for name, total in totals.items())
            for sid, totals in model.capacity.local.items()
        },
        "kept": "|".join(map(str, model.pool.kept or ())),
        "spent": {name: amount for name, (_, amount) in model.joining.spending.items()},
        "spending": {name: number for name, (number, _) in model.joining.spending.items()},
        "paused": model.reports.paused(),
        "tenants": {
            name: (n, model.pool.stamps[name], {str(b): o.last for b, o in _orders(model, name)})
            for name, n in tenants.items()
            if n
        },
        "order": {
            f"{band}|{name}": {str(stamp): due for due, stamp in order.steps}
            for name in model.pool.orders
            for band, order in _orders(model, name)
            if order.steps
        },
        "expiry": {sid: session.expiry for sid, session in sessions.items()},
        "sessions": {sid: _session(model, sid) for sid in sessions},
        "held": {sid: held for sid in sessions if (held := _held(model, sid))},
        "places": {
            sid: {key: _place(queue) for key, queue in session.queues.items()}
            for sid, session in sessions.items()
            if session.queues
        },
        "owed": {
            sid: {str(t): f"{write_charges(c)}|{' '.join(f.lane)}" for t, (c, f) in owed.items()}
            for sid, owed in model.permits.owed.items()
            if owed
        },
        "lapsing": {
            "|".join(map(str, permit)): end for permit, end in model.permits.lapsing.items()
        },
        "carried": {
            "|".join(map(str, permit)): write_charges(charges)
            for permit, charges in model.permits.carried.items()
        },
        "timed": dict(model.pump.timed),
        "starving": {queue.id: queue.starving for queue in model.queues.starving()},
        "seen": model.roster.seen,
        "fresh": model.pump.fresh,
        "expected": model.roster.expected,
        "stalled": {
            sid: stalled
            for sid, session in sessions.items()
            if (stalled := {q.id: 0 for q in session.queues.values() if q.at == BLOCKED})
        },
        "queues": {queue.id: dict(queue.tickets) for queue in queues},
        "park": {
            where: {tenant: band.tags[tenant] for tenant in band.lines}
            for where, band in bands.items()
            if band.lines
        },
        "line": {
            f"{where}|{tenant}": {queue_id: queue.first()[1] for queue_id, queue in line.items()}
            for where, band in bands.items()
            for tenant, line in band.lines.items()
        },
        "past": {where: ahead for where, band in bands.items() if (ahead := _past(band))},
        "log": {x.name: x.spending.log for x in limits if x.spending.log},
        "rate": {
            x.name: {str(end): str(n) for end, n in x.spending.buckets.items()}
            for x in limits
            if x.spending.buckets
        },
        "charged": {
            x.name: {str(end): str(n) for end, n in x.spending.charged.items()}
            for x in limits
            if x.spending.charged
        },
        "quota": {
            x.name: {"used": str(x.spending.used), "reset_at": str(x.spending.reset_at)}
            for x in limits
            if x.spending.used
        },
    }


def _pause(limit: LimitState) -> list[str]:
    pause = limit.pause
    assert pause is not None
    return [str(pause.until), str(pause.ramp_ms), str(pause.passed), pause.reason]


def _adapted(limit: LimitState) -> str:
    seen = "" if limit.latency is None else f"|{limit.latency.write()}"
    return f"{limit.current}|{limit.dropped_at}{seen}"


def _pacing(pacing: Pacing | None) -> tuple[int, ...]:
    if pacing is None:
        return ()
    return pacing.even_us, pacing.level, pacing.since


def _gate(gate: PauseGate) -> str:
    taker = "|".join(map(str, gate.taker)) if gate.taker else ""
    return f"{gate.every_ms}|{gate.most_ms}|{gate.rounds}|{taker}"


def _session(model: PoolModel, sid: str) -> dict[str, str]:
    session = model.pool.sessions[sid]
    fields = {
        "gen": str(session.gen),
        "batch": str(session.batch),
        "sent": str(session.sent),
        "acked": str(session.acked),
        "name": session.name,
        "since": str(session.since),
        "revision": str(session.revision),
    }
    if session.blocked:
        fields["blocked"] = "1"
    if session.closed_at is not None:
        fields["closed_at"] = str(session.closed_at)
    if session.full is not None:
        fields["full"] = "|".join(map(str, session.full))
    return fields


def _held(model: PoolModel, sid: str) -> dict[str, str]:
    return {
        str(ticket): f"{h.seq}|{h.until}|{h.use}|{write_charges(h.charges)}|{h.flow}"
        for ticket, h in model.pool.sessions[sid].held.items()
    }


def _place(queue: SessionQueue) -> str:
    return f"{queue.at}|{queue.bounces}|{queue.bounced:.17g}"


def _orders(model: PoolModel, tenant: str) -> list[tuple[int, DueOrder]]:
    return list(model.pool.orders.get(tenant, {}).items())


def _past(band: BandState) -> dict[str, int]:
    return {
        tenant: tag
        for tenant, tag in band.tags.items()
        if tenant not in band.lines and tag > band.virtual - BEHIND
    }
