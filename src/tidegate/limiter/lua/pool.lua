-- does: loads and saves the pool's record, and counts permits per limit in memory until saved
-- keys: meta limits used
-- args: none
-- returns: pool, load_pool(), save_pool(), used_of(), add_used(), limit_of(), touch(), next_seq()
-- units: ms
local pool = {}
local used, used_changed, bounds = {}, {}, {}
local touched = {}

local function load_pool()
  local f = redis.call('HMGET', meta_key, 'run', 'epoch', 'recover_until', 'clock', 'seq',
    'lease_ms', 'revision', 'hold', 'began')
  pool.run = f[1] or ''
  pool.epoch = tonumber(f[2] or 0)
  pool.recover_until = tonumber(f[3] or 0)
  pool.clock = tonumber(f[4] or 0)
  pool.seq = tonumber(f[5] or 0)
  pool.lease_ms = tonumber(f[6] or 0)
  pool.revision = tonumber(f[7] or 0)
  pool.hold = f[8] == '1'
  pool.began = tonumber(f[9] or 0)
end

local function save_pool()
  redis.call('HSET', meta_key, 'clock', int(pool.now), 'seq', int(pool.seq))
  if pool.changed then
    redis.call('HSET', meta_key, 'run', pool.run, 'epoch', int(pool.epoch), 'began', int(pool.began),
      'recover_until', int(pool.recover_until))
  end
  for limit in pairs(used_changed) do
    if used[limit] == 0 then
      redis.call('HDEL', used_key, limit)
    else
      redis.call('HSET', used_key, limit, int(used[limit]))
    end
  end
end

local function next_seq()
  pool.seq = pool.seq + 1
  return pool.seq
end

-- A touched lane is one where somebody might be let in now.
local function touch(lane) touched[lane] = true end

local function used_of(limit)
  local count = used[limit]
  if not count then
    count = tonumber(redis.call('HGET', used_key, limit) or 0)
    used[limit] = count
  end
  return count
end

local function add_used(limit, delta)
  used[limit] = used_of(limit) + delta
  used_changed[limit] = true
  if delta < 0 then touch(limit) end
end

local function limit_of(limit)
  local bound = bounds[limit]
  if not bound then
    bound = tonumber(redis.call('HGET', limits_key, limit) or 0)
    bounds[limit] = bound
  end
  return bound
end
