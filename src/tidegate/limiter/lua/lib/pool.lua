-- does: loads and saves the pool's record, whose fields are kept in memory until the end
-- keys: meta
-- args: flows
-- returns: pool, load_pool(), save_pool(), put(), read(), read_limits(), write(), next_seq(), tenant_of(), step_of(), tickets_of()
-- units: ms
local pool = {}
T.changed, T.tenants, T.limits, T.found, T.names, T.spenders = {}, {}, {}, {}, {}, {}

local POOL_FIELDS = { 'run', 'epoch', 'recover_until', 'clock', 'seq', 'lease_ms', 'revision',
  'hold', 'began', 'parked', 'timed_at', 'starving', 'bands', 'queue_max', 'hand_off', 'reap_ms',
  'reap_at', 'sessions', 'roster', 'fresh', 'changes', 'fair_by' }
local LIMIT_FIELDS = { 'd:', 'u:', 'w:', 'p:', 'a:', 'e:' }

-- Returns the names of the limits in a lane, which is one string.
function T.names_in(lane)
  local list = T.names[lane]
  if not list then
    list = {}
    for name in string.gmatch(lane, '[^ ]+') do list[#list + 1] = name end
    T.names[lane] = list
  end
  return list
end

-- Returns the values of any number of fields of a hash.
function T.read(key, fields)
  if #fields <= 1000 then return call('HMGET', key, unpack(fields)) end
  local values = {}
  for i = 1, #fields, 1000 do
    local found = call('HMGET', key, unpack(fields, i, math.min(i + 999, #fields)))
    for k, value in ipairs(found) do values[i + k - 1] = value end
  end
  return values
end

-- Reads the record of the pool together with its fields for the limits and tenants of the request.
function T.load_pool()
  local fields, first = { unpack(POOL_FIELDS) }, {}
  for _, flow in ipairs(q.flows) do
    local tenant, lane = string.match(flow, '^[^|]*|([^|]*)|(.*)$')
    if not first['t:' .. tenant] then
      first['t:' .. tenant] = #fields + 1
      fields[#fields + 1] = 'n:' .. tenant
      fields[#fields + 1] = 't:' .. tenant
    end
    for _, name in ipairs(T.names_in(lane)) do
      if not first['l:' .. name] then
        first['l:' .. name] = #fields + 1
        for _, letter in ipairs(LIMIT_FIELDS) do
          fields[#fields + 1] = letter .. name
        end
      end
    end
  end
  local f = T.read(T.meta_key, fields)
  T.found, T.first = f, first
  pool.run = f[1] or ''
  pool.epoch = tonumber(f[2] or 0)
  pool.recover_until = tonumber(f[3] or 0)
  pool.clock = tonumber(f[4] or 0)
  pool.seq = tonumber(f[5] or 0)
  pool.lease_ms = tonumber(f[6] or 0)
  pool.revision = tonumber(f[7] or 0)
  pool.hold = f[8] == '1'
  pool.began = tonumber(f[9] or 0)
  pool.parked = tonumber(f[10] or 0)
  pool.timed_at = tonumber(f[11] or 0)
  pool.starving = tonumber(f[12] or 0)
  pool.bands = f[13] or '0:0'
  pool.queue_max = tonumber(f[14] or 0)
  pool.hand_off = f[15] ~= '0'
  pool.reap_ms = tonumber(f[16] or 0)
  pool.reap_at = tonumber(f[17] or 0)
  pool.sessions = tonumber(f[18] or 0)
  pool.roster, pool.fresh = tonumber(f[19] or 0), tonumber(f[20] or 0)
  pool.indexed, pool.changes = f[21], tonumber(f[21] or 0)
  -- The measure of shares; nil for seconds.
  pool.fair_by = f[22] ~= 'seconds' and f[22] or nil
  pool.was_parked, pool.was_timed, pool.was_starving = pool.parked, pool.timed_at, pool.starving
end

-- Returns the fields of a limit or a tenant, which `load_pool` may have read. Each is requested only once: after
-- that, the limit or tenant is in memory.
function T.fetch(what, ...)
  local at = T.first and T.first[what]
  if at then
    T.first[what] = nil
    return T.found, at
  end
  return call('HMGET', T.meta_key, ...), 1
end

-- Reads the fields of limits that are not in memory together, for `limit_of`.
function T.read_limits(names)
  local fields, count = {}, #T.found
  T.first = T.first or {}
  for _, name in ipairs(names) do
    if not T.limits[name] and not T.first['l:' .. name] then
      T.first['l:' .. name] = count + #fields + 1
      for _, letter in ipairs(LIMIT_FIELDS) do fields[#fields + 1] = letter .. name end
    end
  end
  if #fields == 0 then return end
  for i, value in ipairs(T.read(T.meta_key, fields)) do T.found[count + i] = value end
end

-- Sets a field of the record, to be written at the end of the run; false deletes it.
function T.put(field, value) T.changed[field] = value end

function T.write(key, fields)
  local set, gone = {}, {}
  for field, value in pairs(fields) do
    if value then
      set[#set + 1] = field
      set[#set + 1] = value
    else
      gone[#gone + 1] = field
    end
  end
  for i = 1, #set, 1000 do call('HSET', key, unpack(set, i, math.min(i + 999, #set))) end
  for i = 1, #gone, 1000 do call('HDEL', key, unpack(gone, i, math.min(i + 999, #gone))) end
end

function T.save_pool()
  local changed = T.changed
  if not pool.doubtful then changed.clock = T.int(pool.now) end
  changed.seq = T.int(pool.seq)
  if pool.parked ~= pool.was_parked then changed.parked = T.int(pool.parked) end
  if pool.timed_at ~= pool.was_timed then changed.timed_at = T.int(pool.timed_at) end
  if pool.starving ~= pool.was_starving then changed.starving = T.int(pool.starving) end
  for _, limit in pairs(T.limits) do
    if limit.changed then T.save_limit(limit) end
  end
  if T.spenders[1] then T.rates().note_spenders() end
  for name, tenant in pairs(T.tenants) do
    if tenant.changed then
      -- The stamps of a tenant without waiters start again.
      local last, stays = '', tenant.waiting > 0 or tenant.returns or false
      if tenant.last and stays then
        for band, due in pairs(tenant.last) do last = last .. '|' .. band .. '=' .. T.int(due) end
      elseif tenant.last then
        T.forget_order(name, tenant)
      end
      changed['n:' .. name] = stays
        and T.int(tenant.waiting) .. '|' .. T.int(tenant.stamp) .. last
      tenant.changed = nil
    end
  end
  T.write(T.meta_key, changed)
  T.changed = {}
  pool.was_parked, pool.was_timed, pool.was_starving = pool.parked, pool.timed_at, pool.starving
end

-- Sequence numbers are a thousand apart: a permit that is passed on within a process takes the
-- next one each time, so that fences stay unique and grow along its life.
function T.next_seq()
  pool.seq = pool.seq + 1000
  return pool.seq
end

function T.tenant_of(name)
  local tenant = T.tenants[name]
  if not tenant then
    local f, at = T.fetch('t:' .. name, 'n:' .. name, 't:' .. name)
    local waiting, stamp, last = string.match(f[at] or '0|0', '^(%d+)|(%d+)|?(.*)$')
    tenant = { waiting = tonumber(waiting), stamp = tonumber(stamp), weight = tonumber(f[at + 1] or 1) }
    -- `last` has by band when the last ticket is due, if any ticket has had a deadline.
    if last ~= '' then
      tenant.last = {}
      for band, due in string.gmatch(last, '(%d+)=(%d+)') do tenant.last[tonumber(band)] = tonumber(due) end
    end
    T.tenants[name] = tenant
  end
  return tenant
end

-- Returns by how much `use` advances a tenant's virtual time. It is in ms, micro-dollars, or 1,000 for a call. A ms
-- of a tenant of weight 1,000 is still 100 units, so that the rounding error is below 0.2 % from 5 ms on.
T.UNITS = 100000
function T.step_of(use, tenant)
  return math.floor(use * T.UNITS / tenant.weight)
end

-- Returns how many of a tenant's calls take one unit of its band's time, relative to other tenants: its weight; in
-- shares by cost, divided by the use of its calls.
T.TICKET_UNITS = 10000000
function T.tickets_of(use, tenant)
  if pool.fair_by ~= 'cost' then return tenant.weight end
  return math.max(1, math.floor(tenant.weight * T.TICKET_UNITS / use))
end
