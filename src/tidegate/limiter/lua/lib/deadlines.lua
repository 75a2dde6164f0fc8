-- does: stamps the tickets of tenants whose calls have deadlines, so that the earliest deadline comes first
-- keys: order queue
-- args: dues
-- returns: place_between(), stamp_by_deadline(), forget_order()
-- units: ms; the stamp of a ticket that was the last of its tenant and band is a whole number; others lie between two
-- A ticket without a deadline is due `DUE_AFTER` ms after its arrival. A ticket that is due before waiting tickets of
-- its tenant and band gets a stamp between those of the tickets due before and after it. Their order is fixed on
-- arrival, so that an admission costs no more than without deadlines. `order` holds the stamps of tickets that were
-- the last on arrival by the time at which they are due, at least `DUE_APART` ms apart: closer deadlines may be
-- served in the order of arrival.
T.DUE_AFTER = 600000
T.DUE_APART = 250
T.DUE_STEPS = 1073741824

function T.order_key(tenant, band) return T.prefix .. 'order:' .. band .. '|' .. tenant end

-- Records when a ticket at the end of the queue is due. No later ticket is due before now.
function T.note_due(queue, tenant, due, stamp)
  local key = T.order_key(queue.tenant, queue.band)
  call('ZREMRANGEBYSCORE', key, '-inf', T.int(pool.now))
  call('ZADD', key, T.int(due), T.int(stamp))
  call('PEXPIRE', key, T.SESSION_KEEP_MS)
  tenant.last[queue.band] = due
end

-- Returns the stamp of a ticket that is due before others; nil if it is the last. `left_ms`: the time to its
-- deadline, 0 without one.
function T.place_between(queue, tenant, left_ms)
  local due, last = pool.now + (left_ms > 0 and left_ms or T.DUE_AFTER), tenant.last and tenant.last[queue.band]
  local later_due, later_stamp
  if last and due < last - T.DUE_APART then
    local later = call('ZRANGEBYSCORE', T.order_key(queue.tenant, queue.band), '(' .. T.int(due), '+inf',
      'WITHSCORES', 'LIMIT', 0, 1)
    later_stamp, later_due = later[1], tonumber(later[2])
  elseif not last and left_ms > 0 and tenant.waiting > 0 and left_ms < T.DUE_AFTER - T.DUE_APART then
    later_stamp, later_due = '1', pool.now + T.DUE_AFTER
  end
  if not later_stamp then return nil end
  return tonumber(later_stamp) - math.min(later_due - due, T.DUE_STEPS - 1) / T.DUE_STEPS
end

-- Returns the stamp of a new ticket. `between`: its stamp if it is due before others.
function T.stamp_by_deadline(queue, tenant, left_ms, between)
  local due = pool.now + (left_ms > 0 and left_ms or T.DUE_AFTER)
  tenant.last = tenant.last or {}
  if not tenant.last[queue.band] and left_ms > 0 then
    tenant.last[queue.band] = pool.now
    -- Tickets that wait without a deadline count as if they arrived now.
    if tenant.waiting > 0 then T.note_due(queue, tenant, pool.now + T.DUE_AFTER, 1) end
  end
  if between then
    if queue.at and queue.at ~= '!' then T.touch(T.limit_of(queue.at)) end
    if queue.at and not queue.inserted then
      queue.inserted = true
      own.reheaded[#own.reheaded + 1] = queue
    end
    return between
  end
  local last = tenant.last[queue.band]
  tenant.stamp = tenant.stamp + 1
  if last and due >= last + T.DUE_APART then T.note_due(queue, tenant, due, tenant.stamp) end
  return tenant.stamp
end

-- Deletes the order of a tenant that has no waiters.
function T.forget_order(name, tenant)
  for band in pairs(tenant.last) do call('UNLINK', T.order_key(name, band)) end
  tenant.last = nil
end
