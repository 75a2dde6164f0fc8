-- does: computes the level of a rate that refills evenly (a token bucket)
-- keys: meta rate
-- args: none
-- returns: load_bucket(), open_bucket(), find_level(), fill(), bucket_room_at(), bucket_after(), rewind_bucket(), save_bucket()
-- units: ms; levels in units, of which one of the limit's amount has as many as its window has ms, so that `bound`
-- units refill per ms: whole numbers, exact below 2^53
--
-- The level is the maximum over all earlier times of what was taken since, less what has refilled since. It is
-- computed from the sixtieths of a window, so that what a call returns counts as never taken. Subtracted from the
-- level itself, it would also be subtracted from what others have taken since the level was 0. A sixtieth counts as
-- taken `lag` ms after its end, when the last of its calls may reach the provider, and refills from then on. The
-- level is at most twice the bound, also after a charge for usage outside of the pool, under a lowered bound or in
-- shadow mode, so that no call waits for longer than a window.
--
-- `k:` is units|ends|window|bound|before|until. `units` is the level at the sixtieth that ends at `ends`, which
-- includes all earlier ones; what is returned to these has no effect. Until `until`, under another bound, `before`
-- units refilled per ms.
function T.save_bucket(limit)
  local base = limit.base
  call('HSET', T.meta_key, 'k:' .. limit.name, string.format('%d|%d|%d|%d|%d|%d', base.units, base.ends,
    base.window, base.bound, base.before, base.until_ms))
  base.stored = true
end

local function read_base(limit)
  local text = call('HGET', T.meta_key, 'k:' .. limit.name)
  if not text then
    return { units = 0, ends = 0, window = limit.window, bound = limit.bound, before = 0, until_ms = 0 }
  end
  local units, ends, window, bound, before, until_ms =
    string.match(text, '^(%d+)|(%d+)|(%d+)|(%d+)|(%d+)|(%d+)$')
  return { units = tonumber(units), ends = tonumber(ends), window = tonumber(window), bound = tonumber(bound),
    before = tonumber(before), until_ms = tonumber(until_ms), stored = true }
end

-- Returns the maximum level. A bound of 0, under which calls pass only in shadow mode, counts as the largest bound.
local function most(limit)
  return 2 * (limit.bound > 0 and limit.bound or T.UNBOUNDED) * limit.window
end

local function refilled(base, from, to)
  if to <= from then return 0 end
  if from >= base.until_ms then return (to - from) * base.bound end
  local part = math.min(to, base.until_ms)
  return (part - from) * base.before + (to - part) * base.bound
end

-- Folds what was taken before an earlier change of the bound into the level at that change.
local function fold_change(base, lag, order, amounts)
  local units, at, window = base.units, base.ends + lag, base.window
  if base.until_ms <= at then return end
  local bound, higher = base.bound, math.max(base.bound, base.before)
  local due = 2 * (higher > 0 and higher or T.UNBOUNDED) * window
  for _, ends in ipairs(order) do
    local moment = ends + lag
    if ends > base.ends and moment <= base.until_ms then
      units = math.min(due, math.max(0, units - refilled(base, at, moment)) + amounts[ends] * window)
      at = moment
    end
  end
  units = math.max(0, units - refilled(base, at, base.until_ms))
  base.units = math.min(units, 2 * (bound > 0 and bound or T.UNBOUNDED) * window)
  base.ends = base.until_ms - lag
end

-- Applies a new bound or window; what has refilled until now stays refilled. A level above the maximum of the new
-- bound is reduced to it.
local function apply_policy(limit, base, order, amounts)
  local from, to, lag = base.window, limit.window, limit.span - limit.window
  fold_change(base, lag, order, amounts)
  local before = math.floor(base.bound * to / from)
  local refilled_ms = math.max(0, pool.now - base.ends - lag)
  base.units = math.min(math.ceil(base.units * to / from), most(limit) + refilled_ms * before)
  base.window, base.bound, base.before, base.until_ms = to, limit.bound, before, pool.now
end

-- Returns the level and the time at the change of the bound, if that is later.
local function at_change(limit, units, at)
  local base = limit.base
  if at > base.until_ms then return units, at end
  return math.min(most(limit), math.max(0, units - refilled(base, at, base.until_ms))), base.until_ms
end

-- Returns the level at `moment`, from `units` at an earlier time, plus an amount taken at that moment. The level at a
-- change of the bound is at most two windows' worth from then on.
local function level_with(limit, units, at, moment, amount)
  local base, due = limit.base, most(limit)
  if base.until_ms < moment then
    units, at = at_change(limit, units, at)
  else
    local higher = math.max(base.bound, base.before)
    due = 2 * (higher > 0 and higher or T.UNBOUNDED) * limit.window
  end
  return math.min(due, math.max(0, units - refilled(base, at, moment)) + amount * limit.window)
end

