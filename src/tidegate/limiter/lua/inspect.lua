-- does: shows a pool without changing it
-- keys: meta layout
-- args: request
-- request: now_ms
-- returns: epoch recovering_ms revision sessions limits
-- units: ms; limits is a list of (limit, bound, used, waiting, lapsing)
-- uses: keys clock pool
load_pool()
local now = math.max(wall_clock_ms(), pool.clock)
local lapsing = {}
for _, member in ipairs(redis.call('ZRANGE', lapsing_key, 0, -1)) do
  local limit = string.match(member, '^[^|]*|[^|]*|(.*)$')
  lapsing[limit] = (lapsing[limit] or 0) + 1
end
local list, raw = {}, redis.call('HGETALL', limits_key)
for i = 1, #raw, 2 do
  local limit, waiting = raw[i], 0
  for _, sid in ipairs(redis.call('ZRANGE', heads_key(limit), 0, -1)) do
    waiting = waiting + redis.call('ZCARD', queue_key(limit, sid))
  end
  list[#list + 1] = { limit, tonumber(raw[i + 1]), used_of(limit), waiting, lapsing[limit] or 0 }
end
return cmsgpack.pack({ pool.epoch, math.max(0, pool.recover_until - now), pool.revision,
  redis.call('ZCOUNT', sessions_key, '(' .. int(now), '+inf'), list })
