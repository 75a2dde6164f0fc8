-- does: checks whether a limit has room, takes capacity and releases it
-- keys: none
-- args: none
-- returns: has_room(), take(), give_back()
-- units: ms
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

-- Returns the data that a settlement needs, for a rate.
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
