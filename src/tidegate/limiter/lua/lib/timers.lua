-- does: schedules the next check of a limit that only time frees
-- keys: timed
-- args: none
-- returns: room_again(), touch_due(), end_implicit(), look_again(), note_timers()
-- units: ms
-- Room again at `at`, unless something is released before; of several timers, the first counts.
function T.room_again(limit, at)
  limit.retry_at, T.retry = math.min(limit.retry_at or at, at), true
  return false
end

function T.touch_due()
  for _, name in ipairs(call('ZRANGEBYSCORE', T.timed_key, '-inf', T.int(pool.now))) do
    call('ZREM', T.timed_key, name)
    T.touched[name] = true
    T.end_implicit(T.limit_of(name))
  end
end

-- A pause that is over is deleted if no policy names the limit.
function T.end_implicit(limit)
  if not limit.implicit then return end
  if limit.pause_over then
    limit.pause_over, limit.pause_changed, limit.changed = nil, true, true
  elseif limit.pause and not limit.pause.gate then
    local pause = limit.pause
    local over_at = pause.until_ms + pause.ramp_ms
    T.look_again(limit.name, pool.now < pause.until_ms and pause.until_ms or over_at)
  end
end

function T.look_again(name, at)
  call('ZADD', T.timed_key, 'LT', T.int(at), name)
  call('PEXPIRE', T.timed_key, T.POOL_KEEP_MS)
end

function T.note_timers()
  pool.timed_at = tonumber(call('ZRANGE', T.timed_key, 0, 0, 'WITHSCORES')[2] or 0)
end
