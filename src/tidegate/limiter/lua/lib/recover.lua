-- does: advances the pool's clock, reaps expired sessions, and begins a new epoch when data is lost
-- keys: meta sessions session queue park line lapsing carried starving owed
-- args: epoch run uptime_ms lease_ms
-- returns: reap(sid, hold), recount(), count_again(), recover(), reap_expired(), reap_closed(), note_sessions()
-- units: ms
-- Of many expired sessions and permits held over, one run ends some: about as many permits and queues as this. A
-- session ends as a whole, so that its process finds either all or nothing of it.
T.REAP_AT_ONCE = 64
T.ENDED_AT_ONCE = 20

function T.hold_over(ticket, sid, held)
  local member = ticket .. '|' .. sid .. '|' .. held.lane
  call('ZADD', T.lapsing_key, T.int(held.until_ms), member)
  if held.charges ~= '' then call('HSET', T.carried_key, member, held.charges) end
  T.keep_lapsing(held.until_ms - pool.now)
end

function T.keep_lapsing(left_ms)
  local keep_ms = T.int(left_ms + T.POOL_KEEP_MS)
  for _, key in ipairs({ T.lapsing_key, T.carried_key }) do
    call('PEXPIRE', key, keep_ms, 'NX')
    call('PEXPIRE', key, keep_ms, 'GT')
  end
end

