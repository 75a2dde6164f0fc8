-- does: parks a queue at the limit that blocks it, and removes it again
-- keys: session queue park line past starving stalled
-- args: none
-- returns: park(), unpark(), vacate(), block(), place_of(), leave_line(), blocker(), blocker_of_new(), parked_at(), load_place(), unblock(), return_to_line()
-- units: virtual time as in queues
function T.save_place(queue)
  local key, field = T.session_key(queue.sid), 'at:' .. queue.flow
  if queue.at then
    call('HSET', key, field, queue.at .. '|' .. queue.bounces .. '|' .. T.place(queue.bounced))
  else
    call('HDEL', key, field)
  end
end

function T.load_place(queue)
  T.set_place(queue, call('HGET', T.session_key(queue.sid), 'at:' .. queue.flow))
end

function T.parked_at(limit)
  local waits = 0
  for _, band in ipairs(limit.bands) do waits = waits + band.waits end
  return waits
end

function T.park(queue, limit, stamp)
  T.moves = T.moves + 1
  local band = limit.bands[queue.band]
  call('ZADD', T.line_key(limit, queue), T.place(stamp), queue.id)
  call('PEXPIRE', T.line_key(limit, queue), T.SESSION_KEEP_MS)
  local tag, parked = T.tag_of(limit, queue)
  if not parked then
    call('ZADD', T.park_key(limit, queue.band), T.int(tag), queue.tenant)
    call('PEXPIRE', T.park_key(limit, queue.band), T.SESSION_KEEP_MS)
    call('ZREM', T.past_key(limit, queue.band), queue.tenant)
  end
  band.waits = band.waits + 1
  pool.parked = pool.parked + 1
  limit.changed = true
  queue.at = limit.name
  T.save_place(queue)
end

-- Removes a queue from its limit. A tenant that leaves loses its credit, and stays charged for the probable use of
-- its calls in progress.
function T.unpark(queue)
  T.moves = T.moves + 1
  local limit = T.limit_of(queue.at)
  local band = limit.bands[queue.band]
  call('ZREM', T.line_key(limit, queue), queue.id)
  if call('EXISTS', T.line_key(limit, queue)) == 0 then
    local tag = tonumber(call('ZSCORE', T.park_key(limit, queue.band), queue.tenant))
    call('ZREM', T.park_key(limit, queue.band), queue.tenant)
    local past = T.past_key(limit, queue.band)
    call('ZADD', past, T.int(tag), queue.tenant)
    call('ZREMRANGEBYSCORE', past, '-inf', T.int(band.virtual - T.BEHIND))
    call('PEXPIRE', past, T.POOL_KEEP_MS)
  end
  band.waits = band.waits - 1
  if band.waits == 0 then
    band.credit = 0
    -- The room kept free for the band is free now.
    if band.passed > 0 then T.touch(limit) end
    band.passed = 0
  end
  pool.parked = pool.parked - 1
  limit.changed = true
end

function T.forget_starving(queue)
  if queue.bounces >= T.STARVES and call('ZREM', T.starving_key, queue.id) == 1 then
    pool.starving = pool.starving - 1
    -- The capacity reserved for the queue is free now.
    for _, name in ipairs(T.names_in(queue.lane)) do T.touch(T.limit_of(name)) end
  end
  queue.bounces, queue.bounced = 0, 0
end

function T.vacate(queue)
  if queue.at ~= '!' then
    T.unpark(queue)
  else
    call('ZREM', T.stalled_key(queue.sid), queue.id)
  end
  T.forget_starving(queue)
  queue.at = nil
  T.save_place(queue)
end

-- Blocks a queue, because its session accepts no grants.
function T.block(queue)
  queue.at = '!'
  T.save_place(queue)
  call('ZADD', T.stalled_key(queue.sid), 0, queue.id)
  call('PEXPIRE', T.stalled_key(queue.sid), T.SESSION_KEEP_MS)
end

