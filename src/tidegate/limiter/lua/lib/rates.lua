-- does: counts the usage of rates and day quotas
-- keys: meta log rate quota spending charged
-- args: resets
-- returns: rates() with fits(), is_used_up(), free_at(), free_after(), certain_at(), grown_after(), clamped(), kept_below(), is_behind_bands(), taken_above(), beside_bands(), by_least_share(), take(), turn_of(), settle(), spent(), taken(), taken_since(), assert_spent(), assert_evenly(), charge(), end_charges(), carry_over(), rewind(), save(), note_spenders(), index(); forget_spending()
-- units: ms; amounts in the limit's unit
--
-- A rate of up to 10,000 requests is an exact log of admissions. Others are counted in buckets, 120 to a window, of
-- which the oldest counts in full. The key of a bucket is the time of its end, so that it stays valid when the window
-- changes. A day quota stores the time of its reset. A rate that refills evenly has 60 buckets to a window; what is
-- spent of it is its level (`bucket.lua`).
--
-- A lower band with waiters under a rate accrues its minimum share of the rate's bound. Two times per band, in
-- microseconds, define its credit: the share from `from` to `passed`, the last admission of a higher band. `from` is
-- in the future, by a window at most, if the band had more than its share. Without admissions of higher bands no
-- credit accrues, so that a large demand of a higher band is passed only by earlier credit.
--
-- Beyond its share a band takes only what higher bands leave: nothing for a window after one of them found no room
-- for another reason than its pace (`held`), since usage counts for as long; and a twentieth of the bound stays free
-- while one of them used the limit in the last window (`used`).
T.LEFT_FREE = 20
T.DAY_MS = 86400000
-- A day that ends this much later is another day, even when clocks change.
T.NEXT_DAY_MS = 79200000
T.rate_functions = false

-- Amounts charged beside a bound, by the end of the part of a window, or the day, in which they count.
function T.charged_key(name) return T.prefix .. 'charged:' .. name end

function T.forget_spending(name)
  call('ZREM', T.spending_key, name)
  T.put('s:' .. name, false)
end

