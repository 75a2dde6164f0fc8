-- does: sums the tickets, by weight, of the flows that request a hint, where there are several
-- keys: none
-- args: wants
-- returns: tickets_of_wants()
-- units: none
-- Returns by limit and band the number of flows that request a hint, and the sum of their tickets.
function T.tickets_of_wants()
  local sums = {}
  for _, want in ipairs(q.wants) do
    local queue = own.queues[want[1]]
    if queue.at and queue.at ~= '!' then
      local where = queue.at .. '|' .. queue.band
      local sum = sums[where] or { count = 0, tickets = 0 }
      sum.count, sum.tickets = sum.count + 1, sum.tickets + T.tickets_of(want[3], T.tenant_of(queue.tenant))
      sums[where] = sum
    end
  end
  return sums
end
