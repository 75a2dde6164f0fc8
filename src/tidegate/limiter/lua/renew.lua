-- does: keeps a session alive from the heartbeat thread; never brings one back that is gone
-- keys: meta layout
-- args: request
-- request: sid gen epoch run uptime_ms lease_ms
-- returns: status epoch lease_ms recovering_ms revision
-- units: ms
-- uses: keys clock pool recover
load_pool()
recover()
local status = 'ok'
local expiry = redis.call('ZSCORE', sessions_key, q.sid)
if q.epoch ~= pool.epoch then
  status = 'epoch'
elseif not expiry or tonumber(expiry) <= pool.now
  or tonumber(redis.call('HGET', session_key(q.sid), 'gen') or 0) ~= q.gen then
  status = 'gone'
else
  redis.call('ZADD', sessions_key, 'XX', int(pool.now + pool.lease_ms), q.sid)
  redis.call('PEXPIRE', sessions_key, POOL_KEEP_MS)
end
save_pool()
return cmsgpack.pack({ status, pool.epoch, pool.lease_ms,
  math.max(0, pool.recover_until - pool.now), pool.revision })
