-- does: returns the state of a pool without changing it, in parts of bounded size
-- keys: meta layout
-- args: request
-- request: permits of limits place since
-- returns: now_ms epoch recovering_ms revision parked seq sessions limits tenants permits queues counts place
-- units: ms; sessions are (sid, name, left_ms, held, blocked, revision), limits are (name, sort, bound, used, 0, 0, current, shadowed, paused_ms, pause said, room_in_ms, 0, cost_ms, taken, shadow, lately), tenants are (name, waiting, weight), permits are (sid, ticket, seq, left_ms, flow), queues are (sid, flow, parked at, waiting, first stamp, first ticket, last ticket), counts are (limit, waiting, lapsing, reserved)
-- uses: core clock pool limits
-- later: rates pacing bucket pauses blocked
--
-- `since` maps a limit to a period in ms; `lately` is what was taken in the period that ends now, false without one.
--
-- `of` selects everything, the sessions (without their permits and queues), or the limits in `limits`. `place` is
-- where the next run continues: (part, session, cursor), false at the end. A small pool takes one run; the parts of a
-- larger one are read at different times. `held` and `counts` cover what this run has read: the caller adds them up.
-- What exists during all runs is returned at least once, except for lapsing permits: some may be missed when others
-- end.
T.load_pool()
pool.now = math.max(T.wall_clock_ms(), pool.clock)
-- The approximate number of commands of a run, which ends after a whole page, and the size of a page.
T.READ_AT_ONCE, T.SCANNED = 120, 40
local sessions, permits, queues, counts, by_name, list, tenants = {}, {}, {}, {}, {}, {}, {}
local left = T.READ_AT_ONCE
local part, from_sid, cursor = unpack(q.place or { q.of == 'limits' and 3 or 1, '', '0' })

