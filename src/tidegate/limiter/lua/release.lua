-- does: takes permits back, and passes a permit from one ticket to the next of the same process
-- keys: used held waiting queue heads lapsing
-- args: releases transfers
-- returns: release(entry), transfer(entry), forget_waiter(ticket)
-- units: hard_ms in ms from now
local reheaded = {}

-- Takes a ticket out of its queue; true if it was waiting.
local function forget_waiter(ticket)
  local entry = redis.call('HGET', waiting_key(q.sid), ticket)
  if not entry then return false end
  local lane = string.match(entry, '^[^|]*|[^|]*|(.*)$')
  redis.call('HDEL', waiting_key(q.sid), ticket)
  redis.call('ZREM', queue_key(lane, q.sid), ticket)
  reheaded[lane] = true
  return true
end

-- entry: ticket, limit, outcome, tokens. Doing it twice does nothing the second time.
local function release(entry)
  local ticket, limit = entry[1], entry[2]
  if redis.call('HDEL', held_key(q.sid), ticket) == 1
    or redis.call('ZREM', lapsing_key, ticket .. '|' .. q.sid .. '|' .. limit) == 1 then
    add_used(limit, -1)
  end
end

-- entry: from, to, limit, seq, hard_ms. The permit was passed on inside the process already, so
-- `to` is held whatever we find.
local function transfer(entry)
  local from, to, limit, seq, hard_ms = entry[1], entry[2], entry[3], entry[4], entry[5]
  if redis.call('HDEL', held_key(q.sid), from) == 1 then add_used(limit, -1) end
  forget_waiter(to)
  if redis.call('HSET', held_key(q.sid), to,
    int(seq) .. '|' .. int(pool.now + hard_ms) .. '|' .. limit) == 1 then
    add_used(limit, 1)
  end
end
