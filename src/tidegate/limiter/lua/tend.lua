-- does: applies all messages of a process, including a join or leave; also recovers the pool, reaps sessions and compares
-- keys: meta layout
-- args: request
-- request: sid gen epoch run uptime_ms lease_ms revision batch ack roster full leave flows wants resets join transfers releases settles cancels enqueues looks told pages asks lefts firm uses dues firsts stamps
-- returns: status epoch gen lease_ms recovering_ms revision sessions sent more parked timed_ms grants stamps refused hints whole barred outlook
-- whole: now_ms held lapsing next_event_ms conflict spent pauses policy roster told pages seq
-- units: ms; grants are (ticket, seq), hints (flow, horizon, tag, head, step), barred (ticket, limit, room_in_ms, used, ahead, estimate), outlook (flow, limit, room_in_ms, used, firm)
-- uses: core clock pool limits queues permits recover roster session join apply hints reply comparison
-- later: releases capacity blocked pump late hint_weights deadlines rates pacing bucket timers outlook pauses latency starving progress
T.load_pool()
-- With many waiting queues, a run that meets the end of a garbage collection takes three times as long: end it first,
-- before this run adds to it.
if pool.parked >= 200 then collectgarbage('step', 1000) end
T.recover()
T.reap_expired()
T.reap_closed()
T.load_own()
local status = q.join and T.join() or nil
if not q.join then status = T.check_session() end
if status == 'ok' then
  own.sid = q.sid
  T.acknowledge()
  call('ZADD', T.sessions_key, 'XX', T.int(pool.now + pool.lease_ms), q.sid)
  if own.blocked and not q.join then T.unblock() end
  T.apply_messages()
  T.touch_own()
  T.flush_own()
  if q.leave then
    own.dirty, own.written = nil, {}
    T.reap(q.sid, false)
    own.sid = nil
  end
end
T.finish_run()
if own.sid then T.flush_own() end
T.note_sessions()
local all = false
if own.sid and q.full then
  T.save_pool()
  all = T.whole()
end
T.save_pool()
if own.sid and (q.full or q.join) then T.keep_keys() end
return T.reply(status, all)
