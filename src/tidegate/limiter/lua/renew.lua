-- does: renews a session from the heartbeat thread; never restores an expired one
-- keys: meta layout
-- args: request
-- request: sid gen epoch run
-- returns: status epoch lease_ms recovering_ms revision
-- units: ms
-- uses: core clock
-- Anything unusual is reported to the event loop, whose `tend` handles it.
local f = call('HMGET', T.meta_key, 'run', 'epoch', 'clock', 'lease_ms', 'recover_until', 'revision')
local epoch, clock, lease_ms = tonumber(f[2] or 0), tonumber(f[3] or 0), tonumber(f[4] or 0)
local wall = T.wall_clock_ms()
local now = math.max(wall, clock)
local status = 'ok'
local expiry = call('ZSCORE', T.sessions_key, q.sid)
local silent = wall - clock > lease_ms / 2
  and #call('ZRANGEBYSCORE', T.sessions_key, '-inf', wall, 'LIMIT', 0, 1) > 0
if f[1] ~= q.run or epoch ~= q.epoch or clock - wall > lease_ms / 2 or silent then
  status = 'epoch'
elseif not expiry or tonumber(expiry) <= now
  or tonumber(call('HGET', T.session_key(q.sid), 'gen') or 0) ~= q.gen then
  status = 'gone'
else
  call('ZADD', T.sessions_key, 'XX', T.int(now + lease_ms), q.sid)
  call('PEXPIRE', T.sessions_key, T.POOL_KEEP_MS)
  call('HSET', T.meta_key, 'clock', T.int(now))
end
return cmsgpack.pack({ status, epoch, lease_ms, math.max(0, tonumber(f[5] or 0) - now),
  tonumber(f[6] or 0) })
