-- does: adapts a limit to how many calls a server can work on, by the times to their first tokens
-- keys: none
-- args: firsts
-- returns: first_of_call(), adapt_by_latency(), write_latency()
-- units: ms; concurrency in thousandths of a call
-- A self-hosted server refuses nothing: calls beyond its capacity queue inside it. By Little's law (Little 1961) the
-- mean length of that queue is the number of calls in flight times the fraction of their duration that they wait. A
-- call waits for as long as its time to the first token exceeds the shortest one of prompts of its length, so that
-- reading the prompt, long or cached, does not count as waiting. As in TCP Vegas (Brakmo and Peterson 1995), the
-- limit rises slowly while the queue is shorter than intended, and falls by half of what exceeds that length. The
-- gradients of Netflix and Envoy divide the shortest time by recent ones, and mistake longer prompts for a queue. As
-- in Envoy, the shortest times are measured again periodically with fewer calls in flight: otherwise the standing
-- queue would become part of them.
T.LATENCY_CALLS = 8
T.LATENCY_ROUNDS = 20
T.LATENCY_PART = 16

-- Returns the class of a prompt by its uncached tokens: two classes for each doubling from 16 on.
local function class_of(tokens)
  local class, from = 0, 16
  while tokens >= 2 * from do from, class = 2 * from, class + 2 end
  return 2 * tokens >= 3 * from and class + 1 or class
end

local function read_least(text)
  local list = {}
  for class, ms in string.gmatch(text, '(%d+)=(%d+)') do list[tonumber(class)] = tonumber(ms) end
  return list
end

local function write_least(list)
  local classes, parts = {}, {}
  for class in pairs(list) do classes[#classes + 1] = class end
  table.sort(classes)
  for i, class in ipairs(classes) do parts[i] = class .. '=' .. T.int(list[class]) end
  return table.concat(parts, ',')
end

-- `calls`: calls that ended in this round, for how long they `took` and `waited`, and the sum of the calls in `used`
-- at these times. `now`, `before`: the shortest times by class in this window of rounds and in the last one.
-- `starting`: the limit still doubles, because no round has found a queue.
local function read_latency(text)
  local starting, rounds, calls, took, waited, used, now, before =
    string.match(text, '^(%d)|(%d+)|(%d+)|(%d+)|(%d+)|(%d+)|([^|]*)|([^|]*)$')
  return { starting = starting ~= '0', rounds = tonumber(rounds or 0), calls = tonumber(calls or 0),
    took = tonumber(took or 0), waited = tonumber(waited or 0), used = tonumber(used or 0),
    now = read_least(now or ''), before = read_least(before or '') }
end

function T.write_latency(one)
  return string.format('%d|%d|%d|%d|%d|%d|%s|%s', one.starting and 1 or 0, one.rounds, one.calls, one.took, one.waited,
    one.used, write_least(one.now), write_least(one.before))
end

-- Returns the time to the first token of a call that ended, and the tokens that had to be read for it; nil if
-- unknown.
function T.first_of_call(ticket)
  if not T.firsts then
    T.firsts = {}
    for i = 1, #q.firsts, 3 do T.firsts[q.firsts[i]] = { q.firsts[i + 1], q.firsts[i + 2] } end
  end
  return T.firsts[ticket]
end

-- Returns the shortest time for a class. A longer prompt is read no faster, so its time also bounds shorter ones.
local function least_of(one, class)
  local least = math.huge
  for _, list in ipairs({ one.now, one.before }) do
    for each, ms in pairs(list) do
      if each >= class then least = math.min(least, ms) end
    end
  end
  return least
end

local function end_round(limit, one)
  local level, current = math.floor(limit.current / 1000), limit.current
  local queued = math.floor(math.floor(one.used * 1000 / one.calls) * one.waited / math.max(1, one.took))
  local full = one.used * 10 >= one.calls * level * 9
  local most = 1000 + math.floor(current / T.LATENCY_PART)
  local fit = math.floor(most / 2)
  one.rounds = one.rounds + 1
  if queued > most then
    current = current - math.min(math.floor(current / 2), math.floor((queued - fit) / 2))
    one.starting = false
  elseif queued <= fit and full then
    current = current + (one.starting and current or math.max(1000, math.floor(current / T.LATENCY_PART)))
  end
  if one.rounds >= T.LATENCY_ROUNDS then
    one.rounds, one.before, one.now, one.starting = 0, one.now, {}, false
    if full then current = current - most end
  end
  limit.current = math.max(limit.least * 1000, math.min(limit.bound * 1000, current))
  one.calls, one.took, one.waited, one.used = 0, 0, 0, 0
end

function T.adapt_by_latency(limit, took_ms, first_ms, tokens)
  if type(limit.latency) == 'string' then limit.latency = read_latency(limit.latency) end
  local one, class = limit.latency, class_of(tokens)
  one.now[class] = math.min(one.now[class] or first_ms, first_ms)
  one.calls, one.took, one.used = one.calls + 1, one.took + took_ms, one.used + limit.used
  one.waited = one.waited + math.min(took_ms, math.max(0, first_ms - least_of(one, class)))
  if one.calls >= math.max(T.LATENCY_CALLS, math.floor(limit.current / 1000)) then end_round(limit, one) end
  limit.adapted, limit.changed = true, true
end
