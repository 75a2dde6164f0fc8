-- does: says whether a limit has room, takes of it and gives back
-- keys: none
-- args: none
-- returns: has_room(), take(), give_back(), adapt(), room_again()
-- units: ms
-- Room again at `at`, unless something is given back before; of several who look, the first counts.
function T.room_again(limit, at)
  limit.retry_at, T.retry = math.min(limit.retry_at or at, at), true
  return false
end

-- Whether the call that a gate let try is still under way. The permits of this very call of the
-- script are not written yet.
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

-- After a pause the calls come back one by one, over `ramp_ms`, instead of all at once; `passed` is
-- in the limit's unit. A limit without a bound comes back as one of `RAMP_BOUND` does.
T.RAMP_BOUND = 64
function T.pause_lets(limit)
  local pause, bound = limit.pause, limit.implicit and T.RAMP_BOUND or limit.bound
  if pool.now < pause.until_ms then return T.room_again(limit, pause.until_ms) end
  if pause.gate then
    return not T.is_tried(pause.gate) or T.room_again(limit, pool.now + pause.gate.every_ms)
  end
  local allowed = 1 + math.floor(bound * (pool.now - pause.until_ms) / pause.ramp_ms)
  if pause.passed < allowed then return true end
  local at = pause.until_ms + math.ceil(pause.passed * pause.ramp_ms / math.max(1, bound))
  return T.room_again(limit, math.max(at, pool.now + 1))
end

function T.is_full(limit, band, amount)
  if limit.pause and not T.pause_lets(limit) then return true end
  if limit.sort == 'c' then
    return limit.used + limit.reserved >= T.cap_of(limit, band)
  end
  return not T.rates().fits(limit, band, amount)
end

function T.has_room(limit, band, amount)
  return limit.shadow or not T.is_full(limit, band, amount)
end

-- Returns what a settlement needs to know of it, for a rate.
function T.take(limit, band, amount)
  limit.changed = true
  if limit.shadow and T.is_full(limit, band, amount) then
    limit.shadowed = (limit.shadowed or 0) + 1
  end
  local gate = limit.pause and limit.pause.gate
  if gate then
    gate.taker, gate.fresh = T.taker, true
    limit.pause.until_ms = math.max(limit.pause.until_ms, pool.now + gate.every_ms)
    limit.pause_changed = true
  elseif limit.pause and pool.now >= limit.pause.until_ms then
    limit.pause.passed = limit.pause.passed + math.max(1, math.min(amount, limit.bound))
    limit.pause_changed = true
  end
  -- Permits are counted under every sort of limit: a live change may make it a concurrency.
  limit.used = limit.used + 1
  if limit.sort ~= 'c' then return T.rates().take(limit, amount, band) end
end

function T.give_back(limit)
  limit.used = limit.used - 1
  limit.changed = true
  if limit.sort == 'c' then T.touch(limit) end
end

-- Additive increase while it is used up: one more in a round of calls, and in `ADAPT_CALLS` at least,
-- since of what is tried beyond the provider's limit one call is refused. A call that is dropped while
-- all is used up says that one less is taken: its place goes to nobody. Else multiplicative decrease at
-- most once a second (Chiu and Jain 1989). In thousandths, so that both worlds count alike.
T.ADAPT_PAUSE_MS = 1000
T.ADAPT_CALLS = 25
function T.adapt(limit, outcome)
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
