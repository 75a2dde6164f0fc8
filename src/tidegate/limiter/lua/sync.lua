-- does: all that a process has to say to its pool, in one step; frees first, lets in last
-- keys: meta layout
-- args: request
-- request: sid gen epoch run uptime_ms lease_ms revision batch ack full leave join transfers releases cancels enqueues
-- returns: status epoch gen lease_ms recovering_ms revision sessions sent more conflict grants held lapsing next_event_ms policy
-- units: ms; grants and held are lists of (ticket, seq)
-- uses: keys clock pool recover session release cancel enqueue pump ask reply
load_pool()
recover()
reap_expired()
local status = check_session()
local own = nil
if status == 'ok' then
  own = q.sid
  for _, entry in ipairs(q.transfers) do transfer(entry) end
  for _, entry in ipairs(q.releases) do release(entry) end
  for _, ticket in ipairs(q.cancels) do cancel(ticket) end
  for lane in pairs(reheaded) do rehead(lane) end
  ask(q.enqueues)
  if q.leave then
    reap(q.sid, false)
    own = nil
  end
end
pump(own)
publish()
save_pool()
if own and q.full then keep_keys() end
return reply(status)
