-- does: what people and adapters do to a pool: pause a limit, end a pause, revoke a session
-- keys: meta layout
-- args: request
-- request: verb limit for_ms ramp_ms said sid run
-- returns: done
-- units: ms
-- uses: keys clock pool limits places held session recover roster say
-- later: giving room parking pump rates
T.load_pool()
local wall, done = T.wall_clock_ms(), 0
-- Where the past may be lost nobody is let in, and no trace is left of our having been here: `tend`
-- is to find it out.
pool.doubtful = pool.run ~= q.run or wall < pool.clock or wall >= pool.reap_at
pool.now = pool.clock - wall > pool.lease_ms / 2 and wall or math.max(wall, pool.clock)
if q.verb == 'pause' then
  local limit, until_ms = T.limit_of(q.limit), pool.now + q.for_ms
  -- A shorter pause never ends a longer one.
  if not limit.pause or limit.pause.until_ms < until_ms then
    limit.pause = { until_ms = until_ms, ramp_ms = q.ramp_ms, passed = 0, said = q.said }
    limit.pause_changed, limit.changed = true, true
    call('ZADD', T.timed_key, T.int(until_ms), q.limit)
    call('PEXPIRE', T.timed_key, T.POOL_KEEP_MS + q.for_ms)
    T.note_timers()
    done = 1
  end
elseif q.verb == 'resume' then
  local limit = T.limit_of(q.limit)
  if limit.pause then
    limit.pause, limit.pause_changed, limit.changed = nil, true, true
    done = 1
  end
  -- Where something else holds it up, the pump sets another timer.
  call('ZREM', T.timed_key, q.limit)
  T.note_timers()
  T.touch(limit)
elseif q.verb == 'revoke' then
  for _, sid in ipairs(call('ZRANGE', T.sessions_key, 0, -1)) do
    if sid == q.sid or call('HGET', T.session_key(sid), 'name') == q.sid then
      T.reap(sid, false)
      done = done + 1
    end
  end
  -- What is held over for one that was reaped before.
  local held_over = 0
  for _, member in ipairs(call('ZRANGE', T.lapsing_key, 0, -1)) do
    if string.match(member, '^[^|]*|([^|]*)|') == q.sid then
      T.free_lapsing(member)
      held_over = 1
    end
  end
  done = done + held_over
  if not pool.doubtful then T.note_sessions() end
end
if pool.doubtful then
  for name in pairs(T.touched) do T.look_again(name, pool.now) end
  T.note_timers()
else
  T.settle_down()
end
T.save_pool()
return cmsgpack.pack({ done })
