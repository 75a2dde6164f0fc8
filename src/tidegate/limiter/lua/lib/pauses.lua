-- does: computes what a pause, a gate and an adaptive limit allow
-- keys: session
-- args: none
-- returns: gate_of(), is_tried(), pause_admits(), ramp_after(), adapt()
-- units: ms
-- A gate is a pause that lasts until it is opened, and admits one probe at a time. `taker` is the session|ticket of
-- the last probe, `every_ms` the minimum time between two probes, `rounds` the number of failed ones.
function T.gate_of(name)
  local text = call('HGET', T.meta_key, 'g:' .. name) or '1000|1000|0|'
  local every_ms, most_ms, rounds, taker = string.match(text, '^(%d+)|(%d+)|(%d+)|(.*)$')
  return { every_ms = tonumber(every_ms), most_ms = tonumber(most_ms), rounds = tonumber(rounds),
    taker = taker }
end

-- Returns whether the probe of a gate is still in progress. Permits of this run are not written yet.
function T.is_tried(gate)
  if gate.taker == '' then return false end
  if gate.fresh then return true end
  local sid, ticket = string.match(gate.taker, '^([^|]*)|(.*)$')
  local value = sid == own.sid and own.held[tonumber(ticket)]
  if value == nil or sid ~= own.sid then
    value = call('HGET', T.session_key(sid), 'h:' .. ticket)
  end
  return value and true or false
end

-- Returns whether a pause admits a call. After a pause, calls are admitted gradually over `ramp_ms`; `passed` is what
-- was admitted and not returned, in the limit's unit. A limit without a bound ramps up like one of `RAMP_BOUND`.
T.RAMP_BOUND = 64
function T.pause_admits(limit)
  local pause, bound = limit.pause, limit.implicit and T.RAMP_BOUND or limit.bound
  if pool.now < pause.until_ms then return T.note_room_at(limit, pause.until_ms) end
  if pause.gate then
    return not T.is_tried(pause.gate) or T.note_room_at(limit, pool.now + pause.gate.every_ms)
  end
  local allowed = 1 + math.floor(bound * (pool.now - pause.until_ms) / pause.ramp_ms)
  if pause.passed < allowed then return true end
  local at = pause.until_ms + math.ceil(pause.passed * pause.ramp_ms / math.max(1, bound))
  return T.note_room_at(limit, math.max(math.min(at, pause.until_ms + pause.ramp_ms), pool.now + 1))
end

-- Returns when the ramp after a pause admits a call, after calls that take `before`, if nothing is returned; 0 for now,
-- or for a gate.
function T.ramp_after(limit, before)
  local pause, bound = limit.pause, limit.implicit and T.RAMP_BOUND or limit.bound
  if not pause or pause.gate then return 0 end
  local ramp_ms = math.min(pause.ramp_ms, math.ceil((pause.passed + before) * pause.ramp_ms / math.max(1, bound)))
  return pause.until_ms + ramp_ms > pool.now and pause.until_ms + ramp_ms or 0
end

-- Adapts a limit to the outcome of a call. Additive increase while the limit is used up: one more per round of calls,
-- and per `ADAPT_CALLS` at least, since each step beyond the provider's limit gets a call refused. A call dropped
-- while the limit is used up lowers it by one, so that its place is not reassigned. For other dropped calls,
-- multiplicative decrease at most once a second (Chiu and Jain 1989). A success whose time to the first token is
-- known counts by `latency.lua` instead. Bounds are in thousandths, so that Lua and the model count alike.
T.ADAPT_PAUSE_MS = 1000
T.ADAPT_CALLS = 25
function T.adapt(limit, outcome, ticket, took_ms)
  local first = limit.by_latency and outcome == 0 and took_ms > 0 and T.first_of_call(ticket)
  if first then return T.adapt_by_latency(limit, took_ms, first[1], first[2]) end
  local full = limit.used >= math.floor(limit.current / 1000)
  if outcome == 0 and full then
    local round = math.max(limit.current, T.ADAPT_CALLS * 1000)
    limit.current = math.min(limit.bound * 1000, limit.current + math.floor(1000000 / round))
  elseif outcome == 2 and full then
    local taken = math.max(limit.least, limit.used - 1) * 1000
    if taken >= limit.current then return end
    limit.current, limit.dropped_at = taken, pool.now
  elseif outcome == 2 and pool.now - limit.dropped_at >= T.ADAPT_PAUSE_MS then
    limit.current = math.min(limit.bound * 1000,
      math.max(limit.least * 1000, math.floor(limit.current * 7 / 10)))
    limit.dropped_at = pool.now
  else
    return
  end
  limit.adapted, limit.changed = true, true
end
