-- does: refuses a ticket whose deadline comes before its turn
-- keys: queue park line
-- args: none
-- returns: refuse_late()
-- units: ms; virtual time as in queues
-- If no waiter leaves, calls of the ticket's flow that already wait at the same limit, in any session, certainly come
-- first, in their order. A ticket that takes nothing of a limit may pass those of other sessions that wait there. Other
-- calls are only likely to come first. An estimate refuses a ticket only with a clear margin: a third of the likely
-- calls may not come first, half of the amounts reserved under a rate may be returned, and calls may take two thirds of
-- their recent duration, less a second.
T.MOST_BEFORE, T.MEASURED_MS = 50, 3000
-- The usage that is reported of a limit that resumes gradually after a pause.
T.RESUMES = -2

-- Returns how many calls come before a ticket. `certain` and `likely` count those that wait; `expected` assumes that
-- tenants with several waiting calls continue to send calls. `start` is the ticket's start in virtual time.
local function before_at(queue, list, place, use, stamp)
  local certain, likely, tenant, in_order = 0, 0, T.tenant_of(queue.tenant), true
  for _, amount in ipairs(list) do in_order = in_order and amount > 0 end
  for _, id in ipairs(call('ZRANGE', T.line_key(place, queue), 0, T.MOST_BEFORE - 1)) do
    local waits = call('ZCOUNT', T.prefix .. 'queue:' .. id, '-inf', '(' .. T.place(stamp))
    if id == queue.id or in_order and T.queue_of(id).flow == queue.flow then
      certain = certain + waits
    else
      likely = likely + waits
    end
  end
  use = T.use_at(place, use)
  local start = T.tag_of(place, queue) + (certain + likely) * T.step_of(use, tenant)
  local expected = certain + likely
  local parked = call('ZRANGE', T.park_key(place, queue.band), 0, T.MOST_BEFORE - 1, 'WITHSCORES')
  for i = 1, #parked, 2 do
    local gap = start - tonumber(parked[i + 1])
    if parked[i] ~= queue.tenant and gap > 0 then
      local rival = T.tenant_of(parked[i])
      local turns = 1 + math.floor(gap / math.max(1, T.step_of(use, rival)))
      likely = likely + math.min(rival.waiting, turns)
      expected = expected + (rival.waiting > 1 and turns or 1)
    end
  end
  return { certain = certain, likely = likely, expected = expected, start = start }
end

-- Returns the same if the ramp after a pause certainly does not reach a call by `latest`: of what calls took of it,
-- nothing is returned.
local function late_by_ramp(limit, before, here, latest)
  if T.ramp_after(limit, before.certain) <= latest then return nil end
  local expected = here and before.expected or before.certain
  return { T.ramp_after(limit, expected), limit.name, T.RESUMES, expected, expected > before.certain and 1 or 0 }
end

-- Returns (room at, limit, used, ahead, estimate) if a limit certainly has no room by `latest`.
local function late_at(limit, number, amount, before, here, latest)
  if not T.concerns(limit, amount) then return nil end
  local is_firm = T.is_firm(limit)
  local settled = limit.sort ~= 'c' and (is_firm or limit.used == 0 and not T.is_usage_due())
  if not settled and not limit.pause then return nil end
  local at, used, firm, certain_at = T.earliest(limit, amount)
  local late = certain_at > latest and (firm or settled and used >= 0)
  local by_ramp = (is_firm or limit.sort == 'c' and not limit.by_tokens) and late_by_ramp(limit, before, here, latest)
  if by_ramp and (by_ramp[1] > at or not late) then return by_ramp end
  if used < 0 or not settled or limit.shadow then
    return late and { at, limit.name, used, 0, 0 } or nil
  end
  if is_firm then late = late or T.rates().free_after(limit, before.certain * amount, amount) > latest end
  if not late then return nil end
  local expected = here and before.expected or before.certain
  local count, beside = T.rates().beside_bands(limit, number, expected * amount, amount)
  local room_at = math.max(at, T.rates().free_after(limit, count, amount))
  local estimate = beside or expected > (is_firm and before.certain or 0)
  if T.rates().is_behind_bands(limit, number) then
    local total = expected * amount + T.rates().clamped(limit, amount)
    room_at, estimate = T.rates().by_least_share(limit, number, total, room_at), true
  end
  return { room_at, limit.name, used, expected, estimate and 1 or 0 }
end

local function is_close(wait_ms, left_ms) return 2 * wait_ms <= 3 * left_ms + 2000 end

