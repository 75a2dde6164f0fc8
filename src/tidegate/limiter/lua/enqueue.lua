-- does: puts tickets at the end of their lane; one that is there already keeps its place
-- keys: session held waiting queue heads
-- args: enqueues full
-- returns: enqueue(entries), rehead(lane)
-- units: left_ms and hard_ms in ms from now, left_ms 0 for no deadline
-- A session's place in a lane is that of its first ticket.
local function rehead(lane)
  local first = redis.call('ZRANGE', queue_key(lane, q.sid), 0, 0, 'WITHSCORES')
  if first[2] then
    redis.call('ZADD', heads_key(lane), first[2], q.sid)
  else
    redis.call('ZREM', heads_key(lane), q.sid)
  end
end

-- entry: ticket, lane, left_ms, hard_ms. Only a repeated batch (`full`) can name a ticket that
-- has been let in already.
local function enqueue(entries)
  local lanes = {}
  for _, entry in ipairs(entries) do
    local ticket, lane, left_ms, hard_ms = entry[1], entry[2], entry[3], entry[4]
    local deadline = left_ms > 0 and pool.now + left_ms or 0
    if not (q.full and redis.call('HEXISTS', held_key(q.sid), ticket) == 1)
      and redis.call('HSETNX', waiting_key(q.sid), ticket,
        int(deadline) .. '|' .. int(hard_ms) .. '|' .. lane) == 1 then
      redis.call('ZADD', queue_key(lane, q.sid), int(next_seq()), ticket)
      lanes[lane] = true
    end
  end
  for lane in pairs(lanes) do
    redis.call('HSET', session_key(q.sid), 'lane:' .. lane, '1')
    rehead(lane)
    touch(lane)
  end
end
