-- does: returns the position of a waiting ticket, without changing anything
-- keys: meta layout
-- args: request
-- request: sid ticket
-- returns: found flow held_up_by ahead rivals weight cost_ms bound room_in_ms paused_ms said
-- units: ms; ahead counts the tickets of its tenant before it, rivals is the weight of all tenants that wait there
-- uses: core clock pool limits queues
-- later: blocked rates pacing pauses
T.load_pool()
pool.now = math.max(T.wall_clock_ms(), pool.clock)
local raw = call('HGETALL', T.session_key(q.sid))
local wanted = '^' .. q.ticket .. '|'
for i = 1, #raw, 2 do
  local flow = string.match(raw[i], '^at:(.*)$')
  if flow then
    local queue = T.queue_of(q.sid .. '|' .. flow)
    T.set_place(queue, raw[i + 1])
    local waiting = call('ZRANGE', T.queue_key(queue), 0, 9999, 'WITHSCORES')
    for k = 1, #waiting, 2 do
      if string.match(waiting[k], wanted) then
        local cost_ms = tonumber(string.match(waiting[k], '^%d+|%d+|(%d+)'))
        local tenant = T.tenant_of(queue.tenant)
        if queue.at == '!' then
          return cmsgpack.pack({ 1, flow, '', (k - 1) / 2, tenant.weight, tenant.weight, cost_ms, 0, 0, 0, '' })
        end
        local limit, rivals = T.limit_of(queue.at), 0
        local first = call('ZRANGE', T.line_key(limit, queue), 0, 0, 'WITHSCORES')
        for _, name in ipairs(call('ZRANGE', T.park_key(limit, queue.band), 0, 999)) do
          rivals = rivals + T.tenant_of(name).weight
        end
        local at = tonumber(call('ZSCORE', T.timed_key, limit.name) or 0)
        return cmsgpack.pack({ 1, flow, limit.name,
          math.max(0, tonumber(waiting[k + 1]) - tonumber(first[2])), rivals, tenant.weight, cost_ms,
          limit.current and math.floor(limit.current / 1000) or limit.bound,
          math.max(0, at - pool.now), limit.pause and math.max(0, limit.pause.until_ms - pool.now) or 0,
          limit.pause and limit.pause.said or '' })
      end
    end
  end
end
return cmsgpack.pack({ 0 })
