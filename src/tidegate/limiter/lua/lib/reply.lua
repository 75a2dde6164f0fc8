-- does: builds the reply to a session
-- keys: none
-- args: sid revision
-- returns: reply(status, whole)
-- units: ms
function T.reply(status, all)
  local ok = status == 'ok'
  return cmsgpack.pack({
    status, pool.epoch, me.gen, pool.lease_ms, math.max(0, pool.recover_until - pool.now),
    pool.revision, pool.sessions, me.sent, T.more, pool.parked,
    pool.timed_at > 0 and math.max(1, pool.timed_at - pool.now) or 0,
    T.granted, T.stamps, T.refused, ok and own.sid and T.hints() or {}, all or false,
    T.barred, T.outlooks,
  })
end
