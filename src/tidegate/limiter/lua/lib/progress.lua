-- does: samples how fast the waiters of a limit and band are admitted, for estimates of waits
-- keys: progress
-- args: none
-- returns: note_progress(), progress_of()
-- units: ms; virtual time as in queues
-- A sample is now|virtual time|cost_ms. It is taken while calls wait, at least `APART_MS` after the last one. No
-- admission depends on samples.
T.APART_MS, T.MOST_SAMPLES = 900, 60

function T.progress_key(limit, band) return T.prefix .. 'progress:' .. limit.name .. '|' .. band end

function T.note_progress(limit, number)
  local key, band = T.progress_key(limit, number), limit.bands[number]
  local at, virtual = string.match(call('LINDEX', key, -1) or '', '^(%d+)|(%d+)')
  if at and tonumber(virtual) > band.virtual then call('UNLINK', key) end
  if at and pool.now - tonumber(at) < T.APART_MS and pool.now >= tonumber(at) then return end
  local samples = call('RPUSH', key, T.int(pool.now) .. '|' .. T.int(band.virtual) .. '|' .. T.int(limit.cost_ms))
  if samples > T.MOST_SAMPLES then call('LTRIM', key, -T.MOST_SAMPLES, -1) end
  call('PEXPIRE', key, 60000 + 2 * pool.lease_ms)
end

-- Returns the samples of the time since calls wait without a break, the oldest first.
function T.progress_of(limit, number)
  local list, later = {}, pool.now
  local raw = call('LRANGE', T.progress_key(limit, number), 0, -1)
  for i = #raw, 1, -1 do
    local at, virtual, cost_ms = string.match(raw[i], '^(%d+)|(%d+)|(%d+)$')
    at = tonumber(at)
    if later - at > 1500 + pool.lease_ms then break end
    table.insert(list, 1, { at, tonumber(virtual), tonumber(cost_ms) })
    later = at
  end
  return list
end
