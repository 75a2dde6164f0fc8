-- does: computes the earliest time at which a limit has room
-- keys: sessions owed
-- args: firm
-- returns: is_firm(), is_usage_due(), earliest(), outlook()
-- units: ms
-- Returns whether nothing is returned to a limit when calls end: true if it counts requests. Under other limits a
-- call may have reserved more than it uses.
function T.is_firm(limit)
  if limit.exact then return true end
  if not T.firm then
    T.firm = {}
    for _, name in ipairs(q.firm) do T.firm[name] = true end
  end
  return limit.sort ~= 'c' and T.firm[limit.name] or false
end

-- Returns whether the usage of a call that has ended is still to be reported.
function T.is_usage_due()
  if T.usage_due == nil then
    T.usage_due = false
    for _, sid in ipairs(call('ZRANGE', T.sessions_key, 0, -1)) do
      if call('EXISTS', T.owed_key(sid)) == 1 then
        T.usage_due = true
        break
      end
    end
  end
  return T.usage_due
end

-- Returns when there is room if nothing is returned, 0 if a call that ends makes room or if it is unknown; the usage,
-- -1 for a paused limit; whether that time is certain for every call; and the time before which there is certainly no
-- room.
function T.earliest(limit, amount)
  local pause, paused_at, at, used, certain_at = limit.pause, 0, 0, limit.used, 0
  if limit.sort ~= 'c' then
    at = T.rates().free_at(limit, amount)
    certain_at = T.rates().certain_at(limit, amount, at)
    used = limit.spent
  end
  if limit.shadow then at = 0 end
  if pause and pause.until_ms > pool.now then paused_at = pause.until_ms end
  if at > paused_at then
    certain_at = math.max(certain_at, paused_at)
    return at, used, T.is_firm(limit) and certain_at == at, certain_at
  end
  if paused_at > 0 then return paused_at, -1, not pause.gate, paused_at end
  return 0, used, false, 0
end

-- Returns which rate or pause a queue waits for, and until when.
function T.outlook(number, queue, limit)
  local amount = 1
  if limit.sort ~= 'c' and not T.is_firm(limit) then
    local amounts = T.amounts_in(string.match(T.first_of(queue), '^%d+|%d+|%d+|(.*)$'))
    for i, name in ipairs(T.names_in(queue.lane)) do
      if name == limit.name then amount = amounts[i] or 1 end
    end
  end
  local at, used, firm = T.earliest(limit, amount)
  local behind = firm and limit.sort == 'r' and T.rates().is_behind_bands(limit, queue.band)
  return { number, queue.at, math.max(0, at - pool.now), used, behind and 2 or firm and 1 or 0 }
end
