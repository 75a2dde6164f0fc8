-- does: takes permits back and settles what they used
-- keys: session lapsing owed
-- args: releases settles cancels
-- returns: release(), cancel(), settle(), give_back_lane(), count_lane(), spend()
-- units: ms; amounts in each limit's unit, in the order of the lane
function T.give_back_lane(lane)
  for _, limit in ipairs(T.limits_in(lane)) do T.give_back(limit) end
end

function T.count_lane(lane)
  for _, limit in ipairs(T.limits_in(lane)) do
    limit.used = limit.used + 1
    limit.changed = true
  end
end

-- What a permit takes of the rates of its lane: position=amount@bucket.
function T.spend(queue, list)
  local charges = {}
  for i, name in ipairs(T.names_in(queue.lane)) do
    local limit = T.limit_of(name)
    if limit.sort ~= 'c' then
      local charged = T.rates().take(limit, list[i] or 1)
      if charged then charges[#charges + 1] = i .. '=' .. charged end
    end
  end
  return table.concat(charges, ',')
end

function T.settle_charges(charges, lane, list)
  if charges == '' then return end
  local names = T.names_in(lane)
  for i, amount, ends in string.gmatch(charges, '(%d+)=(%d+)@(%d+)') do
    i = tonumber(i)
    if list[i] then
      T.rates().settle(T.limit_of(names[i]), tonumber(ends), tonumber(amount), list[i])
    end
  end
end

-- What a call cost more or less than its tenant was charged for. Who waits gets back what it was
-- charged too much, even if that is more than it lies ahead; who does not gains no credit.
function T.correct(held, took_ms)
  if held.cost_ms == 0 or math.abs(took_ms - held.cost_ms) * 4 <= held.cost_ms then return end
  T.moves = T.moves + 1
  local tenant = T.tenant_of(held.tenant)
  local delta = T.step_of(took_ms, tenant) - T.step_of(held.cost_ms, tenant)
  for _, name in ipairs(T.names_in(held.lane)) do
    local limit = T.limit_of(name)
    local band = limit.bands[held.band]
    if band.waits > 0 then
      local tag, parked = T.tag_of(limit, held)
      local key = parked and T.park_key(limit, held.band) or T.past_key(limit, held.band)
      tag = parked and tag + delta or math.max(band.virtual, tag + delta)
      call('ZADD', key, T.int(tag), held.tenant)
      if not parked then call('PEXPIRE', key, T.POOL_KEEP_MS) end
    end
  end
end

-- Doing it twice does nothing the second time. Outcome 0 success, 1 ignored, 2 dropped; 10 more when the usage will be told later.
function T.release(ticket, number, outcome, took_ms, actual)
  local queue, value = own.queues[number], own.held[ticket]
  if not value then
    if queue and call('ZREM', T.lapsing_key, ticket .. '|' .. q.sid .. '|' .. queue.lane) == 1 then
      T.give_back_lane(queue.lane)
    end
    return
  end
  T.set_held(ticket, false)
  local held = T.read_held(value)
  for _, limit in ipairs(T.limits_in(held.lane)) do
    if limit.current then T.adapt(limit, outcome % 10) end
    T.give_back(limit)
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
    T.correct(held, took_ms)
  end
end

-- entry: ticket, actual amounts. The usage of a call whose permit was given back before.
function T.settle(entry)
  local owed = call('HGET', T.owed_key(q.sid), entry[1])
  if not owed then return end
  call('HDEL', T.owed_key(q.sid), entry[1])
  local charges, lane = string.match(owed, '^([^|]*)|(.*)$')
  T.settle_charges(charges, lane, T.amounts_in(entry[2]))
end

-- entry: ticket, flow, member. A grant that crossed the cancel is given back, unused.
function T.cancel(entry)
  local ticket = entry[1]
  if T.unqueue(own.queues[entry[2]], entry[3]) then return end
  local value = own.held[ticket]
  if not value then return end
  T.set_held(ticket, false)
  local held = T.read_held(value)
  T.give_back_lane(held.lane)
  local nothing = setmetatable({}, { __index = function() return 0 end })
  T.settle_charges(held.charges, held.lane, nothing)
end