-- Returns where a ticket waits that no limit blocks: the first limit that concerns it.
function T.place_of(queue, list)
  local names = T.names_in(queue.lane)
  for i, name in ipairs(names) do
    local limit = T.limit_of(name)
    if T.concerns(limit, list[i] or 1) then return limit end
  end
  return T.limit_of(names[1])
end

-- Moves a queue whose new head takes nothing of the rate at which it waits. It then waits at a limit that concerns the
-- head, so that waiters for the rate are not ahead of it.
function T.leave_line(queue, limit, member, stamp)
  if limit.sort == 'c' then return end
  local list = T.amounts_in(string.match(member, '^%d+|%d+|%d+|(.*)$'))
  if T.amount_at(queue, limit, list) > 0 then return end
  local place = T.place_of(queue, list)
  if place == limit then return end
  T.load_place(queue)
  T.unpark(queue)
  T.park(queue, place, stamp)
  T.touch(place)
end

-- Returns whether a ticket may be admitted now at a limit where its queue does not wait. It must not pass a higher
-- band, a tenant with an earlier turn, or an older ticket of its own tenant.
function T.its_turn(queue, limit, stamp)
  for higher = 1, queue.band - 1 do
    if limit.bands[higher].waits > 0 then return false end
  end
  if limit.bands[queue.band].waits == 0 then return true end
  local front = call('ZRANGE', T.park_key(limit, queue.band), 0, 0, 'WITHSCORES')
  if T.tag_of(limit, queue) > tonumber(front[2]) then return false end
  local own = call('ZRANGE', T.line_key(limit, queue), 0, 0, 'WITHSCORES')
  return not own[2] or tonumber(own[2]) >= stamp
end

-- Returns the limit that blocks a ticket, or nil, and whether that limit is full. `here`: the limit where it waits.
function T.blocker(queue, list, stamp, here)
  for i, name in ipairs(T.names_in(queue.lane)) do
    local limit, amount = T.limit_of(name), list[i] or 1
    if T.concerns(limit, amount) then
      if not T.has_room(limit, queue.band, amount) then return limit, true end
      if amount > 0 and name ~= here and not T.its_turn(queue, limit, stamp) then return limit, false end
    end
  end
  return nil, false
end

-- Returns the limit at which a new ticket must wait. If others wait there already, the pump decides which is next,
-- even if there is room.
function T.blocker_of_new(queue, list)
  for i, name in ipairs(T.names_in(queue.lane)) do
    local limit, amount = T.limit_of(name), list[i] or 1
    if T.concerns(limit, amount)
      and (amount > 0 and T.parked_at(limit) > 0 or not T.has_room(limit, queue.band, amount)) then
      return limit
    end
  end
end

function T.return_to_line(queue)
  local member, stamp = T.first_of(queue)
  local list = T.amounts_in(string.match(member, '^%d+|%d+|%d+|(.*)$'))
  local limit = T.blocker(queue, list, stamp, nil) or T.place_of(queue, list)
  T.park(queue, limit, stamp)
  T.touch(limit)
end

-- Parks blocked queues of a session that accepts grants again, some per run. Their tickets keep their stamps.
T.UNBLOCKED_AT_ONCE = 10
function T.unblock()
  local key = T.stalled_key(q.sid)
  local list = call('ZRANGE', key, 0, T.UNBLOCKED_AT_ONCE - 1)
  if #list > 0 then call('ZREM', key, unpack(list)) end
  for _, id in ipairs(list) do
    local queue = T.queue_of(id)
    T.load_place(queue)
    if queue.at == '!' then T.return_to_line(queue) end
  end
  if #list == T.UNBLOCKED_AT_ONCE then
    -- The queues of a fresh session are blocked again: it does not repeat the request for them.
    if not T.is_fresh(q.sid) then T.more = 1 end
  else
    call('HDEL', T.session_key(q.sid), 'blocked')
    own.blocked = false
  end
end
