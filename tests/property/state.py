"""What a pool is in Valkey and what it is in the model, in the same words, to be compared.

Here everything that Lua counts stands beside what the model derives.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import msgpack

from tidegate.limiter.keys import Keyspace
from tidegate.limiter.model import PoolModel
from tidegate.limiter.model.places import BEHIND
from tidegate.limiter.model.state import BandState, Gate, LimitState, Queue

# Every key of a pool with its type, what is left of its life, and all that is in it.
DUMP = b"""
local found = {}
for _, key in ipairs(redis.call('KEYS', ARGV[1])) do
  local kind = redis.call('TYPE', key).ok
  local value
  if kind == 'hash' then value = redis.call('HGETALL', key)
  elseif kind == 'zset' then value = redis.call('ZRANGE', key, 0, -1, 'WITHSCORES')
  elseif kind == 'list' then value = redis.call('LRANGE', key, 0, -1)
  else value = redis.call('GET', key) end
  found[#found + 1] = { key, kind, redis.call('PTTL', key), value }
end
return cmsgpack.pack(found)
"""

State = dict[str, Any]


def of_valkey(raw: bytes, keys: Keyspace) -> State:
    """Read a dump. Fails on a key that nobody declared, or that lives on without a reason."""
    hashes: dict[str, dict[str, str]] = {}
    zsets: dict[str, dict[str, int]] = {}
    lists: dict[str, list[bytes]] = {}
    for name, kind, ttl_ms, value in msgpack.unpackb(raw, raw=True):
        key = name.decode()
        if key.endswith(":testclock"):
            continue
        shape = keys.shape_of(key)
        assert shape is not None, f"{key} is not declared"
        assert shape.type == kind.decode(), key
        assert shape.expires == (ttl_ms >= 0), f"{key} lives for {ttl_ms} ms"
        rest = key.removeprefix(keys.prefix)
        if kind == b"hash":
            hashes[rest] = dict(_pairs(value))
        elif kind == b"zset":
            zsets[rest] = {member: int(float(score)) for member, score in _pairs(value)}
        elif kind == b"list":
            lists[rest] = value
    return _read(hashes, zsets, lists)


def _pairs(value: list[bytes]) -> Iterable[tuple[str, str]]:
    texts = [item.decode(errors="replace") for item in value or ()]
    return zip(texts[::2], texts[1::2], strict=True)


def _read(
    hashes: dict[str, dict[str, str]],
    zsets: dict[str, dict[str, int]],
    lists: dict[str, list[bytes]],
) -> State:
    meta = hashes.get("meta", {})

    def number(field: str) -> int:
        return int(meta.get(field, 0))

    def family(fields: dict[str, Any], prefix: str) -> dict[str, Any]:
        return {k.removeprefix(prefix): v for k, v in fields.items() if k.startswith(prefix)}

    sessions = family(hashes, "session:")
    bands = _bands(family(meta, "w:"))
    return {
        "run": meta.get("run", ""),
        "numbers": {
            name: number(name)
            for name in (
                "epoch",
                "began",
                "recover_until",
                "clock",
                "seq",
                "parked",
                "starving",
                "roster",
                "empty",
                "vouched",
                "fresh",
                "changes",
            )
        },
        "noted": (number("sessions"), number("reap_at"), number("timed_at")),
        "used": {name: int(n) for name, n in family(meta, "u:").items()},
        "bands": bands,
        "pauses": {name: text.split("|", 3) for name, text in family(meta, "p:").items()},
        "gates": family(meta, "g:"),
        "cost_ms": {name: int(ms) for name, ms in family(meta, "e:").items()},
        "adapted": {name: tuple(map(int, a.split("|"))) for name, a in family(meta, "a:").items()},
        "shadowed": {name: int(n) for name, n in family(meta, "x:").items()},
        "asserted": {name: int(n) for name, n in family(meta, "b:").items()},
        "spent": {name: int(n) for name, n in family(meta, "s:").items()},
        "spending": zsets.get("spending", {}),
        "paused": zsets.get("paused", {}),
        "tenants": {name: tuple(map(int, n.split("|"))) for name, n in family(meta, "n:").items()},
        "expiry": zsets.get("sessions", {}),
        "sessions": {
            sid: {k: v for k, v in fields.items() if not re.match("h:|at:", k)}
            for sid, fields in sessions.items()
        },
        "held": {sid: held for sid, f in sessions.items() if (held := family(f, "h:"))},
        "places": {sid: at for sid, f in sessions.items() if (at := family(f, "at:"))},
        "owed": family(hashes, "owed:"),
        "lapsing": zsets.get("lapsing", {}),
        "timed": zsets.get("timed", {}),
        "starving": zsets.get("starving", {}),
        "seen": zsets.get("seen", {}),
        "fresh": zsets.get("fresh", {}),
        "expected": set(zsets.get("expected", {})),
        "queues": family(zsets, "queue:"),
        "park": family(zsets, "park:"),
        "line": family(zsets, "line:"),
        "past": {
            where: ahead
            for where, tags in family(zsets, "past:").items()
            if (ahead := {t: n for t, n in tags.items() if n > _virtual(bands, where) - BEHIND})
        },
        "log": {name: [int(at) for at in times] for name, times in family(lists, "log:").items()},
        "rate": family(hashes, "rate:"),
        "quota": {name: f for name, f in family(hashes, "quota:").items() if int(f["used"])},
    }


def _bands(fields: dict[str, str]) -> dict[str, tuple[int, ...]]:
    """limit|band -> waits, virtual time, credit, and what it is owed of a rate from and to; without
    those that are as at the beginning."""
    found = {}
    for name, text in fields.items():
        for number, part in enumerate(text.split(","), 1):
            figures = tuple(map(int, part.split(":")))
            if any(figures):
                found[f"{name}|{number}"] = (*figures, 0, 0, 0, 0)[:7]
    return found


def _figures(band: BandState) -> tuple[int, ...]:
    order = (band.waits, band.virtual, band.credit)
    return *order, band.from_us, band.passed_us, band.held_at, band.used_at


def _virtual(bands: dict[str, tuple[int, ...]], where: str) -> int:
    return bands.get(where, (0, 0, 0))[1]


def of_model(model: PoolModel) -> State:
    limits = model.limits.values()
    bands = {
        f"{limit.name}|{number}": band for limit in limits for number, band in limit.bands.items()
    }
    sessions = model.sessions
    queues = [queue for session in sessions.values() for queue in session.queues.values()]
    tenants = {tenant: model.waiting(tenant) for tenant in list(model.queues_of)}
    return {
        "run": model.run,
        "numbers": {
            "epoch": model.epoch,
            "began": model.began,
            "recover_until": model.recover_until,
            "clock": model.clock,
            "seq": model.seq,
            "parked": model.parked,
            "starving": len(model.starving()),
            "roster": model.version,
            "empty": int(model.empty),
            "vouched": int(model.vouched),
            "fresh": len(model.fresh),
            "changes": model.changes,
        },
        "noted": (model.noted_sessions, model.reap_at, min(model.timed.values(), default=0)),
        "used": {limit.name: limit.used for limit in limits if limit.used},
        "bands": {
            where: figures for where, band in bands.items() if any(figures := _figures(band))
        },
        "pauses": {limit.name: _pause(limit) for limit in limits if limit.pause},
        "gates": {x.name: _gate(x.pause.gate) for x in limits if x.pause and x.pause.gate},
        "cost_ms": {limit.name: limit.cost_ms for limit in limits if limit.cost_ms},
        "adapted": {x.name: (x.current, x.dropped_at) for x in limits if x.current is not None},
        "shadowed": {limit.name: limit.shadowed for limit in limits if limit.shadowed},
        "asserted": {limit.name: limit.asserted for limit in limits if limit.asserted},
        "spent": {name: amount for name, (_, amount) in model.spending.items()},
        "spending": {name: number for name, (number, _) in model.spending.items()},
        "paused": model.paused(),
        "tenants": {name: (n, model.stamps[name]) for name, n in tenants.items() if n},
        "expiry": {sid: session.expiry for sid, session in sessions.items()},
        "sessions": {sid: _session(model, sid) for sid in sessions},
        "held": {sid: held for sid in sessions if (held := _held(model, sid))},
        "places": {
            sid: {key: _place(queue) for key, queue in session.queues.items()}
            for sid, session in sessions.items()
            if session.queues
        },
        "owed": {
            sid: {str(t): f"{_charges(c)}|{' '.join(f.lane)}" for t, (c, f) in owed.items()}
            for sid, owed in model.owed.items()
            if owed
        },
        "lapsing": {"|".join(map(str, permit)): end for permit, end in model.lapsing.items()},
        "timed": dict(model.timed),
        "starving": {queue.id: queue.starving for queue in model.starving()},
        "seen": model.seen,
        "fresh": model.fresh,
        "expected": model.expected,
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
        "quota": {
            x.name: {"used": str(x.spending.used), "reset_at": str(x.spending.reset_at)}
            for x in limits
            if x.spending.used
        },
    }


def _pause(limit: LimitState) -> list[str]:
    pause = limit.pause
    assert pause is not None
    return [str(pause.until), str(pause.ramp_ms), str(pause.passed), pause.said]


def _gate(gate: Gate) -> str:
    taker = "|".join(map(str, gate.taker)) if gate.taker else ""
    return f"{gate.every_ms}|{gate.most_ms}|{gate.rounds}|{taker}"


def _session(model: PoolModel, sid: str) -> dict[str, str]:
    session = model.sessions[sid]
    fields = {
        "gen": str(session.gen),
        "batch": str(session.batch),
        "sent": str(session.sent),
        "acked": str(session.acked),
        "name": session.name,
        "since": str(session.since),
    }
    if session.blocked:
        fields["blocked"] = "1"
    if session.closed_at is not None:
        fields["closed_at"] = str(session.closed_at)
    return fields


def _held(model: PoolModel, sid: str) -> dict[str, str]:
    return {
        str(ticket): f"{h.seq}|{h.until}|{h.cost_ms}|{_charges(h.charges)}|{h.flow}"
        for ticket, h in model.sessions[sid].held.items()
    }


def _charges(charges: dict[int, tuple[int, int]]) -> str:
    return ",".join(f"{i + 1}={amount}@{end}" for i, (amount, end) in charges.items())


def _place(queue: Queue) -> str:
    return f"{queue.at}|{queue.bounces}|{queue.bounced}"


def _past(band: BandState) -> dict[str, int]:
    return {
        tenant: tag
        for tenant, tag in band.tags.items()
        if tenant not in band.lines and tag > band.virtual - BEHIND
    }
