-- does: tells a session where it stands, and with `full` all that it holds
-- keys: meta sessions held lapsing
-- args: sid full revision
-- returns: reply(status)
-- units: ms
local function next_event_ms()
  local first = math.huge
  for _, key in ipairs({ sessions_key, lapsing_key }) do
    local head = redis.call('ZRANGE', key, 0, 0, 'WITHSCORES')
    if head[2] then first = math.min(first, tonumber(head[2])) end
  end
  if first == math.huge then return 0 end
  return math.max(1, first - pool.now)
end

local function all_held()
  local list, raw = {}, redis.call('HGETALL', held_key(q.sid))
  for i = 1, #raw, 2 do
    list[#list + 1] = { tonumber(raw[i]), tonumber(string.match(raw[i + 1], '^([^|]*)|')) }
  end
  return list
end

local function all_lapsing()
  local list, raw = {}, redis.call('ZRANGE', lapsing_key, 0, 999, 'WITHSCORES')
  for i = 1, #raw, 2 do
    list[#list + 1] = { raw[i], math.max(0, tonumber(raw[i + 1]) - pool.now) }
  end
  return list
end

local function reply(status)
  local full = q.full and status == 'ok'
  return cmsgpack.pack({
    status, pool.epoch, me.gen, pool.lease_ms, math.max(0, pool.recover_until - pool.now),
    pool.revision, redis.call('ZCARD', sessions_key), me.sent, more, conflict, granted,
    full and all_held() or false,
    full and pool.hold and all_lapsing() or false,
    full and next_event_ms() or 0,
    status == 'ok' and (q.revision ~= pool.revision or conflict == 1)
      and redis.call('HGET', meta_key, 'policy') or false,
  })
end
