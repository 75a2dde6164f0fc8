-- does: counts what is spent of rates and day quotas
-- keys: log rate quota
-- args: resets
-- returns: rates() with fits(), take(), settle(), spent(), assert_spent(), save()
-- units: ms; amounts in the limit's unit
-- A rate of requests up to 10,000 is an exact log of admissions. Others are counted in buckets of a
-- sixtieth of the window, the oldest in full. A day quota knows the moment of its reset.
T.DAY_MS = 86400000

T.rates = function()
  if T.rate_functions then return T.rate_functions end
  local f = {}

  local function key_of(limit)
    local sort = limit.sort == 'q' and 'quota:' or limit.exact and 'log:' or 'rate:'
    return T.prefix .. sort .. limit.name
  end

  local function load_log(limit)
    local key = key_of(limit)
    repeat
      local expired, page = 0, call('LRANGE', key, 0, 99)
      for _, at in ipairs(page) do
        if tonumber(at) + limit.span > pool.now then break end
        expired = expired + 1
      end
      if expired > 0 then call('LTRIM', key, expired, -1) end
    until expired < 100
    limit.spent = call('LLEN', key)
  end

  local function load_buckets(limit)
    local raw, gone = call('HGETALL', key_of(limit)), {}
    limit.width = math.ceil(limit.span / 60)
    limit.buckets, limit.spent = {}, 0
    for i = 1, #raw, 2 do
      local index = tonumber(raw[i])
      if (index + 1) * limit.width + limit.span <= pool.now then
        gone[#gone + 1] = raw[i]
      else
        limit.buckets[index] = tonumber(raw[i + 1])
        limit.spent = limit.spent + limit.buckets[index]
      end
    end
    if #gone > 0 then call('HDEL', key_of(limit), unpack(gone)) end
  end

  local function load_quota(limit)
    local found = call('HMGET', key_of(limit), 'used', 'reset_at')
    local told = q.resets[limit.name] or 0
    limit.spent, limit.reset_at = tonumber(found[1] or 0), tonumber(found[2] or 0)
    if limit.reset_at <= pool.now then
      limit.spent = 0
      limit.reset_at = told > pool.now and told or pool.now + T.DAY_MS
    elseif told > pool.now then
      limit.reset_at = told
    end
  end

  local function loaded(limit)
    if limit.spent then return end
    if limit.sort == 'q' then
      load_quota(limit)
    elseif limit.exact then
      load_log(limit)
    else
      load_buckets(limit)
    end
  end

  -- When `amount` will fit, nothing being given back.
  local function fits_at(limit, amount)
    if limit.sort == 'q' then return limit.reset_at end
    local over = limit.spent + amount - limit.bound
    if limit.exact then
      local at = call('LINDEX', key_of(limit), over - 1)
      return at and tonumber(at) + limit.span or pool.now + limit.span
    end
    local list = {}
    for index in pairs(limit.buckets) do list[#list + 1] = index end
    table.sort(list)
    for _, index in ipairs(list) do
      over = over - limit.buckets[index]
      if over <= 0 then return (index + 1) * limit.width + limit.span end
    end
    return pool.now + limit.span
  end

  function f.fits(limit, amount)
    loaded(limit)
    if amount == 0 then return true end
    -- More than the limit can ever give waits for all of it, instead of for ever.
    amount = math.min(amount, limit.bound)
    if limit.bound > 0 and limit.spent + amount <= limit.bound then return true end
    return T.room_again(limit, limit.bound > 0 and fits_at(limit, amount) or pool.now + T.DAY_MS)
  end

  local function spend(limit, index, amount)
    limit.spent = limit.spent + amount
    if limit.sort == 'q' then
      limit.dirty = true
    else
      limit.buckets[index] = (limit.buckets[index] or 0) + amount
      limit.dirty = limit.dirty or {}
      limit.dirty[index] = true
    end
    limit.changed = true
  end

  local function index_now(limit)
    return limit.sort == 'q' and limit.reset_at or math.floor(pool.now / limit.width)
  end

  function f.take(limit, amount)
    loaded(limit)
    if amount == 0 then return nil end
    if not limit.shadow then amount = math.min(amount, limit.bound) end
    if limit.exact then
      limit.spent = limit.spent + 1
      call('RPUSH', key_of(limit), T.int(pool.now))
      call('PEXPIRE', key_of(limit), limit.span)
      return nil
    end
    local index = index_now(limit)
    spend(limit, index, amount)
    return limit.name .. '=' .. T.int(amount) .. '@' .. T.int(index)
  end

  -- What was reserved too much goes back to where it was taken from, while that still counts;
  -- what was used on top counts from now.
  function f.settle(limit, index, reserved, actual)
    loaded(limit)
    local extra = actual - reserved
    if limit.sort == 'q' then
      if index == limit.reset_at then spend(limit, index, math.max(extra, -limit.spent)) end
    elseif extra > 0 then
      spend(limit, index_now(limit), extra)
    elseif limit.buckets[index] then
      spend(limit, index, math.max(extra, -limit.buckets[index]))
    end
    if extra < 0 then T.touch(limit) end
  end

  function f.spent(limit)
    loaded(limit)
    return limit.spent
  end

  -- After a loss: a session says what it had seen spent, and what it has admitted itself since.
  function f.assert_spent(limit, amount)
    loaded(limit)
    if amount <= 0 then return end
    if not limit.exact then return spend(limit, index_now(limit), amount) end
    amount = math.min(amount, limit.bound)
    for _ = 1, amount do call('RPUSH', key_of(limit), T.int(pool.now)) end
    limit.spent = limit.spent + amount
    call('PEXPIRE', key_of(limit), limit.span)
  end

  function f.save(limit)
    if not limit.dirty then return end
    local key = key_of(limit)
    if limit.sort == 'q' then
      call('HSET', key, 'used', T.int(limit.spent), 'reset_at', T.int(limit.reset_at))
      call('PEXPIRE', key, T.int(limit.reset_at - pool.now + T.POOL_KEEP_MS))
      return
    end
    for index in pairs(limit.dirty) do
      call('HSET', key, T.int(index), T.int(limit.buckets[index]))
    end
    call('PEXPIRE', key, T.int(2 * limit.span))
  end

  T.rate_functions = f
  return f
end
