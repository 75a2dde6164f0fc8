-- does: takes permits back and settles what they used
-- keys: session lapsing owed
-- args: releases settles cancels
-- returns: release(), cancel(), settle(), give_back_lane(), count_lane(), spend(), used(), correct_all()
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

-- A call used `took_ms` of a permit, and its tenant was charged `charged_ms` for it: 0 for one that
-- was let in while nobody waited. Added up by flow, so that a request corrects each tag once.
T.differs, T.differing = {}, {}
function T.used(flow, charged_ms, took_ms)
  if charged_ms == 0 or took_ms == charged_ms then return end
  local before = T.differs[flow]
  if not before then T.differing[#T.differing + 1] = flow end
  T.differs[flow] = (before or 0) + took_ms - charged_ms
end

function T.correct_all()
  if #T.differing == 0 then return end
  T.moves = T.moves + 1
  for _, flow in ipairs(T.differing) do
    local band, tenant, lane = string.match(flow, '^([^|]*)|([^|]*)|(.*)$')
    local step = T.step_of(T.differs[flow], T.tenant_of(tenant))
    for _, limit in ipairs(T.limits_in(lane)) do
      T.correct(limit, tonumber(band), tenant, step)
    end
  end
  T.differs, T.differing = {}, {}
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
    T.used(held.flow, held.cost_ms, took_ms)
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
  T.used(held.flow, held.cost_ms, 0)
  local nothing = setmetatable({}, { __index = function() return 0 end })
  T.settle_charges(held.charges, held.lane, nothing)
end
