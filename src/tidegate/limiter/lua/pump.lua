-- does: lets waiters in, oldest first, into whatever is free in the touched lanes
-- keys: limits used sessions session held waiting queue heads
-- args: none
-- returns: pump(own), publish(), granted, more
-- units: ms
local ACK_WINDOW = 8
local AT_ONCE = 500
local granted, more = {}, 0
local peers, outbox = {}, {}

-- A killed process must not swallow grants: its channel has no subscriber. A paused one looks
-- reachable: it is left alone once `ACK_WINDOW` grants of it are not acknowledged.
local function peer_of(sid)
  local peer = peers[sid]
  if peer then return peer end
  peer = { reachable = false, alive = false }
  peers[sid] = peer
  local expiry = redis.call('ZSCORE', sessions_key, sid)
  if expiry and tonumber(expiry) > pool.now then
    local f = redis.call('HMGET', session_key(sid), 'gen', 'sent', 'acked')
    peer.alive = true
    peer.gen, peer.sent, peer.acked = tonumber(f[1]), tonumber(f[2]), tonumber(f[3])
    peer.reachable = redis.call('PUBSUB', 'SHARDNUMSUB', channel(sid))[2] > 0
  end
  return peer
end

local function deliverable(sid, own)
  if sid == own then return true end
  local peer = peer_of(sid)
  if peer.reachable and peer.sent - peer.acked < ACK_WINDOW then return true end
  if peer.alive and not peer.blocked then
    peer.blocked = true
    redis.call('HSET', session_key(sid), 'blocked', '1')
  end
  return false
end

local function first_in(lane, own)
  local from = 0
  while true do
    local page = redis.call('ZRANGE', heads_key(lane), from, from + 15)
    for _, sid in ipairs(page) do
      if deliverable(sid, own) then return sid end
    end
    if #page < 16 then return nil end
    from = from + 16
  end
end

local function pop(lane, sid)
  local ticket = redis.call('ZPOPMIN', queue_key(lane, sid))[1]
  local next_one = redis.call('ZRANGE', queue_key(lane, sid), 0, 0, 'WITHSCORES')
  if next_one[2] then
    redis.call('ZADD', heads_key(lane), next_one[2], sid)
  else
    redis.call('ZREM', heads_key(lane), sid)
  end
  return ticket
end

local function grant(lane, sid, own, ticket, hard_ms)
  local seq = next_seq()
  redis.call('HSET', held_key(sid), ticket, int(seq) .. '|' .. int(pool.now + hard_ms) .. '|' .. lane)
  add_used(lane, 1)
  if sid == own then
    granted[#granted + 1] = { tonumber(ticket), seq }
    return
  end
  local peer = peers[sid]
  peer.sent = peer.sent + 1
  if not outbox[sid] then outbox[sid] = {} end
  table.insert(outbox[sid], { tonumber(ticket), seq })
end

local function pump_lane(lane, own, budget)
  while budget > 0 and used_of(lane) < limit_of(lane) do
    local sid = first_in(lane, own)
    if not sid then return budget end
    local ticket = pop(lane, sid)
    local entry = ticket and redis.call('HGET', waiting_key(sid), ticket)
    budget = budget - 1
    if entry then
      redis.call('HDEL', waiting_key(sid), ticket)
      local deadline, hard_ms = string.match(entry, '^([^|]*)|([^|]*)|')
      if deadline == '0' or tonumber(deadline) > pool.now then
        grant(lane, sid, own, ticket, tonumber(hard_ms))
      end
    end
  end
  return budget
end

local function pump(own)
  if pool.now < pool.recover_until then return end
  local budget = AT_ONCE
  local lanes = {}
  for lane in pairs(touched) do lanes[#lanes + 1] = lane end
  table.sort(lanes)
  for _, lane in ipairs(lanes) do budget = pump_lane(lane, own, budget) end
  if budget <= 0 then more = 1 end
end

local function publish()
  for sid, grants in pairs(outbox) do
    local peer = peers[sid]
    redis.call('HSET', session_key(sid), 'sent', int(peer.sent))
    redis.call('SPUBLISH', channel(sid), cmsgpack.pack({ pool.epoch, peer.gen, peer.sent, grants }))
  end
end
