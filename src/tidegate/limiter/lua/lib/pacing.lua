-- does: spreads a rate evenly by its pace, and limits its growth by its ramp
-- keys: meta
-- args: none
-- returns: load_pacing(), paced_bound(), ramp_bound(), grown_at(), even_after(), cap_even(), pace_take(), pace_return(), rewind_pacing(), save_pacing()
-- units: ms; `even` and `pace` in microseconds
-- `f:` is even|level|since. By `even` an even flow has caught up with all that was taken: each admission moves it on,
-- and a call is admitted if, with its own part, `even` is at most `pace` ahead (GCRA, ITU-T I.371). Under a ramp a
-- window may take at most `level`, plus the ramp's percentage of it for each minute since `since`. The first call
-- after a minute sets the level to what was taken in the last window, at least `start`; `since` is 0 before the first
-- call of all. `even` is at most a window ahead, so that neither what was taken in shadow mode nor an earlier, longer
-- window delays calls for longer.
function T.load_pacing(limit, pace_ms, percent, start)
  local even, level, since =
    string.match(call('HGET', T.meta_key, 'f:' .. limit.name) or '0|0|0', '^(%d+)|(%d+)|(%d+)')
  limit.pacing = { pace = pace_ms * 1000, percent = percent, start = start,
    even = tonumber(even), level = tonumber(level), since = tonumber(since) }
end

-- Returns what a window may take now.
function T.paced_bound(limit)
  local pacing = limit.pacing
  if pacing.percent == 0 or pacing.since == 0 then return limit.bound end
  local more = pacing.level * pacing.percent * math.max(0, pool.now - pacing.since) / 6000000
  return math.min(limit.bound, pacing.level + math.floor(more))
end

-- Returns what a window may take at a later time if calls take all that the ramp admits.
function T.ramp_bound(limit, at)
  local pacing = limit.pacing
  local level, since = pacing.level, pacing.since
  if pool.now - since >= 60000 then level, since = math.max(pacing.start, T.paced_bound(limit)), pool.now end
  while at - since >= 60000 and level < limit.bound do
    level, since = level + level * pacing.percent / 100, since + 60000
  end
  return math.min(limit.bound, math.floor(level + level * pacing.percent * (at - since) / 6000000))
end

local function lasts(limit, amount)
  return math.ceil(amount * limit.span * 1000 / math.max(1, limit.bound))
end

-- Returns when the bound of the ramp reaches `needed`, if nothing is taken until then.
function T.grown_at(pacing, needed)
  local more = math.max(0, needed - pacing.level)
  return pacing.since + math.ceil(more * 6000000 / (pacing.level * pacing.percent))
end

-- Returns when an even flow has room for `amount` after `before`, if nothing is returned; 0 for now.
function T.even_after(limit, before, amount)
  local pacing = limit.pacing
  if pacing.pace == 0 then return 0 end
  local even = pacing.even
  if before > 0 then even = math.max(even, pool.now * 1000) + lasts(limit, before) end
  local earliest = even - math.max(0, pacing.pace - lasts(limit, amount))
  return earliest > pool.now * 1000 and math.ceil(earliest / 1000) or 0
end

function T.cap_even(limit)
  local pacing, most = limit.pacing, (pool.now + limit.span) * 1000
  if pacing.even <= most then return end
  pacing.even, limit.pacing_changed, limit.changed = most, true, true
end

-- Counts an admission. What was taken in the last window already includes `amount`.
function T.pace_take(limit, amount)
  local pacing = limit.pacing
  if pacing.pace > 0 then
    pacing.even = math.max(pacing.even, pool.now * 1000) + lasts(limit, amount)
    T.cap_even(limit)
  end
  if pacing.percent > 0 and pool.now - pacing.since >= 60000 then
    pacing.level, pacing.since = math.max(pacing.start, limit.counted or limit.spent), pool.now
  end
  limit.pacing_changed, limit.changed = true, true
end

-- Returns what was reserved in excess, or, if negative, takes what was used in addition.
function T.pace_return(limit, amount)
  local pacing = limit.pacing
  if pacing.pace == 0 or amount == 0 then return end
  if amount > 0 then
    pacing.even = math.max(0, pacing.even - lasts(limit, amount))
  else
    pacing.even = math.max(pacing.even, pool.now * 1000) + lasts(limit, -amount)
    T.cap_even(limit)
  end
  limit.pacing_changed, limit.changed = true, true
end

function T.rewind_pacing(limit, by_ms)
  local pacing = limit.pacing
  pacing.even, pacing.since = math.max(0, pacing.even - by_ms * 1000), math.max(0, pacing.since - by_ms)
  limit.pacing_changed, limit.changed = true, true
end

function T.save_pacing(limit)
  local pacing = limit.pacing
  T.put('f:' .. limit.name, string.format('%d|%d|%d', pacing.even, pacing.level, pacing.since))
  limit.pacing_changed = nil
end
