-- does: gathers all that a session wants to compare: what it holds, who lapses, what is spent
-- keys: meta sessions session lapsing
-- args: sid revision
-- returns: whole()
-- units: ms
function T.next_event_ms()
  local first = math.huge
  for _, key in ipairs({ T.sessions_key, T.lapsing_key }) do
    local head = call('ZRANGE', key, 0, 0, 'WITHSCORES')
    if head[2] then first = math.min(first, tonumber(head[2])) end
  end
  if first == math.huge then return 0 end
  return math.max(1, first - pool.now)
end

-- (ticket, seq, until_ms) of each.
function T.all_held()
  local list, raw = {}, call('HGETALL', T.session_key(q.sid))
  for i = 1, #raw, 2 do
    local ticket = string.match(raw[i], '^h:(.*)$')
    if ticket then
      local seq, until_ms = string.match(raw[i + 1], '^([^|]*)|([^|]*)|')
      list[#list + 1] = { tonumber(ticket), tonumber(seq), tonumber(until_ms) }
    end
  end
  return list
end

function T.all_lapsing()
  local list, raw = {}, call('ZRANGE', T.lapsing_key, 0, 999, 'WITHSCORES')
  for i = 1, #raw, 2 do
    list[#list + 1] = { raw[i], math.max(0, tonumber(raw[i + 1]) - pool.now) }
  end
  return list
end

-- What is spent of the rates and who paused what, for the case that the server forgets it.
function T.spent_and_paused()
  local spent, pauses, raw = {}, {}, call('HGETALL', T.meta_key)
  for i = 1, #raw, 2 do
    local field, name = string.match(raw[i], '^(%a):(.*)$')
    if field == 'd' and string.sub(raw[i + 1], 1, 1) ~= 'c' then
      spent[#spent + 1] = { name, T.rates().spent(T.limit_of(name)) }
    elseif field == 'p' then
      local until_ms, ramp_ms, said = string.match(raw[i + 1], '^(%d+)|(%d+)|%d+|(.*)$')
      -- Who calls names a limit that no policy names only while it is told of its pause.
      if ramp_ms == '0' or until_ms + ramp_ms > pool.now then
        pauses[#pauses + 1] = { name, tonumber(until_ms) - pool.now, tonumber(ramp_ms), said }
      end
    end
  end
  return spent, pauses
end

-- Who is there, for a session that does not know it yet; beyond so many nobody vouches for anybody.
T.MOST_ON_ROSTER = 256
function T.roster()
  if pool.sessions > T.MOST_ON_ROSTER then return { 0, {} } end
  if q.roster == pool.roster then return { pool.roster, false } end
  return { pool.roster, call('ZRANGE', T.sessions_key, 0, -1) }
end

function T.whole()
  local spent, pauses = T.spent_and_paused()
  return {
    pool.now, T.all_held(), pool.hold and T.all_lapsing() or {}, T.next_event_ms(), T.conflict, spent, pauses,
    (q.revision ~= pool.revision or T.conflict == 1) and call('HGET', T.meta_key, 'policy') or false,
    T.roster(),
  }
end
