-- does: ensures that every session knows of every other that may hold a permit
-- keys: meta sessions session seen fresh expected
-- args: sid roster join
-- returns: enter_roster(), acknowledge(), leave_roster(), vouch(), notify()
-- units: ms
-- After an empty restart the quiet lease may end as soon as all sessions that may hold a permit have rejoined. Only
-- earlier sessions can name them. So a new session gets no permits until all others have acknowledged it, for half a
-- lease at most; a session that has not acknowledged it by then may not vouch for others.
T.seen_key = T.prefix .. 'seen'
T.fresh_key = T.prefix .. 'fresh'
T.expected_key = T.prefix .. 'expected'
T.MOST_TO_ANNOUNCE = 64
T.MOST_AT_ONCE = 64

-- Pushes a message without grants, so that the session compares everything.
function T.notify(sid)
  local peer = T.peer_of(sid)
  if peer.reachable then
    call('SPUBLISH', T.channel(sid), cmsgpack.pack({ pool.epoch, peer.gen, peer.sent, {}, pool.now }))
  end
end

function T.notify_others()
  for _, sid in ipairs(call('ZRANGE', T.sessions_key, 0, -1)) do
    if sid ~= q.sid then T.notify(sid) end
  end
end

function T.change_roster()
  pool.roster = pool.roster + 1
  T.put('roster', T.int(pool.roster))
end

function T.count_fresh()
  pool.fresh = call('ZCARD', T.fresh_key)
  T.put('fresh', T.int(pool.fresh))
end

function T.announce(sessions)
  if pool.now >= pool.recover_until and sessions <= T.MOST_TO_ANNOUNCE then T.notify_others() end
end

-- Adds a session. A known session only joins again to report something new; `is_news`: it brought a policy that
-- others do not have.
function T.enter_roster(was_there, is_news)
  if was_there then
    if is_news then T.announce(call('ZCARD', T.sessions_key)) end
    return
  end
  T.change_roster()
  call('ZADD', T.seen_key, T.int(pool.roster), q.sid)
  call('HSET', T.session_key(q.sid), 'since', T.int(pool.roster))
  local sessions = call('ZCARD', T.sessions_key)
  if sessions > 1 then
    call('ZADD', T.fresh_key, T.int(pool.now + math.floor(pool.lease_ms / 2)), q.sid)
    T.announce(sessions)
  end
  T.count_fresh()
end

function T.leave_roster(sid)
  T.change_roster()
  call('ZREM', T.seen_key, sid)
  if call('ZREM', T.fresh_key, sid) == 1 then T.count_fresh() end
end

-- Records which version of the roster a session has, and which new sessions all sessions know by now.
function T.acknowledge()
  if q.roster > 0 then call('ZADD', T.seen_key, 'XX', 'GT', T.int(q.roster), q.sid) end
  if pool.fresh == 0 then return end
  local least = tonumber(call('ZRANGE', T.seen_key, 0, 0, 'WITHSCORES')[2])
  -- A run checks only some new sessions: of a thousand that start together, all would take too long.
  local fresh = call('ZRANGE', T.fresh_key, 0, T.MOST_AT_ONCE - 1, 'WITHSCORES')
  for i = 1, #fresh, 2 do
    local since = tonumber(call('HGET', T.session_key(fresh[i]), 'since'))
    if tonumber(fresh[i + 1]) <= pool.now or since <= least then
      call('ZREM', T.fresh_key, fresh[i])
      if fresh[i] ~= q.sid then T.notify(fresh[i]) end
    end
  end
  T.count_fresh()
end

-- Takes the names of earlier sessions from a session that returns after an empty restart.
function T.vouch()
  local f = call('HMGET', T.meta_key, 'empty', 'vouched')
  if not f[1] or pool.now >= pool.recover_until then return end
  for _, sid in ipairs(q.join.roster) do
    if not call('ZSCORE', T.sessions_key, sid) then call('ZADD', T.expected_key, 0, sid) end
  end
  call('ZREM', T.expected_key, q.sid)
  call('PEXPIRE', T.expected_key, T.POOL_KEEP_MS)
  if #q.join.roster > 0 then T.put('vouched', '1') end
  if (f[2] or #q.join.roster > 0) and call('EXISTS', T.expected_key) == 0 then
    pool.began = pool.now - math.max(pool.lease_ms, q.lease_ms)
    pool.recover_until = pool.now
    T.put('began', T.int(pool.began))
    T.put('recover_until', T.int(pool.recover_until))
    T.notify_others()
  end
end
