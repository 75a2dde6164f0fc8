-- does: says which of its own waiters a session may let in by permits that it frees itself
-- keys: sessions park line
-- args: wants
-- returns: hints()
-- units: stamps of a tenant's tickets; virtual time as in places
-- Only waiters that are among the next ones anyway, as far ahead as there is one or two for every
-- process; only in lanes where nobody else waits for the same limits.
T.AHEAD_LEAST = 8
T.AHEAD_PER_SESSION = 4

function T.may_hand_on(queue)
  for _, name in ipairs(T.names_in(queue.lane)) do
    local limit = T.limit_of(name)
    if limit.sort ~= 'c' or limit.pause then return false end
    if not limit.shadow and limit.used > T.cap_of(limit, queue.band) then return false end
    for number, band in ipairs(limit.bands) do
      if band.waits > 0 and (name ~= queue.at or number ~= queue.band) then return false end
    end
  end
  return true
end

function T.hints(sessions)
  local list = {}
  if not pool.hand_off or pool.starving > 0 or pool.now < pool.recover_until then return list end
  for _, want in ipairs(q.wants) do
    local queue = own.queues[want[1]]
    if queue.at and queue.at ~= '!' and T.may_hand_on(queue) then
      local limit = T.limit_of(queue.at)
      local tag = T.tag_of(limit, queue)
      local first = call('ZRANGE', T.line_key(limit, queue), 0, 0, 'WITHSCORES')
      local tenants_here = call('ZCARD', T.park_key(limit, queue.band))
      local step_size = T.step_of(want[2], T.tenant_of(queue.tenant))
      local behind = math.floor((limit.bands[queue.band].virtual - tag) / step_size)
      local ahead = math.ceil((T.AHEAD_LEAST + T.AHEAD_PER_SESSION * sessions) / tenants_here)
      list[#list + 1] =
        { want[1], tonumber(first[2]) + behind + ahead, tag, tonumber(first[2]), step_size }
    end
  end
  return list
end
