-- does: admits waiters into the free capacity of the touched limits
-- keys: sessions session queue park line
-- args: none
-- returns: pump(), publish(), admit(), admit_waiter(), amount_at()
-- units: ms
T.ACK_WINDOW = 8
-- The most steps of one run; a step checks a limit with waiters, or the first waiter of one. The next run continues.
T.AT_ONCE = 30
T.peers, T.budget = {}, T.AT_ONCE

-- Returns the state of another session. No grant may be lost to a killed process: its channel has no subscriber. A
-- paused process looks reachable, and gets no more grants once `ACK_WINDOW` of them are not acknowledged.
function T.peer_of(sid)
  local peer = T.peers[sid]
  if peer then return peer end
  peer = { reachable = false, alive = false }
  T.peers[sid] = peer
  local expiry = call('ZSCORE', T.sessions_key, sid)
  if expiry and tonumber(expiry) > pool.now then
    local f = call('HMGET', T.session_key(sid), 'gen', 'sent', 'acked', 'full', 'blocked')
    peer.alive, peer.full, peer.blocked = true, f[4], f[5]
    peer.gen, peer.sent, peer.acked = tonumber(f[1]), tonumber(f[2]), tonumber(f[3])
    peer.reachable = call('PUBSUB', 'SHARDNUMSUB', T.channel(sid))[2] > 0
  end
  return peer
end

function T.deliverable(sid)
  local fresh = T.is_fresh(sid)
  if sid == own.sid and not fresh then return true end
  local peer = T.peer_of(sid)
  if not fresh and peer.reachable and peer.sent - peer.acked < T.ACK_WINDOW then return true end
  if peer.alive and not peer.blocked then
    peer.blocked = true
    call('HSET', T.session_key(sid), 'blocked', '1')
  end
  return false
end

-- Returns whether the turn of another session's waiters is kept until it acknowledges grants, for `ACK_WITHIN_MS` at
-- most. Under a rate they would wait for another window if others passed them. `full` records since when, and at
-- which limit.
T.ACK_WITHIN_MS = 100
function T.acknowledges_soon(sid, limit)
  if limit.sort == 'c' or sid == own.sid or T.is_fresh(sid) then return false end
  local peer = T.peer_of(sid)
  if not peer.reachable or peer.blocked or peer.sent - peer.acked < T.ACK_WINDOW then return false end
  local since = tonumber(string.match(peer.full or '', '^%d+') or pool.now)
  if pool.now - since >= T.ACK_WITHIN_MS then
    if peer.full then call('HDEL', T.session_key(sid), 'full') end
    peer.full = false
    return false
  end
  peer.full = T.int(since) .. '|' .. limit.name
  call('HSET', T.session_key(sid), 'full', peer.full)
  T.note_room_at(limit, since + T.ACK_WITHIN_MS)
  return true
end

