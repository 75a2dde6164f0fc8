-- does: lets newcomers straight in where there is room and nobody waits; the others queue
-- keys: limits used session held waiting queue heads
-- args: enqueues full
-- returns: ask(entries)
-- units: left_ms and hard_ms in ms from now
local empty = {}

local function nobody_waits(lane)
  if empty[lane] == nil then empty[lane] = redis.call('EXISTS', heads_key(lane)) == 0 end
  return empty[lane]
end

-- A repeated batch (`full`) may name tickets that are there already: those go the long way. So do
-- all of a lane once one of them had to queue, to keep their order.
local function ask(entries)
  local rest = {}
  for _, entry in ipairs(entries) do
    local lane = entry[2]
    if not q.full and pool.now >= pool.recover_until and used_of(lane) < limit_of(lane)
      and nobody_waits(lane) then
      grant(lane, q.sid, q.sid, entry[1], entry[4])
    else
      empty[lane] = false
      rest[#rest + 1] = entry
    end
  end
  enqueue(rest)
end
