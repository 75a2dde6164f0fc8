-- does: checks that a session is still the one it believes to be, and takes its acknowledgement
-- keys: session
-- args: sid gen epoch batch ack
-- returns: check_session(), unblock(), me
-- units: ms
local me = { gen = 0, sent = 0 }

-- Never renews blindly: a process that was paused must find its session gone.
function T.check_session()
  if q.epoch ~= pool.epoch then return 'epoch' end
  if own.gen == 0 or own.gen ~= q.gen then return 'gone' end
  if q.batch <= own.batch then return 'stale' end
  me.gen, me.sent = own.gen, own.sent
  T.set_own('batch', T.int(q.batch))
  if own.closed_at then T.set_own('closed_at', false) end
  if q.ack > own.acked then T.set_own('acked', T.int(q.ack)) end
  return 'ok'
end

-- It takes grants again: its queues stand where they stood, by the age of their tickets.
function T.unblock()
  call('HDEL', T.session_key(q.sid), 'blocked')
  local list = T.places_of(q.sid)
  table.sort(list, function(one, other) return one.id < other.id end)
  for _, queue in ipairs(list) do
    if queue.at == '!' then
      local member, stamp = T.first_of(queue)
      local list = T.amounts_in(string.match(member, '^%d+|%d+|%d+|(.*)$'))
      local limit = T.blocker(queue, list, stamp, nil) or T.limit_of(T.names_in(queue.lane)[1])
      T.park(queue, limit, stamp)
      T.touch(limit)
    end
  end
end
