-- does: lets a session join, or checks that it is still the one it believes to be, and renews it
-- keys: meta layout limits used sessions session held waiting queue heads lapsing
-- args: sid gen epoch batch join lease_ms full ack
-- returns: check_session(), me
-- units: ms
local me = { gen = 0, sent = 0 }
local conflict = 0

local function touch_own_lanes()
  for _, field in ipairs(redis.call('HKEYS', session_key(q.sid))) do
    local lane = string.match(field, '^lane:(.*)$')
    if lane then touch(lane) end
  end
end

-- The highest revision wins; a start-up never overwrites a newer one.
local function merge_policy(policy)
  if policy.revision > pool.revision then
    redis.call('DEL', limits_key)
    for limit, bound in pairs(policy.limits) do
      redis.call('HSET', limits_key, limit, int(bound))
      touch(limit)
    end
    bounds = {}
    pool.revision = policy.revision
    pool.lease_ms = policy.lease_ms
    pool.hold = policy.hold
    redis.call('HSET', meta_key, 'revision', int(policy.revision), 'lease_ms', int(policy.lease_ms),
      'hold', policy.hold and '1' or '0', 'policy', policy.blob)
  elseif policy.revision == pool.revision
    and redis.call('HGET', meta_key, 'policy') ~= policy.blob then
    conflict = 1
  end
end

-- What the process says it holds is the truth: it counts even above the limit, which then drains.
local function assert_held(entry)
  local ticket, limit, seq, hard_ms = entry[1], entry[2], entry[3], entry[4]
  local kept = redis.call('ZREM', lapsing_key, ticket .. '|' .. q.sid .. '|' .. limit) == 1
  redis.call('HSET', held_key(q.sid), ticket,
    int(seq) .. '|' .. int(pool.now + hard_ms) .. '|' .. limit)
  if not kept then add_used(limit, 1) end
end

-- It is back and has said what it holds: what else was held over for it is free, such as grants
-- that were pushed to it while it was paused.
local function free_unclaimed()
  for _, member in ipairs(redis.call('ZRANGE', lapsing_key, 0, -1)) do
    local sid, limit = string.match(member, '^[^|]*|([^|]*)|(.*)$')
    if sid == q.sid then
      redis.call('ZREM', lapsing_key, member)
      add_used(limit, -1)
    end
  end
end

-- Permits held over for sessions that died before the server forgot them. One that lives speaks
-- for itself.
local function assert_lapsing(entry)
  local member, left_ms = entry[1], entry[2]
  if not redis.call('ZSCORE', sessions_key, string.match(member, '^[^|]*|([^|]*)|'))
    and redis.call('ZADD', lapsing_key, 'NX', int(pool.now + left_ms), member) == 1 then
    redis.call('PEXPIRE', lapsing_key, int(left_ms + POOL_KEEP_MS), 'NX')
    redis.call('PEXPIRE', lapsing_key, int(left_ms + POOL_KEEP_MS), 'GT')
    add_used(string.match(member, '^[^|]*|[^|]*|(.*)$'), 1)
  end
end

-- A backstop for the case that nobody is left to reap: in every `full` sync, so at each third of
-- a lease.
local function keep_keys()
  redis.call('PEXPIRE', sessions_key, POOL_KEEP_MS)
  redis.call('PEXPIRE', used_key, POOL_KEEP_MS)
  redis.call('PEXPIRE', session_key(q.sid), SESSION_KEEP_MS)
  redis.call('PEXPIRE', held_key(q.sid), SESSION_KEEP_MS)
  redis.call('PEXPIRE', waiting_key(q.sid), SESSION_KEEP_MS)
  for _, field in ipairs(redis.call('HKEYS', session_key(q.sid))) do
    local lane = string.match(field, '^lane:(.*)$')
    if lane then
      redis.call('PEXPIRE', queue_key(lane, q.sid), SESSION_KEEP_MS)
      redis.call('PEXPIRE', heads_key(lane), SESSION_KEEP_MS)
    end
  end
end

local function join()
  local other = redis.call('GET', KEYS[2])
  if other and other ~= '1' then return 'layout' end
  redis.call('SET', KEYS[2], '1')
  local batch = tonumber(redis.call('HGET', session_key(q.sid), 'batch') or 0)
  if q.batch <= batch then return 'stale' end
  reap(q.sid, false)
  if redis.call('ZCARD', sessions_key) == 0 then recount() end
  merge_policy(q.join.policy)
  -- Whoever lived in an earlier epoch proves that there was one: the full quiet time is due.
  if q.epoch > 0 and q.epoch < pool.epoch then
    pool.recover_until = math.max(pool.recover_until,
      pool.began + math.max(pool.lease_ms, q.lease_ms))
    pool.changed = true
  end
  me.gen = next_seq()
  redis.call('ZADD', sessions_key, int(pool.now + pool.lease_ms), q.sid)
  redis.call('HSET', session_key(q.sid), 'gen', int(me.gen), 'batch', int(q.batch),
    'sent', '0', 'acked', '0')
  for _, entry in ipairs(q.join.held) do assert_held(entry) end
  free_unclaimed()
  for _, entry in ipairs(q.join.lapsing) do assert_lapsing(entry) end
  return 'ok'
end

-- Never renews blindly: a process that was paused must find its session gone.
local function check_session()
  if q.join then return join() end
  if q.epoch ~= pool.epoch then return 'epoch' end
  local f = redis.call('HMGET', session_key(q.sid), 'gen', 'batch', 'sent', 'acked', 'blocked')
  if not f[1] or tonumber(f[1]) ~= q.gen then return 'gone' end
  if q.batch <= tonumber(f[2]) then return 'stale' end
  me.gen, me.sent = tonumber(f[1]), tonumber(f[3])
  redis.call('ZADD', sessions_key, 'XX', int(pool.now + pool.lease_ms), q.sid)
  redis.call('HSET', session_key(q.sid), 'batch', int(q.batch),
    'acked', int(math.max(tonumber(f[4]), q.ack)))
  if f[5] then redis.call('HDEL', session_key(q.sid), 'blocked') end
  if f[5] or q.full then touch_own_lanes() end
  return 'ok'
end
