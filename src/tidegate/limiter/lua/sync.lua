-- does: applies the ordinary messages of a process: releases first, admissions last; the rest is for `tend`
-- keys: meta layout
-- args: request
-- request: sid gen epoch run uptime_ms lease_ms revision batch ack roster full leave flows wants resets join transfers releases settles cancels enqueues looks told pages asks lefts firm uses dues firsts stamps
-- returns: status epoch gen lease_ms recovering_ms revision sessions sent more parked timed_ms grants stamps refused hints whole barred outlook
-- units: ms; grants are (ticket, seq), hints (flow, horizon, tag, head, step), barred (ticket, limit, room_in_ms, used, ahead, estimate), outlook (flow, limit, room_in_ms, used, firm)
-- uses: core clock pool limits queues permits session apply hints reply
-- later: releases capacity blocked pump late hint_weights deadlines rates pacing bucket timers outlook pauses latency starving progress
T.load_pool()
local wall = T.wall_clock_ms()
pool.now = math.max(wall, pool.clock)
if pool.run ~= q.run or q.epoch ~= pool.epoch or wall < pool.clock or wall >= pool.reap_at then
  return T.reply('tend')
end
T.load_own()
if own.blocked then return T.reply('tend') end
local status = T.check_session()
if status == 'ok' then
  own.sid = q.sid
  T.apply_messages()
end
T.finish_run()
if status == 'ok' then T.flush_own() end
T.save_pool()
return T.reply(status)
