-- does: returns the position of a waiting ticket, or of the next ticket of a tenant, without changing anything
-- keys: meta layout
-- args: request
-- request: sid ticket limit band tenant
-- returns: found flow held_up_by ahead amount use said line
-- line: now_ms sort bound span virtual tag weight cost_ms paused_ms share waiting rivals above samples free even pace amount amounts width use ramp owed_from held_ms taken
-- uses: core clock pool limits queues
-- later: blocked rates pacing bucket pauses capacity progress
-- units: ms; virtual time as in queues; share in thousandths; even and pace in microseconds; amounts in the limit's unit
--
-- `ahead` counts the tenant's tickets before this one at the limit, `waiting` all its tickets there. `bound` of
-- tokens in flight is a number of calls of the tenant's mean amount. `sort` is `b` for a rate that refills evenly,
-- which is an even flow with a pace of its window. `rivals` are (tag, weight, waiting, first, amounts) of the other
-- tenants of the band; first is 1 if the rival's name sorts before the tenant's. `above` is the number of waiting
-- calls of higher bands. `samples` are (at, virtual, cost_ms). `free` are (at, amount): when a rate gets back how
-- much; what is kept free for lower bands counts as taken now. The `amount` of a line is the tenant's mean amount;
-- `amounts` are those of a tenant's first tickets in their order, empty if each takes 1. `width` is that of the
-- buckets. `use` is what shares count for a call, 0 if that is its duration. `ramp` is level, since, percent and
-- start, empty without one; `free` of a bucket with a ramp is what its last window took. From `owed_from` on the band
-- is owed its share. For `held_ms` more, as a higher band has found no room, it gets no more than that. `taken` is
-- what higher bands took in the last window.
T.load_pool()
pool.now = math.max(T.wall_clock_ms(), pool.clock)
-- The most queues read for one position; for the rest, the tenants' total counts are used.
local MOST_QUEUES, left = 300, 300

local function line_of(limit, band, tenant)
  return T.prefix .. 'line:' .. limit.name .. '|' .. band .. '|' .. tenant
end

local function waiting_of(limit, band, tenant)
  if left <= 0 then return T.tenant_of(tenant).waiting end
  local count, list = 0, call('ZRANGE', line_of(limit, band, tenant), 0, MOST_QUEUES - 1)
  for _, id in ipairs(list) do count = count + call('ZCARD', T.prefix .. 'queue:' .. id) end
  left = left - #list
  return count
end

-- Returns the mean amount of the first tickets of a tenant.
local function mean_of(limit, band, tenant)
  local sum, count = 0, 0
  for _, id in ipairs(call('ZRANGE', line_of(limit, band, tenant), 0, 9)) do
    local queue = T.queue_of(id)
    for _, member in ipairs(call('ZRANGE', T.queue_key(queue), 0, 9)) do
      local list = T.amounts_in(string.match(member, '^%d+|%d+|%d+|(.*)$'))
      for i, name in ipairs(T.names_in(queue.lane)) do
        if name == limit.name then sum, count = sum + (list[i] or 1), count + 1 end
      end
    end
  end
  return count > 0 and math.max(1, math.floor(sum / count + 0.5)) or 1
end

-- Returns the minimum share of a band in what a limit admits. Under a limit of tokens in flight, the share of
-- admissions is converted to tokens by the mean amounts of this band and of the highest band with waiters.
local function share_of(limit, number, tenant)
  local share, sum = T.share_of(number), 0
  if not limit.by_tokens then return share end
  for higher = 1, number - 1 do
    local names = call('ZRANGE', T.park_key(limit, higher), 0, 9)
    if #names > 0 then
      for _, name in ipairs(names) do sum = sum + mean_of(limit, higher, name) end
      local own = share * mean_of(limit, number, tenant) * #names
      return math.floor(1000 * own / (own + (1000 - share) * sum))
    end
  end
  return share
end

