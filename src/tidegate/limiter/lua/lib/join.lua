-- does: joins a session, with its policy and all its permits; keeps its keys alive
-- keys: meta layout history sessions session queue park line past lapsing carried owed spending paused charged restored local
-- args: sid epoch batch join lease_ms
-- returns: join(), keep_keys(), touch_own(), conflict
-- units: ms
-- `T.bounds_before` has the former bound of each rate and quota that a policy changes.
T.conflict, T.lowered, T.bounds_before = 0, {}, {}
T.HISTORY = 100

-- Deletes a field of a limit that the new policy does not have. The order of its waiters stays until the last one has
-- left.
function T.clear_field(letter, name)
  if letter == 's' then return T.forget_spending(name) end
  if letter == 'w' then
    local waiting, number = call('HGET', T.meta_key, 'w:' .. name), 0
    for waits in string.gmatch(waiting, '([^,:]+):[^,]*') do
      if waits ~= '0' then return end
    end
    for _ in string.gmatch(waiting, '[^,]+') do
      number = number + 1
      call('UNLINK', T.past_key({ name = name }, number))
    end
  end
  call('HDEL', T.meta_key, letter .. ':' .. name)
  if letter == 'b' then call('HDEL', T.restored_key, name) end
end

-- Returns the fields of the record that a policy may change. `differs`: the policy lists only changes.
T.LETTERS = { 'a', 'd', 's', 'w', 'e', 'b', 'x', 'f', 'k' }
function T.fields_concerned(policy)
  if not policy.differs then return call('HKEYS', T.meta_key) end
  local fields, found = {}, {}
  for name in pairs(policy.limits) do
    for _, letter in ipairs(T.LETTERS) do fields[#fields + 1] = letter .. ':' .. name end
  end
  for name in pairs(policy.weights) do fields[#fields + 1] = 't:' .. name end
  for i, value in ipairs(#fields > 0 and T.read(T.meta_key, fields) or none) do
    if value then found[#found + 1] = fields[i] end
  end
  return found
end

function T.clear_policy(policy)
  local gone = {}
  for _, field in ipairs(T.fields_concerned(policy)) do
    local letter, name = string.match(field, '^(%a):(.*)$')
    local there = letter and policy.limits[name]
    local bound, least = string.match(letter == 'a' and there or '', '^c|([1-9]%d*)|%d|([1-9]%d*)')
    if bound then
      -- An adaptive limit keeps its current bound, within the new minimum and maximum. A limit of 0 has adapted to
      -- nothing.
      local current, dropped_at, latency = string.match(call('HGET', T.meta_key, field), '^(%d+)|(%d+)(.*)$')
      current = math.min(math.max(tonumber(current), least * 1000), bound * 1000)
      if not string.match(there, '|1$') then latency = '' end
      call('HSET', T.meta_key, field, T.int(current) .. '|' .. dropped_at .. latency)
    elseif letter == 'a' or letter == 'd' and not there or letter == 't' and not policy.weights[name] then
      gone[field] = false
    elseif letter == 'f' and not (there and string.match(there, '^r|%d+|%d|%d+|%d+|%d+|%d')
        and not string.match(there, '^r|%d+|%d|%d+|%d+|%d+|0|0|'))
      or letter == 'k' and not (there and string.match(there, '|b$')) then
      gone[field] = false
    elseif letter == 's' and not (there and string.match(there, '^[rq]'))
      or (letter == 'w' or letter == 'e' or letter == 'b' or letter == 'x') and not there then
      T.clear_field(letter, name)
    end
  end
  T.write(T.meta_key, gone)
end

-- Ends charges for a difference to a bound with that difference. If the limit counts in another way from now on, it
-- is unknown what was charged.
function T.end_charges(name, before, definition)
  local sort, bound, window, kind, shape = string.match(before or '', '^([rq])|(%d+)|%d|(%d+)|(%d+|%d+).-|?(b?)$')
  local sort_now, bound_now, window_now, kind_now, shape_now =
    string.match(definition, '^([rq])|(%d+)|%d|(%d+)|(%d+|%d+).-|?(b?)$')
  local is_comparable = sort and sort == sort_now and window == window_now
  local by = is_comparable and bound - bound_now or 0
  if by > 0 and call('EXISTS', T.charged_key(name)) == 1 then
    local limit = T.limit_of(name)
    T.rates().end_charges(limit, by)
    T.rates().save(limit)
    -- It is loaded again with its new definition.
    T.limits[name], T.lowered[name] = nil, limit.spent_changed
  end
  if not is_comparable or kind ~= kind_now or shape ~= shape_now then call('UNLINK', T.charged_key(name)) end
end

-- Returns the names of all limits, the names of those whose definition changes, and the fields to write.
function T.compare(policy)
  local names, fields, changed, defined = {}, {}, {}, {}
  for name, definition in pairs(policy.limits) do
    if definition then
      names[#names + 1] = name
      fields[#fields + 1] = 'd:' .. name
    end
  end
  local before = #fields > 0 and T.read(T.meta_key, fields) or none
  for i, name in ipairs(names) do
    if before[i] ~= policy.limits[name] then
      T.end_charges(name, before[i], policy.limits[name])
      T.bounds_before[name] = tonumber(string.match(before[i] or '', '^[rq]|(%d+)'))
      changed[#changed + 1] = name
      defined[fields[i]] = policy.limits[name]
    end
  end
  for name, weight in pairs(policy.weights) do
    if weight then defined['t:' .. name] = T.int(weight) end
  end
  return names, changed, defined
end

-- Writes the first policy of a record, which has no fields to compare. `limits` alternates field and definition.
function T.define_first(policy)
  local fields = cmsgpack.unpack(policy.limits)
  for name, weight in pairs(cmsgpack.unpack(policy.weights)) do
    fields[#fields + 1] = 't:' .. name
    fields[#fields + 1] = T.int(weight)
  end
  for i = 1, #fields, 1000 do
    call('HSET', T.meta_key, unpack(fields, i, math.min(i + 999, #fields)))
  end
  pool.indexed = true
  T.put('changes', T.int(pool.changes))
end

-- Returns whether a policy is in force. A version without digests leaves the digest of an earlier revision.
function T.is_in_force(digest)
  return call('HGET', T.meta_key, 'digest') == T.int(pool.revision) .. '|' .. digest
end

-- Unpacks the limits and weights of a policy by name; false for a removed one. If the policy in force is the base of
-- the changes that the process sends, only the changes are unpacked.
function T.read_policy(policy)
  policy.differs = policy.base ~= '' and policy.bands == pool.bands and T.is_in_force(policy.base)
  if policy.differs then
    local changes = cmsgpack.unpack(policy.changes)
    policy.limits, policy.weights = changes.limits, changes.weights
    return
  end
  local fields = cmsgpack.unpack(policy.limits)
  policy.limits, policy.weights = {}, cmsgpack.unpack(policy.weights)
  for i = 1, #fields, 2 do policy.limits[string.sub(fields[i], 3)] = fields[i + 1] end
end

-- Touches limits with waiters, which may fit under new bounds or, at any limit, new bands.
function T.touch_waited_for(names)
  if pool.parked == 0 or #names == 0 then return end
  local fields = {}
  for i, name in ipairs(names) do fields[i] = 'w:' .. name end
  for i, waiting in ipairs(T.read(T.meta_key, fields)) do
    if waiting and string.find(',' .. waiting, ',[1-9]') then T.touched[names[i]] = true end
  end
end

-- Saves the limits loaded so far, which have the old bounds, so that their counts are kept and they are loaded again.
function T.reload_limits()
  T.save_pool()
  T.changed, T.limits, T.lanes, T.tenants, T.bands, T.first = {}, {}, {}, {}, false, false
end

-- Restarts shares after a change of their measure, since uses in different measures cannot be compared. Waiting
-- tenants start equal, with their own tickets in the same order; permits in use count as not charged.
function T.restart_shares()
  for _, field in ipairs(call('HKEYS', T.meta_key)) do
    local name = string.match(field, '^w:(.*)$')
    local limit = name and T.limit_of(name)
    for number, band in ipairs(limit and limit.bands or none) do
      local key = T.park_key(limit, number)
      local tenants, moved = call('ZRANGE', key, 0, -1), {}
      for i, tenant in ipairs(tenants) do moved[2 * i - 1], moved[2 * i] = T.int(band.virtual), tenant end
      for i = 1, #moved, 1000 do call('ZADD', key, unpack(moved, i, math.min(i + 999, #moved))) end
      call('UNLINK', T.past_key(limit, number), T.progress_key(limit, number))
    end
  end
  for _, sid in ipairs(call('ZRANGE', T.sessions_key, 0, -1)) do
    local raw, held = call('HGETALL', T.session_key(sid)), {}
    for i = 1, #raw, 2 do
      if string.match(raw[i], '^h:') then
        held[raw[i]] = string.gsub(raw[i + 1], '^(%d+|%d+)|%d+|', '%1|0|', 1)
      end
    end
    T.write(T.session_key(sid), held)
  end
  T.moves = T.moves + 1
end

-- Adopts a policy with a higher revision; a start-up never overwrites a newer one. Returns whether it is new for
-- others.
function T.merge_policy(policy)
  if policy.revision == pool.revision and not T.is_in_force(policy.digest)
    and call('HGET', T.meta_key, 'policy') ~= policy.blob then
    T.conflict = 1
  end
  if policy.revision <= pool.revision then return false end
  local is_first = pool.revision == 0
  T.reload_limits()
  local changed, restarts = none, pool.revision > 0 and (pool.fair_by or 'seconds') ~= policy.fair_by
  if pool.revision == 0 then
    T.define_first(policy)
  else
    local names, defined
    T.read_policy(policy)
    names, changed, defined = T.compare(policy)
    T.clear_policy(policy)
    T.write(T.meta_key, defined)
    T.touch_waited_for(policy.bands == pool.bands and changed or names)
  end
  pool.revision, pool.lease_ms, pool.hold = policy.revision, policy.lease_ms, policy.hold
  pool.bands, pool.queue_max = policy.bands, policy.queue_max
  pool.hand_off, pool.reap_ms = policy.hand_off, policy.reap_ms
  pool.fair_by = policy.fair_by ~= 'seconds' and policy.fair_by or nil
  call('HSET', T.meta_key, 'revision', T.int(policy.revision), 'lease_ms', T.int(policy.lease_ms),
    'hold', policy.hold and '1' or '0', 'bands', policy.bands, 'queue_max', T.int(policy.queue_max),
    'hand_off', policy.hand_off and '1' or '0', 'reap_ms', T.int(policy.reap_ms),
    'fair_by', policy.fair_by, 'policy', policy.blob, 'digest', T.int(policy.revision) .. '|' .. policy.digest)
  call('LPUSH', T.prefix .. 'history', cmsgpack.pack({ policy.revision, pool.now, policy.by, policy.blob }))
  call('LTRIM', T.prefix .. 'history', 0, T.HISTORY - 1)
  for _, name in ipairs(changed) do
    local limit = T.limit_of(name)
    if limit.sort ~= 'c' then T.rates().carry_over(limit) end
    if T.lowered[name] then limit.spent_changed, limit.changed = true, true end
  end
  if restarts then T.restart_shares() end
  T.note_units(policy.by_tokens)
  return not is_first
end

-- Recounts limits that begin or cease to count tokens in flight.
function T.note_units(names)
  local before = call('HGET', T.meta_key, 'by_tokens') or ''
  if before == names then return end
  local differs = {}
  for name in string.gmatch(before, '[^ ]+') do differs[name] = true end
  for name in string.gmatch(names, '[^ ]+') do differs[name] = not differs[name] or nil end
  T.put('by_tokens', names ~= '' and names)
  T.count_again(differs)
end

-- Counts a permit that the process reports, even above the limit, which then drains: the process knows which permits
-- it holds. entry: ticket, flow, seq, hard_ms, use, amounts, ended: 1 if this request releases it. `known` maps a
-- ticket to its charges, if the server still has them; otherwise tokens in flight are charged by the amounts. If it
-- knows the session (`is_back`), but not an ended permit, an earlier request released it.
function T.assert_held(entry, known, is_back)
  local ticket, queue = entry[1], own.queues[entry[2]]
  local member = ticket .. '|' .. q.sid .. '|' .. queue.lane
  local charges, held_over = known[ticket], call('ZREM', T.lapsing_key, member) == 1
  if held_over then
    charges = T.carried(member)
  elseif not charges then
    if is_back and entry[7] == 1 then return end
    charges = T.charges_of_lane(queue.lane, T.amounts_in(entry[6]), false, true)
  end
  T.set_held(ticket, T.value_of(entry[3], entry[4], entry[5], charges, queue.flow))
  if not held_over then T.count_lane(queue.lane, charges) end
end

function T.charges_of(sid)
  local charges, raw = {}, call('HGETALL', T.session_key(sid))
  for i = 1, #raw, 2 do
    local ticket = string.match(raw[i], '^h:(.*)$')
    if ticket then charges[tonumber(ticket)] = T.read_held(raw[i + 1]).charges end
  end
  return charges
end

-- Deletes what is left of a session after the list of sessions has expired, as when the clock jumps by an hour: the
-- permits and waiters were recounted without it.
function T.forget_leftover()
  for _, queue in ipairs(T.places_of(q.sid)) do
    call('UNLINK', T.queue_key(queue))
    queue.at, queue.bounces, queue.bounced = nil, 0, 0
  end
  call('UNLINK', T.session_key(q.sid), T.stalled_key(q.sid))
end

-- Releases other permits held over for the session, such as grants that were pushed while its process was paused: it
-- has re-registered all that it holds.
function T.free_unclaimed()
  for _, member in ipairs(call('ZRANGE', T.lapsing_key, 0, -1)) do
    if string.match(member, '^[^|]*|([^|]*)|') == q.sid then T.free_lapsing(member) end
  end
end

-- Restores a permit held over for a session that died before the server lost its data. A living session reports its
-- own permits.
function T.assert_lapsing(entry)
  local member, left_ms, charges = entry[1], entry[2], entry[3]
  if not call('ZSCORE', T.sessions_key, string.match(member, '^[^|]*|([^|]*)|'))
    and call('ZADD', T.lapsing_key, 'NX', T.int(pool.now + left_ms), member) == 1 then
    if charges ~= '' then call('HSET', T.carried_key, member, charges) end
    T.keep_lapsing(left_ms)
    T.count_lane(T.lapsing_lane(member), charges)
  end
end

-- What sessions report of a rate after a loss, in the order of the sequence numbers of one epoch: its usage `base` up
-- to `seq`, admissions after it by their numbers (`later`), and by session the amount of those without a number.
-- Before the first report it is what the record still has, or what was asserted of a day. Where the record was empty,
-- usage of this epoch is in no report.
local function restored(limit, text, asserted)
  local found = { limit = limit, later = {}, loose = {} }
  if text then
    local epoch, seq, base, later, loose = string.match(text, '^(%d+)|(%d+)|(%d+)|([^|]*)|([^|]*)$')
    found.epoch, found.seq, found.base = tonumber(epoch), tonumber(seq), tonumber(base)
    for at, amount in string.gmatch(later, '(%d+)=(%d+)') do found.later[tonumber(at)] = tonumber(amount) end
    for sid, amount in string.gmatch(loose, '([^,=]+)=(%d+)') do found.loose[sid] = tonumber(amount) end
    return found
  end
  local epoch, seq = string.match(call('HGET', T.meta_key, 'kept') or '', '^(%d+)|(%d+)$')
  found.epoch, found.seq, found.base = tonumber(epoch or 0), tonumber(seq or 0), tonumber(asserted or 0)
  if found.base == 0 and (epoch or limit.sort == 'q' or not call('ZSCORE', T.spending_key, limit.name)) then
    found.base = T.rates().spent(limit)
  end
  return found
end

local function written(found)
  local later, loose = {}, {}
  for at in pairs(found.later) do later[#later + 1] = at end
  table.sort(later)
  for i, at in ipairs(later) do later[i] = T.int(at) .. '=' .. T.int(found.later[at]) end
  for sid in pairs(found.loose) do loose[#loose + 1] = sid end
  table.sort(loose)
  for i, sid in ipairs(loose) do loose[i] = sid .. '=' .. T.int(found.loose[sid]) end
  return string.format('%d|%d|%d|%s|%s', found.epoch, found.seq, found.base, table.concat(later, ','),
    table.concat(loose, ','))
end

-- Returns how much more counts by a report of usage up to `seq`, 0 if unknown. One of an earlier number in the same
-- epoch is included.
local function more_seen(found, seen, seq)
  local included = 0
  if q.epoch == found.epoch and seq > 0 then
    if seq <= found.seq then return 0 end
    for at, amount in pairs(found.later) do
      if at <= seq then included, found.later[at] = included + amount, nil end
    end
    found.seq = seq
  elseif q.epoch > found.epoch then
    found.epoch, found.seq, found.later = q.epoch, seq, {}
  end
  local extra = math.max(0, seen - found.base - included)
  found.base = found.base + included + extra
  return extra
end

-- Returns how much more counts by admissions of the session itself. `list` alternates number and amount.
local function more_later(found, list)
  local more, loose = 0, 0
  for i = 1, #list, 2 do
    local at, amount = list[i], list[i + 1]
    if q.epoch ~= found.epoch or at == 0 then
      loose = loose + amount
    elseif at > found.seq and not found.later[at] then
      more, found.later[at] = more + amount, amount
    end
  end
  local before = found.loose[q.sid] or 0
  if loose > before then more, found.loose[q.sid] = more + loose - before, loose end
  return more
end

-- Restores rates after a loss: what sessions saw of each, and what they have admitted since, each admission once.
-- Each entry: limit, seen, seq, since.
function T.assert_spent(entries)
  local names, fields, written_now = {}, {}, {}
  for i, entry in ipairs(entries) do names[i], fields[i] = entry[1], 'b:' .. entry[1] end
  if #names == 0 then return end
  local before, asserted = T.read(T.restored_key, names), T.read(T.meta_key, fields)
  for i, entry in ipairs(entries) do
    local limit = T.limit_of(entry[1])
    if limit.sort ~= 'c' then
      local found = restored(limit, before[i], asserted[i])
      local more = more_seen(found, entry[2], entry[3])
      T.rates().assert_spent(limit, more + more_later(found, entry[4]))
      written_now[entry[1]] = written(found)
      T.put(fields[i], T.int(math.max(found.base, 1)))
    end
  end
  T.write(T.restored_key, written_now)
  call('PEXPIRE', T.restored_key, T.POOL_KEEP_MS)
end

-- Counts what a process admitted of rates by its local share, which no session has seen. Each entry: limit, `amount`
-- that still counts, and the `total` of all that the process has admitted so. A join whose reply was lost is repeated:
-- what an earlier one reported is not counted again.
function T.assert_local(entries)
  local before, reported = {}, {}
  for name, total in string.gmatch(call('HGET', T.local_key, q.sid) or '', '([^ ]+) (%d+)') do before[name] = total end
  for i, entry in ipairs(entries) do
    local name, amount, total = unpack(entry)
    local limit = T.limit_of(name)
    if limit.sort ~= 'c' then T.rates().assert_spent(limit, math.min(amount, total - (before[name] or 0))) end
    reported[i] = name .. ' ' .. T.int(total)
  end
  if #reported == 0 then return call('HDEL', T.local_key, q.sid) end
  call('HSET', T.local_key, q.sid, table.concat(reported, ' '))
  call('PEXPIRE', T.local_key, T.POOL_KEEP_MS)
end

-- Numbers the usage and indexes the pauses of a record written by a version that did not.
function T.index()
  T.put('changes', T.int(pool.changes))
  pool.indexed = true
  for _, field in ipairs(call('HKEYS', T.meta_key)) do
    local letter, name = string.match(field, '^([dp]):(.*)$')
    local limit = letter and T.limit_of(name)
    if letter == 'p' and limit.pause then limit.pause_changed, limit.changed = true, true end
    if letter == 'd' and limit.sort ~= 'c' and T.rates().spent(limit) > 0 then
      limit.spent_changed, limit.changed = true, true
    end
  end
end

-- entry: limit, left_ms, ramp_ms, said.
function T.assert_pause(entry)
  local limit, until_ms = T.limit_of(entry[1]), pool.now + entry[2]
  local pause = limit.pause
  -- A pause that `rewind` moved back may be over.
  local is_over = pause and not pause.gate and pool.now >= pause.until_ms + pause.ramp_ms
  if pause and not is_over and pause.until_ms >= until_ms then return end
  limit.pause = { until_ms = until_ms, ramp_ms = entry[3], passed = 0, said = entry[4],
    gate = entry[3] == 0 and T.gate_of(limit.name) or nil }
  limit.pause_changed, limit.changed = true, true
  if limit.implicit then
    T.schedule_check(limit.name, until_ms)
    T.note_timers()
  end
end

function T.join()
  local other = call('GET', KEYS[2])
  if other and other ~= '2' then
    if call('ZCOUNT', 'tg:1:' .. string.match(T.prefix, '({.*})') .. ':sessions',
      T.int(pool.now), '+inf') > 0 or other ~= '1' then return 'layout' end
  end
  call('SET', KEYS[2], '2')
  if q.batch <= own.batch then return 'stale' end
  local charges, since = T.charges_of(q.sid), call('HGET', T.session_key(q.sid), 'since')
  if call('ZSCORE', T.sessions_key, q.sid) then
    T.reap(q.sid, false, true)
  else
    since = nil
    T.forget_leftover()
  end
  own.held, own.written, own.dirty = {}, {}, nil
  if not since and call('ZCARD', T.sessions_key) == 0 then T.recount() end
  local is_news = T.merge_policy(q.join.policy)
  if not pool.indexed then T.index() end
  local lost = q.epoch > 0 and q.epoch < pool.epoch
  -- A session of an earlier epoch proves that there was one: the quiet lease applies in full.
  if lost then
    pool.recover_until = math.max(pool.recover_until,
      pool.began + math.max(pool.lease_ms, q.lease_ms))
    T.put('recover_until', T.int(pool.recover_until))
  end
  me.gen, me.sent = T.next_seq(), 0
  call('ZADD', T.sessions_key, T.int(pool.now + pool.lease_ms), q.sid)
  call('HSET', T.session_key(q.sid), 'gen', T.int(me.gen), 'batch', T.int(q.batch),
    'sent', '0', 'acked', '0', 'name', q.join.name, 'since', since or '0',
    'revision', T.int(pool.revision))
  T.enter_roster(since, is_news)
  for _, entry in ipairs(q.join.held) do T.assert_held(entry, charges, since) end
  T.free_unclaimed()
  if lost then
    for _, entry in ipairs(q.join.lapsing) do T.assert_lapsing(entry) end
    T.assert_spent(q.join.spent)
    for _, entry in ipairs(q.join.pauses) do T.assert_pause(entry) end
    T.vouch()
  end
  T.assert_local(q.join.own)
  return 'ok'
end

-- Touches the limits of some of the session's queues; the session names all its queues in turn.
function T.touch_own()
  for _, number in ipairs(q.looks) do
    local at = own.queues[number].at
    -- A version without the key `stalled` may have left the queue blocked.
    if at == '!' and not own.blocked then T.return_to_line(own.queues[number]) end
    if at and at ~= '!' then
      T.touch(T.limit_of(at))
      T.note_progress(T.limit_of(at), own.queues[number].band)
      T.waited[number] = own.queues[number]
    end
  end
end

-- Forgets the oldest calls whose usage is still expected, beyond this number, so that they do not fill the memory.
-- Their reservations stay.
T.MOST_OWED = 2000
function T.bound_owed()
  local tickets = call('HKEYS', T.owed_key(q.sid))
  if #tickets <= T.MOST_OWED then return end
  table.sort(tickets, function(one, other) return tonumber(one) < tonumber(other) end)
  for i = 1, #tickets - T.MOST_OWED do call('HDEL', T.owed_key(q.sid), tickets[i]) end
end

-- Renews the TTLs, by which keys expire if no session is left to reap others. Runs every third of a lease, for the
-- queues that the request names.
function T.keep_keys()
  T.bound_owed()
  call('PEXPIRE', T.sessions_key, T.POOL_KEEP_MS)
  call('PEXPIRE', T.timed_key, T.POOL_KEEP_MS)
  call('PEXPIRE', T.starving_key, T.POOL_KEEP_MS)
  call('PEXPIRE', T.seen_key, T.POOL_KEEP_MS)
  call('PEXPIRE', T.fresh_key, T.POOL_KEEP_MS)
  call('PEXPIRE', T.session_key(q.sid), T.SESSION_KEEP_MS)
  call('PEXPIRE', T.owed_key(q.sid), T.SESSION_KEEP_MS)
  for _, number in ipairs(q.looks) do
    local queue = own.queues[number]
    call('PEXPIRE', T.queue_key(queue), T.SESSION_KEEP_MS)
    if queue.at and queue.at ~= '!' then
      call('PEXPIRE', T.line_key(T.limit_of(queue.at), queue), T.SESSION_KEEP_MS)
      call('PEXPIRE', T.park_key(T.limit_of(queue.at), queue.band), T.SESSION_KEEP_MS)
      if T.tenant_of(queue.tenant).last then
        call('PEXPIRE', T.order_key(queue.tenant, queue.band), T.SESSION_KEEP_MS)
      end
    end
  end
end
