-- does: releases permits and settles their usage
-- keys: session lapsing owed park past
-- args: releases settles cancels uses
-- returns: release(), cancel(), settle(), use_of(), uncount_lane(), count_lane(), charges_of_lane(), carried(), correct(), restart_time()
-- units: ms; amounts in each limit's unit, in the order of the lane
function T.uncount_lane(lane, charges)
  for i, limit in ipairs(T.limits_in(lane)) do
    T.uncount(limit, T.amount_charged(limit, charges, i))
  end
end

function T.count_lane(lane, charges)
  for i, limit in ipairs(T.limits_in(lane)) do
    limit.used = limit.used + T.amount_charged(limit, charges, i)
    limit.changed = true
  end
end

-- Removes and returns the charges of a permit that is no longer held over.
function T.carried(member)
  local charges = call('HGET', T.carried_key, member)
  if charges then call('HDEL', T.carried_key, member) end
  return charges or ''
end

-- Returns the charges of a permit under the limits of its lane: position=amount@bucket for a rate, position=amount@0
-- for tokens in flight. `spends`: rates are charged. `again`: they were charged before, in an unknown bucket:
-- additional usage of the call will count, and nothing is returned.
function T.charges_of_lane(lane, list, spends, again)
  local charges = {}
  for i, limit in ipairs(T.limits_in(lane)) do
    if limit.by_tokens then
      charges[#charges + 1] = i .. '=' .. T.int(list[i] or 1) .. '@0'
    elseif spends and limit.sort ~= 'c' then
      local charged = T.rates().take(limit, list[i] or 1)
      if charged then charges[#charges + 1] = i .. '=' .. charged end
    elseif again and limit.sort ~= 'c' and not limit.exact then
      local amount = limit.shadow and list[i] or math.min(list[i] or 1, limit.bound)
      if amount and amount > 0 then charges[#charges + 1] = i .. '=' .. T.int(amount) .. '@0' end
    end
  end
  return table.concat(charges, ',')
end

-- Counts in the ramp of a pause what a call used instead of what it reserved.
local function correct_ramp(limit, more)
  local pause = limit.pause
  if more == 0 or limit.sort == 'c' or limit.exact or not pause or pause.gate or pool.now < pause.until_ms then return end
  pause.passed = math.max(0, pause.passed + more)
  limit.pause_changed, limit.changed = true, true
end

function T.settle_charges(charges, lane, list)
  if charges == '' then return end
  local names = T.names_in(lane)
  for i, amount, ends in string.gmatch(charges, '(%d+)=(%d+)@(%d+)') do
    i = tonumber(i)
    if list[i] then
      local limit = T.limit_of(names[i])
      T.rates().settle(limit, tonumber(ends), tonumber(amount), list[i])
      correct_ramp(limit, list[i] - tonumber(amount))
    end
  end
end

-- Adds what a tenant's calls used beyond what it was charged. A tenant with waiters is credited excess charges, even
-- if that is more than it is ahead; any other starts no earlier than the band's time.
function T.correct(limit, number, tenant, step)
  local band = limit.bands[number]
  if band.waits > 0 and (limit.sort ~= 'c' or limit.by_tokens) then
    -- The tenant whose turn it is then may need less than the one before.
    local first = call('ZRANGE', T.park_key(limit, number), 0, 0)[1]
    if call('ZADD', T.park_key(limit, number), 'XX', 'INCR', T.int(step), tenant) then
      if call('ZRANGE', T.park_key(limit, number), 0, 0)[1] ~= first then T.touch(limit) end
      return
    end
  elseif band.waits == 0 or call('ZADD', T.park_key(limit, number), 'XX', 'INCR', T.int(step), tenant) then
    return
  end
  local past, earliest = T.past_key(limit, number), band.virtual - T.BEHIND
  local tag = math.max(earliest, tonumber(call('ZSCORE', past, tenant) or earliest)) + step
  if tag > earliest then
    call('ZADD', past, T.int(tag), tenant)
    call('PEXPIRE', past, T.POOL_KEEP_MS)
  else
    call('ZREM', past, tenant)
  end
end

-- Restarts the virtual time of a band: it and all tags are lowered by the same amount. A busy limit needs it once in
-- years.
function T.restart_time(limit, number)
  local band = limit.bands[number]
  for _, key in ipairs({ T.park_key(limit, number), T.past_key(limit, number) }) do
    local tags, moved = call('ZRANGE', key, 0, -1, 'WITHSCORES'), {}
    for i = 1, #tags, 2 do
      moved[i], moved[i + 1] = T.int(tonumber(tags[i + 1]) - band.virtual), tags[i]
    end
    for i = 1, #moved, 1000 do call('ZADD', key, unpack(moved, i, math.min(i + 999, #moved))) end
  end
  band.virtual = 0
  T.moves = T.moves + 1
end

-- Returns the use of a call that ended, if shares are not in seconds. In shares by calls every call counts the same;
-- a call of unknown cost keeps its charge. `uses` alternates ticket and micro-dollars.
function T.use_of(ticket, charged)
  if pool.fair_by == 'calls' then return charged end
  if not T.uses then
    T.uses = {}
    for i = 1, #q.uses, 2 do T.uses[q.uses[i]] = q.uses[i + 1] end
  end
  return T.uses[ticket] or charged
end

-- Releases a permit; idempotent. Outcome: 0 success, 1 ignored, 2 dropped, plus 10 if the usage is reported later.
function T.release(ticket, number, outcome, took_ms, actual)
  local queue, value = own.queues[number], own.held[ticket]
  if not value then
    local member = queue and ticket .. '|' .. q.sid .. '|' .. queue.lane
    if member and call('ZREM', T.lapsing_key, member) == 1 then
      T.uncount_lane(queue.lane, T.carried(member))
    end
    return
  end
  T.set_held(ticket, false)
  local held = T.read_held(value)
  for i, limit in ipairs(T.limits_in(held.lane)) do
    if limit.current then T.adapt(limit, outcome % 10, ticket, took_ms) end
    T.uncount(limit, T.amount_charged(limit, held.charges, i))
  end
  if outcome >= 10 then
    if held.charges ~= '' then
      call('HSET', T.owed_key(q.sid), ticket, held.charges .. '|' .. held.lane)
      call('PEXPIRE', T.owed_key(q.sid), T.SESSION_KEEP_MS)
    end
  else
    T.settle_charges(held.charges, held.lane, T.amounts_in(actual))
  end
  if took_ms > 0 then
    if outcome % 10 == 0 then T.learn(held.lane, took_ms) end
    T.used(held.flow, held.use, pool.fair_by and T.use_of(ticket, held.use) or took_ms)
  end
end

-- Settles the usage of a call whose permit was released before. entry: ticket, actual amounts.
function T.settle(entry)
  local owed = call('HGET', T.owed_key(q.sid), entry[1])
  if not owed then return end
  call('HDEL', T.owed_key(q.sid), entry[1])
  local charges, lane = string.match(owed, '^([^|]*)|(.*)$')
  T.settle_charges(charges, lane, T.amounts_in(entry[2]))
end

-- Removes a ticket; a grant that crossed the message is released unused. entry: ticket, flow, member.
function T.cancel(entry)
  local ticket = entry[1]
  if T.unqueue(own.queues[entry[2]], entry[3]) then return end
  local value = own.held[ticket]
  if not value then return end
  T.set_held(ticket, false)
  local held = T.read_held(value)
  T.uncount_lane(held.lane, held.charges)
  T.used(held.flow, held.use, 0)
  local nothing = setmetatable({}, { __index = function() return 0 end })
  T.settle_charges(held.charges, held.lane, nothing)
end