T.rates = function()
  if T.rate_functions then return T.rate_functions end
  local f = {}

  local function key_of(limit)
    local sort = limit.sort == 'q' and 'quota:' or limit.exact and 'log:' or 'rate:'
    return T.prefix .. sort .. limit.name
  end

  local function load_log(limit)
    local key, expired, page = key_of(limit), 0, none
    repeat
      expired, page = 0, call('LRANGE', key, 0, 99)
      for _, at in ipairs(page) do
        if tonumber(at) + limit.span > pool.now then break end
        expired = expired + 1
      end
      if expired > 0 then call('LTRIM', key, expired, -1) end
    until expired < 100
    limit.spent = #page < 100 and #page - expired or call('LLEN', key)
  end

  local function load_buckets(limit)
    local raw, gone = call('HGETALL', key_of(limit)), {}
    limit.width = math.ceil(limit.span / 120)
    limit.buckets, limit.spent = {}, 0
    for i = 1, #raw, 2 do
      local ends = tonumber(raw[i])
      if ends + limit.span <= pool.now then
        gone[#gone + 1] = raw[i]
      else
        limit.buckets[ends] = tonumber(raw[i + 1])
        limit.spent = limit.spent + limit.buckets[ends]
      end
    end
    if #gone > 0 then call('HDEL', key_of(limit), unpack(gone)) end
  end

  local function load_quota(limit)
    local found = call('HMGET', key_of(limit), 'used', 'reset_at')
    local told = q.resets[limit.name] or 0
    local before = tonumber(found[2] or 0)
    limit.spent, limit.reset_at = tonumber(found[1] or 0), before
    if before <= pool.now then limit.spent, limit.reset_at = 0, pool.now + T.DAY_MS end
    -- A process that considers the day over a moment early reports the end of the next day.
    if told > pool.now and (before <= pool.now or told - before < T.NEXT_DAY_MS) then limit.reset_at = told end
    if limit.reset_at ~= before then limit.dirty, limit.changed = true, true end
    -- Its timer is too late. What is only carried over to another sort of limit has no waiters.
    if limit.reset_at < before and limit.bands and T.parked_at(limit) > 0 then T.note_room_at(limit, limit.reset_at) end
  end

  local function loaded(limit)
    if limit.spent then return end
    if limit.sort == 'q' then
      load_quota(limit)
    elseif limit.window then
      T.load_bucket(limit)
    elseif limit.exact then
      load_log(limit)
    else
      load_buckets(limit)
    end
  end

  -- Returns when `amount` fits if nothing is returned.
  local function fits_at(limit, amount)
    if limit.sort == 'q' then return limit.reset_at end
    if limit.window then return T.bucket_room_at(limit, amount) end
    local over = limit.spent + amount - limit.bound
    if limit.exact then
      local at = call('LINDEX', key_of(limit), over - 1)
      return at and tonumber(at) + limit.span or pool.now + limit.span
    end
    local list = {}
    for ends in pairs(limit.buckets) do list[#list + 1] = ends end
    table.sort(list)
    for _, ends in ipairs(list) do
      over = over - limit.buckets[ends]
      if over <= 0 then return ends + limit.span end
    end
    return pool.now + limit.span
  end

  -- Returns how many calls of a log expire before the ramp has grown enough to admit a call beside the others.
  local function expire_first(limit)
    local first, last = 0, limit.spent
    while first < last do
      local middle = math.floor((first + last) / 2)
      local expires = tonumber(call('LINDEX', key_of(limit), middle)) + limit.span
      local grown = T.grown_at(limit.pacing, math.min(limit.spent - middle + 1, limit.bound))
      if grown < expires then last = middle else first = middle + 1 end
    end
    return first
  end

  -- Returns when a ramp has room for `amount`, if nothing is taken or returned: its bound grows, and what was taken
  -- expires.
  local function ramp_room_at(limit, amount)
    local at, used = pool.now, limit.counted or limit.spent
    if limit.exact then
      local gone = expire_first(limit)
      if gone > 0 then at = tonumber(call('LINDEX', key_of(limit), gone - 1)) + limit.span end
      if gone == used then return at end
      return math.max(at, T.grown_at(limit.pacing, math.min(used - gone + amount, limit.bound)))
    end
    local list = {}
    for ends in pairs(limit.buckets) do list[#list + 1] = ends end
    table.sort(list)
    for _, ends in ipairs(list) do
      local grown = used > 0 and T.grown_at(limit.pacing, math.min(used + amount, limit.bound)) or at
      if grown < ends + limit.span then return math.max(at, grown) end
      at, used = ends + limit.span, used - limit.buckets[ends]
    end
    return at
  end

  -- Returns when an even flow and the ramp have room for `amount`, if nothing is taken or returned; 0 for now.
  local function paced_at(limit, amount)
    local at, used = T.even_after(limit, 0, amount), limit.counted or limit.spent
    if used > 0 and T.paced_bound(limit) < math.min(used + amount, limit.bound) then
      at = math.max(at, pool.now + 1, ramp_room_at(limit, amount))
    end
    return at
  end

  local function share_of(number)
    local list = T.bands_of_pool()
    return number > 1 and list[math.min(number, #list)].share or 0
  end

  -- Returns the amount of one call: a demand above the bound takes all of it, instead of waiting forever.
  local function clamped(limit, amount)
    return limit.exact and math.min(amount, 1) or math.min(amount, limit.bound)
  end
  f.clamped = clamped

  -- Returns in how many microseconds a band's share accrues an amount: under a ramp, a share of what a window may
  -- take now.
  local function lasts(limit, number, amount)
    local bound = limit.pacing and T.paced_bound(limit) or limit.bound
    if bound == 0 then return 0 end
    return math.floor(amount / bound * limit.span * 1000000 / share_of(number))
  end

  -- Returns how much the first ticket of a band takes.
  local function wanted(limit, number)
    local band = limit.bands[number]
    if band.looked_at ~= T.moves then
      local tenant = call('ZRANGE', T.park_key(limit, number), 0, 0)[1]
      local line = T.prefix .. 'line:' .. limit.name .. '|' .. number .. '|' .. tenant
      local queue = T.queue_of(call('ZRANGE', line, 0, 0)[1])
      local member = call('ZRANGE', T.queue_key(queue), 0, 0)[1]
      local list = T.amounts_in(string.match(member, '^%d+|%d+|%d+|(.*)$'))
      for i, name in ipairs(T.names_in(queue.lane)) do
        if name == limit.name then band.wanted = clamped(limit, list[i] or 1) end
      end
      band.looked_at = T.moves
    end
    return band.wanted
  end

  -- Returns how much of its first ticket's amount is kept free for a band: as much as its credit, if a window's share
  -- is enough for the ticket. For a larger ticket nothing until the last window before the credit covers it, then
  -- gradually more.
  local function kept_for(limit, number)
    local band = limit.bands[number]
    if band.waits == 0 or band.passed <= band.from or share_of(number) == 0 then return 0 end
    local amount = wanted(limit, number)
    local needed = lasts(limit, number, amount)
    local rising = math.min(needed, limit.span * 1000)
    local left = needed - (band.passed - band.from)
    if left <= 0 then return amount end
    if left >= rising then return 0 end
    return math.floor(amount * ((rising - left) / rising))
  end

  -- Returns how much of a rate is kept free for the calls of lower bands.
  function f.kept_below(limit, number)
    local kept = 0
    if limit.sort ~= 'r' then return kept end
    for below = number + 1, #limit.bands do kept = kept + kept_for(limit, below) end
    return kept
  end

  local function is_owed(limit, number, amount)
    local band = limit.bands[number]
    return band.passed > band.from and share_of(number) > 0
      and band.passed - band.from >= lasts(limit, number, amount)
  end

  -- Returns the last time a higher band found no room, and the last time one of them used the limit.
  local function above(limit, number)
    local held, used = 0, 0
    for higher = 1, number - 1 do
      local band = limit.bands[higher]
      held, used = math.max(held, math.min(band.held, pool.now)), math.max(used, band.used)
    end
    return held, used
  end

  -- When a demand and what is kept beside it fit; 0 if they do now. Never so much is kept that the demand could not
  -- be met at all.
  local function room_beside(limit, amount, kept)
    local total = math.min(amount + kept, limit.bound)
    return limit.spent + total <= limit.bound and 0 or fits_at(limit, total)
  end

  -- When a demand that fits leaves free what is kept for other bands; 0 if it does now.
  local function beside_bands_at(limit, number, amount)
    if limit.sort ~= 'r' then return 0 end
    local kept = f.kept_below(limit, number)
    local at = room_beside(limit, amount, kept)
    if number == 1 or is_owed(limit, number, amount) then return at end
    local held, used = above(limit, number)
    if held + limit.span > pool.now then return held + limit.span end
    if used + limit.span <= pool.now then return at end
    local left_at = room_beside(limit, amount, kept + math.floor(limit.bound / T.LEFT_FREE))
    return math.min(left_at, math.max(at, used + limit.span))
  end

  -- Returns whether higher bands take what a rate gives beyond the minimum share of a band.
  function f.is_behind_bands(limit, number)
    if limit.sort ~= 'r' then return false end
    for higher = 1, number - 1 do
      if limit.bands[higher].waits > 0 then return true end
    end
    local held = above(limit, number)
    return held > 0 and held + limit.span > pool.now
  end

  -- Returns when the minimum share of a band has given it `total`, not before `room_at`. A window has room at one
  -- moment of each window, when what it took together is free again: for a quarter of it at most.
  function f.by_least_share(limit, number, total, room_at)
    if share_of(number) == 0 or limit.bound == 0 then return room_at end
    local band = limit.bands[number]
    local owed = band.passed > 0 and band.from or pool.now * 1000
    owed = math.max(owed, (pool.now - limit.span) * 1000)
    local at = math.ceil((owed + lasts(limit, number, total)) / 1000)
    if at <= room_at or limit.window or limit.pacing then return math.max(at, room_at) end
    if (at - room_at) % limit.span * 4 <= limit.span then return at end
    return room_at + math.ceil((at - room_at) / limit.span) * limit.span
  end

  function f.fits(limit, number, amount)
    loaded(limit)
    if amount == 0 then return true end
    if limit.bound == 0 then return T.note_room_at(limit, pool.now + T.DAY_MS) end
    amount = clamped(limit, amount)
    if limit.pacing and paced_at(limit, amount) > 0 then
      return T.note_room_at(limit, f.free_at(limit, amount))
    end
    if limit.spent + amount <= limit.bound then
      local at = beside_bands_at(limit, number, amount)
      return at == 0 or T.note_room_at(limit, at)
    end
    return T.note_room_at(limit, fits_at(limit, amount))
  end

  -- Returns whether a demand lacks what calls have used, and not only the next moment of an even flow.
  function f.is_used_up(limit, amount)
    loaded(limit)
    amount = clamped(limit, amount)
    local pacing, taken = limit.pacing, limit.counted or limit.spent
    if limit.bound == 0 or not pacing or paced_at(limit, amount) == 0 or limit.spent + amount > limit.bound then
      return true
    end
    return taken > 0 and T.paced_bound(limit) < math.min(taken + amount, limit.bound)
  end

  -- Returns when `amount` fits if nothing is returned; 0 for now, or never.
  function f.free_at(limit, amount)
    loaded(limit)
    amount = clamped(limit, amount)
    if amount == 0 or limit.bound == 0 then return 0 end
    local at = limit.pacing and paced_at(limit, amount) or 0
    if limit.spent + amount <= limit.bound then return at end
    return math.max(at, fits_at(limit, amount))
  end

  -- As `free_at`, after calls that take `before` together, which is negative if more is expected to be returned.
  -- Never later than the actual time if no waiter leaves.
  function f.free_after(limit, before, amount)
    loaded(limit)
    amount = clamped(limit, amount)
    local total = before + amount
    if amount == 0 or limit.bound == 0 or total <= 0 then return 0 end
    local at = limit.pacing and T.even_after(limit, math.max(0, before), amount) or 0
    if limit.sort == 'q' then
      local over = limit.spent + total - limit.bound
      if over <= 0 then return at end
      return math.max(at, limit.reset_at + math.floor((over - 1) / limit.bound) * T.DAY_MS)
    end
    if limit.window then return math.max(at, T.bucket_after(limit, total)) end
    local windows = math.floor((total - 1) / limit.bound)
    local rest, room_at = total - windows * limit.bound, 0
    if limit.spent + rest > limit.bound then room_at = fits_at(limit, rest) end
    if windows > 0 then room_at = math.max(room_at, pool.now) + windows * limit.span end
    return math.max(at, room_at)
  end

  -- Returns the time before which there is certainly no room, where time alone makes it `at`: calls that are admitted
  -- until then may raise the bound of a ramp.
  function f.certain_at(limit, amount, at)
    if at == 0 or not limit.pacing or limit.pacing.percent == 0 then return at end
    return f.free_after(limit, 0, amount)
  end

  -- Returns how much of what was taken in the last window still counts at a time.
  local function left_at(limit, at)
    if limit.exact then
      local gone, left = 0, limit.spent
      while gone < left do
        local middle = math.floor((gone + left) / 2)
        if tonumber(call('LINDEX', key_of(limit), middle)) + limit.span > at then left = middle else gone = middle + 1 end
      end
      return limit.spent - gone
    end
    local sum = 0
    for ends, amount in pairs(limit.buckets) do
      if ends + limit.span > at then sum = sum + amount end
    end
    return sum
  end

  -- Returns when the ramp of a rate has grown enough for `amount` after calls that take `before`, with as many calls
  -- as it admits, so that its level rises each minute: an estimate. 0 for now, or without a ramp.
  function f.grown_after(limit, before, amount)
    loaded(limit)
    amount = clamped(limit, amount)
    local total, pacing = before + amount, limit.pacing
    if not pacing or pacing.percent == 0 or pacing.since == 0 or amount == 0 or total <= 0 then return 0 end
    local function fits(at)
      local left = left_at(limit, at)
      return left == 0 and before <= 0 or left + total <= T.ramp_bound(limit, at)
    end
    if fits(pool.now) then return 0 end
    local from, to = pool.now, pool.now + limit.span
    if not fits(to) then
      -- What a window admits is spread over it.
      local windows = 0
      while windows < 1000 and total > T.ramp_bound(limit, to) do
        total, from, to, windows = total - T.ramp_bound(limit, to), to, to + limit.span, windows + 1
      end
      return from + math.floor(math.max(0, total) / T.ramp_bound(limit, to) * limit.span)
    end
    while to - from > math.max(1, limit.span / 4096) do
      local middle = math.floor((from + to) / 2)
      if fits(middle) then to = middle else from = middle end
    end
    return to
  end

  -- Returns whether a lower band is next: true if its credit covers its first ticket and there is room for it; false
  -- if there is no room yet, so that no band below it is admitted before; nil if its credit does not cover the
  -- ticket.
  function f.turn_of(limit, number)
    local band = limit.bands[number]
    if limit.sort == 'q' then
      return band.credit >= 1000 and T.has_room(limit, number, wanted(limit, number)) or nil
    end
    if band.passed <= band.from then return nil end
    local amount = wanted(limit, number)
    if not is_owed(limit, number, amount) then return nil end
    return T.has_room(limit, number, amount)
  end

  -- Returns what a band took in the present window of the clock, and in the one before it.
  local function taken_by(limit, band)
    local passed = math.floor(pool.now / limit.span) - math.floor(band.used / limit.span)
    if passed == 0 then return band.taken, band.before end
    return 0, passed == 1 and band.taken or 0
  end

  -- Returns about how much bands above `number` took of a rate in the last window.
  function f.taken_above(limit, number)
    local sum = 0
    if limit.sort ~= 'r' then return sum end
    for higher = 1, number - 1 do
      local taken, before = taken_by(limit, limit.bands[higher])
      sum = sum + taken + math.floor(before * ((limit.span - pool.now % limit.span) / limit.span))
    end
    return sum
  end

  -- Returns `before` with what higher bands take of a rate until so much and `amount` more are admitted, as in the last
  -- window; and whether they take any.
  function f.beside_bands(limit, number, before, amount)
    local taken = f.taken_above(limit, number)
    if taken == 0 or limit.bound == 0 then return before, false end
    local left = limit.bound - taken - math.floor(limit.bound / T.LEFT_FREE)
    left = math.max(1, left, math.floor(limit.bound * share_of(number) / 1000))
    amount = clamped(limit, amount)
    return math.floor((before + amount) * (limit.bound / left)) - amount, true
  end

  -- Records an admission of a band: lower bands with waiters are passed, and the band's own share is used.
  local function count_shares(limit, number, amount)
    local now = pool.now * 1000
    local own = limit.bands[number]
    own.taken, own.before = taken_by(limit, own)
    own.taken, own.used = own.taken + amount, pool.now
    for below = number + 1, #limit.bands do
      local band = limit.bands[below]
      if band.waits > 0 and share_of(below) > 0 then
        if band.passed == 0 then band.from = math.max(band.from, now) end
        band.passed = now
      end
    end
    if share_of(number) == 0 then return end
    local band, needed, window = limit.bands[number], lasts(limit, number, amount), limit.span * 1000
    local from = math.max(band.from, band.passed > 0 and band.passed - needed - window or now)
    band.from = math.min(from + needed, now + window)
  end

  -- Returns the end of the part of a log's window that contains a time.
  local function part_of(limit, at)
    local width = math.ceil(limit.span / 120)
    return (math.floor(at / width) + 1) * width
  end

  local function note(limit, ends, amount)
    if limit.noted then limit.noted[ends] = (limit.noted[ends] or 0) + amount end
  end

  local function spend(limit, ends, amount)
    note(limit, ends, amount)
    limit.spent = limit.spent + amount
    limit.spent_changed = limit.spent_changed or amount ~= 0
    if limit.sort == 'q' then
      limit.dirty = true
    else
      local before = limit.buckets[ends]
      limit.buckets[ends] = (before or 0) + amount
      limit.dirty = limit.dirty or {}
      limit.dirty[ends] = true
      if limit.window then T.fill(limit, ends, amount, not before) end
    end
    limit.changed = true
  end

  local function ends_now(limit)
    if limit.sort == 'q' then return limit.reset_at end
    return (math.floor(pool.now / limit.width) + 1) * limit.width
  end

  function f.take(limit, amount, number)
    loaded(limit)
    if amount == 0 then return nil end
    if number and limit.sort == 'r' then count_shares(limit, number, clamped(limit, amount)) end
    if not limit.shadow then amount = math.min(amount, limit.bound) end
    if limit.exact then
      limit.spent, limit.spent_changed, limit.changed = limit.spent + 1, true, true
      call('RPUSH', key_of(limit), T.int(pool.now))
      call('PEXPIRE', key_of(limit), limit.span)
      if limit.pacing then T.pace_take(limit, 1) end
      return nil
    end
    local ends = ends_now(limit)
    spend(limit, ends, amount)
    if limit.pacing then T.pace_take(limit, amount) end
    return T.int(amount) .. '@' .. T.int(ends)
  end

  -- Corrects a reservation. Excess is returned to its bucket while that still counts; additional use counts from now,
  -- or in its day. A limit whose type has changed meanwhile has nothing to settle.
  function f.settle(limit, ends, reserved, actual)
    if limit.sort == 'c' or limit.exact then return end
    loaded(limit)
    local extra, is_over = actual - reserved, false
    if extra == 0 then return end
    if limit.sort == 'q' then
      if ends >= limit.reset_at then
        spend(limit, ends, math.max(extra, -limit.spent))
      elseif ends == 0 and extra > 0 then
        spend(limit, limit.reset_at, extra)
      end
    elseif extra > 0 then
      spend(limit, ends_now(limit), extra)
    elseif limit.buckets[ends] and not (limit.window and ends <= limit.base.ends) then
      spend(limit, ends, math.max(extra, -limit.buckets[ends]))
    else
      is_over = true
    end
    -- An even flow has made up for a call by the end of its window.
    if limit.pacing and not is_over then T.pace_return(limit, -extra) end
    if extra < 0 then T.touch(limit) end
  end

  function f.spent(limit)
    loaded(limit)
    return limit.spent
  end

  -- Returns what was taken in the last window, for a rate that refills evenly possibly more than its level.
  function f.taken(limit)
    loaded(limit)
    return limit.counted or limit.spent
  end

  -- Returns what was taken after a time, including the whole bucket that contains it.
  function f.taken_since(limit, at)
    loaded(limit)
    if limit.sort == 'q' then return limit.spent end
    if limit.exact then
      local first, after = 0, limit.spent
      while first < after do
        local middle = math.floor((first + after) / 2)
        if tonumber(call('LINDEX', key_of(limit), middle)) > at then after = middle else first = middle + 1 end
      end
      return limit.spent - first
    end
    local sum = 0
    for ends, amount in pairs(limit.buckets) do
      if ends > at then sum = sum + amount end
    end
    return sum
  end

  -- Counts an amount spent elsewhere or before as spent now. A log counts at most `most`, if given, else at most its
  -- bound.
  function f.assert_spent(limit, amount, most)
    loaded(limit)
    if amount <= 0 then return end
    if not limit.exact then return spend(limit, ends_now(limit), amount) end
    amount = math.min(amount, most or limit.bound)
    note(limit, part_of(limit, pool.now), amount)
    local times = {}
    for i = 1, math.min(amount, 500) do times[i] = T.int(pool.now) end
    for i = 1, amount, 500 do
      call('RPUSH', key_of(limit), unpack(times, 1, math.min(500, amount - i + 1)))
    end
    limit.spent = limit.spent + amount
    limit.spent_changed, limit.changed = limit.spent_changed or amount > 0, true
    if amount > 0 then call('PEXPIRE', key_of(limit), limit.span) end
  end

  local function rewrite(limit, times)
    local key = key_of(limit)
    call('UNLINK', key)
    for i = 1, #times, 500 do call('RPUSH', key, unpack(times, i, math.min(i + 499, #times))) end
    call('PEXPIRE', key, limit.span)
  end

  -- Adds `amount` admissions to a log, spread evenly over the last window.
  local function merge_evenly(limit, amount)
    local times, known, next_known = {}, call('LRANGE', key_of(limit), 0, -1), 1
    for i = 1, amount do
      local at = pool.now - math.floor(limit.span * (amount - i) / amount)
      while known[next_known] and tonumber(known[next_known]) <= at do
        times[#times + 1], next_known = known[next_known], next_known + 1
      end
      times[#times + 1] = T.int(at)
      note(limit, part_of(limit, at), 1)
    end
    for i = next_known, #known do times[#times + 1] = known[i] end
    rewrite(limit, times)
  end

  -- As `assert_spent`, but as if spent evenly over the last window. The amount then also expires evenly, without room
  -- for many calls at one moment. A rate that refills does so evenly anyway.
  function f.assert_evenly(limit, amount)
    loaded(limit)
    if amount <= 0 then return end
    if limit.sort ~= 'r' or limit.window then return f.assert_spent(limit, amount) end
    if limit.exact then
      amount = math.min(amount, limit.bound)
      if amount > 0 then merge_evenly(limit, amount) end
      limit.spent = limit.spent + amount
      limit.spent_changed, limit.changed = limit.spent_changed or amount > 0, true
      return
    end
    local last, parts = ends_now(limit), math.floor(limit.span / limit.width)
    for part = 1, parts do
      local until_here = math.floor(amount * part / parts)
      local own = until_here - math.floor(amount * (part - 1) / parts)
      if own > 0 then spend(limit, last - (parts - part) * limit.width, own) end
    end
  end

  -- As these, for what an account has less than the bound in force. A lower bound ends as much of it.
  function f.charge(limit, amount, evenly)
    local key, noted = T.charged_key(limit.name), {}
    limit.noted = noted
    if evenly then f.assert_evenly(limit, amount) else f.assert_spent(limit, amount) end
    limit.noted = nil
    for _, ends in ipairs(call('HKEYS', key)) do
      if tonumber(ends) + (limit.span or 0) <= pool.now then call('HDEL', key, ends) end
    end
    for ends, more in pairs(noted) do
      if more > 0 then call('HINCRBY', key, T.int(ends), T.int(more)) end
    end
    call('PEXPIRE', key, T.int(limit.span and 2 * limit.span or limit.reset_at - pool.now + T.POOL_KEEP_MS))
  end

  -- Returns what counts in a part and certainly still counts for some time: nothing if the part of a bucket is
  -- folded.
  local function counted_in(limit, ends, log)
    if limit.sort == 'q' then return ends == limit.reset_at and limit.spent or 0 end
    if limit.exact then return ends > part_of(limit, pool.now - limit.span) and log[ends] or 0 end
    if limit.window and ends <= limit.base.ends then return 0 end
    return limit.buckets[ends] or 0
  end

  -- Removes the first admissions of each part of a log: what stays was admitted no earlier than any call of the part.
  local function shorten(limit, times, parts)
    local left, gone = {}, 0
    for _, at in ipairs(times) do
      local ends = part_of(limit, tonumber(at))
      if (parts[ends] or 0) > 0 then
        parts[ends], gone = parts[ends] - 1, gone + 1
      else
        left[#left + 1] = at
      end
    end
    if gone == 0 then return end
    rewrite(limit, left)
    limit.spent, limit.spent_changed, limit.changed = limit.spent - gone, true, true
  end

  -- Returns what was charged beside the bound and still counts, by part; the parts in order; and the sum.
  local function charged_parts(limit, log)
    local raw, parts, order, total = call('HGETALL', T.charged_key(limit.name)), {}, {}, 0
    for i = 1, #raw, 2 do
      local ends = tonumber(raw[i])
      local amount = math.min(tonumber(raw[i + 1]), counted_in(limit, ends, log))
      if amount > 0 then order[#order + 1], parts[ends], total = ends, amount, total + amount end
    end
    table.sort(order)
    return parts, order, total
  end

  -- Reduces charges because the bound will be lower by `by`. Each part is reduced in proportion, so that the rest
  -- expires as evenly as before.
  function f.end_charges(limit, by)
    loaded(limit)
    local key, log, passed, gone = T.charged_key(limit.name), {}, 0, 0
    local times = limit.exact and call('LRANGE', key_of(limit), 0, -1) or {}
    for _, at in ipairs(times) do
      local ends = part_of(limit, tonumber(at))
      log[ends] = (log[ends] or 0) + 1
    end
    local parts, order, total = charged_parts(limit, log)
    for _, ends in ipairs(order) do
      local amount = parts[ends]
      passed = passed + amount
      if by < total then amount = math.min(amount, math.floor(by * (passed / total)) - gone) end
      parts[ends], gone = amount, gone + amount
      if amount > 0 then
        if not limit.exact then spend(limit, ends, -amount) end
        if call('HINCRBY', key, T.int(ends), T.int(-amount)) <= 0 then call('HDEL', key, T.int(ends)) end
      end
    end
    if limit.exact then shorten(limit, times, parts) end
  end

  -- Counts times of a log that are later than now as now. A clock that was set back while the limit was no rate left
  -- them as they were.
  local function end_future(limit)
    if tonumber(call('LINDEX', key_of(limit), -1) or 0) <= pool.now then return end
    local times = call('LRANGE', key_of(limit), 0, -1)
    for i, at in ipairs(times) do times[i] = T.int(math.min(tonumber(at), pool.now)) end
    rewrite(limit, times)
  end

  -- Counts usage that was counted in another way, before the policy changed, as spent now.
  function f.carry_over(limit)
    local amount, span = 0, limit.span or T.DAY_MS
    for _, other in ipairs({ { sort = 'q' }, { sort = 'r', exact = true }, { sort = 'r' } }) do
      other.name, other.span = limit.name, span
      if key_of(other) ~= key_of(limit) and call('EXISTS', key_of(other)) == 1 then
        amount = amount + f.spent(other)
        call('UNLINK', key_of(other))
      end
    end
    loaded(limit)
    if limit.exact then end_future(limit) end
    -- The usage of the last window counts for as long as the new window.
    if limit.sort == 'r' then call('PEXPIRE', key_of(limit), T.int(2 * limit.span), 'GT') end
    if limit.window then T.open_bucket(limit) end
    if limit.pacing then T.cap_even(limit) end
    -- It may exceed a bound that was lowered too, so that it counts once the bound is raised again.
    local most = 2 * math.max(limit.bound, T.bounds_before[limit.name] or 0)
    f.assert_spent(limit, math.min(amount, most), most)
  end

  -- Moves times back after the clock was set back, so that usage keeps its age.
  function f.rewind(limit, by_ms)
    local key = key_of(limit)
    call('UNLINK', T.charged_key(limit.name))
    if limit.pacing then T.rewind_pacing(limit, by_ms) end
    if limit.window then T.rewind_bucket(limit, by_ms) end
    if limit.exact then
      local times = call('LRANGE', key, 0, -1)
      call('UNLINK', key)
      for i, at in ipairs(times) do times[i] = T.int(tonumber(at) - by_ms) end
      for i = 1, #times, 1000 do call('RPUSH', key, unpack(times, i, math.min(i + 999, #times))) end
      call('PEXPIRE', key, limit.span)
    elseif limit.sort == 'r' then
      local raw, moved = call('HGETALL', key), {}
      for i = 1, #raw, 2 do moved[T.int(tonumber(raw[i]) - by_ms)] = raw[i + 1] end
      call('UNLINK', key)
      T.write(key, moved)
      call('PEXPIRE', key, T.int(2 * limit.span))
    end
  end

  function f.save(limit)
    local dirty, key = limit.dirty, key_of(limit)
    if limit.pacing_changed then T.save_pacing(limit) end
    if not dirty then return end
    limit.dirty = nil
    if limit.sort == 'q' then
      call('HSET', key, 'used', T.int(limit.spent), 'reset_at', T.int(limit.reset_at))
      call('PEXPIRE', key, T.int(limit.reset_at - pool.now + T.POOL_KEEP_MS))
      return
    end
    if limit.window and not limit.base.stored then T.save_bucket(limit) end
    for ends in pairs(dirty) do
      call('HSET', key, T.int(ends), T.int(limit.buckets[ends]))
    end
    call('PEXPIRE', key, T.int(2 * limit.span))
  end

  -- Numbers each change of usage, so that a session can request the changes after the last one that it has seen. `s:`
  -- is the usage as of that change.
  function f.note_spenders()
    table.sort(T.spenders, function(one, other) return one.name < other.name end)
    for _, limit in ipairs(T.spenders) do
      pool.changes = pool.changes + 1
      call('ZADD', T.spending_key, T.int(pool.changes), limit.name)
      T.put('s:' .. limit.name, T.int(limit.spent))
    end
    T.put('changes', T.int(pool.changes))
    T.spenders = {}
  end

  T.rate_functions = f
  return f
end
