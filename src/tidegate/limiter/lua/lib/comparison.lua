-- does: collects the state that a session compares with its own: permits, permits held over, usage, pauses, policy, roster
-- keys: meta sessions session lapsing carried spending paused
-- args: sid revision told pages asks
-- returns: whole()
-- units: ms
-- A run reads a bounded part, whatever the size of the pool: in order, the changes of rates that the session has not
-- seen, and a page of each list. The session requests the rest with its next calls.
T.MOST_TOLD = 100
T.MOST_ON_PAGE = 100
T.LOOKED_AT = 50

function T.next_event_ms()
  local first = math.huge
  for _, key in ipairs({ T.sessions_key, T.lapsing_key }) do
    local head = call('ZRANGE', key, 0, 0, 'WITHSCORES')
    if head[2] then first = math.min(first, tonumber(head[2])) end
  end
  if first == math.huge then return 0 end
  return math.max(1, first - pool.now)
end

-- Returns (ticket, seq, until_ms) of each ticket that the request asks about and that was admitted.
function T.held_of_asked()
  local list, fields = {}, {}
  for i, ticket in ipairs(q.asks) do fields[i] = 'h:' .. ticket end
  for i, value in ipairs(#fields > 0 and T.read(T.session_key(q.sid), fields) or none) do
    if value then
      local seq, until_ms = string.match(value, '^([^|]*)|([^|]*)|')
      list[#list + 1] = { q.asks[i], tonumber(seq), tonumber(until_ms) }
    end
  end
  return list
end

-- Returns a page of a sorted set from a cursor (score, number of members of that score already read), and the cursor
-- of the next page, nil after the last. Members that are added or removed do not move the cursor: a score is read
-- again from its beginning, unless it fills pages alone.
function T.page(key, place)
  local score, passed = '-inf', 0
  if place then score, passed = place[1], place[2] end
  local first = (place and call('ZCOUNT', key, '-inf', '(' .. score) or 0) + passed
  local raw = call('ZRANGE', key, first, first + T.MOST_ON_PAGE - 1, 'WITHSCORES')
  if #raw < 2 * T.MOST_ON_PAGE then return raw end
  local last, alone = raw[#raw], raw[2] == raw[#raw]
  return raw, { last, alone and T.MOST_ON_PAGE + (score == last and passed or 0) or 0 }
end

-- Returns permits held over: for dead sessions, if the policy holds them, and for calls that outlive their process.
function T.lapsing_page()
  local list = {}
  local raw, rest = T.page(T.lapsing_key, q.pages.lapsing)
  local members = {}
  for i = 1, #raw, 2 do members[#members + 1] = raw[i] end
  local charges = #members > 0 and T.read(T.carried_key, members)
  for i, member in ipairs(members) do
    list[i] = { member, math.max(0, tonumber(raw[2 * i]) - pool.now), charges[i] or '' }
  end
  return list, rest
end

-- Returns pauses with their reasons, and deletes some that are over.
function T.pauses_page()
  for _, name in ipairs(call('ZRANGEBYSCORE', T.paused_key, '-inf', pool.now, 'LIMIT', 0, T.LOOKED_AT)) do
    call('ZREM', T.paused_key, name)
    call('HDEL', T.meta_key, 'p:' .. name)
  end
  local list, fields = {}, {}
  local raw, rest = T.page(T.paused_key, q.pages.pauses)
  for i = 1, #raw, 2 do fields[#fields + 1] = 'p:' .. raw[i] end
  for i, value in ipairs(#fields > 0 and T.read(T.meta_key, fields) or none) do
    local until_ms, ramp_ms, said = string.match(value or '', '^(%d+)|(%d+)|%d+|(.*)$')
    -- A process adds a limit that is not in the policy to its demands only while its pause is reported here.
    if until_ms and (ramp_ms == '0' or until_ms + ramp_ms > pool.now) then
      list[#list + 1] = { string.sub(fields[i], 3), tonumber(until_ms) - pool.now, tonumber(ramp_ms), said }
    end
  end
  return list, rest
end

-- Returns the usage of rates, which sessions restore if the server loses it; the number of the last change that the
-- session then knows; and the cursor of the rest. Rates that changed after `told` are reported as of that change,
-- which is no less than their usage now. The first page adds, as of now, those unchanged for the longest time (in a
-- small pool all of them), unless this run has more to do; those without usage are deleted.
function T.spent_since_told()
  local list, fields, at, told = {}, {}, {}, pool.changes
  local raw = call('ZRANGEBYSCORE', T.spending_key, '(' .. T.int(q.told), '+inf', 'WITHSCORES',
    'LIMIT', 0, T.MOST_TOLD)
  local behind = #raw == 2 * T.MOST_TOLD
  if behind then told = tonumber(raw[#raw]) end
  for i = 1, #raw, 2 do fields[#fields + 1] = 's:' .. raw[i] end
  for i, amount in ipairs(#fields > 0 and T.read(T.meta_key, fields) or none) do
    local name = raw[2 * i - 1]
    list[i] = { name, tonumber(amount or 0) }
    at[name] = i
  end
  local eldest = not q.pages.spent and T.more == 0 and call('ZRANGE', T.spending_key, 0, T.LOOKED_AT - 1)
  T.read_limits(eldest or none)
  for _, name in ipairs(eldest or none) do
    local limit, amount = T.limit_of(name), 0
    if limit.sort ~= 'c' then amount = T.rates().spent(limit) end
    list[at[name] or #list + 1] = { name, amount }
    if amount == 0 then T.forget_spending(name) end
  end
  return list, told, behind and { T.int(told), 0 } or nil
end

-- Returns the version of the roster, and the roster if the session does not have that version. Above this size no
-- session vouches for others.
T.MOST_ON_ROSTER = 256
function T.roster()
  if pool.sessions > T.MOST_ON_ROSTER then return { 0, {} } end
  if q.roster == pool.roster then return { pool.roster, false } end
  return { pool.roster, call('ZRANGE', T.sessions_key, 0, -1) }
end

function T.whole()
  local spent, told, more_spent = T.spent_since_told()
  local pauses, more_pauses = T.pauses_page()
  local lapsing, more_lapsing = T.lapsing_page()
  return {
    pool.now, T.held_of_asked(), lapsing, T.next_event_ms(), T.conflict, spent, pauses,
    (q.revision ~= pool.revision or T.conflict == 1) and call('HGET', T.meta_key, 'policy') or false,
    T.roster(), told, { spent = more_spent, lapsing = more_lapsing, pauses = more_pauses }, pool.seq,
  }
end
