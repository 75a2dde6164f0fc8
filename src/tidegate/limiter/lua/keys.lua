-- does: names the pool's keys from the one that is passed, and reads the request
-- keys: meta
-- args: request
-- returns: nothing
-- units: none
-- All functions and the state of a script hang on `T`: a function finds each local that it
-- captures by a walk along all captured ones, so that a hundred of them cost more than the work.
local call = redis.call
local none = {}
local q = setmetatable(cmsgpack.unpack(ARGV[1]), { __index = {
  gen = 0, epoch = 0, uptime_ms = 0, revision = 0, ack = 0, roster = 0, flows = none, wants = none,
  transfers = none, releases = none, cancels = none, enqueues = none, settles = none,
  resets = none, looks = none, told = 0, pages = none, asks = none, lefts = none,
  firm = none,
} })
local T = { meta_key = KEYS[1], prefix = string.sub(KEYS[1], 1, -5) }
T.sessions_key = T.prefix .. 'sessions'
T.lapsing_key = T.prefix .. 'lapsing'
T.timed_key = T.prefix .. 'timed'
T.starving_key = T.prefix .. 'starving'
T.spending_key = T.prefix .. 'spending'
T.paused_key = T.prefix .. 'paused'

-- A session's own keys outlive the pool's.
T.POOL_KEEP_MS = 3600000
T.SESSION_KEEP_MS = 7200000

function T.session_key(sid) return T.prefix .. 'session:' .. sid end
function T.owed_key(sid) return T.prefix .. 'owed:' .. sid end
function T.channel(sid) return T.prefix .. 'grants:' .. sid end

-- tostring() keeps 14 digits only.
function T.int(number) return string.format('%d', number) end
