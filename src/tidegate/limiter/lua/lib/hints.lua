-- does: determines which of its own waiters a session may admit with permits that it releases itself
-- keys: park line
-- args: wants
-- returns: hints()
-- units: stamps of a tenant's tickets; virtual time as in queues
-- Passing a permit on saves a short call the round trip to the server. Only waiters whose turn comes within
-- `AHEAD_MS` anyway may get one, so that no waiter is passed by more than that; if calls are long, only the next one.
-- All limits of the lane must be concurrency limits that do not need the outcome of each call, and all their waiters
-- must wait in the same band of the same limit. The tenant's next ticket must not be one that passes others because
-- of its deadline.
T.AHEAD_MS = 150

function T.may_transfer(queue)
  for _, limit in ipairs(T.limits_in(queue.lane)) do
    if limit.sort ~= 'c' or limit.pause or limit.current or limit.by_tokens then return false end
    if not limit.shadow and limit.used > T.cap_of(limit, queue.band) then return false end
    for number, band in ipairs(limit.bands) do
      if band.waits > 0 and (limit.name ~= queue.at or number ~= queue.band) then return false end
    end
  end
  return true
end

-- Returns the hints. In virtual time the horizon is the same for all tenants, so that none uses up its hint long
-- before the others. Tenants that request no hint are assumed to have the average weight of those that do.
function T.hints()
  local list, sums, tenants_at = {}, #q.wants > 1 and T.tickets_of_wants(), {}
  if not pool.hand_off or pool.starving > 0 or pool.now < pool.recover_until then return list end
  for _, want in ipairs(q.wants) do
    local queue = own.queues[want[1]]
    if queue.at and queue.at ~= '!' and T.may_transfer(queue) then
      local limit = T.limit_of(queue.at)
      local known = queue.known_at == T.moves
      local tag = known and queue.tag or T.tag_of(limit, queue)
      local first = tonumber(call('ZRANGE', T.line_key(limit, queue), 0, 0, 'WITHSCORES')[2])
      local band = limit.bands[queue.band]
      local tenants = tenants_at[band] or band.alone_at == T.moves and 1
        or call('ZCARD', T.park_key(limit, queue.band))
      tenants_at[band] = tenants
      local cost_ms, tenant = T.cost_at(limit, want[2]), T.tenant_of(queue.tenant)
      local tickets, step = T.tickets_of(want[3], tenant), math.max(1, T.step_of(T.use_at(limit, want[3]), tenant))
      local sum = sums and sums[queue.at .. '|' .. queue.band] or { count = 1, tickets = tickets }
      local ahead = 1 + math.floor(T.cap_of(limit, queue.band) * T.AHEAD_MS / cost_ms)
      local behind = math.floor((band.virtual - tag) / step)
      if first % 1 == 0 then
        list[#list + 1] = { want[1], first + behind - 1
          + math.ceil(ahead * sum.count * tickets / (sum.tickets * tenants)), tag, first, step }
      end
    end
  end
  return list
end
