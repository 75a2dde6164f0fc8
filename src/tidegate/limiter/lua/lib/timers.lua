-- does: schedules the next check of a limit that only time frees
-- keys: timed
-- args: none
-- returns: note_room_at(), touch_due(), end_implicit(), schedule_check(), schedule_checks(), note_timers()
-- units: ms
-- Notes that a limit has room at `at` unless something is released before; the earliest time counts. Returns false.
function T.note_room_at(limit, at)
  limit.retry_at, T.retry = math.min(limit.retry_at or at, at), true
  return false
end

-- The most due timers that one run processes; the next run continues.
T.DUE_AT_ONCE = 15
function T.touch_due()
  local due = call('ZRANGEBYSCORE', T.timed_key, '-inf', T.int(pool.now), 'LIMIT', 0, T.DUE_AT_ONCE)
  if #due == 0 then return end
  if #due == T.DUE_AT_ONCE then T.more = 1 end
  call('ZREM', T.timed_key, unpack(due))
  for _, name in ipairs(due) do
    T.touched[name] = true
    if T.is_implicit(name) then T.end_implicit(T.limit_of(name)) end
  end
end

-- Deletes a pause that is over, if the limit is not in the policy.
function T.end_implicit(limit)
  if not limit.implicit then return end
  if limit.pause_over then
    limit.pause_over, limit.pause_changed, limit.changed = nil, true, true
  elseif limit.pause and not limit.pause.gate then
    local pause = limit.pause
    local over_at = pause.until_ms + pause.ramp_ms
    T.schedule_check(limit.name, pool.now < pause.until_ms and pause.until_ms or over_at)
  end
end

function T.schedule_check(name, at)
  call('ZADD', T.timed_key, 'LT', T.int(at), name)
  call('PEXPIRE', T.timed_key, T.POOL_KEEP_MS)
end

function T.schedule_checks(names)
  local list, now = {}, T.int(pool.now)
  for name in pairs(names) do
    list[#list + 1] = now
    list[#list + 1] = name
  end
  for i = 1, #list, 1000 do
    call('ZADD', T.timed_key, 'LT', unpack(list, i, math.min(i + 999, #list)))
  end
  call('PEXPIRE', T.timed_key, T.POOL_KEEP_MS)
  T.timers_changed = true
end

function T.note_timers()
  pool.timed_at = tonumber(call('ZRANGE', T.timed_key, 0, 0, 'WITHSCORES')[2] or 0)
end