function T.admit(queue, ticket, hard_ms, use, list)
  local seq, charges = T.next_seq(), {}
  T.taker = queue.sid .. '|' .. ticket
  for i, name in ipairs(T.names_in(queue.lane)) do
    local charged = T.take(T.limit_of(name), queue.band, list[i] or 1)
    if charged then charges[#charges + 1] = i .. '=' .. charged end
  end
  local value = T.value_of(seq, hard_ms, use, table.concat(charges, ','), queue.flow)
  if queue.sid == own.sid then
    T.set_held(tonumber(ticket), value)
    T.granted[#T.granted + 1] = { tonumber(ticket), seq }
    return
  end
  local peer, out = T.peers[queue.sid], T.outbox[queue.sid]
  peer.sent = peer.sent + 1
  if not out then
    out = { grants = {}, held = {} }
    T.outbox[queue.sid] = out
  end
  out.grants[#out.grants + 1] = { tonumber(ticket), seq }
  out.held['h:' .. ticket] = value
end

-- Returns the next band under a limit, and all bands with waiters that may be admitted. The next band is the highest,
-- unless a lower one has accrued its minimum share: of every admission, or of a rate's bound. Under a concurrency
-- limit a lower band gets its turns even without room of its own, since waiting higher bands use what is kept free
-- for them.
function T.turn_of(limit)
  local list = {}
  for number, band in ipairs(limit.bands) do
    -- The amount that its first ticket takes of a rate is checked when its turn has come.
    if band.waits > 0 then
      local has_turns = #list > 0 and limit.sort == 'c' and T.share_of(number) > 0
      if T.has_room(limit, number, 0) or has_turns then list[#list + 1] = number end
    end
  end
  for i = 2, #list do
    if limit.sort == 'c' then
      if limit.bands[list[i]].credit >= 1000 then return list[i], list end
    else
      local turn = T.rates().turn_of(limit, list[i])
      if turn then return list[i], list end
      if turn == false then break end
    end
  end
  return list[1], list
end

function T.settle_turn(limit, number, list)
  if #list < 2 or limit.sort == 'r' then return end
  for i = 2, #list do
    local band = limit.bands[list[i]]
    if band.waits > 0 then
      band.credit = math.min(2000, band.credit + T.share_of(list[i]))
      if list[i] == number then band.credit = math.max(0, band.credit - 1000) end
    end
  end
end

function T.admit_waiter(limit, queue, member, next_stamp, next_member)
  local ticket, hard_ms, use, text = string.match(member, '^(%d+)|(%d+)|(%d+)|(.*)$')
  local tenant = T.tenant_of(queue.tenant)
  call('ZREM', T.queue_key(queue), member)
  tenant.waiting, tenant.changed = tenant.waiting - 1, true
  use = T.use_at(limit, tonumber(use))
  local step = T.step_of(use, tenant)
  for _, name in ipairs(T.names_in(queue.lane)) do
    local each = T.limit_of(name)
    if each == limit or each.bands[queue.band].waits > 0 then
      T.advance(each, queue.band, T.charge(each, queue, step) - step)
    end
    -- Another call may be next there: of another tenant, or of a lower band that is owed a turn by this one.
    if each ~= limit and T.parked_at(each) > 0 then T.touch_sized(each) end
  end
  T.admit(queue, ticket, tonumber(hard_ms), use, T.amounts_in(text))
  if not next_stamp then
    T.load_place(queue)
    T.vacate(queue)
    return
  end
  call('ZADD', T.line_key(limit, queue), T.place(next_stamp), queue.id)
  if pool.starving > 0 then
    T.load_place(queue)
    T.forget_starving(queue)
    T.save_place(queue)
  end
  T.leave_line(queue, limit, next_member, next_stamp)
end

-- Moves a queue to another limit that blocks it. A ticket that moves too often gets precedence (see `starving.lua`).
function T.move(queue, limit, stamp)
  T.load_place(queue)
  T.unpark(queue)
  if queue.bounced ~= stamp then T.forget_starving(queue) end
  queue.bounces, queue.bounced = queue.bounces + 1, stamp
  if queue.bounces == T.STARVES then
    call('ZADD', T.starving_key, T.int(pool.seq), queue.id)
    call('PEXPIRE', T.starving_key, T.POOL_KEEP_MS)
    pool.starving = pool.starving + 1
  end
  T.park(queue, limit, stamp)
end

function T.amount_at(queue, limit, amounts)
  for i, name in ipairs(T.names_in(queue.lane)) do
    if name == limit.name then return amounts[i] or 1 end
  end
end

-- Handles the first queue of a band; true if there may be more to do under this limit.
function T.step(limit, number, list)
  local tenant = call('ZRANGE', T.park_key(limit, number), 0, 0)[1]
  local id = call('ZRANGE', T.prefix .. 'line:' .. limit.name .. '|' .. number .. '|' .. tenant, 0, 0)[1]
  local queue = T.queue_of(id)
  queue.at = limit.name
  T.budget = T.budget - 1
  if T.acknowledges_soon(queue.sid, limit) then return false end
  if not T.deliverable(queue.sid) then
    T.load_place(queue)
    T.unpark(queue)
    T.forget_starving(queue)
    T.block(queue)
    return true
  end
  local member, stamp, next_stamp, next_member = T.first_of(queue)
  local amounts = T.amounts_in(string.match(member, '^%d+|%d+|%d+|(.*)$'))
  if limit.sort == 'c' and number ~= list[1] then limit.passing, limit.passed = number, list[1] end
  local other, full = T.blocker(queue, amounts, stamp, limit.name)
  limit.passing = nil
  if not other then
    local band = limit.bands[number]
    -- What the band has waited for was in use until now.
    if limit.sort == 'r' and band.used > 0 and band.used <= band.held then
      band.held, limit.changed = math.max(band.held, pool.now - 1), true
    end
    T.admit_waiter(limit, queue, member, next_stamp, next_member)
    T.settle_turn(limit, number, list)
    return true
  end
  if other == limit then
    if limit.sort == 'r' and T.rates().is_used_up(limit, T.amount_at(queue, limit, amounts)) then
      limit.bands[number].held, limit.changed = pool.now, true
    end
    return false
  end
  T.move(queue, other, stamp)
  -- A band that is owed a turn may take what is kept free of it.
  if not full or other.sort == 'c' and other.bands[number].credit >= 1000 then T.touch(other) end
  return true
end

-- Sets a timer for the next check of each limit that only time frees.
function T.set_timers()
  local due = T.timers_changed or pool.timed_at > 0 and pool.now >= pool.timed_at
  for name, limit in pairs(T.limits) do
    if limit.retry_at and T.parked_at(limit) > 0 then
      -- The last check may have been for a larger demand.
      T.schedule_check(name, limit.retry_at)
      due = true
    end
  end
  if due then T.note_timers() end
  T.retry = false
end

function T.pump()
  if pool.now < pool.recover_until then return end
  if pool.timed_at > 0 and pool.now >= pool.timed_at then T.touch_due() end
  if pool.starving > 0 then T.serve_starving() end
  while next(T.touched) and T.budget > 0 and pool.parked > 0 do
    local list = {}
    for each in pairs(T.touched) do list[#list + 1] = each end
    if #list > 1 then table.sort(list) end
    for _, each in ipairs(list) do
      if T.budget <= 0 then break end
      T.touched[each] = nil
      T.pump_limit(T.limit_of(each))
    end
  end
  if pool.parked == 0 then
    T.touched = {}
  elseif T.budget <= 0 then
    -- The next run continues.
    T.more = 1
    if next(T.touched) then T.schedule_checks(T.touched) end
  end
  T.set_timers()
end

-- Admits the waiters of one limit, as far as the budget reaches.
function T.pump_limit(limit)
  if T.parked_at(limit) == 0 then return end
  T.budget = T.budget - 1
  local going = true
  while going and T.budget > 0 do
    local number, list = T.turn_of(limit)
    going = number ~= nil and T.step(limit, number, list)
  end
  if T.budget <= 0 then T.touched[limit.name] = true end
end

function T.publish()
  for sid, out in pairs(T.outbox) do
    local peer = T.peers[sid]
    out.held.sent = T.int(peer.sent)
    T.write(T.session_key(sid), out.held)
    call('SPUBLISH', T.channel(sid), cmsgpack.pack({ pool.epoch, peer.gen, peer.sent, out.grants, pool.now }))
  end
end
