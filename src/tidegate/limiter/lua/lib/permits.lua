-- does: stores the permits of this session, and passes permits on within it
-- keys: session queue park
-- args: flows transfers releases cancels enqueues full
-- returns: load_own(), flush_own(), set_held(), transfer(), unqueue(), used(), correct_all(), charge_transferred(), rehead_own(), rehead_filled(), own
-- units: ms; use in ms, micro-dollars or 1,000 for a call; amounts in each limit's unit, in the order of the lane
-- `own.held` maps each ticket that the request names to the permit that this session holds for it, else to false.
local own = { held = {}, written = {}, queues = {}, reheaded = {}, fields = {} }

-- One read fetches the session's record, the places of its flows, and the named tickets.
function T.load_own()
  local fields = { 'gen', 'batch', 'sent', 'acked', 'blocked', 'closed_at', 'full', 'revision' }
  local tickets = {}
  for i, flow in ipairs(q.flows) do
    own.queues[i] = T.queue_of(q.sid .. '|' .. flow)
    fields[#fields + 1] = 'at:' .. flow
  end
  for i = 1, #q.transfers, 8 do
    local from, to, member = q.transfers[i], q.transfers[i + 1], q.transfers[i + 5]
    tickets[#tickets + 1] = from
    -- For the others, this shows when they leave their queues.
    if q.full or member == '' then tickets[#tickets + 1] = to end
  end
  for i = 1, #q.releases, 5 do tickets[#tickets + 1] = q.releases[i] end
  for _, e in ipairs(q.cancels) do tickets[#tickets + 1] = e[1] end
  if q.full then
    for i = 2, #q.enqueues, 2 do
      tickets[#tickets + 1] = tonumber(string.match(q.enqueues[i], '^%d+'))
    end
  end
  local first = #fields
  for i, ticket in ipairs(tickets) do
    fields[first + i] = 'h:' .. ticket
    own.fields[ticket] = fields[first + i]
  end
  local f = T.read(T.session_key(q.sid), fields)
  own.gen, own.batch, own.sent = tonumber(f[1] or 0), tonumber(f[2] or 0), tonumber(f[3] or 0)
  own.acked, own.blocked, own.closed_at, own.full = tonumber(f[4] or 0), f[5], f[6], f[7]
  own.revision = tonumber(f[8] or 0)
  for i in ipairs(q.flows) do T.set_place(own.queues[i], f[8 + i]) end
  for i, ticket in ipairs(tickets) do own.held[ticket] = f[first + i] end
end

function T.set_own(field, value)
  own.written[field] = value
  own.dirty = true
end

function T.set_held(ticket, value)
  own.held[ticket] = value
  T.set_own(own.fields[ticket] or 'h:' .. ticket, value)
end

function T.flush_own()
  if not own.dirty then return end
  T.write(T.session_key(q.sid), own.written)
  own.dirty, own.written = nil, {}
end

function T.value_of(seq, hard_ms, use, charges, flow)
  return string.format('%d|%d|%d|%s|%s', seq, pool.now + hard_ms, use, charges, flow)
end

function T.read_held(value)
  local until_ms, use, charges, flow = string.match(value, '^[^|]*|([^|]*)|([^|]*)|([^|]*)|(.*)$')
  local band, tenant, lane = string.match(flow, '^([^|]*)|([^|]*)|(.*)$')
  return { until_ms = tonumber(until_ms), use = tonumber(use), charges = charges,
    flow = flow, band = tonumber(band), tenant = tenant, lane = lane }
end

-- Records that `count` tickets have left a queue.
function T.left(queue, count)
  local tenant = T.tenant_of(queue.tenant)
  tenant.waiting = tenant.waiting - count
  tenant.changed = true
  if not queue.reheaded then
    queue.reheaded = true
    own.reheaded[#own.reheaded + 1] = queue
  end
end

-- Removes a ticket from its queue; returns false if it was not there.
function T.unqueue(queue, member)
  if not queue or call('ZREM', T.queue_key(queue), member) == 0 then return false end
  T.left(queue, 1)
  return true
end

-- Removes the tickets that transfers name from their queues, all tickets of a queue together. Outside of a repeated
-- batch (`full`) a ticket is missing only if it was granted meanwhile: then the permits of the queue's tickets are
-- read.
function T.unqueue_transferred()
  local leaving, order = {}, {}
  for i = 1, #q.transfers, 8 do
    local queue, member = own.queues[q.transfers[i + 4]], q.transfers[i + 5]
    if member ~= '' then
      if not leaving[queue] then
        leaving[queue] = { tickets = {}, members = {} }
        order[#order + 1] = queue
      end
      local list = leaving[queue]
      list.tickets[#list.tickets + 1] = q.transfers[i + 1]
      list.members[#list.members + 1] = member
    end
  end
  for _, queue in ipairs(order) do
    local tickets, members, gone = leaving[queue].tickets, leaving[queue].members, 0
    for i = 1, #members, 1000 do
      gone = gone + call('ZREM', T.queue_key(queue), unpack(members, i, math.min(i + 999, #members)))
    end
    T.left(queue, gone)
    if gone < #members then
      local fields = {}
      for i, ticket in ipairs(tickets) do fields[i] = 'h:' .. ticket end
      for i, value in ipairs(T.read(T.session_key(q.sid), fields)) do own.held[tickets[i]] = value end
    end
  end
end

-- Returns whether all counts stay the same when a permit passes from one lane to another.
function T.same_counts(lane, other)
  return lane == other and not T.limits_in(lane).by_tokens
end

-- Records that the process passed a permit on: `to` is held in any case. If neither ticket is found, this is a repeat
-- and `to` has ended: its release follows. `member` is empty if `to` was in no queue.
function T.transfer(from, to, seq, hard_ms, number, member, outcome, took_ms)
  local queue = own.queues[number]
  local before, there = own.held[from], own.held[to]
  local use, charges, lane = 0, '', nil
  if member ~= '' and (q.full and T.unqueue(queue, member) or not q.full and not there) then
    local limit = queue.at and queue.at ~= '!' and T.limit_of(queue.at)
    use = limit and not pool.fair_by and limit.cost_ms > 0 and limit.cost_ms
      or tonumber(string.match(member, '^%d+|%d+|(%d+)'))
    if limit and pool.fair_by then use = T.use_at(limit, use) end
    queue.transferred = (queue.transferred or 0) + use
  end
  if before then
    local charged, flow = string.match(before, '^%d+|%d+|(%d+)|[^|]*|(.*)$')
    charged = tonumber(charged)
    lane = flow == queue.flow and queue.lane or string.match(flow, '^[^|]*|[^|]*|(.*)$')
    if outcome % 10 == 0 then T.learn(lane, took_ms) end
    T.used(flow, charged, pool.fair_by and T.use_of(from, charged) or took_ms)
    T.set_held(from, false)
    if there or not T.same_counts(lane, queue.lane) then T.uncount_lane(lane, string.match(before, '^%d+|%d+|%d+|([^|]*)')) end
  end
  if there then return end
  local limits = T.limits_in(queue.lane)
  if limits.by_tokens or before and limits.rated then
    charges = T.charges_of_lane(queue.lane, T.amounts_in(string.match(member, '[^|]*$')), before)
  end
  if not T.same_counts(lane, queue.lane) then T.count_lane(queue.lane, charges) end
  T.set_held(to, T.value_of(seq, hard_ms, use, charges, queue.flow))
end

-- Records the use of a call, and what its tenant was charged for it: 0 if it was admitted while no call waited. The
-- differences are added up by flow, so that a request corrects each tag once.
local differs, differing = {}, {}
function T.used(flow, charged, use)
  if charged == 0 or use == charged then return end
  local before = differs[flow]
  if not before then differing[#differing + 1] = flow end
  differs[flow] = (before or 0) + use - charged
end

-- Corrects the tags of tenants by these differences. A tag that `charge_transferred` changes is corrected by the same
-- change.
function T.correct_all()
  if #differing > 0 then T.moves = T.moves + 1 end
  for _, flow in ipairs(differing) do
    local band, tenant, lane = string.match(flow, '^([^|]*)|([^|]*)|(.*)$')
    local queue, step = T.queues[q.sid .. '|' .. flow], T.step_of(differs[flow], T.tenant_of(tenant))
    for _, limit in ipairs(T.limits_in(lane)) do
      if queue and queue.transferred and queue.at == limit.name then
        queue.differs = step
      else
        T.correct(limit, tonumber(band), tenant, step)
      end
    end
  end
end

-- Charges tenants for permits that were passed on out of order. The time of their band advances to its new first tag.
function T.charge_transferred()
  local charged, bands = {}, {}
  for _, queue in ipairs(own.reheaded) do
    if queue.transferred and queue.at and queue.at ~= '!' then
      local limit = T.limit_of(queue.at)
      local step = T.step_of(queue.transferred, T.tenant_of(queue.tenant))
      queue.tag = T.charge(limit, queue, step + (queue.differs or 0))
      charged[#charged + 1] = queue
      local band = limit.bands[queue.band]
      if not bands[band] then
        bands[band] = true
        bands[#bands + 1] = { limit, queue.band }
      end
    end
  end
  -- Hints may use these tags as long as nothing else moves.
  for _, queue in ipairs(charged) do queue.known_at = T.moves end
  for _, each in ipairs(bands) do
    local limit, number = each[1], each[2]
    local front = call('ZRANGE', T.park_key(limit, number), 0, 1, 'WITHSCORES')
    limit.bands[number].alone_at = #front == 2 and T.moves
    T.advance(limit, number, tonumber(front[2]))
  end
end

-- Moves queues that lost tickets to the places of their new heads. A queue that gets new tickets in this request is
-- moved after that: while empty, it would lose its turn to those behind it.
function T.rehead_own()
  local filling, later = {}, {}
  if #own.reheaded > 0 then
    for i = 1, #q.enqueues, 2 do filling[own.queues[q.enqueues[i]]] = true end
  end
  for _, queue in ipairs(own.reheaded) do
    local rated = queue.at and queue.at ~= '!' and T.limit_of(queue.at).sort ~= 'c'
    if filling[queue] and queue.bounces < T.STARVES and not rated then
      later[#later + 1] = queue
    else
      T.rehead(queue)
    end
  end
  own.reheaded = later
end

-- Moves the queues that lost tickets and got new ones.
function T.rehead_filled()
  for _, queue in ipairs(own.reheaded) do T.rehead(queue) end
end
