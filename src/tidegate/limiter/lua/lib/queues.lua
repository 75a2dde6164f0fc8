-- does: keeps each waiting queue at the limit that blocks it, in the order of virtual time
-- keys: session queue park line past starving
-- args: sid flows
-- returns: queue_of(), tag_of(), first_of(), rehead(), charge(), advance(), amounts_in()
-- units: virtual time in hundred-thousandths of a ms, micro-dollar or thousandth of a call per weight
-- A queue holds the waiters of one session and one flow (band, tenant, lane). At a limit, tenants
-- are ordered in `park` by their start tag (start-time fair queueing, Goyal, Vin and Cheng 1996), and a
-- tenant's queues in `line` by the stamp of their first ticket.
T.queues, T.amounts, T.moves = {}, {}, 0
T.STARVES = 8
-- A double represents whole numbers exactly up to 2^53: virtual time restarts before that.
T.LONGEST = 2251799813685248
-- How far behind a band's time the tag of a tenant without waiters is kept: its calls may be in progress, and their
-- use is added to it. An hour of one permit of weight 1.
T.BEHIND = 360000000000

function T.queue_key(queue) return T.prefix .. 'queue:' .. queue.id end
function T.park_key(limit, band) return T.prefix .. 'park:' .. limit.name .. '|' .. band end
function T.past_key(limit, band) return T.prefix .. 'past:' .. limit.name .. '|' .. band end
function T.line_key(limit, queue)
  return T.prefix .. 'line:' .. limit.name .. '|' .. queue.band .. '|' .. queue.tenant
end

-- `at` is the limit where the queue waits, `!` while its session accepts no grants, nil while it is empty. `bounces`
-- is how often the ticket with the stamp `bounced` has moved between limits.
function T.queue_of(id)
  local queue = T.queues[id]
  if not queue then
    local sid, flow = string.match(id, '^([^|]*)|(.*)$')
    local band, tenant, lane = string.match(flow, '^([^|]*)|([^|]*)|(.*)$')
    queue = { id = id, sid = sid, flow = flow, band = tonumber(band), tenant = tenant, lane = lane,
      bounces = 0, bounced = 0 }
    T.queues[id] = queue
  end
  return queue
end

function T.set_place(queue, place)
  if place then
    local limit, bounces, bounced = string.match(place, '^(.*)|(%d+)|([^|]+)$')
    queue.at, queue.bounces, queue.bounced = limit, tonumber(bounces), tonumber(bounced)
  else
    queue.at, queue.bounces, queue.bounced = nil, 0, 0
  end
end

function T.amounts_in(text)
  if text == '' then return none end
  local list = T.amounts[text]
  if not list then
    list = {}
    for amount in string.gmatch(text, '[^,]+') do list[#list + 1] = tonumber(amount) or false end
    T.amounts[text] = list
  end
  return list
end

function T.first_of(queue)
  local head = call('ZRANGE', T.queue_key(queue), 0, 1, 'WITHSCORES')
  return head[1], tonumber(head[2] or 0), tonumber(head[4]), head[3]
end

function T.tag_of(limit, queue)
  local tag = call('ZSCORE', T.park_key(limit, queue.band), queue.tenant)
  if tag then return tonumber(tag), true end
  local before = call('ZSCORE', T.past_key(limit, queue.band), queue.tenant)
  return math.max(limit.bands[queue.band].virtual, tonumber(before or 0)), false
end

-- Moves a queue to the place of its current first ticket.
function T.rehead(queue)
  if not queue.at then return end
  if queue.at ~= '!' then T.touch_sized(T.limit_of(queue.at)) end
  local member, stamp = T.first_of(queue)
  if not member then
    T.vacate(queue)
  elseif queue.at ~= '!' then
    call('ZADD', T.line_key(T.limit_of(queue.at), queue), T.place(stamp), queue.id)
    if queue.bounces >= T.STARVES and queue.bounced ~= stamp then
      T.forget_starving(queue)
      T.save_place(queue)
    end
    T.leave_line(queue, T.limit_of(queue.at), member, stamp)
  end
end

-- Adds `step` to a tenant's tag at a limit; returns its new tag.
function T.charge(limit, queue, step)
  T.moves = T.moves + 1
  if queue.at == limit.name then
    return tonumber(call('ZINCRBY', T.park_key(limit, queue.band), T.int(step), queue.tenant))
  end
  local tag, parked = T.tag_of(limit, queue)
  local key = parked and T.park_key(limit, queue.band) or T.past_key(limit, queue.band)
  call('ZADD', key, T.int(tag + step), queue.tenant)
  if not parked then call('PEXPIRE', key, T.POOL_KEEP_MS) end
  return tag + step
end

-- Advances the virtual time of a band to `tag`.
function T.advance(limit, number, tag)
  local band = limit.bands[number]
  band.virtual = math.max(band.virtual, tag)
  limit.changed = true
  if band.virtual > T.LONGEST then T.restart_time(limit, number) end
end
