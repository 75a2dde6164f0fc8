-- does: applies the messages of a process, releases first, and admits the waiters that fit
-- keys: queue
-- args: transfers releases settles cancels enqueues full lefts dues
-- returns: apply_messages(), finish_run(), granted, stamps, refused, barred, waited, outlooks, more
-- units: ms
T.granted, T.stamps, T.refused, T.more, T.outbox, T.retry, T.timers_changed, T.fresh_ones =
  {}, {}, {}, 0, {}, false, false, {}
-- `waited` maps the number of a flow to its queue: the reply reports what the queue waits for.
T.barred, T.waited, T.outlooks = {}, {}, {}
-- Tenants with waiters of a session that joins again: their stamps are kept.
T.returning = {}

-- Returns whether a session is new: it gets no permits until all others know of it (see `roster.lua`).
function T.is_fresh(sid)
  if pool.fresh == 0 or not sid then return false end
  if T.fresh_ones[sid] == nil then
    T.fresh_ones[sid] = call('ZSCORE', T.prefix .. 'fresh', sid) ~= false
  end
  return T.fresh_ones[sid]
end

-- Returns whether a ticket of a repeated batch (`full`) exists already; it keeps its place.
function T.is_repeated(i, queue, member)
  local stamp = call('ZSCORE', T.queue_key(queue), member)
  if stamp then T.stamps[i] = tonumber(stamp) end
  return stamp or own.held[tonumber(string.match(member, '^%d+'))]
end

-- Admits the first ticket of a queue, or returns the limit at which it must wait.
function T.admit_new(queue, member)
  if pool.now < pool.recover_until or T.is_fresh(own.sid) then
    return T.place_of(queue, T.amounts_in(string.match(member, '^%d+|%d+|%d+|(.*)$')))
  end
  local ticket, hard_ms, text = string.match(member, '^(%d+)|(%d+)|%d+|(.*)$')
  local limit = T.blocker_of_new(queue, T.amounts_in(text))
  if not limit then T.admit(queue, ticket, tonumber(hard_ms), 0, T.amounts_in(text)) end
  return limit
end

-- Admits the tickets that fit and have no waiter before them, and queues the others. `entries` alternates flow and
-- member (ticket|hard_ms|use|amounts). The tickets of a session that joined again keep their stamps.
function T.enqueue(entries)
  local adding, fresh = {}, {}
  for i = 1, #entries / 2 do
    local queue, member = own.queues[entries[2 * i - 1]], entries[2 * i]
    local tenant = T.tenant_of(queue.tenant)
    T.stamps[i] = 0
    if not (q.full and T.is_repeated(i, queue, member)) then
      -- Behind other tickets of its queue, a ticket changes nothing at the limits.
      local limit = not queue.at and T.admit_new(queue, member)
      local due, former = q.dues[i] or 0, q.epoch == pool.epoch and q.stamps[i] or 0
      local between = limit ~= nil and (former > 0 and former
        or (due > 0 or tenant.last) and T.place_between(queue, tenant, due)) or nil
      local place = (q.lefts[i] or 0) ~= 0 and (limit or queue.at and queue.at ~= '!' and T.limit_of(queue.at))
      if limit == nil then
        T.stamps[i] = 0
      elseif place and T.refuse_late(queue, member, q.lefts[i], place, between or tenant.stamp + 1) then
        T.stamps[i] = 0
      elseif tenant.waiting >= pool.queue_max then
        T.refused[#T.refused + 1] = tonumber(string.match(member, '^%d+'))
      else
        local stamp
        tenant.stamp = math.max(tenant.stamp, math.floor(former))
        if due == 0 and not tenant.last and not between then
          stamp = tenant.stamp + 1
          tenant.stamp = stamp
        else
          stamp = T.stamp_by_deadline(queue, tenant, due, between)
        end
        tenant.waiting, tenant.changed = tenant.waiting + 1, true
        T.stamps[i] = stamp
        T.waited[entries[2 * i - 1]] = queue
        local list = adding[queue]
        if not list then
          list = {}
          adding[queue] = list
          fresh[#fresh + 1] = queue
        end
        if #q.lefts > 0 then
          -- Written immediately, because the deadline check of the next ticket counts the tickets before it.
          call('ZADD', T.queue_key(queue), T.place(stamp), member)
        else
          list[#list + 1] = stamp
          list[#list + 1] = member
        end
        if limit then
          T.park(queue, limit, stamp)
          T.touch(limit)
          list.fresh = true
        end
      end
    end
  end
  for _, queue in ipairs(fresh) do
    local list = adding[queue]
    for i = 1, #list, 1000 do
      call('ZADD', T.queue_key(queue), unpack(list, i, math.min(i + 999, #list)))
    end
    -- A queue that lost all its tickets in this request was deleted: its key is new and has no TTL.
    if list.fresh or queue.reheaded then call('PEXPIRE', T.queue_key(queue), T.SESSION_KEEP_MS) end
  end
end

-- Applies all messages of a process, releases first.
function T.apply_messages()
  if not q.full then T.unqueue_transferred() end
  for i = 1, #q.transfers, 8 do T.transfer(unpack(q.transfers, i, i + 7)) end
  for i = 1, #q.releases, 5 do T.release(unpack(q.releases, i, i + 4)) end
  for _, entry in ipairs(q.settles) do T.settle(entry) end
  for _, entry in ipairs(q.cancels) do T.cancel(entry) end
  T.correct_all()
  T.charge_transferred()
  T.rehead_own()
  if pool.starving > 0 then T.serve_starving() end
  T.enqueue(q.enqueues)
  T.rehead_filled()
  for name in pairs(T.returning) do
    local tenant = T.tenant_of(name)
    tenant.returns, tenant.changed = nil, true
  end
end

-- Admits the waiters that fit, under the limits that have changed.
function T.finish_run()
  if next(T.touched) or pool.starving > 0 or T.retry
    or pool.timed_at > 0 and pool.now >= pool.timed_at then
    T.pump()
  end
  if next(T.outbox) then T.publish() end
  if own.sid and next(T.waited) then T.report_waits() end
  -- A report may have read that a day ends earlier than its timer.
  if T.retry then T.set_timers() end
end

-- Reports the limit that each queue of `waited` waits for now. Most wait for a call to end, which needs no outlook.
function T.report_waits()
  local list = T.outlooks
  for number, queue in pairs(T.waited) do
    if queue.at and queue.at ~= '!' then
      local limit = T.limit_of(queue.at)
      list[#list + 1] = limit.sort == 'c' and not limit.pause and { number, queue.at, 0, limit.used, 0 }
        or T.outlook(number, queue, limit)
    end
  end
  if #list > 1 then table.sort(list, function(one, other) return one[1] < other[1] end) end
end