local function count(name, at, amount)
  local row = by_name[name]
  if not row then
    row = { name, 0, 0, 0 }
    by_name[name] = row
    counts[#counts + 1] = row
  end
  row[at] = row[at] + amount
end

local function show_permit(sid, ticket, value)
  local seq, until_ms, charges, flow = string.match(value, '^([^|]*)|([^|]*)|[^|]*|([^|]*)|(.*)$')
  if charges ~= '' then
    local names = T.names_in(string.match(flow, '^[^|]*|[^|]*|(.*)$'))
    for place, amount in string.gmatch(charges, '(%d+)=(%d+)@') do
      count(names[tonumber(place)], 4, tonumber(amount))
    end
  end
  if q.permits then
    permits[#permits + 1] = { sid, tonumber(ticket), tonumber(seq), tonumber(until_ms) - pool.now, flow }
  end
end

local function show_queue(sid, flow, place)
  local at, key = string.match(place, '^([^|]*)|'), T.prefix .. 'queue:' .. sid .. '|' .. flow
  local waits, first = call('ZCARD', key), call('ZRANGE', key, 0, 0, 'WITHSCORES')
  local last = call('ZRANGE', key, -1, -1)
  count(at, 2, waits)
  queues[#queues + 1] = { sid, flow, at, waits, tonumber(first[2] or 0), first[1] or '', last[1] or '' }
  left = left - 4
end

-- Returns the next page of a hash; all of it if the user's ACL rights are those of a version that did not scan
-- hashes.
local function page_of(key)
  local page = redis.pcall('HSCAN', key, cursor, 'COUNT', T.SCANNED)
  if page.err then page = { '0', call('HGETALL', key) } end
  cursor = page[1]
  return page[2]
end

-- Adds one page of a session to the reply; returns true if the session has more.
local function show_session(sid, expiry)
  local key, held = T.session_key(sid), 0
  local f = call('HMGET', key, 'name', 'blocked', 'revision')
  left = left - 2
  if q.of ~= 'sessions' then
    local page = page_of(key)
    for i = 1, #page, 2 do
      local letter, name = string.match(page[i], '^(%a+):(.*)$')
      if letter == 'h' then
        held, left = held + 1, left - 1
        show_permit(sid, name, page[i + 1])
      elseif letter == 'at' then
        show_queue(sid, name, page[i + 1])
      end
    end
  end
  sessions[#sessions + 1] = { sid, f[1] or '', expiry - pool.now, held, f[2] and 1 or 0, tonumber(f[3] or 0) }
  return cursor ~= '0'
end

local function show_sessions()
  local alive, expiries, order = call('ZRANGE', T.sessions_key, 0, -1, 'WITHSCORES'), {}, {}
  for i = 1, #alive, 2 do
    if alive[i] >= from_sid then
      order[#order + 1] = alive[i]
      expiries[alive[i]] = tonumber(alive[i + 1])
    end
  end
  table.sort(order)
  if order[1] ~= from_sid then cursor = '0' end
  for _, sid in ipairs(order) do
    from_sid = sid
    repeat
      if left <= 0 then return end
    until not show_session(sid, expiries[sid])
  end
  part, from_sid, cursor = 2, '', '0'
end

local function show_lapsing()
  local first = tonumber(cursor)
  repeat
    local page = call('ZRANGE', T.lapsing_key, first, first + T.SCANNED - 1)
    first, left = first + #page, left - #page
    for _, member in ipairs(page) do
      for _, name in ipairs(T.names_in(string.match(member, '^[^|]*|[^|]*|(.*)$'))) do count(name, 3, 1) end
    end
    if #page < T.SCANNED then
      part, cursor = 3, '0'
      return
    end
  until left <= 0
  cursor = T.int(first)
end

local function show_limit(name, shadowed)
  local limit = T.limit_of(name)
  if not limit.defined and not limit.implicit then return end
  if limit.implicit and not limit.pause and limit.used == 0 and T.parked_at(limit) == 0 then return end
  local used, taken, lately, at = limit.used, 0, false, tonumber(call('ZSCORE', T.timed_key, name) or 0)
  if limit.sort ~= 'c' then
    used = 0
    used, taken, left = T.rates().spent(limit), T.rates().taken(limit), left - 4
    if q.since and q.since[name] then lately = T.rates().taken_since(limit, pool.now - q.since[name]) end
    if not limit.shadow then at = math.max(at, T.rates().free_at(limit, 1)) end
  end
  local paused_ms = limit.pause and math.max(limit.pause.gate and 1 or 0, limit.pause.until_ms - pool.now) or 0
  list[#list + 1] = { name, limit.sort, limit.bound, used, 0, 0,
    limit.current and math.floor(limit.current / 1000) or limit.bound, tonumber(shadowed or 0), paused_ms,
    limit.pause and limit.pause.said or '', math.max(0, at - pool.now), 0, limit.cost_ms, taken,
    limit.shadow and 1 or 0, lately }
end

-- Adds the limits of a page to the reply. Their fields are read together.
local LETTERS = { 'd:', 'u:', 'w:', 'p:', 'a:', 'e:', 's:', 'x:' }
local function show_limits(names)
  if #names == 0 then return end
  local fields = {}
  T.first = {}
  for _, name in ipairs(names) do
    T.first['l:' .. name] = #fields + 1
    for _, letter in ipairs(LETTERS) do fields[#fields + 1] = letter .. name end
  end
  T.found = T.read(T.meta_key, fields)
  for i, name in ipairs(names) do show_limit(name, T.found[8 * i]) end
  left = left - #names
end

local function show_record()
  repeat
    local names, seen, waiting, weights = {}, {}, {}, {}
    local page = page_of(T.meta_key)
    left = left - 2
    for i = 1, #page, 2 do
      local letter, name = string.match(page[i], '^(%a):(.*)$')
      if letter == 'n' then
        waiting[#waiting + 1] = { name, tonumber(string.match(page[i + 1], '^%d+')), 1 }
        weights[#waiting] = 't:' .. name
      elseif (letter == 'd' or (letter == 'u' or letter == 'p' or letter == 'w') and T.is_implicit(name))
        and not seen[name] then
        seen[name] = true
        names[#names + 1] = name
      end
    end
    show_limits(names)
    for i, weight in ipairs(#weights > 0 and T.read(T.meta_key, weights) or none) do
      waiting[i][3] = tonumber(weight or 1)
      tenants[#tenants + 1] = waiting[i]
    end
  until cursor == '0' or left <= 0
  if cursor == '0' then part = 4 end
end

local function show_named()
  local names, first = {}, tonumber(cursor)
  for i = first + 1, math.min(#q.limits, first + T.SCANNED) do names[#names + 1] = q.limits[i] end
  show_limits(names)
  cursor = T.int(first + T.SCANNED)
  if first + T.SCANNED >= #q.limits then part = 4 end
end

if part == 1 then
  show_sessions()
  if part == 2 and q.of == 'sessions' then part = 4 end
end
if part == 2 and left > 0 then show_lapsing() end
if part == 3 and q.of == 'limits' then
  show_named()
elseif part == 3 and left > 0 then
  show_record()
end
return cmsgpack.pack({ pool.now, pool.epoch, math.max(0, pool.recover_until - pool.now),
  pool.revision, pool.parked, pool.seq, sessions, list, tenants, permits, queues, counts,
  part < 4 and { part, from_sid, cursor } })
