-- does: applies an operation of an operator or adapter to a pool: pauses a limit, ends a pause, closes or opens a gate, charges a limit, holds a permit, or revokes a session
-- keys: meta layout
-- args: request
-- request: verb limit lane amounts for_ms most_ms ramp_ms tried amount evenly bound recorded said sid run once keep_ms; once identifies the request
-- returns: done
-- units: ms
-- uses: core clock pool limits queues permits session recover roster apply
-- later: releases capacity blocked pump deadlines rates pacing bucket timers pauses latency starving
-- A repeat after a lost reply returns the same answer and changes nothing.
local once_key = q.once and T.prefix .. 'claim:' .. q.once
local before = once_key and call('GET', once_key)
if before then return cmsgpack.pack({ tonumber(before) }) end
T.load_pool()
local wall, done = T.wall_clock_ms(), 0
-- If data may be lost, no call is admitted and the clock is not advanced: `tend` must detect the loss.
pool.doubtful = pool.run ~= q.run or wall < pool.clock or wall >= pool.reap_at
pool.now = pool.clock - wall > pool.lease_ms / 2 and wall or math.max(wall, pool.clock)

-- Notifies all processes immediately, instead of at their next comparison.
local function announce()
  if not pool.doubtful and pool.sessions <= T.MOST_TO_ANNOUNCE then T.notify_others() end
end

local function pause_from(limit, pause, at)
  limit.pause, limit.pause_changed, limit.changed = pause, true, true
  call('ZADD', T.timed_key, T.int(at), limit.name)
  call('PEXPIRE', T.timed_key, T.POOL_KEEP_MS + math.max(0, at - pool.now))
  T.note_timers()
end

-- A closed gate does not change, unless its own probe failed (`tried`) or the new maximum time is longer.
local function close(limit)
  local gate, until_ms = limit.pause and limit.pause.gate, pool.now + q.for_ms
  if gate and q.most_ms <= gate.most_ms then
    if not q.tried then return 0 end
    gate.rounds = math.min(gate.rounds + 1, 30)
    until_ms = pool.now + math.min(gate.most_ms, gate.every_ms * 2 ^ gate.rounds)
    gate.taker, gate.fresh = '', nil
    until_ms = math.max(limit.pause.until_ms, until_ms)
  elseif limit.pause and not gate and limit.pause.until_ms >= until_ms then
    return 0
  else
    gate = { every_ms = q.for_ms, most_ms = q.most_ms, rounds = 0, taker = '' }
  end
  pause_from(limit, { until_ms = until_ms, ramp_ms = 0, passed = 0, said = q.said, gate = gate },
    until_ms)
  return 1
end

if q.verb == 'pause' then
  local limit, until_ms = T.limit_of(q.limit), pool.now + q.for_ms
  -- A shorter pause never ends a longer one.
  if not limit.pause or limit.pause.until_ms < until_ms then
    local was_paused = limit.pause
    pause_from(limit, { until_ms = until_ms, ramp_ms = q.ramp_ms, passed = 0, said = q.said }, until_ms)
    done = 1
    if not was_paused then announce() end
  end
elseif q.verb == 'close' then
  done = close(T.limit_of(q.limit))
  if done == 1 then announce() end
elseif q.verb == 'open' then
  local limit = T.limit_of(q.limit)
  if limit.pause and limit.pause.gate then
    local pause = { until_ms = pool.now, ramp_ms = q.ramp_ms, passed = 0, said = limit.pause.said }
    pause_from(limit, pause, pool.now + q.ramp_ms)
    T.touch(limit)
    done = 1
    announce()
  end
elseif q.verb == 'resume' then
  local limit = T.limit_of(q.limit)
  if limit.pause then
    limit.pause, limit.pause_changed, limit.changed = nil, true, true
    done = 1
    announce()
  end
  -- If the limit has no room for another reason, the pump sets a new timer.
  call('ZREM', T.timed_key, q.limit)
  T.note_timers()
  T.touch(limit)
elseif q.verb == 'charge' then
  -- Counts usage outside of the pool, also above the bound. If the bound that it is charged beside is no longer in
  -- force, nothing is charged.
  local limit = T.limit_of(q.limit)
  if limit.defined and limit.sort ~= 'c' and not pool.doubtful and (q.bound or limit.bound) == limit.bound then
    local rates = T.rates()
    done = 1
    if q.recorded then
      -- `amount` is the recorded total of a day, part of which may be counted already.
      local more = limit.sort == 'q' and q.amount - rates.spent(limit) or 0
      done = more > 0 and 1 or 0
      if done == 1 then
        local field, text = 'b:' .. q.limit, call('HGET', T.restored_key, q.limit)
        rates.assert_spent(limit, more)
        local asserted = math.max(q.amount, tonumber(call('HGET', T.meta_key, field) or 0))
        if text then
          local before, base, rest = string.match(text, '^(%d+|%d+|)(%d+)(.*)$')
          call('HSET', T.restored_key, q.limit, before .. T.int(base + more) .. rest)
          asserted = math.max(asserted, base + more)
        end
        T.put(field, T.int(asserted))
      end
    elseif q.bound then rates.charge(limit, q.amount, q.evenly)
    elseif q.evenly then rates.assert_evenly(limit, q.amount) else rates.assert_spent(limit, q.amount) end
  end
elseif q.verb == 'hold' then
  -- Counts a call that outlives its process. The permit belongs to no session, and counts until it is revoked or its
  -- time is over.
  if not pool.doubtful then
    local is_new = not call('ZSCORE', T.lapsing_key, '0|' .. q.sid .. '|' .. q.lane)
    local charges = is_new and T.charges_of_lane(q.lane, q.amounts or {}, false) or ''
    T.hold_over('0', q.sid, { until_ms = pool.now + q.for_ms, lane = q.lane, charges = charges })
    if is_new then T.count_lane(q.lane, charges) end
    done = 1
  end
elseif q.verb == 'revoke' then
  for _, sid in ipairs(call('ZRANGE', T.sessions_key, 0, -1)) do
    if sid == q.sid or call('HGET', T.session_key(sid), 'name') == q.sid then
      T.reap(sid, false)
      done = done + 1
    end
  end
  -- Permits held over for sessions that were reaped before.
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
  for name in pairs(T.touched) do T.schedule_check(name, pool.now) end
  T.note_timers()
else
  T.finish_run()
end
T.save_pool()
if once_key then call('SET', once_key, T.int(done), 'PX', q.keep_ms) end
return cmsgpack.pack({ done })
