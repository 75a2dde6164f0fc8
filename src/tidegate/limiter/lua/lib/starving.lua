-- does: reserves free capacity for tickets that moved between limits too often
-- keys: starving line
-- args: none
-- returns: serve_starving()
-- units: none
-- Returns whether there is room for a ticket, and whether calls that end can release what it lacks; otherwise nothing
-- is reserved for it.
function T.can_be_saved_for(queue, list)
  local room, can = true, true
  for i, name in ipairs(T.names_in(queue.lane)) do
    local limit, amount = T.limit_of(name), list[i] or 1
    if T.concerns(limit, amount) and not T.has_room(limit, queue.band, amount) then
      room = false
      can = can and limit.sort == 'c' and not limit.pause and T.cap_of(limit, queue.band) > 0
    end
  end
  return room, can
end

-- Returns whether an older ticket of its tenant waits for a limit of its lane. A queue keeps its place in a line while
-- this run has taken tickets from it, so its first ticket may be younger.
local function passes_older(queue)
  local _, stamp = T.first_of(queue)
  for _, name in ipairs(T.names_in(queue.lane)) do
    local line = T.line_key(T.limit_of(name), queue)
    for _, id in ipairs(call('ZRANGEBYSCORE', line, '-inf', '(' .. T.place(stamp), 'LIMIT', 0, 50)) do
      local member, first = T.first_of(T.queue_of(id))
      if member and first < stamp then return true end
    end
  end
  return false
end

-- Admits waiters that moved too often, in their order, or reserves free capacity for them.
function T.serve_starving()
  if T.served or pool.now < pool.recover_until then return end
  T.served = true
  for _, id in ipairs(call('ZRANGE', T.starving_key, 0, 7)) do
    local queue = T.queue_of(id)
    T.load_place(queue)
    if T.deliverable(queue.sid) and not passes_older(queue) then
      local member, _, next_stamp, next_member = T.first_of(queue)
      local list = T.amounts_in(string.match(member, '^%d+|%d+|%d+|(.*)$'))
      local room, can_be_saved_for = T.can_be_saved_for(queue, list)
      if room then
        T.admit_waiter(T.limit_of(queue.at), queue, member, next_stamp, next_member)
      elseif can_be_saved_for then
        for i, name in ipairs(T.names_in(queue.lane)) do
          local limit = T.limit_of(name)
          limit.reserved = limit.reserved + T.amount_in(limit, list, i)
        end
      end
    end
  end
end
