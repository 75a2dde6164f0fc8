-- does: sums the weights of the flows that request a hint, where there are several
-- keys: none
-- args: wants
-- returns: weights_of_wants()
-- units: none
-- By limit and band: the number of flows that request a hint, and the sum of their tenants' weights.
function T.weights_of_wants()
  local sums = {}
  for _, want in ipairs(q.wants) do
    local queue = own.queues[want[1]]
    if queue.at and queue.at ~= '!' then
      local where = queue.at .. '|' .. queue.band
      local sum = sums[where] or { count = 0, weight = 0 }
      sum.count, sum.weight = sum.count + 1, sum.weight + T.tenant_of(queue.tenant).weight
      sums[where] = sum
    end
  end
  return sums
end
