-- does: loads limits with their counts, and saves them
-- keys: meta
-- args: none
-- returns: limit_of(), limits_in(), save_limit(), cap_of(), share_of(), cost_at(), use_at(), learn(), touch(), touch_sized(), touched
-- units: ms; a band's `above` in thousandths of a limit
T.touched, T.bands, T.lanes = {}, false, {}
-- The first bound of a limit that adapts by latency: low, because calls beyond the server's capacity queue inside it.
T.LATENCY_FIRST = 4

-- Returns per band, in thousandths: its minimum share of admissions, and what is kept free for higher bands.
function T.bands_of_pool()
  if not T.bands then
    T.bands = {}
    for share, above in string.gmatch(pool.bands, '(%d+):(%d+)') do
      T.bands[#T.bands + 1] = { share = tonumber(share), above = tonumber(above) }
    end
  end
  return T.bands
end

-- The state of a band that has had no waiter yet is created on access.
T.band_list = { __index = function(list, number)
  for i = #list + 1, number do rawset(list, i, { waits = 0, virtual = 0, credit = 0, from = 0, passed = 0, held = 0, used = 0, taken = 0, before = 0 }) end
  return rawget(list, number)
end }

-- A limit that is not in the policy admits no call, unless its scope is one of these: then it has no bound and can
-- only be paused. Its fields are kept only while it is paused, has waiters or is in use.
T.UNBOUNDED = 10000000000
T.FOR_EVER = 9007199254740991
function T.is_implicit(name)
  return string.find(name, '^model:') ~= nil or string.find(name, '^upstream:') ~= nil
end

function T.limit_of(name)
  local limit = T.limits[name]
  if limit then return limit end
  local f, at = T.fetch('l:' .. name, 'd:' .. name, 'u:' .. name, 'w:' .. name, 'p:' .. name,
    'a:' .. name, 'e:' .. name)
  local defined, waiting, paused = f[at], f[at + 2], f[at + 3]
  limit = { name = name, sort = 'c', bound = 0, used = tonumber(f[at + 1] or 0), reserved = 0,
    cost_ms = tonumber(f[at + 5] or 0),
    bands = setmetatable({}, T.band_list) }
  if defined then
    local sort, bound, shadow, one, two, three =
      string.match(defined, '^(%a)|(%d+)|(%d)|(%d+)|(%d+)|(%d+)')
    limit.sort, limit.bound, limit.shadow = sort, tonumber(bound), shadow == '1'
    limit.defined = true
    if sort == 'c' then
      limit.least, limit.by_tokens, limit.by_latency = tonumber(one), two == '1', three == '1'
    elseif sort == 'r' then
      limit.span, limit.exact = tonumber(one) + tonumber(two) + 1, three == '1'
      local pace, percent, start, shape =
        string.match(defined, '^%a|%d+|%d|%d+|%d+|%d+|(%d+)|(%d+)|(%d+)|?(%a?)')
      if shape == 'b' then limit.window = tonumber(one) end
      if pace and (pace ~= '0' or percent ~= '0') then
        T.load_pacing(limit, tonumber(pace), tonumber(percent), tonumber(start))
      end
    end
  elseif T.is_implicit(name) then
    limit.implicit, limit.bound = true, T.UNBOUNDED
  end
  local number = 0
  if waiting then
    for text in string.gmatch(waiting, '[^,]+') do
      number = number + 1
      local waits, virtual, credit, rest = string.match(text, '^(%d+):(%d+):(%d+):?(.*)$')
      local from, passed, held, used, taken, before = string.match(rest, '^(%d+):(%d+):(%d+):(%d+):?(%d*):?(%d*)')
      limit.bands[number] = { waits = tonumber(waits), virtual = tonumber(virtual),
        credit = tonumber(credit), from = tonumber(from or 0), passed = tonumber(passed or 0),
        held = tonumber(held or 0), used = tonumber(used or 0),
        taken = tonumber(taken or 0) or 0, before = tonumber(before or 0) or 0 }
    end
  end
  if paused then
    local until_ms, ramp_ms, passed = string.match(paused, '^(%d+)|(%d+)|(%d+)|')
    if ramp_ms == '0' or pool.now < until_ms + ramp_ms then
      limit.pause = { until_ms = tonumber(until_ms), ramp_ms = tonumber(ramp_ms),
        passed = tonumber(passed), said = string.match(paused, '^%d+|%d+|%d+|(.*)$'),
        gate = ramp_ms == '0' and T.gate_of(name) or nil }
    else
      limit.pause_over = true
    end
  end
  if limit.least and limit.least > 0 and limit.bound > 0 then
    local current, dropped_at, latency = string.match(f[at + 4] or '', '^(%d+)|(%d+)|?(.*)$')
    local first = limit.by_latency and math.min(limit.bound, math.max(limit.least, T.LATENCY_FIRST)) or limit.bound
    limit.current = tonumber(current or first * 1000)
    limit.dropped_at = tonumber(dropped_at or 0)
    -- Parsed when a call ends whose time to the first token is known.
    if limit.by_latency then limit.latency = latency or '' end
  end
  T.limits[name] = limit
  return limit
end

-- Returns the limits of a lane in order. `rated`: one of them is not a concurrency limit. `by_tokens`: one of them
-- counts tokens in flight.
function T.limits_in(lane)
  local list = T.lanes[lane]
  if not list then
    list = { rated = false, by_tokens = false }
    for i, name in ipairs(T.names_in(lane)) do
      list[i] = T.limit_of(name)
      list.rated = list.rated or list[i].sort ~= 'c'
      list.by_tokens = list.by_tokens or list[i].by_tokens
    end
    T.lanes[lane] = list
  end
  return list
end

T.save_limit = function(limit)
  local name, parts = limit.name, {}
  T.put('u:' .. name, limit.used ~= 0 and T.int(limit.used))
  for number, band in ipairs(limit.bands) do
    parts[number] = T.int(band.waits) .. ':' .. T.int(band.virtual) .. ':' .. T.int(band.credit)
    if band.from > 0 or band.used > 0 or band.held > 0 or band.passed > 0 then
      parts[number] = string.format('%s:%d:%d:%d:%d:%.0f:%.0f', parts[number], band.from, band.passed,
        band.held, band.used, band.taken, band.before)
    end
  end
  if not limit.defined and T.parked_at(limit) == 0 then
    for number in ipairs(limit.bands) do call('UNLINK', T.past_key(limit, number)) end
    parts, limit.bands = {}, setmetatable({}, T.band_list)
  end
  T.put('w:' .. name, #parts > 0 and table.concat(parts, ','))
  if limit.pause_changed then
    local pause = limit.pause
    local gate = pause and pause.gate
    T.put('g:' .. name, gate and string.format('%d|%d|%d|%s', gate.every_ms, gate.most_ms,
      gate.rounds, gate.taker) or false)
    T.put('p:' .. name, pause and T.int(pause.until_ms) .. '|' .. T.int(pause.ramp_ms) .. '|'
      .. T.int(pause.passed) .. '|' .. pause.said or false)
    if pause then
      call('ZADD', T.paused_key, T.int(gate and T.FOR_EVER or pause.until_ms + pause.ramp_ms), name)
    else
      call('ZREM', T.paused_key, name)
    end
  end
  if limit.learned then T.put('e:' .. name, T.int(limit.cost_ms)) end
  if limit.adapted then
    local latency = limit.latency or ''
    if type(latency) ~= 'string' then latency = T.write_latency(latency) end
    T.put('a:' .. name, T.int(limit.current) .. '|' .. T.int(limit.dropped_at) .. (latency ~= '' and '|' .. latency or ''))
  end
  if limit.sort ~= 'c' then T.rates().save(limit) end
  if limit.spent_changed then T.spenders[#T.spenders + 1] = limit end
  if limit.shadowed then call('HINCRBY', T.meta_key, 'x:' .. name, limit.shadowed) end
  limit.changed, limit.pause_changed, limit.adapted, limit.shadowed = nil, nil, nil, nil
  limit.learned, limit.spent_changed = nil, nil
end

-- Marks a limit under which a waiter may fit now.
function T.touch(limit)
  if limit.name then T.touched[limit.name] = true end
end

-- The next call may take less of it than the one before.
function T.touch_sized(limit)
  if limit.sort ~= 'c' or limit.by_tokens then T.touch(limit) end
end

-- How many calls, or tokens in flight, a band may have under a concurrency.
function T.cap_of(limit, band)
  local bound = limit.current and math.floor(limit.current / 1000) or limit.bound
  local list = T.bands_of_pool()
  local above = list[math.min(limit.passing == band and limit.passed or band, #list)].above
  if above == 0 then return bound end
  return math.max(math.min(bound, 1), math.floor(bound * (1000 - above) / 1000))
end

-- Returns the minimum share of a band in what a limit admits, in thousandths.
function T.share_of(number)
  local list = T.bands_of_pool()
  return list[math.min(number, #list)].share
end

-- Returns the probable duration of a call under a limit: the moving average, or the estimate of its process if no
-- call has ended yet.
function T.cost_at(limit, cost_ms)
  return limit.cost_ms > 0 and limit.cost_ms or cost_ms
end

-- Returns what a call is charged until it ends. `use`: the estimate of its process.
T.CALL_USE = 1000
function T.use_at(limit, use)
  if not pool.fair_by then return limit.cost_ms > 0 and limit.cost_ms or use end
  return pool.fair_by == 'calls' and T.CALL_USE or use
end

-- Updates the duration of calls under the limits of a lane by a call that ended.
function T.learn(lane, took_ms)
  for _, limit in ipairs(T.limits_in(lane)) do
    local more = not limit.defined and 0 or limit.cost_ms > 0 and math.floor((took_ms - limit.cost_ms) / 8) or took_ms
    if more ~= 0 then
      limit.cost_ms = math.max(1, limit.cost_ms + more)
      limit.learned, limit.changed = true, true
    end
  end
end
