-- does: shows a pool without changing it
-- keys: meta layout
-- args: request
-- request: permits
-- returns: now_ms epoch recovering_ms revision parked seq sessions limits tenants permits queues
-- units: ms; sessions are (sid, name, left_ms, held, blocked, revision), limits are (name, sort, bound, used, waiting, lapsing, current, shadowed, paused_ms, pause said, room_in_ms, reserved, cost_ms, taken), tenants are (name, waiting, weight), permits are (sid, ticket, seq, left_ms, flow), queues are (sid, flow, parked at, waiting, first stamp, first ticket, last ticket)
-- uses: core clock pool limits
-- later: rates pacing bucket pauses
T.load_pool()
pool.now = math.max(T.wall_clock_ms(), pool.clock)
local lapsing = {}
for _, member in ipairs(call('ZRANGE', T.lapsing_key, 0, -1)) do
  for _, name in ipairs(T.names_in(string.match(member, '^[^|]*|[^|]*|(.*)$'))) do
    lapsing[name] = (lapsing[name] or 0) + 1
  end
end
local sessions, permits, queues, waiting, reserved = {}, {}, {}, {}, {}
local alive = call('ZRANGE', T.sessions_key, 0, -1, 'WITHSCORES')
for i = 1, #alive, 2 do
  local sid, name, blocked, held, revision = alive[i], '', 0, 0, 0
  local raw = call('HGETALL', T.session_key(sid))
  for k = 1, #raw, 2 do
    local ticket = string.match(raw[k], '^h:(.*)$')
    if ticket then
      held = held + 1
      local seq, until_ms, charges, flow =
        string.match(raw[k + 1], '^([^|]*)|([^|]*)|[^|]*|([^|]*)|(.*)$')
      if charges ~= '' then
        local names = T.names_in(string.match(flow, '^[^|]*|[^|]*|(.*)$'))
        for place, amount in string.gmatch(charges, '(%d+)=(%d+)@') do
          local charged = names[tonumber(place)]
          reserved[charged] = (reserved[charged] or 0) + tonumber(amount)
        end
      end
      if q.permits then
        permits[#permits + 1] = { sid, tonumber(ticket), tonumber(seq),
          tonumber(until_ms) - pool.now, flow }
      end
    elseif string.match(raw[k], '^at:') then
      local flow, at = string.match(raw[k], '^at:(.*)$'), string.match(raw[k + 1], '^([^|]*)|')
      local key = T.prefix .. 'queue:' .. sid .. '|' .. flow
      local count, first = call('ZCARD', key), call('ZRANGE', key, 0, 0, 'WITHSCORES')
      waiting[at] = (waiting[at] or 0) + count
      local last = call('ZRANGE', key, -1, -1)
      queues[#queues + 1] =
        { sid, flow, at, count, tonumber(first[2] or 0), first[1] or '', last[1] or '' }
    elseif raw[k] == 'name' then
      name = raw[k + 1]
    elseif raw[k] == 'blocked' then
      blocked = 1
    elseif raw[k] == 'revision' then
      revision = tonumber(raw[k + 1])
    end
  end
  sessions[#sessions + 1] = { sid, name, tonumber(alive[i + 1]) - pool.now, held, blocked,
    revision }
end
local list, record = {}, call('HGETALL', T.meta_key)
local fields = {}
for i = 1, #record, 2 do fields[record[i]] = record[i + 1] end
local seen = {}
for field in pairs(fields) do
  local letter, name = string.match(field, '^([dupw]):(.*)$')
  if letter == 'd' or letter and not fields['d:' .. name] and T.is_implicit(name) then
    seen[name] = true
  end
end
for name in pairs(seen) do
  local limit = T.limit_of(name)
  if not limit.implicit or limit.pause or limit.used > 0 or waiting[name] then
    local used = limit.sort == 'c' and limit.used or T.rates().spent(limit)
    local taken = limit.sort == 'c' and 0 or T.rates().taken(limit)
    local paused_ms = limit.pause and math.max(limit.pause.gate and 1 or 0,
      limit.pause.until_ms - pool.now) or 0
    local at = tonumber(call('ZSCORE', T.timed_key, name) or 0)
    if limit.sort ~= 'c' and not limit.shadow then at = math.max(at, T.rates().free_at(limit, 1)) end
    list[#list + 1] = { name, limit.sort, limit.bound, used, waiting[name] or 0, lapsing[name] or 0,
      limit.current and math.floor(limit.current / 1000) or limit.bound,
      tonumber(fields['x:' .. name] or 0), paused_ms, limit.pause and limit.pause.said or '',
      math.max(0, at - pool.now), reserved[name] or 0, limit.cost_ms, taken }
  end
end
local tenants = {}
for field, value in pairs(fields) do
  local name = string.match(field, '^n:(.*)$')
  if name then
    tenants[#tenants + 1] = { name, tonumber(string.match(value, '^%d+')),
      tonumber(fields['t:' .. name] or 1) }
  end
end
return cmsgpack.pack({ pool.now, pool.epoch, math.max(0, pool.recover_until - pool.now),
  pool.revision, pool.parked, pool.seq, sessions, list, tenants, permits, queues })