-- Returns the same for a concurrency limit, as an estimate by the duration of recent calls and of calls in the last
-- minute. Behind higher bands, a turn comes as fast as its band has advanced, and no slower than by the band's
-- minimum share of admissions. `size`: the amount that each of these calls takes.
local function late_by_time(limit, number, before, left_ms, size)
  local cap, count = T.cap_of(limit, number), before.certain + before.likely
  if cap > 0 then cap = math.max(1, math.floor(cap / size)) end
  if cap <= 0 or limit.cost_ms == 0 or is_close(math.floor(count * limit.cost_ms / cap), left_ms) then
    return nil
  end
  local samples, sum, known = T.progress_of(limit, number), 0, 0
  for _, sample in ipairs(samples) do
    if sample[3] > 0 then sum, known = sum + sample[3], known + 1 end
  end
  local usual_ms = known > 0 and math.floor(sum / known) or limit.cost_ms
  if is_close(math.floor(count * usual_ms / cap), left_ms) then return nil end
  local wait_ms, higher = math.floor(before.expected * usual_ms / cap), false
  for above = 1, number - 1 do higher = higher or limit.bands[above].waits > 0 end
  if higher and samples[1] then
    local virtual, age_ms = limit.bands[number].virtual, pool.now - samples[1][1]
    local moved = virtual - samples[1][2]
    if age_ms >= T.MEASURED_MS and moved > 0 then
      local moved_ms = math.floor(math.max(0, before.start - virtual) / moved * age_ms)
      local share = pool.fair_by ~= 'cost' and not limit.by_tokens and T.share_of(number) or 0
      if share > 0 then
        moved_ms = math.min(moved_ms, math.floor((before.expected + 1) * usual_ms * 1000 / (cap * share)))
      end
      wait_ms = math.max(left_ms, moved_ms)
    end
  end
  return { pool.now + wait_ms, limit.name, limit.used, before.expected, 1 }
end

local function position_in(lane, name)
  for i, each in ipairs(T.names_in(lane)) do
    if each == name then return i end
  end
end

-- Returns the mean amount of the first calls of a queue; `amount` if none waits.
local function mean_of(queue, at, amount)
  local sum, members = 0, queue.at and call('ZRANGE', T.queue_key(queue), 0, 4) or none
  if #members == 0 then return amount end
  for _, member in ipairs(members) do
    sum = sum + (T.amounts_in(string.match(member, '^%d+|%d+|%d+|(.*)$'))[at] or 1)
  end
  return math.floor(sum / #members)
end

local function probably_late(queue, list, place, before, latest)
  local count = before.certain + before.likely
  if count == 0 and not place.pacing or place.shadow or place.pause and place.pause.gate then return nil end
  local at = place.sort == 'c' and not place.by_tokens and 0 or position_in(queue.lane, place.name)
  local amount = list[at] or 1
  local mean, least = amount, (before.certain + math.floor(before.likely * 2 / 3)) * amount
  if place.sort == 'c' and place.by_tokens then
    mean = math.max(1, mean_of(queue, at, amount))
    least = (before.certain + math.floor(before.likely * 2 / 3)) * mean
  elseif place.sort ~= 'c' and not T.is_firm(place) then
    mean = mean_of(queue, at, amount)
    least = math.floor((count - place.used) * mean / 2)
  end
  if count > 0 and T.ramp_after(place, math.max(0, least)) > latest then
    return { T.ramp_after(place, before.expected * mean), place.name, T.RESUMES, before.expected, 1 }
  end
  if place.sort == 'c' then
    return late_by_time(place, queue.band, before, latest + 1 - pool.now, mean)
  end
  local rates = T.rates()
  local grown = rates.grown_after(place, least, amount) > latest
  if not grown and (count == 0 or rates.free_after(place, least, amount) <= latest) then return nil end
  local total = rates.beside_bands(place, queue.band, before.expected * mean, amount)
  local room_at = rates.free_after(place, total, amount)
  if grown then room_at = math.max(room_at, rates.grown_after(place, before.expected * mean, amount)) end
  if rates.is_behind_bands(place, queue.band) then
    total = before.expected * mean + rates.clamped(place, amount)
    room_at = rates.by_least_share(place, queue.band, total, room_at)
  end
  return { room_at, place.name, place.spent, before.expected, 1 }
end

-- Refuses a ticket that would wait at `place` with a stamp if it cannot be admitted within `left_ms`; returns true if
-- refused. If `left_ms` is negative, no estimate refuses it.
function T.refuse_late(queue, member, left_ms, place, stamp)
  local ticket, use, text = string.match(member, '^(%d+)|%d+|(%d+)|(.*)$')
  local list, latest, found = T.amounts_in(text), pool.now + math.abs(left_ms) - 1, nil
  local before = before_at(queue, list, place, tonumber(use), stamp)
  for i, name in ipairs(T.names_in(queue.lane)) do
    local limit = T.limit_of(name)
    if limit.sort ~= 'c' or limit.pause then
      local late = late_at(limit, queue.band, list[i] or 1, before, limit == place, latest)
      if late and (not found or late[1] > found[1]) then found = late end
    end
  end
  if not found and left_ms > 0 then found = probably_late(queue, list, place, before, latest) end
  if not found then return false end
  T.barred[#T.barred + 1] =
    { tonumber(ticket), found[2], found[1] - pool.now, found[3], found[4], found[5] }
  return true
end
