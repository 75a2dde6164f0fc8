-- does: takes a waiter's ticket out; a grant that crossed the cancel is given back
-- keys: used held waiting queue heads
-- args: cancels
-- returns: cancel(ticket)
-- units: none
local function cancel(ticket)
  if forget_waiter(ticket) then return end
  local entry = redis.call('HGET', held_key(q.sid), ticket)
  if entry then
    redis.call('HDEL', held_key(q.sid), ticket)
    add_used(string.match(entry, '^[^|]*|[^|]*|(.*)$'), -1)
  end
end
