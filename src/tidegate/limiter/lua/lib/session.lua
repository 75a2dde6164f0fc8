-- does: checks that a session still exists with its generation, and stores its acknowledgement and the revision that it knows
-- keys: session
-- args: sid gen epoch batch ack revision
-- returns: check_session(), me
-- units: ms
local me = { gen = 0, sent = 0 }

-- Never renews blindly: a process that was paused must detect its expired session.
function T.check_session()
  if q.epoch ~= pool.epoch then return 'epoch' end
  if own.gen == 0 or own.gen ~= q.gen then return 'gone' end
  if q.batch <= own.batch then return 'stale' end
  me.gen, me.sent = own.gen, own.sent
  T.set_own('batch', T.int(q.batch))
  if own.closed_at then T.set_own('closed_at', false) end
  if q.revision ~= own.revision then T.set_own('revision', T.int(q.revision)) end
  if q.ack > own.acked then
    T.set_own('acked', T.int(q.ack))
    if own.full then
      T.set_own('full', false)
      T.touch(T.limit_of(string.match(own.full, '^%d+|(.*)$')))
    end
  end
  return 'ok'
end