local function find_spent(limit)
  limit.units = math.min(limit.level + limit.fresh_units, most(limit))
  limit.spent = math.ceil(limit.units / limit.window)
end

function T.find_level(limit)
  local base, lag, window, now = limit.base, limit.span - limit.window, limit.window, pool.now
  local units, at, fresh, fresh_units = base.units, base.ends + lag, {}, 0
  for _, ends in ipairs(limit.order) do
    local amount = limit.buckets[ends]
    if ends > base.ends and amount then
      local moment = ends + lag
      if moment > now then
        fresh[#fresh + 1] = { moment, amount * window }
        fresh_units = fresh_units + amount * window
      else
        units, at = level_with(limit, units, at, moment, amount), moment
      end
    end
  end
  if base.until_ms <= now then units, at = at_change(limit, units, at) end
  limit.level, limit.fresh, limit.fresh_units = math.max(0, units - refilled(base, at, now)), fresh, fresh_units
  find_spent(limit)
end

function T.load_bucket(limit)
  local key, now = T.prefix .. 'rate:' .. limit.name, pool.now
  local raw, order, amounts, gone, last, sorted = call('HGETALL', key), {}, {}, {}, 0, true
  for i = 1, #raw, 2 do
    local ends = tonumber(raw[i])
    order[#order + 1], amounts[ends] = ends, tonumber(raw[i + 1])
    sorted, last = sorted and ends > last, ends
  end
  if not sorted then table.sort(order) end
  local base, lag, changed = read_base(limit), limit.span - limit.window, false
  if base.window ~= limit.window or base.bound ~= limit.bound then
    apply_policy(limit, base, order, amounts)
    changed = true
  end
  limit.width, limit.counted, limit.base = math.ceil(limit.span / 60), 0, base
  for _, ends in ipairs(order) do
    local amount = amounts[ends]
    if ends + limit.window <= now and ends > base.ends then
      base.units = level_with(limit, base.units, base.ends + lag, ends + lag, amount)
      base.ends, changed = ends, true
    end
    if ends + limit.span <= now then
      gone[#gone + 1], amounts[ends] = T.int(ends), nil
    else
      limit.counted = limit.counted + amount
    end
  end
  limit.buckets, limit.order = amounts, order
  -- Written before the sixtieths that it includes are deleted.
  if changed then T.save_bucket(limit) end
  if #gone > 0 then call('HDEL', key, unpack(gone)) end
  T.find_level(limit)
end

-- Starts the bucket of a limit that was counted in another way with what was taken in its last window.
function T.open_bucket(limit)
  if limit.base.stored then return end
  limit.base.units, limit.base.ends = limit.bound * limit.window, pool.now - limit.span
  T.save_bucket(limit)
  T.find_level(limit)
end

-- Updates the level by an amount that its sixtieth already includes. After a return the level is computed again.
function T.fill(limit, ends, amount, is_new)
  limit.counted = limit.counted + amount
  local order, fresh, moment = limit.order, limit.fresh, ends + limit.span - limit.window
  if is_new then
    order[#order + 1] = ends
    if #order > 1 and order[#order - 1] > ends then table.sort(order) end
  end
  local last = fresh[#fresh]
  if amount < 0 or moment <= pool.now or last and last[1] > moment then return T.find_level(limit) end
  local units = amount * limit.window
  if last and last[1] == moment then
    last[2] = last[2] + units
  else
    fresh[#fresh + 1] = { moment, units }
  end
  limit.fresh_units = limit.fresh_units + units
  find_spent(limit)
end

-- Returns when `amount` fits if nothing is returned.
function T.bucket_room_at(limit, amount)
  local level, fresh_units, at = limit.level, limit.fresh_units, pool.now
  local target, due = (limit.bound - amount) * limit.window, most(limit)
  for _, one in ipairs(limit.fresh) do
    if fresh_units <= target then
      local room_at = at + math.max(0, math.ceil((level + fresh_units - target) / limit.bound))
      if room_at < one[1] then return room_at end
    end
    level = math.min(due, math.max(0, level - (one[1] - at) * limit.bound) + one[2])
    fresh_units, at = fresh_units - one[2], one[1]
  end
  return at + math.max(0, math.ceil((level - target) / limit.bound))
end

-- Returns when calls that take `total` together, one after the other, have fitted; 0 if they fit now.
function T.bucket_after(limit, total)
  if limit.spent + total <= limit.bound then return 0 end
  if total <= limit.bound then return T.bucket_room_at(limit, total) end
  local over = limit.units + (total - limit.bound) * limit.window
  return pool.now + math.ceil(over / limit.bound)
end

function T.rewind_bucket(limit, by_ms)
  limit.base = read_base(limit)
  if not limit.base.stored then return end
  limit.base.ends = math.max(0, limit.base.ends - by_ms)
  limit.base.until_ms = math.max(0, limit.base.until_ms - by_ms)
  T.save_bucket(limit)
end