function T.places_of(sid, raw)
  local list = {}
  raw = raw or call('HGETALL', T.session_key(sid))
  for i = 1, #raw, 2 do
    local flow = string.match(raw[i], '^at:(.*)$')
    if flow then
      local queue = T.queue_of(sid .. '|' .. flow)
      T.set_place(queue, raw[i + 1])
      list[#list + 1] = queue
    end
  end
  return list
end

-- Ends a session. With `hold` its permits count until the hard deadline of their calls; with `comes_back` the usage
-- that it still has to report of ended calls is kept, and the order of its tickets. Returns the number of permits and
-- queues.
function T.reap(sid, hold, comes_back)
  local raw, ended = call('HGETALL', T.session_key(sid)), 0
  for i = 1, #raw, 2 do
    local ticket = string.match(raw[i], '^h:(.*)$')
    if ticket then
      ended = ended + 1
      local held = T.read_held(raw[i + 1])
      if hold and held.until_ms > pool.now then
        T.hold_over(ticket, sid, held)
      else
        T.uncount_lane(held.lane, held.charges)
      end
    end
  end
  for _, queue in ipairs(T.places_of(sid, raw)) do
    ended = ended + 1
    local tenant = T.tenant_of(queue.tenant)
    tenant.waiting = tenant.waiting - call('ZCARD', T.queue_key(queue))
    tenant.changed, tenant.returns = true, comes_back
    if comes_back then T.returning[queue.tenant] = true end
    if queue.at ~= '!' then T.touch_sized(T.limit_of(queue.at)) end
    T.vacate(queue)
    call('UNLINK', T.queue_key(queue))
  end
  call('UNLINK', T.session_key(sid), T.stalled_key(sid))
  call('ZREM', T.sessions_key, sid)
  if comes_back then return ended end
  call('UNLINK', T.owed_key(sid))
  T.leave_roster(sid)
  return ended
end

function T.lapsing_lane(member) return string.match(member, '^[^|]*|[^|]*|(.*)$') end

-- Deletes the waiters of a limit when their sessions have expired without being reaped.
function T.forget_parked(limit)
  for number, band in ipairs(limit.bands) do
    if band.waits > 0 then
      for _, tenant in ipairs(call('ZRANGE', T.park_key(limit, number), 0, -1)) do
        call('UNLINK', T.prefix .. 'line:' .. limit.name .. '|' .. number .. '|' .. tenant)
      end
      call('UNLINK', T.park_key(limit, number))
      band.waits, band.credit = 0, 0
    end
  end
end

-- Recounts from the only certain data when no session is left: the permits held over.
function T.recount()
  for _, field in ipairs(call('HKEYS', T.meta_key)) do
    local letter, name = string.match(field, '^(%a):(.*)$')
    if letter == 'u' or letter == 'w' then
      local limit = T.limit_of(name)
      limit.used, limit.changed = 0, true
      T.forget_parked(limit)
    elseif letter == 'n' then
      T.tenant_of(name).waiting, T.tenant_of(name).changed = 0, true
    end
  end
  for _, limit in pairs(T.limits) do
    if limit.used ~= 0 then limit.used, limit.changed = 0, true end
  end
  pool.parked, pool.starving = 0, 0
  call('UNLINK', T.starving_key)
  for _, member in ipairs(call('ZRANGE', T.lapsing_key, 0, -1)) do
    T.count_lane(T.lapsing_lane(member), call('HGET', T.carried_key, member) or '')
  end
end

-- Recounts what is in use of limits that count in another unit from now on, which are the keys of `names`. The limits
-- have been loaded with their new definitions.
function T.count_again(names)
  for name in pairs(names) do T.limit_of(name).used, T.limit_of(name).changed = 0, true end
  local function count(lane, charges)
    for i, limit in ipairs(T.limits_in(lane)) do
      if names[limit.name] then limit.used = limit.used + T.amount_charged(limit, charges, i) end
    end
  end
  for _, sid in ipairs(call('ZRANGE', T.sessions_key, 0, -1)) do
    local raw = call('HGETALL', T.session_key(sid))
    for i = 1, #raw, 2 do
      if string.match(raw[i], '^h:') then
        local held = T.read_held(raw[i + 1])
        count(held.lane, held.charges)
      end
    end
  end
  for _, member in ipairs(call('ZRANGE', T.lapsing_key, 0, -1)) do
    count(T.lapsing_lane(member), call('HGET', T.carried_key, member) or '')
  end
end

function T.begin_epoch()
  local known = pool.epoch > 0 or q.epoch > 0
  for _, sid in ipairs(call('ZRANGE', T.sessions_key, 0, -1)) do
    T.reap(sid, pool.hold)
  end
  T.recount()
  for _, field in ipairs(call('HKEYS', T.meta_key)) do
    if string.match(field, '^b:') then call('HDEL', T.meta_key, field) end
  end
  call('UNLINK', T.prefix .. 'seen', T.prefix .. 'fresh', T.prefix .. 'expected', T.restored_key)
  pool.fresh = 0
  T.put('fresh', '0')
  -- Written immediately, because a session that joins in this run may vouch.
  T.write(T.meta_key, { empty = pool.epoch == 0 and '1', vouched = false,
    kept = pool.epoch > 0 and T.int(pool.epoch) .. '|' .. T.int(pool.seq) })
  local quiet_ms = math.max(pool.lease_ms, q.lease_ms)
  -- No session knows this pool: sessions that saw it in an earlier run of the server have had the time since its
  -- start to rejoin.
  if not known then quiet_ms = math.max(0, quiet_ms - q.uptime_ms) end
  pool.epoch = math.max(pool.now, pool.epoch + 1, q.epoch + 1)
  pool.run = q.run
  pool.began = pool.now
  pool.recover_until = pool.now + quiet_ms
  T.put('run', pool.run)
  T.put('epoch', T.int(pool.epoch))
  T.put('began', T.int(pool.began))
  T.put('recover_until', T.int(pool.recover_until))
end

-- Returns whether a session has expired. The key itself may have expired while no session was connected.
function T.has_expired_session(wall)
  return #call('ZRANGEBYSCORE', T.sessions_key, '-inf', wall, 'LIMIT', 0, 1) > 0
    or pool.sessions > 0 and call('EXISTS', T.sessions_key) == 0
end

-- Moves back the times of a limit's bands, some of which are in microseconds, and of its last decrease.
function T.rewind_limit(limit, by_ms)
  limit.changed = true
  for _, band in ipairs(limit.bands) do
    band.held, band.used = math.max(0, band.held - by_ms), math.max(0, band.used - by_ms)
    band.from, band.passed = math.max(0, band.from - by_ms * 1000), math.max(0, band.passed - by_ms * 1000)
  end
  if limit.current and limit.dropped_at > 0 then
    limit.dropped_at, limit.adapted = math.max(0, limit.dropped_at - by_ms), true
  end
end

-- Moves stored times back after the clock was set back, so that they keep their distance from now.
function T.rewind(by_ms)
  for _, field in ipairs(call('HKEYS', T.meta_key)) do
    local letter, name = string.match(field, '^(%a):(.*)$')
    if letter == 'd' then T.rewind_limit(T.limit_of(name), by_ms) end
    if letter == 'd' and T.limit_of(name).sort == 'r' then T.rates().rewind(T.limit_of(name), by_ms) end
    if letter == 'p' and T.limit_of(name).pause then
      local limit = T.limit_of(name)
      limit.pause.until_ms = limit.pause.until_ms - by_ms
      limit.pause_changed, limit.changed = true, true
    end
  end
  for _, key in ipairs({ T.timed_key, T.lapsing_key }) do
    for _, member in ipairs(call('ZRANGE', key, 0, -1)) do
      call('ZINCRBY', key, T.int(-by_ms), member)
    end
  end
  if pool.timed_at > 0 then pool.timed_at = math.max(1, pool.timed_at - by_ms) end
end

-- Begins an epoch if data is lost: the server is another one or empty, its clock was set back, or no request came for
-- half a lease and a session expired meanwhile. In that last case the server or its clock was stopped, not the
-- session, and all sessions may still be using their permits.
function T.recover()
  local wall = T.wall_clock_ms()
  local jump_ms = math.max(pool.lease_ms, 1) / 2
  local set_back = pool.clock - wall > jump_ms
  pool.now = wall
  if not set_back and pool.clock > wall then pool.now = pool.clock end
  local silent = pool.epoch > 0 and wall - pool.clock > jump_ms
    and T.has_expired_session(wall)
  if pool.epoch == 0 or pool.run ~= q.run or q.epoch > pool.epoch or set_back or silent then
    local by_ms = set_back and pool.clock - wall or 0
    T.begin_epoch()
    if by_ms > 0 then T.rewind(by_ms) end
  end
end

function T.free_lapsing(member)
  call('ZREM', T.lapsing_key, member)
  T.uncount_lane(T.lapsing_lane(member), T.carried(member))
end

function T.reap_expired()
  local dead = call('ZRANGEBYSCORE', T.sessions_key, '-inf', pool.now, 'LIMIT', 0, T.REAP_AT_ONCE)
  local ended, own_expiry = 0, dead[1] and tonumber(call('ZSCORE', T.sessions_key, q.sid) or nil)
  -- The session that sends the request ends first.
  if own_expiry and own_expiry <= pool.now then ended = 1 + T.reap(q.sid, pool.hold) end
  for _, sid in ipairs(dead) do
    if sid ~= q.sid then
      if ended >= T.ENDED_AT_ONCE then
        T.more = 1
        break
      end
      ended = ended + 1 + T.reap(sid, pool.hold)
    end
  end
  local over = call('ZRANGEBYSCORE', T.lapsing_key, '-inf', pool.now, 'LIMIT', 0, T.ENDED_AT_ONCE)
  if #over == T.ENDED_AT_ONCE then T.more = 1 end
  for _, member in ipairs(over) do T.free_lapsing(member) end
end

-- Ends sessions whose connection was closed for longer than the policy's grace period: a process whose connection the
-- kernel closed is most likely dead.
function T.reap_closed()
  if pool.reap_ms == 0 or pool.now < pool.recover_until then return end
  for _, sid in ipairs(call('ZRANGE', T.sessions_key, 0, -1)) do
    if sid ~= q.sid then
      if call('PUBSUB', 'SHARDNUMSUB', T.channel(sid))[2] > 0 then
        call('HDEL', T.session_key(sid), 'closed_at')
      else
        call('HSETNX', T.session_key(sid), 'closed_at', T.int(pool.now))
        local since = tonumber(call('HGET', T.session_key(sid), 'closed_at'))
        if pool.now - since >= pool.reap_ms then T.reap(sid, pool.hold) end
      end
    end
  end
end

-- Records the number of sessions, and the next expiry, before which no check is needed.
function T.note_sessions()
  local first = call('ZRANGE', T.sessions_key, 0, 0, 'WITHSCORES')
  T.put('reap_at', first[2] or '0')
  pool.sessions = call('ZCARD', T.sessions_key)
  T.put('sessions', T.int(pool.sessions))
end
