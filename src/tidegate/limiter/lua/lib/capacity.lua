-- does: checks whether a limit has room, takes capacity and releases it
-- keys: none
-- args: none
-- returns: concerns(), has_room(), take(), uncount(), amount_in(), amount_charged()
-- units: ms; amounts in each limit's unit
-- Returns whether a call that takes `amount` waits for a limit at all. A call that takes nothing of a rate does not,
-- not even while the rate is paused.
function T.concerns(limit, amount) return amount > 0 or limit.sort == 'c' end

function T.is_full(limit, band, amount)
  if limit.pause and not T.pause_admits(limit) then return true end
  if limit.sort == 'c' then
    local cap = T.cap_of(limit, band)
    if not limit.by_tokens then return limit.used + limit.reserved >= cap end
    -- A demand above a band's cap takes all of it, instead of waiting forever. A demand above the bound is refused by
    -- its process.
    return cap <= 0 or amount > limit.bound
      or limit.used + limit.reserved + math.max(1, math.min(amount, cap)) > cap
  end
  return not T.rates().fits(limit, band, amount)
end

-- A limit in shadow mode delays only by a pause; `take` counts what it would have delayed.
function T.has_room(limit, band, amount)
  if limit.shadow then return not limit.pause or T.pause_admits(limit) end
  return not T.is_full(limit, band, amount)
end

-- The amount that a permit takes of a limit, at a position of its lane: 1 if the limit counts calls, or counted calls
-- when the permit was admitted.
function T.amount_in(limit, list, i) return limit.by_tokens and list[i] or 1 end
function T.amount_charged(limit, charges, i)
  if not limit.by_tokens then return 1 end
  return tonumber(string.match(',' .. charges, ',' .. i .. '=(%d+)@') or 1)
end

-- Counts an admission. Returns what a settlement needs, for a rate, or a release, for tokens in flight.
function T.take(limit, band, amount)
  limit.changed = true
  local concerns = T.concerns(limit, amount)
  if limit.shadow and concerns and T.is_full(limit, band, amount) then
    limit.shadowed = (limit.shadowed or 0) + 1
  end
  local pause = concerns and limit.pause
  local gate = pause and pause.gate
  if gate then
    gate.taker, gate.fresh = T.taker, true
    pause.until_ms = math.max(pause.until_ms, pool.now + gate.every_ms)
    limit.pause_changed = true
  elseif pause and pool.now >= pause.until_ms then
    pause.passed = pause.passed + math.max(1, math.min(amount, limit.bound))
    limit.pause_changed = true
  end
  if limit.by_tokens then
    limit.used = limit.used + amount
    return T.int(amount) .. '@0'
  end
  -- Permits are counted under every type of limit: a new policy may make it a concurrency limit.
  limit.used = limit.used + 1
  if limit.sort ~= 'c' then return T.rates().take(limit, amount, band) end
end

function T.uncount(limit, amount)
  limit.used = limit.used - amount
  limit.changed = true
  if limit.sort == 'c' or limit.pause and limit.pause.gate then T.touch(limit) end
end
