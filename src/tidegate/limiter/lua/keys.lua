-- does: names the pool's keys from the one that is passed, and reads the request
-- keys: meta
-- args: request
-- returns: nothing
-- units: none
local meta_key = KEYS[1]
local prefix = string.sub(meta_key, 1, -5)
local limits_key = prefix .. 'limits'
local used_key = prefix .. 'used'
local sessions_key = prefix .. 'sessions'
local lapsing_key = prefix .. 'lapsing'
local q = cmsgpack.unpack(ARGV[1])

-- What is zero, false or empty is left out of a request: reading it is a good part of the cost.
local none = {}
setmetatable(q, { __index = {
  gen = 0, epoch = 0, uptime_ms = 0, revision = 0, ack = 0,
  transfers = none, releases = none, cancels = none, enqueues = none,
} })

-- A session's own keys outlive the pool's, so that `used` is never younger than what it counts.
local POOL_KEEP_MS = 3600000
local SESSION_KEEP_MS = 7200000

local function session_key(sid) return prefix .. 'session:' .. sid end
local function held_key(sid) return prefix .. 'held:' .. sid end
local function waiting_key(sid) return prefix .. 'waiting:' .. sid end
local function queue_key(lane, sid) return prefix .. 'queue:' .. lane .. ':' .. sid end
local function heads_key(lane) return prefix .. 'heads:' .. lane end
local function channel(sid) return prefix .. 'grants:' .. sid end

-- tostring() keeps 14 digits only.
local function int(number) return string.format('%.0f', number) end
