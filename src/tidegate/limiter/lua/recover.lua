-- does: advances the pool's clock, reaps dead sessions, and begins a new epoch when the past is lost
-- keys: meta used sessions session held waiting queue heads lapsing
-- args: epoch run uptime_ms lease_ms
-- returns: reap(sid, hold), recount(), recover(), reap_expired()
-- units: ms
local REAP_AT_ONCE = 64

-- Ends a session. With `hold` its permits stay counted until the hard deadline of their calls.
local function reap(sid, hold)
  local held = redis.call('HGETALL', held_key(sid))
  for i = 1, #held, 2 do
    local until_ms, limit = string.match(held[i + 1], '^[^|]*|([^|]*)|(.*)$')
    if hold and tonumber(until_ms) > pool.now then
      redis.call('ZADD', lapsing_key, until_ms, held[i] .. '|' .. sid .. '|' .. limit)
      local keep_ms = int(tonumber(until_ms) - pool.now + POOL_KEEP_MS)
      redis.call('PEXPIRE', lapsing_key, keep_ms, 'NX')
      redis.call('PEXPIRE', lapsing_key, keep_ms, 'GT')
    else
      add_used(limit, -1)
    end
  end
  for _, field in ipairs(redis.call('HKEYS', session_key(sid))) do
    local lane = string.match(field, '^lane:(.*)$')
    if lane then
      redis.call('UNLINK', queue_key(lane, sid))
      redis.call('ZREM', heads_key(lane), sid)
    end
  end
  redis.call('UNLINK', held_key(sid), waiting_key(sid), session_key(sid))
  redis.call('ZREM', sessions_key, sid)
end

-- Counts again from what is sure to be there when no session is left: the permits held over.
local function recount()
  redis.call('DEL', used_key)
  used, used_changed = {}, {}
  for _, member in ipairs(redis.call('ZRANGE', lapsing_key, 0, -1)) do
    add_used(string.match(member, '^[^|]*|[^|]*|(.*)$'), 1)
  end
end

local function begin_epoch()
  local known = pool.epoch > 0 or q.epoch > 0
  for _, sid in ipairs(redis.call('ZRANGE', sessions_key, 0, -1)) do
    reap(sid, pool.hold)
  end
  recount()
  local quiet_ms = math.max(pool.lease_ms, q.lease_ms)
  -- Nobody knows of this pool: those who might have seen it on an earlier run of the server
  -- have had since its start to come back.
  if not known then quiet_ms = math.max(0, quiet_ms - q.uptime_ms) end
  pool.epoch = math.max(pool.now, pool.epoch + 1, q.epoch + 1)
  pool.run = q.run
  pool.began = pool.now
  pool.changed = true
  pool.recover_until = pool.now + quiet_ms
end

-- The past is lost when the server is another one or empty; when its clock was set back; or when
-- nobody spoke to it for half a lease and a session ran out meanwhile: then the server or its
-- clock was away, not the session, and everybody may still be running what he held.
local function recover()
  local wall = wall_clock_ms()
  local jump_ms = math.max(pool.lease_ms, 1) / 2
  local set_back = pool.clock - wall > jump_ms
  pool.now = wall
  if not set_back and pool.clock > wall then pool.now = pool.clock end
  local silent = pool.epoch > 0 and wall - pool.clock > jump_ms
    and #redis.call('ZRANGEBYSCORE', sessions_key, '-inf', wall, 'LIMIT', 0, 1) > 0
  if pool.epoch == 0 or pool.run ~= q.run or q.epoch > pool.epoch or set_back or silent then
    begin_epoch()
  end
end

local function reap_expired()
  local dead = redis.call('ZRANGEBYSCORE', sessions_key, '-inf', pool.now, 'LIMIT', 0, REAP_AT_ONCE)
  for _, sid in ipairs(dead) do reap(sid, pool.hold) end
  local over = redis.call('ZRANGEBYSCORE', lapsing_key, '-inf', pool.now, 'LIMIT', 0, REAP_AT_ONCE)
  for _, member in ipairs(over) do
    redis.call('ZREM', lapsing_key, member)
    add_used(string.match(member, '^[^|]*|[^|]*|(.*)$'), -1)
  end
end