-- Returns the amounts of the first tickets of a tenant, up to the ticket with stamp `last`, at most `most` of them.
local amounts_left = 1000
local function amounts_of(limit, band, tenant, last, most)
  if limit.sort == 'c' or limit.exact or amounts_left <= 0 then return {} end
  local found, list = {}, {}
  for _, id in ipairs(call('ZRANGE', line_of(limit, band, tenant), 0, 49)) do
    local queue = T.queue_of(id)
    local at
    for i, name in ipairs(T.names_in(queue.lane)) do
      if name == limit.name then at = i end
    end
    local tickets = call('ZRANGEBYSCORE', T.queue_key(queue), '-inf', last, 'WITHSCORES', 'LIMIT', 0, most)
    for i = 1, #tickets, 2 do
      local amounts = T.amounts_in(string.match(tickets[i], '^%d+|%d+|%d+|(.*)$'))
      found[#found + 1] = { tonumber(tickets[i + 1]), amounts[at] or 1 }
    end
  end
  table.sort(found, function(one, other)
    return one[1] < other[1] or one[1] == other[1] and one[2] < other[2]
  end)
  for i = 1, math.min(#found, most, amounts_left) do list[i] = found[i][2] end
  amounts_left = amounts_left - #list
  return list
end

local function ramp_of(limit)
  local pacing = limit.pacing
  if not pacing or pacing.percent == 0 then return {} end
  return { pacing.level, pacing.since, pacing.percent, pacing.start }
end

-- Returns when a rate gets back how much, in at most 120 steps.
local function freed(limit)
  local list = {}
  if limit.sort == 'q' then return { { limit.reset_at, limit.spent } } end
  if limit.window and #ramp_of(limit) == 0 then return {} end
  if limit.exact then
    local key, count = T.prefix .. 'log:' .. limit.name, limit.spent
    local step = math.max(1, math.ceil(count / 120))
    for i = step - 1, count - 1, step do
      list[#list + 1] = { tonumber(call('LINDEX', key, i)) + limit.span, step }
    end
    if count % step > 0 then
      list[#list + 1] = { tonumber(call('LINDEX', key, -1)) + limit.span, count % step }
    end
    return list
  end
  for ends, amount in pairs(limit.buckets) do list[#list + 1] = { ends + limit.span, amount } end
  table.sort(list, function(one, other) return one[1] < other[1] end)
  return list
end

local function line(limit, number, tenant, last, use)
  local band = limit.bands[number]
  local own, rivals, above = amounts_of(limit, number, tenant, last, 500), {}, 0
  local parked = call('ZRANGE', T.park_key(limit, number), 0, 499, 'WITHSCORES')
  for i = 1, #parked, 2 do
    if parked[i] ~= tenant then
      rivals[#rivals + 1] = { tonumber(parked[i + 1]), T.tenant_of(parked[i]).weight,
        waiting_of(limit, number, parked[i]), parked[i] < tenant and 1 or 0,
        amounts_of(limit, number, parked[i], '+inf', 100) }
    end
  end
  for higher = 1, number - 1 do
    for _, name in ipairs(call('ZRANGE', T.park_key(limit, higher), 0, 499)) do
      above = above + waiting_of(limit, higher, name)
    end
  end
  local bound, free, even, pace, at, width = limit.bound, {}, 0, 0, 0, 0
  local held_ms, taken = 0, 0
  local sort, span = limit.sort, limit.span or 0
  if limit.sort == 'c' then
    bound = T.cap_of(limit, number)
    if limit.by_tokens and bound > 0 then
      bound = math.max(1, math.floor(bound / mean_of(limit, number, tenant)))
    end
  else
    T.rates().spent(limit)
    free = freed(limit)
    width = limit.width or 0
    if limit.pacing then even, pace = limit.pacing.even, limit.pacing.pace end
    if limit.window then
      sort, span, width = 'b', limit.window, 0
      local lasts = bound > 0 and math.ceil(limit.units * 1000 / bound) or 0
      local full = pool.now * 1000 + lasts
      if pace == 0 or full - span * 1000 > even - pace then even, pace = full, span * 1000 end
    else
      local kept = T.rates().kept_below(limit, number)
      if kept > 0 then free[#free + 1] = { pool.now + span, kept } end
    end
    -- Beyond its share a band waits for a window after a higher band found no room.
    for higher = 1, number - 1 do at = math.max(at, limit.bands[higher].held) end
    if at > 0 and limit.sort == 'r' then held_ms = math.max(0, at + limit.span - pool.now) end
    taken = T.rates().taken_above(limit, number)
  end
  local paused_ms = limit.pause and math.max(limit.pause.gate and 1 or 0, limit.pause.until_ms - pool.now) or 0
  local tag = T.tag_of(limit, { band = number, tenant = tenant })
  return { pool.now, sort, bound, span, band.virtual, tag, T.tenant_of(tenant).weight,
    limit.cost_ms, paused_ms, share_of(limit, number, tenant), waiting_of(limit, number, tenant), rivals,
    above, T.progress_of(limit, number), free, even, pace, mean_of(limit, number, tenant), own,
    width, pool.fair_by and T.use_at(limit, use) or 0, ramp_of(limit),
    band.passed > 0 and math.floor(band.from / 1000) or pool.now, held_ms, taken }
end

if q.ticket == '' then
  local limit = T.limit_of(q.limit)
  local all = line(limit, q.band, q.tenant, '+inf', T.CALL_USE)
  return cmsgpack.pack({ 1, q.band .. '|' .. q.tenant .. '|' .. q.limit, q.limit, all[11], all[18], 0,
    limit.pause and limit.pause.said or '', all })
end

local raw = call('HGETALL', T.session_key(q.sid))
local wanted = '^' .. q.ticket .. '|'
for i = 1, #raw, 2 do
  local flow = string.match(raw[i], '^at:(.*)$')
  if flow then
    local queue = T.queue_of(q.sid .. '|' .. flow)
    T.set_place(queue, raw[i + 1])
    local waiting = call('ZRANGE', T.queue_key(queue), 0, 9999, 'WITHSCORES')
    for k = 1, #waiting, 2 do
      if string.match(waiting[k], wanted) then
        local use = tonumber(string.match(waiting[k], '^%d+|%d+|(%d+)'))
        if queue.at == '!' then
          return cmsgpack.pack({ 1, flow, '', (k - 1) / 2, 1, use, '', {} })
        end
        local limit, ahead, amount = T.limit_of(queue.at), (k - 1) / 2, 1
        for _, id in ipairs(call('ZRANGE', T.line_key(limit, queue), 0, MOST_QUEUES - 1)) do
          if id ~= queue.id then
            ahead = ahead + call('ZCOUNT', T.prefix .. 'queue:' .. id, '-inf', '(' .. waiting[k + 1])
          end
        end
        local list = T.amounts_in(string.match(waiting[k], '^%d+|%d+|%d+|(.*)$'))
        for at, name in ipairs(T.names_in(queue.lane)) do
          if name == limit.name then amount = list[at] or 1 end
        end
        return cmsgpack.pack({ 1, flow, limit.name, ahead, amount, use, limit.pause and limit.pause.said or '',
          line(limit, queue.band, queue.tenant, '(' .. waiting[k + 1], use) })
      end
    end
  end
end
return cmsgpack.pack({ 0 })
